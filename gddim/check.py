"""Does a process keep the laws that the samplers rely on? `python -m gddim.check [module:object …]`.

What follows from Ψ and R alone cannot be checked: another Σ_0 or GGᵀ than was meant, a constant rotation R Q.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gddim.errors import UserError, printable
from gddim.laws import Law, gap, member_laws, process_laws, ranked
from gddim.parallel import check_backend
from gddim.samplers import GDDIM, AbstractSampler, sample
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
from gddim.sde.base import last_time, positions
from gddim.sde.host import on_host
from gddim.sde.linalg import aligned, inverse, namespace, product, transpose
from gddim.sde.words import ACCEPTED, parse_process


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
    T = last_time(sde)
    if not 0 < t_min < T:
        raise UserError(f"t_min={t_min} must lie in (0, {T}), within the horizon of this {type(sde).__name__}")
    yield from process_laws(sde)
    yield from member_laws(sde)

    ts = np.geomspace(t_min, T, 12)
    psi = lambda t, s: on_host(sde.transition, t, s)
    R = ranked(on_host(sde.noise_factor, ts), psi(ts, ts))
    sigma = R @ transpose(R)
    grid = ts[::-1]
    for lam in (0.3, 1.0):
        table = GDDIM(1, lam, interpolate="data").coefficients(sde, grid)
        kept = table.psi @ sigma[::-1][:-1] @ transpose(table.psi) + table.noise @ transpose(table.noise)
        yield Law(f"Ψ̂ Σ Ψ̂ᵀ + P = Σ, λ = {lam}", gap(kept, sigma[::-1][1:]), 1e-9)
    posterior = sigma[:-1] @ transpose(psi(ts[1:], ts[:-1])) @ np.linalg.inv(sigma[1:])
    yield Law("λ = 1 is the posterior of u_s given u_t and the data (DDPM)", gap(table.psi[::-1], posterior), 1e-8)
    ddim = GDDIM(1).coefficients(sde, grid)
    expected = R[::-1][1:] - psi(grid[1:], grid[:-1]) @ R[::-1][:-1]
    yield Law("order 1, λ = 0 is R_s − Ψ(s,t) R_t (DDIM)", gap(ddim.weights[:, 0], expected), 1e-10)
    for interpolate in ("eps", "data"):
        still, moved = (GDDIM(3, lam, interpolate=interpolate).coefficients(sde, grid) for lam in (0.0, 1e-7))
        yield Law(f"λ → 0 is λ = 0, {interpolate}", gap(moved.weights, still.weights), 1e-6)

    yield Law("one step is exact, one data point", *_one_step(sde, t_min, velocity=0.0))
    yield Law("one step is exact, Gaussian data of covariance Σ_0", *_one_step(sde, t_min, velocity=0.5))
    single = np.geomspace(1e-5, T, 50).astype(np.float32)
    for name, fn, limit in (
        ("R", sde.noise_factor, 5e-6),
        ("Ψ(t,0)", lambda t: sde.transition(t, namespace(t).zeros_like(t)), 2e-5),
    ):
        device = np.asarray(jax.jit(jax.vmap(lambda t, fn=fn: jnp.asarray(fn(t))))(single), np.float64)
        yield Law(f"{name} in float32 on this machine", gap(device, on_host(fn, single.astype(np.float64))), limit)


def convergence(sde: AbstractLinearSDE, orders: tuple[int, ...] = (1, 2, 3)) -> Iterator[Law]:
    """Measure the orders of convergence on a Gaussian mixture with its exact ε, which short enough steps show."""
    t_min = min(1e-2, sde.horizon / 100)
    for order in orders:
        for interpolate in ("eps", "data")[: 1 + (order > 1)]:
            found, steps = -np.inf, 96
            while found < order - 0.4 and steps <= 384:
                found = max(found, slope(sde, GDDIM(order, interpolate=interpolate), steps, t_min=t_min))
                steps *= 2
            yield Law(f"order of convergence {order}, {interpolate}: slope", found, order - 0.4, at_least=True)


def _one_step(sde: AbstractLinearSDE, t_min: float, velocity: float) -> tuple[float, float]:
    """Relative error of one gDDIM step from T to t_min for the exact ε, in float64, and the limit for it.

    That is 1e-9, or the rounding of the terms of the step, 10⁷ times their sum where a process also blurs.
    """
    rng = np.random.default_rng(0)
    u0 = np.zeros((*positions(sde), sde.k, 2))
    u0[..., 0, :] = rng.normal(size=u0[..., 0, :].shape)
    u0[..., 1:, :] = velocity * rng.normal(size=u0[..., 1:, :].shape)
    eps, T = rng.normal(size=u0.shape), last_time(sde)
    psi = lambda t: on_host(sde.transition, np.asarray(t), np.asarray(0.0))  # in float64, also of jax.numpy's
    at = lambda t: product(psi(t), u0) + product(on_host(sde.noise_factor, np.asarray(t)), eps)
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


def slope(
    sde: AbstractLinearSDE, sampler: AbstractSampler, steps: int = 96, std: float = 0.25, t_min: float = 1e-2
) -> float:
    """The order of convergence between `steps` and twice as many, on a Gaussian mixture with its exact ε, in float64."""
    run, exact = _reference(sde, steps, std, t_min)
    with jax.enable_x64(True):
        coarse, fine = (float(jnp.sqrt(jnp.mean((run(sampler, n) - exact) ** 2))) for n in (steps, 2 * steps))
    return float(np.log2(coarse / fine))


@lru_cache(maxsize=2)
def _reference(sde: AbstractLinearSDE, steps: int, std: float, t_min: float) -> tuple[Callable[..., Any], jax.Array]:
    """A function of sampler and steps that carries 24 states to `t_min`, which compiles once for all, and their true ends."""
    dims = positions(sde)
    signs = np.random.default_rng(1).choice([-1.0, 1.0], (4, *dims, 2))
    eps_fn = mixture_eps(sde, 0.8 * signs / np.sqrt(max(1, np.prod(dims))), std)
    with jax.enable_x64(True):
        us = jnp.stack([sde.sample_prior(jax.random.key(i), (*dims, sde.k, 2)) for i in range(24)]).astype(float)

    def run(sampler: AbstractSampler, n: int) -> Any:
        # a power-2 grid whose steps are small at the start, too: the first have no history, and are of order 1 and 2
        x, y = np.linspace(1, 0, n + 1), np.sqrt(t_min)
        grid = (y + (np.sqrt(last_time(sde)) - y) * (x + x**2 - x**3)) ** 2
        with jax.enable_x64(True):
            return jax.vmap(lambda u: sample(sampler, sde, eps_fn, u, grid))(us)

    return run, run(GDDIM(4, corrector=True), 8 * steps)


def main(arguments: list[str] | None = None) -> int:
    printable()
    parser = argparse.ArgumentParser(prog="python -m gddim.check", description=__doc__)
    parser.add_argument("process", nargs="*", help=f"{ACCEPTED}; without any, every process of the package")
    parser.add_argument("--t-min", type=float, default=1e-3, help="smallest time at which laws are measured (1e-3)")
    options = parser.parse_args(arguments)
    failed = 0
    try:
        check_backend()
        processes = {name: parse_process(name) for name in options.process} or shipped()
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
