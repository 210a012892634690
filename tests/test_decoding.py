"""Which files are images, and what becomes of their bytes: nothing is lost without a word."""

import struct
import zipfile
import zlib

import numpy as np
import pytest
from data_helpers import pixels, records
from PIL import Image

from gddim.data import ImageFolder, folders, whole_images
from gddim.errors import UserError


def png(path, image, sixteen=False):
    """A PNG of 8 or, which Pillow cannot write in colour, 16 bits a channel."""
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[image.shape[-1]]
    rows = image.astype(">u2" if sixteen else np.uint8)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 16 if sixteen else 8, colour, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(body)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_more_than_8_bits_a_channel_are_refused_in_grey_and_in_colour(tmp_path, channels):
    """Twelve bits of a camera in the sixteen of a file would become 0 … 15."""
    camera = np.random.default_rng(0).integers(0, 4096, (8, 8, channels))
    png(tmp_path / "a.png", camera >> 4)
    np.testing.assert_array_equal(
        records(ImageFolder(str(tmp_path), 8, channels, test_every=0).train())[0], camera >> 4
    )
    png(tmp_path / "a.png", camera, sixteen=True)
    for read in (lambda: ImageFolder(str(tmp_path), 8, channels, test_every=0).train(), lambda: whole_images(tmp_path)):
        with pytest.raises(UserError, match=r"cannot read a\.png \(it has more than 8 bits a channel: scale it to 8\)"):
            read()


def test_16_bits_a_channel_are_refused_in_tiff_and_16_a_pixel_are_not(tmp_path):
    from PIL import TiffImagePlugin

    strip = np.full((8, 8, 3), 40_000, "<u2").tobytes()
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in {256: 8, 257: 8, 258: (16, 16, 16), 259: 1, 262: 2, 277: 3, 278: 8, 279: len(strip)}.items():
        tags[tag] = value
    tags[273] = 0
    with open(tmp_path / "a.tif", "w+b") as file:
        file.write(b"II*\0\x08\0\0\0")
        end = tags.tobytes(8)
        tags[273] = 8 + len(end)
        file.write(tags.tobytes(8) + strip)
    with Image.open(tmp_path / "a.tif") as image:
        assert image.mode == "RGB", "Pillow itself cuts it"
    with pytest.raises(UserError, match="more than 8 bits a channel"):
        whole_images(tmp_path)
    (tmp_path / "a.tif").unlink()
    bitmap = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 70 + 32, 0, 66, 40, 4, 4, 1, 16, 3, 32, 0, 0, 0, 0)
    (tmp_path / "a.bmp").write_bytes(bitmap + struct.pack("<III", 0xF800, 0x07E0, 0x001F) + b"\xff\xff" * 16)
    assert (records(whole_images(tmp_path)) == 255).all()


def tiff(path, image, sample_format=1, planar=False):
    """A TIFF of colours as they are, which Pillow cannot write."""
    from PIL import TiffImagePlugin

    height, width, channels = image.shape
    strips = [x.tobytes() for x in (np.moveaxis(image, 2, 0) if planar else [image])]
    bits, strip = 8 * image.itemsize, sum(map(len, strips)) // len(strips)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    values = {256: width, 257: height, 258: (bits,) * channels, 259: 1, 262: 2 if channels == 3 else 1, 277: channels}
    values |= {278: height, 279: (strip,) * len(strips), 284: 2 if planar else 1, 339: (sample_format,) * channels}
    for tag, value in values.items():
        tags[tag] = value
    tags[273] = tuple(i * strip for i in range(len(strips)))  # from the end of the tags
    path.write_bytes(b"II*\0\x08\0\0\0" + tags.tobytes(8) + b"".join(strips))


def jpeg2000(path, image, kind):
    """With every sample said to be of another kind: its bits less one, and 128 for signed ones."""
    Image.fromarray(image).save(path, "JPEG2000", irreversible=False)
    content = bytearray(path.read_bytes())
    first = content.index(b"\xff\x4f\xff\x51") + 42
    content[first : first + 9 : 3] = bytes([kind] * 3)
    path.write_bytes(content)


def avif(path, image, deep):
    Image.fromarray(image).save(path, "AVIF")
    content = bytearray(path.read_bytes())
    if deep:
        content[content.index(b"av1C") + 6] |= 0x40
        bits = content.index(b"pixi") + 9
        content[bits : bits + 3] = bytes([10] * 3)
    path.write_bytes(content)


CAMERA = np.random.default_rng(0).integers(0, 4096, (8, 8, 3)).astype(np.uint16)
PLAIN = " ".join(map(str, CAMERA.ravel())).encode()
DDS_MASKS = (0x3FF, 0x3FF << 10, 0x3FF << 20, 0)
DEEP = {
    "ppm": lambda path: path.write_bytes(b"P6 8 8 65535\n" + CAMERA.astype(">u2").tobytes()),
    "ppm 12": lambda path: path.write_bytes(b"P6 # of a camera\n8 8 4095\n" + CAMERA.astype(">u2").tobytes()),
    "ppm plain": lambda path: path.write_bytes(b"P3 8 8 4095\n" + PLAIN),
    "pgm": lambda path: path.write_bytes(b"P5 8 8 4095\n" + CAMERA[..., 0].astype(">u2").tobytes()),
    "sgi": lambda path: Image.fromarray((CAMERA >> 4).astype(np.uint8)).save(path, "SGI", bpc=2),
    "tiff": lambda path: tiff(path, CAMERA),
    "tiff planar": lambda path: tiff(path, CAMERA, planar=True),
    "jpeg 2000": lambda path: jpeg2000(path, (CAMERA >> 4).astype(np.uint8), 11),
    "avif": lambda path: avif(path, (CAMERA >> 4).astype(np.uint8), True),
    "dds": lambda path: path.write_bytes(
        struct.pack("<4s7I44x", b"DDS ", 124, 0x1007, 8, 8, 32, 0, 0)
        + struct.pack("<2I4s5I", 32, 0x40, b"", 32, *DDS_MASKS)
        + struct.pack("<5I", 0x1000, 0, 0, 0, 0)
        + bytes(256)
    ),
}


@pytest.mark.parametrize("how", DEEP)
def test_what_8_bits_cannot_hold_is_refused_in_every_format(tmp_path, how):
    """Pillow cuts each to 8 bits, most of them without a word in the mode of the image."""
    DEEP[how](tmp_path / "a.img")
    for channels in (1, 3):
        with pytest.raises(UserError, match="more than 8 bits a channel"):
            ImageFolder(str(tmp_path), 8, channels, test_every=0).train()


@pytest.mark.parametrize("channels", [1, 3])
def test_signed_samples_are_refused_and_unsigned_ones_of_the_same_file_are_read(tmp_path, channels):
    image = np.arange(-96, 96, dtype=np.int8).reshape(8, 8, 3)[..., :channels]
    tiff(tmp_path / "a.tif", image.view(np.uint8))
    read = ImageFolder(str(tmp_path), 8, channels, test_every=0)
    np.testing.assert_array_equal(records(read.train())[0], image.view(np.uint8))
    if channels == 1:
        tiff(tmp_path / "a.tif", image, 2)
    else:  # in TIFF Pillow reads no signed colours
        jpeg2000(tmp_path / "a.tif", image.view(np.uint8), 128 + 7)
    with pytest.raises(UserError, match="its samples are signed: scale them to 0 … 255"):
        read.train()


def test_what_8_bits_hold_is_read_in_every_format(tmp_path):
    image = (CAMERA >> 4).astype(np.uint8)
    (tmp_path / "a.ppm").write_bytes(b"P6 8 8 255\n" + image.tobytes())
    (tmp_path / "b.ppm").write_bytes(b"P6 8 8 15\n" + (image >> 4).tobytes())
    (tmp_path / "c.ppm").write_bytes(b"P3 8 8 255\n" + " ".join(map(str, image.ravel())).encode())
    jpeg2000(tmp_path / "d.jp2", image, 7)
    tiff(tmp_path / "e.tif", image, planar=True)
    Image.fromarray(image).save(tmp_path / "f.dds")
    Image.fromarray(image).save(tmp_path / "g.sgi")
    found = records(ImageFolder(str(tmp_path), 8, test_every=0).train())
    np.testing.assert_array_equal(found[1], (image >> 4) * 17)
    for row in (0, 2, 3, 4, 5, 6):
        np.testing.assert_array_equal(found[row], image)
    avif(tmp_path / "h.avif", np.full((8, 8, 3), 90, np.uint8), False)
    assert len(ImageFolder(str(tmp_path), 8, test_every=0).train()) == 8


def test_transparent_pixels_are_shown_on_white_which_is_told_once(tmp_path, capsys):
    image = pixels(0, 8, 8, 4)
    image[..., 3] = 0
    image[:4, :, 3] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    palette = Image.fromarray(np.repeat([[0] * 8, [1] * 8], 4, axis=0).astype(np.uint8), "L").convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "b.gif", transparency=1)
    grey = Image.fromarray(np.full((8, 8), 7, np.uint8))
    grey.save(tmp_path / "c.png", transparency=7)
    found = records(ImageFolder(str(tmp_path), 8, test_every=0).train())
    np.testing.assert_array_equal(found[0, :4], image[:4, :, :3])
    assert (found[1, :4] == [10, 20, 30]).all()
    assert (found[:2, 4:] == 255).all()
    assert (found[2] == 255).all()
    assert (records(ImageFolder(str(tmp_path), 8, 1, test_every=0).train())[:2, 4:] == 255).all()
    assert capsys.readouterr().err.count("transparent pixels are shown on white") == 1
    np.testing.assert_array_equal(records(ImageFolder(str(tmp_path), 8, 4, test_every=0).train())[0, :4], image[:4])


def test_of_several_frames_the_first_is_taken_which_is_told(tmp_path, capsys):
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pages[0].save(tmp_path / "stack.tiff", save_all=True, append_images=pages[1:])
    source = ImageFolder(str(tmp_path), 8, test_every=0).train()
    np.testing.assert_array_equal(source[np.array([0])][0, 0, 0], [255, 0, 0])
    assert "of several frames the first is taken" in capsys.readouterr().err
    whole = (tmp_path / "stack.tiff").read_bytes()
    (tmp_path / "stack.tiff").write_bytes(whole[: int(0.6 * len(whole))])  # within the second
    cut = ImageFolder(str(tmp_path), 8, test_every=0).train()
    np.testing.assert_array_equal(cut[np.array([0])][0, 0, 0], [255, 0, 0])


def test_any_name_of_an_image_will_do_and_what_is_passed_over_is_told(tmp_path, capsys):
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (photos / ".thumbnails").mkdir(parents=True)
    image = Image.fromarray(np.full((8, 8, 3), 200, np.uint8))
    image.save(photos / "a.jfif", "JPEG")
    image.save(photos / "b.AVIF", "AVIF")
    image.save(photos / "c", "PNG")
    image.save(photos / "d.photo", "WEBP")
    image.save(photos / "E.JPG", "JPEG")
    image.save(elsewhere / "f.png")
    image.save(elsewhere / "deep" / "g.png")
    image.save(photos / ".thumbnails" / "a.png")
    (photos / "._a.png").write_bytes(b"of a Mac")
    (photos / "list.csv").write_text("a,b")
    (photos / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" + bytes(600))
    (photos / "paper.pdf").write_bytes(b"%PDF-1.7")
    (photos / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(photos)  # a circle
    (photos / "lost.png").symlink_to("nowhere")
    assert len(ImageFolder(str(photos), 8, test_every=0).train()) == 7
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"{photos}: 7 images; passed over: ")
    assert set(told.split("passed over: ")[1].split("; ")) == {
        "1 no file, or a link to none (lost.png)",
        "1 linked again (linked/back)",
        "2 hidden (._a.png, .thumbnails/a.png)",
        "3 no image that Pillow reads (Thumbs.db, list.csv, paper.pdf)",
    }
    ImageFolder(str(photos), 8).test()
    assert capsys.readouterr().err == "", "once"


def test_folders_that_a_system_keeps_to_itself_are_passed_over_and_told(tmp_path, monkeypatch, capsys):
    """Of others the images would be missing without need."""
    Image.fromarray(pixels(0, 8, 8, 3)).save(tmp_path / "a.png")
    locked, scandir, stat = ["lost+found", ".Trash-0"], folders.os.scandir, folders.os.stat

    def deny(there):
        def look(path, *args, **kwargs):
            if str(path).endswith(tuple(locked)):
                raise PermissionError(13, "Permission denied", str(path))
            return there(path, *args, **kwargs)

        return look

    monkeypatch.setattr(folders.os, "scandir", deny(scandir))
    monkeypatch.setattr(folders.os, "stat", deny(stat))
    for name in (*locked, "more"):
        (tmp_path / name).mkdir()
    assert len(ImageFolder(str(tmp_path), 8, test_every=0).train()) == 1
    assert "passed over: 2 that cannot be read (lost+found, .Trash-0)" in capsys.readouterr().err
    assert len(whole_images(tmp_path)) == 1
    locked.append("more")
    with pytest.raises(UserError, match=r"more cannot be read \(Permission denied\)"):
        ImageFolder(str(tmp_path), 8, test_every=0).train()


def test_a_set_is_measured_whole_at_the_size_of_its_first_image(tmp_path, capsys):
    """Files that the set does not hold have no say in it."""
    wide, folder = pixels(0, 5, 16, 24, 3), tmp_path / "wide"
    (folder / "__MACOSX").mkdir(parents=True)
    for name in ("._b0.png", "__MACOSX/0.png"):
        (folder / name).write_bytes(b"of a Mac")
    (folder / "a.pdf").write_bytes(b"%PDF-1.7")
    for i, image in enumerate(wide):
        Image.fromarray(image).save(folder / f"b{i}.png")
    with zipfile.ZipFile(tmp_path / "wide.zip", "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder))
    for path in (folder, tmp_path / "wide.zip"):
        np.testing.assert_array_equal(records(whole_images(path)), wide)
        expected = [Image.fromarray(image).resize((8, 8), Image.Resampling.BILINEAR) for image in wide]
        np.testing.assert_array_equal(records(whole_images(path, 8)), np.stack(expected))
    for name in ("b0.png", "b3.png"):
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    with pytest.raises(UserError, match=r"cannot read 2 of 5 images: mend or remove them:\n  b0\.png .*\n  b3\.png "):
        whole_images(folder)
