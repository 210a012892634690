"""What a deterministic sampler gives for free: data to their latents by the same steps taken backwards, and between them."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray, PyTree

from gddim.samplers.adams import GDDIM
from gddim.samplers.base import Coefficients, ProcessModel
from gddim.samplers.grids import check_end, check_grid
from gddim.samplers.numbered import given
from gddim.samplers.quadrature import Panels, count, history_nodes
from gddim.samplers.solver import AbstractSolver, TableSolver
from gddim.sde import AbstractLinearSDE
from gddim.sde.linalg import inverse, product, symmetric_root


def encoding_table(sde: AbstractLinearSDE, ts: Any, order: int = 3) -> Coefficients:
    """The exponential Adams–Bashforth method of gDDIM from the end of a decreasing grid to its start.

    `u_t = Ψ(t,s) u_s + Σ_j [∫_s^t ℓ_j(τ) d(Ψ(t,τ) R_τ)] ε(u_{s_j}, s_j)`, s_j the last `order` times at or below s. The
    weights are those of sampling with the roles of s and t exchanged. Raises `ValueError` for a grid that ends at 0 where R is
    singular there.
    """
    ts = check_end(sde, check_grid(sde, ts))
    panels = Panels(sde, ts, lam=0.0)
    nodes = history_nodes(ts[::-1], order)[::-1]
    Q = panels.psi(panels.times_at_nodes(ts[:-1]), panels.tau) @ panels.at(sde.noise_factor, panels.tau)
    R, psi = panels.at(sde.noise_factor, ts), panels.psi(ts[:-1], ts[1:])
    weights = -panels.stieltjes(nodes, Q, psi @ R[1:], R[:-1])
    one = np.broadcast_to(np.eye(sde.k), (len(ts), *psi.shape[1:]))
    rising = ts[::-1]
    return Coefficients(
        rising, rising[:-1], psi[::-1], weights[::-1], np.zeros_like(psi), record_u=np.zeros_like(one), record_eps=one,
        orders=count(nodes)[::-1],
    )  # fmt: skip


class Coder(eqx.Module):
    """Both directions between data and latents of one model on one grid, deterministic and of one order.

    States at the grid's end `t_min` are data with the little noise that they have there; `key` draws it, so that the
    state is one that the model has seen.
    """

    model: ProcessModel
    up: TableSolver
    down: AbstractSolver
    at_end: tuple[Any, Any]
    """`Ψ(t_min, 0)` and `R` at t_min."""
    whiten: Any
    """`S_T^{−1/2}`: latents times this are standard normal."""

    @staticmethod
    def of(model: ProcessModel, ts: Float[np.ndarray, " n"], order: int = 3) -> "Coder":
        sde, end = model.sde, float(ts[-1])
        return Coder(
            model,
            TableSolver.of(encoding_table(sde, ts, order), sde),
            GDDIM(order).solver(sde, ts),
            (sde.transition(end, 0.0), sde.noise_factor(end)),
            inverse(symmetric_root(sde.prior_covariance(float(ts[0])))),
        )

    @property
    def nfe(self) -> int:
        """Network calls each way."""
        return self.up.nfe

    def under(self, cond: PyTree) -> "Coder":
        """The same under a condition of the model; itself for None."""
        return dataclasses.replace(self, model=given(self.model, cond))

    def noised(self, x: Float[Array, "*dims C"], key: PRNGKeyArray) -> Float[Array, "*dims k C"]:
        """The state of data at `t_min`."""
        u = self.model.sde.lift(x)
        psi, R = (jnp.asarray(matrix, u.dtype) for matrix in self.at_end)
        return product(psi, u) + product(R, jax.random.normal(key, u.shape, u.dtype))

    def encode(self, u: Float[Array, "*dims k C"]) -> Float[Array, "*dims k C"]:
        """A state at `t_min` to the latent at the grid's start, of the prior's distribution."""
        return self.up(self.model, u, jax.random.key(0)).state  # which draws nothing

    def decode(self, latent: Float[Array, "*dims k C"]) -> Float[Array, "*dims k C"]:
        """A latent to the state at `t_min`."""
        return self.down(self.model, latent, jax.random.key(0)).state

    def between(
        self, a: Float[Array, "*dims k C"], b: Float[Array, "*dims k C"], shares: Float[Array, " n"]
    ) -> Float[Array, "n *dims k C"]:
        """Latents on the great circle from a (share 0) to b (share 1): as typical of the prior as its ends are.

        `(sin((1−s)θ) a + sin(sθ) b) / sin θ`, θ the angle of the whitened latents.
        """
        white_a, white_b = (product(jnp.asarray(self.whiten, x.dtype), x) for x in (a, b))
        norms = jnp.sqrt(jnp.vdot(white_a, white_a) * jnp.vdot(white_b, white_b))
        angle = jnp.arccos(jnp.clip(jnp.vdot(white_a, white_b) / norms, -0.9999, 0.9999))
        mix = lambda share: (jnp.sin((1 - share) * angle) * a + jnp.sin(share * angle) * b) / jnp.sin(angle)
        return jax.vmap(mix)(shares)


class Reconstruction(NamedTuple):
    """Data encoded and decoded: the latents, the data that came back, and the root mean square of their difference."""

    latents: Float[Array, "n *dims k C"]
    data: Float[Array, "n *dims C"]
    error: Float[Array, " n"]


@eqx.filter_jit
def reconstruct(
    coder: Coder, x: Float[Array, "n *dims C"], keys: Key[Array, " n"], cond: PyTree = None
) -> Reconstruction:
    """Encode and decode; the error is that of the round trip, from `t_min` and back, in units of the data.

    `cond`: what conditions the model, a tree of arrays with a record a row, or None.
    """
    project, unconditional = coder.model.sde.project, coder

    def one(x: Array, key: Array, cond: PyTree) -> Reconstruction:
        coder = unconditional.under(cond)
        start = coder.noised(x, key)
        latent = coder.encode(start)
        end = coder.decode(latent)
        return Reconstruction(latent, project(end), jnp.sqrt(jnp.mean((project(end) - project(start)) ** 2)))

    return jax.vmap(one)(x, keys, cond)


@eqx.filter_jit
def interpolate(
    coder: Coder,
    a: Float[Array, "n *dims C"],
    b: Float[Array, "n *dims C"],
    steps: int,
    keys: Key[Array, " n"],
    conds: tuple[PyTree, PyTree] = (None, None),
) -> Float[Array, "n steps *dims C"]:
    """Rows of a picture, one after the other: from each record of `a` to its partner in `b`, decoded between their latents.

    `conds`: of either, as in `reconstruct`; what lies between is under that of the nearer one.
    """
    shares = jnp.linspace(0.0, 1.0, steps, dtype=a.dtype)

    def one(a: Array, b: Array, key: Array, conds: tuple[PyTree, PyTree]) -> Array:
        parts = zip((a, b), jax.random.split(key), conds, strict=True)
        first, second = (coder.under(cond).encode(coder.noised(x, key)) for x, key, cond in parts)

        def decoded(latent: Array, share: Array) -> Array:
            nearer = jax.tree.map(lambda x, y: jnp.where(share < 0.5, x, y), *conds)
            return coder.model.sde.project(coder.under(nearer).decode(latent))

        return jax.vmap(decoded)(coder.between(first, second, shares), shares)

    return jax.lax.map(lambda row: one(*row), (a, b, keys, conds))
