"""Samplers that interpolate the data ask a model for them, keep one field, and start where nothing is left of the data."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from gddim import GDDIM
from gddim.samplers import TableSolver
from gddim.sde.linalg import aligned, inverse, product, transpose

CLD, FLOW = gddim.CLD(), gddim.FlowMatching()
PROCESSES = [
    pytest.param(sde, id=name, marks=[pytest.mark.slow] * (name == "PSLD"))
    for name, sde in dict(VP=gddim.VP(), CLD=CLD, PSLD=gddim.PSLD(), Blurring=gddim.Blurring(4)).items()
]
CENTRES = np.random.default_rng(0).uniform(-1, 1, (5, 4, 4, 3))  # colour images


class Mixture(eqx.Module):
    """The exact model of data that are a mixture of `N(centre, std²)`, in the basis of the process."""

    sde: gddim.AbstractLinearSDE
    centres: np.ndarray
    std: float = 0.0

    def denoise(self, u, t):
        asked.append("data")
        R, psi = jnp.asarray(self.sde.noise_factor(t)), jnp.asarray(self.sde.transition(t, 0.0))[..., :, :1]
        centres = jnp.asarray(self.centres, u.dtype)[..., None, :]
        noise, signal = aligned(product(R, transpose(R)), self.std**2 * product(psi, transpose(psi)))
        gaps = u[None] - product(psi, centres)
        pulls = product(inverse(noise + signal), gaps)
        share = jax.nn.softmax(-0.5 * (gaps * pulls).sum(tuple(range(1, gaps.ndim))))
        found = centres + self.std**2 * product(transpose(psi), pulls)
        return jnp.tensordot(share, found, 1)[..., 0, :]

    def __call__(self, u, t):
        asked.append("eps")
        data = self.denoise(u, t)[..., None, :].astype(u.dtype)
        return product(inverse(self.sde.noise_factor(t)), u - product(self.sde.transition(t, 0.0)[..., :, :1], data))


asked = []


def bare(model):
    """The same ε, of which the sampler knows no more."""
    return eqx.Partial(lambda model, u, t: model(u, t), model)


def start(sde, dtype=float):
    return sde.sample_prior(jax.random.key(0), (4, 4, sde.k, 3)).astype(dtype)


@pytest.mark.parametrize("sde", PROCESSES)
def test_a_sample_is_the_same_whether_the_model_is_asked_for_data_or_epsilon(sde):
    lasts, key = itertools.cycle(["none", "data", "euler", "none", "euler"]), jax.random.key(1)
    with jax.enable_x64(True):
        u, model = start(sde), Mixture(sde, CENTRES)
        for order, corrector, lam in itertools.product((1, 2, 3, 4), (False, True), (0.0, 0.5, 1.0)):
            sampler = GDDIM(order, lam, corrector, "data")
            grid = gddim.power_grid(sde.horizon, 1e-3, 4 if corrector else 8)
            solver = sampler.solver(sde, grid, last := next(lasts))
            ours, theirs = (solver(m, u, key).state for m in (model, bare(model)))
            assert jnp.abs(ours - theirs).max() < 1e-9 * jnp.abs(theirs).max(), (sampler, last)


@pytest.mark.parametrize("sampler", [gddim.DPMSolver(3), gddim.UniPC(2)], ids=repr)
def test_so_do_the_solvers_of_others_that_predict_data(sampler):
    with jax.enable_x64(True):
        u, model, solver = start(CLD), Mixture(CLD, CENTRES), sampler.solver(CLD, gddim.power_grid(1.0, 1e-3, 8))
        asked.clear()
        ours = solver(model, u).state
        assert "eps" not in asked
        np.testing.assert_allclose(ours, solver(bare(model), u).state, atol=1e-9)


@pytest.mark.parametrize("sde", PROCESSES)
def test_a_path_tells_the_epsilon_that_the_model_did_not_say(sde):
    with jax.enable_x64(True):
        u, model = start(sde), Mixture(sde, CENTRES)
        solver = GDDIM(2, interpolate="data").solver(sde, gddim.power_grid(sde.horizon, 1e-3, 5), "data")
        ours, theirs = (solver(m, u, path=True) for m in (model, bare(model)))
        np.testing.assert_array_equal(ours.state, solver(model, u).state)
        for found, expected in zip(ours.path, theirs.path, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-9 * np.abs(expected).max())
        np.testing.assert_array_equal(ours.path.foreseen[..., 1:, :], 0)


def test_only_a_model_of_this_very_process_is_asked_for_data_and_only_for_data():
    u, grid, data = start(CLD, jnp.float32), gddim.power_grid(1.0, 1e-3, 3), GDDIM(2, interpolate="data")
    same = gddim.LinearSDE(CLD.drift, CLD.diffusion_squared, CLD.covariance(0.0))  # as far as can be told
    for model, sampler, expected in (
        (Mixture(gddim.CLD(), CENTRES), data, {"data"}),
        (Mixture(same, CENTRES), data, {"eps", "data"}),
        (Mixture(CLD, CENTRES), GDDIM(2), {"eps", "data"}),
    ):
        asked.clear()
        gddim.sample(sampler, CLD, model, u, grid)
        assert set(asked) == expected
    for other in (gddim.CLD(gamma=0.1), gddim.VP()):
        with pytest.raises(ValueError, match="eps_fn is a model of"):
            gddim.sample(data, CLD, Mixture(other, CENTRES), u, grid)


def test_all_tables_with_as_many_calls_are_one_program_of_the_data():
    u, model = start(CLD, jnp.float32), Mixture(CLD, CENTRES)
    asked.clear()
    for order, lam, corrector in ((1, 0.0, False), (3, 0.7, False), (2, 0.3, True)):
        grid = gddim.power_grid(1.0, 1e-3 * order, 3 if corrector else 6)
        gddim.sample(GDDIM(order, lam, corrector, "data"), CLD, model, u, grid, jax.random.key(0))
    assert asked == ["data"]


@pytest.mark.parametrize("sde", [gddim.VP(), CLD, gddim.CriticallyDamped(3)], ids=lambda sde: f"k={sde.k}")
def test_the_history_is_of_one_field(sde):
    """What the loop carries, in images: the base, the state, and five records of one field, or for ε of k."""
    u, model = start(sde, jnp.float32), Mixture(sde, CENTRES)
    solver = GDDIM(3, interpolate="data").solver(sde, gddim.power_grid(1.0, 1e-3, 6))
    for asked_for, fields in ((model, 1), (bare(model), sde.k)):
        program = str(jax.make_jaxpr(lambda u, m=asked_for: solver(m, u).state)(u))
        carried = program[program.index("= scan[") :].partition("_split_transpose")[0]
        assert f"num_carry={2 * sde.k + 5 * fields}\n" in carried.replace(" ", "") + "\n"


def test_rounding_is_not_amplified():
    """One point, CLD in two calls: on the way to ε and back float32 loses five digits; of bfloat16 its rounding is left."""

    class Rounded(Mixture):
        def denoise(self, u, t):
            return jnp.asarray(self.centres[0], jnp.bfloat16)

    u, centre = start(CLD, jnp.float32), CENTRES[:1]
    solver, exact = GDDIM(3, interpolate="data").solver(CLD, gddim.power_grid(1.0, 1e-3, 2)), Mixture(CLD, centre)
    with jax.enable_x64(True):
        truth = np.asarray(solver(exact, u.astype(float)).state, np.float32)
    error = lambda model: float(jnp.abs(CLD.project(solver(model, u).state - truth)).max())
    assert error(exact) < 1e-6 < 1e-4 < error(bare(exact))
    assert error(Rounded(CLD, centre)) < 2**-8


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_flow_matching_from_1_itself_is_exact_in_one_step_for_one_point(lam):
    with jax.enable_x64(True):
        u, key, t = start(FLOW), jax.random.key(1), 1e-3
        solver = GDDIM(1, lam, interpolate="data").solver(FLOW, [1.0, t])
        noise = u if lam == 0 else (solver(Mixture(FLOW, CENTRES[:1] * 0), u, key).state) / t
        found = solver(Mixture(FLOW, CENTRES[:1]), u, key, path=True)
        np.testing.assert_allclose(found.state, (1 - t) * CENTRES[0][..., None, :] + t * noise, atol=1e-13)
        np.testing.assert_allclose(found.path.eps[0], u, atol=1e-13)
        assert jnp.std(noise) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(("order", "corrector"), [(1, False), (2, False), (3, False), (2, True)])
def test_flow_matching_from_1_itself_converges_with_its_order(order, corrector):
    model = Mixture(FLOW, 0.2 * np.sign(CENTRES[:4]), std=0.25)
    with jax.enable_x64(True):
        u, x = start(FLOW), lambda n: np.linspace(1, 0, n + 1)
        grid = lambda n: (
            (0.1 + 0.9 * (x(n) + x(n) ** 2 - x(n) ** 3)) ** 2
        )  # its first steps, without history, are short
        draw = lambda sampler, n: gddim.sample(sampler, FLOW, model, u, grid(n))
        exact = draw(GDDIM(4, corrector=True, interpolate="data"), 512)
        coarse, fine = (jnp.linalg.norm(draw(GDDIM(order, 0.0, corrector, "data"), n) - exact) for n in (64, 128))
        assert np.log2(coarse / fine) > order + corrector - 0.3


def test_nothing_but_a_model_of_the_data_starts_where_nothing_is_left_of_them():
    u, grid = start(FLOW, jnp.float32), [1.0, 0.5, 0.1]
    for other in (bare(Mixture(FLOW, CENTRES)), Mixture(gddim.FlowMatching(0.9), CENTRES), lambda u, t: u):
        with pytest.raises(ValueError, match=r"eps_fn is a .*: give a model of this process with .denoise\(u, t\)"):
            gddim.sample(GDDIM(2, interpolate="data"), FLOW, other, u, grid)
    for sampler in (
        GDDIM(2),
        gddim.CholeskyMultistep(2),
        gddim.EulerMaruyama(),
        gddim.Heun(),
        gddim.SSCS(),
        gddim.RK45(),
    ):
        with pytest.raises(ValueError, match=r"nothing is left of the data at ts\[0\]=1.0, where this FlowMatching"):
            gddim.sample(sampler, FLOW, Mixture(FLOW, CENTRES), u, grid)


@pytest.mark.parametrize(("reply", "says"), [
    (lambda u: u, r"denoise returned shape \(4, 4, 2, 3\) .* it must be \(4, 4, 3\)"),
    (lambda u: (u, u), "denoise returned a tuple; it must return the data alone"),
])  # fmt: skip
def test_data_of_another_shape_are_refused(reply, says):
    class Wrong(Mixture):
        def denoise(self, u, t):
            return reply(u)

    with pytest.raises(ValueError, match=says):
        gddim.sample(GDDIM(2, interpolate="data"), CLD, Wrong(CLD, CENTRES), start(CLD, jnp.float32), [1.0, 0.5, 0.1])


@pytest.mark.parametrize("last", ["euler", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "data"))])
def test_a_sample_of_the_data_is_differentiable_in_every_number_of_a_table(last):
    """Under jit and vmap, against central differences along a random direction; of u and ε it has nothing."""
    table = GDDIM(2, 0.5, True, "data").coefficients(CLD, gddim.power_grid(1.0, 1e-3, 3))
    numbers, rest = eqx.partition(table, lambda x: x.dtype.kind == "f")
    with jax.enable_x64(True):
        us, keys = jnp.stack([start(CLD), -start(CLD)]), jax.random.split(jax.random.key(1), 2)
        model = Mixture(CLD, 0.2 * np.sign(CENTRES), std=0.3)

        def size(numbers):
            solver = TableSolver.of(eqx.combine(numbers, rest), CLD, last)
            return jnp.mean(jax.vmap(lambda u, key: solver(model, u, key).state)(us, keys) ** 2)

        numbers, program = jax.tree.map(jnp.asarray, numbers), jax.jit(size)
        gradient = jax.jit(jax.grad(size))(numbers)
        for name, values in vars(numbers).items():
            if values is None:
                continue
            scale = np.where(values == 0, 0.1, np.abs(values))
            direction = 1e-7 * scale * np.random.default_rng(0).normal(size=values.shape)
            up, down = (
                program(eqx.tree_at(lambda n, name=name: getattr(n, name), numbers, values + sign * direction))
                for sign in (1, -1)
            )
            slope = getattr(gradient, name)
            np.testing.assert_allclose(jnp.vdot(slope, direction), (up - down) / 2, rtol=1e-4, atol=1e-14)
            assert np.any(slope) == (name not in ("record_u", "record_eps")), name
