"""Laws of the residual and of the free corrector: exactness on Gaussian data, limits, orders, and tables by quadrature."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import gddim
from experiments.processes import blurred_langevin
from gddim import GDDIM
from gddim.check import mixture_eps, slope
from gddim.errors import UserError
from gddim.samplers.adams import angle
from gddim.samplers.grids import BAND, noise_level
from gddim.samplers.quadrature import history_nodes
from gddim.samplers.residual import Residual
from gddim.samplers.words import parse_sampler, sampler_name
from gddim.sde.linalg import aligned, inverse, product
from tests.test_tables import basis, off, rates

VP, CLD = gddim.VP(), gddim.CLD()
name = lambda sde: type(sde).__name__
SLOW = pytest.mark.slow
PROCESSES = [VP, CLD, gddim.PSLD(), gddim.CriticallyDamped(3), gddim.VE(20.0), gddim.Blurring(4), blurred_langevin(4)]


def gaussian_eps(sde, std):
    """The exact ε of data N(0, std²): `RᵀS⁻¹u`."""

    def eps_fn(u, t):
        R, psi = jnp.asarray(sde.noise_factor(t)), jnp.asarray(sde.transition(t, 0.0))[..., :1]
        noise, signal = aligned(product(R, R.swapaxes(-1, -2)), product(psi, psi.swapaxes(-1, -2)))
        S = noise + std**2 * signal
        return product(R.swapaxes(-1, -2), product(inverse(S), u))

    return eps_fn


def last(sde):
    return 0.98 if name(sde) == "Blurring" else sde.horizon


@cache
def gaussian_flow(sde, std, late, early):
    """What the flow of data N(0, std²) is from late to early, a matrix of u for each position, by scipy."""
    psi = np.asarray(sde.transition(late, late))

    def slope(t, M):
        psi, sigma = sde.transition(t, 0.0)[..., :1], sde.covariance(t)
        F, half = sde.velocity_factors(t)
        to_score = half @ np.swapaxes(sde.noise_factor(t), -1, -2)
        return ((F + to_score @ np.linalg.inv(sigma + std**2 * psi @ psi.swapaxes(-1, -2))) @ M.reshape(shape)).ravel()

    shape = np.broadcast_shapes(psi.shape, np.shape(sde.covariance(late)))
    one = np.broadcast_to(np.eye(sde.k), shape).ravel()
    return solve_ivp(slope, (late, early), one, "DOP853", rtol=1e-11, atol=1e-13).y[:, -1].reshape(shape)


@pytest.mark.parametrize("sde", PROCESSES, ids=name)
@pytest.mark.parametrize(("order", "corrector"), [(1, False), (3, "free"), (2, True)])
def test_one_step_is_exact_for_gaussian_data_on_colour_images(sde, order, corrector):
    sampler, T = GDDIM(order, corrector=corrector, interpolate="residual", data_std=0.7), last(sde)
    exact = gaussian_flow(sde, 0.7, T, 1e-2 * T)
    with jax.enable_x64(True):
        u = jax.random.normal(jax.random.key(0), (4, 4, sde.k, 3), float)
        exact = product(exact, u)
        for steps in (1, 4):
            found = gddim.sample(sampler, sde, gaussian_eps(sde, 0.7), u, gddim.power_grid(T, 1e-2 * T, steps))
            np.testing.assert_allclose(found, exact, rtol=1e-7, atol=1e-8 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize("lam", [0.0, 0.6])
@pytest.mark.parametrize("sde", PROCESSES, ids=name)
def test_gaussian_data_stay_gaussian_in_law(sde, lam):
    """`Ψ̂ S Ψ̂ᵀ + P = S`, whatever λ and the step."""
    T = last(sde)
    ts, std = np.array([T, 0.6 * T, 0.01 * T]), 0.3
    table = GDDIM(1, lam, interpolate="residual", data_std=std).coefficients(sde, ts)
    S = []
    for t in ts:
        psi, sigma = sde.transition(t, 0.0)[..., :1], sde.covariance(t)
        S.append(sigma + std**2 * psi @ psi.swapaxes(-1, -2))
    for i in range(2):
        kept = table.psi[i] @ S[i] @ table.psi[i].swapaxes(-1, -2) + table.noise[i] @ table.noise[i].swapaxes(-1, -2)
        np.testing.assert_allclose(kept, S[i + 1], rtol=1e-9, atol=1e-10 * np.abs(S[i + 1]).max())


@pytest.mark.parametrize("sde", [VP, CLD, pytest.param(gddim.PSLD(), marks=SLOW)], ids=name)
@pytest.mark.parametrize(("std", "lam"), [(0.5, 0.0), (0.05, 0.7), (5.0, 1.3)])
def test_every_entry_of_a_table_is_its_integral(sde, std, lam):
    """By their definitions, as equations in falling τ: `Ψ̂' = F̂Ψ̂`, `P' = F̂P + PF̂ᵀ − λ²GGᵀ`, `W' = F̂W − ½(1+λ²)GGᵀΣ⁻¹ψ c ℓ_j`."""
    ts, k = np.array([1.0, 0.72, 0.5, 0.31, 0.05, 2e-3]), sde.k
    table = GDDIM(3, lam, corrector=True, interpolate="residual", data_std=std).coefficients(sde, ts)
    lo, hi = (x * std for x in BAND)

    def at(tau):
        (F, GG), sigma, psi = rates(sde, tau), sde.covariance(tau), sde.transition(tau, 0.0)[:, :1]
        r = (psi.T @ np.linalg.solve(sigma, psi))[0, 0] ** -0.5
        S = sigma + std**2 * psi @ psi.T
        pull = (1 + lam**2) / 2 * GG @ np.linalg.solve(sigma, psi)[:, 0] / np.sqrt(std**-2 + r**-2)
        return F + (1 + lam**2) / 2 * GG @ np.linalg.inv(S), GG, pull, np.log((r + lo) / (r + hi))

    phi = np.array([at(t)[-1] for t in ts])
    for i in range(len(ts) - 1):
        nodes = phi[i::-1][: table.orders[i]]  # those too close in Φ are left out

        def slope(tau, y, nodes=nodes, s=phi[i + 1]):
            F, GG, pull, here = at(tau)
            (hat, P), weights = y[: 2 * k * k].reshape(2, k, k), y[2 * k * k :].reshape(-1, k)
            values = [*basis(nodes, here), *basis([s, *nodes], here)]
            moved = [F @ w - value * pull for w, value in zip(weights, values, strict=True)]
            return np.concatenate([(F @ hat).ravel(), (F @ P + P @ F.T - lam**2 * GG).ravel(), *moved])

        start = np.concatenate([np.eye(k).ravel(), np.zeros(k * k + (2 * len(nodes) + 1) * k)])
        y = solve_ivp(slope, (ts[i], ts[i + 1]), start, "DOP853", rtol=1e-12, atol=1e-15).y[:, -1]
        assert off(table.psi[i], y[: k * k].reshape(k, k)) < 1e-9
        if lam:
            assert off(table.noise[i] @ table.noise[i].T, y[k * k : 2 * k * k].reshape(k, k)) < 1e-9
        found = [*table.weights[i, : len(nodes)], *table.corrector[i, : len(nodes) + 1]]
        for w, expected in zip(found, y[2 * k * k :].reshape(-1, k), strict=True):
            assert off(w[:, 0], expected) < 1e-9
            assert not np.any(w[:, 1:])


@pytest.mark.parametrize("sde", [VP, pytest.param(CLD, marks=SLOW)], ids=name)
@pytest.mark.parametrize(("lam", "data_std"), [(0.0, 0.3), (0.7, 0.3), (0.0, 2.0)])
def test_with_the_free_corrector_data_are_interpolated_in_the_angle_of_the_noise(sde, lam, data_std):
    """As above, `W' = F̂W − ½(1+λ²)GGᵀΣ⁻¹Ψ(τ,t_j) ℓ_j(arctan r/reach)`, of 4 steps."""
    reach = 2.5 * min(data_std, (0.5 * data_std) ** 0.5) if sde.k == 1 else 2.1 * data_std
    ts, k = np.array([1.0, 0.72, 0.5, 0.31, 0.05]), sde.k
    table = GDDIM(3, lam, corrector="free", interpolate="data", data_std=data_std).both(sde, ts)

    def angle(tau):
        psi = sde.transition(tau, 0.0)[:, :1]
        return np.arctan((psi.T @ np.linalg.solve(sde.covariance(tau), psi))[0, 0] ** -0.5 / reach)

    for i in range(len(ts) - 1):
        times = ts[i::-1][: table.orders[i]]
        nodes = [angle(t) for t in times]

        def slope(tau, y, times=times, nodes=nodes, s=ts[i + 1]):
            (F, GG), sigma = rates(sde, tau), sde.covariance(tau)
            pull = (1 + lam**2) / 2 * GG @ np.linalg.inv(sigma)
            values = [*basis(nodes, angle(tau)), *basis([angle(s), *nodes], angle(tau))]
            pairs = zip(y.reshape(-1, k, k), [*times, s, *times], values, strict=True)
            return np.concatenate(
                [((F + pull) @ W - value * pull @ sde.transition(tau, t)).ravel() for W, t, value in pairs]
            )

        start = np.zeros((2 * len(nodes) + 1) * k * k)
        y = solve_ivp(slope, (ts[i], ts[i + 1]), start, "DOP853", rtol=1e-12, atol=1e-14).y[:, -1].reshape(-1, k, k)
        found = [*table.weights[i, : len(nodes)], *table.corrector[i, : len(nodes) + 1]]
        for w, expected in zip(found, y, strict=True):
            assert off(w, expected) < 1e-9


@pytest.mark.parametrize(
    ("sde", "steps", "data_std", "reach"),
    [(VP, 4, 0.3, 0.75), (VP, 4, 2.0, 2.5), (VP, 5, 2.0, 5.0), (CLD, 8, 2.0, 4.2), (CLD, 9, 2.0, 5.0)],
)
def test_polynomials_of_few_steps_reach_less_far(sde, steps, data_std, reach):
    t = np.array([0.2, 0.7])
    np.testing.assert_allclose(angle(sde, data_std, steps)(t), np.arctan(noise_level(sde, t) / reach), rtol=1e-12)


@pytest.mark.parametrize("sde", [VP, CLD], ids=name)
@pytest.mark.parametrize(("order", "lam"), [(1, 0.0), (1, 0.5), (3, 0.0)])
def test_as_the_data_shrink_to_a_point_it_is_data(sde, order, lam):
    """Order 1 by the samplers; above, where their polynomials differ, by the kernel."""
    eps_fn, key = mixture_eps(sde, np.array([[-0.8, 0.8], [0.8, 0.8]]), 0.3), jax.random.key(1)
    with jax.enable_x64(True):
        u = sde.sample_prior(jax.random.key(0), (sde.k, 2)).astype(float)
        small, data = (GDDIM(1, lam, interpolate=i, data_std=1e-6) for i in ("residual", "data"))
        ends = [gddim.sample(s, sde, eps_fn, u, [1.0, 0.5, 0.1], key) for s in (small, data)]
        np.testing.assert_allclose(*ends, atol=1e-5)
    if order > 1:
        ts = gddim.power_grid(1.0, 1e-3, 5)
        steps = Residual(sde, ts, 0.0, 1e-6)
        steps.clock = lambda t: t  # the polynomials of "data"
        nodes = history_nodes(ts, order)
        scaled = steps.weights(nodes)[..., 0] / 1e-6  # of D, as c → s
        table = GDDIM(order, interpolate="data").coefficients(sde, ts)
        psi = sde.transition(np.where(np.isnan(nodes), 0.0, nodes), 0.0)[..., 0]
        np.testing.assert_allclose(scaled, np.einsum("nqij,nqj->nqi", table.weights, psi), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", [1, 3])
def test_as_the_data_spread_without_bound_it_is_eps_where_there_is_one_field(order):
    eps_fn = mixture_eps(VP, np.array([[-0.8, 0.8], [0.8, 0.8]]), 0.3)
    ts = gddim.power_grid(1.0, 1e-3, 5)
    steps = Residual(VP, ts, 0.0, 1e6)
    steps.clock = lambda t: t
    # c → r, N → −ε, so that its weights are those of −ε
    expected = GDDIM(order).coefficients(VP, ts).weights[..., 0]
    np.testing.assert_allclose(steps.weights(history_nodes(ts, order))[..., 0], -expected, rtol=1e-4, atol=1e-7)
    if order == 1:
        with jax.enable_x64(True):
            u = jnp.ones((1, 2))
            ends = [gddim.sample(GDDIM(1, interpolate=i, data_std=1e6), VP, eps_fn, u, ts) for i in ("residual", "eps")]
            np.testing.assert_allclose(*ends, atol=1e-5)


@pytest.mark.parametrize("data_std", [300.0, 1e8])
def test_data_that_spread_widely_need_no_more_panels(data_std):
    """S is nearly of rank one then: across ψ it must stay exact."""
    ts = gddim.power_grid(1.0, 1e-3, 10)
    panels = [len(Residual(CLD, ts, 0.0, s).panels.tau) for s in (0.5, data_std)]
    assert panels[1] <= panels[0]


@pytest.mark.parametrize("data_std", [1e7, 1e10])
def test_as_the_data_spread_without_bound_its_noise_is_that_of_no_drift_but_the_process(data_std):
    """`P = ∫ Ψ(s,τ)² g² dτ = Ψ(s,t)² Σ_t − Σ_s`, which for VP is `α_s/α_t − 1`."""
    ts = gddim.power_grid(1.0, 1e-3, 5)
    noise = GDDIM(1, 1.0, interpolate="residual", data_std=data_std).coefficients(VP, ts).noise[..., 0, 0]
    log_alpha = 2 * np.log(VP.transition(ts, 0.0)[..., 0, 0])
    np.testing.assert_allclose(noise, np.sqrt(np.expm1(np.diff(log_alpha))), rtol=1e-7)


def test_a_spectrum_of_a_process_without_frequencies_is_refused_by_name():
    with pytest.raises(ValueError, match=r"data_std: given a spectrum \(4, 4\); this VP takes a number"):
        GDDIM(2, interpolate="residual", data_std=np.ones((4, 4))).coefficients(VP, [1.0, 0.5, 0.1])


def test_a_spectrum_is_a_standard_deviation_of_each_frequency():
    sde, ts = gddim.Blurring(4), np.array([0.98, 0.5, 0.1])
    spectrum = np.linspace(2.0, 0.1, 16).reshape(4, 4)
    table = GDDIM(1, interpolate="residual", data_std=spectrum).coefficients(sde, ts)
    for i, j in ((0, 0), (1, 2), (3, 3)):
        one = GDDIM(1, interpolate="residual", data_std=spectrum[i, j]).coefficients(sde, ts)
        np.testing.assert_allclose(table.psi[:, i, j], one.psi[:, i, j], rtol=1e-9)
        np.testing.assert_allclose(table.weights[:, :, i, j], one.weights[:, :, i, j], rtol=1e-9)


ORDERS = [
    (sde, GDDIM(q, interpolate=interpolate), 384 if (q, interpolate) == (3, "residual") else 96)
    for sde in (VP, CLD) for interpolate in ("data", "residual") for q in (1, 2, 3)
]  # fmt: skip
FAST = {(name(VP), GDDIM(2, interpolate=interpolate)) for interpolate in ("data", "residual")}


@pytest.mark.parametrize(
    ("sde", "sampler", "steps"),
    [pytest.param(*case, marks=[] if (name(case[0]), case[1]) in FAST else SLOW) for case in ORDERS],
)
def test_the_free_corrector_raises_the_order_by_almost_one(sde, sampler, steps):
    plain = slope(sde, sampler, steps)
    assert plain >= sampler.order - 0.3
    assert slope(sde, dataclasses.replace(sampler, corrector="free"), steps) >= min(plain, sampler.order) + 0.7


@pytest.mark.parametrize("interpolate", ["data", "residual"])
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_the_free_corrector_is_that_of_two_calls_with_one_taken_for_both(interpolate, lam):
    """State by state: predict, call, correct with that record, predict on from the corrected state; the same ξ in both."""
    ts, rng = gddim.power_grid(1.0, 1e-3, 6), np.random.default_rng(0)
    sampler = GDDIM(2, lam, corrector="free", interpolate=interpolate)
    both, free = sampler.both(CLD, ts), sampler.coefficients(CLD, ts)
    eps_fn = lambda u, t: np.tanh(u) * (1 + t)
    start, noise = rng.normal(size=(2, 3)), rng.normal(size=(6, 2, 3))
    base = u = start
    found, history = start, []
    free_history = []
    for i in range(6):
        record = both.record_u[i] @ u + both.record_eps[i] @ eps_fn(u, ts[i])
        history.insert(0, record)
        if i:
            u = both.psi[i - 1] @ base + both.noise[i - 1] @ noise[i - 1]
            u = u + sum(w @ h for w, h in zip(both.corrector[i - 1], history, strict=False))
        base = u
        u = (
            both.psi[i] @ base
            + both.noise[i] @ noise[i]
            + sum(w @ h for w, h in zip(both.weights[i], history, strict=False))
        )
        free_history.insert(0, free.record_u[i] @ found + free.record_eps[i] @ eps_fn(found, ts[i]))
        found = free.psi[i] @ found + free.noise[i] @ noise[i]
        found = found + sum(w @ h for w, h in zip(free.weights[i], free_history, strict=False))
        np.testing.assert_allclose(found, u, rtol=1e-9, atol=1e-9)
    assert sampler.nfe(6) == 6


@pytest.mark.parametrize("sde", [VP, pytest.param(CLD, marks=SLOW), pytest.param(gddim.PSLD(), marks=SLOW)], ids=name)
def test_on_a_band_grid_both_have_less_than_half_the_error_of_data_on_power_2(sde):
    eps_fn = mixture_eps(sde, np.array([[-0.6, 0.6], [0.6, 0.6], [0.5, -0.4]]), 0.1)
    with jax.enable_x64(True):
        us = jax.vmap(lambda key: sde.sample_prior(key, (sde.k, 2)).astype(float))(
            jax.random.split(jax.random.key(0), 64)
        )
        draw = lambda s, grid: jax.vmap(lambda u: sde.project(gddim.sample(s, sde, eps_fn, u, grid)))(us)
        exact = draw(GDDIM(4, corrector=True), gddim.power_grid(1.0, 1e-3, 200))
        error = lambda s, grid: float(jnp.median(jnp.linalg.norm(draw(s, grid) - exact, axis=-1)))
        band = gddim.band_grid(sde, 1.0, 1e-3, 10)
        today = error(GDDIM(3, interpolate="data"), gddim.power_grid(1.0, 1e-3, 10))
        for sampler in (GDDIM(3, interpolate="data", corrector="free"), GDDIM(3, interpolate="residual")):
            assert error(sampler, band) < today / 2


def test_words_and_float32():
    assert parse_sampler("gddim:3:residual:free") == GDDIM(3, interpolate="residual", corrector="free")
    for sampler in (
        GDDIM(2, 0.3, interpolate="residual", data_std=0.25),
        GDDIM(3, interpolate="data", corrector="free"),
    ):
        assert parse_sampler(sampler_name(sampler)) == sampler
    with pytest.raises(UserError, match="diverges"):
        parse_sampler("gddim:3:free")
    eps_fn = lambda: mixture_eps(CLD, np.array([[-0.8, 0.8], [0.8, 0.8]]), 0.3)
    grid = gddim.band_grid(CLD, 1.0, 1e-3, 8)
    sampler, u = GDDIM(3, interpolate="residual", corrector="free"), jnp.ones((2, 2), jnp.float32)
    single = gddim.sample(sampler, CLD, eps_fn(), u, grid)
    with jax.enable_x64(True):
        double = gddim.sample(sampler, CLD, eps_fn(), u.astype(float), grid)
    np.testing.assert_allclose(single, double, atol=2e-3)


def test_a_grid_may_end_at_0_and_eps_is_refused():
    table = GDDIM(2, interpolate="residual", corrector=True).coefficients(VP, [1.0, 0.3, 0.0])
    np.testing.assert_array_equal(table.corrected, [True, False])
    for wrong, says in (
        (dict(corrector="free"), "diverges"),
        (dict(data_std=0.0), "data_std"),
    ):
        with pytest.raises(ValueError, match=says):
            GDDIM(2, **wrong)
