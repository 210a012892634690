"""Samples by their number: sample i follows from the model, the sampler, the seed and i alone.

To rounding: XLA compiles a program for each number of samples at a time and devices, and may add in another order.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from gddim.samplers.base import ProcessModel
from gddim.samplers.loop import Path
from gddim.samplers.solver import AbstractSolver
from gddim.sde.base import AbstractLinearSDE


class Samples(NamedTuple):
    """Samples of several numbers."""

    data: Float[Array, "b ..."]
    """`(b, *dims, C)`, in pixels."""
    calls: Shaped[Array, " b"]
    """The network calls of each."""
    path: Path | None
    """How they came about, where that was asked for: times `(calls,)`, and states, … `(calls, b, *dims, k, C)`."""


def start(
    sde: AbstractLinearSDE, shape: tuple[int, ...], key: Key[Array, ""], i: Int[Array, ""]
) -> tuple[Float[Array, "*state"], Key[Array, ""]]:
    """The state at the horizon that sample i begins with, and the key of its noise."""
    prior_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
    return sde.sample_prior(prior_key, (*shape[:-1], sde.k, shape[-1])), noise_key


@eqx.filter_jit
def sample_numbered(
    model: ProcessModel,
    solver: AbstractSolver,
    shape: tuple[int, ...],
    seed: Int[Array, ""] | Key[Array, ""],
    indices: Int[Array, " b"],
    path: bool = False,
) -> Samples:
    """The samples of these numbers, for data of `shape = (*dims, C)`, of a seed or its key. Sharded as `indices` are."""
    sde = model.sde
    key = seed if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) else jax.random.key(seed)

    def one(i: Array) -> Samples:
        u, noise_key = start(sde, shape, key, i)
        u, count, way = solver(model, u, noise_key, path)
        return Samples(sde.project(u), jnp.asarray(count), way)

    over = Path(None, 1, 1, 1) if path else None  # pyright: ignore[reportArgumentType]
    return jax.vmap(one, out_axes=Samples(0, 0, over))(indices)  # pyright: ignore[reportArgumentType]
