"""Samples by their number: sample i follows from the model, the sampler, the seed and i alone.

To rounding: XLA compiles a program for each number of samples at a time and devices, and may add in another order.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from gddim.samplers.base import DataModel, ProcessModel
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

    @property
    def finite(self) -> Bool[Array, " b"]:
        """Which are finite."""
        return jnp.isfinite(self.data).all(axis=tuple(range(1, self.data.ndim)))


class _AbstractGiven(eqx.Module):
    model: eqx.AbstractVar[Any]
    cond: eqx.AbstractVar[PyTree]

    @property
    def sde(self) -> AbstractLinearSDE:
        return self.model.sde

    def __call__(self, u: Array, t: Array) -> Array:
        return self.model(u, t, self.cond)


class _Given(_AbstractGiven):
    model: Any
    cond: PyTree


class _GivenData(_AbstractGiven):
    model: Any
    cond: PyTree

    def denoise(self, u: Array, t: Array) -> Array:
        return self.model.denoise(u, t, self.cond)


def given(model: Any, cond: PyTree) -> ProcessModel:
    """A model under a condition, as an `eps_fn(u, t)` of its process; the model itself for None."""
    if cond is None:
        return model
    return (_GivenData if isinstance(model, DataModel) else _Given)(model, cond)


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
    cond: PyTree = None,
    begin: tuple[Float[Array, "b ..."], Float[Array, ""]] | None = None,
) -> Samples:
    """The samples of these numbers, for data of `shape = (*dims, C)`, of a seed or its key. Sharded as `indices` are.

    `cond`: what conditions each, a tree of arrays with a sample a row, or None.
    `begin`: data `(b, *dims, C)`, and the time to which they are noised, at which the solver starts; None: the prior.
    """
    sde = model.sde
    key = seed if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) else jax.random.key(seed)

    def one(i: Array, cond: PyTree, x: Array | None) -> Samples:
        if x is None or begin is None:
            u, noise_key = start(sde, shape, key, i)
        else:
            eps_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
            u = sde.lift(x)
            u = sde.perturb(u, begin[1], jax.random.normal(eps_key, u.shape, u.dtype))
        u, count, way = solver(given(model, cond), u, noise_key, path)
        return Samples(sde.project(u), jnp.asarray(count), way)

    over = Path(None, 1, 1, 1) if path else None  # pyright: ignore[reportArgumentType]
    return jax.vmap(one, out_axes=Samples(0, 0, over))(indices, cond, begin and begin[0])  # pyright: ignore[reportArgumentType]
