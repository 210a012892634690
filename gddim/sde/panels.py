"""The equations of Ψ, Σ and R on panels of time in y = √t: each panel by itself, then one after the other."""

from typing import NamedTuple

import numpy as np

from gddim.sde.coefficients import Coefficients
from gddim.sde.collocation import (
    BETWEEN,
    BETWEEN_W,
    DIFFERENTIATE,
    GAPS,
    GAUSS_NODES,
    GAUSS_WEIGHTS,
    INTEGRATE,
    NODES,
    TO_BETWEEN,
    TO_ENDS,
    at_points,
    collocate,
    tail,
)
from gddim.sde.linalg import inverse, matrix, transpose

# Where a panel is judged, and what of it an error there stands for: between the nodes, and at the ends, where a jump that
# lies beyond the last point before them is seen.
JUDGE = np.vstack([TO_BETWEEN, TO_ENDS])
JUDGE_W = np.concatenate([BETWEEN_W, [1 + BETWEEN[0], 1 - BETWEEN[-1]]])
INTEGRATE_TO = np.vstack([INTEGRATE, GAUSS_WEIGHTS])  # from the lower edge to every node, and to the upper edge


class Panels(NamedTuple):
    """Arrays over panels in order of time: what each is by itself.

    With Ψ from the lower edge to every node and to the upper edge, NODES + 1 points: `Σ = gain Σ_lower gainᵀ + noise noiseᵀ`.
    For k = 1 `psi` is the logarithm of Ψ, so that no decay is too fast, and `Σ = gain Σ_lower + noise`.
    """

    lower: np.ndarray
    upper: np.ndarray
    F: np.ndarray  # (panels, nodes, kinds, k, k), and GG, psi
    GG: np.ndarray
    psi: np.ndarray
    whole: np.ndarray  # psi at the upper edge, (panels, kinds, k, k)
    error_F: np.ndarray  # by how much F is no polynomial, the size of each row being 1: (panels, kinds, k, k)
    error_GG: np.ndarray
    missed_F: np.ndarray  # ∫|F − polynomial| dτ, (panels, kinds, k, k)
    missed_GG: np.ndarray
    gain: np.ndarray  # (panels, nodes + 1, kinds, k, k), and noise
    noise: np.ndarray
    negative: np.ndarray  # what makes GGᵀ not positive semidefinite: a negative number, (panels,)
    rate: np.ndarray  # ∫‖F‖ dτ, of which a panel bears 1; for k = 1 of growth alone, (panels,)

    @property
    def time(self) -> np.ndarray:
        return ((self.lower + self.upper) / 2) ** 2

    @property
    def duration(self) -> np.ndarray:
        return (self.upper - self.lower) * (self.upper + self.lower)


def measure(coefficients: Coefficients, lower: np.ndarray, upper: np.ndarray) -> Panels:
    """The panels [lower, upper] of y, in pieces that fit in memory."""
    k = coefficients.shape[-1]
    at_once = max(1, 2**21 // ((NODES + len(JUDGE)) * len(coefficients.kinds[0]) * k * k))
    cuts = range(at_once, len(lower), at_once)
    pieces = [_measure(coefficients, *ends) for ends in zip(np.split(lower, cuts), np.split(upper, cuts), strict=True)]
    return Panels(*map(np.concatenate, zip(*pieces, strict=True)))


def _measure(coefficients: Coefficients, lower: np.ndarray, upper: np.ndarray) -> Panels:
    width = (upper - lower)[:, None]
    inset = np.maximum(2.0**-41 * width, 4 * np.finfo(float).eps * upper[:, None])  # its square is inside, too
    inside = lower[:, None] + width * (1 + np.append(GAUSS_NODES, BETWEEN)) / 2
    y = np.concatenate([inside, lower[:, None] + inset, upper[:, None] - inset], 1)
    F, GG = coefficients.at(y**2)
    slope = (width * y)[..., None, None, None]  # dτ/dξ
    shift = (2 * inset / width * [1, -1])[..., None, None, None]
    nodes, between, judge = slice(NODES), slice(NODES, -2), slice(NODES, None)
    judged: list[np.ndarray] = []
    for values in (F, GG):
        last, size = tail(values[:, nodes])
        found = at_points(JUDGE, values[:, nodes])
        found[:, -2:] += shift * at_points(TO_ENDS @ DIFFERENTIATE, values[:, nodes])
        gap = np.abs(found - values[:, judge])
        judged.append(np.maximum(last, gap.max(1)) / np.where(size > 0, size, 1))
        judged.append((slope[:, judge] * JUDGE_W[:, None, None, None] * gap).sum(1))
    A = slope[:, nodes] * F[:, nodes]
    G, negative = _semidefinite_root(GG[:, between])
    G = G * np.sqrt(slope[:, between] * BETWEEN_W[:, None, None, None])
    if F.shape[-1] == 1:
        psi, whole, gain, noise = _scalar(A, slope[:, nodes] * GG[:, nodes], G)
        rate = np.maximum(A, 0).max((1, 2, 3, 4))
    else:
        psi, whole, gain, noise = _coupled(A, G)
        rate = np.abs(A).sum(-1).max((1, 2, 3))
    negative = negative.reshape(len(lower), -1).min(1)
    return Panels(
        lower, upper, F[:, nodes], GG[:, nodes], psi, whole, judged[0], judged[2], judged[1], judged[3], gain, noise,
        negative, rate,
    )  # fmt: skip


def _coupled(A: np.ndarray, G: np.ndarray) -> tuple[np.ndarray, ...]:
    """psi, whole, gain and noise for k > 1: the noise as sums of squares, by Ψ⁻¹ as seen from the
    lower edge.
    """
    psi, whole = collocate(A)
    pulled = at_points(TO_BETWEEN, inverse(psi)) @ G
    pulled = pulled.reshape(len(A), GAPS, -1, *pulled.shape[2:])
    root, roots = np.zeros_like(whole), []
    for gap in range(GAPS):
        root = gram_schmidt(np.concatenate([root, *np.moveaxis(pulled[:, gap], 1, 0)], -1))
        roots.append(root)
    gain = np.concatenate([psi, whole[:, None]], 1)
    return psi, whole, gain, gain @ np.stack(roots, 1)


def _scalar(A: np.ndarray, g: np.ndarray, G: np.ndarray) -> tuple[np.ndarray, ...]:
    """psi, whole, gain and noise for k = 1, `Σ' = 2AΣ + g`.

    Where Ψ changes by more than e, Σ is found at the nodes by collocation, which needs only that Σ is a polynomial and not
    that Ψ is, and at the upper edge from its polynomial, so that what has decayed stays so, at any rate.
    """
    log = at_points(INTEGRATE_TO, A)
    stiff = np.abs(A).max(1) > 1
    safe = np.where(stiff[:, None], 0, A)
    pulled = G**2 * np.exp(-2 * at_points(TO_BETWEEN @ INTEGRATE, safe))
    gained = np.cumsum(pulled.reshape(len(A), GAPS, -1, *A.shape[2:]).sum(2), 1)
    gain = np.exp(2 * at_points(INTEGRATE_TO, safe))
    noise = gain * gained
    panel, kind = np.nonzero(stiff[..., 0, 0])
    if len(panel):
        a, rhs = A[panel, :, kind, 0, 0], g[panel, :, kind, 0, 0] @ INTEGRATE.T
        system = np.eye(NODES) - 2 * INTEGRATE * a[:, None]
        found = np.linalg.solve(system, np.stack([np.ones_like(rhs), rhs], -1))
        found = np.concatenate([found, at_points(TO_ENDS[1:], found)], 1)
        gain[panel, :, kind, 0, 0], noise[panel, :, kind, 0, 0] = found[..., 0], found[..., 1]
    return log[:, :NODES], log[:, NODES], gain, noise


def propagate(panels: Panels, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L and R at the nodes, `(panels, nodes, kinds, k, k)`, from the initial covariance `(kinds, k, k)`.

    A square root of Σ goes from panel to panel, never Σ, so that a nearly singular one is as exact as another.
    """
    gain, noise = panels.gain, panels.noise
    if covariance.shape[-1] == 1:
        starts = [covariance]
        for p in range(len(gain) - 1):
            starts.append(np.abs(gain[p, -1] * starts[-1] + noise[p, -1]))
        L = np.sqrt(gain[:, :-1] * np.stack(starts)[:, None] + noise[:, :-1])
        return L, L
    starts = [np.linalg.cholesky(covariance)]
    for p in range(len(gain) - 1):
        starts.append(gram_schmidt(np.concatenate([gain[p, -1] @ starts[-1], noise[p, -1]], -1)))
    L = gram_schmidt(np.concatenate([gain[:, :-1] @ np.stack(starts)[:, None], noise[:, :-1]], -1))
    return L, L @ _rotation(panels, L)


def _rotation(panels: Panels, L: np.ndarray) -> np.ndarray:
    """`O = L⁻¹R` at the nodes, from `O' = (L⁻¹F̂L − L⁻¹L') O`, whose generator is skew: for k = 2 a rate of rotation."""
    width = (panels.upper - panels.lower)[:, None]
    slope = (width * (panels.lower[:, None] + width * (1 + GAUSS_NODES) / 2))[..., None, None, None]
    S = forward(L, panels.F @ L + transpose(forward(L, panels.GG)) / 2)
    symmetric = S + transpose(S)
    generator = S - np.tril(symmetric) * (1 - 0.5 * np.eye(S.shape[-1]))
    generator = slope * (generator - transpose(generator)) / 2
    if generator.shape[-1] == 2:
        rate = generator[..., 1, 0]
        whole = np.cumsum(np.einsum("i,mi...->m...", GAUSS_WEIGHTS, rate), 0)[:, None]
        angle = at_points(INTEGRATE - GAUSS_WEIGHTS, rate) + whole
        cos, sin = np.cos(angle), np.sin(angle)
        return matrix(np, [[cos, -sin], [sin, cos]])
    O, whole = collocate(generator)
    start = np.eye(S.shape[-1])
    for p in range(len(O)):
        O[p], start = O[p] @ start, whole[p] @ start
    return O


def gram_schmidt(A: np.ndarray) -> np.ndarray:
    """The lower triangular L with `L Lᵀ = A Aᵀ` for A `(…, k, n)`, by Gram–Schmidt on the rows, which may be 0."""
    k = A.shape[-2]
    L = np.zeros((*A.shape[:-1], k))
    directions: list[np.ndarray] = []
    for i in range(k):
        rest = A[..., i, :]
        for j, direction in enumerate(directions):
            L[..., i, j] = (rest * direction).sum(-1)
            rest = rest - L[..., i, j, None] * direction
        L[..., i, i] = np.sqrt((rest * rest).sum(-1))
        directions.append(rest / np.where(L[..., i, i] > 0, L[..., i, i], 1)[..., None])
    return L


def forward(L: np.ndarray, B: np.ndarray) -> np.ndarray:
    """`L⁻¹ B` by forward substitution, which keeps small rows as exact as large ones."""
    rows: list[np.ndarray] = []
    for i in range(L.shape[-1]):
        rest = B[..., i, :]
        for j, row in enumerate(rows):
            rest = rest - L[..., i, j, None] * row
        rows.append(rest / L[..., i, i, None])
    return np.stack(rows, -2)


def _semidefinite_root(S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower triangular G with `G Gᵀ = S`, and what of S is not positive semidefinite, `(…)`: negative where it is not.

    Rounding may make a pivot that should be 0 anything: no entry is larger than the diagonal of S allows.
    """
    G, rest, negative = np.zeros_like(S), S, np.zeros(S.shape[:-2])
    for i in range(S.shape[-1]):
        diagonal = np.sqrt(np.maximum(np.diagonal(rest, axis1=-2, axis2=-1), 0))
        pivot = diagonal[..., i, None]
        column = np.clip(rest[..., i] / np.where(pivot > 0, pivot, 1), -diagonal, diagonal) * (pivot > 0)
        G[..., i:, i] = column[..., i:]
        rest = rest - column[..., :, None] * column[..., None, :]
        negative = np.minimum(negative, -np.abs(rest[..., i:, i]).max(-1))
    return G, negative
