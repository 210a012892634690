"""The reader of PyTorch's files, against files in which anything may be."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import Call, pickled, tensor, write_stream, write_zip

from gddim.errors import UserError
from gddim.torch_reader import read_torch


@pytest.mark.parametrize("write", [write_zip, write_stream])
def test_reader_gives_named_tensors_of_both_file_forms(tmp_path: Path, write):
    values = np.arange(24, dtype="<f4")
    tree = {
        "plain": tensor("0", (2, 3), (3, 1), 24),
        "transposed": tensor("0", (3, 2), (1, 3), 24, 6),
        "scalar": tensor("0", (), (), 24, 5),
        "parameter": Call("torch._utils _rebuild_parameter", (tensor("1", (4,), (1,), 4), True, {})),
    }
    found = read_torch(write(tmp_path / "x.pth", tree, {"0": values.tobytes(), "1": values[:4].tobytes()}))
    np.testing.assert_array_equal(found["plain"], values[:6].reshape(2, 3))
    np.testing.assert_array_equal(found["transposed"], values[6:12].reshape(2, 3).T)
    np.testing.assert_array_equal(found["parameter"], values[:4])
    assert found["scalar"].shape == ()
    assert found["scalar"] == 5


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ({"x": Call("os system", ("echo broken into",))}, "calls os system"),
        ({"x": Call("builtins eval", ("1",))}, "calls builtins eval"),
        ([1, 2], "other than named tensors"),
        ({"x": 3}, "other than named tensors"),
        ({"x": tensor("0", (25,), (1,), 24)}, "reaches outside"),
        ({"x": tensor("0", (2,), (1,), 24, -1)}, "that none can have"),
        ({"x": tensor("0", (2,), (-1,), 24)}, "that none can have"),
        ({"x": tensor("0", (1,), (1,), 24, 24)}, "reaches outside"),
        ({"x": tensor("0", (10**12,), (0,), 24)}, "reaches outside"),
        ({"x": tensor("0", (30,), (1,), 30)}, "has 96 bytes, not 120"),
        ({"x": tensor("9", (3,), (1,), 24)}, "data/9"),
        ({"x": tensor("0", (3,), (1,), 24, kind="ComplexFloatStorage")}, "known are FloatStorage"),
        ({"x": Call("torch load", ())}, "calls torch load"),
    ],
)
def test_reader_refuses_what_is_not_a_plain_tensor(tmp_path: Path, tree: object, why: str):
    path = write_zip(tmp_path / "x.pth", tree, {"0": np.arange(24, dtype="<f4").tobytes()})
    with pytest.raises(UserError, match=why):
        read_torch(path)


def test_reader_knows_no_opcode_that_tensors_do_not_need(tmp_path: Path):
    path = tmp_path / "x.pth"
    for code in (b"\x80\x02ios\nsystem\n.", b"\x80\x02(S'ls'\nios\nsystem\n.", b"\x80\x02cos\nsystem\n)\x81."):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model/data.pkl", code)
        with pytest.raises(UserError, match=r"opcode (INST|STRING)|calls os system"):
            read_torch(path)


def test_reader_refuses_foreign_and_cut_files(tmp_path: Path):
    path = tmp_path / "x.pth"
    unmarked, unfit = b"\x80\x02t.", b"\x80\x02}X\x01\x00\x00\x00aK\x01K\x02s."
    for content in (b"", b"not a checkpoint", unmarked, unfit, pickled([1]), pickled(0x1950A86A20F9469CFC6C)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="no PyTorch checkpoint"):
            read_torch(path)
    write_zip(path, {"x": tensor("0", (2,), (1,), 2)}, {"0": bytes(8)})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="no PyTorch checkpoint"):
        read_torch(path)
