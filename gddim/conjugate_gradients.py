"""A linear equation solved by conjugate gradients, which ends early, and has derivatives of both modes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def solved(matrix: Callable[[Array], Array], b: Array, iterations: int) -> Array:
    """`matrix⁻¹ b` by conjugate gradients, which end where the matrix is not positive along their direction.

    That of an exact denoiser is positive definite; along a direction in which a trained one's is not they would diverge.
    """
    matrix, consts = jax.closure_convert(matrix, b)
    return _until_done(matrix, iterations, b, consts)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _until_done(matrix: Callable[..., Array], iterations: int, b: Array, consts: list[Array]) -> Array:
    begin, step = _first_and_step(matrix, b, consts)
    goes_on = lambda state: (state[0] < iterations) & state[1][0]
    return jax.lax.while_loop(goes_on, lambda state: (state[0] + 1, step(state[1])), (jnp.array(0), begin))[1][1]


@_until_done.defjvp
def _(matrix: Callable[..., Array], iterations: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Of so many turns, in some of which nothing is done, there is a reverse mode, too."""

    def all_turns(b: Array, consts: list[Array]) -> Array:
        begin, step = _first_and_step(matrix, b, consts)
        turn = lambda _, state: jax.lax.cond(state[0], step, lambda state: state, state)
        return jax.lax.fori_loop(0, iterations, turn, begin)[1]

    return jax.jvp(all_turns, primals, tangents)


def _first_and_step(
    matrix: Callable[..., Array], b: Array, consts: list[Array]
) -> tuple[tuple[Array, ...], Callable[[tuple[Array, ...]], tuple[Array, ...]]]:
    """A first state and the step: whether they go on, `z`, `b − matrix z`, a direction, and the square of the second."""

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        _, z, rest, direction, size = state
        moved = matrix(direction, *consts)
        curvature = jnp.vdot(direction, moved)
        goes = curvature > 0
        length = jnp.where(goes, size / jnp.where(goes, curvature, 1), 0)
        z, rest = z + length * direction, rest - length * moved
        after = jnp.vdot(rest, rest)
        turned = rest + after / jnp.where(size == 0, 1, size) * direction
        return goes & (after > 1e-10 * start), z, rest, turned, after

    start = jnp.vdot(b, b)
    return (start != 0, jnp.zeros_like(b), b, b, start), step
