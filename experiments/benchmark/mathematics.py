"""What a sampler costs beside the network: its coefficients on the host, its matrices and its loop on the device."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from experiments import cld_celeba64, cld_digits
from experiments.benchmark.reference_coefficients import published_blurring, published_cld
from experiments.benchmark.table import Row, Target, interleaved, on_cpu, one_core
from experiments.benchmark.training import Steps, resized
from gddim.samplers import GDDIM, Method, TableSolver, power_grid
from gddim.samplers.fit import Family
from gddim.samplers.grids import Band
from gddim.samplers.words import parse_sampler
from gddim.sde import CLD, AbstractLinearSDE, Blurring, LinearSDE

SAMPLERS = (
    "gddim:3", "gddim:3:lam=0.5", "gddim:3:data", "gddim:3:data:free@band", "gddim:3:residual@band",
    "ipndm:3", "unipc:2", "dpm:2",
)  # fmt: skip
Weights = Float[np.ndarray, "n q *matrix"]


def linear_cld() -> LinearSDE:
    """CLD by its F, GGᵀ and Σ_0 alone."""
    sde = CLD()
    F = sde.beta0 * np.array([[0.0, sde.m_inv], [-1.0, -2 * np.sqrt(sde.m_inv)]])
    GG = sde.beta0 * np.diag([0.0, 4 / np.sqrt(sde.m_inv)])
    return LinearSDE(lambda t: F, lambda t: GG, np.diag([sde.epsilon, sde.gamma / sde.m_inv + sde.epsilon]))


def linear_blurring() -> LinearSDE:
    """Blurring likewise, without its basis, which no coefficient sees."""
    sde = Blurring()
    return LinearSDE(sde.drift, sde.diffusion_squared, sde.covariance(0.0)[None, None])


def cold(make: Callable[..., Weights], *arguments: Any) -> tuple[Weights, float]:
    """What a new process on one core makes, and its seconds of processor time, import apart.

    That is the time it takes on an idle core, and does not count what else a busy one does.
    """
    with one_core(), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_timed, (make, *arguments))


def _timed(make: Callable[..., Weights], *arguments: Any) -> tuple[Weights, float]:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    start = time.process_time()
    return make(*arguments), time.process_time() - start


def ours(make: Callable[[], AbstractLinearSDE], ts: Float[np.ndarray, " n"]) -> Weights:
    """The weights of GDDIM(3)."""
    return GDDIM(3).coefficients(make(), ts).weights


def coefficients(steps: int = 50, published_steps: int = 1_000_000, points: int = 10_000) -> Iterator[Row]:
    """Tables of GDDIM(3), cold, and as the published code computes them; each against another way to the same numbers."""
    ts = power_grid(1.0, 1e-3, steps)
    closed, general, blurring, solved = (cold(ours, make, ts) for make in (CLD, linear_cld, Blurring, linear_blurring))
    cld = cold(published_cld, CLD(), ts, 3, published_steps, points)
    blurred = cold(published_blurring, Blurring(), ts, 3, points)
    how, error = "as published", "relative"
    for name, found, reference, theirs, bound, accuracy in (
        ("CLD", closed, general[0], cld, 0.5, 1e-9),
        ("LinearSDE of CLD", general, closed[0], cld, 3.0, 1e-8),
        ("Blurring(32)", blurring, solved[0], blurred, 2.0, 1e-9),
    ):
        title = f"GDDIM(3) on {name}, N={steps}"
        yield Row(f"{title}, cold on a core", found[1], "s", how, theirs[1], Target("value", "≤", bound))
        wrong = [relative_error(weights, reference) for weights, _ in (found, theirs)]
        yield Row(f"{title}, error", wrong[0], error, how, wrong[1], Target("value", "≤", accuracy))


def relative_error(weights: Weights, reference: Weights) -> float:
    """The largest over steps and nodes, of matrices by their Frobenius norms."""
    norm, gap = (np.sqrt((x**2).sum((-2, -1))) for x in (reference, weights - reference))
    return float((gap[norm > 0] / norm[norm > 0]).max())


def noise_factor(batch: int = 64, calls: int = 50) -> Iterator[Row]:
    """R of a batch of times on the device, as a share of a small U-Net's training step of that batch."""
    steps = Steps(resized(cld_digits.EXPERIMENT, batch))
    t = jnp.linspace(1e-5, 1.0, batch)
    for name, sde in (("CLD", CLD()), ("LinearSDE of CLD", linear_cld())):
        R = jax.jit(jax.vmap(sde.noise_factor))
        many, whole = interleaved(lambda R=R: [R(t) for _ in range(calls)], steps, repeats=10)
        title = f"noise factor of {name}, {batch} times"
        yield Row(title, 1e3 * many / calls, "ms", "digits U-Net step", 1e3 * whole, Target("ratio", "≤", 0.02))


def sampler(nfe: int = 50, batch: int = 64, repeats: int = 8, width: int = 48) -> Iterator[Row]:
    """A sampler, vmapped and jitted, over a compiled loop of as many network calls; networks of 10 ms and more."""
    experiment = cld_digits.EXPERIMENT if on_cpu() else cld_celeba64.EXPERIMENT
    changes: dict[str, Any] = {"width": width} if on_cpu() else {"dtype": "bfloat16"}
    model, sde = resized(experiment, **changes).build(jax.random.key(0)), CLD()
    u = jax.random.normal(jax.random.key(1), (batch, *experiment.state_shape))
    keys = jax.random.split(jax.random.key(2), batch)

    @eqx.filter_jit
    def calls_alone(model, u, times):  # each on what the one before said, so that none is left out
        return jax.lax.scan(lambda u, t: (jax.vmap(model, (0, None))(u, t), None), u, times)[0]

    @eqx.filter_jit
    def whole(model, u, keys, solver):
        return jax.vmap(lambda u, key: solver(model, u, key).state)(u, keys)

    few = min(nfe, 10)  # a learned table weighs all that came before
    learned = Family(GDDIM(3, interpolate="data", corrector="free"), sde, 1.0, 1e-3, Band.of(0.5, 0.06, 6.0))
    tables = {word: Method(parse_sampler(word), nfe).solver(sde) for word in SAMPLERS}
    tables["a learned table"] = TableSolver.of(learned.table(power_grid(1.0, 1e-3, few)), sde)
    for name, solver in tables.items():
        calls = few if name not in SAMPLERS else nfe
        times = jnp.linspace(1.0, 1e-3, calls)
        bare = partial(calls_alone, model, u, times)
        all_in, alone = interleaved(partial(whole, model, u, keys, solver), bare, repeats=repeats)
        title = f"sample by {name}, NFE {calls}, batch {batch}"
        baseline = f"{calls} network calls of {1e3 * alone / calls:.3g} ms"
        yield Row(title, all_in, "s", baseline, alone, Target("ratio", "≤", 1.01))
