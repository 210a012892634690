"""Laws of solvers: one interface for every sampler, a table whose every number can be learned, and paths."""

import dataclasses

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from gddim import GDDIM, Method
from gddim.check import mixture_eps
from gddim.errors import UserError
from gddim.samplers import AbstractSampler, Coefficients, TableSolver
from gddim.samplers.method import check_methods
from gddim.samplers.numbered import sample_numbered
from gddim.samplers.solver import sharing
from gddim.samplers.words import Grid, OnGrid
from gddim.sde.linalg import product

CLD = gddim.CLD()
SAMPLERS = [
    GDDIM(3, interpolate="data"), GDDIM(2, 0.5, corrector=True), gddim.CholeskyMultistep(2), gddim.EulerMaruyama(1.0),
    gddim.Heun(), gddim.SSCS(), gddim.RK45(1e-3, 1e-3),
]  # fmt: skip


def eps_fn(u, t):
    return jnp.tanh(u) * (1 + t.astype(u.dtype))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_every_sampler_makes_a_solver_of_a_budget_and_counts_its_calls(sampler):
    method, u = Method(sampler, nfe=11, last="data"), jnp.ones((2, 3))
    key = jax.random.key(0)
    found = method.solver(CLD)(eps_fn, u, key)
    np.testing.assert_array_equal(
        found.state, gddim.sample(sampler, CLD, eps_fn, u, method.grid(CLD), key, method.last)
    )
    if method.budget is None:
        assert found.calls > 11
    else:
        steps = len(method.grid(CLD)) - 1
        assert (
            found.calls
            == gddim.count_calls(sampler, steps, "data")
            <= 11
            < gddim.count_calls(sampler, steps + 1, "data")
        )


@pytest.mark.parametrize("sampler", SAMPLERS[:-1], ids=repr)
def test_budgets_that_share_a_program_change_no_bit_and_count_only_calls_made(sampler):
    traced, u, key = [], jnp.ones((2, 3)), jax.random.key(0)

    def counted(u, t):
        traced.append(t)
        return eps_fn(u, t)

    alone, together = ([], [])
    for nfe in (5, 8, 64):
        solver = Method(sampler, nfe, last="data").solver(CLD)
        alone.append(solver(eps_fn, u, key))
        before = len(traced)
        together.append(sharing(solver)(counted, u, key))
    chex.assert_trees_all_equal(together, alone)
    assert len(traced) == before > 0, "64 calls compile nothing that 5 have not"
    assert sharing(Method(sampler, 66).solver(CLD)).nfe > 64, "more than 64 calls have a program of their own"


LEARNED = [
    (GDDIM(2, 0.5, corrector=True, interpolate="data"), "data"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in ((GDDIM(3), "none"), (gddim.Heun(), "euler"), (gddim.SSCS(), "none"))
    ),
]


@pytest.mark.parametrize(("sampler", "last"), LEARNED, ids=str)
def test_a_sample_is_differentiable_in_every_number_of_a_table(sampler, last):
    """Times, weights, noise and all, against central differences along a random direction."""
    mixture = mixture_eps(CLD, np.array([[-0.8, 0.8], [0.8, 0.8]]), 0.3)
    table = sampler.coefficients(CLD, gddim.power_grid(1.0, 1e-3, 4))
    numbers, rest = eqx.partition(table, lambda x: x.dtype.kind == "f")
    with jax.enable_x64(True):
        u, key = CLD.sample_prior(jax.random.key(0), (2, 2)).astype(float), jax.random.key(1)

        def square(numbers):
            solver = TableSolver.of(eqx.combine(numbers, rest), CLD, last)
            return jnp.mean(solver(mixture, u, key).state ** 2)

        numbers, program = jax.tree.map(jnp.asarray, numbers), jax.jit(square)
        gradient = jax.tree.leaves(jax.jit(jax.grad(square))(numbers))
        leaves, structure = jax.tree.flatten(numbers)
        for i, (value, slope) in enumerate(zip(leaves, gradient, strict=True)):
            scale = np.where(value == 0, 0.1, np.abs(value))
            direction = 1e-7 * scale * np.random.default_rng(i).normal(size=value.shape)
            moved = (
                jax.tree.unflatten(structure, [*leaves[:i], value + s * direction, *leaves[i + 1 :]]) for s in (1, -1)
            )
            up, down = map(program, moved)
            np.testing.assert_allclose(jnp.vdot(slope, direction), (up - down) / 2, rtol=1e-4, atol=1e-14)
    assert all(
        np.any(slope) for slope in gradient[1:5]
    )  # times, psi, weights, noise; ts where the corrector calls there


def test_times_and_weights_are_learned_without_a_key_under_jit():
    table, u = GDDIM(2).coefficients(CLD, gddim.power_grid(1.0, 1e-3, 4)), jnp.ones((2, 3))

    @jax.jit
    @jax.grad
    def slope(moved):
        learned = eqx.tree_at(lambda table: (table.times, table.weights), table, moved)
        return jnp.mean(TableSolver.of(learned, CLD)(eps_fn, u).state ** 2)

    assert all(np.any(part) for part in slope((jnp.asarray(table.times), jnp.asarray(table.weights))))


def by_hand(table, eps_fn, u):
    """A table without noise as its docstring reads, in NumPy."""
    u, history = np.asarray(u), []
    for i in range(len(table.times)):
        call = lambda u, t, j: table.record_u[j] @ u + table.record_eps[j] @ np.asarray(eps_fn(u, t))
        history.insert(0, call(u, table.times[i], i))
        base = table.psi[i] @ u
        u = base + sum(w @ h for w, h in zip(table.weights[i], history, strict=False))
        if table.corrector is not None:
            with_s = [call(u, table.ts[i + 1], i + 1), *history]
            u = base + sum(w @ h for w, h in zip(table.corrector[i], with_s, strict=False))
    return u


@pytest.mark.parametrize(("q", "corrector"), [(4, False), (1, True), (7, True)])
def test_any_table_is_read_as_it_says_whatever_its_history(q, corrector):
    rng, n = np.random.default_rng(q), 9
    part = lambda *shape: rng.normal(size=(*shape, 2, 2)) / 2
    ts, weights, after = np.linspace(1, 0.1, n + 1), part(n, q) / q, part(n, q + 1) / q
    for i in range(q - 1):
        weights[i, i + 1 :] = after[i, i + 2 :] = 0  # there is no history yet
    table = Coefficients(
        ts, ts[:-1], part(n), weights, np.zeros((n, 2, 2)), record_u=part(n + 1), record_eps=part(n + 1),
        corrector=after if corrector else None, corrector_noise=np.zeros((n, 2, 2)) if corrector else None,
    )  # fmt: skip
    with jax.enable_x64(True):
        u, plain = jnp.asarray(rng.normal(size=(2, 3))), lambda u, t: jnp.tanh(u) * (1 + t)
        found = TableSolver.of(table, CLD)(plain, u).state
        np.testing.assert_allclose(found, by_hand(table, plain, u), rtol=1e-12)


class FromAFile(AbstractSampler):
    """A sampler with a grid of its own, as one that was learned has."""

    table: Coefficients

    def nfe(self, steps):
        return steps

    def solver(self, sde, ts, last="none"):
        if len(ts) != len(self.table.ts):
            raise ValueError(f"this table has {len(self.table.times)} steps, not {len(ts) - 1}")
        return TableSolver.of(self.table, sde, last)


def test_a_sampler_may_have_its_own_grid():
    ts, u = [1.0, 0.3, 0.1, 0.02], jnp.ones((2, 3))
    own = FromAFile(GDDIM(2).coefficients(CLD, ts))
    found = Method(own, nfe=3).solver(CLD)(eps_fn, u).state
    np.testing.assert_array_equal(found, gddim.sample(GDDIM(2), CLD, eps_fn, u, ts))
    with pytest.raises(ValueError, match="3 steps, not 4"):
        Method(own, nfe=4).solver(CLD)


@pytest.mark.parametrize("sde", [gddim.VP(), CLD, gddim.Blurring(4)], ids=lambda sde: type(sde).__name__)
def test_a_path_tells_every_call_and_for_one_data_point_foresees_it(sde):
    dims = np.shape(sde.transition(1.0, 0.0))[:-2]
    u0 = sde.lift(jnp.linspace(-1, 1, int(np.prod(dims)) * 2).reshape(*dims, 2))
    point = lambda u, t: product(jnp.linalg.inv(sde.noise_factor(t)), u - product(sde.transition(t, 0.0), u0))
    with jax.enable_x64(True):
        u0 = u0.astype(float)
        start, method = sde.sample_prior(jax.random.key(0), u0.shape).astype(float), Method(GDDIM(2), 6, last="data")
        found = method.solver(sde)(point, start, path=True)
        np.testing.assert_array_equal(found.state, method.solver(sde)(point, start).state)
        path = found.path
        assert path is not None
        np.testing.assert_array_equal(path.times, method.grid(sde))
        np.testing.assert_array_equal(path.states[0], start)
        np.testing.assert_allclose(path.eps[3], point(path.states[3], path.times[3]), rtol=1e-10)
        np.testing.assert_allclose(path.foreseen, jnp.broadcast_to(u0, path.foreseen.shape), atol=1e-8)
        np.testing.assert_allclose(path.foreseen[-1], found.state, atol=1e-12)
    with pytest.raises(ValueError, match="keeps no path"):
        gddim.RK45().solver(sde, [1.0, 0.1])(point, start, path=True)


class Model(eqx.Module):
    sde: gddim.AbstractLinearSDE

    def __call__(self, u, t):
        traced.append(t)
        return eps_fn(u, t)


traced = []


def test_paths_of_numbered_samples_are_those_of_the_samples():
    solver, seed, numbers = Method(GDDIM(2, 0.5), 5).solver(CLD), jnp.asarray(3), jnp.arange(4)
    plain = sample_numbered(Model(CLD), solver, (8, 8, 3), seed, numbers)
    found = sample_numbered(Model(CLD), solver, (8, 8, 3), seed, numbers, path=True)
    assert plain.path is None
    assert found.path is not None
    np.testing.assert_allclose(found.data, plain.data, atol=1e-5)
    assert found.path.times.shape == (5,)
    assert found.path.states.shape == found.path.eps.shape == found.path.foreseen.shape == (5, 4, 8, 8, 2, 3)


def test_numbered_samples_of_as_many_calls_share_one_program():
    traced.clear()
    for sampler in (GDDIM(1), GDDIM(4, 0.7), GDDIM(2, corrector=True, interpolate="data"), gddim.Heun()):
        sample_numbered(Model(CLD), Method(sampler, 6).solver(CLD), (3,), jnp.asarray(0), jnp.arange(2))
    assert len(traced) == 1


def test_a_solver_wants_a_key_for_its_noise_and_keeps_the_precision_of_the_state():
    solver = GDDIM(2, 0.5).solver(CLD, [1.0, 0.5, 0.1])
    with pytest.raises(ValueError, match="key"):
        solver(eps_fn, jnp.ones((2, 3)))
    assert solver(eps_fn, jnp.ones((2, 3), jnp.bfloat16), jax.random.key(0)).state.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="u has shape"):
        solver(eps_fn, jnp.ones((1, 3)), jax.random.key(0))


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (Method(gddim.Heun(), 1), "at least 2 calls"),
        (Method(GDDIM(), 4, t_min=2.0), "t_min"),
        (Method(GDDIM(), 4, power=0.0), "power"),
        (Method(gddim.SSCS(), 4), "stationary"),
    ],
)
def test_a_method_that_cannot_be_is_refused_in_one_line(method, says):
    check_methods([Method(GDDIM(), 4), Method(gddim.RK45(), 1)], gddim.Blurring(4))
    with pytest.raises(UserError, match=says) as caught:
        check_methods([dataclasses.replace(method, nfe=method.nfe), Method(GDDIM(), 4)], gddim.Blurring(4))
    assert "\n" not in str(caught.value)


def test_a_method_is_tried_on_the_steps_that_it_makes():
    two_phase, band = Grid("two-phase"), Grid("band", (3.5,))  # of up to 4 steps of several fields the band ends at 3
    check_methods([Method(OnGrid(GDDIM(3), grid), 6) for grid in (two_phase, band)], gddim.CLD())
    for method, says in (
        (Method(OnGrid(GDDIM(3), two_phase), 1), "leaves a phase without steps"),
        (Method(OnGrid(GDDIM(3), band), 4), "a band needs"),
        (Method(gddim.AnalyticStart(GDDIM(1)), 1, last="data"), "a grid of one step leaves none"),
        (Method(GDDIM(3), 4, start=1e-4), "t_min"),
    ):
        with pytest.raises(UserError, match=says):
            check_methods([method], gddim.CLD())
