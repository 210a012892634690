"""Does a process keep the laws that the samplers rely on? `python -m gddim.check [module:object …]`.

Laws of Ψ and R are measured at random times in (0, horizon], up to thousands of them: what is narrower than 1/1000 of the
horizon may pass unseen. What follows from Ψ and R alone cannot be checked: another Σ_0 or GGᵀ than was meant, as long as
it is that of some process, and a constant rotation, R Q in the place of R.
"""

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gddim.errors import UserError, printable
from gddim.parallel import check_backend
from gddim.samplers import GDDIM, sample
from gddim.sde import (
    CLD,
    PSLD,
    VE,
    VP,
    AbstractLinearSDE,
    Blurring,
    CriticallyDamped,
    FlowMatching,
    GaussianPath,
    LinearSDE,
    SubVP,
)
from gddim.sde.host import on_host
from gddim.sde.linalg import aligned, inverse, product, transpose


class Law(NamedTuple):
    """A law, the error that was measured, and the largest that passes (a slope is the other way round)."""

    name: str
    error: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return bool(self.error >= self.limit if self.at_least else self.error <= self.limit)


def shipped() -> dict[str, AbstractLinearSDE]:
    """Every process of the package, and CLD as a user would write it down."""
    A = np.array([[0.0, 4.0], [-1.0, -4.0]])
    langevin = LinearSDE(lambda t: 4 * A, lambda t: np.diag([0.0, 8.0]), np.diag([1e-6, 0.01 + 1e-6]))
    noisy_start = GaussianPath(lambda t: jnp.exp(-t), lambda t: jnp.sqrt(0.01 - jnp.expm1(-2 * t)), horizon=5.0)
    return {
        "VP": VP(),
        "VP.cosine": VP.cosine(),
        "VP.from_betas": VP.from_betas([0.999]),
        "SubVP": SubVP(),
        "VE": VE(),
        "FlowMatching": FlowMatching(),
        "GaussianPath, noise on the data": noisy_start,
        "CLD": CLD(),
        "PSLD": PSLD(),
        "CriticallyDamped(3)": CriticallyDamped(3),
        "Blurring(8)": Blurring(8),
        "LinearSDE(CLD's F, GGᵀ, Σ_0)": langevin,
    }


def laws(sde: AbstractLinearSDE, t_min: float = 1e-3) -> Iterator[Law]:
    """Measure every law on the process, in float64, at times from `t_min` to the horizon.

    Raises `UserError` for a `t_min` outside (0, horizon).
    """
    T = _end(sde)
    if not 0 < t_min < T:
        raise UserError(f"t_min={t_min} must lie in (0, {T}), within the horizon of this {type(sde).__name__}")
    yield from _dense_laws(sde)
    yield from _member_laws(sde)

    ts = np.geomspace(t_min, T, 12)
    psi = lambda t, s: on_host(sde.transition, t, s)
    R = _ranked(on_host(sde.noise_factor, ts), psi(ts, ts))
    sigma = R @ transpose(R)
    grid = ts[::-1]
    for lam in (0.3, 1.0):
        table = GDDIM(1, lam, interpolate="data").coefficients(sde, grid)
        kept = table.psi @ sigma[::-1][:-1] @ transpose(table.psi) + table.noise @ transpose(table.noise)
        yield Law(f"Ψ̂ Σ Ψ̂ᵀ + P = Σ, λ = {lam}", _gap(kept, sigma[::-1][1:]), 1e-9)
    posterior = sigma[:-1] @ transpose(psi(ts[1:], ts[:-1])) @ np.linalg.inv(sigma[1:])
    yield Law("λ = 1 is the posterior of u_s given u_t and the data (DDPM)", _gap(table.psi[::-1], posterior), 1e-8)
    ddim = GDDIM(1).coefficients(sde, grid)
    expected = R[::-1][1:] - psi(grid[1:], grid[:-1]) @ R[::-1][:-1]
    yield Law("order 1, λ = 0 is R_s − Ψ(s,t) R_t (DDIM)", _gap(ddim.weights[:, 0], expected), 1e-10)
    for interpolate in ("eps", "data"):
        still, moved = (GDDIM(3, lam, interpolate=interpolate).coefficients(sde, grid) for lam in (0.0, 1e-7))
        yield Law(f"λ → 0 is λ = 0, {interpolate}", _gap(moved.weights, still.weights), 1e-6)

    yield Law("one step is exact, one data point", *_one_step(sde, t_min, velocity=0.0))
    yield Law("one step is exact, Gaussian data of covariance Σ_0", *_one_step(sde, t_min, velocity=0.5))
    single = np.geomspace(1e-5, T, 50).astype(np.float32)
    for name, fn, limit in (("R", sde.noise_factor, 5e-6), ("Ψ(t,0)", lambda t: sde.transition(t, 0.0 * t), 2e-5)):
        device = np.asarray(jax.jit(jax.vmap(lambda t, fn=fn: jnp.asarray(fn(t))))(single), np.float64)
        yield Law(f"{name} in float32 on this machine", _gap(device, on_host(fn, single.astype(np.float64))), limit)


def convergence(sde: AbstractLinearSDE, orders: tuple[int, ...] = (1, 2, 3)) -> Iterator[Law]:
    """Measure the orders of convergence on a Gaussian mixture with its exact ε, which short enough steps show."""
    for order in orders:
        for interpolate in ("eps", "data")[: 1 + (order > 1)]:
            found, steps = -np.inf, 96
            while found < order - 0.4 and steps <= 384:
                found, steps = max(found, slope(sde, GDDIM(order, interpolate=interpolate), steps)), 2 * steps
            yield Law(f"order of convergence {order}, {interpolate}: slope", found, order - 0.4, at_least=True)


def _ranked(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Axes between the times and the matrices as needed to broadcast against `like`, or as they are."""
    missing = like.ndim - values.ndim
    return values.reshape(values.shape[:1] + (1,) * missing + values.shape[1:]) if missing > 0 else values


def _worst(*errors: Any) -> float:
    """The largest of errors; not a number if one is none."""
    return float(np.max([np.max(error) for error in errors]))


def _relative(error: np.ndarray, *of: np.ndarray) -> np.ndarray:
    """Errors relative to the largest norm of the matrices, where that is not 0."""
    size = reduce(np.maximum, (np.linalg.norm(matrices, axis=(-2, -1)) for matrices in of))
    return error / np.where(size > 0, size, 1)


def _gap(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance of matrices, relative to the larger of their norms."""
    a, b = _ranked(a, b), _ranked(b, a)
    return _worst(_relative(np.linalg.norm(a - b, axis=(-2, -1)), a, b))


def _edges(sde: AbstractLinearSDE) -> np.ndarray:
    """Increasing times from 0 to the horizon: random ones everywhere, and ever closer ones at both ends."""
    n = int(np.clip(2**17 // max(1, np.prod(_dims(sde))), 128, 1024))
    within = (np.arange(1, n) + np.random.default_rng(0).uniform(-0.4, 0.4, n - 1)) / n
    return _end(sde) * np.sort([0, *np.geomspace(1e-9, 1 / n, 96), *within, *1 - np.geomspace(1e-6, 1 / n, 32), 1])


def _dense_laws(sde: AbstractLinearSDE) -> Iterator[Law]:
    """The laws of Ψ and R alone, wherever they can break; the last names the time where it is worst."""
    edges = _edges(sde)
    r, s, t = np.sort(np.random.default_rng(1).choice(edges, (3, len(edges))), axis=0)
    psi = lambda t, s: on_host(sde.transition, t, s)
    gaps = _gap(psi(t, s) @ psi(s, r), psi(t, r)), _gap(psi(edges, edges), np.eye(sde.k)[None])
    yield Law("semigroup Ψ(t,r) = Ψ(t,s) Ψ(s,r), Ψ(t,t) = I", _worst(*gaps), 1e-10)
    s, t = edges[:-1], edges[1:]
    left, GG = _increments(sde, s, t)
    # (R' − F R) Rᵀ = ½ GGᵀ: any factor of Σ gives Σ' = FΣ + ΣFᵀ + GGᵀ, only R makes it symmetric by itself
    yield Law("R' = (F + ½ GGᵀΣ⁻¹) R", _gap(GG, transpose(GG)), 1e-7)
    GG = np.where(np.isfinite(GG), GG + transpose(GG), 0) / 2
    yield Law("GGᵀ is nowhere negative", _worst(-_relative(np.linalg.eigvalsh(GG)[..., 0], GG)), 1e-7)
    for _ in range(20):  # in ever shorter steps a kink of the coefficients fades, a jump of R or Ψ does not
        worst = np.argsort(left)[-512:]
        worst = worst[left[worst] > 1e-8]
        if not len(worst) or np.isnan(left).any():
            break
        s, middle, t = s[worst], (s[worst] + t[worst]) / 2, t[worst]
        s, t = np.append(s, middle), np.append(middle, t)
        left, _ = _increments(sde, s, t)
    name = f"R_t = Ψ(t,s) R_s + ∫ ½ Ψ GGᵀR⁻ᵀ dτ, worst at t = {t[np.argmax(left)]:.6g}"
    yield Law(name, _worst(left), 1e-8)


def _increments(sde: AbstractLinearSDE, s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`R_t − Ψ(t,s) R_s − ∫_s^t ½ Ψ(t,τ) GGᵀR⁻ᵀ dτ` relative to R_t, `(n,)`, and `2 (R' − F R) Rᵀ` at the nodes between."""
    x, w = np.polynomial.legendre.leggauss(12)
    low, width = np.sqrt(s), np.sqrt(t) - np.sqrt(s)  # R may grow as √t
    y = low + width * (1 + x[:, None]) / 2
    tau, late = (y**2).reshape(-1), np.tile(t, len(x))
    whole, psi = on_host(sde.transition, t, s), on_host(sde.transition, late, tau)
    R, half = (
        _ranked(v, psi) for v in (on_host(sde.noise_factor, tau), AbstractLinearSDE.velocity_factors(sde, tau)[1])
    )
    gained = psi @ half * (w[:, None] * y * width).reshape(-1, *(1,) * (psi.ndim - 1))
    R_s, R_t = (_ranked(on_host(sde.noise_factor, at), whole) for at in (s, t))
    left = R_t - whole @ R_s - gained.reshape(len(x), len(t), *gained.shape[1:]).sum(0)
    return _relative(np.linalg.norm(left, axis=(-2, -1)), R_t).reshape(len(t), -1).max(1), 2 * half @ transpose(R)


def _member_laws(sde: AbstractLinearSDE) -> Iterator[Law]:
    """Each derived member is what the base class makes of Ψ, R and the basis, also where a process has its own."""
    rng, dims, base = np.random.default_rng(2), _dims(sde) or (4, 4), AbstractLinearSDE
    times = sde.horizon * rng.uniform(size=16)
    for name in ("covariance", "prior_covariance", "cholesky_factor", "drift", "diffusion_squared", "velocity_factors"):
        both = (getattr(sde, name), partial(getattr(base, name), sde))
        own, derived = (jax.tree.leaves([fn(t) for t in times]) for fn in both)
        gaps = [_gap(np.asarray(a)[None], np.asarray(b)[None]) for a, b in zip(own, derived, strict=True)]
        yield Law(f"{name} is that of Ψ and R", _worst(gaps), 1e-7)
    with jax.enable_x64(True):
        x, u, eps = (jnp.asarray(rng.normal(size=(*dims, *rest))) for rest in ((3,), (sde.k, 3), (sde.k, 3)))
        far = lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()) if a.shape == b.shape else np.inf
        there_and_back = far(sde.to_pixels(sde.from_pixels(u)), u), far(sde.from_pixels(sde.to_pixels(u)), u)
        yield Law("to_pixels and from_pixels are inverse to each other", _worst(*there_and_back), 1e-5)
        ways = far(sde.lift(x), base.lift(sde, x)), far(sde.project(u), base.project(sde, u))
        error = _worst(*ways, far(sde.project(sde.lift(x)), x))
        yield Law("lift puts data into field 0, project takes them out of it", error, 1e-5)
        gaps = [far(sde.perturb(u, t, eps), base.perturb(sde, u, t, eps)) for t in times]
        yield Law("perturb is Ψ(t,0) u_0 + R ε", _worst(gaps), 1e-5)
        gaps = [far(sde.score(eps, t), base.score(sde, eps, t)) for t in times]
        yield Law("score is −R⁻ᵀ ε", _worst(gaps), 1e-5)
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
    return _worst(*(m.max() for m in moments), np.abs((white**4).mean() - 3) * np.sqrt(white.size / 96))


def _end(sde: AbstractLinearSDE) -> float:
    """The horizon, or where `Ψ(T, 0) = 0` a time just before it: there ε says nothing of the data, and Ψ has no inverse."""
    return sde.horizon if np.any(sde.transition(sde.horizon, 0.0)) else 0.99 * sde.horizon


def _dims(sde: AbstractLinearSDE) -> tuple[int, ...]:
    return np.shape(sde.transition(sde.horizon, 0.0))[:-2]


def _one_step(sde: AbstractLinearSDE, t_min: float, velocity: float) -> tuple[float, float]:
    """Relative error of one gDDIM step from T to t_min for the exact ε, in float64, and the limit for it.

    That is 1e-9, or the rounding of the terms of the step, 10⁷ times their sum where a process also blurs.
    """
    rng = np.random.default_rng(0)
    u0 = np.zeros((*_dims(sde), sde.k, 2))
    u0[..., 0, :] = rng.normal(size=u0[..., 0, :].shape)
    u0[..., 1:, :] = velocity * rng.normal(size=u0[..., 1:, :].shape)
    eps, T = rng.normal(size=u0.shape), _end(sde)
    at = lambda t: product(sde.transition(t, 0.0), u0) + product(sde.noise_factor(t), eps)
    table = GDDIM(1).coefficients(sde, [T, t_min])
    got = product(table.psi[0], np.asarray(at(T))) + product(table.weights[0, 0], eps)
    terms = product(np.abs(table.psi[0]), np.abs(at(T))) + product(np.abs(table.weights[0, 0]), np.abs(eps))
    size = np.abs(at(t_min)).max()
    return float(np.abs(got - at(t_min)).max() / size), max(1e-9, float(np.finfo(float).eps * terms.max() / size))


def mixture_eps(sde: AbstractLinearSDE, centres: np.ndarray, std: float) -> Callable[..., Any]:
    """The exact ε of data from an equal mixture of `N(centre, std²)`, centres `(m, *dims, C)` in the process's basis."""

    def eps_fn(u: Any, t: Any) -> Any:
        R, psi = jnp.asarray(sde.noise_factor(t)), jnp.asarray(sde.transition(t, 0.0))[..., :, :1]
        noise, signal = aligned(product(R, transpose(R)), std**2 * product(psi, transpose(psi)))
        precision = inverse(noise + signal)
        gaps = u[None] - product(psi, jnp.asarray(centres)[..., None, :])
        pulls = product(precision, gaps)
        responsibility = jax.nn.softmax(-0.5 * (gaps * pulls).sum(tuple(range(1, gaps.ndim))))
        pull = sum(share * pull for share, pull in zip(responsibility, pulls, strict=True))
        return product(transpose(R), pull)

    return eps_fn


def slope(sde: AbstractLinearSDE, sampler: GDDIM, steps: int = 96, std: float = 0.25, t_min: float = 1e-2) -> float:
    """The order of convergence between `steps` and twice as many, on a Gaussian mixture with its exact ε, in float64."""
    run, exact = _reference(sde, steps, std, t_min)
    with jax.enable_x64(True):
        coarse, fine = (float(jnp.sqrt(jnp.mean((run(sampler, n) - exact) ** 2))) for n in (steps, 2 * steps))
    return float(np.log2(coarse / fine))


@lru_cache(maxsize=1)
def _reference(sde: AbstractLinearSDE, steps: int, std: float, t_min: float) -> tuple[Callable[..., Any], jax.Array]:
    """A function of sampler and steps that carries 24 states to `t_min`, which compiles once for all, and their true ends."""
    dims = _dims(sde)
    signs = np.random.default_rng(1).choice([-1.0, 1.0], (4, *dims, 2))
    eps_fn = mixture_eps(sde, 0.8 * signs / np.sqrt(max(1, np.prod(dims))), std)
    with jax.enable_x64(True):
        us = jnp.stack([sde.sample_prior(jax.random.key(i), (*dims, sde.k, 2)) for i in range(24)]).astype(float)

    def run(sampler: GDDIM, n: int) -> Any:
        # a power-2 grid whose steps are small at the start, too: the first have no history, and are of order 1 and 2
        x, y = np.linspace(1, 0, n + 1), np.sqrt(t_min)
        grid = (y + (np.sqrt(_end(sde)) - y) * (x + x**2 - x**3)) ** 2
        with jax.enable_x64(True):
            return jax.vmap(lambda u: sample(sampler, sde, eps_fn, u, grid))(us)

    return run, run(GDDIM(4, corrector=True), 8 * steps)


def load(name: str) -> AbstractLinearSDE:
    """The process called `module:object`; a function without arguments is called. Raises `UserError` for another thing."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise UserError(f"{name!r} must be module:object, e.g. gddim:CLD or my_package.my_module:my_sde")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{name}: {error}") from error
    if callable(found):
        try:
            inspect.signature(found).bind()
        except (TypeError, ValueError) as error:
            raise UserError(f"{name} cannot be called without arguments: {error}; name a process itself") from error
        found = found()
    if not isinstance(found, AbstractLinearSDE):
        raise UserError(f"{name} is a {type(found).__name__}, not a gddim.AbstractLinearSDE")
    return found


def main(arguments: list[str] | None = None) -> int:
    printable()
    parser = argparse.ArgumentParser(prog="python -m gddim.check", description=__doc__)
    parser.add_argument(
        "process", nargs="*", help="module:object of a process; without any, every process of the package"
    )
    parser.add_argument("--t-min", type=float, default=1e-3, help="smallest time at which laws are measured (1e-3)")
    options = parser.parse_args(arguments)
    failed = 0
    try:
        check_backend()
        processes = {name: load(name) for name in options.process} or shipped()
        for name, sde in processes.items():
            print(name)
            for law in (*laws(sde, options.t_min), *convergence(sde)):
                failed += not law.holds
                verdict, relation = "ok  " if law.holds else "FAIL", "≥" if law.at_least else "≤"
                print(f"  {verdict} {law.error:10.2e} {relation} {law.limit:.1e}  {law.name}")
    except ValueError as error:
        print(f"gddim.check: {error}", file=sys.stderr)
        return 2
    print(f"{failed} laws fail" if failed else "every law holds")
    print("What follows from Ψ and R cannot be checked: that Σ_0 and GGᵀ are the ones meant, a constant rotation R Q")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
