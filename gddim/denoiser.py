"""One network for every process: a denoiser of white noise seen through any of them, and anybody's network as a denoiser."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree, Scalar, ScalarLike, Shaped

from gddim.sde.base import AbstractLinearSDE, check_floating, positions
from gddim.sde.host import on_host
from gddim.sde.linalg import Array, dot, inverse, product, transpose

Denoise = Callable[[Array, Array], Array]  # of (y, sigma), y = x₀ + σn, to E[x₀ | y]: (*dims, C), () → (*dims, C)
PREDICTS = ("eps", "data", "v", "score", "velocity")
SIGMA_MAX = 1e4  # where a state says less of the data than this, its noise is shown at this scale


class Through(eqx.Module):
    """A denoiser of white noise, `D(y; σ) = E[x₀ | x₀ + σn = y]`, as the `eps_fn(u, t)` of a process: see `through`."""

    sde: AbstractLinearSDE
    denoiser: Callable[..., Any]

    def __call__(
        self, u: Float[Array, "*dims k C"], t: ScalarLike, *cond: Any, **key: Any
    ) -> Float[Array, "*dims k C"]:
        return implied_eps(self.sde, u, t, self.denoise(u, t, *cond, **key))

    def denoise(self, u: Float[Array, "*dims k C"], t: ScalarLike, *cond: Any, **key: Any) -> Float[Array, "*dims C"]:
        """`E[x₀ | u_t = u]`, in the basis of the process; what is given beside goes to the denoiser."""
        self.sde.check_state(u)
        y, sigma = statistic(self.sde, u, t)
        data = jnp.asarray(self.denoiser(self.sde.to_pixels(y), sigma, *cond, **key))
        if data.shape != y.shape:
            raise ValueError(f"the denoiser returned shape {data.shape} for y of shape {y.shape}; the two must agree")
        return self.sde.from_pixels(data.astype(u.dtype))


def through(sde: AbstractLinearSDE, denoise: Denoise) -> Through:
    """Any denoiser of white noise as the ε of any process: one network, trained once, samples them all.

    Given the data, u is Gaussian of mean `ψx₀`, `ψ = Ψ(t,0) e₀`, and covariance `Σ = RRᵀ` at each position, so that
    `y = ψᵀΣ⁻¹u / (ψᵀΣ⁻¹ψ) = x₀ + σn`, `σ = (ψᵀΣ⁻¹ψ)^{-1/2}`, is a sufficient statistic: `E[x₀ | u] = D(y; σ)` and
    `ε = R⁻¹(u − ψD)`, exactly (cf. arXiv 2506.21757, Prop. 3.1, for one integrator). Where ψ → 0, as in flow matching
    at t = 1, y is noise alone: σ is then held at 1e4, and `y/σ`, of variance 1, is kept.

    `sde`: a process whose coefficients are the same at all positions.
    `denoise`: `(y, sigma) → x₀` for one example, y `(*dims, C)`, sigma a scalar. It may be an Equinox module.

    Returns an Equinox module, called as `eps_fn(u, t)`, with `.denoise(u, t)`. Raises `ValueError` for a process whose
    coefficients differ by position or frequency: y then has a spectrum of noise, and its network belongs to it.

    >>> one_point = lambda y, sigma: 0.3 + 0 * y  # the denoiser of data that are one point
    >>> eps_fn, u = through(gddim.CLD(), one_point), jnp.ones((8, 8, 2, 3))
    >>> u_0 = gddim.sample(gddim.GDDIM(order=1), eps_fn.sde, eps_fn, u, [1.0, 1e-3])  # exact in one step
    >>> bool(jnp.allclose(eps_fn.sde.project(u_0), 0.3, atol=0.03))
    True
    """
    if positions(sde):
        raise ValueError(
            f"{type(sde).__name__} has coefficients by position or frequency: its y has a spectrum of noise, which a "
            "denoiser of white noise has not seen; train a gddim.Denoiser of this process"
        )
    return Through(sde, denoise)


def reduction(sde: AbstractLinearSDE, t: ScalarLike, dtype: Any) -> tuple[Array, Array]:
    """`σ = |w|⁻¹` `(*#dims,)`, at most `SIGMA_MAX`, and the unit vector `ŵ = w/|w|` `(*#dims, k, 1)`, `w = R⁻¹ψ`.

    They make `y = σ ŵᵀR⁻¹u = x₀ + σn` of a state, with the noise `n = ŵᵀε` of variance 1.
    """
    w = product(
        jnp.asarray(inverse(sde.noise_factor(t)), dtype), jnp.asarray(sde.transition(t, 0.0), dtype)[..., :, :1]
    )
    square = dot(w[..., 0], w[..., 0])
    vanished = square < jnp.finfo(dtype).tiny  # any direction is noise then
    size = jnp.sqrt(jnp.where(vanished, 1, square))
    first = jnp.eye(sde.k, 1, dtype=dtype).reshape((1,) * square.ndim + (sde.k, 1))
    direction = jnp.where(vanished[..., None, None], first, w / size[..., None, None])
    return 1 / jnp.maximum(jnp.where(vanished, 0, size), 1 / SIGMA_MAX).astype(dtype), direction


def statistic(sde: AbstractLinearSDE, u: Float[Array, "*dims k C"], t: ScalarLike) -> tuple[Array, Array]:
    """`y = σ² wᵀR⁻¹u` `(*dims, C)` and `σ = |w|⁻¹` `(*#dims,)`, `w = R⁻¹ψ`, in the precision of u; σ is at most `SIGMA_MAX`.

    Written as `y = σ z`, `z = ŵᵀR⁻¹u` with the unit vector `ŵ = w/|w|`: z has variance 1 where the data have vanished.
    """
    sigma, direction = reduction(sde, t, u.dtype)
    whitened = product(jnp.asarray(inverse(sde.noise_factor(t)), u.dtype), u)
    return product(sigma[..., None, None] * transpose(direction), whitened)[..., 0, :], sigma


def implied_eps(
    sde: AbstractLinearSDE, u: Float[Array, "*dims k C"], t: ScalarLike, data: Float[Array, "*dims C"]
) -> Float[Array, "*dims k C"]:
    """`ε = R⁻¹ (u − ψD)` of the data foreseen, all in the basis of the process."""
    psi = sde.transition(t, 0.0)[..., :, :1]
    return product(inverse(sde.noise_factor(t)), u - product(psi, data[..., None, :]))


class PathDenoiser(eqx.Module):
    """A network trained on a path of one field, as a denoiser of white noise: see `as_denoiser`."""

    net: Callable[..., Any]
    path: AbstractLinearSDE
    predicts: str = eqx.field(static=True)
    label: Callable[[Array], Array] = eqx.field(static=True)

    def __call__(
        self, y: Shaped[Array, "*dims C"], sigma: ScalarLike, cond: PyTree = None, **kwargs: Any
    ) -> Float[Array, "*dims C"]:
        check_floating(y, "y")
        given = jnp.asarray(sigma, y.dtype)
        t, sigma = time_of(self.path, given)
        # α from σ and the length of (α, σα), which is well conditioned also where α is the small difference 1 − t
        alpha, noise = self._alpha_sigma(t)
        alpha = jnp.sqrt((alpha**2 + noise**2) / (1 + sigma**2))
        noise = sigma * alpha
        above = given > sigma  # of more noise than the path has y is shrunk to that; of less it stays as it is
        x = alpha * y * jnp.where(above, sigma / jnp.where(above, given, 1), 1)
        out = jnp.asarray(self.net(x, self.label(t), *(() if cond is None else (cond,)), **kwargs))
        if out.shape != y.shape:
            raise ValueError(f"the network returned shape {out.shape} for x of shape {y.shape}; the two must agree")
        out = out.astype(y.dtype)
        match self.predicts:
            case "data":
                return out
            case "eps":
                return (x - noise * out) / alpha
            case "score":
                return (x + noise**2 * out) / alpha
            case "v":
                return (alpha * x - noise * out) / (alpha**2 + noise**2)
            case _:  # "velocity"
                (_, _), (d_alpha, d_noise) = jax.jvp(self._alpha_sigma, (t,), (jnp.ones_like(t),))
                return (d_noise * x - noise * out) / (alpha * d_noise - d_alpha * noise)

    def _alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        return _scalar(self.path.transition(t, 0.0)), _scalar(self.path.noise_factor(t))


def as_denoiser(
    net: Callable[..., Any],
    path: AbstractLinearSDE,
    predicts: str = "eps",
    label: Callable[[Array], Array] = lambda t: t,
) -> PathDenoiser:
    """A network that was trained on `x_t = α_t x₀ + σ_t n`, with its own time and scaling, as `denoise(y, sigma)`.

    At the t where `σ_t/α_t = sigma`, `x = α_t y` is what it was trained on. Its output is read as

        "eps":       n                       "data":  x₀                       "score":  −n/σ_t
        "v":         α_t n − σ_t x₀          "velocity":  α'_t x₀ + σ'_t n     (flow matching: n − x₀)

    `net`: called as `net(x, label)`, x `(*dims, C)`, and returns that shape.
    `path`: the process of one field that it was trained on, e.g. `VP()`, `VP.from_betas(betas)`, `FlowMatching()`, `VE()`.
    `label`: what the network is told, of t: by default the path's own time, for `VP.from_betas(betas)` i = 1 … N. A library
    that counts from 0 takes `lambda i: i - 1`, score_sde's VP `lambda t: 999 * t`, EDM's F `lambda sigma: jnp.log(sigma) / 4`.

    A sigma beyond the path's range is answered at its end: above, with the noise `y/sigma` at the largest σ. Raises
    `ValueError` for a path of several fields or coefficients by position, and another `predicts`.

    >>> net = lambda x, t: gddim.VP().noise_factor(t)[0, 0] * x  # ε of white data of variance 1
    >>> denoise = as_denoiser(net, gddim.VP(), predicts="eps")
    >>> round(float(denoise(jnp.array([2.0]), 1.0)[0]), 4)  # E[x₀ | x₀ + n = 2]
    1.0
    """
    if predicts not in PREDICTS:
        raise ValueError(f"predicts={predicts!r} must be 'eps', 'data', 'v', 'score' or 'velocity'")
    if path.k != 1 or positions(path):
        raise ValueError(f"path: {type(path).__name__} must have one field and the same coefficients everywhere")
    _levels(path)
    return PathDenoiser(net, path, predicts, label)


LEVELS = 1024


@lru_cache(maxsize=32)
def _levels(path: AbstractLinearSDE) -> tuple[float, float, np.ndarray]:
    """The range of `log σ_t/α_t`, at most log `SIGMA_MAX`, and log t at `LEVELS` equal steps of it, by bisection in float64."""

    def level(t: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.log(_scalar(on_host(path.noise_factor, t))) - np.log(
                _scalar(on_host(path.transition, t, np.zeros_like(t)))
            )

    low, high = np.full(LEVELS, np.log(path.horizon * 1e-12)), np.full(LEVELS, np.log(path.horizon))
    first, last = level(np.exp([low[0], high[0]]))
    last = min(last, np.log(SIGMA_MAX))
    target = np.linspace(first, last, LEVELS)
    for _ in range(60):
        middle = (low + high) / 2
        above = level(np.exp(middle)) > target
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return float(first), float(last), (low + high) / 2


def time_of(path: AbstractLinearSDE, sigma: Scalar) -> tuple[Scalar, Scalar]:
    """The t where `σ_t/α_t` is sigma, and sigma within the path's range: a table, and two steps of Newton's method."""
    first, last, log_times = _levels(path)
    target = jnp.clip(jnp.log(sigma), first, last)
    place = (target - first) * ((LEVELS - 1) / (last - first))
    index = jnp.clip(place.astype(int), 0, LEVELS - 2)
    left, right = (jnp.asarray(log_times, sigma.dtype)[index + i] for i in (0, 1))
    t = jnp.exp(left + (place - index.astype(place.dtype)) * (right - left))

    def level(t: Array) -> Array:
        return jnp.log(_scalar(path.noise_factor(t))) - jnp.log(_scalar(path.transition(t, 0.0)))

    for _ in range(2):
        found, slope = jax.jvp(level, (t,), (jnp.ones_like(t),))
        slope = jnp.where(slope > 0, slope, jnp.inf)  # a path between points of a table has none at its end
        t = jnp.clip(t - (found - target) / slope, t / 2, path.horizon)
    return t, jnp.exp(target)


def _scalar(coefficient: Array) -> Array:
    return coefficient[..., 0, 0]
