"""The objective: one object for training, `denoising_loss` and a loop of one's own; what conditions a network reaches it."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import EXPERIMENT
from test_trees import PICTURES

import gddim
from gddim.data import batches
from gddim.experiment import Experiment
from gddim.experiment.cli import parse
from gddim.experiment.plan import Plan
from gddim.loss import AbstractObjective, LogNormalNoise, Row, ScoreMatching
from gddim.nn import MLPConfig, NCSNppConfig
from gddim.sde.base import positions
from gddim.train import TrainState, adam, make_update

OPTIMIZER = adam()
SHAPE = (8, 8, 3)


@pytest.mark.parametrize("power", [None, 1.0])
def test_training_the_public_loss_and_the_objective_are_one(power):
    experiment = dataclasses.replace(EXPERIMENT, train=dataclasses.replace(EXPERIMENT.train, time_power=power))
    plan = Plan(experiment)
    batch = next(batches(experiment.data.train(), 16, experiment.seed))
    key = jax.random.fold_in(jax.random.key(experiment.seed), 0)  # of the first step
    state = plan.init()
    trained = jax.jit(plan.step(flip=False))(state, batch)[1]["loss"]
    model = eqx.combine(state.model, plan.static)
    noise_key = jax.random.split(key)[1]
    losses: list[Any] = [experiment.objective, *([gddim.denoising_loss] if power else [])]
    for loss in losses:
        np.testing.assert_allclose(eqx.filter_jit(loss)(model, jnp.asarray(batch), noise_key), trained, rtol=1e-6)


def test_times_are_uniform_in_their_power():
    x0 = jnp.zeros((20_000, *SHAPE[-1:]))
    for power in (1.0, 3.0):
        rows = ScoreMatching(gddim.CLD(), power).rows(x0, jax.random.key(0))
        assert rows.noise.shape == (20_000, 2, 3)
        u = np.sort(rows.level ** (1 / power))
        np.testing.assert_allclose(u, np.linspace(1e-5 ** (1 / power), 1, len(u)), atol=0.02)


def test_times_of_data_in_half_precision_are_not():
    """Of which there are no more than 128."""
    rows = ScoreMatching(gddim.CLD()).rows(jnp.zeros((1024, 3), jnp.bfloat16), jax.random.key(0))
    assert len(np.unique(rows.level)) > 1000
    assert {x.dtype for x in (rows.x0, rows.level, rows.noise)} == {jnp.dtype("float32")}


def test_noise_levels_are_log_normal():
    x0 = jnp.zeros((20_000, *SHAPE[-1:]))
    for given in ({}, {"mean": 0.5, "std": 2.0}):
        law = {"mean": -1.2, "std": 1.2} | given
        rows = LogNormalNoise(**given).rows(x0, jax.random.key(0))
        assert rows.noise.shape == x0.shape
        z = np.sort((np.log(rows.level) - law["mean"]) / law["std"])
        np.testing.assert_allclose(jax.scipy.stats.norm.cdf(z), np.linspace(0, 1, len(z)), atol=0.02)


class Plainly(AbstractObjective):
    """Another objective: the error of the data in white noise, for a model that is a function."""

    def rows(self, x0: Any, key: Any, cond: Any = None) -> Row:
        return LogNormalNoise().rows(x0, key, cond)

    def loss(self, model: Any, row: Row) -> Any:
        return jnp.mean((model(row.x0 + row.level * row.noise, row.level) - row.x0) ** 2) / row.level**2


def test_what_is_predicted_says_how_noise_is_drawn():
    def drawn(words: str, experiment: Experiment = EXPERIMENT) -> AbstractObjective:
        return parse(experiment, ["train", *words.split()]).experiment.objective

    blurred = dataclasses.replace(PICTURES, sde=gddim.Blurring(8))
    assert drawn("") == LogNormalNoise()
    assert drawn("--train.sigma-mean=-1 --train.sigma-std=1.5") == LogNormalNoise(-1.0, 1.5)
    assert drawn("--train.sigma-std=1.5") == LogNormalNoise(-1.2, 1.5)
    assert drawn("--train.time-power=2") == ScoreMatching(gddim.CLD(), 2.0)
    assert drawn("--model.predicts=eps") == ScoreMatching(gddim.CLD(), 1.0)
    assert drawn("--model.predicts=eps --train.time-power=3") == ScoreMatching(gddim.CLD(), 3.0)
    assert drawn("", blurred) == ScoreMatching(blurred.sde, 1.0)


@pytest.mark.parametrize(
    ("words", "sde", "said"),
    [
        ("--train.sigma-mean=-1 --model.predicts=eps", gddim.CLD(), "need a prediction of data"),
        ("--train.sigma-std=1", gddim.Blurring(8), "a process without a spectrum"),
        (
            "--train.sigma-std=1 --train.time-power=2",
            gddim.CLD(),
            "time_power 2.0 and sigma_std 1: accepted .* not both",
        ),
        ("--train.sigma-std=0", gddim.CLD(), "sigma_std must be > 0, not 0.0"),
        ("--train.sigma-mean=nan", gddim.CLD(), "sigma_mean must be finite, not nan"),
        ("--train.time-power=0", gddim.CLD(), "time_power must be > 0, not 0.0"),
    ],
)
def test_noise_that_does_not_fit_is_refused(words, sde, said):
    with pytest.raises(gddim.UserError, match=said):
        parse(dataclasses.replace(PICTURES, sde=sde), ["train", *words.split()])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_another_objective_trains_without_a_change_elsewhere(accumulate):
    """On `N(0, 1)` the denoiser is `y/(1 + σ²)`, which is learned as `y/(1 + gain σ²)`."""
    objective = Plainly()
    denoiser = lambda gain: lambda y, sigma: y / (1 + gain * sigma**2)
    update = make_update(
        lambda batch, key: objective.rows(batch, key), lambda gain, *rows: objective.mean_loss(denoiser(gain), Row(*rows)),
        OPTIMIZER, lambda step: jnp.float32(0.02), seed=0, ema=0.9, accumulate=accumulate,
    )  # fmt: skip
    state = TrainState.create(jnp.asarray(0.3), OPTIMIZER)
    data = jax.random.normal(jax.random.key(7), (200, 64, 4))
    state, _ = jax.jit(lambda state: jax.lax.scan(update, state, data))(state)
    np.testing.assert_allclose(state.ema, 1.0, atol=0.1)


@pytest.mark.parametrize(("model", "width"), [(gddim.Denoiser, 3), (gddim.EpsModel, 6)])
@pytest.mark.parametrize("sde", [gddim.VP(), gddim.CLD(), gddim.Blurring(8)], ids=lambda sde: type(sde).__name__)
def test_what_conditions_a_network_reaches_it(model, width, sde):
    width = width if model is gddim.Denoiser else 3 * sde.k

    def net(x, level, cond=None, *, key=None):
        seen.append((cond, key is not None))
        return jnp.zeros((*x.shape[:-1], width))

    model, seen, cond = model(sde, net), [], {"label": jnp.arange(2)}
    u, key = jnp.ones((8, 8, sde.k, 3)), jax.random.key(0)
    calls = [
        lambda: model(u, 0.5),
        lambda: model(u, 0.5, cond, key=key),
        lambda: model.loss(u[..., 0, :], 0.5, u, cond, key=key),
    ]
    if isinstance(model, gddim.Denoiser):
        sigma = np.ones(positions(sde))
        calls += [
            lambda: model.denoise(u, 0.5, cond, key=key),
            lambda: model.denoiser(u[..., 0, :], sigma, cond, key=key),
            lambda: model.loss_at(u[..., 0, :], sigma, u[..., 0, :], cond, key=key),
        ]
    for call in calls:
        jax.eval_shape(call)
    assert len(seen) == len(calls)
    assert [where for where, _ in seen] == [None, *[cond] * (len(seen) - 1)]
    assert [keyed for _, keyed in seen] == [False, *[True] * (len(seen) - 1)]
    jax.eval_shape(lambda: gddim.denoising_loss(model, jnp.ones((2, *SHAPE)), key, cond=cond))
    assert seen[-1][0]["label"].shape == ()  # of one example


def test_each_example_has_its_own_condition():
    model = PICTURES.build(jax.random.key(0))
    x0, key, label = jnp.zeros((4, *SHAPE)), jax.random.key(1), jnp.array([0, 1, 2, 3])
    whole, each = eqx.filter_jit(PICTURES.objective), eqx.filter_jit(PICTURES.objective.loss)
    one, other = (whole(model, x0, key, {"label": given}) for given in (label, label[::-1]))
    assert float(one) != float(other)
    rows = PICTURES.objective.rows(x0, key, {"label": label})
    alone = [each(model, jax.tree.map(lambda leaf, i=i: leaf[i], rows)) for i in range(4)]
    np.testing.assert_allclose(one, np.mean(alone), rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "shape"), [(MLPConfig(width=8), (3,)), (NCSNppConfig(width=8, multipliers=(1,), blocks=1), SHAPE)]
)
def test_a_network_that_takes_no_condition_says_so(config, shape):
    net = config.build(shape, 3, jax.random.key(0))
    with pytest.raises(ValueError, match=rf"label.*this {type(net).__name__} takes None"):
        net(jnp.zeros(shape), 1.0, {"label": jnp.array(3)})


def test_the_mixed_score_of_an_infinite_position_is_that_of_the_velocity():
    sde, t = gddim.CLD(), 0.5
    model = gddim.EpsModel(sde, lambda x, level, cond=None, *, key=None: jnp.zeros_like(x), mixed_score=True)
    u = jnp.ones((2, 2, 2, 3))
    infinite = u.at[..., 0, :].set(jnp.inf)
    np.testing.assert_array_equal(model(infinite, t), model(u, t))
