"""Guidance and inverse problems: functions from denoisers to a denoiser, for every process and every sampler.

A denoiser is called as `denoise(y, sigma)`, or under a condition as `denoise(y, sigma, cond)`, for one example and says
`E[x₀ | x₀ + σn = y, cond]`, `(*dims, C)`: that of a trained model is `model.denoiser`. What guides it is one again, which
`gddim.through(sde, denoise)` samples, or `guided` puts in the place of the model's own:

>>> model = gddim.Denoiser(gddim.CLD(), lambda x, level, cond=None, *, key=None: cond["label"] + 0 * x, data_std=0.5)
>>> eps_fn = guided(model, lambda denoise: ClassifierFree(denoise, scale=2.0), {"label": jnp.array(3)})
>>> eps_fn.denoise(jnp.ones((8, 8, 2, 3)), 0.5).shape
(8, 8, 3)

A class is an integer, and −1 none of them.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import ArrayLike, Float, PyTree

from gddim.conjugate_gradients import solved
from gddim.denoiser import Through, reduction
from gddim.sde.base import AbstractLinearSDE
from gddim.sde.linalg import Array

EVERYWHERE = (0.0, np.inf)
UNTOLD = (
    "the network was trained without label dropout and never saw the data without a class: what classifier-free guidance leads "
    "away from is then no denoiser of all the data, and the samples lose what makes them likely"
)
"""A warning of what is lost."""


def guided(model: Any, change: Callable[[Any], Any], cond: PyTree = None) -> Through:
    """A model with its denoiser changed, as the `eps_fn(u, t)` of its process, under the condition `cond`, or, without,
    under that of each call, `eps_fn(u, t, cond)`."""
    denoise = change(model.denoiser)
    return Through(model.sde, denoise if cond is None else eqx.Partial(denoise, cond=cond))


def _asked(denoise: Callable[..., Array], y: Array, sigma: ArrayLike, cond: PyTree, **kwargs: Any) -> Array:
    """The reply of a denoiser, which need not take a condition where there is none."""
    return denoise(y, sigma, **kwargs) if cond is None else denoise(y, sigma, cond, **kwargs)


def _check_guidance(scale: float, interval: tuple[float, float] = EVERYWHERE) -> None:
    if not np.isfinite(scale):
        raise ValueError(f"scale={scale} must be a finite number")
    if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
        raise ValueError(f"interval={interval} must be two numbers, 0 <= low < high")


class ClassifierFree(eqx.Module):
    """Classifier-free guidance, `D(y; ∅) + scale · (D(y; c) − D(y; ∅))` (arXiv 2207.12598; its w is scale − 1).

    `denoise`: a denoiser that was trained with and without its condition.
    `scale`: 1 is the conditional denoiser bit for bit, 0 the unconditional one, more than 1 sharpens. Both take one
    batched call of the network, scale 1 half of it.
    `interval`: the σ in which it acts, `low < σ ≤ high`, outside is the conditional denoiser in half a call (arXiv
    2404.07724). Where noise has a spectrum σ is that of the lowest frequency.
    `cond`, when called, is a tree of signed integers, of which −1 stands for none. The scale is no array: each compiles anew.

    Raises `ValueError` for a scale that is not finite and an interval that does not rise.
    """

    denoise: Callable[..., Array]
    scale: float = eqx.field(static=True, converter=float)
    interval: tuple[float, float] = eqx.field(default=EVERYWHERE, static=True)

    def __check_init__(self) -> None:
        _check_guidance(self.scale, self.interval)

    def __call__(
        self, y: Float[Array, "*dims C"], sigma: ArrayLike, cond: PyTree = None, **kwargs: Any
    ) -> Float[Array, "*dims C"]:
        if cond is None:
            raise ValueError("cond is None: classifier-free guidance needs the condition that it guides to")
        if odd := [
            c for c in map(jnp.asarray, jax.tree.leaves(cond)) if not jnp.issubdtype(c.dtype, jnp.signedinteger)
        ]:
            raise ValueError(
                f"cond has a leaf of {odd[0].dtype}; accepted are signed integers, of which −1 stands for none"
            )

        def both() -> tuple[Array, Array]:
            pair = jax.tree.map(lambda c: jnp.stack([c, jnp.full_like(c, -1)]), cond)
            found = jax.vmap(lambda c: self.denoise(y, sigma, c, **kwargs))(pair)
            return found[0], found[1]

        alone = lambda: self.denoise(y, sigma, cond, **kwargs)
        return _extrapolated(alone, both, self.scale, self.interval, sigma)


class Autoguidance(eqx.Module):
    """Guidance by a worse model of the same data, `D_worse + scale · (D − D_worse)` (arXiv 2406.02507).

    `denoise`: the denoiser.
    `worse`: one of fewer steps, another average or fewer parameters.
    `scale`: 1 is `denoise` bit for bit.
    `interval`: the σ in which it acts, as in `ClassifierFree`; raises likewise.
    """

    denoise: Callable[..., Array]
    worse: Callable[..., Array]
    scale: float = eqx.field(static=True, converter=float)
    interval: tuple[float, float] = eqx.field(default=EVERYWHERE, static=True)

    def __check_init__(self) -> None:
        _check_guidance(self.scale, self.interval)

    def __call__(
        self, y: Float[Array, "*dims C"], sigma: ArrayLike, cond: PyTree = None, **kwargs: Any
    ) -> Float[Array, "*dims C"]:
        alone = lambda: _asked(self.denoise, y, sigma, cond, **kwargs)
        both = lambda: (alone(), _asked(self.worse, y, sigma, cond, **kwargs))
        return _extrapolated(alone, both, self.scale, self.interval, sigma)


class Guidance(eqx.Module):
    """What guides the samples of a run, a function from models to a model: at scale 1 from each to itself.

    `scale`, `interval`: as in `ClassifierFree`.
    `worse`: the denoiser of `Autoguidance`; without one guidance is classifier-free.
    """

    scale: float = eqx.field(default=1.0, static=True, converter=float)
    interval: tuple[float, float] = eqx.field(default=EVERYWHERE, static=True)
    worse: Callable[..., Array] | None = None

    def __check_init__(self) -> None:
        _check_guidance(self.scale, self.interval)

    def __call__(self, model: Any) -> Any:
        if self.scale == 1:
            return model
        how = self.scale, self.interval
        return guided(model, lambda D: Autoguidance(D, self.worse, *how) if self.worse else ClassifierFree(D, *how))

    def evaluations(
        self, sde: AbstractLinearSDE, calls: float | int, times: Float[np.ndarray, " n"] | None = None
    ) -> float | int:
        """How often a sample evaluates a network in so many calls: twice in each in which guidance acts, which those at
        known `times` tell; of others, at most."""
        if self.scale == 1 or times is None or self.interval == EVERYWHERE:
            return calls * (1 if self.scale == 1 else 2)
        sigma = jax.vmap(lambda t: jnp.ravel(reduction(sde, t, jnp.float32)[0])[0])(jnp.asarray(times, jnp.float32))
        return calls + int(jnp.sum((self.interval[0] < sigma) & (sigma <= self.interval[1])))


def _extrapolated(
    alone: Callable[[], Array],
    both: Callable[[], tuple[Array, Array]],
    scale: float,
    interval: tuple[float, float],
    sigma: ArrayLike,
) -> Array:
    if scale == 1:
        return alone()

    def apart() -> Array:
        better, worse = both()
        return worse + scale * (better - worse)

    if interval == EVERYWHERE:
        return apart()
    lowest = jnp.ravel(jnp.asarray(sigma))[0]
    return jax.lax.cond((interval[0] < lowest) & (lowest <= interval[1]), apart, alone)


class Classifier(eqx.Module):
    """Classifier guidance, `D + scale · Σ ∇_y log p(c | y)`, `Σ = σ²` the covariance of the noise (arXiv 2105.05233).

    `denoise`: the denoiser.
    `log_likelihood`: called as `log_likelihood(y, sigma, cond)`, a differentiable number: of a classifier that has seen noise.
    `scale`: 0 is `denoise` bit for bit.
    `basis`: the process, where its noise has a spectrum.
    """

    denoise: Callable[..., Array]
    log_likelihood: Callable[..., Array]
    scale: float = eqx.field(default=1.0, static=True, converter=float)
    basis: AbstractLinearSDE | None = None

    def __check_init__(self) -> None:
        _check_guidance(self.scale)

    def __call__(
        self, y: Float[Array, "*dims C"], sigma: ArrayLike, cond: PyTree = None, **kwargs: Any
    ) -> Float[Array, "*dims C"]:
        found = _asked(self.denoise, y, sigma, cond, **kwargs)
        if self.scale == 0:
            return found
        slope = jax.grad(lambda y: self.log_likelihood(y, sigma, cond))(y)
        return found + self.scale * noise_covariance(slope, sigma, self.basis)


class Measured(eqx.Module):
    """The denoiser of data of which a linear measurement `b = A x₀ + noise_std · n` is known.

    With D and its Jacobian J at y, the covariance Σ of the noise of y, and C that of x₀ given y,

        D + Σ Jᵀ Aᵀ z,   (A C Aᵀ + noise_std²) z = b − A D,

    solved by conjugate gradients. `by` says C:

        "moments": Σ Jᵀ, which is C exactly (MMPS, arXiv 2405.13712): so is the whole for Gaussian data. Each iteration
            takes a vector-Jacobian product of the network, about twice a call.
        "pseudoinverse": `σ²s²/(σ² + s²)`, that of data N(0, s²) (ΠGDM, Song et al., ICLR 2023): one such product in all.
        "replacement": C and Σ Jᵀ are 1: what was measured takes the place of what D says of it. No product, and biased: what
            was not measured does not hear of what was until the next call; of which `gddim.RePaint` makes several.

    `denoise`: the denoiser.
    `operator`: A, a linear function of data `(*dims, C)` in pixels to an array of any shape.
    `measurement`: b.
    `noise_std`: the standard deviation of its noise; 0 where it is exact.
    `data_std`: s, of the pseudoinverse.
    `iterations`: of conjugate gradients, at most.
    `basis`: the process, where its noise has a spectrum.

    Raises `ValueError` for another `by`, a negative `noise_std`, a `data_std` ≤ 0 and `iterations` < 1; and, when it is first
    called, for an operator that is not linear, a measurement of another shape, and numbers that are complex or not finite.
    """

    denoise: Callable[..., Array]
    operator: Callable[[Array], Array]
    measurement: Array
    noise_std: float = eqx.field(default=0.0, static=True, converter=float)
    by: str = eqx.field(default="moments", static=True)
    data_std: float = eqx.field(default=0.5, static=True, converter=float)
    iterations: int = eqx.field(default=10, static=True)
    basis: AbstractLinearSDE | None = None

    def __check_init__(self) -> None:
        if self.by not in ("moments", "pseudoinverse", "replacement"):
            raise ValueError(f"by={self.by!r} must be 'moments', 'pseudoinverse' or 'replacement'")
        if not 0 <= self.noise_std < np.inf:
            raise ValueError(f"noise_std={self.noise_std} must be at least 0")
        if not 0 < self.data_std < np.inf:
            raise ValueError(f"data_std={self.data_std} must be > 0")
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} must be at least 1")

    def __call__(
        self, y: Float[Array, "*dims C"], sigma: ArrayLike, cond: PyTree = None, **kwargs: Any
    ) -> Float[Array, "*dims C"]:
        check_linear(self.operator, y.shape, self.measurement, y.dtype)
        transposed = jax.linear_transpose(self.operator, jax.ShapeDtypeStruct(y.shape, y.dtype))
        back = lambda z: transposed(z)[0]
        found, pull = jax.vjp(lambda y: _asked(self.denoise, y, sigma, cond, **kwargs), y)
        moved = lambda v: noise_covariance(pull(v)[0], sigma, self.basis)
        match self.by:
            case "moments":
                covariance = moved
            case "pseudoinverse":
                covariance = lambda v: noise_covariance(v, _within(jnp.asarray(sigma), self.data_std), self.basis)
            case _:
                covariance = moved = lambda v: v
        seen = lambda z: self.operator(covariance(back(z))) + self.noise_std**2 * z
        gap = jnp.asarray(self.measurement, y.dtype) - self.operator(found)
        return found + moved(back(solved(seen, gap, self.iterations)))


def _within(sigma: Array, std: float) -> Array:
    return sigma * std / jnp.sqrt(sigma**2 + std**2)


def noise_covariance(v: Array, sigma: ArrayLike, basis: AbstractLinearSDE | None) -> Array:
    """`Σ v` in pixels, Σ the covariance of noise of standard deviation `sigma`: perhaps a spectrum in a process's basis."""
    square = jnp.asarray(sigma, v.dtype) ** 2
    if square.ndim == 0:
        return square * v
    if basis is None:
        raise ValueError(f"sigma has shape {square.shape}: give the process in whose basis that is, as basis=")
    return basis.to_pixels(square[..., None] * basis.from_pixels(v))


def check_linear(
    operator: Callable[[Array], Array], shape: tuple[int, ...], measurement: ArrayLike, dtype: Any = jnp.float32
) -> None:
    """Raise `ValueError` unless `operator` is linear on random arrays of this shape and type, and gives real ones as measured.

    Of an operator with arrays that are traced, as an argument of `jit`, the values are not known: linearity is not asked for.
    """
    measured = jnp.shape(measurement)
    with jax.ensure_compile_time_eval():
        x, z = jax.random.normal(jax.random.key(0), (2, *shape), dtype)
        whole, parts = operator(x + 2 * z), operator(x) + 2 * operator(z)
        if whole.shape != measured:
            raise ValueError(f"measurement has shape {measured}, and the operator gives {whole.shape} of data {shape}")
        if jnp.iscomplexobj(whole) or jnp.iscomplexobj(measurement):
            raise ValueError("the measurement is complex: give its real and imaginary parts, as two channels say")
        if not isinstance(measurement, Tracer) and not bool(jnp.all(jnp.isfinite(jnp.asarray(measurement)))):
            raise ValueError(
                "the measurement has numbers that are not finite: what is missing is left out by the operator"
            )
        if isinstance(parts, Tracer):
            return
        near = 1e-3 if jnp.finfo(whole.dtype).bits > 16 else 0.05
        if not jnp.allclose(whole, parts, rtol=near, atol=near * float(jnp.abs(parts).max())):
            raise ValueError("operator is not linear: on random data A(x + 2z) differs from A(x) + 2A(z)")
