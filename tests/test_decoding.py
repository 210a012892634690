"""Which files are images, and what becomes of their bytes: nothing is lost without a word."""

import struct
import zipfile
import zlib

import numpy as np
import pytest
from data_helpers import pixels, records
from PIL import Image

from gddim.data import ImageFolder, whole_images
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
