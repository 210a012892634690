"""The user's own files: read exactly, never unpacked, and whatever is broken is named."""

import sys
import zipfile

import numpy as np
import pytest
from data_helpers import files_below, pixels, records
from PIL import Image

from gddim.data import CIFAR10, SVHN, ArrayFile, ArraySource, CelebA, Digits, ImageFolder, __main__, folders
from gddim.errors import UserError

# Folders of images.


@pytest.fixture
def photos(tmp_path):
    """Eleven images, some in a subfolder, one of them grey, and files that are none."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for i in range(10):
        Image.fromarray(pixels(i, 20, 16, 3)).save(folder / ("sub" if i % 2 else ".") / f"{i}.png")
    Image.fromarray(pixels(10, 16, 20)).save(folder / "grey.PNG")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    return folder


def test_a_folder_is_cropped_in_the_centre_and_resized(photos):
    data = ImageFolder(str(photos), size=16)
    train, test = data.train(), data.test()
    assert (len(train), len(test), data.shape, train.flip) == (10, 1, (16, 16, 3), False)
    # In order: 0 2 4 6 8 grey sub/1 sub/3 sub/5 (sub/7 is held out) sub/9.
    for found, seed in ((train[np.array([0])], 0), (train[np.array([6])], 1), (test[np.array([0])], 7)):
        np.testing.assert_array_equal(found[0], pixels(seed, 20, 16, 3)[2:18])
    np.testing.assert_array_equal(train[np.array([5])][0], np.repeat(pixels(10, 16, 20)[:, 2:18, None], 3, axis=2))


def test_resizing_is_antialiased_and_keeps_its_place(tmp_path):
    waves = np.outer(np.sin(np.arange(64) / 9), np.cos(np.arange(64) / 7)) * 100 + 128
    stripes = np.where(np.arange(64) % 2, 20, -20)
    for name in ("a.png", "b.png"):
        Image.fromarray((waves + stripes).astype(np.uint8)).save(tmp_path / name)
    small = records(ImageFolder(str(tmp_path), 16, channels=1).train())[0, :, :, 0]
    mean = waves.reshape(16, 4, 16, 4).mean((1, 3))
    assert np.abs(small[1:-1, 1:-1] - mean[1:-1, 1:-1]).max() < 6


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_channel_count_and_both_ways_of_reading(photos, channels, monkeypatch):
    kept = records(ImageFolder(str(photos), 8, channels).train())
    assert kept.shape == (10, 8, 8, channels)
    monkeypatch.setattr(folders, "_KEEP_DECODED", 0)
    read = ImageFolder(str(photos), 8, channels).train()
    assert isinstance(read, folders.ImageFiles)
    np.testing.assert_array_equal(records(read), kept)
    np.testing.assert_array_equal(read[np.array([7, 2])], kept[[7, 2]])


def test_a_zip_is_read_in_place_and_paths_out_of_it_are_passed_over(photos, tmp_path):
    inside = tmp_path / "x" / "y"
    inside.mkdir(parents=True)
    with zipfile.ZipFile(inside / "photos.zip", "w") as archive:
        for name in files_below(photos):
            archive.write(photos / name, name)
        archive.write(photos / "0.png", "../../evil.png")
    before = files_below(tmp_path)
    zipped = ImageFolder(str(inside / "photos.zip"), 16, test_every=0).train()
    np.testing.assert_array_equal(records(zipped), records(ImageFolder(str(photos), 16, test_every=0).train()))
    assert files_below(tmp_path) == before


def test_an_archive_that_is_none_and_a_link_to_itself_are_told(photos, tmp_path, capsys):
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name in files_below(photos):
            archive.write(photos / name, name)
    Image.fromarray(pixels(0, 16, 16, 3)).save(folder / "one.png")
    assert len(ImageFolder(str(folder), 16, test_every=0).train()) == 1
    assert "1 no file, or a link to none (loop)" in capsys.readouterr().err
    piece = tmp_path / "piece.zip"
    piece.write_bytes((tmp_path / "photos.zip").read_bytes().replace(b"PK\1\2", b"PK\1\3", 1))
    with pytest.raises(UserError, match=r"piece\.zip cannot be read \(.*\); it may be damaged"):
        ImageFolder(str(piece), 16).train()


def cut_short(path):
    Image.fromarray(pixels(0, 64, 64, 3)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:1500])


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>not found</html>"),
    "cut short": cut_short,
    "16 bits": lambda path: Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(path, "PNG"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_image_is_named(photos, how):
    BROKEN[how](photos / "broken.jpg")
    with pytest.raises(UserError, match=r"photos: cannot read broken.jpg \(.+\): mend or remove it") as caught:
        ImageFolder(str(photos), 8).train()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [2**30, 0], ids=["kept", "read"])
def test_all_damaged_images_are_listed_at_once_and_may_be_left_out(photos, keep, monkeypatch, capsys):
    monkeypatch.setattr(folders, "_KEEP_DECODED", keep)
    sound = records(ImageFolder(str(photos), 8, test_every=0).train())
    for name in ("0.png", "sub/9.png"):
        whole = (photos / name).read_bytes()
        (photos / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError) as caught:
        records(ImageFolder(str(photos), 8, test_every=0).train())
    first, *others = str(caught.value).splitlines()
    assert first.endswith(
        "cannot read 2 of 11 images: mend or remove them, or go on without by the option skip-damaged:"
    )
    assert [line.split(" (")[0] for line in others] == ["  0.png", "  sub/9.png"]
    for held_out in (False, True):  # of which one is damaged
        data = ImageFolder(str(photos), 8, test_every=11)
        with pytest.raises(UserError, match="cannot read 2 of 11 images"):
            records(data.test() if held_out else data.train())
    capsys.readouterr()
    rest = ImageFolder(str(photos), 8, test_every=0, skip_damaged=True).train()
    assert "going on without 2 of 11 images, which cannot be read:\n  0.png (" in capsys.readouterr().err
    np.testing.assert_array_equal(records(rest), sound[1:-1])


def test_an_array_of_the_users_code_is_not_taken_for_another_range():
    images = np.linspace(0, 1, 240, dtype=np.float32).reshape(5, 4, 4, 3)
    with pytest.raises(UserError, match=r"these are never below -0\.51: scale those of"):
        ArraySource(images)
    assert len(ArraySource(2 * images - 1)) == 5
    assert len(ArraySource(images.reshape(5, -1))) == 5, "points may lie anywhere"


def test_orientation_is_that_of_the_camera(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image = pixels(0, 4, 4, 3)
    for name in ("a.png", "b.png"):
        Image.fromarray(image).save(tmp_path / name, exif=exif)
    np.testing.assert_array_equal(records(ImageFolder(str(tmp_path), 4).train())[0], image[::-1, ::-1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"path": "nowhere"}, "nowhere does not exist"),
        ({"size": 0}, "size must be positive"),
        ({"channels": 5}, "channels 1 to 4"),
        ({"test_every": 1}, "test_every must be 0 or at least 2"),
        ({"path": "sub/empty"}, "holds no images"),
    ],
)
def test_wrong_folder_options_are_refused(photos, options, says):
    (photos / "sub" / "empty").mkdir()
    path = photos / options.pop("path", "")
    with pytest.raises(UserError, match=says):
        ImageFolder(**{"path": str(path), "size": 8, **options}).train()


def test_celeba_keeps_the_official_partition_and_crop(tmp_path):
    folder = tmp_path / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    ramp = np.broadcast_to(np.arange(178, dtype=np.uint8)[None, :, None], (218, 178, 3))
    for number in (1, 162_770, 162_771, 182_637, 182_638, 202_599):
        Image.fromarray(ramp).save(folder / f"{number:06}.jpg", quality=95)
    train, test = CelebA(str(tmp_path)).train(), CelebA(str(tmp_path)).test()
    assert (len(train), len(test), train.shape, train.flip) == (2, 2, (64, 64, 3), True)
    expected = 19 + (np.arange(64) + 0.5) * 140 / 64 - 0.5
    assert np.abs(records(train)[0, :, 2:-2] - expected[None, 2:-2, None]).max() < 3
    np.testing.assert_array_equal(records(CelebA(str(folder)).test()), records(test))
    with pytest.raises(UserError, match=r"put img_align_celeba.zip .* there"):
        CelebA(str(folder.rename(folder.with_name("elsewhere")).parent)).train()


def test_what_lies_beyond_the_square_leaves_no_trace(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    Image.fromarray(wide).save(tmp_path / "0.png")
    assert (records(ImageFolder(str(tmp_path), size=8, test_every=0).train()) == 255).all()


# NumPy files.


def test_numpy_files(tmp_path):
    images = pixels(0, 25, 5, 4, 5)
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "one.npz", anything=images)
    np.savez(tmp_path / "two.npz", train=images[:20], test=images[20:])
    np.savez(tmp_path / "others.npz", images, np.arange(25))
    np.savez(tmp_path / "ours.npz", samples=images, gddim=np.array("{}"))
    np.save(tmp_path / "points.npy", np.linspace(-7, 7, 40).reshape(20, 2))
    for name in ("a.npy", "one.npz", "others.npz", "ours.npz"):
        data = ArrayFile(str(tmp_path / name))
        assert data.shape == (5, 4, 5)
        np.testing.assert_array_equal(records(data.test()), images[[9, 19]])
        np.testing.assert_array_equal(records(data.train()), np.delete(images, [9, 19], axis=0))
    np.testing.assert_array_equal(records(ArrayFile(str(tmp_path / "two.npz")).test()), images[20:])
    assert ArrayFile(str(tmp_path / "points.npy")).train().dtype == np.float32


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (np.array([{"a": 1}], dtype=object), "cannot read .*bad.npy"),
        (np.zeros((5, 4, 4, 3), np.int64), "must hold images .* not int64"),
        (np.full((5, 4, 4, 3), 255.0), r"must lie in \[-1, 1\], found 255 to 255"),
        (
            np.linspace(0, 1, 240).reshape(5, 4, 4, 3),
            r"must lie in \[-1, 1\], found 0 to 1: scale those of \[0, 1\] by 2x - 1",
        ),
        (np.linspace(-1e-6, 1, 240).reshape(5, 4, 4, 3), r"found -1e-06 to 1: scale those of \[0, 1\]"),
        (np.linspace(-0.5, 0.5, 240).reshape(5, 4, 4, 3), r"found -0.5 to 0.5: .* those of \[-0.5, 0.5\] by 2x"),
        (np.linspace(0, 1, 80).reshape(5, 4, 4), r"found 0 to 1: scale .* make it \(5, 4, 4, 1\)"),
        (np.zeros((5, 3, 8, 8), np.uint8), r"bad.npy: \(5, 3, 8, 8\): images must .* by transpose\(0, 2, 3, 1\)"),
        (np.zeros((5, 16, 16), np.uint8), r"not uint8 \(5, 16, 16\); of grey images make it \(5, 16, 16, 1\)"),
        (np.full((5, 2), np.nan), "not finite"),
        (np.zeros((1, 2)), "nothing to hold out"),
        (b"junk", "cannot read .*bad.npy"),
    ],
)
def test_wrong_numpy_files_are_named(tmp_path, content, says):
    path = tmp_path / "bad.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content, allow_pickle=True)
    with pytest.raises(UserError, match=says):
        ArrayFile(str(path)).train()


def test_training_and_held_out_records_of_unlike_shapes_are_refused_at_once(tmp_path):
    for train, test in (((50, 2), (20, 3)), ((9, 8, 8, 3), (9, 4, 8, 3))):
        np.savez(tmp_path / "a.npz", train=np.full(train, -1.0), test=np.full(test, -1.0))
        for read in (ArrayFile(str(tmp_path / "a.npz")).train, ArrayFile(str(tmp_path / "a.npz")).test):
            with pytest.raises(UserError, match=r"in train and .* in test: both must be of one shape"):
                read()


# The command line.


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gddim.data", *map(str, arguments)])
    try:
        __main__.main()
    except SystemExit as end:
        return end.code
    return 0


def test_prepare_and_std_from_the_command_line(photos, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "prepare", photos, tmp_path / "shards", "--size", 16) == 0
    assert "10 records to train, 1 held out" in capsys.readouterr().out
    for source, options in ((photos, ["--size", 16]), (tmp_path / "shards", [])):
        spectrum = tmp_path / f"{source.name}.npz"
        assert command(monkeypatch, "std", source, *options, "--spectrum", spectrum) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == printed[2] == "10 records (16, 16, 3): " + printed[0].split(": ")[1]
    with np.load(tmp_path / "photos.npz") as a, np.load(tmp_path / "shards.npz") as b:
        np.testing.assert_array_equal(a["rms"], b["rms"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["prepare", "cifar11", "dest"], "no data set cifar11: give digits, five-rings, cifar10"),
        (["prepare", "{photos}", "dest"], "say --size"),
        (["std", "digits", "--spectrum", "no/such/folder.npz"], "a new file in a folder that exists"),
        (["std", "five-rings", "--spectrum", "s.npz"], "needs images"),
        (["std", "digits", "--spectrum", "/proc/s.npz"], "No such file or directory"),
        (["std", "empty.npy", "--test-every", "0"], "the data set is empty"),
        (["std", "digits", "--size", "32"], "--size says nothing about digits, which takes --labels"),
        (
            ["prepare", "celeba", "dest", "--channels", "1"],
            "--channels says nothing about celeba, which takes --root, --size",
        ),
    ],
)
def test_wrong_commands_end_in_one_line_and_write_nothing(photos, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(photos.parent)
    np.save("empty.npy", np.zeros((0, 8, 8, 3), np.uint8))
    before = files_below(photos.parent)
    assert command(monkeypatch, *(argument.format(photos=photos) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert files_below(photos.parent) == before


def test_building_a_data_set_reads_nothing():
    for data in (CIFAR10("x"), SVHN("x"), CelebA("x"), ImageFolder("x", 8), ArrayFile("x"), Digits()):
        hash(data)
    assert CIFAR10("x").shape == (32, 32, 3)
    assert CelebA("x").shape == (64, 64, 3)
