"""Evaluation tells the same however it is cut, spread or interrupted, and says where its numbers come from."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jaxtyping import Array
from PIL import Image

from gddim.data import ArraySource, Digits, to_uint8
from gddim.errors import UserError
from gddim.evaluation.cell import Cell, Evaluator
from gddim.evaluation.features import PixelFeatures
from gddim.evaluation.provenance import software
from gddim.evaluation.report import table
from gddim.evaluation.statistics import Statistics, cached_statistics, compare, features_of, source_statistics
from gddim.evaluation.sweep import read_rows, sweep
from gddim.model import Denoiser
from gddim.nn import NCSNppConfig
from gddim.parallel import MeshConfig, batch_sharding, make_mesh
from gddim.samplers import GDDIM, Heun, Method, power_grid, sample
from gddim.samplers.numbered import sample_numbered
from gddim.samplers.words import parse_sampler
from gddim.sde import CLD, VP
from gddim.sde.linalg import inverse, product, transpose


class Exact(eqx.Module):
    """ε of data that are N(0, 0.5²), for a process that has one: no network, so that a sweep takes seconds."""

    sde: Any
    factor: float = 1.0

    def __call__(self, u: Array, t: Array, key: None = None) -> Array:
        psi = self.sde.transition(t, 0.0)[..., :, :1]
        S = self.sde.covariance(t) + 0.25 * product(psi, transpose(psi))
        return self.factor * product(transpose(self.sde.noise_factor(t)), product(inverse(S), u))


def over_8_devices() -> NamedSharding:
    return batch_sharding(make_mesh(MeshConfig()))


class Convolved(eqx.Module):
    """A feature space with a convolution and a product in float32, whose rounding could depend on the batch."""

    kernel: Array
    matrix: Array
    name: str = eqx.field(static=True, default="random")
    metrics: tuple[str, ...] = eqx.field(static=True, default=("frechet", "kid"))
    chunk: int = eqx.field(static=True, default=16)

    def __call__(self, samples: Array) -> Array:
        x = samples.astype(jnp.float32) / 127.5 - 1
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(x, self.kernel, (1, 1), "SAME", None, None, ("NHWC", "HWIO", "NHWC"))
        )
        return x.reshape(len(x), -1) @ self.matrix

    def details(self, samples: np.ndarray) -> dict[str, Any]:
        return {}

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        p = np.exp(features[:, :4])
        return p / p.sum(axis=1, keepdims=True)


def convolved() -> Convolved:
    kernel, matrix = jax.random.normal(jax.random.key(0), (3, 3, 1, 8)), jax.random.normal(jax.random.key(1), (512, 24))
    return Convolved(kernel, matrix / 20)


def convolved_reference() -> Statistics:
    return source_statistics(random_images(500), convolved(), "random images")


def random_images(count: int) -> ArraySource:
    return ArraySource(np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8))


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_statistics_of_a_stream_do_not_depend_on_batch_or_devices(tmp_path: Path):
    source, space = random_images(2000), convolved()
    one = source_statistics(source, space, "images")
    eight = source_statistics(source, space, "images", over_8_devices())
    assert eight.count == 2000
    assert relative(eight.moments.mean, one.moments.mean) < 1e-9
    assert relative(eight.moments.covariance, one.moments.covariance) < 1e-9
    assert eight.scores
    assert one.scores
    assert eight.scores.score() == pytest.approx(one.scores.score(), rel=1e-9)
    assert compare(eight, one, ("frechet",))["frechet"] < 1e-6
    pixels = source_statistics(source, PixelFeatures(), "images")
    for chunk in (1, 333):
        other = source_statistics(source, PixelFeatures(chunk=chunk), "images")
        assert relative(other.moments.covariance, pixels.moments.covariance) < 1e-9
    one.save(tmp_path / "s.npz")
    read = Statistics.load(tmp_path / "s.npz")
    assert read.digest() == one.digest()
    assert read.origin == {"source": "images", "records": 2000, "features": "random", **software()}


def test_cached_statistics_are_read_again_and_other_data_or_damage_noticed(tmp_path: Path):
    space = PixelFeatures()
    first = cached_statistics(random_images(100), space, "images", tmp_path)
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    assert cached_statistics(random_images(100), space, "images", tmp_path).digest() == first.digest()
    assert file.stat().st_mtime_ns == stamp
    other = ArraySource(255 - random_images(100)[np.arange(100)])
    assert cached_statistics(other, space, "images", tmp_path).digest() != first.digest()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=file.name):
        cached_statistics(random_images(100), space, "images", tmp_path)


def small_unet() -> Denoiser:
    config = NCSNppConfig(width=8, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.0, embedding="positional",
                          fir=False, progressive_input="none")  # fmt: skip
    return Denoiser(CLD(), config.build((8, 8, 1), 1, jax.random.key(0)))


@pytest.mark.parametrize(
    "made", [pytest.param(("gddim:3:data", small_unet), marks=pytest.mark.slow), ("gddim:1:lam=1", lambda: Exact(VP()))]
)
def test_samples_do_not_depend_on_batch_or_devices(made: tuple):
    word, build = made
    model = build()
    solver = parse_sampler(word).solver(model.sde, power_grid(1.0, 1e-3, 6))
    seed = jnp.asarray(3)

    def drawn(size: int, sharding: NamedSharding | None = None) -> np.ndarray:
        starts = range(0, 64, size)
        numbers = [jax.device_put(np.arange(i, i + size), sharding) for i in starts]
        return np.concatenate(
            [np.asarray(sample_numbered(model, solver, (8, 8, 1), seed, each).data) for each in numbers]
        )

    whole = drawn(64)
    np.testing.assert_array_equal(drawn(64), whole)
    scale = np.ptp(whole)
    assert np.abs(drawn(16) - whole).max() < 1e-4 * scale
    assert np.abs(drawn(64, over_8_devices()) - whole).max() < 1e-4 * scale
    assert np.abs(whole[0] - whole[1]).max() > 0.1


@pytest.mark.parametrize("word", ["gddim:2:lam=0.5", "sscs", "rk45:rtol=0.001"])
def test_a_drawn_sample_is_what_sample_gives(word: str):
    model, sampler, ts = Exact(VP()), parse_sampler(word), power_grid(1.0, 1e-2, 5)
    solver = sampler.solver(model.sde, ts, "data")
    (x,), (calls,), _ = sample_numbered(model, solver, (3,), jnp.asarray(7), jnp.asarray([5]))
    prior, noise = jax.random.split(jax.random.fold_in(jax.random.key(7), 5))
    u = model.sde.sample_prior(prior, (1, 3))
    ends = ts if word != "rk45:rtol=0.001" else ts[[0, -1]]
    np.testing.assert_allclose(
        x, model.sde.project(sample(sampler, model.sde, model, u, ends, noise, "data")), atol=1e-5
    )
    assert int(calls) == 6 or word.startswith("rk45")


def evaluator(batch: int = 100, **changes: Any) -> Evaluator:
    reference = source_statistics(Digits().test(), PixelFeatures(), "digits, held out")
    made = Evaluator(Exact(VP()), (8, 8, 1), PixelFeatures(), reference, {"checkpoint": "none", "step": 0}, batch)
    return dataclasses.replace(made, **changes)


def cells(samples: int = 250) -> list[Cell]:
    return [Cell(Method(parse_sampler(word), nfe), samples) for word in ("gddim:2", "em", "heun") for nfe in (4, 6)]


def numbers(rows: list[dict]) -> list[tuple]:
    """What a table shows; times and devices left out."""
    return [(row["cell"]["sampler"], row["cell"]["nfe"], row["measured"].get("nfe"), row["metrics"]) for row in rows]


def test_a_cell_does_not_depend_on_batch_or_devices():
    cell = Cell(Method(GDDIM(2), 5), 250)
    one = evaluator(batch=100).run(cell)
    for other in (evaluator(batch=64), evaluator(batch=64, sharding=over_8_devices())):
        row = other.run(cell)
        assert row["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
        assert (row["cell"], row["provenance"]) == (one["cell"], one["provenance"])


def test_samples_that_are_not_finite_give_no_metrics_and_the_sweep_goes_on(tmp_path: Path):
    rows = sweep(evaluator(model=Exact(VP(), np.nan)), cells()[:2], tmp_path)
    assert [(row["metrics"], row["measured"]["not_finite"]) for row in rows] == [({}, "100 of samples 0 to 99")] * 2
    assert read_rows(tmp_path / "results.jsonl") == rows


def test_a_cell_says_where_its_numbers_come_from():
    row = evaluator().run(Cell(Method(GDDIM(1, lam=0.5), 5, last="data"), 20, seed=3))
    assert row["cell"] == {
        "sampler": "gddim:1:lam=0.5",
        "parameters": "GDDIM(order=1, lam=0.5, corrector=False, interpolate='eps', data_std=None)",
        "nfe": 5, "samples": 20, "seed": 3, "power": 2.0, "t_min": 1e-3, "last": "data",
        "process": "vp",
    }  # fmt: skip
    origin = row["provenance"]
    assert origin["process"] == "VP(beta_min=0.1, beta_max=20.0, horizon=1.0)"
    assert origin["reference"]["source"] == "digits, held out"
    assert len(origin["reference"]["digest"]) == 16
    assert (origin["checkpoint"], origin["step"], origin["features"]) == ("none", 0, "pixels")
    assert "uint8" in origin["rounding"]
    assert {"python", "gddim", "jax", "numpy"} <= origin["versions"].keys()
    assert row["measured"]["nfe"] == 5
    assert row["measured"]["devices"] == "8 × cpu"
    json.dumps(row)


def test_images_are_rounded_as_a_saved_file_would_be(tmp_path: Path):
    one = evaluator()
    rows = sweep(one, [Cell(Method(GDDIM(1), 3), 10)], tmp_path, keep_samples=True)
    files = sorted((tmp_path / "samples").rglob("*.png"))
    assert len(files) == 10
    saved = np.stack([np.asarray(Image.open(file)) for file in files])[..., None]
    solver = GDDIM(1).solver(one.model.sde, power_grid(1.0, 1e-3, 3))
    x = sample_numbered(one.model, solver, (8, 8, 1), jnp.asarray(0), jnp.arange(10)).data
    np.testing.assert_array_equal(saved, to_uint8(x))
    again = source_statistics(ArraySource(saved), PixelFeatures(), "saved")
    assert compare(again, one.reference, ("frechet",))["frechet"] == pytest.approx(rows[0]["metrics"]["frechet"])


def test_a_sweep_is_not_computed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one, floor = evaluator(), source_statistics(Digits().train(), PixelFeatures(), "digits, to train")
    rows = sweep(one, cells(), tmp_path, floor)
    assert rows[0]["metrics"]["frechet"] == pytest.approx(0.5624, abs=1e-3)
    assert [row["cell"]["nfe"] for row in rows[1:]] == [4, 6] * 3
    drawn = []
    run = Evaluator.run
    monkeypatch.setattr(Evaluator, "run", lambda self, cell, *rest: drawn.append(cell) or run(self, cell, *rest))
    assert sweep(one, cells(), tmp_path, floor) == rows
    assert drawn == []
    more = [*cells(), Cell(Method(GDDIM(3), 6), 250), Cell(Method(GDDIM(3), 6), 250)]
    assert sweep(one, more, tmp_path, floor)[:-1] == rows
    assert drawn == [Cell(Method(GDDIM(3), 6), 250)]
    other = dataclasses.replace(one, provenance={"checkpoint": "another"})
    sweep(other, cells()[:1], tmp_path)
    assert len(drawn) == 2
    assert len(read_rows(tmp_path / "results.jsonl")) == 9


class Killed(Exception):
    pass


def test_a_sweep_stopped_inside_a_cell_goes_on_there_and_gives_the_same_table(tmp_path, monkeypatch):
    one = evaluator(batch=32)
    whole = sweep(one, cells(), tmp_path / "whole")
    drawn, features = [], Statistics.of

    def of(x: np.ndarray, space: Any, first: int, origin: dict, labels: Any) -> Statistics:
        drawn.append(first)
        if len(drawn) in (5, 20):
            raise Killed
        return features(x, space, first, origin, labels)

    monkeypatch.setattr(Statistics, "of", staticmethod(of))
    for _ in range(2):
        with pytest.raises(Killed):
            sweep(one, cells(), tmp_path / "cut", save_every=0.0)
    (state,) = (tmp_path / "cut" / "cells").iterdir()
    state.with_name(f".{state.name}.0a1b2c3d.new").touch()  # of a writer that was killed
    rows = sweep(one, cells(), tmp_path / "cut", save_every=0.0)
    assert numbers(rows) == numbers(whole)
    assert len(drawn) == 6 * 8 + 2  # only the batches in which it was stopped were drawn twice
    assert not list((tmp_path / "cut" / "cells").iterdir())


def test_damaged_progress_is_started_again_and_foreign_results_are_refused(tmp_path: Path):
    one, (cell, *_) = evaluator(batch=100), cells()
    state = tmp_path / "state.npz"

    def stop_at(limit: int):
        def keep(first: int, samples: np.ndarray) -> None:
            if first >= limit:
                raise Killed

        return keep

    with pytest.raises(Killed):
        one.run(cell, state, 0.0, stop_at(200))
    assert Statistics.load(state).count == 200
    expected = one.run(cell)["metrics"]
    state.write_bytes(state.read_bytes()[:-100])
    assert one.run(cell, state, 0.0)["metrics"] == expected
    (tmp_path / "results.jsonl").write_text('{"cell": {}}\n')
    with pytest.raises(UserError, match="holds no results"):
        sweep(one, [cell], tmp_path)


def test_what_cannot_be_evaluated_is_refused_before_anything_is_drawn(tmp_path: Path):
    one = evaluator()
    with pytest.raises(UserError, match="different feature spaces"):
        dataclasses.replace(one, space=convolved())
    for cell, why in (
        (Cell(Method(Heun(), 1), 20), "at least 2 calls"),
        (Cell(Method(GDDIM(1), 5), 3), "at least 4"),
        (Cell(Method(GDDIM(1), 5, t_min=2.0), 20), "t_min"),
    ):
        with pytest.raises(UserError, match=why):
            sweep(one, [*cells(), cell], tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adaptive_sampler_has_one_cell_and_reports_its_calls(tmp_path: Path):
    rk45 = parse_sampler("rk45:rtol=0.01:atol=0.01")
    rows = sweep(evaluator(), [Cell(Method(rk45, nfe), 20) for nfe in (10, 20)], tmp_path)
    assert len(read_rows(tmp_path / "results.jsonl")) == 1
    assert rows[0]["measured"]["nfe"] > 10
    assert f"at {rows[0]['measured']['nfe']:.0f}" in table(rows)


@pytest.mark.slow
def test_hardly_any_time_is_spent_outside_sampler_and_network(tmp_path: Path):
    """What a cell takes beside its two compiled programs, each timed alone on the same batches."""
    one = evaluator(batch=64, model=small_unet(), space=convolved(), reference=convolved_reference())
    cell, batches = Cell(Method(GDDIM(2), 20), 64 * 16), 16
    solver = cell.method.solver(one.model.sde)
    one.run(dataclasses.replace(cell, samples=128))  # compiles

    def alone() -> float:
        start = time.perf_counter()
        for i in range(batches):
            x = sample_numbered(
                one.model, solver, one.shape, jnp.asarray(0, jnp.int32), jnp.arange(64 * i, 64 * (i + 1))
            ).data
            jax.block_until_ready(features_of(one.space, to_uint8(x)))
        return time.perf_counter() - start

    shares = []
    for _ in range(3):
        needed = alone()
        row = one.run(cell, tmp_path / "state.npz", save_every=5.0)
        shares.append(1 - needed / row["measured"]["seconds"])
        (tmp_path / "state.npz").unlink(missing_ok=True)
    print(f"share outside: {shares}, {row['measured']['images_per_second']:.4g} images and features a second")
    assert min(shares) < 0.05
