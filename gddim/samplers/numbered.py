"""Samples by their number: sample i follows from the model, the sampler, the seed and i alone.

To rounding: XLA compiles a program for each number of samples at a time and devices, and may add in another order.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from gddim.samplers import AbstractSampler
from gddim.samplers.base import AbstractAdaptive, Calls, Last, calls, run
from gddim.sde import AbstractLinearSDE
from gddim.sde.linalg import product


class Solver(eqx.Module):
    """A sampler on a process and a grid, its table laid out once for any number of batches.

    The table is an argument of the compiled program, so solvers that make as many calls share one.
    """

    rows: Calls | None
    start: tuple[Any, Any] | None
    adaptive: AbstractAdaptive | None
    ends: tuple[float, float] = eqx.field(static=True)
    last: Last = eqx.field(static=True)

    @staticmethod
    def of(
        sampler: AbstractSampler | AbstractAdaptive,
        sde: AbstractLinearSDE,
        ts: Float[np.ndarray, " n"],
        last: Last = "none",
    ) -> "Solver":
        ends = (float(ts[0]), float(ts[-1]))
        if isinstance(sampler, AbstractAdaptive):
            return Solver(None, None, sampler, ends, last)
        table = sampler.coefficients(sde, ts)
        return Solver(calls(table, sde, last), table.start, None, ends, last)

    def __call__(self, model: Any, u: Float[Array, "..."], key: PRNGKeyArray) -> tuple[Float[Array, "..."], Any]:
        """The state at the end, and the network calls that it took: what `gddim.sample` gives."""
        if self.rows is None:
            assert self.adaptive is not None
            return self.adaptive.solve(model.sde, model, u, np.array(self.ends), self.last)
        first, rest = jax.random.split(key)
        if self.start is not None:
            psi, noise = self.start
            u = product(psi, u) + product(noise, jax.random.normal(first, u.shape, u.dtype))
        return run(self.rows, model, u, rest), len(self.rows.time)


@eqx.filter_jit
def draw(
    model: Any, solver: Solver, shape: tuple[int, ...], seed: Int[Array, ""], indices: Int[Array, " b"]
) -> tuple[Float[Array, "b ..."], Shaped[Array, " b"]]:
    """The samples of these numbers, `(b, *dims, C)` for data of `shape = (*dims, C)`, and the network calls of each.

    Sharded as `indices` are. `model` is an eps_fn with a `.sde`.
    """
    sde = model.sde

    def one(i):
        prior_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), i))
        u = sde.sample_prior(prior_key, (*shape[:-1], sde.k, shape[-1]))
        u, count = solver(model, u, noise_key)
        return sde.project(u), jnp.asarray(count)

    return jax.vmap(one)(indices)
