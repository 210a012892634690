"""The solvers of others: equal to their own code on VP, and of their order for every process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from gddim import GDDIM, IPNDM, AnalyticStart, DPMSolver, Method, UniPC
from gddim.check import slope
from gddim.errors import UserError
from gddim.samplers.method import check_methods
from gddim.samplers.words import parse_sampler, sampler_name
from gddim.sde.linalg import product

VP = gddim.VP()
GRIDS = [gddim.power_grid(1.0, 1e-3, 9, 3.0), gddim.band_grid(VP, 1.0, 1e-3, 7)]
SAMPLERS = [
    *(IPNDM(q) for q in (1, 2, 3, 4)), *(DPMSolver(q) for q in (1, 2, 3)),
    *(UniPC(q, variant) for q in (1, 2, 3) for variant in ("bh1", "bh2")),
]  # fmt: skip


def eps_fn(u, t):
    return VP.noise_factor(t)[0, 0] * u + 0.1 * np.tanh(3 * u)


def by_table(sampler, ts, u):
    table, history = sampler.coefficients(VP, ts), []
    for i, t in enumerate(ts[:-1]):
        history.insert(0, table.record_u[i] @ u + table.record_eps[i] @ eps_fn(u, t))
        u = table.psi[i] @ u + sum(w @ h for w, h in zip(table.weights[i], history, strict=False))
    return u


def amplitudes(ts):
    return VP.transition(ts, 0.0)[:, 0, 0], VP.noise_factor(ts)[:, 0, 0]


def by_paper(sampler, ts, u):
    """States, predictions and corrections one after another, as the papers have them, for scalar α and σ."""
    (alpha, sigma), outputs, last = amplitudes(ts), [], None
    snr = np.log(alpha / sigma)

    def step(start, i, order, output=None):
        """From t_i on, with the new output if it is a correction."""
        h, q = snr[i + 1] - snr[i], min(order, i + 1)
        others = [(snr[i - j] - snr[i], outputs[i - j]) for j in range(1, q)]
        others += [] if output is None else [(h, output)]
        x, gaps = np.array([x / h for x, _ in others]), [m - outputs[i] for _, m in others]
        exact = [1 - np.exp(-h), np.exp(-h) - 1 + h, (h**2 - 2 * h + 2 - 2 * np.exp(-h)) / h]
        exact.append((h**3 - 3 * h**2 + 6 * h - 6 + 6 * np.exp(-h)) / h**2)
        moments = np.array([e / h ** (n > 0) for n, e in enumerate(exact)])[1 : len(x) + 1]
        if len(x) == 1:
            moments[0] = (h if getattr(sampler, "variant", "") == "bh1" else 1 - np.exp(-h)) / 2
        if isinstance(sampler, DPMSolver):
            moments[1:] /= 2
        rho = np.linalg.solve(np.vander(x, increasing=True).T * x, moments) if len(x) else []
        change = sum((r * g for r, g in zip(rho, gaps, strict=True)), start=(1 - np.exp(-h)) * outputs[i])
        return sigma[i + 1] / sigma[i] * start + alpha[i + 1] * change

    for i, t in enumerate(ts[:-1]):
        output = (u - sigma[i] * eps_fn(u, t)) / alpha[i]
        if isinstance(sampler, UniPC) and i:
            u = step(last, i - 1, sampler.order, output)
        outputs.append(output)
        last, u = u, step(u, i, sampler.order)
    return u


@pytest.mark.parametrize("ts", GRIDS, ids=["power", "band"])
@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if not isinstance(s, IPNDM)], ids=repr)
def test_a_table_is_what_the_papers_do_step_by_step(sampler, ts):
    u = np.random.default_rng(0).normal(size=(1, 64))
    expected = by_paper(sampler, ts, u)
    assert np.abs(by_table(sampler, ts, u) - expected).max() <= 1e-10 * np.abs(expected).max()


def of_diffusers(sampler, diffusers):
    """Their scheduler, which is given our amplitudes and is not to lower its order at the end."""
    if isinstance(sampler, IPNDM):
        return diffusers.IPNDMScheduler()
    if isinstance(sampler, UniPC):
        order, kind = sampler.order, sampler.variant
        return diffusers.UniPCMultistepScheduler(solver_order=order, solver_type=kind, lower_order_final=False)
    return diffusers.DPMSolverMultistepScheduler(
        solver_order=sampler.order, lower_order_final=False, final_sigmas_type="sigma_min"
    )


@pytest.mark.parametrize("ts", GRIDS, ids=["power", "band"])
@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if not isinstance(s, IPNDM) or s.order == 4], ids=repr)
def test_samples_are_those_of_the_schedulers_of_diffusers(sampler, ts):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    scheduler, (alpha, sigma) = of_diffusers(sampler, diffusers), amplitudes(ts)
    scheduler.set_timesteps(len(ts) - 1)
    scheduler._step_index = 0
    if isinstance(sampler, IPNDM):  # takes v, and has no order but 4
        scheduler.alphas, scheduler.betas = torch.from_numpy(alpha), torch.from_numpy(sigma)
    else:
        scheduler.sigmas = torch.from_numpy(sigma / alpha)
    u = np.random.default_rng(0).normal(size=(1, 64))
    theirs = torch.from_numpy(u.copy())
    for i, number in enumerate(scheduler.timesteps):
        out = eps_fn(theirs.numpy(), ts[i])
        if isinstance(sampler, IPNDM):
            out = (out - sigma[i] * theirs.numpy()) / alpha[i]
        theirs = scheduler.step(torch.from_numpy(out), number, theirs).prev_sample
    np.testing.assert_allclose(by_table(sampler, ts, u), theirs.numpy(), rtol=1e-6, atol=1e-6)


def test_ipndm_is_ddim_with_the_weights_of_adams_and_bashforth():
    for sde in (gddim.CLD(), gddim.Blurring(4)):
        ts = gddim.power_grid(1.0, 1e-3, 6)
        ddim, table = (s.coefficients(sde, ts).weights for s in (gddim.GDDIM(1), IPNDM(4)))
        for i, constants in enumerate(
            ([1], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], np.array([55, -59, 37, -9]) / 24)
        ):
            for j, a in enumerate(constants):
                np.testing.assert_allclose(table[i, j], a * ddim[i, 0], rtol=1e-9)


# 3M and iPNDM from order 3 on are of order 2: the one halves a moment, the other takes unequal steps for equal ones
ORDERS = [(IPNDM(1), 1), (IPNDM(3), 2), (DPMSolver(2), 2), (DPMSolver(3), 2), (UniPC(1), 2), (UniPC(2, "bh1"), 3),
          (UniPC(2), 3), (UniPC(3), 4)]  # fmt: skip


@pytest.mark.parametrize("sde", [VP, gddim.CLD()], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize(
    ("sampler", "order"),
    [pytest.param(*case, marks=[] if case[0] == UniPC(2) else pytest.mark.slow) for case in ORDERS],
)
def test_each_is_of_its_order_for_any_process(sde, sampler, order):
    assert slope(sde, sampler, 48 if isinstance(sampler, DPMSolver) else 96) >= order - 0.4


@pytest.mark.parametrize("sde", [VP, gddim.CLD(), gddim.PSLD(), gddim.VE(20.0)], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("sampler", [IPNDM(3), DPMSolver(3), UniPC(3, "bh1")], ids=repr)
def test_one_data_point_is_reached_exactly_in_any_steps_on_colour_images(sde, sampler):
    x0 = np.random.default_rng(0).uniform(-1, 1, (4, 4, 3))
    denoise = gddim.through(sde, lambda y, sigma: jnp.asarray(x0, y.dtype) + 0 * y)
    with jax.enable_x64(True):
        u = sde.sample_prior(jax.random.key(0), (4, 4, sde.k, 3)).astype(float)
        grid = gddim.power_grid(sde.horizon, 1e-3 * sde.horizon, 5)
        end = gddim.sample(sampler, sde, denoise, u, grid)
        expected = gddim.sample(gddim.GDDIM(1), sde, denoise, u, grid)
        np.testing.assert_allclose(end, expected, rtol=1e-6, atol=1e-8)


def test_all_share_the_compiled_loop_of_gddim():
    traces = []

    def eps_fn(u, t):
        traces.append(t)
        return 0.1 * u

    for sampler in (*SAMPLERS, gddim.GDDIM(3, interpolate="data")):
        gddim.sample(sampler, gddim.CLD(), eps_fn, jnp.ones((2, 3)), gddim.power_grid(1.0, 1e-3, 6))
        assert sampler.nfe(6) == 6
    assert len(traces) == 1


@pytest.mark.parametrize("sde", [VP, gddim.CLD(), gddim.Blurring(4)], ids=lambda sde: type(sde).__name__)
def test_an_analytic_start_is_the_step_of_gaussian_data_and_then_the_sampler(sde):
    eps_fn, ts = lambda u, t: jnp.tanh(u), gddim.power_grid(0.98, 1e-3, 5)
    with jax.enable_x64(True):
        u = jax.random.normal(jax.random.key(0), (4, 4, sde.k, 3), float)
        moved = product(GDDIM(1, interpolate="residual", data_std=0.3).coefficients(sde, ts[:2]).psi[0], u)
        for sampler in (GDDIM(3, interpolate="data"), IPNDM(2)):
            expected = gddim.sample(sampler, sde, eps_fn, moved, ts[1:])
            np.testing.assert_allclose(
                gddim.sample(AnalyticStart(sampler, 0.3), sde, eps_fn, u, ts), expected, atol=1e-10
            )
    method = Method(AnalyticStart(IPNDM()), nfe=5)
    assert len(method.grid(VP)) == 7
    check_methods([method], VP)
    assert method.solver(VP)(eps_fn, jnp.ones((1, 2))).calls == 5


def test_words():
    for sampler in (*SAMPLERS, AnalyticStart(UniPC(3)), AnalyticStart(GDDIM(2, 0.5, interpolate="data"))):
        assert parse_sampler(sampler_name(sampler)) == sampler
    assert sampler_name(UniPC(3, "bh1")) == "unipc:3:bh1"
    assert sampler_name(DPMSolver()) == "dpm:2"
    for word in ("ipndm:5", "unipc:data", "dpm:2:bh1", "afs", "afs:rk45", "afs:x"):
        with pytest.raises(UserError, match=r"accepted|must be"):
            parse_sampler(word)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: IPNDM(5), "order=5"),
        (lambda: DPMSolver(0), "order=0"),
        (lambda: AnalyticStart(IPNDM()).coefficients(VP, [1.0, 0.5]), "one step"),
        (lambda: AnalyticStart(gddim.SSCS()).coefficients(gddim.CLD(), [1.0, 0.5, 0.2]), "SSCS"),
        (lambda: UniPC().coefficients(gddim.Blurring(4), [0.9, 0.5]), "Blurring has a noise level per frequency"),
        (lambda: DPMSolver().coefficients(VP, [1.0, 0.0]), "noise level"),
        (lambda: DPMSolver().coefficients(gddim.FlowMatching(), [1.0, 0.5]), "nothing is left of the data"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()
