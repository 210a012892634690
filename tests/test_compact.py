"""States in few bytes: what is lost, what is not, and that damage shows."""

import contextlib
import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from runs import COLOUR

from gddim import compact
from gddim.compact import Packed
from gddim.errors import UserError
from gddim.experiment.checkpoints import checkpoints, items_of
from gddim.experiment.plan import Plan
from gddim.experiment.workdir import describe
from gddim.export.state import export_state

SHAPES = [("conv", (3, 3, 16, 33)), ("bias", (33,)), ("scale", ()), ("dense", (257, 5))]
WAYS = {"model": "whole", "ema": "near", "averages.0": "near", "mu": "signed", "nu": "positive"}
SIZE = sum(math.prod(shape) for _, shape in SHAPES)


def packed(seed: int = 0, base: float = 0.1) -> Packed:
    rng = np.random.default_rng(seed)
    model = (base * rng.normal(size=SIZE)).astype(np.float32)
    near = {name: (model + 0.01 * rng.normal(size=SIZE)).astype(np.float32) for name in ("ema", "averages.0")}
    nu = (10.0 ** rng.uniform(-14, -4, SIZE)).astype(np.float32) * (rng.uniform(size=SIZE) > 0.1)
    vectors = {"model": model, **near, "mu": (1e-3 * model).astype(np.float32), "nu": nu.astype(np.float32)}
    return Packed(7, SHAPES, vectors, WAYS, {"config": {"a": [1, "ε"]}})


def through(folder: Path, state: Packed) -> Packed:
    compact.write(epath.Path(folder), state)
    return compact.read(epath.Path(folder))


def test_what_comes_back_is_as_near_as_is_said(tmp_path):
    state = packed()
    found = through(tmp_path, state)
    assert (found.step, found.leaves, found.about) == (7, SHAPES, state.about)
    model = found.vectors["model"]
    np.testing.assert_array_equal(model, state.vectors["model"].astype(np.float16).astype(np.float32))
    for name, to in (("ema", model), ("averages.0", model), ("mu", 0)):
        values = state.vectors[name]
        largest = np.repeat(np.abs(compact._padded(values - to)).max(1), compact.BLOCK)[:SIZE]
        assert np.all(np.abs(found.vectors[name] - values) <= largest / 254 * 1.001 + 1e-8)
    nu, theirs = state.vectors["nu"], found.vectors["nu"]
    top = np.repeat(compact._padded(nu).max(1), compact.BLOCK)[:SIZE]
    seen = nu > 1e-12 * top
    assert np.abs(np.log(theirs[seen] / nu[seen])).max() <= 12 * np.log(10) / 255 / 2 * 1.01
    least = np.where(compact._padded(nu) > 0, compact._padded(nu), np.inf).min(1)
    assert np.all(theirs[nu == 0] <= 1.1 * np.repeat(least, compact.BLOCK)[:SIZE][nu == 0])


def test_frequencies_come_back_bit_for_bit_in_the_model_and_its_averages(tmp_path):
    """`2π f log(999 t)` makes whole radians of a rounding of f to float16."""
    state = packed(base=16.0)
    for name in ("ema", "averages.0"):
        state.vectors[name][-257 * 5 :] = state.vectors["model"][-257 * 5 :]  # no step of Adam changes them
    found = through(tmp_path, dataclasses.replace(state, leaves=[*SHAPES[:3], ("net.frequencies", (257, 5))]))
    frequencies = state.vectors["model"][-257 * 5 :].reshape(257, 5)
    for name in ("model", "ema", "averages.0"):
        np.testing.assert_array_equal(found.tree(name)["net.frequencies"], frequencies)
    assert np.abs(found.tree("ema")["conv"] - found.tree("model")["conv"]).max() > 0
    state.vectors["ema"][-5:] += 1  # of a network that learns them
    leaves = [*SHAPES[:3], ("net.frequencies", (257, 5))]
    learned = through(tmp_path / "learned", dataclasses.replace(state, leaves=leaves)).tree("ema")["net.frequencies"]
    np.testing.assert_allclose(learned[-1], frequencies[-1] + 1, rtol=1e-2)


def test_a_second_passage_changes_nothing(tmp_path):
    once = through(tmp_path / "a", packed())
    twice = through(tmp_path / "b", once)
    for name, values in once.vectors.items():
        np.testing.assert_allclose(twice.vectors[name], values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, 1e-30, 0.3])
def test_vectors_of_one_value_are_kept(tmp_path, value):
    flat = np.full(SIZE, value, np.float32)
    found = through(tmp_path, Packed(0, SHAPES, dict.fromkeys(WAYS, flat), WAYS, {}))
    for name in ("ema", "mu", "nu"):
        np.testing.assert_allclose(found.vectors[name], flat, rtol=1e-5)


def test_parameters_beyond_float16_are_kept_whole(tmp_path):
    state = packed(base=1e5)
    np.testing.assert_array_equal(through(tmp_path, state).vectors["model"], state.vectors["model"])


def test_trees_are_cut_as_they_were_joined(tmp_path):
    state = packed()
    tree = state.tree("ema")
    assert [(path, leaf.shape) for path, leaf in tree.items()] == SHAPES
    np.testing.assert_array_equal(compact.vector(tree), state.vectors["ema"])


def test_files_are_of_a_size_and_together_the_state(tmp_path, monkeypatch):
    state = packed()
    whole = through(tmp_path / "whole", state)
    monkeypatch.setattr(compact, "PART_BYTES", 12_000)
    cut = through(tmp_path / "cut", state)
    names = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert len(names) > 2
    assert names[0] == f"1-of-{len(names)}.safetensors"
    assert max(path.stat().st_size for path in (tmp_path / "cut").iterdir()) <= 12_000
    for name, values in whole.vectors.items():
        np.testing.assert_array_equal(cut.vectors[name], values)
    size = sum(path.stat().st_size for path in (tmp_path / "whole").iterdir())
    assert size < 6.3 * SIZE + 1_500, "two bytes, one for each of four, and the scales of blocks"


def test_what_is_missing_mixed_or_damaged_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(compact, "PART_BYTES", 12_000)
    compact.write(epath.Path(tmp_path / "a"), packed(0))
    compact.write(
        epath.Path(tmp_path / "b"),
        dataclasses.replace(packed(1), step=8),
    )
    first = min((tmp_path / "a").iterdir())
    assert compact.holds_state(epath.Path(tmp_path / "a"))
    assert not compact.holds_state(epath.Path(tmp_path))
    assert compact.peek(epath.Path(tmp_path / "a")) == (7, {"config": {"a": [1, "ε"]}})

    content = first.read_bytes()
    first.write_bytes((tmp_path / "b" / first.name).read_bytes())
    with pytest.raises(UserError, match="of several states"):
        compact.read(epath.Path(tmp_path / "a"))
    rng = np.random.default_rng(0)
    for position in [*rng.integers(8, len(content), 20), len(content) - 1]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        first.write_bytes(bytes(flipped))
        with pytest.raises(UserError, match=r"damaged|no part of a state|several states"):
            compact.read(epath.Path(tmp_path / "a"))
    first.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="no part of a state"):
        compact.read(epath.Path(tmp_path / "a"))
    first.unlink()
    with pytest.raises(UserError, match="lacks some of"):
        compact.read(epath.Path(tmp_path / "a"))


def test_each_of_many_averages_keeps_its_width(tmp_path):
    """By text `averages.10` comes before `averages.2`."""
    widths, run = [round(0.05 + 0.01 * i, 2) for i in range(13)], epath.Path(tmp_path / "run")
    experiment = dataclasses.replace(COLOUR, train=dataclasses.replace(COLOUR.train, ema_profiles=tuple(widths)))
    plan = Plan(experiment)
    state = plan.init()
    averages = [jax.tree.map(lambda x, w=w: jnp.full_like(x, w), state.ema) for w in widths]
    state = dataclasses.replace(state, ema=averages[0], averages=tuple(averages[1:]))
    with contextlib.closing(checkpoints(experiment, run)) as saved:
        saved.save(1, items_of(state), describe(experiment))
    packed = export_state(run, epath.Path(tmp_path / "state"))
    assert len(packed.about["widths"]) == 13
    for name, width in packed.about["widths"].items():
        np.testing.assert_array_equal(packed.vectors[name], np.float32(width), err_msg=name)
