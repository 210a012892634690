"""Any linear SDE from its coefficients, solved once in float64."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gddim.sde.base import AbstractLinearSDE, Time
from gddim.sde.collocation import DEPTH, INTEGRATE, NODES, TO_LEGENDRE, W, X, collocate, unresolved
from gddim.sde.host import in_float64
from gddim.sde.linalg import Array, as_times, inverse, matrix, namespace, product, transpose

Coefficient = Callable[[Any], Any]  # of a scalar time, to (*#dims, k, k)


class LinearSDE(AbstractLinearSDE):
    """`du = F(t) u dt + G(t) dw` for any F and GGᵀ, which need not commute, per position or for all (`(*#dims, k, k)`).

    Ψ, Σ and R are solved once, when first needed, in float64: the equations of Ψ and Σ by Gauss collocation on panels
    that are bisected until all are polynomials to 1e-12, and `R = L O` by `O' = (L⁻¹F̂L − L⁻¹L') O`, `O_0 = I`, an equation
    of rotations that does not share the stiffness of `R' = F̂ R`. From then on they are polynomials, on host and device.

    `drift` and `diffusion_squared` are functions of a scalar time, in NumPy, JAX or plain Python. Raises `ValueError`,
    naming the argument, for coefficients that are not finite or not of one shape `(*#dims, k, k)`, a GGᵀ that is not
    positive semidefinite, an initial covariance that is not positive definite (for k = 1 it may be 0), a horizon ≤ 0.

    >>> beta = lambda t: 0.1 + 19.9 * t  # the variance-preserving SDE, from its coefficients
    >>> vp = LinearSDE(lambda t: [[-beta(t) / 2]], lambda t: [[beta(t)]], initial_covariance=[[0.0]])
    >>> bool(np.allclose(vp.noise_factor(0.3), gddim.VP().noise_factor(0.3), rtol=1e-11))
    True
    """

    k: int = eqx.field(static=True)
    horizon: float = eqx.field(static=True)
    basis: tuple[Callable, Callable] | None = eqx.field(static=True)
    _solution: "Solution" = eqx.field(static=True)

    def __init__(
        self,
        drift: Coefficient,
        diffusion_squared: Coefficient,
        initial_covariance: Any,
        horizon: float = 1.0,
        basis: tuple[Callable, Callable] | None = None,
    ):
        """`basis`: the pair `(from_pixels, to_pixels)` where dims are not pixels, e.g. `(dct2, idct2)`."""
        if not 0 < horizon < np.inf:
            raise ValueError(f"horizon={horizon} must be > 0")
        F = _checked("drift", np.asarray(drift(horizon / 2), np.float64))
        GG = _checked("diffusion_squared", np.asarray(diffusion_squared(horizon / 2), np.float64))
        self.k = F.shape[-1]
        covariance = _checked("initial_covariance", np.asarray(initial_covariance, np.float64))
        for name, value in (("diffusion_squared", GG), ("initial_covariance", covariance)):
            if value.shape[-1] != self.k:
                raise ValueError(f"{name} has shape {value.shape}, drift {F.shape}: the last two axes must agree")
            smallest = np.linalg.eigvalsh(value).min() if np.allclose(value, transpose(value)) else -np.inf
            strict = name == "initial_covariance" and self.k > 1
            if smallest < -1e-12 * np.abs(value).max() or (strict and smallest <= 0):
                raise ValueError(f"{name} must be symmetric and positive {'' if strict else 'semi'}definite")
        self.horizon, self.basis = float(horizon), basis
        whole = np.broadcast_to(covariance, np.broadcast_shapes(F.shape, GG.shape, covariance.shape))
        self._solution = Solution(drift, diffusion_squared, whole, self.horizon)

    def transition(self, t: Time, s: Time) -> Array:
        xp, t, s = as_times(t, s)
        t, s = t + 0 * s, s + 0 * t
        return _transition(self._solution, t, s) if xp is jnp else self._solution.transition(t, s)

    def noise_factor(self, t: Time) -> Array:
        xp, t = as_times(t)
        return _noise_factor(self._solution, t) if xp is jnp else self._solution("R", t)

    def to_pixels(self, u: Array) -> Array:
        return u if self.basis is None else self.basis[1](u)

    def from_pixels(self, x: Array) -> Array:
        return jnp.asarray(x) if self.basis is None else self.basis[0](x)


def _checked(name: str, value: np.ndarray) -> np.ndarray:
    if value.ndim < 2 or value.shape[-1] != value.shape[-2]:
        raise ValueError(f"{name} has shape {value.shape}; it must be (*dims, k, k)")
    if not np.all(np.isfinite(value)):
        raise ValueError(f"{name} is not finite")
    return value


class Solution:
    """The process as polynomials in y = √t on panels of [0, √T]: `Ψ(τ, lower)`, R, F and GGᵀ; covariance `(*#dims, k, k)`.

    Positions whose coefficients are equal, as those of the frequencies (i, j) and (j, i) of an image, are solved as one.
    """

    def __init__(self, drift: Coefficient, diffusion_squared: Coefficient, covariance: np.ndarray, horizon: float):
        self.drift, self.diffusion_squared = drift, diffusion_squared
        self.covariance, self.shape, self.horizon = covariance, covariance.shape, horizon

    def __repr__(self) -> str:
        """What tells one process from another in the description of a run: the sizes of its coefficients."""
        F, GG = self._coefficients(self.horizon * (1 + X) / 2)
        sizes = (f"{name} {np.sqrt(np.mean(v**2)):.8g}" for name, v in dict(F=F, GG=GG, start=self.covariance).items())
        return f"{self.shape}: {', '.join(sizes)}"

    @cached_property
    def kinds(self) -> tuple[np.ndarray, np.ndarray]:
        """One position of each kind, `(kinds,)`, and the kind of every position, `#dims`."""
        *dims, k, _ = self.shape
        known = np.concatenate([*self._coefficients(self.horizon * (1 + X) / 2), self.covariance[None]])
        rows = known.reshape(len(known), -1, k * k).swapaxes(0, 1).reshape(-1, len(known) * k * k)
        _, first, kind = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        return first, kind.reshape(dims)

    @cached_property
    def table(self) -> dict[str, np.ndarray]:
        """`edges` (panels+1,), Legendre coefficients `psi`, `R`, `F`, `GG` (panels, nodes, kinds, k, k), and `whole`,
        `Ψ(upper, lower)` of each panel, with its `inverse`.
        """
        edges = np.sqrt(self.horizon) * np.append(0.0, 2.0 ** np.arange(-10, 1))
        for _ in range(2 * DEPTH):
            values, rough = self._solve(edges)
            if not rough.any():
                break
            edges = np.sort(np.append(edges, (edges[1:] + edges[:-1])[rough] / 2))
        else:
            raise ValueError(
                "drift or diffusion_squared is too rough in time: no polynomials on 2^28 panels resolve it"
            )
        whole = values.pop("whole")
        coefficients = {name: np.einsum("ni,mi...->mn...", TO_LEGENDRE, value) for name, value in values.items()}
        return coefficients | dict(edges=edges, whole=whole, inverse=np.linalg.inv(whole))

    def _solve(self, edges: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Values at the nodes of the panels between the edges, and which panels do not resolve them."""
        width = np.diff(edges)[:, None]
        y = edges[:-1, None] + width * (1 + X) / 2
        F, GG, covariance = (self._of_kinds(values) for values in (*self._coefficients(y**2), self.covariance))
        slope = (width * y)[..., None, None, None]  # dτ/dξ
        rough = np.abs(slope * F).sum(-1).max((1, 2, 3)) > 1
        rough = rough | unresolved(F) | unresolved(GG)
        if rough.any():
            return {}, rough
        psi, whole = collocate(slope * F)
        pulled = np.linalg.solve(psi, slope * GG)
        pulled = transpose(np.linalg.solve(psi, transpose(pulled)))  # Ψ⁻¹ GGᵀ Ψ⁻ᵀ dτ/dξ
        gained = np.einsum("ij,mj...->mi...", INTEGRATE, pulled)
        sigma, start = np.empty(psi.shape), covariance
        for p in range(len(psi)):
            sigma[p] = psi[p] @ (start + gained[p]) @ transpose(psi[p])
            start = whole[p] @ (start + np.einsum("i,i...->...", W, pulled[p])) @ transpose(whole[p])
        L = np.linalg.cholesky((sigma + transpose(sigma)) / 2)
        R = L if L.shape[-1] == 1 else L @ self._rotation(slope, F, GG, L)
        return {"psi": psi, "R": R, "F": F, "GG": GG, "whole": whole}, unresolved(psi) | unresolved(R)

    def _of_kinds(self, values: np.ndarray) -> np.ndarray:
        """`(…, *#dims, k, k)` to `(…, kinds, k, k)`."""
        lead = values.shape[: values.ndim - len(self.shape)]
        return values.reshape(*lead, -1, *self.shape[-2:])[..., self.kinds[0], :, :]

    def _coefficients(self, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """F and GGᵀ at an array of times, `(*tau.shape, *#dims, k, k)`."""
        both = []
        for name, fn in (("drift", self.drift), ("diffusion_squared", self.diffusion_squared)):
            try:
                values = in_float64(fn, tau)
            except jax.errors.JAXTypeError:  # not written for tracing: time by time
                values = np.stack([np.asarray(fn(float(t)), np.float64) for t in tau.reshape(-1)])
                values = values.reshape(tau.shape + values.shape[1:])
            both.append(_checked(f"{name} on (0, {self.horizon}]", values))
        missing = lambda v: (1,) * (tau.ndim + len(self.shape) - v.ndim)
        ranked = (v.reshape(tau.shape + missing(v) + v.shape[tau.ndim :]) for v in both)
        F, GG = (np.broadcast_to(v, tau.shape + self.shape) for v in ranked)
        return F, GG

    def _rotation(self, slope: np.ndarray, F: np.ndarray, GG: np.ndarray, L: np.ndarray) -> np.ndarray:
        """`O = L⁻¹R` at the nodes, from `O' = (L⁻¹F̂L − L⁻¹L') O`, whose generator is skew: for k = 2 a rate of rotation."""
        S = np.linalg.solve(L, F @ L + transpose(np.linalg.solve(L, transpose(GG))) / 2)
        symmetric = S + transpose(S)
        generator = S - np.tril(symmetric) * (1 - 0.5 * np.eye(S.shape[-1]))
        generator = slope * (generator - transpose(generator)) / 2
        if generator.shape[-1] == 2:
            rate = generator[..., 1, 0]
            whole = np.cumsum(np.einsum("i,mi...->m...", W, rate), 0)[:, None]
            angle = np.einsum("ij,mj...->mi...", INTEGRATE - W, rate) + whole
            cos, sin = np.cos(angle), np.sin(angle)
            return matrix(np, [[cos, -sin], [sin, cos]])
        O, whole = collocate(generator)
        start = np.eye(S.shape[-1])
        for p in range(len(O)):
            O[p], start = O[p] @ start, whole[p] @ start
        return O

    def _locate(self, t: Array) -> tuple[Array, Array]:
        """The panel of each time and `P_n(ξ)`, `(*t.shape, NODES)`."""
        xp = namespace(t)
        edges = xp.asarray(self.table["edges"], t.dtype)
        y = xp.sqrt(t)
        panel = xp.clip(xp.searchsorted(edges, y, side="right") - 1, 0, len(edges) - 2)
        lower, upper = edges[panel], edges[panel + 1]
        xi = (2 * y - lower - upper) / (upper - lower)
        basis = [xp.ones_like(xi), xi]
        for n in range(1, NODES - 1):
            basis.append(((2 * n + 1) * xi * basis[n] - n * basis[n - 1]) / (n + 1))
        return panel, xp.stack(basis, -1)

    def __call__(self, name: str, t: Array) -> Array:
        """The polynomial called `name` at the times, `(*t.shape, *#dims, k, k)`."""
        return self._everywhere(self._at(name, t))

    def _at(self, name: str, t: Array) -> Array:
        """The same for every kind of position, `(*t.shape, kinds, k, k)`."""
        xp = namespace(t)
        panel, basis = self._locate(t)
        coefficients = xp.asarray(self.table[name], t.dtype)[panel]
        return (coefficients * basis[..., None, None, None]).sum(t.ndim)

    def _everywhere(self, values: Array) -> Array:
        """`(…, kinds, k, k)` to `(…, *#dims, k, k)`."""
        return values[..., self.kinds[1], :, :]

    def transition(self, t: Array, s: Array) -> Array:
        """`Ψ(t, s)` as a product over the panels between s and t: of their Ψ forward in time, of their inverses backward."""
        xp = namespace(t)
        late, early = xp.maximum(t, s), xp.minimum(t, s)
        first, last = self._locate(early)[0], self._locate(late)[0]
        whole, back = (xp.asarray(self.table[name], t.dtype) for name in ("whole", "inverse"))
        psi_late, psi_early = self._at("psi", late), self._at("psi", early)
        # backward in time the transpose is built, so that both directions multiply from the right
        forward = (t >= s).reshape(t.shape + (1,) * (psi_late.ndim - t.ndim))
        choose = lambda ahead, behind: xp.where(forward, ahead, transpose(behind))
        one = xp.eye(whole.shape[-1], dtype=t.dtype).reshape((1,) * (psi_late.ndim - 2) + whole.shape[-2:])

        def step(distance: Any, M: Array) -> Array:
            panel = xp.maximum(last - distance, 0)
            active = (last - distance >= first).reshape(forward.shape)
            return product(M, xp.where(active, choose(whole[panel], back[panel]), one))

        M = choose(psi_late, inverse(psi_late))
        if xp is jnp:
            M = jax.lax.fori_loop(1, len(whole), step, M)
        else:
            for distance in range(1, 1 + int(np.max(last - first, initial=0))):
                M = step(distance, M)
        M = product(M, choose(inverse(psi_early), psi_early))
        return self._everywhere(xp.where(forward, M, transpose(M)))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _transition(solution: Solution, t: Array, s: Array) -> Array:
    return solution.transition(t, s)


@_transition.defjvp
def _(solution: Solution, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """`∂_t Ψ = F_t Ψ`, `∂_s Ψ = −Ψ F_s`."""
    t, s = primals
    psi = solution.transition(t, s)
    F_t, F_s = solution("F", t), solution("F", s)
    expand = lambda dt: dt.reshape(dt.shape + (1,) * (psi.ndim - dt.ndim))
    return psi, product(F_t, psi) * expand(tangents[0]) - product(psi, F_s) * expand(tangents[1])


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _noise_factor(solution: Solution, t: Array) -> Array:
    return solution("R", t)


@_noise_factor.defjvp
def _(solution: Solution, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """`R' = F R + ½ GGᵀ R⁻ᵀ`."""
    (t,), (dt,) = primals, tangents
    R = solution("R", t)
    rate = product(solution("F", t), R) + product(solution("GG", t), transpose(inverse(R))) / 2
    return R, rate * dt.reshape(dt.shape + (1,) * (R.ndim - dt.ndim))
