"""A run in windows: each trains for so long, and what the next begins with makes all of them one run."""

import contextlib
import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from runs import make_run

from experiments import points
from gddim import compact, export
from gddim.checkpoint import Checkpointer, by_path
from gddim.compact import Packed
from gddim.evaluation.sweep import read_rows
from gddim.experiment.checkpoints import restore_ema
from gddim.experiment.cli import main, parse
from gddim.experiment.plan import Plan

WORDS = [
    *("--train.batch=16", "--train.warmup=4", "--train.save-every=1000", "--train.report-every=4", "--train.steps=3"),
    *("--net.width=16", "--net.depth=1", "--data.train-points=100", "--data.test-points=50"),
]  # fmt: skip


def train(workdir: Path, *more: str) -> int:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as ended:
        main(points.EXPERIMENT, ["train", f"--workdir={workdir}", *WORDS, *more])
    return int(ended.value.code or 0)


def sums(workdir: Path, step: int) -> dict:
    return json.loads((workdir / "checkpoints" / str(step) / "manifest" / "metadata").read_text())["items"]


@pytest.mark.parametrize(("fused", "averages"), [(1, []), (2, ["--train.ema-profiles", "0.05", "0.1"])])
def test_windows_by_the_clock_are_one_run_bit_for_bit(tmp_path, capsys, fused, averages):
    more = (f"--train.fused={fused}", "--train.minutes=1e-9", *averages)
    ended = []
    while (status := train(tmp_path / "w", *more)) == 75:
        said = capsys.readouterr().err.splitlines()[-1]
        assert "of 3; to continue: python " in said
        assert said.endswith(shlex.join(["train", f"--workdir={tmp_path / 'w'}", *WORDS, *more]))
        ended.append(int(said.split("saved at step ")[1].split()[0]))
    assert status == 0
    assert ended == list(range(fused, 3, fused)), "each makes the one dispatch for which there is always time"
    assert train(tmp_path / "whole", more[0], *averages) == 0
    assert sums(tmp_path / "w", 3) == sums(tmp_path / "whole", 3)


@pytest.mark.parametrize("minutes", ["-1", "inf", "nan"])
def test_a_time_that_is_none_is_refused(tmp_path, capsys, minutes):
    assert train(tmp_path / "w", f"--train.minutes={minutes}") == 2
    assert f"minutes must be at least 0, not {minutes}" in capsys.readouterr().err


PROFILES = ("--train.ema-profiles", "0.05", "0.1", "--train.learning-rate=1e-2")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """400 steps, with a snapshot of two averages every 20, and a state of step 240."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    more = (*PROFILES, "--train.steps=400", "--train.save-every=240", "--train.snapshot-every=20")
    assert train(workdir, *more, "--train.keep=9") == 0
    shutil.copytree(workdir, workdir.with_name("earlier"))
    shutil.rmtree(workdir.with_name("earlier") / "checkpoints" / "400")
    assert export.main([str(workdir.with_name("earlier")), str(workdir.with_name("state")), "--state"]) == 0
    return workdir


def state(workdir: Path, step: int) -> dict[str, np.ndarray]:
    with contextlib.closing(Checkpointer(workdir / "checkpoints")) as saved:
        items, _ = saved.restore(None, step)
    return {f"{item}.{path}": np.asarray(leaf) for item, tree in items.items() for path, leaf in tree.items()}


def far(found: dict, wanted: dict, part: str) -> float:
    """The root mean square of the difference of a part of two states, relative to that of the part."""
    names = [name for name in wanted if name.startswith(part)]
    of, to = (np.concatenate([np.ravel(each[name]) for name in names]) for each in (found, wanted))
    return float(np.linalg.norm(of - to) / np.linalg.norm(to))


def test_a_run_that_is_handed_over_goes_on_as_it_would_have(run, tmp_path, capsys):
    more = (*PROFILES, "--train.steps=400", "--train.save-every=240")
    assert train(tmp_path / "w", *more, f"--train.init={run.with_name('state')}", "--train.snapshot-every=20") == 0
    said = capsys.readouterr().out
    assert f"from {run.with_name('state')}, step 240: " in said
    assert "the state was rounded\n" in said
    assert "training from step 240 to 400" in said
    found, wanted = state(tmp_path / "w", 400), state(run, 400)
    for name in ("train.step", "train.opt_state.1.count"):
        np.testing.assert_array_equal(found[name], wanted[name])
    apart = {part: far(found, wanted, part) for part in ("train.model", "ema", "train.averages.0")}
    moved = {part: far(state(run, 240), wanted, part) for part in apart}
    assert all(apart[part] < 0.15 * moved[part] for part in apart), (apart, moved)
    steps = sorted(int(each.name) for each in (tmp_path / "w" / "snapshots").iterdir())
    assert steps == [*range(240, 401, 20)], "what came over is a snapshot as well"


def test_what_a_state_keeps_is_near_and_its_counts_are_exact(run):
    packed, wanted = compact.read(epath.Path(run.with_name("state"))), state(run, 240)
    assert packed.step == packed.about["count"] == 240
    for path, leaf in packed.tree("model").items():
        np.testing.assert_array_equal(leaf, wanted[f"train.model.{path}"].astype(np.float16).astype(np.float32))
    for name, item in (("ema", "ema"), ("averages.0", "train.averages.0")):
        for path, leaf in packed.tree(name).items():
            np.testing.assert_allclose(leaf, wanted[f"{item}.{path}"], atol=2e-3)


def test_a_state_that_has_all_its_steps_is_a_run_to_evaluate(run, tmp_path, capsys):
    for workdir in (tmp_path / "here", tmp_path / "there"):
        assert train(workdir, *PROFILES, f"--train.init={run.with_name('state')}", "--train.steps=240") == 0
        assert "trained already: 240 steps" in capsys.readouterr().out
    assert sums(tmp_path / "here", 240) == sums(tmp_path / "there", 240), (
        "so tables made elsewhere are of these weights"
    )
    packed = compact.read(epath.Path(run.with_name("state"))).tree("ema")
    for path, leaf in state(tmp_path / "here", 240).items():
        if path.startswith("ema."):
            np.testing.assert_array_equal(leaf, packed[path.removeprefix("ema.")])


def test_a_state_has_the_moments_for_which_there_is_room(run, tmp_path, capsys):
    def exported(name: str, *words: str) -> int:
        return export.main([str(run), str(tmp_path / name), "--state", *words])

    sizes = {}
    for moments in ("both", "second", "none"):
        assert exported(moments, f"--moments={moments}") == 0
        sizes[moments] = sum(path.stat().st_size for path in (tmp_path / moments).iterdir())
    assert sizes["none"] < sizes["second"] < sizes["both"]
    for moments, size in sizes.items():
        assert exported(f"room-{moments}", f"--room={(size + 1) / 1e6}") == 0
        kept = compact.read(epath.Path(tmp_path / f"room-{moments}")).vectors
        assert kept.keys() == compact.read(epath.Path(tmp_path / moments)).vectors.keys()
    capsys.readouterr()
    assert exported("no-room", "--room=0.001") == 2
    assert f"takes {sizes['none'] / 1e6:.4g} MB, more than the --room of 0.001" in capsys.readouterr().err
    assert not (tmp_path / "no-room").exists()


def test_lengths_are_rebuilt_from_snapshots(run, capsys):
    """Those that were kept to rounding; one between them lies between them."""
    plan = Plan(parse(points.EXPERIMENT, ["train", *WORDS, *PROFILES]).experiment)
    wanted = state(run, 400)
    vectors = {}
    for sigma_rel in (0.05, 0.07, 0.1):
        sampling = dataclasses.replace(plan.experiment.sampling, ema=sigma_rel)
        asked = Plan(dataclasses.replace(plan.experiment, sampling=sampling))
        params, step = restore_ema(asked, epath.Path(run))
        assert step == 400
        assert restore_ema(asked, epath.Path(run), 399)[1] == 380
        vectors[sigma_rel] = {f"ema.{path}": np.asarray(leaf) for path, leaf in by_path(params).items()}
    assert "average of σ_rel 0.07 at step 400: of 40 snapshots, its profile missed by 0." in capsys.readouterr().err
    renamed = {name.replace("train.averages.0", "ema"): leaf for name, leaf in wanted.items() if "averages.0" in name}
    assert far(vectors[0.05], wanted, "ema") < 5e-3
    assert far(vectors[0.1], renamed, "ema") < 5e-3
    apart = far(renamed, wanted, "ema")
    assert 0.1 * apart < far(vectors[0.07], wanted, "ema") < apart
    assert far(vectors[0.07], renamed, "ema") < apart


def test_a_table_is_of_the_length_that_is_best_in_samples_that_it_has_not(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "w")
    asked = ("--eval.samples=64", "--eval.batch=64", "--eval.seeds=2", "--eval.nfe", "3", "--eval.samplers", "gddim:2")
    words = ["evaluate", f"--workdir={tmp_path / 'w'}", *asked, "--sampling.nfe=4", "--sampling.seed=3"]
    for again in (False, True):
        with pytest.raises(SystemExit, match="0"):
            main(points.EXPERIMENT, [*words, "--eval.ema", "0.03", "0.05", "0.1"])
        said = capsys.readouterr().err
        tried, rows = (read_rows(tmp_path / "w" / name / "results.jsonl") for name in ("ema", ""))
        assert [row["cell"]["seed"] for row in tried] == 3 * [5], again
        assert [row["cell"]["seed"] for row in rows if row["cell"]["nfe"]] == [3, 4]
        best = min(tried, key=lambda row: row["metrics"]["frechet"])["provenance"]
        assert {row["provenance"]["checkpoint"] for row in rows if row["cell"]["nfe"]} == {best["checkpoint"]}
        assert {row["provenance"]["weights"] for row in rows if row["cell"]["nfe"]} == {best["weights"]}
        assert again or f"average of {best['weights'].removeprefix('EMA of ')} has the least distance in seed 5" in said


@pytest.mark.parametrize("checkpointed", [False, True])
def test_snapshots_of_what_was_not_saved_are_no_part_of_what_follows(checkpointed, tmp_path, capsys, monkeypatch):
    """Of a run that diverged, say, or was killed: it may go on otherwise. Nothing that was saved, or copied there, is lost."""
    run, words = tmp_path / "w", (*PROFILES, "--train.snapshot-every=1")
    make_run(run, parse(points.EXPERIMENT, ["train", *WORDS, *words]).experiment, (1,) if checkpointed else ())
    for name in ("1", "2", "theirs"):
        vectors = {"ema": np.zeros(2, np.float32)}
        left = Packed(2, [("x", (2,))], vectors, {"ema": "whole"}, {"widths": {"ema": 0.05}})
        compact.write(epath.Path(run) / "snapshots" / name, left)
    trained = lambda state, *_, steps, **__: (steps, state)
    monkeypatch.setattr("gddim.experiment.verbs.train.train", trained)
    assert train(run, *words) == 0
    gone = "after step 1, of what was not saved, are deleted: steps 2" if checkpointed else "are deleted: steps 1, 2"
    assert f"{gone}\n" in capsys.readouterr().out
    steps = sorted(path.name for path in (run / "snapshots").iterdir())
    assert steps == (["1", "3", "theirs"] if checkpointed else ["3", "theirs"])


def test_what_cannot_be_handed_over_is_refused_in_a_line(run, tmp_path, capsys):
    def says(status: int, *more: str) -> str:
        capsys.readouterr()
        assert train(tmp_path / "w", "--train.steps=400", *more) == status
        return capsys.readouterr().err

    init = f"--train.init={run.with_name('state')}"
    assert "holds averages of σ_rel [0.05, 0.1], train.ema_profiles are []" in says(2, init)
    assert "is of another model: net" in says(2, init, *PROFILES, "--net.width=8")
    assert "is a snapshot of averages, no state" in says(2, f"--train.init={run / 'snapshots' / '80'}", *PROFILES)
    assert "is at step 240: --train.steps must be no less, not 239" in says(2, init, *PROFILES, "--train.steps=239")
    assert "--sampling.ema is made of snapshots" in says(2, "--sampling.ema=0.07", *PROFILES)
    assert "snapshots are of ema_profiles" in says(2, "--train.snapshot-every=20")
    for word, why in (("0.07", "--eval.ema is made of snapshots"), ("0.3", "ema must lie in (0, 0.289], not 0.3")):
        with pytest.raises(SystemExit, match="2"):
            main(points.EXPERIMENT, ["run", f"--workdir={tmp_path / 'w'}", *WORDS, "--eval.ema", word])
        assert why in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
    assert export.main([str(run), str(run), "--state"]) == 2
    assert "is not overwritten" in capsys.readouterr().err
    assert export.main([str(tmp_path), str(tmp_path / "x"), "--state"]) == 2
    assert "holds no run with checkpoints" in capsys.readouterr().err


def test_compiled_programs_are_kept_and_found_again(tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        more = (f"--compiled={tmp_path / 'compiled'}", "--train.minutes=1e-9", "--train.steps=2")
        assert train(tmp_path / "w", *more) == 75
        kept = sorted(path.name for path in (tmp_path / "compiled").iterdir())
        assert any("of_leaves" in name for name in kept), kept
        jax.clear_caches()
        assert train(tmp_path / "w", *more) == 0
        new = {path.name for path in (tmp_path / "compiled").iterdir()} - {*kept}
        assert not any("of_leaves" in name and name.endswith("cache") for name in new), new
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
