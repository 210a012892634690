"""The benchmark: what it accepts, what it writes, and that its cheap rows can be measured. No test asks how fast."""

import json
import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cld_digits, points
from experiments.benchmark import data, evaluation, mathematics, profiles, training
from experiments.benchmark.__main__ import BENCHES, main
from experiments.benchmark.reference_coefficients import published_blurring, published_cld
from experiments.benchmark.table import Row, Target
from gddim import CLD, GDDIM, Blurring, power_grid
from gddim.errors import UserError
from gddim.evaluation.features import PixelFeatures

ROWS = [
    Row("quick", 0.5, "s", "slow", 2.0, Target("ratio", "≤", 0.3)),
    Row("late", 3.0, "s", target=Target("value", "≤", 2.0)),
    Row("plain", 12345.0, "images/s"),
]


@pytest.fixture
def one_bench(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BENCHES, "loader", lambda: iter(ROWS))
    return tmp_path


def test_a_row_says_its_ratio_and_whether_its_target_is_met():
    assert [row.ratio for row in ROWS] == [0.25, None, None]
    assert [row.met for row in ROWS] == [True, False, None]
    assert Row("", 2.0, "", "", 1.0, Target("ratio", "≥", 2.0)).met
    assert ROWS[0].cells() == ("quick", "0.5 s", "slow: 2 s", "0.25", "ratio ≤ 0.3, met")
    assert ROWS[1].cells() == ("late", "3 s", "", "", "≤ 2, missed")
    assert ROWS[2].cells()[1] == "12,345 images/s"


def test_rows_are_printed_and_written_with_where_they_come_from(one_bench, capsys):
    main(["loader", "--json", "new/result.json"])
    said = capsys.readouterr().out
    assert said.count("\n| ") == 2 + len(ROWS)
    assert "| late | 3 s |" in said
    found = json.loads((one_bench / "new" / "result.json").read_text())
    assert found["command"] == "python -m experiments.benchmark loader --json new/result.json"
    assert {"commit", "devices", "versions", "seconds"} <= found.keys()
    assert [(row["bench"], row["value"], row["met"]) for row in found["rows"]] == [
        ("loader", 0.5, True),
        ("loader", 3.0, False),
        ("loader", 12345.0, None),
    ]


def test_a_result_has_the_time_in_its_name_and_is_never_overwritten(one_bench, capsys):
    main(["loader"])
    (path,) = (one_bench / "runs").iterdir()
    before = path.read_text()
    with pytest.raises(SystemExit, match="2"):
        main(["loader", "--json", str(path)])
    assert path.read_text() == before
    assert capsys.readouterr().err == f"error: --json {path} exists and is not overwritten: name a new file\n"


def test_an_unknown_name_is_one_line_and_nothing_is_written(one_bench, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["loader", "speed"])
    assert capsys.readouterr().err == f"error: no benchmark 'speed'; accepted: {', '.join(BENCHES)}\n"
    assert not list(one_bench.iterdir())


def test_a_bench_that_lacks_something_does_not_stop_the_others(one_bench, monkeypatch, capsys):
    def failing(error):
        raise error
        yield

    monkeypatch.setitem(BENCHES, "peers", lambda: failing(UserError("needs something")))
    monkeypatch.setitem(BENCHES, "networks", lambda: failing(RuntimeError("out of memory")))
    main(["peers", "networks", "loader", "--json", "result.json"])
    assert "peers: needs something" in capsys.readouterr().out
    found = json.loads((one_bench / "result.json").read_text())
    assert found["not measured"] == ["peers: needs something", "networks: RuntimeError('out of memory')"]
    assert len(found["rows"]) == len(ROWS)


def test_the_published_method_converges_to_our_coefficients():
    """Half a point of a Riemann sum is what it lacks; what is left is float32."""
    ts = power_grid(1.0, 1e-2, 4)
    for sde, found, bound in (
        (CLD(), published_cld(CLD(), ts, 3, 100_000, 10_000), 1e-2),
        (Blurring(8), published_blurring(Blurring(8), ts, 3, 10_000), 1e-2),
    ):
        assert mathematics.relative_error(found, GDDIM(3).coefficients(sde, ts).weights) < bound


def test_the_general_processes_of_the_benchmark_are_the_closed_ones():
    ts = power_grid(1.0, 1e-3, 3)
    for general, closed in ((mathematics.linear_cld(), CLD()), (mathematics.linear_blurring(), Blurring())):
        weights = (GDDIM(2).coefficients(sde, ts).weights for sde in (general, closed))
        assert mathematics.relative_error(*weights) < 1e-9


def measured(rows) -> list[Row]:
    rows = list(rows)
    assert rows
    assert all(math.isfinite(row.value) and row.value > 0 for row in rows)
    assert all(row.baseline_value is None or row.baseline_value > 0 for row in rows)
    return rows


def test_the_loader_is_measured(monkeypatch):
    monkeypatch.setattr(data, "h200_consumption", lambda: 1.0)
    assert [row.baseline_value for row in measured(data.loader(records=64, batch=8, count=8, repeats=1))] == [20, 20]


@pytest.mark.slow  # compiles training steps
def test_loop_and_checkpoints_are_measured():
    measured(training.loop(steps=2, repeats=1))
    measured(training.labels(steps=1, repeats=1))
    (row,) = measured(training.checkpoint(saves=2, steps=1))
    assert row.baseline.startswith("1,000 steps")


def test_the_step_of_an_experiment_is_measured():
    rows = measured(training.networks(("points",), repeats=1))
    assert [row.unit for row in rows] == ["s", "ms", "images/s", "GFLOP/s", "MiB"]
    assert np.isclose(rows[2].value * rows[1].value / 1e3, 512)


def test_on_an_accelerator_the_two_with_an_aim_come_first_in_batches_that_have_room(monkeypatch):
    def network(sized, experiment, repeats):
        tried.append((experiment.name, sized.train.batch))
        if sized.train.batch > room:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        yield experiment.name, sized.train.batch

    monkeypatch.setattr(training, "on_cpu", lambda: False)
    monkeypatch.setattr(training, "_network", network)
    room, tried = 512, []
    found = list(training.networks(("blur_cifar10", "cifar10", "cld_cifar10")))
    assert found == [
        *(("cifar10", 512), ("cld_cifar10", 128)),
        *(("cifar10", 128), ("cifar10", 256), ("cld_cifar10", 256), ("cld_cifar10", 512)),
        ("blur_cifar10", 128),
    ]
    assert [each for each in tried if each not in found] == [("cifar10", 1024), ("cld_cifar10", 1024)]

    room, tried = 256, []
    assert list(training.networks(("cifar10",))) == [("cifar10", 128), ("cifar10", 256)]
    assert tried == [("cifar10", 512), ("cifar10", 128), ("cifar10", 256)]


def test_on_an_accelerator_a_network_with_an_aim_is_profiled_at_its_own_batch(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "AIMS", {"points": 0.3})
    sized = training.as_measured(points.EXPERIMENT)
    monkeypatch.setattr(training, "on_cpu", lambda: False)
    monkeypatch.setattr(training, "matrix_product", lambda dtype: (lambda: jnp.zeros(1), 1.0))
    for batch, profiled in ((512, True), (256, False)):
        rows = list(training._network(training.resized(sized, batch), points.EXPERIMENT, 1))
        assert any("profile: " in row.figure for row in rows) == profiled


def test_a_profile_tells_the_kinds_of_kernels_by_their_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = jax.jit(lambda a: jnp.cumsum(jnp.sin(a @ a), 0))
    a = jnp.ones((300, 300))
    jax.block_until_ready(work(a))
    start = time.perf_counter()
    with jax.profiler.trace(str(tmp_path / "traced")):
        jax.block_until_ready([work(a) for _ in range(3)])
    rows = list(profiles.profile(lambda: work(a), "a"))
    assert rows
    assert {row.unit for row in rows} == {"ms of a step"}
    assert [path.name[:10] for path in (tmp_path / "runs").iterdir()] == ["profile-a-"]
    found = profiles.kernels(tmp_path / "traced")
    assert any("fusion" in kind for kind, _ in found)
    assert [seconds for _, seconds in found] == sorted((seconds for _, seconds in found), reverse=True)
    assert 0 < sum(seconds for _, seconds in found) < (os.cpu_count() or 1) * (time.perf_counter() - start)


def test_every_experiment_is_measured():
    assert {"cld_cifar10", "cld_digits", "points", "blur_cifar10"} <= {e.name for e in training.all_experiments()}


@pytest.mark.slow  # compiles training steps
def test_noise_factor_and_sampler_are_measured():
    measured(mathematics.noise_factor(batch=8, calls=2))
    assert len(measured(mathematics.sampler(nfe=3, batch=2, repeats=1, width=4))) == len(mathematics.SAMPLERS) + 1


@pytest.mark.slow  # compiles a sampler
def test_a_cell_of_digits_is_measured():
    digits = cld_digits.EXPERIMENT
    assert len(measured(evaluation.cell_rows(digits, PixelFeatures(), digits.data.test(), 8, 4, "pixels", 8))) == 3
