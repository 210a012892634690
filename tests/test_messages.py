"""What the command lines say: one line for what is wrong, on any terminal, before anything is computed or written."""

import ast
import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import options_told, status_of

import gddim.check
import gddim.convert
import gddim.data.__main__
import gddim.evaluation.__main__
import gddim.export
import gddim.generate
from experiments import blurred_cld_cifar10, cld_cifar10, cld_digits, points
from experiments.benchmark import __main__ as benchmark
from experiments.solvers import __main__ as solvers
from experiments.solvers import images, tune
from gddim.data import CelebA, Digits, Shards, prepare
from gddim.errors import place
from gddim.evaluation.features import PixelFeatures
from gddim.evaluation.statistics import source_statistics
from gddim.experiment import Experiment, Sampling
from gddim.experiment.cli import Command, main
from gddim.experiment.drawing import draw_samples
from gddim.experiment.options import options
from gddim.experiment.plan import Plan
from gddim.experiment.workdir import describe, flatten, read_config

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = (points, cld_digits, cld_cifar10, blurred_cld_cifar10)
SMALL = [
    *("--train.steps=4", "--train.batch=16", "--train.save-every=2", "--net.width=8", "--net.depth=1"),
    *("--data.train-points=100", "--sampling.samples=8", "--sampling.nfe=3", "--eval.samples=8", "--eval.nfe", "3"),
    *("--eval.samplers", "gddim:2"),
]  # fmt: skip


def refused(capsys, experiment: Experiment, *argv: str) -> str:
    """The one line with which these words are refused."""
    capsys.readouterr()
    assert status_of(experiment, *argv) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    return said.err.removeprefix("error: ").rstrip()


WRONG = {
    "--train.stepz=3": "unknown option --train.stepz; accepted: --train.steps, ",
    "--train.stepz 3": "unknown option --train.stepz; accepted: --train.steps, ",
    "--nonsense": "unknown option --nonsense; accepted: ",
    "--train.lr=1e-3": "unknown option --train.lr; accepted: --train.learning-rate, ",
    "--lr 1e-3": "unknown option --lr; accepted: --train.learning-rate, ",
    "--sampling.sampler=heun": "unknown option --sampling.sampler; accepted: --sampler; see --help",
    "--steps 3": "unknown option --steps; accepted: --train.steps, --fit.steps; see --help",
    "--train.samples=3": "unknown option --train.samples; accepted: --sampling.samples, --eval.samples, --restore.samples; ",
    "--mesh.fdsp=2": "unknown option --mesh.fdsp; accepted: --mesh.fsdp, ",
    "--eval.nfe 10,20": "--eval.nfe 10,20: separate by spaces: --eval.nfe 10 20",
    "--eval.nfe 10, 20": "--eval.nfe 10, 20: separate by spaces: --eval.nfe 10 20",
    "--eval.nfe=10, 20 , 50": "--eval.nfe 10, 20 , 50: separate by spaces: --eval.nfe 10 20 50",
    "--eval.nfe ,": "--eval.nfe ,: accepted is a whole number",
    "--eval.samplers gddim:2,em": "separate by spaces: --eval.samplers gddim:2 em",
    "--eval.nfe 10 20 sample": "the verb comes first: sample --eval.nfe 10 20",
    "trian": "'trian' is no verb, and no option's value; the verbs are run, train, sample, evaluate, ",
    "run sample": "one verb at a time, not both run and sample",
    "--train.steps 5 6": "'6' is no verb, and no option's value; ",
    "--train.steps=many": "--train.steps many: accepted is a whole number",
    "--train.learning_rate many": "--train.learning-rate many: accepted is a number",
    "--step=x": "--step x: accepted is a whole number or None",
    "--train.steps": "--train.steps needs a value: a whole number",
    "--seed --train.steps 3": "--seed needs a value: a whole number",
    "--dry-run=1": "--dry-run takes no value",
    "--train.steps=-3": "train: steps must be at least 1, not -3",
    "--train.batch=0": "train: batch must be at least 1, not 0",
    "--train.accumulate=3": "batch 512 must be a multiple of accumulate 3",
    "--train.ema=1.5": "train: ema must be in [0, 1), not 1.5",
    "--train.learning-rate=nan": "learning_rate must be > 0, not nan",
    "--sampler=gddim:0": "order=0 must be 1, 2, 3 or 4",
    "--eval.samplers gddim:2 ddim": "unknown sampler 'ddim'; accepted are gddim",
    "--sampler=ddim": "unknown sampler 'ddim'; accepted are gddim",
    "--sampling.t-min=1.5": "t_min must be below the horizon 1.0 of the process, not 1.5",
    "--eval.every=5 --sampler=heun --sampling.nfe=1": "nfe: 1 given, but heun",
    "--sampling.nfe=0": "nfe must be at least 1, not 0",
    "--sampler=rk45 --eval.samplers=em@uniform --sampling.grid=two-phase --sampling.t-min=0.6": (
        "sampling.grid two-phase, 64 steps of cld: fraction=0.5 of t_max=1.0 must lie above t_min=0.6"
    ),
    "--model.predicts=score": "--model.predicts score: accepted is one of data, eps",
    "--model.data-std=nowhere": "nowhere is no spectrum of python -m gddim.data std --spectrum",
    "--sde.m-inv=-1": "m_inv=-1.0 must be > 0",
    "--mesh.fsdp=3": "mesh.fsdp=3 do not fit 8 device(s)",
    "--train.batch=6": "batch 6 cannot be split over 8 device(s): use a multiple of 8",
    "--step=3": "--step is for what follows training",
    "--net.width=0": "width: got 0",
    "--eval.features=inceptoin": "--eval.features inceptoin: accepted is one of inception, pixels",
}  # fmt: skip


@pytest.mark.parametrize("word", WRONG)
def test_what_is_wrong_is_one_clear_line_and_nothing_is_written(word, capsys, tmp_path):
    assert WRONG[word] in refused(capsys, points.EXPERIMENT, f"--workdir={tmp_path / 'w'}", *word.split())
    assert not (tmp_path / "w").exists()


def test_a_verb_after_a_list_is_told_to_come_first(capsys):
    said = refused(capsys, cld_digits.EXPERIMENT, *["--net.multipliers", "1", "2", "2", "sample"])
    assert said == "the verb comes first: sample --net.multipliers 1 2 2"


@pytest.mark.parametrize("module", EXPERIMENTS, ids=lambda m: m.EXPERIMENT.name)
def test_the_options_read_off_the_types_are_those_that_the_help_tells(module, capsys):
    assert status_of(module.EXPERIMENT, "--help") == 0
    told = options_told(capsys.readouterr().out)
    known = dict(options(Command("run", "w", module.EXPERIMENT)))
    inverse = {name for name in known if "no-" in name}
    assert told - inverse - {"--help"} == set(known) - inverse


@pytest.mark.parametrize("module", EXPERIMENTS, ids=lambda m: m.EXPERIMENT.name)
def test_a_configuration_names_what_the_command_line_takes(module, capsys):
    known = dict(options(Command("run", "w", module.EXPERIMENT)))
    given = {name for name, _ in flatten(describe(module.EXPERIMENT)) if not name.endswith("type")}
    functions = {"name", "rule", "weights", *(name for name in given if name.startswith("sde."))}
    assert {f"--{name}".replace("_", "-") for name in given - functions} <= set(known)


def test_a_dry_run_names_what_the_command_line_takes(tmp_path, capsys):
    assert status_of(points.EXPERIMENT, "--dry-run", f"--workdir={tmp_path / 'w'}", "--sampler=heun") == 0
    assert '\nsampler = "heun"\n' in capsys.readouterr().out


def test_a_dry_run_does_not_care_what_the_default_workdir_holds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/points", "mine"):
        Path(folder).mkdir(parents=True)
        Path(folder, "thesis.tex").write_text("x")
    assert status_of(points.EXPERIMENT, "--dry-run") == 0
    assert "mine holds something else" in refused(capsys, points.EXPERIMENT, "--dry-run", "--workdir=mine")


@pytest.mark.parametrize(("scheme", "extra"), [("gs", "gcs"), ("s3", "s3")])
def test_a_bucket_without_its_package_is_one_line(scheme, extra, monkeypatch, capsys):
    for package in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, package, None)
    said = refused(capsys, points.EXPERIMENT, f"--workdir={scheme}://nobody/x", "--dry-run")
    assert f"pip install 'gddim[{extra}]'" in said


PLATFORMS = {"rocm": "accepted: cpu, tpu", "tpu": "pip install 'gddim[tpu]'", "x": "accepted: cpu, tpu"}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_accelerator_without_its_plugin_is_one_line(platform):
    for words in (["experiments.points", "--dry-run"], ["gddim.evaluation", "fid", "digits", "digits:test"]):
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": platform}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"error: JAX_PLATFORMS={platform}")
        assert PLATFORMS[platform] in last
        assert "Traceback" not in done.stderr


@contextlib.contextmanager
def ascii_only() -> Iterator[io.BytesIO]:
    """A terminal without a letter beyond ASCII, and what is printed on it."""
    terminal = io.TextIOWrapper(said := io.BytesIO(), "ascii", write_through=True)
    with contextlib.redirect_stdout(terminal):
        yield said
    terminal.detach()  # which would close what was printed


ENTRIES = {
    "experiment": lambda: main(points.EXPERIMENT),
    "evaluation": gddim.evaluation.__main__.main,
    "evaluation fid": gddim.evaluation.__main__.main,
    "data": gddim.data.__main__.main,
    "data std": gddim.data.__main__.main,
    "convert": gddim.convert.main,
    "check": gddim.check.main,
    "export": gddim.export.main,
    "generate": gddim.generate.main,
    "benchmark": benchmark.main,
    "solvers": solvers.main,
    "tune": tune.main,
    "images": images.main,
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_terminal_without_the_letters_gets_the_help(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", *name.split()[1:], "--help"])
    with ascii_only() as said, pytest.raises(SystemExit) as caught:
        ENTRIES[name]()
    assert not caught.value.code
    assert b"usage: " in said.getvalue()


def test_a_terminal_without_the_letters_gets_the_result(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 256, (8, 4, 4, 3), dtype=np.uint8))
    words = ["fid", str(tmp_path / "a.npy"), str(tmp_path / "b.npy"), "--features", "pixels"]
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with ascii_only() as said:
        gddim.evaluation.__main__.main()
    assert re.search(rb"Fr\?chet distance \d.*\nKID [-\d.]+ \? [\d.]+\nprecision", said.getvalue())


def test_a_terminal_without_the_letters_sees_a_dry_run_and_a_run(tmp_path):
    with ascii_only() as said:
        assert status_of(points.EXPERIMENT, f"--workdir={tmp_path / 'w'}", *SMALL, "--dry-run") == 0
        assert status_of(points.EXPERIMENT, f"--workdir={tmp_path / 'w'}", *SMALL) == 0
    assert b"devices: 8 ? cpu" in said.getvalue()
    assert b"samples of step 4 by gddim:3:free:data@tuned: NFE 3" in said.getvalue()


def test_every_command_line_prints_on_any_terminal_and_every_file_names_its_encoding():
    parsers = []
    for folder in ("gddim", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
            if "argparse.ArgumentParser" in calls or "tyro.cli" in calls:
                parsers.append(path)
                assert "printable" in calls, path
            assert not re.search(r"""open\([^)]*"[wax]"\)""", text), (
                f"{path} opens a text file in the terminal's encoding"
            )
    assert len(parsers) == len({name.split()[0] for name in ENTRIES})


@pytest.fixture(scope="module")
def shards_without_the_held_out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "s"
    prepare(Digits(), folder)
    next(folder.glob("test*")).unlink()
    return folder


def test_a_run_that_could_not_be_evaluated_does_not_begin(shards_without_the_held_out, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "w"
    small = [*SMALL, f"--workdir={workdir}"]
    reference = tmp_path / "reference.npz"
    assert "No such file" in refused(capsys, points.EXPERIMENT, *small, f"--eval.reference={reference}")
    np.savez(reference, mu=np.zeros(2), sigma=np.eye(2))
    said = refused(capsys, points.EXPERIMENT, *small, f"--eval.reference={reference}")
    assert "its arrays are mu, sigma, not those of python -m gddim.evaluation stats" in said
    reference.unlink()
    source_statistics(Digits().test(), PixelFeatures(), "digits", progress=False).save(reference)
    said = refused(capsys, points.EXPERIMENT, *small, f"--eval.reference={reference}")
    assert "records (8, 8, 1) and (2,) cannot be compared pixel by pixel" in said
    for count in (1, 3):
        said = refused(capsys, points.EXPERIMENT, *small, f"--data.test-points={count}")
        assert f"{count} records are held out, an evaluation needs at least 4" in said
    on_shards = dataclasses.replace(cld_digits.EXPERIMENT, data=Shards(str(shards_without_the_held_out)))
    assert "lacks test" in refused(capsys, on_shards, f"--workdir={workdir}")
    monkeypatch.setenv("GDDIM_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    said = refused(capsys, cld_digits.EXPERIMENT, f"--workdir={workdir}", "--eval.features=inception", "--eval.every=5")
    assert "no Inception weights: put " in said
    assert not workdir.exists()


def test_what_a_run_would_not_overwrite_at_its_end_is_told_at_its_start(tmp_path, capsys):
    small = [*SMALL, f"--workdir={tmp_path / 'w'}"]
    assert status_of(points.EXPERIMENT, "train", *small) == 0
    for name, says in (("results.jsonl", "holds no results that can be read"), ("samples.png", "was not written by")):
        (tmp_path / "w" / name).write_text("mine")
        assert says in refused(capsys, points.EXPERIMENT, *small, "--train.steps=6")
        (tmp_path / "w" / name).unlink()


LITTER = (".DS_Store", ".ipynb_checkpoints/x.ipynb", "lost+found/x", "Thumbs.db")


def litter(folder: Path, names: tuple[str, ...] = LITTER) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_what_file_managers_and_the_job_leave_behind_is_harmless(tmp_path, capsys):
    workdir, small = tmp_path / "w", [*SMALL, f"--workdir={tmp_path / 'w'}"]
    litter(workdir, (*LITTER, "slurm-12.out", "train.log"))
    assert status_of(points.EXPERIMENT, "train", *small) == 0
    litter(workdir / "checkpoints")
    litter(workdir / "checkpoints" / "4")
    assert status_of(points.EXPERIMENT, "train", *small, "--train.steps=6", "--train.keep=1") == 0
    assert "training from step 4 to 6" in capsys.readouterr().out
    assert status_of(points.EXPERIMENT, "sample", *small, "--train.steps=6") == 0
    left = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert left == {*(name.split("/")[0] for name in LITTER), "6"}


def test_the_file_that_a_job_prints_into_is_harmless_whatever_its_name(tmp_path, monkeypatch):
    (tmp_path / "console").write_text("x")
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"something else \(console, thesis.tex\)"):
        read_config(place(str(tmp_path)))
    (tmp_path / "thesis.tex").unlink()
    own = os.stat(tmp_path / "console")
    monkeypatch.setattr(os, "fstat", lambda stream: own)
    assert read_config(place(str(tmp_path))) is None


def test_a_run_of_before_goes_on_though_its_sampler_stood_elsewhere(tmp_path):
    small = [*SMALL, f"--workdir={tmp_path / 'w'}"]
    assert status_of(points.EXPERIMENT, "train", *small) == 0
    path = tmp_path / "w" / "config.json"
    config = json.loads(path.read_text())
    config["sampling"]["sampler"] = config.pop("sampler")
    path.write_text(json.dumps(config))
    assert status_of(points.EXPERIMENT, "sample", *small) == 0


def test_another_batch_changes_samples_by_rounding_as_the_help_says(capsys):
    assert status_of(cld_digits.EXPERIMENT, "--help") == 0
    said = " ".join(re.sub("[│|]", " ", capsys.readouterr().out).split())
    assert "changes no sample" not in said
    assert said.count("changes samples by rounding") == 2
    net = dataclasses.replace(cld_digits.EXPERIMENT.net, width=8, multipliers=(1,), attention=())
    colour = dataclasses.replace(cld_digits.EXPERIMENT, data=CelebA(size=8), net=net)
    plan = Plan(colour)
    model = plan.model(plan.init().ema)

    def drawn(batch: int) -> np.ndarray:
        sampling = Sampling(nfe=4, samples=24, batch=batch)
        return draw_samples(plan, model, sampling)[0].astype(int)

    one, other = drawn(24), drawn(8)
    assert one.std() > 10
    assert np.abs(one - other).max() <= 1
    assert np.mean(one != other) < 0.01
