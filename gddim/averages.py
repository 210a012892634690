"""Averages of parameters by power-function profiles, and any other length of them rebuilt after training.

The profile of exponent γ weights the parameters that a step τ left by `p(τ) = (γ+1) τ^γ / t^{γ+1}`, 0 < τ ≤ t, at step t:
its width stays the same share σ_rel of the run, however long that is. The average at t is `Σ θ(τ) ∫_{τ−1}^τ p`, which the
recursion `θ̂(t) = β_t θ̂(t−1) + (1 − β_t) θ(t)`, `β_t = (1 − 1/t)^{γ+1}`, gives exactly. Snapshots of two such averages
at a few steps tell, by least squares on the profiles, that of any σ_rel between them, and a little beyond.

Karras et al., Analyzing and improving the training dynamics of diffusion models (EDM2), arXiv 2312.02696, §3, appendix C.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Float64

LONGEST = 12**-0.5  # the σ_rel of γ = 0, the plain mean of all steps


def width(gamma: float) -> float:
    """σ_rel of an exponent: the standard deviation of its profile over t, `√(γ+1) / ((γ+2) √(γ+3))`."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def exponent(sigma_rel: float) -> float:
    """The exponent γ ≥ 0 of σ_rel: the largest root of `γ³ + 7γ² + (16 − σ⁻²) γ + 12 − σ⁻²`.

    Raises `ValueError` for a σ_rel outside (0, 12^{−1/2}].
    """
    if not 0 < sigma_rel <= LONGEST:
        raise ValueError(f"σ_rel of an average must lie in (0, {LONGEST:.4f}], not {sigma_rel}")
    inverse = float(sigma_rel) ** -2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


def rate(sigma_rel: float, step: ArrayLike) -> Float[Array, ""]:
    """`1 − β_t`: the share of the newest parameters in the average after step t = 1, 2, …; 1 for the first.

    An average is kept by `a += rate(σ_rel, t) · (θ − a)`. Raises `ValueError` for a step below 1 that is known now.
    """
    if not isinstance(step, Tracer) and np.min(step) < 1:
        raise ValueError(f"step={step}: steps are counted from 1")
    return -jnp.expm1((exponent(sigma_rel) + 1) * jnp.log1p(-1 / jnp.asarray(step, jnp.float32)))


def inner_products(
    steps: Sequence[int] | np.ndarray,
    widths: Sequence[float] | np.ndarray,
    others: Sequence[int] | np.ndarray,
    their_widths: Sequence[float] | np.ndarray,
) -> Float64[np.ndarray, "n m"]:
    """`∫ p_i q_j dτ` of profiles that end at `steps`, of σ_rel `widths`, with those of the others.

    With ends t ≤ s, `(γ+1)(δ+1) (t/s)^δ / ((γ+δ+1) s)`, δ the exponent of the one that ends at s.
    """
    t, s = np.asarray(steps, np.float64)[:, None], np.asarray(others, np.float64)[None, :]
    gamma, delta = np.array([*map(exponent, widths)])[:, None], np.array([*map(exponent, their_widths)])[None, :]
    later = np.maximum(t, s)
    ratio = np.where(t <= s, (t / later) ** delta, (s / later) ** gamma)
    return (gamma + 1) * (delta + 1) * ratio / ((gamma + delta + 1) * later)


def combination(
    steps: Sequence[int] | np.ndarray, widths: Sequence[float] | np.ndarray, step: int, sigma_rel: float
) -> tuple[Float64[np.ndarray, " n"], float]:
    """The coefficients with which snapshots add up to the average of `sigma_rel` at `step`, and what is left.

    Snapshot i is the average of σ_rel `widths[i]` at `steps[i]`. The coefficients minimise `‖Σ x_i p_i − q‖²` over profiles;
    the second value is the root of that minimum over ‖q‖²: 0 where the wanted average is among them. Raises `ValueError`
    for no snapshot, two alike, or one that ends beyond `step`.
    """
    if len(steps) == 0 or len(set(zip(steps, widths, strict=True))) < len(steps) or max(steps) > step or min(steps) < 1:
        raise ValueError(f"snapshots at steps {list(steps)}: need some, all different, from 1 to {step}")
    gram = inner_products(steps, widths, steps, widths)
    wanted = inner_products(steps, widths, [step], [sigma_rel])[:, 0]
    size = np.sqrt(np.diag(gram))  # of unit length they are better told apart
    x = np.linalg.lstsq(gram / np.outer(size, size), wanted / size, rcond=None)[0] / size
    whole = inner_products([step], [sigma_rel], [step], [sigma_rel]).item()
    return x, float(np.sqrt(max(0.0, 1 + (x @ gram @ x - 2 * x @ wanted) / whole)))
