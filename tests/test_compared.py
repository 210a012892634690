"""What `python -m gddim.evaluation` takes for two sets of one kind, and what it refuses to compare."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from data_helpers import pixels
from PIL import Image

from experiments import points
from gddim.data import ArraySource, FiveRings
from gddim.errors import UserError
from gddim.evaluation import __main__
from gddim.evaluation.statistics import Statistics
from gddim.experiment.measure import held_out, measured_against

COLOUR = pixels(0, 12, 8, 8, 3)


@pytest.fixture
def fid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run fid in pixels; its status, and what it printed."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["gddim.evaluation", *map(str, words), "--features", "pixels"])
        status = 0
        try:
            __main__.main()
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def photos(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(folder / f"{i:02}.png")
    return folder


def test_a_folder_with_images_is_one_of_images_and_arrays_beside_them_are_told(tmp_path, fid):
    folder = photos(tmp_path / "photos", COLOUR)
    np.save(tmp_path / "a.npy", COLOUR)
    np.savez(folder / "labels.npz", labels=np.arange(24.0).reshape(12, 2))
    status, said = fid("fid", folder, tmp_path / "a.npy")
    assert status == 0
    assert "Fréchet distance 0.0000 (12 and 12" in said
    assert "1 no image that Pillow reads (labels.npz)" in said


def test_a_folder_of_arrays_is_read_as_one_set_of_one_kind(tmp_path, fid):
    (tmp_path / "parts").mkdir()
    np.save(tmp_path / "parts" / "0.npy", COLOUR[:7])
    np.savez(tmp_path / "parts" / "1.npz", samples=COLOUR[7:])
    np.save(tmp_path / "a.npy", COLOUR)
    status, said = fid("fid", tmp_path / "parts", tmp_path / "a.npy")
    assert (status, "Fréchet distance 0.0000 (12 and 12" in said) == (0, True)
    np.save(tmp_path / "parts" / "2.npy", (COLOUR / 127.5 - 1).astype(np.float32))
    status, said = fid("fid", tmp_path / "parts", tmp_path / "a.npy")
    assert (status, said.count("\n")) == (2, 1)
    assert "2.npy holds records float32 (8, 8, 3), not uint8 (8, 8, 3) as those of 0.npy" in said


def test_pixels_are_compared_by_shape_and_not_by_number(tmp_path, fid):
    for name, shape in (("a", (8, 8, 3)), ("wide", (4, 16, 3)), ("flat", (192,))):
        np.save(
            tmp_path / f"{name}.npy", COLOUR.reshape(12, *shape) if len(shape) > 1 else COLOUR.reshape(12, -1) / 255
        )
    assert fid("stats", tmp_path / "wide.npy", tmp_path / "wide.npz")[0] == 0
    for other in ("wide.npy", "wide.npz", "flat.npy"):
        for pair in (("a.npy", other), (other, "a.npy")):
            status, said = fid("fid", *(tmp_path / name for name in pair))
            assert (status, "cannot be compared pixel by pixel" in said) == (2, True), said
    np.save(tmp_path / "nchw.npy", COLOUR.transpose(0, 3, 1, 2))
    assert "transpose(0, 2, 3, 1)" in fid("fid", tmp_path / "nchw.npy", tmp_path / "a.npy")[1]


def test_grey_files_against_a_grey_array_are_told_apart_by_their_cause(tmp_path, fid):
    folder = photos(tmp_path / "grey", COLOUR[..., :1])
    np.save(tmp_path / "grey.npy", COLOUR[..., :1])
    status, said = fid("fid", folder, tmp_path / "grey.npy")
    assert status == 2
    assert "records (8, 8, 3) and (8, 8, 1) cannot be compared pixel by pixel: image files are read in colour" in said


@pytest.mark.parametrize("size", ["0", "-3", "x"])
def test_a_size_of_nothing_is_refused_as_an_option(tmp_path, fid, size):
    status, said = fid("fid", photos(tmp_path / "photos", COLOUR), "digits", "--size", size)
    assert (status, f"{size} given, a number of pixels of at least 1" in said) == (2, True)


def test_an_array_is_no_file_of_statistics(tmp_path):
    np.save(tmp_path / "a.npy", COLOUR)
    with pytest.raises(
        UserError, match=r"a\.npy holds no statistics .* it is one array uint8 \(12, 8, 8, 3\), no \.npz"
    ):
        Statistics.load(tmp_path / "a.npy")


def test_a_run_whose_held_out_records_have_another_shape_does_not_begin():
    @dataclasses.dataclass(frozen=True)
    class Unlike:
        shape = (2,)

        def train(self):
            return ArraySource(np.ones((50, 2), np.float32))

        def test(self):
            return ArraySource(np.ones((20, 3), np.float32))

    experiment = dataclasses.replace(points.EXPERIMENT, data=Unlike())
    for look in (measured_against, held_out):
        with pytest.raises(ValueError, match=r"records \(3,\) are held out, those to train on are \(2,\)"):
            look(experiment)
    alone = dataclasses.replace(points.EXPERIMENT, data=FiveRings(50, 1))
    with pytest.raises(ValueError, match="1 records are held out, at least 2 are needed"):
        held_out(alone)
