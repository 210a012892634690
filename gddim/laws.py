"""Laws that a process keeps, whatever is done with it: of Ψ and R at any time, and of the members that follow from them.

They are measured at random times in (0, horizon], up to thousands of them: what is narrower than 1/1000 of the horizon may
pass unseen. What follows from Ψ and R alone cannot be checked: another Σ_0 or GGᵀ than was meant, as long as it is that of
some process, and a constant rotation, R Q in the place of R.
"""

from collections.abc import Iterator
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gddim.sde.base import AbstractLinearSDE, last_time, positions
from gddim.sde.host import on_host
from gddim.sde.linalg import aligned, transpose


class Law(NamedTuple):
    """A law, the error that was measured, and the largest that passes (a slope is the other way round)."""

    name: str
    error: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return bool(self.error >= self.limit if self.at_least else self.error <= self.limit)


def ranked(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Axes between the times and the matrices as needed to broadcast against `like`, or as they are."""
    missing = like.ndim - values.ndim
    return values.reshape(values.shape[:1] + (1,) * missing + values.shape[1:]) if missing > 0 else values


def worst(*errors: Any) -> float:
    """The largest of errors; not a number if one is none."""
    return float(np.max([np.max(error) for error in errors]))


def relative(error: np.ndarray, *of: np.ndarray) -> np.ndarray:
    """Errors relative to the largest norm of the matrices, where that is not 0."""
    size = reduce(np.maximum, (np.linalg.norm(matrices, axis=(-2, -1)) for matrices in of))
    return error / np.where(size > 0, size, 1)


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance of matrices, relative to the larger of their norms."""
    a, b = ranked(a, b), ranked(b, a)
    return worst(relative(np.linalg.norm(a - b, axis=(-2, -1)), a, b))


def _edges(sde: AbstractLinearSDE) -> np.ndarray:
    """Increasing times from 0 to the horizon: random ones everywhere, and ever closer ones at both ends."""
    n = int(np.clip(2**17 // max(1, np.prod(positions(sde))), 128, 1024))
    within = (np.arange(1, n) + np.random.default_rng(0).uniform(-0.4, 0.4, n - 1)) / n
    return last_time(sde) * np.sort([0, *np.geomspace(1e-9, 1 / n, 96), *within, *1 - np.geomspace(1e-6, 1 / n, 32), 1])


def process_laws(sde: AbstractLinearSDE) -> Iterator[Law]:
    """The laws of Ψ and R alone, wherever they can break; the last names the time where it is worst."""
    edges = _edges(sde)
    r, s, t = np.sort(np.random.default_rng(1).choice(edges, (3, len(edges))), axis=0)
    psi = lambda t, s: on_host(sde.transition, t, s)
    gaps = gap(psi(t, s) @ psi(s, r), psi(t, r)), gap(psi(edges, edges), np.eye(sde.k)[None])
    yield Law("semigroup Ψ(t,r) = Ψ(t,s) Ψ(s,r), Ψ(t,t) = I", worst(*gaps), 1e-10)
    s, t = edges[:-1], edges[1:]
    left, GG = _increments(sde, s, t)
    # (R' − F R) Rᵀ = ½ GGᵀ: any factor of Σ gives Σ' = FΣ + ΣFᵀ + GGᵀ, only R makes it symmetric by itself
    yield Law("R' = (F + ½ GGᵀΣ⁻¹) R", gap(GG, transpose(GG)), 1e-7)
    GG = np.where(np.isfinite(GG), GG + transpose(GG), 0) / 2
    yield Law("GGᵀ is nowhere negative", worst(-relative(np.linalg.eigvalsh(GG)[..., 0], GG)), 1e-7)
    for _ in range(20):  # in ever shorter steps a kink of the coefficients fades, a jump of R or Ψ does not
        large = np.argsort(left)[-512:]
        large = large[left[large] > 1e-8]
        if not len(large) or np.isnan(left).any():
            break
        s, middle, t = s[large], (s[large] + t[large]) / 2, t[large]
        s, t = np.append(s, middle), np.append(middle, t)
        left, _ = _increments(sde, s, t)
    name = f"R_t = Ψ(t,s) R_s + ∫ ½ Ψ GGᵀR⁻ᵀ dτ, worst at t = {t[np.argmax(left)]:.6g}"
    yield Law(name, worst(left), 1e-8)


def _increments(sde: AbstractLinearSDE, s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`R_t − Ψ(t,s) R_s − ∫_s^t ½ Ψ(t,τ) GGᵀR⁻ᵀ dτ` relative to R_t, `(n,)`, and `2 (R' − F R) Rᵀ` at the nodes between."""
    x, w = np.polynomial.legendre.leggauss(12)
    low, width = np.sqrt(s), np.sqrt(t) - np.sqrt(s)  # R may grow as √t
    y = low + width * (1 + x[:, None]) / 2
    tau, late = (y**2).reshape(-1), np.tile(t, len(x))
    whole, psi = on_host(sde.transition, t, s), on_host(sde.transition, late, tau)
    R, half = (
        ranked(v, psi) for v in (on_host(sde.noise_factor, tau), AbstractLinearSDE.velocity_factors(sde, tau)[1])
    )
    gained = psi @ half * (w[:, None] * y * width).reshape(-1, *(1,) * (psi.ndim - 1))
    R_s, R_t = (ranked(on_host(sde.noise_factor, at), whole) for at in (s, t))
    left = R_t - whole @ R_s - gained.reshape(len(x), len(t), *gained.shape[1:]).sum(0)
    return relative(np.linalg.norm(left, axis=(-2, -1)), R_t).reshape(len(t), -1).max(1), 2 * half @ transpose(R)


def member_laws(sde: AbstractLinearSDE) -> Iterator[Law]:
    """Each derived member is what the base class makes of Ψ, R and the basis, also where a process has its own."""
    rng, dims, base = np.random.default_rng(2), positions(sde) or (4, 4), AbstractLinearSDE
    times = sde.horizon * rng.uniform(size=16)
    for name in ("covariance", "prior_covariance", "cholesky_factor", "drift", "diffusion_squared", "velocity_factors"):
        both = (getattr(sde, name), partial(getattr(base, name), sde))
        own, derived = (jax.tree.leaves([fn(t) for t in times]) for fn in both)
        gaps = [gap(np.asarray(a)[None], np.asarray(b)[None]) for a, b in zip(own, derived, strict=True)]
        yield Law(f"{name} is that of Ψ and R", worst(gaps), 1e-7)
    with jax.enable_x64(True):
        x, u, eps = (jnp.asarray(rng.normal(size=(*dims, *rest))) for rest in ((3,), (sde.k, 3), (sde.k, 3)))
        far = lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()) if a.shape == b.shape else np.inf
        there_and_back = far(sde.to_pixels(sde.from_pixels(u)), u), far(sde.from_pixels(sde.to_pixels(u)), u)
        yield Law("to_pixels and from_pixels are inverse to each other", worst(*there_and_back), 1e-5)
        ways = far(sde.lift(x), base.lift(sde, x)), far(sde.project(u), base.project(sde, u))
        error = worst(*ways, far(sde.project(sde.lift(x)), x))
        yield Law("lift puts data into field 0, project takes them out of it", error, 1e-5)
        gaps = [far(sde.perturb(u, t, eps), base.perturb(sde, u, t, eps)) for t in times]
        yield Law("perturb is Ψ(t,0) u_0 + R ε", worst(gaps), 1e-5)
        gaps = [far(sde.score(eps, t), base.score(sde, eps, t)) for t in times]
        yield Law("score is −R⁻ᵀ ε", worst(gaps), 1e-5)
    yield Law("sample_prior is N(0, Σ_T + ψψᵀ), in standard errors", _prior(sde, dims), 8)


def _prior(sde: AbstractLinearSDE, dims: tuple[int, ...]) -> float:
    """How many standard errors the moments of two draws of the prior are, once whitened, from those of white noise."""
    positions = int(np.prod(dims))
    n = int(np.clip(2**20 // positions, 2**10, 2**13))
    draws = [np.asarray(sde.sample_prior(jax.random.key(i), (*dims, sde.k, n)), np.float64) for i in range(2)]
    T = np.full(1, sde.horizon)
    psi = on_host(sde.transition, T, 0 * T)[0, ..., :1]
    noise, signal = aligned(on_host(sde.noise_factor, T)[0], psi @ transpose(psi))
    white = np.linalg.solve(np.linalg.cholesky(noise @ transpose(noise) + signal), np.stack(draws))
    rows = white.reshape(2, positions, sde.k, n // 2, 2)[:, :: -(-positions // 16)]  # of 16 positions
    rows = np.moveaxis(rows, -1, 0).reshape(-1, n // 2)  # even and odd channels apart
    fields = np.moveaxis(white, -2, 0).reshape(sde.k, -1)
    moments = [np.abs(z @ z.T / len(z[0]) - np.eye(len(z))) * np.sqrt(len(z[0]) / 2) for z in (rows, fields)]
    return worst(*(m.max() for m in moments), np.abs((white**4).mean() - 3) * np.sqrt(white.size / 96))
