"""The classes of records: where each kind of data set has them, that they stay beside their records, what is refused."""

import dataclasses
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import pixels, records
from PIL import Image

from experiments import cld_digits
from gddim.data import CIFAR10, SVHN, ArrayFile, ArraySource, Digits, FiveRings, ImageFolder, Shards, identity, prepare
from gddim.data import __main__ as command
from gddim.data.labels import check_labels, classes_of, cond_of
from gddim.errors import UserError
from gddim.evaluation.classes import classify
from gddim.experiment.workdir import describe

COUNT = 24
IMAGES = pixels(0, COUNT, 8, 8, 3)
LABELS = (np.arange(COUNT) % 3).astype(np.int32)
IMAGES[:, 0, 0, 0] = LABELS  # an image tells its class
NAMES = ["cat", "dog", "owl"]


def files(folder: Path, name) -> list[str]:
    """The images as files of these names."""
    names = [name(i) for i in range(COUNT)]
    for i, each in enumerate(names):
        (folder / each).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[i]).save(folder / each)
    return names


def by_folder(tmp_path: Path) -> ImageFolder:
    files(tmp_path / "photos", lambda i: f"all/{NAMES[i % 3]}/more/{i:02}.png")
    return ImageFolder(str(tmp_path / "photos"), 8, labels=True)


def by_json(tmp_path: Path) -> ImageFolder:
    """As EDM's dataset_tool writes it, in an archive."""
    names = files(tmp_path / "flat", lambda i: f"{i // 10:05}/img{i:08}.png")
    told = {"labels": [[name, int(LABELS[i])] for i, name in enumerate(names)]}
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / "flat" / name, name)
        archive.writestr("dataset.json", json.dumps(told))
    return ImageFolder(str(tmp_path / "flat.zip"), 8, labels=True)


def by_json_below(tmp_path: Path) -> ImageFolder:
    """As a desktop packs it: all in one folder of the archive."""
    by_json(tmp_path)
    with zipfile.ZipFile(tmp_path / "flat.zip") as flat, zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
        for name in flat.namelist():
            packed.writestr(f"cifar/{name}", flat.read(name))
    return ImageFolder(str(tmp_path / "packed.zip"), 8, labels=True)


def by_csv(tmp_path: Path) -> ImageFolder:
    names = files(tmp_path / "listed", lambda i: f"{i:02}.png")
    lines = ["file,class", *(f"{name}, {NAMES[LABELS[i]]}" for i, name in enumerate(names))]
    (tmp_path / "listed" / "labels.csv").write_text("\n".join(lines))
    return ImageFolder(str(tmp_path / "listed"), 8, labels=True)


def by_array(tmp_path: Path) -> ArrayFile:
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS.astype(np.int64))
    return ArrayFile(str(tmp_path / "a.npz"), labels=True)


def by_samples(tmp_path: Path) -> ArrayFile:
    np.savez(tmp_path / "samples.npz", IMAGES, LABELS)
    return ArrayFile(str(tmp_path / "samples.npz"), labels=True)


def by_shards(tmp_path: Path) -> Shards:
    prepare(by_csv(tmp_path), tmp_path / "shards", shard_bytes=5 * 192)
    return Shards(str(tmp_path / "shards"), labels=True)


def test_a_class_that_was_added_is_seen(tmp_path):
    data = by_folder(tmp_path)
    assert data.classes == 3
    shutil.copytree(tmp_path / "photos" / "all" / NAMES[0], tmp_path / "photos" / "all" / "zebra")
    assert dataclasses.replace(data).classes == 4


KINDS = [by_folder, by_json, by_json_below, by_csv, by_array, by_samples, by_shards]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_set_has_the_classes_of_its_records(tmp_path, kind):
    data = kind(tmp_path)
    assert data.classes == classes_of(data) == 3
    assert cond_of(data) == {"label": 0}
    for source, count in ((data.train(), 22), (data.test(), 2)):
        found = records(source)
        assert (len(source), found["label"].dtype) == (count, np.int32)
        np.testing.assert_array_equal(found["label"], found["x0"][:, 0, 0, 0])
        scattered = source[np.array([1, 0])]
        np.testing.assert_array_equal(scattered["label"], scattered["x0"][:, 0, 0, 0])
        check_labels(data, source, "here")


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_option_records_are_what_they_were(tmp_path, kind):
    plain = dataclasses.replace(kind(tmp_path), labels=False)
    assert (plain.classes, cond_of(plain)) == (0, None)
    assert isinstance(records(plain.train()), np.ndarray)
    assert "labels" not in describe(plain)
    assert describe(dataclasses.replace(plain, labels=True))["labels"] is True


def test_what_records_are_depends_on_their_classes_and_not_on_where_these_are_told(tmp_path):
    places = [tmp_path / kind.__name__ for kind in (by_csv, by_shards, by_array)]
    for place in places:
        place.mkdir()
    kinds = zip((by_csv, by_shards, by_array), places, strict=True)
    found = [identity(kind(place).train()) for kind, place in kinds]
    assert len({each["digest"] for each in found}) == 1
    shards = Shards(str(tmp_path / "by_shards" / "shards"))
    alone = identity(shards.train())["digest"]
    assert (
        alone == identity(dataclasses.replace(by_csv(tmp_path), labels=False).train())["digest"] != found[0]["digest"]
    )


def test_images_that_are_read_later_have_their_classes_too(tmp_path, monkeypatch):
    monkeypatch.setattr("gddim.data.folders._KEEP_DECODED", 0)
    source = by_folder(tmp_path).train()
    assert not isinstance(source, ArraySource)
    found = records(source)
    np.testing.assert_array_equal(found["label"], found["x0"][:, 0, 0, 0])
    stamps = {identity(source)["stamp"]}
    (tmp_path / "photos" / "all" / "ant").mkdir()  # moves every class by one
    Image.fromarray(IMAGES[0]).save(tmp_path / "photos" / "all" / "zoo.png")
    (tmp_path / "photos" / "all" / "zoo.png").rename(tmp_path / "photos" / "all" / "ant" / "zz.png")
    stamps.add(identity(by_folder(tmp_path).train())["stamp"])
    assert len(stamps) == 2


def test_a_damaged_image_takes_its_class_with_it(tmp_path):
    data = dataclasses.replace(by_csv(tmp_path), skip_damaged=True)
    (tmp_path / "listed" / "03.png").write_bytes(b"\x89PNG no more")
    found = records(data.train())
    assert len(found["label"]) == 21
    np.testing.assert_array_equal(found["label"], found["x0"][:, 0, 0, 0])


def test_folders_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    for name in ("10", "9", "0"):
        (tmp_path / name).mkdir()
        Image.fromarray(IMAGES[0]).save(tmp_path / name / "a.png")
    assert records(ImageFolder(str(tmp_path), 8, labels=True, test_every=0).train())["label"].tolist() == [0, 2, 1]


def test_digits_and_rings_have_theirs():
    for data, classes, one in ((Digits(labels=True), 10, 150), (FiveRings(1000, 500, labels=True), 5, 200)):
        plain = dataclasses.replace(data, labels=False)
        for labelled, source in ((data.train(), plain.train()), (data.test(), plain.test())):
            found = records(labelled)
            np.testing.assert_array_equal(found["x0"], records(source))
            counts = np.bincount(found["label"])
            assert (data.classes, len(counts), found["label"].dtype) == (classes, classes, np.int32)
        assert abs(np.bincount(records(data.train())["label"]) - one).max() < 30
    np.testing.assert_array_equal(records(Digits(labels=True).test())["label"], Digits().known_classes()[1])


def test_cifar10_has_its_classes():
    try:
        data = CIFAR10(labels=True)
        found = records(data.test())
    except UserError as error:
        pytest.skip(str(error))
    assert found["label"][:6].tolist() == [3, 8, 8, 0, 6, 6], "cat, ship, ship, airplane, frog, frog"
    assert (np.bincount(found["label"]) == 1000).all()
    np.testing.assert_array_equal(found["x0"], records(CIFAR10().test()))


def test_ten_stands_for_the_digit_zero_of_svhn(tmp_path, monkeypatch):
    from scipy.io import savemat

    found = {"X": IMAGES.transpose(1, 2, 3, 0), "y": np.array([[10], [1], [9]] * 8, np.uint8)}
    savemat(tmp_path / "test_32x32.mat", found)
    monkeypatch.setattr("gddim.data.official.digest", lambda *_: "e")
    monkeypatch.setattr("gddim.data.official._SVHN_MD5", {"test_32x32.mat": "e"})
    data = SVHN(str(tmp_path), labels=True)
    assert data.classes == 10
    assert records(data.test())["label"][:3].tolist() == [0, 1, 9]


# What is refused, in one line.


def refused(says: str, data, part: str = "train") -> None:
    with pytest.raises(UserError, match=says) as caught:
        getattr(data, part)()
    assert "\n" not in str(caught.value)


def test_images_without_a_label_are_named(tmp_path):
    data = by_folder(tmp_path)
    Image.fromarray(IMAGES[0]).save(tmp_path / "photos" / "all" / "stray.png")
    refused(r"1 of 25 images have no label \(all/stray.png\): give each a folder of its class, or tell", data)
    names = files(tmp_path / "flat", lambda i: f"{i}.png")
    flat = ImageFolder(str(tmp_path / "flat"), 8, labels=True)
    refused(r"24 of 24 images have no label \(0.png, 1.png, 10.png, …\): give each a folder", flat)
    for content in ({"labels": None}, {"labels": [[name, 0] for name in names[1:]]}):
        (tmp_path / "flat" / "dataset.json").write_text(json.dumps(content))
        refused(r"of 24 images have no label .*: dataset.json must tell those of all", flat)
    refused(r"has no labels: prepare it anew, .* --labels", dataclasses.replace(unlabelled(tmp_path), labels=True))


def unlabelled(tmp_path: Path) -> Shards:
    prepare(dataclasses.replace(by_csv(tmp_path), labels=False), tmp_path / "plain")
    return Shards(str(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([-1], "dataset.json: labels must be 0 to 65,535, and 24 of 24 are not: record 0 has -1"),
        ([10**20], "labels must be 0 to 65,535, and 24 of 24 are not"),
        ([[0, 1]], r"dataset.json must be .*; it cannot be read \(ValueError\('label \[0, 1\]'\)\)"),
        ([1.5], r"dataset.json must be .*label 1.5"),
    ],
    ids=["below", "above", "one-hot", "no whole number"],
)
def test_labels_of_a_table_that_are_none(tmp_path, labels, says):
    names = files(tmp_path, lambda i: f"{i:02}.png")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[name, *labels] for name in names]}))
    refused(says, ImageFolder(str(tmp_path), 8, labels=True))
    (tmp_path / "dataset.json").write_text("{")
    refused("dataset.json must be", ImageFolder(str(tmp_path), 8, labels=True))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": IMAGES}, "has no labels: they are an array labels of a .npz file, one of each record"),
        (
            {"images": IMAGES, "labels": LABELS[:5]},
            r"labels must be whole numbers \(24,\), one of a record, not int32 \(5,\)",
        ),
        ({"images": IMAGES, "labels": np.eye(3)[LABELS]}, r"must be whole numbers \(24,\), .* not float64 \(24, 3\)"),
        ({"images": IMAGES, "labels": LABELS - 1}, "labels must be 0 to 65,535, and 8 of 24 are not: record 0 has -1"),
        ({"train": IMAGES, "test": IMAGES, "labels": LABELS}, "has no labels: they are an array train_labels"),
    ],
    ids=["missing", "too few", "one-hot", "below", "of which part"],
)
def test_labels_of_an_array_file_that_are_none(tmp_path, arrays, says):
    np.savez(tmp_path / "a.npz", **arrays)
    data = ArrayFile(str(tmp_path / "a.npz"), labels=True)
    refused(says, data)
    with pytest.raises(UserError, match=says):
        _ = data.classes


def test_labels_of_a_data_set_of_ones_own_that_are_none(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Own:
        classes = 3

    for records_, says in (
        ({"x0": IMAGES, "label": LABELS + 1}, "here: labels must be 0 to 2, and 8 of 24 are not: record 2 has 3"),
        ({"x0": IMAGES, "label": LABELS / 2}, "here: labels must be whole numbers"),
        ({"x0": IMAGES}, "here: records of 3 classes need a 'label'"),
        (IMAGES, "here: records of 3 classes need a 'label'"),
    ):
        with pytest.raises(UserError, match=says):
            check_labels(Own(), ArraySource(records_), "here")


def test_shards_take_labels_from_the_command_line_and_lose_none(tmp_path, monkeypatch, capsys):
    by_array(tmp_path)
    dest = tmp_path / "dest"
    words = ["gddim.data", "prepare", str(tmp_path / "a.npz"), str(dest), "--labels"]
    monkeypatch.setattr("sys.argv", words)
    command.main()
    assert "22 records to train, 2 held out" in capsys.readouterr().out
    data = Shards(str(dest), labels=True)
    found = records(data.train())
    np.testing.assert_array_equal(found["label"], found["x0"][:, 0, 0, 0])
    (beside,) = dest.glob("train-*.labels.npy")
    whole = beside.read_bytes()
    for content in (b"none", b"", whole[:-1] + b"\x01"):
        beside.write_bytes(content)
        refused(r"labels of .* cannot be read \(.*damaged\): prepare it again", data)
        command.main()
        assert beside.read_bytes() == whole
    beside.unlink()
    refused(r"lacks train-00000.array_record or a part of it", data)
    command.main()
    assert identity(data.train())["digest"] == identity(by_array(tmp_path).train())["digest"]


def test_the_main_job_is_described_as_it_was():
    assert describe(cld_digits.EXPERIMENT)["data"] == {"type": "Digits"}


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({0: "0.5"}, "labels must be all whole numbers, or all words, not 0.5"),
        ({1: "ten"}, "labels must be all whole numbers, or all words, not 1 and ten"),
        ({1: ""}, r"1 of 3 images have no label \(01.png\)"),
        ({3: "2"}, "labels.csv tells 02.png twice, as 1 and as 2"),
    ],
)
def test_a_table_in_which_a_label_is_no_class_is_refused_and_renumbers_nothing(tmp_path, told, says):
    for i, name in enumerate(["00.png", "01.png", "02.png"]):
        Image.fromarray(IMAGES[i]).save(tmp_path / name)
    lines = [f"{i:02}.png,{told.get(i, '1')}" for i in range(3)] + [f"02.png,{told.get(3)}"] * (3 in told)
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match=says):
        ImageFolder(str(tmp_path), 8, labels=True).train()


class TwoGreys:
    """Labelled records, dark ones and light ones."""

    labels = np.arange(40) % 2

    def train(self) -> ArraySource:
        greys = np.random.default_rng(0).integers(0, 50, (40, 4, 4, 1)) + 200 * self.labels[:, None, None, None]
        return ArraySource(greys.astype(np.uint8))

    test = train

    def known_classes(self) -> tuple[np.ndarray, np.ndarray]:
        return self.labels, self.labels


def test_a_classifier_tells_what_it_finds_beside_what_was_asked():
    samples = TwoGreys().train()[np.array([0, 2, 1, 3])]
    found = classify(TwoGreys(), samples, np.array([0, 0, 0, 1]))
    assert (found["shares"], found["shares_asked"]) == ({0: 0.5, 1: 0.5}, {0: 0.75, 1: 0.25})
    assert (found["as_asked"], found["accuracy_real"]) == (0.75, 1.0)
    assert not {"shares_asked", "as_asked"} & classify(TwoGreys(), samples).keys()
