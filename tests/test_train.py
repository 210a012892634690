"""Training: what one step computes, what the loop saves, and that nothing depends on how the work is cut."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gddim import EpsModel, denoising_loss
from gddim.averages import exponent
from gddim.data import FiveRings, batches
from gddim.experiment import Experiment, Training
from gddim.experiment.plan import Plan
from gddim.logs import Log
from gddim.nn import MLPConfig
from gddim.parallel import MeshConfig, global_batch
from gddim.sde import CLD
from gddim.train import (
    Diverged,
    Ledger,
    TrainState,
    adam,
    fuse,
    learning_rate,
    make_update,
    next_step,
    on_leaves,
    train,
)

EXPERIMENT = Experiment(
    name="test",
    sde=CLD(),
    net=MLPConfig(width=32, depth=1),
    data=FiveRings(train_points=1000, test_points=100),
    train=Training(steps=6, batch=16, warmup=2, ema=0.9, report_every=2, save_every=2),
)


def change(**settings) -> Experiment:
    return dataclasses.replace(EXPERIMENT, train=dataclasses.replace(EXPERIMENT.train, **settings))


def run(experiment: Experiment, state: TrainState | None = None, first: int = 0) -> TrainState:
    """All steps from `first`, without the loop."""
    plan = Plan(experiment)
    update = plan.update(flip=False)
    leaves, structure = jax.tree.flatten(plan.init() if state is None else state)
    rows = batches(experiment.data.train(), experiment.train.batch, experiment.seed, first)
    fused, step = experiment.train.fused, first
    while step < experiment.train.steps:
        after = next_step(step, experiment.train.steps, fused)
        group = [global_batch(next(rows), plan.mesh) for _ in range(after - step)]
        leaves, _ = update(leaves, group if fused > 1 else group[0])
        step = after
    return structure.unflatten(leaves)


@pytest.fixture(scope="module")
def plain() -> TrainState:
    return run(EXPERIMENT)


@pytest.mark.parametrize(
    "other",
    [
        change(accumulate=2),
        change(fused=4),
        dataclasses.replace(EXPERIMENT, mesh=MeshConfig(data=2, fsdp=4)),
        dataclasses.replace(EXPERIMENT, mesh=MeshConfig(data=1, fsdp=8)),
    ],
    ids=["accumulated", "fused", "2x4 devices", "fsdp"],
)
def test_how_the_work_is_cut_changes_nothing_but_rounding(plain, other):
    found = run(other)
    assert int(found.step) == 6
    for part in ("model", "ema"):
        chex.assert_trees_all_close(getattr(found, part), getattr(plain, part), atol=1e-5)


def test_the_state_is_the_same_under_a_flag_that_makes_float64_the_default(plain):
    with jax.enable_x64(True):
        found = run(EXPERIMENT)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, plain)
    chex.assert_trees_all_close(found, plain, atol=1e-6)


@pytest.mark.slow
def test_the_core_of_the_suite_passes_under_that_flag():
    core = [f"tests/test_{name}.py" for name in ("train", "checkpoint", "nn", "verbs")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *core]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, env=os.environ | {"JAX_ENABLE_X64": "1"}, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_step_is_a_function_of_seed_and_step():
    plan = Plan(EXPERIMENT)
    step = jax.jit(plan.step(flip=False))
    batch = jnp.asarray(next(batches(EXPERIMENT.data.train(), 16, 0)))
    state = plan.init()
    later = eqx.tree_at(lambda s: s.step, state, state.step + 1)
    loss = {name: float(step(s, batch)[1]["loss"]) for name, s in {"a": state, "b": state, "later": later}.items()}
    other = Plan(dataclasses.replace(EXPERIMENT, seed=1))
    assert loss["a"] == loss["b"] != loss["later"]
    assert float(jax.jit(other.step(flip=False))(state, batch)[1]["loss"]) != loss["a"]


def test_the_buffers_of_the_state_are_taken_over():
    plan = Plan(EXPERIMENT)
    state = plan.init()
    batch = global_batch(next(batches(EXPERIMENT.data.train(), 16, 0)), plan.mesh)
    plan.update(flip=False)(jax.tree.leaves(state), batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def toy(ema: float = 0.9, accumulate: int = 1, peak: float = 0.1):
    """Least squares on the batch itself: loss and update are known in closed form."""
    schedule = learning_rate(peak, steps=100)
    optimizer = optax.identity()
    update = make_update(
        lambda batch, key: (batch,), lambda w, x: jnp.mean((w[None] - x) ** 2), optimizer, schedule,
        seed=0, ema=ema, accumulate=accumulate,
    )  # fmt: skip
    return TrainState.create(jnp.zeros(2), optimizer), update


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_an_update_is_the_gradient_of_the_whole_batch(accumulate):
    state, update = toy(accumulate=accumulate)
    batch = jax.random.normal(jax.random.key(1), (8, 2), jnp.float32)
    state, metrics = update(state, batch)
    gradient = -batch.mean(0)
    np.testing.assert_allclose(state.model, -0.1 * gradient, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], jnp.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], jnp.mean(batch**2), rtol=1e-5)


def test_the_average_forgets_its_start_and_then_follows_its_decay():
    state, update = toy(ema=0.9)
    expected = jnp.zeros(2, jnp.float32)
    for step in range(120):
        state, _ = update(state, jnp.ones((4, 2), jnp.float32) * jnp.float32(step % 3))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * state.model
        np.testing.assert_allclose(state.ema, expected, rtol=1e-4, atol=1e-6)


def test_averages_by_profile_weight_every_step_by_its_share():
    optimizer, widths = optax.identity(), (0.05, 0.1, 0.2)
    update = make_update(
        lambda batch, key: (batch,), lambda w, x: jnp.mean((w[None] - x) ** 2), optimizer, learning_rate(0.1, 100),
        seed=0, ema=0.9, profiles=widths,
    )  # fmt: skip
    state, path = TrainState.create(jnp.zeros(2), optimizer, others=2), []
    for step in range(60):
        state, _ = update(state, jnp.ones((4, 2), jnp.float32) * jnp.float32(step % 7))
        path.append(np.asarray(state.model))
    for width, average in zip(widths, (state.ema, *state.averages), strict=True):
        shares = np.diff((np.arange(61) / 60) ** (exponent(width) + 1))
        np.testing.assert_allclose(average, shares @ np.stack(path), rtol=1e-5)


def test_the_learning_rate_rises_stays_and_falls():
    schedule = learning_rate(1.0, steps=100, warmup=10, cooldown=20)
    values = [float(schedule(jnp.asarray(step))) for step in (0, 4, 9, 50, 80, 90, 99)]
    np.testing.assert_allclose(values, [0.1, 0.5, 1, 1, 1, 0.5, 0.05], rtol=1e-5)
    assert float(learning_rate(1.0, steps=10, cooldown=100)(jnp.asarray(0))) == 1.0


def test_gradients_are_clipped_to_a_global_norm():
    optimizer = adam(clip=1.0)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    large = jax.tree.map(lambda x: x + 100.0, params)
    small = jax.tree.map(lambda x: x / optax.global_norm(large), large)
    results = [optimizer.update(g, optimizer.init(params))[1] for g in (large, small)]
    chex.assert_trees_all_close(*results, rtol=1e-5)


class Recorder:
    """Stands in for checkpoints: what was saved, and when."""

    def __init__(self):
        self.saved: list[tuple[int, float]] = []

    def __call__(self, step, state):
        assert int(state.step) == step
        self.saved.append((step, float(jnp.sum(state.model))))


def loop(state, update, rows, steps, tmp_path, **settings) -> tuple[Recorder, int]:
    recorder = Recorder()
    defaults = {"step": 0, "report_every": 3, "save": recorder, "save_every": 4}
    log = Log(str(tmp_path), step=0, steps=steps, batch=4)
    step, _ = train(
        state,
        jax.jit(on_leaves(update, jax.tree.structure(state))),
        iter(rows),
        steps=steps,
        log=log,
        **(defaults | settings),
    )
    log.close()
    return recorder, step


def test_saves_at_the_interval_and_at_the_end(tmp_path):
    recorder, step = loop(*toy(), itertools.repeat(jnp.ones((4, 2), jnp.float32)), 10, tmp_path)
    assert step == 10
    assert [at for at, _ in recorder.saved] == [4, 8, 10]


def test_a_stop_saves_the_step_that_was_reached(tmp_path):
    recorder, step = loop(
        *toy(), itertools.repeat(jnp.ones((4, 2), jnp.float32)), 10, tmp_path, stop=lambda step: step == 6
    )
    assert step == 6
    assert [at for at, _ in recorder.saved] == [4, 6]


def test_a_step_is_saved_before_anything_else_is_done_with_it(tmp_path):
    def fails(step, state):
        raise MemoryError

    rows, recorder = itertools.repeat(jnp.ones((4, 2), jnp.float32)), Recorder()
    with pytest.raises(MemoryError):
        loop(*toy(), rows, 10, tmp_path, save=recorder, callbacks=[(4, fails)])
    assert [at for at, _ in recorder.saved] == [4]


@pytest.mark.parametrize("bad", [0, 3, 5, 7, 9])
def test_nothing_is_saved_after_a_step_that_is_not_finite(tmp_path, bad):
    state, update = toy()
    recorder, snapshots = Recorder(), Recorder()
    rows = [jnp.full((4, 2), jnp.nan if step == bad else 1.0, jnp.float32) for step in range(10)]
    with pytest.raises(Diverged, match=f"^step {bad}: loss nan"):
        loop(state, update, rows, 10, tmp_path, save=recorder, callbacks=[(2, snapshots)])
    assert [at for at, _ in recorder.saved] == [at for at in (4, 8) if at <= bad]
    assert [at for at, _ in snapshots.saved] == [at for at in (2, 4, 6, 8) if at <= bad]
    assert np.isfinite([value for _, value in recorder.saved + snapshots.saved]).all()


def test_an_infinite_gradient_of_a_finite_loss_counts(tmp_path):
    schedule = learning_rate(0.1, 10)
    update = make_update(
        lambda batch, key: (batch,), lambda w, x: jnp.sqrt(jnp.abs(w[0])) + 0 * x.mean(), optax.identity(), schedule,
        seed=0, ema=0.9,
    )  # fmt: skip
    state = TrainState.create(jnp.zeros(2), optax.identity())
    with pytest.raises(Diverged, match=r"^step 0: loss 0\.0"):
        loop(state, update, itertools.repeat(jnp.ones((4, 2), jnp.float32)), 10, tmp_path)


def test_a_diverged_step_inside_a_fused_dispatch_is_named():
    ledger = Ledger()
    ledger.add(4, {"loss": jnp.array([1.0, 1.0, jnp.inf, 1.0]), "grad_norm": jnp.ones(4)})
    with pytest.raises(Diverged, match=r"^step 6: loss inf"):
        ledger.settle()


def test_the_loop_waits_for_the_device_only_where_it_must(monkeypatch):
    """Between saves nothing but the dispatch two before the newest is waited for, and nothing newer is fetched."""
    fetched = []
    monkeypatch.setattr(
        jax, "device_get", lambda rows: fetched.append(len(rows)) or [dict.fromkeys(r, 1.0) for r in rows]
    )
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", lambda entry: waited.append(entry[0]))
    ledger = Ledger()
    for step in range(6):
        ledger.add(step, {"loss": jnp.ones(()), "grad_norm": jnp.ones(())})
    assert waited == [0, 1, 2, 3]
    ledger.settle(ahead=2)
    assert fetched == [4]
    assert ledger.mean() == {"loss": 1.0, "grad_norm": 1.0}
    assert ledger.mean() == {}


def test_fused_dispatches_end_at_the_same_steps_wherever_a_run_resumes():
    for start in range(10):
        ends, step = [], start
        while step < 10:
            step = next_step(step, 10, 4)
            ends.append(step)
        assert ends == [end for end in (4, 8, 10) if end > start]


def test_several_steps_in_one_dispatch_are_those_steps():
    state, update = toy()
    rows = [jax.random.normal(jax.random.key(i), (4, 2), jnp.float32) for i in range(3)]
    together, metrics = jax.jit(fuse(update))(state, rows)
    losses = []
    for row in rows:
        state, one = update(state, row)
        losses.append(float(one["loss"]))
    chex.assert_trees_all_close(together, state, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-6)


def test_bytes_of_images_are_no_data_in_pixels():
    model = EpsModel(CLD(), lambda x, level, cond=None, *, key=None: x)
    with pytest.raises(ValueError, match=r"x0 is uint8: scale to \[−1, 1\] first, images by gddim.data.to_unit"):
        denoising_loss(model, np.zeros((2, 4, 4, 3), np.uint8), jax.random.key(0))
