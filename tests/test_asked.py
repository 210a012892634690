"""What a command line asks for counts, or is refused before the work; what it does not ask for is of whom it was given to."""

import dataclasses
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from command_line import refusal, status_of
from runs import COLOUR, WHITE, Colours, LabelledColours, make_run

import gddim
from gddim.data import ArraySource
from gddim.evaluation.cell import ROUNDING
from gddim.evaluation.features import PixelFeatures
from gddim.evaluation.statistics import source_statistics
from gddim.experiment import Evaluation, Model, cli
from gddim.experiment.cli import Command, parse
from gddim.experiment.drawing import draw_samples
from gddim.experiment.measure import Measure, cells
from gddim.experiment.plan import Plan
from gddim.experiment.revival import as_trained
from gddim.experiment.workdir import describe
from gddim.samplers.numbered import sample_numbered

TABLE = Evaluation(samplers=(gddim.GDDIM(1),), nfe=(2,), samples=8, batch=8, features="pixels")


class Known(LabelledColours):
    """Colour images whose classes a classifier may learn."""

    def known_classes(self):
        labels = np.arange(Colours.count) % self.classes
        return labels, labels


KNOWN = dataclasses.replace(COLOUR, data=Known(3), eval=TABLE)
TIMED = dataclasses.replace(COLOUR, sampling=dataclasses.replace(COLOUR.sampling, power=3.0, t_min=0.01), eval=TABLE)


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("known") / "w", KNOWN, steps=(1,))


@pytest.fixture(scope="module")
def timed(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("timed") / "w", TIMED, steps=(1,))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fit", "--classes", "99"], "sampling.classes 99: accepted are 0 to 2, and -1 for no class"),
        (["encode", "--classes", "1"], "--classes is of sample, restore, fit and encode --from, not of encode"),
        (["evaluate", "--per-class=4"], "--per-class is of sample, restore, fit and encode --from, not of evaluate"),
        (["likelihood", "--sampling.classes=1"], "--sampling.classes is of sample, restore, fit and encode --from"),
        (["evaluate", "--sampler=heun", "--sampling.nfe=1"], "nfe: 1 given, but heun with last=none makes at least 2"),
        (["fit", "--process=flow", "--sampling.grid=karras"], "is not finite"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(words, says, known, capsys):
    assert says in refusal(KNOWN, known, capsys, *words)


def test_classes_of_a_run_without_are_refused_by_all_that_follows_training(timed, capsys):
    for verb in ("fit", "sample", "restore"):
        words = ["--task=inpaint"] * (verb == "restore")
        assert "classes 1: this run knows no classes" in refusal(COLOUR, timed, capsys, verb, "--classes", "1", *words)


class OfRecords(Measure):
    """By records, without a workdir."""

    def __init__(self, plan: Plan, reference: ArraySource):
        self.plan, self.space, self.counts = plan, PixelFeatures(), None
        self.reference = source_statistics(reference, self.space, "records")


def test_a_row_tells_an_average_of_a_length_that_was_asked():
    """And nothing else than ever where none was."""

    def weights(**asked: float) -> str:
        plan = Plan(dataclasses.replace(WHITE, sampling=dataclasses.replace(WHITE.sampling, **asked)))
        return OfRecords(plan, Colours().train()).evaluator(plan.init().ema, 1).origin["weights"]

    assert [weights(), weights(ema=0.05), weights(ema=0.1)] == ["EMA", "EMA of σ_rel 0.05", "EMA of σ_rel 0.1"]


def now_and_then(y, sigma, cond=None):
    """A denoiser of something, where it is not of NaN."""
    return jnp.where(y[0, 0, 0] > 0, jnp.nan, y / (1 + sigma))


def test_samples_that_are_not_finite_are_told(capsys):
    model = gddim.through(WHITE.sde, now_and_then)
    sampling = dataclasses.replace(WHITE.sampling, samples=6, nfe=3)
    solver, shape = sampling.method(WHITE.sde, WHITE.data.shape).solver(WHITE.sde), WHITE.data.shape
    alone = sample_numbered(model, solver, shape, jnp.asarray(0), jnp.arange(6)).data
    lost = 6 - int(jnp.isfinite(alone).all((1, 2, 3)).sum())
    assert 0 < lost < 6
    images, _ = draw_samples(Plan(WHITE), model, sampling)
    assert images.dtype == np.uint8
    assert capsys.readouterr().err == f"warning: {lost} of 6 samples are not finite\n"


def test_restored_images_that_are_not_finite_are_told(timed, monkeypatch, capsys):
    monkeypatch.setattr(Plan, "model", lambda plan, params: gddim.through(plan.experiment.sde, now_and_then))
    given = [f"--workdir={timed}", "--task=inpaint", "--restore.images=2", "--restore.samples=3"]
    assert status_of(COLOUR, "restore", *given) == 0
    assert re.search(r"^warning: [1-6] of 6 samples are not finite$", capsys.readouterr().err, re.MULTILINE)


def test_what_of_a_run_cannot_be_read_is_told(capsys):
    config = describe(TIMED) | {"sampler": "table:gone.npz"}
    config["eval"]["samplers"] = ["gddim:7"]
    found = as_trained(COLOUR, config)
    assert (found.sampling, found.eval) == (COLOUR.sampling, COLOUR.eval)
    one, other = sorted(capsys.readouterr().err.splitlines())
    kept = ": the run's cannot be read, and is that of the experiment's file: "
    assert one.startswith(f"eval{kept}")
    assert one.endswith("GDDIM: order=7 must be 1, 2, 3 or 4")
    assert other.startswith(f"sampling{kept}")
    assert "table:gone.npz: No such file" in other
    assert as_trained(COLOUR, describe(TIMED)).sampling == TIMED.sampling
    assert not capsys.readouterr().err


def times(command: Command) -> dict[str, tuple[float, float]]:
    """Power and last time of each process of a table."""
    experiment = command.experiment
    found = {cell.sde: cell.method for cell in cells(experiment, command.everywhere)}
    return {gddim.sde.words.process_name(sde): (method.power, method.t_min) for sde, method in found.items() if sde}


def test_a_table_begins_with_few_calls_of_every_process():
    """So what ends early has them."""
    found = cells(parse(COLOUR, ["evaluate", "--eval.nfe", "3", "9", "--eval.processes", "own", "cld"]).experiment)
    order = [(cell.method.nfe, cell.sde) for cell in found]
    assert [nfe for nfe, _ in order] == sorted(nfe for nfe, _ in order)
    assert len({sde for nfe, sde in order if nfe == 3}) == 2


def test_the_times_of_a_run_are_of_its_process_alone_unless_they_are_asked_for(timed, tmp_path):
    """As in `gddim.load`; and those that a file says are of its process alone, too."""
    for experiment, workdir in ((COLOUR, timed), (TIMED, tmp_path)):
        asked = lambda *words, of=(experiment, workdir): parse(of[0], ["evaluate", f"--workdir={of[1]}", *words])
        for words, expected in (
            ([], (3.0, 0.01)),
            (["--process=own"], (3.0, 0.01)),
            (["--process", "vp"], (3.0, 0.01)),
            (["--process=ve"], (7.0, 0.002)),
            (["--process=ve", "--sampling.t-min=0.5"], (7.0, 0.5)),
            (["--process=cld", "--sampling.power", "5"], (5.0, 1e-3)),
        ):
            sampling = asked(*words).experiment.sampling
            method = sampling.method(sampling.process or COLOUR.sde, COLOUR.data.shape)
            assert (method.power, method.t_min) == expected, words
        both = ["--eval.processes", "own", "ve"]
        assert times(asked(*both)) == {"vp": (3.0, 0.01), "ve": (7.0, 0.002)}
        assert times(asked(*both, "--process=ve")) == {"vp": (2.0, 1e-3), "ve": (7.0, 0.002)}
        assert times(asked(*both, "--sampling.t_min=0.5")) == {"vp": (3.0, 0.5), "ve": (7.0, 0.5)}
    _, solver = gddim.load(timed).through(process="ve", sampler="gddim:2", nfe=3)
    np.testing.assert_allclose(solver.rows.time, gddim.power_grid(80.0, 0.002, 3, power=7)[:-1], rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Fields:
    """As latents of images are: `(H, W, C)`, and no images."""

    shape = (8, 8, 3)

    def train(self) -> ArraySource:
        return ArraySource(2 * np.random.default_rng(0).normal(size=(16, *self.shape)).astype(np.float32))

    test = train


FIELDS = dataclasses.replace(WHITE, data=Fields(), model=Model(data_std=2.0), eval=TABLE)


@pytest.mark.parametrize(("dtype", "most"), [("uint8", 255), ("float32", 3.0)])
def test_floating_fields_are_neither_rounded_nor_clipped(dtype, most):
    plan, sampling = Plan(FIELDS, dtype=dtype), dataclasses.replace(FIELDS.sampling, nfe=2, last="data")
    drawn, _ = draw_samples(plan, gddim.through(WHITE.sde, lambda y, sigma, cond=None: 0 * y + 3), sampling)
    assert drawn.dtype == dtype
    np.testing.assert_allclose(drawn, most, rtol=1e-5)
    measure = OfRecords(plan, Fields().train())
    assert measure.evaluator(plan.init().ema, 1).origin["rounding"] == ("none" if most == 3 else ROUNDING)


def test_a_run_knows_whether_its_records_are_bytes(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "run_training", lambda plan, *_: seen.append(plan.dtype))
    monkeypatch.setitem(cli.AFTERWARDS, "sample", lambda plan, *_, **__: seen.append(plan.dtype))
    for experiment, name in ((FIELDS, "fields"), (WHITE, "white")):
        assert status_of(experiment, "train", f"--workdir={tmp_path / 'new' / name}") == 0
        assert status_of(experiment, "sample", f"--workdir={make_run(tmp_path / name, experiment)}") == 0
    assert seen == ["float32", "float32", "uint8", "uint8"]
    run = tmp_path / "fields"
    assert (
        status_of(FIELDS, "restore", f"--workdir={run}", "--task=sr2", "--restore.samples=1", "--restore.images=2") == 0
    )
    with np.load(run / "restored-sr2.npz", allow_pickle=False) as file:
        assert file["samples"].dtype == np.float32
        assert np.abs(file["samples"]).max() > 1
