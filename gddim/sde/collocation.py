"""Polynomials on panels: Gauss–Legendre nodes, their operators, and linear matrix equations by collocation."""

from collections.abc import Callable

import numpy as np

TOLERANCE = 1e-12  # of the last Legendre coefficients, relative to the largest
DEPTH = 14  # bisections at most: what float64 rounding keeps from resolving further is as exact as it gets
NODES = 16
GAUSS_NODES, GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(NODES)
TO_LEGENDRE = np.linalg.inv(np.polynomial.legendre.legvander(GAUSS_NODES, NODES - 1))
_AT = np.polynomial.legendre.legval
_BASIS = np.polynomial.legendre.legvander


def _operator(of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The matrix that maps values at the nodes to `of` their interpolating polynomial, at the nodes."""
    return np.stack([_AT(GAUSS_NODES, of(column)) for column in TO_LEGENDRE.T], -1)


DIFFERENTIATE = _operator(np.polynomial.legendre.legder)
INTEGRATE = _operator(lambda c: np.polynomial.legendre.legint(c, lbnd=-1))  # from the left end

# Gauss points of order 4 in every gap between two nodes, and between a node and an end of the panel: what is said to be a
# polynomial is judged there, and integrals from the left end to each node are sums of positive terms over them.
_ENDS = np.concatenate([[-1.0], GAUSS_NODES, [1.0]])
_GAUSS = np.polynomial.legendre.leggauss(4)
GAPS = len(_ENDS) - 1
BETWEEN = (_ENDS[:-1, None] + np.diff(_ENDS)[:, None] * (1 + _GAUSS[0]) / 2).reshape(-1)
BETWEEN_W = (np.diff(_ENDS)[:, None] / 2 * _GAUSS[1]).reshape(-1)
TO_BETWEEN = _BASIS(BETWEEN, NODES - 1) @ TO_LEGENDRE
TO_ENDS = _BASIS(_ENDS[[0, -1]], NODES - 1) @ TO_LEGENDRE


def at_points(operator: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`operator` `(points, nodes)` on values `(panels, nodes, …)`. Returns `(panels, points, …)`."""
    return np.einsum("qi,pi...->pq...", operator, values)


def collocate(A: np.ndarray, *, backward: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Solve `X' = A X` over panels by Gauss collocation, from the left end (or `backward`, from the right) with X = I.

    A: `(panels, nodes, *dims, k, k)`, values at the nodes times half the panel's width. Returns X at the nodes, of the same
    shape, and at the far end, `(panels, *dims, k, k)`: of order 2·nodes there. The system `X = I + ∫ A X` is solved by
    Picard's iteration, whose n-th term is at most `(2 max|A|)^n/n!`; on panels where that is large nothing is resolved.
    """
    k = A.shape[-1]
    S = INTEGRATE - GAUSS_WEIGHTS if backward else INTEGRATE
    entries = np.ascontiguousarray(np.moveaxis(A, (-2, -1), (0, 1)))  # long axes last: tiny matrices are slow in NumPy
    flat = entries.reshape(k, k, *A.shape[:2], -1)
    term = np.broadcast_to(np.eye(k)[..., None, None, None], flat.shape)
    nodes = term.copy()
    for _ in range(4 * NODES):
        term = S @ np.einsum("ij...,jk...->ik...", flat, term)
        nodes += term
        if not np.abs(term).max() > 1e-20:
            break
    moved = np.einsum("ij...,jk...->ik...", flat, nodes)
    end = np.eye(k)[..., None, None] + (-1 if backward else 1) * np.einsum("n,ijmnp->ijmp", GAUSS_WEIGHTS, moved)
    back = lambda values, shape: np.moveaxis(values.reshape(k, k, *shape), (0, 1), (-2, -1))
    return back(nodes, A.shape[:-2]), back(end, A.shape[:1] + A.shape[2:-2])


def tail(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last Legendre coefficients of `values` `(panels, nodes, …, k, k)`, `(panels, …, k, k)`, and the largest of their
    row, `(panels, …, k, 1)`.
    """
    spectrum = np.abs(at_points(TO_LEGENDRE, values))
    return spectrum[:, -2:].max(1), spectrum.max((1, -1))[..., None]


def unresolved(values: np.ndarray) -> np.ndarray:
    """Which panels of `values` `(panels, nodes, …, k, k)` are no polynomials to TOLERANCE, row by row. Returns `(panels,)`."""
    last, size = tail(values)
    return np.any(last > TOLERANCE * size, tuple(range(1, last.ndim)))
