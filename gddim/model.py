"""A network seen through a process: what samplers call as `eps_fn(u, t)`, and what it is trained on."""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray, PyTree, Scalar, ScalarLike

from gddim.errors import UserError
from gddim.sde.base import AbstractLinearSDE
from gddim.sde.linalg import Array, aligned, inverse, product, symmetric_root, transpose


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
    """Takes and returns the fields in pixels, flattened to `k·C` channels, field by field, at the level `time_scale · t`."""
    mixed_score: bool = eqx.field(default=False, static=True)
    """Add `R⁻¹(0, v)` to the network's output, so that it learns the score's difference to that of the velocity."""
    time_scale: float = eqx.field(default=999.0, static=True)
    """The noise level that the network is told is this times t."""

    def __call__(
        self, u: Float[Array, "*dims k C"], t: ScalarLike, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*dims k C"]:
        self.sde.check_state(u)
        pixels = self.sde.to_pixels(u)
        fields = pixels.reshape(*u.shape[:-2], -1)
        out = _shaped(self.net(fields, self.time_scale * t, cond, key=key), fields.shape)
        eps = self.sde.from_pixels(out.astype(u.dtype).reshape(u.shape))
        if self.mixed_score:
            coupled = jnp.arange(self.sde.k).reshape((1,) * (u.ndim - 2) + (-1, 1)) > 0
            rest = jnp.where(coupled, u, 0)
            eps = eps + product(inverse(self.sde.noise_factor(t)), rest)
        return eps

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


def _shaped(out: Array, shape: tuple[int, ...]) -> Array:
    """What the network returned. Raises `ValueError` unless it has that shape."""
    if out.shape != shape:
        raise ValueError(f"the network returned shape {out.shape}; this process and parameterisation take {shape}")
    return out


def _as_tuples(data_std: Any) -> Any:
    """A number, or a spectrum as nested tuples: static, so that it is no parameter."""
    values = np.asarray(data_std, np.float64)
    if not (np.all(np.isfinite(values)) and np.all(values > 0)):
        raise ValueError(f"data_std must be > 0, given {data_std}")
    if values.ndim not in (0, 2):
        raise ValueError(f"data_std must be a number or a spectrum (H, W), given an array {values.shape}")
    return float(values) if values.ndim == 0 else tuple(map(tuple, values.tolist()))


class Denoiser(eqx.Module):
    """The network is a preconditioned denoiser: EDM's preconditioning (Karras et al. 2022) for matrix SDEs.

    With `ψ = Ψ(t,0) e_0`, data variance `s²` and `S = Σ_t + s² ψψᵀ`,

        D(u, t) = c_skip u + c_out F_θ(c_in u, t),   ε = R⁻¹(u − ψ D),
        c_skip = s² ψᵀS⁻¹,   c_out² = s² − s⁴ ψᵀS⁻¹ψ,   c_in = S^{−1/2}.

    The network sees k whitened fields (`k·C` channels, in pixels), returns C channels, and its target has variance 1 at
    every t. Written with `w = R⁻¹ψ`, `c_out² = s²/(1 + s² wᵀw)` and `c_skip = c_out² wᵀR⁻¹`, nothing cancels.
    `model(u, t, cond=None, *, key=None)` is ε `(*dims, k, C)`, so that samplers take a model as their `eps_fn(u, t)`.

    `u`: one state `(*dims, k, C)`.
    `t`: its time, a number.
    `cond`: what conditions the network, handed to it as it is.
    `key`: randomness of the network, as dropout; None where there is none.

    Raises `ValueError` for a standard deviation that is not positive, and a network that returns another shape than
    `(*dims, C)`; `UserError` for a spectrum that is not of the process.

    >>> net = lambda x, level, cond=None, *, key=None: jnp.zeros_like(x[..., :3])
    >>> model = Denoiser(gddim.CLD(), net, data_std=0.5)
    >>> model(jnp.ones((32, 32, 2, 3)), jnp.array(0.5)).shape  # ε of every field
    (32, 32, 2, 3)
    """

    sde: AbstractLinearSDE
    """The process, of k fields."""
    net: Net
    """Takes the whitened fields in pixels, flattened to `k·C` channels, at the level `time_scale · t`; returns C channels."""
    data_std: Any = eqx.field(default=0.5, static=True, converter=_as_tuples)
    """s: a number, or a spectrum `(H, W)`, with a process that has coefficients `(H, W, k, k)` in that basis."""
    time_scale: float = eqx.field(default=999.0, static=True)
    """The noise level that the network is told is this times t."""

    def __check_init__(self) -> None:
        spectrum, dims = np.shape(self.data_std), np.shape(self.sde.transition(self.sde.horizon, 0.0))[:-2]
        if spectrum and dims != spectrum:
            takes = f"a number or a spectrum {dims}" if dims else "a number"
            raise UserError(f"data_std: given a spectrum {spectrum}; this {type(self.sde).__name__} takes {takes}")

    def __call__(
        self, u: Float[Array, "*dims k C"], t: ScalarLike, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*dims k C"]:
        psi = self.sde.transition(t, 0.0)[..., :, :1]
        x0 = self.denoise(u, t, cond, key=key)[..., None, :]
        return product(inverse(self.sde.noise_factor(t)), u - product(psi, x0))

    def denoise(
        self, u: Float[Array, "*dims k C"], t: ScalarLike, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*dims C"]:
        """`D(u, t)` `(*dims, C)`, the data that the state implies, in the basis of the process. Arguments as in a call."""
        w, c_out = self._scales(t)
        c_skip = product(c_out**2, product(transpose(w), inverse(self.sde.noise_factor(t))))
        out = self.sde.from_pixels(self._network(u, t, cond, key))[..., None, :]
        return (product(c_skip, u) + product(c_out, out))[..., 0, :]

    def loss(
        self,
        x0: Float[Array, "*dims C"],
        t: ScalarLike,
        eps: Float[Array, "*dims k C"],
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Scalar:
        """Mean of `(F_θ − (x_0 − c_skip u)/c_out)²` for one example; the target is `c_out (x_0/s² − wᵀε)`.

        `x0`: data in pixels, scaled, `(*dims, C)`.
        `t`, `eps`: the time, a number, and the noise `(*dims, k, C)`, which an objective draws.
        `cond`, `key`: as in a call.
        """
        u0 = self.sde.lift(x0)
        u = self.sde.perturb(u0, t, eps)
        w, c_out = self._scales(t)
        clean = product(1 / self._variance(t), u0[..., :1, :])
        target = product(c_out, clean - product(transpose(w), eps))[..., 0, :]
        return jnp.mean((self._network(u, t, cond, key) - self.sde.to_pixels(target)) ** 2)

    def _network(self, u: Array, t: ScalarLike, cond: PyTree, key: PRNGKeyArray | None) -> Array:
        """`F_θ(c_in u, t, cond)` in pixels, `(*dims, C)`."""
        psi = self.sde.transition(t, 0.0)[..., :, :1]
        noise, signal, variance = aligned(self.sde.covariance(t), product(psi, transpose(psi)), self._variance(t))
        whitened = product(inverse(symmetric_root(noise + variance * signal)), u)
        pixels = self.sde.to_pixels(whitened)
        out = self.net(pixels.reshape(*u.shape[:-2], -1), self.time_scale * t, cond, key=key)
        return _shaped(out, (*u.shape[:-2], u.shape[-1])).astype(u.dtype)

    def _variance(self, t: ScalarLike) -> Array:
        """`s²` as `(*#dims, 1, 1)`."""
        return jnp.asarray(np.asarray(self.data_std), jnp.asarray(t).dtype)[..., None, None] ** 2

    def _scales(self, t: ScalarLike) -> tuple[Array, Array]:
        """`w = R⁻¹ψ` `(*#dims, k, 1)` and `c_out` `(*#dims, 1, 1)`."""
        w = product(inverse(self.sde.noise_factor(t)), self.sde.transition(t, 0.0)[..., :, :1])
        precision, variance = aligned(product(transpose(w), w), self._variance(t))
        return w, jnp.sqrt(variance / (1 + variance * precision))
