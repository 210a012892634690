"""What the user of one part meets: silent misuse is an error, and parts fit into each other."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from gddim import GDDIM, averages
from gddim.guidance import Classifier, ClassifierFree, Measured
from gddim.loss import ScoreMatching
from gddim.samplers import AnalyticStart, karras_grid
from gddim.samplers.solver import TableSolver
from gddim.train import TrainState, adam, fuse, make_update

ZERO = lambda x, level, cond=None, *, key=None: 0 * x
IMAGE = jax.random.normal(jax.random.key(0), (4, 4, 3))


def gaussian(y, sigma, cond=None):
    """Of data N(0, 1/4) with neighbouring pixels alike."""
    smooth = lambda x: (x + jnp.roll(x, 1, 0) + jnp.roll(x, -1, 0)) / 3
    return smooth(smooth(y)) * 0.25 / (0.25 + sigma**2)


@pytest.mark.parametrize(
    "denoise",
    [
        gddim.Denoiser(gddim.CLD(), ZERO).denoiser,
        gddim.EpsModel(gddim.VP(), ZERO).denoiser,
        gddim.as_denoiser(lambda x, t: x, gddim.VP(), "data"),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32])
def test_images_of_integers_are_refused_by_every_denoiser(denoise, dtype):
    with pytest.raises(ValueError, match="accepted are floating"):
        denoise(jnp.full((4, 4, 3), 100, dtype), 0.5)


def test_a_measurement_that_is_no_number_is_seen():
    known = jnp.ones((4, 4, 3)).at[0].set(jnp.nan)
    measured = Measured(gaussian, lambda x: x, known, 0.1)
    with pytest.raises(ValueError, match="not finite"):
        measured(IMAGE, 1.0)
    traced = jax.jit(lambda b: Measured(gaussian, lambda x: x, b, 0.1)(IMAGE, 1.0))(known)
    assert jnp.isnan(traced).any()


def uneven(y, sigma, cond=None):
    """One whose Jacobian is not symmetric, as that of a network is not."""
    mixed = jnp.einsum("hwc,cd->hwd", y, jnp.asarray([[0.5, 0.3, 0.0], [-0.1, 0.4, 0.2], [0.1, 0.0, 0.6]], y.dtype))
    return mixed + 0.1 * jnp.tanh(y)


@pytest.mark.parametrize("by", ["moments", "pseudoinverse", "replacement"])
@pytest.mark.parametrize("gaussian", [gaussian, uneven])
@pytest.mark.parametrize("iterations", [3, 60])
def test_a_measured_denoiser_has_a_gradient(by, gaussian, iterations):
    """As finite differences tell it, whether the solution has converged or not."""
    with jax.enable_x64(True):
        y, b = jnp.asarray(IMAGE, float), jnp.linspace(-1, 1, 24).reshape(2, 4, 3)
        of = lambda y: jnp.sum(Measured(gaussian, lambda x: x[:2], b, 0.3, by, iterations=iterations)(y, 0.7) ** 2)
        slope, way = jax.grad(of)(y), jax.random.normal(jax.random.key(1), y.shape, float)
        near = (of(y + 1e-5 * way) - of(y - 1e-5 * way)) / 2e-5
        np.testing.assert_allclose(jnp.vdot(slope, way), near, rtol=1e-5)


@pytest.mark.parametrize("together", [1, 4])
def test_conjugate_gradients_ask_no_more_of_the_network_than_they_need(together):
    """Two turns where the matrix is a number, of a hundred that are allowed; also of many examples at once."""
    asked = []

    @jax.custom_vjp
    def denoise(y, sigma):
        return 0.5 * y

    def pulled(_, v):
        jax.debug.callback(lambda: asked.append(1))
        return 0.5 * v, jnp.zeros(())

    denoise.defvjp(lambda y, sigma: (0.5 * y, None), pulled)
    measured = Measured(
        lambda y, sigma: denoise(y, jnp.asarray(sigma)), lambda x: x[:1], jnp.ones((1, 4, 3)), 0.1, iterations=100
    )
    images = jnp.stack([IMAGE + i for i in range(together)])
    jax.block_until_ready(jax.jit(jax.vmap(lambda y: measured(y, 0.5)))(images))
    jax.effects_barrier()
    assert 1 <= len(asked) <= 4


def test_two_measurements_one_in_the_other_are_one_of_both():
    with jax.enable_x64(True):
        y, noise = jnp.asarray(IMAGE, float), 0.3
        upper, grey = lambda x: x[:2], lambda x: x[2:].mean(-1)
        b, g = upper(0.3 * y), grey(0.7 * y)
        nested = Measured(Measured(gaussian, upper, b, noise, iterations=60), grey, g, noise, iterations=60)
        both = lambda x: jnp.concatenate([upper(x).ravel(), grey(x).ravel()])
        joint = Measured(gaussian, both, jnp.concatenate([b.ravel(), g.ravel()]), noise, iterations=60)
        np.testing.assert_allclose(nested(y, 0.7), joint(y, 0.7), rtol=1e-6, atol=1e-8)


def test_a_condition_that_is_no_number_of_a_class_is_refused_where_minus_1_is_none():
    with pytest.raises(ValueError, match="cond has a leaf of float32; accepted are signed integers"):
        ClassifierFree(lambda y, sigma, cond: y, 2.0)(IMAGE, 1.0, {"embedding": jnp.full(4, 0.5)})


def test_a_network_of_a_path_takes_a_condition():
    net = lambda x, t, cond=0: 0 * x + jnp.asarray(cond, x.dtype)
    denoise = gddim.as_denoiser(net, gddim.VP(), "data")
    np.testing.assert_array_equal(denoise(IMAGE, 0.5, jnp.array(3)), 3.0)
    guided = ClassifierFree(denoise, 2.0)(IMAGE, 0.5, jnp.array(1))
    np.testing.assert_allclose(guided, 3.0)  # −1 + 2 (1 − (−1))
    classified = Classifier(denoise, lambda y, sigma, cond: 0 * y.sum())(IMAGE, 0.5, jnp.array(2))
    np.testing.assert_array_equal(classified, 2.0)


@pytest.mark.parametrize("t", [500, -0.1, np.float32(1.1), jnp.asarray(2.0)])
def test_a_time_that_is_none_of_the_process_is_refused(t):
    sde, u = gddim.VP(), jnp.ones((2, 1, 3))
    for call in (
        lambda: sde.perturb(u, t, u),
        lambda: sde.score(u, t),
        lambda: gddim.EpsModel(sde, ZERO).loss(u[:, 0], t, u),
    ):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\], the times of this VP"):
            call()


def test_averages_count_from_1_and_take_arrays():
    for step in (0, -3):
        with pytest.raises(ValueError, match="counted from 1"):
            averages.rate(0.1, step)
    assert float(jax.jit(lambda t: averages.rate(0.1, t))(jnp.asarray(1))) == 1.0
    weights, left = averages.combination(np.array([4, 8]), np.array([0.1, 0.1]), 8, 0.1)
    np.testing.assert_allclose(weights, [0, 1], atol=1e-9)
    assert left < 1e-6


def test_small_misuse_is_named():
    with pytest.raises(ValueError, match="lower t_max"):
        karras_grid(gddim.FlowMatching(), 1.0, 1e-3, 4)
    with pytest.raises(ValueError, match=r"power=0\.0 must"):
        ScoreMatching(gddim.VP(), 0.0)
    with pytest.raises(ValueError, match="the network returned a tuple"):
        gddim.EpsModel(gddim.VP(), lambda x, level, cond=None, *, key=None: (x, x))(jnp.ones((2, 1, 3)), 0.5)


def test_samples_are_of_numbers_that_are_some_and_of_keys_of_either_kind():
    model = gddim.load("experiments/weights/cifar10_tiny.safetensors")
    for n in (0, -1, [[0]], [0.5]):
        with pytest.raises(gddim.UserError, match="accepted are a number of samples"):
            model.sample(n, nfe=2)
    old, new = (
        model.sample([3], nfe=2, sampler="gddim:1", key=key) for key in (jax.random.PRNGKey(5), jax.random.key(5))
    )
    np.testing.assert_array_equal(old, new)


def test_a_process_in_jax_passes_the_laws(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("""
import jax.numpy as jnp
import gddim
class Mine(gddim.AbstractLinearSDE):
    k: int = 1
    horizon: float = 3.0
    def transition(self, t, s):
        return jnp.exp(-(jnp.asarray(t) - s))[..., None, None]
    def noise_factor(self, t):
        return jnp.sqrt(-jnp.expm1(-2 * jnp.asarray(t)))[..., None, None]
    def to_pixels(self, u): return u
    def from_pixels(self, x): return x
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    from mine import Mine  # pyright: ignore[reportMissingImports]

    from gddim.check import _one_step

    error, limit = _one_step(Mine(), 0.01, 0.0)
    assert error < limit


def test_a_corrector_without_noise_of_its_own_has_none():
    sde, ts, u = gddim.VP(), gddim.power_grid(1.0, 1e-2, 6), jnp.ones((2, 1, 3))
    eps = lambda u, t: jnp.tanh(u)
    table = gddim.Heun().coefficients(sde, ts)
    solve = lambda table: TableSolver.of(table, sde)(eps, u)
    whole, without = solve(table), solve(dataclasses.replace(table, corrector_noise=None))
    np.testing.assert_array_equal(without.state, whole.state)
    assert without.calls == whole.calls == 12
    both = gddim.GDDIM(2, corrector=True).coefficients(sde, ts)
    predicted = solve(dataclasses.replace(both, corrector=None, corrector_noise=None))
    np.testing.assert_allclose(predicted.state, solve(gddim.GDDIM(2).coefficients(sde, ts)).state, rtol=1e-6)


def test_a_coefficient_is_not_asked_for_at_a_breakpoint():
    beta = lambda t: np.where(t == 0.5, np.nan, np.where(t < 0.5, 1.0, 2.0))
    sde = gddim.LinearSDE(lambda t: [[-beta(t) / 2]], lambda t: [[beta(t)]], [[0.0]], breakpoints=[0.5])
    np.testing.assert_allclose(sde.transition(1.0, 0.0), np.exp(-0.75), rtol=1e-10)


@pytest.mark.parametrize("sampler", [gddim.SSCS(), AnalyticStart(GDDIM(2, interpolate="data"))], ids=repr)
def test_a_start_is_of_the_precision_of_the_state(sampler):
    sde, seen = gddim.VP(), []
    model = gddim.through(sde, lambda y, sigma: seen.append(y.dtype) or gaussian(y, sigma))
    solver = sampler.solver(sde, gddim.power_grid(1.0, 1e-2, 4))
    with jax.enable_x64(True):
        u = jnp.ones((4, 4, 1, 3), jnp.float32)
        jax.jit(lambda solver, u: solver(model, u, jax.random.key(0)).state)(jax.tree.map(jnp.asarray, solver), u)
    assert set(seen) == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_operator_is_tried_on_data_of_the_type_that_it_gets(dtype):
    kernel = jnp.ones((3, 3, 1, 3), dtype) / 9
    blur = lambda x: jax.lax.conv_general_dilated(
        x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
    )[0]
    with jax.enable_x64(True):
        y = IMAGE.astype(dtype)
        assert Measured(lambda y, sigma: y / 2, blur, blur(y), 0.1)(y, jnp.asarray(0.5, dtype)).dtype == dtype


def test_parameters_of_half_precision_are_trained_in_single():
    update = make_update(
        lambda x, key: (x,), lambda p, x: jnp.sum((p["w"] * x) ** 2), adam(), lambda step: 0.1, seed=0, ema=0.9
    )
    state = TrainState.create({"w": jnp.ones(3, jnp.bfloat16)}, adam())
    after = jax.jit(update)(state, jnp.ones(3))[0]
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    assert state.model["w"].dtype == jnp.float32
    fuse(update)(state, [jnp.ones(3)] * 2)


@pytest.mark.parametrize("floor", [0.0, 0.04])
def test_processes_that_differ_at_small_times_alone_are_not_one(floor):
    sde, u = gddim.VE(80.0), 80 * jnp.ones((4, 4, 1, 3))
    other = gddim.GaussianPath(lambda t: 1 + 0 * t, lambda t: (t**2 + floor) ** 0.5, 80.0)
    call = lambda: gddim.sample(
        GDDIM(1), sde, gddim.through(other, gaussian), u, gddim.power_grid(80.0, 0.02, 3, power=7)
    )
    if not floor:
        assert jnp.isfinite(call()).all()
        return
    with pytest.raises(ValueError, match="eps_fn is a model of"):
        call()


class Relaxing(gddim.AbstractLinearSDE):
    """Its rate is a leaf; in JAX where `xp` is."""

    rate: Any
    xp: Any = eqx.field(static=True, default=np)
    k: int = 1
    horizon: float = 1.0

    def transition(self, t, s):
        xp = jnp if any(isinstance(x, jax.Array) for x in (t, self.rate)) else self.xp
        return xp.exp(self.rate * (xp.asarray(s) - t))[..., None, None]

    def noise_factor(self, t):
        xp = jnp if any(isinstance(x, jax.Array) for x in (t, self.rate)) else self.xp
        return xp.sqrt(-xp.expm1(-2 * self.rate * t))[..., None, None]

    def to_pixels(self, u):
        return u

    def from_pixels(self, x):
        return x


def test_a_model_of_a_process_that_is_not_known_is_sampled():
    """With numbers that are traced, or of another library."""
    model = gddim.Denoiser(gddim.VP(), ZERO)
    traced = eqx.tree_at(lambda m: m.sde, model, Relaxing(jnp.ones(())))
    solver = gddim.GDDIM(2, interpolate="data").solver(Relaxing(np.ones(())), np.linspace(1, 1e-2, 4))
    u = jax.random.normal(jax.random.key(0), (4, 4, 1, 3))
    drawn = eqx.filter_jit(lambda model, u: solver(model, u).state)(traced, u)
    assert jnp.isfinite(drawn).all()

    class Foreign:
        sde = "vp"

        def __call__(self, u, t):
            return 0 * u

    assert jnp.isfinite(gddim.sample(gddim.GDDIM(2), gddim.VP(), Foreign(), u, np.linspace(1, 1e-2, 4))).all()


def test_without_a_cpu_a_process_in_jax_says_so_and_others_go_on(monkeypatch):
    def missing(backend=None):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", missing)
    gddim.GDDIM(2).coefficients(gddim.CLD(), np.linspace(1, 1e-2, 4))
    with pytest.raises(
        gddim.UserError, match=r"processes in jax.numpy are computed on the CPU, in float64: give .*cpu"
    ):
        gddim.GDDIM(2).coefficients(Relaxing(1.0, jnp), np.linspace(1, 1e-2, 4))
