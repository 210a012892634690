"""What is too large, of several kinds or of another process is neither read whole, nor mixed up, nor a traceback."""

import functools
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from etils import epath

import gddim
from gddim.data import ArrayFile, FiveRings
from gddim.data.labels import image_classes
from gddim.evaluation import __main__ as command
from gddim.evaluation import statistics
from gddim.evaluation.features import PixelFeatures, check_numbers
from gddim.evaluation.provenance import stable_repr
from gddim.evaluation.report import table
from gddim.sde.blurring import dct2, idct2


class Callable:
    def __call__(self, t):
        return t


def test_a_process_with_functions_is_told_alike_in_every_process():
    of_frequencies = gddim.LinearSDE(
        lambda t: -np.ones((4, 4, 1, 1)), lambda t: 2 * np.ones((4, 4, 1, 1)), np.zeros((1, 1)), basis=(dct2, idct2)
    )
    assert "basis=(gddim.sde.blurring.dct2, gddim.sde.blurring.idct2)" in stable_repr(of_frequencies)
    assert stable_repr(functools.partial(max, 1, key=abs)) == "partial(builtins.max, 1, ('key', builtins.abs))"
    assert stable_repr((1,)) == "(1,)"
    assert stable_repr([1.0, "a"]) == repr([1.0, "a"])
    assert stable_repr(Callable()) == f"{__name__}.Callable"


def test_a_file_of_two_arrays_of_records_keeps_none_of_them_silently(tmp_path):
    a, b = (np.zeros((n, 8, 8, 3), np.uint8) for n in (30, 20))
    np.savez(tmp_path / "x.npz", a, b)
    with pytest.raises(gddim.UserError, match="keep one, or name two train and test"):
        ArrayFile(str(tmp_path / "x.npz")).train()


@pytest.fixture
def peak():
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def test_a_mapped_file_is_not_copied_to_know_its_statistics(tmp_path, monkeypatch, peak):
    images = np.random.default_rng(0).integers(0, 256, (20_000, 16, 16, 3), np.uint8)  # 15 MB
    np.save(tmp_path / "x.npy", images)
    del images
    source = ArrayFile(str(tmp_path / "x.npy"), test_every=0).train()
    small = statistics.source_statistics(FiveRings(20, 20).train(), PixelFeatures(), "rings")
    monkeypatch.setattr(statistics.Statistics, "load", lambda path: small)
    monkeypatch.setattr(type(epath.Path(tmp_path)), "exists", lambda self: True)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    statistics.cached_statistics(source, PixelFeatures(), "x", tmp_path)
    assert peak() - before < 4e6


def test_samples_are_not_read_to_learn_that_they_are_no_statistics(tmp_path, peak):
    np.savez(tmp_path / "samples.npz", samples=np.zeros((20_000, 16, 16, 3), np.uint8))
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    assert command._saved(str(tmp_path / "samples.npz")) is None
    assert peak() - before < 2e6


def test_floating_images_are_rounded_alike_in_an_array_and_in_shards(tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (20, 8, 8, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", images)
    prepared = [sys.executable, "-m", "gddim.data", "prepare", str(tmp_path / "x.npy"), str(tmp_path / "shards")]
    subprocess.run(prepared, check=True, capture_output=True)
    found = [command._source(str(tmp_path / name), None, PixelFeatures()) for name in ("x.npy", "shards")]
    assert [source.dtype for source in found] == [np.uint8] * 2
    whole, kept = ({bytes(image) for image in source[np.arange(len(source))]} for source in found)
    assert len(kept) == 18  # some are held out
    assert kept < whole


def test_pixels_whose_covariance_has_no_room_are_refused():
    check_numbers(PixelFeatures(), (64, 64, 3))
    with pytest.raises(gddim.UserError, match=r"196,608 numbers, whose covariance takes 288 GiB"):
        check_numbers(PixelFeatures(), (256, 256, 3))


def test_a_table_that_is_not_closed_and_numbers_without_end_are_no_traceback():
    names = ["a.png", "b.png"]
    with pytest.raises(gddim.UserError, match=r"labels\.csv cannot be read"):
        image_classes(names, "labels.csv", b'"a.png,1\n' + b"b.png,2\n" * 20_000, Path("x"))
    with pytest.raises(gddim.UserError):
        image_classes(names, "labels.csv", b"a.png,1\nb.png," + b"9" * 5_000, Path("x"))


@pytest.mark.parametrize("change", [{"train_points": -1}, {"test_points": 0}, {"seed": -1}])
def test_rings_that_cannot_be_are_refused_at_once(change):
    with pytest.raises(gddim.UserError, match=f"{next(iter(change))} must be at least"):
        FiveRings(**change)


def row(sampler: str, nfe: int | None, made: float, **metrics: float) -> dict:
    return {
        "cell": {"sampler": sampler, "nfe": nfe, "samples": 500, "seed": 0},
        "provenance": {"process": "VP()", "features": "pixels", "reference": {"source": "digits"}},
        "metrics": {"frechet": 2.0, **metrics},
        "measured": {"nfe": made},
    }


def test_each_class_of_an_adaptive_sampler_is_told():
    of_class = {"frechet of class 0": 3.25}
    alone = table([row("rk45", None, 38.0, **of_class)])
    assert "by class |" in alone
    assert "| rk45 | 3.25 at 38 |" in alone
    beside = table([row("gddim:2", 10, 10.0, **of_class), row("rk45", None, 38.0, **of_class)])
    assert "by class at NFE 10" in beside
    assert "| gddim:2 | 3.25 |" in beside
    assert "| rk45 | 3.25 at 38 |" in beside
