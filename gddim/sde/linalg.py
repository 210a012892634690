"""Algebra of coefficient arrays `(*#dims, k, k)` with k ≤ a few, the same code for NumPy and JAX.

Products on devices are sums of outer products of slices: exact in the array's own precision on every backend (a
`dot_general` would run in TF32 or bfloat16 on accelerators), fused by XLA into their surroundings, and without reductions
over axes of length k, forward or backward: those are slower on XLA:CPU, and at rank 7 its fusion of them ends the process
with a segmentation fault (jaxlib 0.10.2).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # a NumPy or a JAX array


def namespace(*arrays: Array) -> ModuleType:
    """`jax.numpy` if any argument is a JAX array, else `numpy`."""
    return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


def as_times(*times: Array) -> tuple[Any, ...]:
    """The namespace and the times as its arrays: float64 NumPy, or the JAX arguments' common floating type."""
    traced = [t for t in times if isinstance(t, jax.Array)]
    if not traced:
        return np, *(np.asarray(t, np.float64) for t in times)
    dtype = jnp.result_type(*traced)
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    return jnp, *(jnp.asarray(t, dtype) for t in times)


def matrix(xp: ModuleType, rows: list[list[Array]]) -> Array:
    """Stack scalars (or arrays of one shape) into matrices over two new last axes."""
    return xp.stack([xp.stack(row, -1) for row in rows], -2)


def aligned(*arrays: Array, lead: int = 0) -> tuple[Array, ...]:
    """The arrays with axes of size 1 after the first `lead` so that all have one rank."""
    rank = max(a.ndim for a in arrays)
    return tuple(a.reshape(a.shape[:lead] + (1,) * (rank - a.ndim) + a.shape[lead:]) for a in arrays)


def product(A: Array, B: Array) -> Array:
    """`A @ B` over the last two axes, `(*#dims, k, k), (*dims, k, C) → (*dims, k, C)`, in the precision of `B`.

    Missing leading axes of either argument count as 1s.
    """
    if isinstance(B, jax.Array) and not isinstance(A, jax.Array):
        A = jnp.asarray(A, B.dtype)
    A, B = aligned(A, B)
    if namespace(A, B) is np:
        return A @ B
    # rows are stacked rather than broadcast, which is the same forward, but transposes to a sum of slices
    rows = [jnp.stack([B[..., j, :]] * A.shape[-2], -2) for j in range(A.shape[-1])]
    return sum(A[..., :, j, None] * row for j, row in enumerate(rows))


def dot(x: Array, y: Array) -> Array:
    """`Σ_i x_i y_i` over the last axis, which is short."""
    return sum(x[..., i] * y[..., i] for i in range(x.shape[-1]))


def transpose(A: Array) -> Array:
    return A.swapaxes(-1, -2)


def lq(A: Array) -> tuple[Array, Array]:
    """`A = L O` with `L` lower triangular, its diagonal positive, and `O` orthogonal: Gram–Schmidt on the rows.

    `L` is the Cholesky factor of `A Aᵀ`, found without squaring the condition number.
    """
    xp, k = namespace(A), A.shape[-1]
    directions: list[Array] = []
    rows: list[list[Array]] = []
    for i in range(k):
        residual, entries = A[..., i, :], []
        for direction in directions:
            entry = dot(residual, direction)
            residual = residual - entry[..., None] * direction
            entries.append(entry)
        norm = xp.sqrt(dot(residual, residual))
        directions.append(residual / xp.where(norm > 0, norm, 1)[..., None])
        rows.append([*entries, norm, *[xp.zeros_like(norm)] * (k - 1 - i)])
    return matrix(xp, rows), xp.stack(directions, -2)


def inverse(A: Array) -> Array:
    """`A⁻¹` over the last two axes, by `A = L O` and forward substitution."""
    if A.shape[-1] == 1:
        return 1 / A
    xp, k = namespace(A), A.shape[-1]
    L, O = lq(A)
    rows: list[Array] = []
    for i in range(k):
        unit = xp.broadcast_to(xp.eye(k, dtype=A.dtype)[i].reshape((1,) * (A.ndim - 2) + (k,)), A.shape[:-1])
        unit = unit - sum((L[..., i, j, None] * rows[j] for j in range(i)), xp.zeros_like(unit))
        rows.append(unit / L[..., i, i, None])
    return product(transpose(O), xp.stack(rows, -2))


def triangular(B: np.ndarray) -> np.ndarray:
    """The Cholesky factor of `B Bᵀ` for `B` `(…, k, n ≥ k)`, by QR, also where `B Bᵀ` is singular."""
    L = np.asarray(np.linalg.qr(B.swapaxes(-1, -2), mode="r")).swapaxes(-1, -2)
    sign = np.where(np.einsum("...ii->...i", L) < 0, -1.0, 1.0)
    return L * sign[..., None, :]


def symmetric_root(S: Array) -> Array:
    """The symmetric positive square root of symmetric positive `S` over the last two axes."""
    xp, k = namespace(S), S.shape[-1]
    if k == 1:
        return xp.sqrt(S)
    if k == 2:  # Cayley–Hamilton: √S = (S + √det I) / √(tr + 2√det)
        root = xp.sqrt(S[..., 0, 0] * S[..., 1, 1] - S[..., 0, 1] * S[..., 1, 0])
        scale = xp.sqrt(S[..., 0, 0] + S[..., 1, 1] + 2 * root)
        identity = xp.eye(2, dtype=S.dtype).reshape((1,) * (S.ndim - 2) + (2, 2))
        return (S + root[..., None, None] * identity) / scale[..., None, None]
    values, vectors = xp.linalg.eigh(S)
    return product(vectors * xp.sqrt(xp.maximum(values, 0))[..., None, :], transpose(vectors))


def as_static(value: Any) -> Any:
    """A number, or an array of them as nested tuples: static, so that it is no parameter. None where there is none."""
    if value is None:
        return None
    values = np.asarray(value, np.float64)
    return float(values) if values.ndim == 0 else tuple(map(as_static, values))
