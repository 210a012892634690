"""Polynomials on panels: Gauss–Legendre nodes, their operators, and linear matrix equations by collocation."""

from collections.abc import Callable

import numpy as np

TOLERANCE = 1e-12  # of the last Legendre coefficients, relative to the largest
DEPTH = 14  # bisections at most: what float64 rounding keeps from resolving further is as exact as it gets
NODES = 16
X, W = np.polynomial.legendre.leggauss(NODES)
TO_LEGENDRE = np.linalg.inv(np.polynomial.legendre.legvander(X, NODES - 1))
_AT = np.polynomial.legendre.legval


def _operator(of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The matrix that maps values at the nodes X to `of` their interpolating polynomial, at the nodes."""
    return np.stack([_AT(X, of(column)) for column in TO_LEGENDRE.T], -1)


DIFFERENTIATE = _operator(np.polynomial.legendre.legder)
INTEGRATE = _operator(lambda c: np.polynomial.legendre.legint(c, lbnd=-1))  # from the left end


def collocate(A: np.ndarray, *, backward: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Solve `X' = A X` over panels by Gauss collocation, from the left end (or `backward`, from the right) with X = I.

    A: `(panels, nodes, *dims, k, k)`, values at the nodes times half the panel's width. Returns X at the nodes, of the same
    shape, and at the far end, `(panels, *dims, k, k)`: of order 2·nodes there.
    """
    k = A.shape[-1]
    S = INTEGRATE - W if backward else INTEGRATE
    moved = np.moveaxis(A, 1, -3)  # (panels, *dims, nodes, k, k)
    batch = moved.shape[:-3]
    system = -S[:, None, :, None] * moved.swapaxes(-3, -2)[..., None, :, :, :]  # (…, i, row, j, column)
    system = system.reshape(*batch, NODES * k, NODES * k) + np.eye(NODES * k)
    start = np.broadcast_to(np.tile(np.eye(k), (NODES, 1)), (*batch, NODES * k, k))
    nodes = np.linalg.solve(system, start).reshape(*batch, NODES, k, k)
    end = np.eye(k) + (-1 if backward else 1) * np.einsum("i,...iab->...ab", W, moved @ nodes)
    return np.moveaxis(nodes, -3, 1), end


def unresolved(values: np.ndarray) -> np.ndarray:
    """Which panels of `values` `(panels, nodes, …, k, k)` are no polynomials to TOLERANCE, row by row. Returns `(panels,)`."""
    spectrum = np.abs(np.einsum("ni,mi...->mn...", TO_LEGENDRE, values))
    tail, size = spectrum[:, -2:].max(1), spectrum.max((1, -1), keepdims=True)[:, 0]
    return (tail > TOLERANCE * size).any(tuple(range(1, tail.ndim)))
