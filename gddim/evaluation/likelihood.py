"""Likelihood of data under a model's probability flow, exact for one field, bounded for several, with standard errors."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from gddim.data import Source, to_unit, x0_and_cond
from gddim.errors import from_extra, progress
from gddim.parallel import to_host
from gddim.samplers.numbered import given
from gddim.sde.base import AbstractLinearSDE, last_time
from gddim.sde.host import on_host
from gddim.sde.linalg import aligned, product


class Bits(NamedTuple):
    """Bits per dimension of a set: mean and standard error over its records, and the value of each."""

    mean: float
    standard_error: float
    each: Float[np.ndarray, " n"]


@eqx.filter_jit
def log_density(
    model: Any,
    x: Float[Array, "*dims C"],
    key: PRNGKeyArray,
    t_min: float = 1e-5,
    probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Float[Array, ""]:
    """An unbiased estimate, in nats, of `log p(x)` for a process of one field and of a lower bound of it for several.

    The flow `du/dt = f = F u + ½GGᵀR⁻ᵀ ε(u, t)` carries `u = ψx + L(0, ξ)` from `t_min`, ψ = Ψ(t_min, 0) e, L the Cholesky
    factor of Σ, ξ standard normal for the fields that are no data, to the prior `N(0, S_T)`, T the
    horizon, or 0.99 of it where nothing is left of the data there:

        log p(x) ≥ E_ξ[log N(u_T; 0, S_T) + ∫ div f dt + log |det (ψ, L_{·,1:})| − log N(ξ)],

    equal if there is no ξ (Song et al. 2021, eq. 39), or ξ is as independent of x for the model as it is drawn (Dockhorn
    et al. 2022, §3.5 for CLD). `div ε` is Hutchinson's estimate over `probes` sign vectors, one field at a time, so that
    what couples fields adds no noise. The process's basis must be orthonormal. What lies below `t_min` is left out: p
    is the density of the data with the noise that they have there.
    """
    with from_extra("eval"):
        import diffrax

    sde = model.sde
    fields_key, probe_key = jax.random.split(key)
    table = _table(sde, t_min)
    data = sde.lift(x)
    xi = jax.random.normal(fields_key, (*data.shape[:-2], sde.k - 1, data.shape[-1]), x.dtype)
    u = product(table.frame, jnp.concatenate([data[..., :1, :], xi], axis=-2))
    one_field = jnp.eye(sde.k, dtype=u.dtype).reshape(1, sde.k, *(1,) * (u.ndim - 2), sde.k, 1)
    signs = (jax.random.rademacher(probe_key, (probes, 1, *u.shape), u.dtype) * one_field).reshape(-1, *u.shape)

    def flow(t: Any, state: tuple[Array, Array], _: None) -> tuple[Array, Array]:
        F, half = sde.velocity_factors(t)
        noise, pull = jax.vjp(lambda u: product(half, model(u, t).astype(u.dtype)), state[0])
        divergence = jax.vmap(lambda sign: jnp.vdot(sign, pull(sign)[0]))(signs).sum() / probes
        trace = sum(F[..., i, i] for i in range(sde.k))
        linear = jnp.broadcast_to(trace, u.shape[:-2]).sum() * u.shape[-1]
        return product(F, state[0]) + noise, linear + divergence

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(flow), diffrax.Tsit5(), jnp.asarray(t_min, x.dtype), jnp.asarray(last_time(sde), x.dtype), None,
        (u, jnp.zeros((), x.dtype)), stepsize_controller=diffrax.PIDController(rtol, atol), max_steps=100_000,
    )  # fmt: skip
    assert solution.ys is not None
    end, change = (value[0] for value in solution.ys)
    whitened = product(table.whiten, end)
    normal = -0.5 * (jnp.vdot(whitened, whitened) - jnp.vdot(xi, xi))  # of the prior, less that of ξ
    volume = jnp.broadcast_to(jnp.asarray(table.log_volume, x.dtype), u.shape[:-2]).sum() * u.shape[-1]
    return normal + change + volume - 0.5 * math.log(2 * math.pi) * x.size


class _Table(NamedTuple):
    frame: Float[np.ndarray, "*#dims k k"]
    """`(ψ, L_{·,1:})` at t_min: from the data and ξ to the state."""
    whiten: Float[np.ndarray, "*#dims k k"]
    """`S_T^{−1/2}`."""
    log_volume: Float[np.ndarray, "*#dims"]
    """`log |det|` of both, per position and channel."""


def _table(sde: AbstractLinearSDE, t_min: float) -> _Table:
    t, zero, end = map(np.asarray, (t_min, 0.0, last_time(sde)))
    psi, L = np.broadcast_arrays(*aligned(on_host(sde.transition, t, zero), on_host(sde.cholesky_factor, t)))
    frame = np.concatenate([psi[..., :, :1], L[..., :, 1:]], axis=-1)
    whiten = np.linalg.inv(np.linalg.cholesky(on_host(sde.prior_covariance, end)))
    return _Table(frame, whiten, np.linalg.slogdet(frame)[1] + np.linalg.slogdet(whiten)[1])


def bits_per_dimension(
    model: Any,
    source: Source,
    records: int | None = None,
    seed: int = 0,
    batch: int = 64,
    sharding: jax.sharding.Sharding | None = None,
    **options: Any,
) -> Bits:
    """`−log₂ p(x) / D` of the first `records` of a data set (all by default); `options` are those of `log_density`.

    Of records that are dictionaries `p(x | cond)`, of all that stands beside the data.

    Images are dequantised: `p(q)` is bounded by the density of `to_unit(q)` plus uniform noise as wide as a grey level,
    which adds log₂ 127.5. Record i draws its noise from (seed, i), whatever the batch.
    """
    records = len(source) if records is None else records
    if not 2 <= records <= len(source):
        raise ValueError(f"records: {records} given, accepted are 2 to {len(source)}")
    each = []
    for first in progress(range(0, records, batch), "likelihood", unit_scale=batch, unit="img"):
        indices = np.minimum(np.arange(first, first + batch), records - 1)
        x, numbers = jax.device_put((source[indices], indices), sharding)
        each.append(to_host(_bits(model, x, numbers, jnp.asarray(seed), options)))
    bits = np.concatenate(each)[:records].astype(np.float64)
    return Bits(float(bits.mean()), float(bits.std(ddof=1) / np.sqrt(records)), bits)


@eqx.filter_jit
def _bits(
    model: Any, records: PyTree, numbers: Int[Array, " b"], seed: Int[Array, ""], options: dict[str, Any]
) -> Float[Array, " b"]:
    def one(record: PyTree, number: Array) -> Array:
        x, cond = x0_and_cond(record)
        noise_key, key = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
        offset = 0.0
        if x.dtype == jnp.uint8:
            x = to_unit(x) + jax.random.uniform(noise_key, x.shape, jnp.float32, -0.5, 0.5) / 127.5
            offset = math.log2(127.5)
        return offset - log_density(given(model, cond), x, key, **options) / (x.size * math.log(2))

    return jax.vmap(one)(records, numbers)
