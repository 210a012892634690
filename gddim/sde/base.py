"""What a linear SDE is: the interface that samplers, models and losses see."""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, PRNGKeyArray, Shaped

from gddim.sde.host import in_float64, on_host
from gddim.sde.linalg import Array, aligned, as_times, inverse, lq, product, symmetric_root, transpose

Time = Any  # a Python float, a NumPy or a JAX scalar; NumPy arrays of times map over their axes
T_TINY = 1e-18  # stands for 0 where a derivative is taken: R may grow as √t


class AbstractLinearSDE(eqx.Module):
    """`du = F_t u dt + G_t dw` on states `u` of shape `(*dims, k, C)`: gDDIM (arXiv 2206.05564) Eq. 1.

    `dims` are pixel positions (`(H, W)`, or `()` for points), `k` the fields that the SDE couples, `C` the channels.
    Coefficients have shape `(*#dims, k, k)`, `#dims` absent or the full `dims`, and act over the last two axes.

    **Host and device.** Python or NumPy times give NumPy float64 coefficients, vectorised over arrays of times; JAX
    times give JAX coefficients in their own precision, under any transformation. A subclass written in `jax.numpy`
    alone works too: it is then evaluated in float64 on the CPU where a table is computed. Fields are static (a process
    has no array leaves), so it passes through `jit` as it is.

    A new process says its `k` and `horizon` and defines the four abstract methods: `transition`, `noise_factor`, and
    `to_pixels` and `from_pixels`, which are the identity unless it works in another basis. All else follows. One given by F
    and GGᵀ is a `LinearSDE`, one of a single field a `GaussianPath`; `python -m gddim.check module:object` measures its laws.

    >>> class OrnsteinUhlenbeck(AbstractLinearSDE):  # du = −u dt + √2 dw
    ...     k = 1
    ...     horizon = 5.0
    ...
    ...     def transition(self, t, s):
    ...         return jnp.exp(-(t - s) * jnp.ones((1, 1)))
    ...
    ...     def noise_factor(self, t):
    ...         return jnp.sqrt(-jnp.expm1(-2 * t * jnp.ones((1, 1))))
    ...
    ...     def to_pixels(self, u):
    ...         return u
    ...
    ...     def from_pixels(self, x):
    ...         return x
    >>> table = gddim.GDDIM(order=2).coefficients(OrnsteinUhlenbeck(), gddim.power_grid(5.0, 1e-3, steps=10))
    >>> bool(np.allclose(OrnsteinUhlenbeck().diffusion_squared(0.3), 2.0))
    True
    """

    k: eqx.AbstractVar[int]
    horizon: eqx.AbstractVar[float]
    grid_end: ClassVar[float] = 1e-3
    """Where samplers stop unless they are told, over the horizon: time is the process's own, and means what it likes."""
    grid_power: ClassVar[float] = 2.0
    """Their times are then uniform in t^(1/grid_power)."""

    @abc.abstractmethod
    def transition(self, t: Time, s: Time) -> Array:
        """`Ψ(t, s)`, from time s to time t: `∂_t Ψ(t, s) = F_t Ψ(t, s)`, `Ψ(s, s) = I`. Returns `(*#dims, k, k)`."""

    @abc.abstractmethod
    def noise_factor(self, t: Time) -> Array:
        """`R_t` with `R Rᵀ = Σ_t` and `R' = (F + ½ GGᵀΣ⁻¹) R`, gDDIM Eq. 17. Returns `(*#dims, k, k)`."""

    @abc.abstractmethod
    def to_pixels(self, u: Array) -> Array:
        """From the basis in which the process is diagonal over `dims` to pixels; keeps the shape."""

    @abc.abstractmethod
    def from_pixels(self, x: Array) -> Array:
        """The inverse of `to_pixels`; keeps the shape."""

    def covariance(self, t: Time) -> Array:
        """`Σ_t` of the state given the data: `Σ' = FΣ + ΣFᵀ + GGᵀ`. Returns `(*#dims, k, k)`."""
        R = self.noise_factor(t)
        return product(R, transpose(R))

    def cholesky_factor(self, t: Time) -> Array:
        """`L_t`, lower triangular with a positive diagonal, `L Lᵀ = Σ_t`. Returns `(*#dims, k, k)`."""
        return lq(self.noise_factor(t))[0]

    def drift(self, t: Time) -> Array:
        """`F_t = ∂_t Ψ(t, s)` at s = t. Returns `(*#dims, k, k)`."""
        return self._derivatives(t)[0]

    def diffusion_squared(self, t: Time) -> Array:
        """`G_t G_tᵀ = 2 (R' − F R) Rᵀ`, per unit of time. Returns `(*#dims, k, k)`."""
        _, velocity, R = self._derivatives(t)
        GG = 2 * product(velocity, transpose(R))
        return (GG + transpose(GG)) / 2

    def velocity_factors(self, t: Time) -> tuple[Array, Array]:
        """`F_t` and `½ GGᵀR⁻ᵀ = R' − F R`, so that the probability flow is `du/dt = F u + (½ GGᵀR⁻ᵀ) ε`.

        At t = 0, where R may be singular, they are those of a t just above it.
        """
        return self._derivatives(t)[:2]

    def _derivatives(self, t: Time) -> tuple[Array, Array, Array]:
        """`F`, `R' − F R` and `R` at t, of one rank."""
        if not isinstance(t, jax.Array):
            return in_float64(self._derivatives, np.asarray(t, np.float64))
        _, t = as_times(t)
        if t.ndim:
            return jax.vmap(self._derivatives)(t)
        t = jnp.maximum(t, T_TINY)
        one = jnp.ones_like(t)
        _, F = jax.jvp(lambda x: jnp.asarray(self.transition(x, t)), (t,), (one,))
        R, rate = jax.jvp(lambda x: jnp.asarray(self.noise_factor(x)), (t,), (one,))
        F, R, rate = aligned(F, R, rate)
        return F, rate - product(F, R), R

    def lift(self, x0: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """Data in pixels `(*dims, C)` to the state `(*dims, k, C)` at t = 0: field 0 holds it, the others are 0.

        Raises `ValueError` for data that are not floating, and of other dims than the process has.
        """
        check_floating(x0, "x0")
        u = self.from_pixels(x0)[..., None, :]
        rest = jnp.zeros((*u.shape[:-2], self.k - 1, u.shape[-1]), u.dtype)
        u = jnp.concatenate([u, rest], -2)
        self.check_state(u, "the state of x0")
        return u

    def project(self, u: Float[Array, "..."]) -> Float[Array, "..."]:
        """The data in pixels `(*dims, C)` that the state `(*dims, k, C)` holds in its field 0.

        Raises `ValueError` for another k or dims, and a state that is not floating.
        """
        self.check_state(u)
        return self.to_pixels(u[..., 0, :])

    def perturb(self, u0: Shaped[Array, "..."], t: Time, eps: Float[Array, "..."]) -> Float[Array, "..."]:
        """`u_t = Ψ(t, 0) u_0 + R_t ε`, all states `(*dims, k, C)`, ε standard normal.

        Raises `ValueError` for another k, a state that is not floating, a time outside [0, horizon] (where it is known when
        this is called, not under `jit`), and several times: `jax.vmap` maps over them.
        """
        self._check_time(t)
        self.check_state(u0, "u0")
        self.check_state(eps, "eps")
        return product(self.transition(t, 0.0), u0) + product(self.noise_factor(t), eps)

    def sample_prior(self, key: PRNGKeyArray, shape: Sequence[int]) -> Float[Array, "..."]:
        """A state of `shape = (*dims, k, C)` from `N(0, Σ_T + ψψᵀ)`, the `prior_covariance` at T.

        For VP this is N(0, 1), for CLD N(0, 1) × N(0, M) up to e^{−2B(T)√m_inv}.
        """
        xi = jax.random.normal(key, shape, jnp.float32)
        self.check_state(xi, "shape")
        return product(symmetric_root(self.prior_covariance(self.horizon)), xi)

    def prior_covariance(self, t: Time) -> Array:
        """`Σ_t + ψψᵀ`, `ψ = Ψ(t, 0) e_0`: that of the state at t where data are white, of variance 1.

        Returns `(*#dims, k, k)`.
        """
        psi = self.transition(t, 0.0)[..., :, :1]
        signal, noise = aligned(product(psi, transpose(psi)), self.covariance(t), lead=np.ndim(t))
        return signal + noise

    def score(self, eps: Float[Array, "..."], t: Time) -> Float[Array, "..."]:
        """`∇log p_t(u) = −R_t⁻ᵀ ε(u, t)`, of the shape of ε. Infinite at a t where `R_t` is singular.

        Raises `ValueError` like `perturb`.
        """
        self._check_time(t)
        self.check_state(eps, "eps")
        return -product(transpose(inverse(self.noise_factor(t))), eps)

    def _check_time(self, t: Time) -> None:
        """Raise `ValueError` for several times, and for one that is known now and no time of this process."""
        if np.ndim(t):
            raise ValueError(
                f"t has shape {np.shape(t)}, accepted is one time; of a batch map over states and times by jax.vmap"
            )
        if not isinstance(t, Tracer) and not 0 <= float(t) <= self.horizon * (1 + 1e-6):
            raise ValueError(
                f"t={float(t):g} must lie in [0, {self.horizon:g}], the times of this {type(self).__name__}"
            )

    def check_state(self, u: Array, name: str = "u") -> None:
        """Raise `ValueError` unless `u` is floating, and has the shape `(*dims, k, C)` of this process."""
        check_floating(u, name)
        dims = positions(self)
        known = not dims or (u.ndim == len(dims) + 2 and all(n in (1, m) for n, m in zip(dims, u.shape, strict=False)))
        if not (u.ndim >= 2 and u.shape[-2] == self.k and known):
            expected = ", ".join([*(map(str, dims) if dims else ["*dims"]), str(self.k), "C"])
            raise ValueError(f"{name} has shape {u.shape}; {type(self).__name__} takes ({expected})")


def check_floating(x: Array, name: str) -> None:
    """Raise `ValueError` for an array of integers, which would be computed with in their type."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} has dtype {x.dtype}; accepted are floating numbers, of images those of gddim.data.to_unit"
        )


def last_time(sde: AbstractLinearSDE) -> float:
    """The horizon, or where `Ψ(T, 0) = 0` a time just before it: there ε says nothing of the data, and Ψ has no inverse."""
    at_end = on_host(sde.transition, np.asarray(sde.horizon), np.asarray(0.0))
    return sde.horizon if np.any(at_end) else 0.99 * sde.horizon


def positions(sde: AbstractLinearSDE) -> tuple[int, ...]:
    """The positions or frequencies over which its coefficients differ; () where they are the same at all."""
    T = np.float64(sde.horizon)
    return np.broadcast_shapes(*(np.shape(A)[:-2] for A in (sde.transition(T, 0.0), sde.noise_factor(T))))
