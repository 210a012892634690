"""A network seen through a process: what samplers call as `eps_fn(u, t)`, and what it is trained on."""

import dataclasses
from functools import partial
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, PRNGKeyArray, PyTree, Scalar, ScalarLike, Shaped

from gddim.denoiser import as_denoiser, implied_eps, reduction, statistic, through
from gddim.errors import UserError
from gddim.sde.base import AbstractLinearSDE, check_floating, positions
from gddim.sde.linalg import Array, as_static, inverse, product, transpose


@runtime_checkable
class Net(Protocol):
    """A network of one example, called under `jax.vmap`; see `gddim.nn` for what each argument is."""

    def __call__(self, x: Any, level: Any, cond: PyTree = None, *, key: Any = None) -> Any: ...


class EpsModel(eqx.Module):
    """The network is ε in R coordinates, for all k fields: gDDIM (arXiv 2206.05564), the published parameterisation.

    `model(u, t, cond=None, *, key=None)` is ε `(*dims, k, C)`, so that samplers take a model as their `eps_fn(u, t)`.

    `u`: one state `(*dims, k, C)`.
    `t`: its time, a number.
    `cond`: what conditions the network, handed to it as it is.
    `key`: randomness of the network, as dropout; None where there is none.

    Raises `ValueError` for a network that returns another shape than it is given.

    >>> net = lambda x, level, cond=None, *, key=None: jnp.zeros_like(x)
    >>> EpsModel(gddim.CLD(), net)(jnp.ones((32, 32, 2, 3)), 0.5).shape
    (32, 32, 2, 3)
    """

    sde: AbstractLinearSDE
    """The process, of k fields."""
    net: Net
    """Takes and returns the fields in pixels, flattened to `k·C` channels, field by field, at a level that t makes."""
    mixed_score: bool = eqx.field(default=False, static=True)
    """Add `R⁻¹(0, v)` to the network's output, so that it learns the score's difference to that of the velocity."""
    time_scale: float = eqx.field(default=999.0, static=True)
    """The noise level that the network is told is this times t,"""
    offset: float = eqx.field(default=0.0, static=True)
    """plus this: −1 for a network that was told discrete times counted from 0."""

    def __call__(
        self, u: Float[Array, "*dims k C"], t: ScalarLike, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*dims k C"]:
        self.sde.check_state(u)
        pixels = self.sde.to_pixels(u)
        fields = pixels.reshape(*u.shape[:-2], -1)
        out = _shaped(self.net(fields, self.time_scale * t + self.offset, cond, key=key), fields.shape)
        eps = self.sde.from_pixels(out.astype(u.dtype).reshape(u.shape))
        if self.mixed_score:
            coupled = jnp.arange(self.sde.k).reshape((1,) * (u.ndim - 2) + (-1, 1)) > 0
            rest = jnp.where(coupled, u, 0)
            eps = eps + product(inverse(self.sde.noise_factor(t)), rest)
        return eps

    def denoiser(
        self, y: Shaped[Array, "*dims C"], sigma: ScalarLike, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*dims C"]:
        """`D(y; σ) = E[x₀ | x₀ + σn = y]`, in pixels and without a process: see `gddim.as_denoiser`.

        `y`: noised data `(*dims, C)`.
        `sigma`: the standard deviation of the noise, a number.
        `cond`, `key`: as in a call.

        Raises `ValueError` where the process has more than one field, or coefficients by frequency.
        """

        scale, offset = self.time_scale, self.offset
        net = partial(self.net, cond=cond, key=key)
        return as_denoiser(net, self.sde, "eps", lambda t: scale * t + offset)(y, sigma)

    def loss(
        self,
        x0: Float[Array, "*dims C"],
        t: ScalarLike,
        eps: Float[Array, "*dims k C"],
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Scalar:
        """Mean of `(ε − ε_θ(Ψ(t,0) u_0 + R_t ε, t))²` for one example: 1 for a network that says 0.

        `x0`: data in pixels, scaled, `(*dims, C)`.
        `t`, `eps`: the time, a number, and the noise `(*dims, k, C)`, which an objective draws.
        `cond`, `key`: as in a call.
        """
        u = self.sde.perturb(self.sde.lift(x0), t, eps)
        return jnp.mean((eps - self(u, t, cond, key=key)) ** 2)


class VelocityModel(eqx.Module):
    """The network is ε of the velocity alone, in L coordinates: CLD-SGM (Dockhorn et al. 2022, arXiv 2112.07068).

    Of the score it publishes `s_v = −ε_v/L_vv`, which with u determines the data, `[Σ⁻¹(u − ψD)]_v = −s_v`, so that

        D(u, t) = ([L⁻¹u]_v − ε_v)/[L⁻¹ψ]_v,   ε = R⁻¹(u − ψD),   ε_v = F_θ(u, t) + mixed L_vv/Σ_vv v.

    It sees both fields, and so belongs to its process. Called as an `EpsModel`.

    Raises `ValueError` for a process of other than two fields or with coefficients by frequency.
    """

    sde: AbstractLinearSDE
    """The process, of position and velocity."""
    net: Net
    """Takes the fields, flattened to 2C channels, field by field, at the level `time_scale · t`; returns C channels."""
    mixed_score: bool = eqx.field(default=False, static=True)
    """Add the ε of a velocity that is noise alone to the network's output."""
    time_scale: float = eqx.field(default=1.0, static=True)
    """The noise level that the network is told is this times t."""

    def __check_init__(self) -> None:
        if self.sde.k != 2 or positions(self.sde):
            raise ValueError(f"VelocityModel: {type(self.sde).__name__} is no process of position and velocity")

    def __call__(
        self, u: Float[Array, "*dims 2 C"], t: ScalarLike, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*dims 2 C"]:
        return implied_eps(self.sde, u, t, self.denoise(u, t, cond, key=key))

    def denoise(
        self, u: Float[Array, "*dims 2 C"], t: ScalarLike, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*dims C"]:
        """`E[x₀ | u_t = u]` `(*dims, C)`. Arguments as in a call."""
        L = jnp.asarray(self.sde.cholesky_factor(t), u.dtype)
        psi = jnp.asarray(self.sde.transition(t, 0.0), u.dtype)[..., 0]
        slope = L[1, 0] / L[0, 0]
        position, velocity = u[..., 0, :], u[..., 1, :]
        rest = velocity - slope * position - L[1, 1] * self.velocity_eps(u, t, cond, key=key)
        return rest / (psi[1] - slope * psi[0])

    def velocity_eps(
        self, u: Float[Array, "*dims 2 C"], t: ScalarLike, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*dims C"]:
        """`ε_v` `(*dims, C)`; the score of the velocity is `−ε_v/L_vv`. Arguments as in a call."""
        self.sde.check_state(u)
        out = self.net(u.reshape(*u.shape[:-2], -1), self.time_scale * t, cond, key=key)
        eps = _shaped(out, (*u.shape[:-2], u.shape[-1])).astype(u.dtype)
        if self.mixed_score:
            L = jnp.asarray(self.sde.cholesky_factor(t), u.dtype)
            eps = eps + L[1, 1] / (L[1, 0] ** 2 + L[1, 1] ** 2) * u[..., 1, :]
        return eps

    def loss(
        self,
        x0: Float[Array, "*dims C"],
        t: ScalarLike,
        eps: Float[Array, "*dims 2 C"],
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Scalar:
        """Mean of `([L⁻¹R ε]_v − ε_v)²` for one example: hybrid score matching. Arguments as in `EpsModel.loss`."""
        u = self.sde.perturb(self.sde.lift(x0), t, eps)
        whitened = product(inverse(self.sde.cholesky_factor(t)), product(self.sde.noise_factor(t), eps))
        return jnp.mean((whitened[..., 1, :] - self.velocity_eps(u, t, cond, key=key)) ** 2)


def _shaped(out: Array, shape: tuple[int, ...]) -> Array:
    """What the network returned. Raises `ValueError` unless it has that shape."""
    if getattr(out, "shape", None) != shape:
        given = f"shape {out.shape}" if hasattr(out, "shape") else f"a {type(out).__name__}"
        raise ValueError(f"the network returned {given}; this process and parameterisation take {shape}")
    return out


def _checked_std(data_std: Any) -> Any:
    """A positive number, or a spectrum of them, as static values."""
    values = np.asarray(data_std, np.float64)
    if not (np.all(np.isfinite(values)) and np.all(values > 0)):
        raise ValueError(f"data_std must be > 0, given {data_std}")
    if values.ndim not in (0, 2):
        raise ValueError(f"data_std must be a number or a spectrum (H, W), given an array {values.shape}")
    return as_static(values)


class Denoiser(eqx.Module):
    """A preconditioned denoiser of white noise, seen through a process: one network for every process.

    Given the data, the state tells of them through `y = ψᵀΣ⁻¹u / (ψᵀΣ⁻¹ψ) = x₀ + σn` alone, `ψ = Ψ(t,0) e₀` (see
    `gddim.through`). With EDM's preconditioning (Karras et al. 2022, arXiv 2206.00364),

        D(y; σ) = c_skip y + c_out F_θ(c_in y, ln(σ)/4),   ε = R⁻¹(u − ψ D),
        c_skip = s²/(s² + σ²),   c_out = sσ/√(s² + σ²),   c_in = 1/√(s² + σ²).

    The network sees and returns C channels, whatever k is, and its target has variance 1 at every σ. Trained once, it
    serves every process whose coefficients are the same at all positions: see `seen_through`. Where they differ by
    frequency, so do σ and the c's, the network sees `c_in y` in pixels, and it belongs to its process.
    `model(u, t, cond=None, *, key=None)` is ε `(*dims, k, C)`, so that samplers take a model as their `eps_fn(u, t)`.

    `net`: `net(x, level, cond, key=key)`, an Equinox module, or `jax.tree_util.Partial(apply, params)` of another library's:
    of a plain closure the parameters are no leaves of this model.
    `u`: one state `(*dims, k, C)`.
    `t`: its time, a number.
    `cond`: what conditions the network, handed to it as it is.
    `key`: randomness of the network, as dropout; None where there is none.

    Raises `ValueError` for a standard deviation that is not positive, and a network that returns another shape than
    `(*dims, C)`; `UserError` for a spectrum that is not of the process, and a network that is `logarithmic`.

    >>> net = lambda x, level, cond=None, *, key=None: jnp.zeros_like(x)
    >>> model = Denoiser(gddim.CLD(), net, data_std=0.5)
    >>> model(jnp.ones((32, 32, 2, 3)), jnp.array(0.5)).shape  # ε of every field
    (32, 32, 2, 3)
    >>> bool(jnp.allclose(model.denoiser(jnp.ones((32, 32, 3)), sigma=0.5), 0.5))  # s²/(s² + σ²)
    True
    """

    sde: AbstractLinearSDE
    """The process, of k fields."""
    net: Net
    """Takes `c_in y` in pixels, `(*dims, C)`, and the level `ln(σ)/4`, σ that of the lowest frequency; returns C channels."""
    data_std: Any = eqx.field(default=0.5, static=True, converter=_checked_std)
    """s: a number, or a spectrum `(H, W)`, with a process that has coefficients `(H, W, k, k)` in that basis."""

    def __check_init__(self) -> None:
        spectrum, dims = np.shape(self.data_std), positions(self.sde)
        if spectrum and dims != spectrum:
            takes = f"a number or a spectrum {dims}" if dims else "a number"
            raise UserError(f"data_std: given a spectrum {spectrum}; this {type(self.sde).__name__} takes {takes}")
        if getattr(self.net, "logarithmic", False):
            raise UserError(
                f"this {type(self.net).__name__} takes the logarithm of its level, and a denoiser's, ln(σ)/4, has none: to "
                "predict data, take embedding positional"
            )

    def __call__(
        self, u: Float[Array, "*dims k C"], t: ScalarLike, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*dims k C"]:
        return implied_eps(self.sde, u, t, self.denoise(u, t, cond, key=key))

    def denoise(
        self, u: Float[Array, "*dims k C"], t: ScalarLike, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*dims C"]:
        """`E[x₀ | u_t = u]` `(*dims, C)`, in the basis of the process. Arguments as in a call."""
        self.sde.check_state(u)
        return self._denoised(*statistic(self.sde, u, t), cond, key)

    def denoiser(
        self, y: Shaped[Array, "*dims C"], sigma: ArrayLike, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*dims C"]:
        """`D(y; σ) = E[x₀ | x₀ + σn = y]`, in pixels and without a process.

        `y`: noised data `(*dims, C)`.
        `sigma`: the standard deviation of the noise: a number, or its spectrum where the process's coefficients have one.
        `cond`, `key`: as in a call.
        """
        check_floating(y, "y")
        return self.sde.to_pixels(self._denoised(self.sde.from_pixels(y), jnp.asarray(sigma, y.dtype), cond, key))

    def loss(
        self,
        x0: Float[Array, "*dims C"],
        t: ScalarLike,
        eps: Float[Array, "*dims k C"],
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Scalar:
        """`loss_at` the noise level that the process has at t, with its noise `n = ŵᵀε`, `ŵ` along `R⁻¹ψ`.

        `x0`: data in pixels, scaled, `(*dims, C)`.
        `t`, `eps`: the time, a number, and the noise `(*dims, k, C)`, which an objective draws.
        `cond`, `key`: as in a call.
        """
        self.sde.check_state(eps, "eps")
        sigma, direction = reduction(self.sde, t, eps.dtype)
        return self.loss_at(x0, sigma, product(transpose(direction), eps)[..., 0, :], cond, key=key)

    def loss_at(
        self,
        x0: Float[Array, "*dims C"],
        sigma: ArrayLike,
        noise: Float[Array, "*dims C"],
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Scalar:
        """Mean of `(F_θ − (x₀ − c_skip y)/c_out)²` at `y = x₀ + σn`; the target is `c_in (σ x₀/s − s n)`.

        `x0`: data in pixels, scaled, `(*dims, C)`.
        `sigma`: the noise level: a number, or its spectrum where the process's coefficients have one.
        `noise`: n, standard normal, `(*dims, C)` in the basis of the process.
        `cond`, `key`: as in a call.
        """
        x, sigma = self.sde.from_pixels(x0), jnp.asarray(sigma, x0.dtype)
        std, c_in = self._scales(sigma)
        target = _scaled(c_in * sigma / std, x) - _scaled(c_in * std, noise)
        out = self._network(_scaled(c_in, x + _scaled(sigma, noise)), sigma, cond, key)
        return jnp.mean((out - self.sde.to_pixels(target)) ** 2)

    def _denoised(self, y: Array, sigma: Array, cond: PyTree, key: PRNGKeyArray | None) -> Array:
        """`c_skip y + c_out F_θ`, in the basis of the process."""
        std, c_in = self._scales(sigma)
        out = self.sde.from_pixels(self._network(_scaled(c_in, y), sigma, cond, key))
        return _scaled((std * c_in) ** 2, y) + _scaled(std * sigma * c_in, out)

    def _network(self, x: Array, sigma: Array, cond: PyTree, key: PRNGKeyArray | None) -> Array:
        """`F_θ(x, ln(σ)/4, cond)` in pixels, `(*dims, C)`, of `x = c_in y` in the basis of the process."""
        level = jnp.log(sigma[(0,) * sigma.ndim]) / 4
        return _shaped(self.net(self.sde.to_pixels(x), level, cond, key=key), x.shape).astype(x.dtype)

    def _scales(self, sigma: Array) -> tuple[Array, Array]:
        """s and `c_in`, each `(*#dims,)`. Raises `ValueError` for noise of another kind than that of the process."""
        if sigma.shape != (dims := positions(self.sde)):
            takes = f"a spectrum {dims}" if dims else "a number"
            raise ValueError(f"sigma has shape {sigma.shape}; through {type(self.sde).__name__} noise has {takes}")
        std = jnp.asarray(np.asarray(self.data_std), sigma.dtype)
        return std, 1 / jnp.sqrt(std**2 + sigma**2)


def _scaled(c: Array, x: Array) -> Array:
    """`c x` of an array `(*dims, C)`, c a number or one for each position."""
    return (c[..., None] if c.ndim else c) * x


def seen_through(model: Any, sde: AbstractLinearSDE) -> Any:
    """The same network through another process, exactly, where it is a denoiser of white noise, as an ε of one field is too.

    Raises `UserError` for one of several fields, and where the coefficients of either process differ by frequency.
    """
    if sde == model.sde:
        return model
    own, other = type(model.sde).__name__, type(sde).__name__
    if not isinstance(model, Denoiser) and (not isinstance(model, EpsModel) or model.sde.k > 1):
        raise UserError(
            f"the network predicts the ε of {own}, and {other} has another; one that predicts data serves both"
        )
    for each, name in ((model.sde, own), (sde, other)):
        if positions(each):
            raise UserError(
                f"{name} has a spectrum of noise, and its network belongs to it: it cannot go from {own} to {other}"
            )
    return dataclasses.replace(model, sde=sde) if isinstance(model, Denoiser) else through(sde, model.denoiser)
