"""Every entry of the tables against their defining integrals, solved as differential equations by scipy's DOP853."""

import numpy as np
import pytest
from scipy.integrate import solve_ivp

import gddim
from experiments.processes import phase_space_langevin

POWER = gddim.power_grid(1.0, 1e-3, 6)
GIVEN = np.array([1.0, 0.72, 0.7, 0.31, 0.05, 0.049, 2e-3])
CLD = gddim.CLD()
A = np.array([[0.0, 4.0], [-1.0, -4.0]])
SAMPLERS = [
    gddim.GDDIM(4), gddim.GDDIM(3, 0.7), gddim.GDDIM(2, 1.5, corrector=True), gddim.GDDIM(2, corrector=True),
    gddim.GDDIM(3, interpolate="data"), gddim.GDDIM(4, 0.3, interpolate="data"), gddim.GDDIM(1, 1.0),
    gddim.GDDIM(2, 1.5, interpolate="data", corrector=True), gddim.CholeskyMultistep(3),
]  # fmt: skip


def cld_coefficients(t):
    return 4 * A, np.diag([0.0, 8.0])


def vp_coefficients(t):
    beta = 0.1 + 19.9 * t
    return np.array([[-beta / 2]]), np.array([[beta]])


def rates(sde, t):
    """F and GGᵀ by the formulas of the papers where there are any."""
    if isinstance(sde, gddim.VP):
        return vp_coefficients(t)
    if isinstance(sde, gddim.CLD):
        return cld_coefficients(t)
    return sde.drift(t), sde.diffusion_squared(t)


def basis(nodes, t):
    """The Lagrange basis at t."""
    return [np.prod([(t - b) / (a - b) for b in nodes if b != a]) for a in nodes]


def reference(sde, sampler, ts, i, corrector):
    """The transition, the weights and P of step i by their definitions, as equations in falling τ without an inverse.

    With the pull `½(1+λ²)GGᵀΣ⁻¹` and F̂ = F + pull: `Ψ̂' = F̂ Ψ̂`, `Ψ' = F Ψ`, `P' = F̂P + PF̂ᵀ − λ²GGᵀ`; a weight on ε is
    `W' = F W + ℓ_j pull Ψ̂ R_t`, on the data `W' = F̂ W − ℓ_j pull Ψ`, on L's ε `W' = F W + ½ ℓ_j GGᵀL⁻ᵀ`.
    """
    k, t, s = sde.k, ts[i], ts[i + 1]
    lam = getattr(sampler, "lam", 0.0)
    data = getattr(sampler, "interpolate", "eps") == "data"
    nodes = [s] * corrector + [t, *ts[max(0, i - sampler.order + 1) : i][::-1]]
    R_t = sde.noise_factor(t)

    def slope(tau, y):
        hat, psi, P, *weights = y.reshape(-1, k, k)
        F, GG = rates(sde, tau)
        sigma = sde.covariance(tau)
        pull = (1 + lam**2) / 2 * GG @ np.linalg.inv(sigma)
        own, source = (F + pull, -pull @ psi) if data else (F, pull @ hat @ R_t)
        if isinstance(sampler, gddim.CholeskyMultistep):
            source = GG / 2 @ np.linalg.inv(np.linalg.cholesky(sigma)).T
        moved = [own @ w + value * source for w, value in zip(weights, basis(nodes, tau), strict=True)]
        spread = (F + pull) @ P + P @ (F + pull).T - lam**2 * GG
        return np.stack([(F + pull) @ hat, F @ psi, spread, *moved]).reshape(-1)

    start = np.concatenate([np.eye(k)[None], np.eye(k)[None], np.zeros((1 + len(nodes), k, k))]).reshape(-1)
    solved = solve_ivp(slope, (t, s), start, "DOP853", rtol=1e-13, atol=1e-16)
    hat, psi, P, *weights = solved.y[:, -1].reshape(-1, k, k)
    if data:  # the history is m_j = Ψ(t_j, 0) D_j
        weights = [w @ sde.transition(t, node) for w, node in zip(weights, nodes, strict=True)]
    return hat if data else psi, weights, P


def off(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("grid", [pytest.param(POWER, marks=pytest.mark.slow), GIVEN], ids=["power", "given"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize(
    "sde", [gddim.VP(), CLD, pytest.param(phase_space_langevin(), marks=pytest.mark.slow)], ids=["VP", "CLD", "PSLD"]
)
def test_every_entry_of_a_table_is_its_integral(sde, sampler, grid):
    table = sampler.coefficients(sde, grid)
    for i in range(len(grid) - 1):
        psi, weights, P = reference(sde, sampler, grid, i, corrector=False)
        assert off(table.psi[i], psi) < 1e-9
        for found, expected in zip(table.weights[i], weights, strict=False):
            assert off(found, expected) < 1e-9
        assert not np.any(table.weights[i, len(weights) :])
        if getattr(sampler, "lam", 0.0):
            assert off(table.noise[i] @ table.noise[i].T, P) < 1e-9
        else:
            assert not np.any(table.noise[i])
    if table.corrector is not None and not (sampler.lam and sampler.interpolate == "eps"):
        for i in range(len(grid) - 1):
            _, weights, _ = reference(sde, sampler, grid, i, corrector=True)
            for found, expected in zip(table.corrector[i], weights, strict=False):
                assert off(found, expected) < 1e-9


@pytest.mark.parametrize("steps", [1, 50, pytest.param(200, marks=pytest.mark.slow)])
def test_cld_and_its_own_coefficients_solved_numerically_have_the_same_tables(steps):
    general = gddim.LinearSDE(lambda t: 4 * A, lambda t: np.diag([0.0, 8.0]), np.diag([1e-6, 0.01 + 1e-6]))
    # the ε corrector at λ > 0 carries ε_s back to t, by e^{20} over the one step from T to t_min: ill-posed there
    posed = [s for s in SAMPLERS if steps > 1 or not (getattr(s, "lam", 0) and s.corrector and s.interpolate == "eps")]
    for sampler in posed:
        theirs, ours = (sampler.coefficients(sde, gddim.power_grid(1.0, 1e-3, steps)) for sde in (general, CLD))
        for name in ("psi", "weights", "corrector", "noise"):
            if (expected := getattr(ours, name)) is not None:
                gap = np.linalg.norm(getattr(theirs, name) - expected, axis=(-2, -1))
                assert np.all(gap <= 1e-8 * np.linalg.norm(expected, axis=(-2, -1))), (sampler, name)
