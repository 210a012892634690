"""Files in which anyone may have put anything: each is one line, nothing is executed, memory stays below twice the file."""

import json
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from checkpoint_files import (
    Call,
    Name,
    Object,
    Persistent,
    Raw,
    diffusers_folder,
    edm_net,
    edm_tree,
    encode,
    options_of,
    persistent,
    pickled,
    refused,
    tensor,
    write_zip,
)  # fmt: skip
from etils import epath
from runs import COLOUR

import gddim
from gddim import compact, weights
from gddim.experiment.revival import objects
from gddim.experiment.workdir import OBJECTS, RECORDS, describe
from gddim.nn import NCSNppConfig

TINY = NCSNppConfig(width=4, multipliers=(1, 2), blocks=1, attention=(16,), fir=False, progressive_input="none")
HUGE = 2**40
DDPM = {"style": "ddpm", "groups": 4}


def edm_file(path, **changes):
    config, net = edm_net(**changes)
    tree = edm_tree(net, "SongUNet", options_of(config, 16), sigma_data=0.5)
    path.write_bytes(pickled(tree, protocol=4))
    return path


@pytest.fixture
def nothing_runs(monkeypatch, tmp_path):
    """A file that is obeyed is an error of the test; one that makes files makes them in its folder."""

    def forbidden(*arguments, **options):
        raise AssertionError("a file was obeyed")

    monkeypatch.chdir(tmp_path)
    for name in ("system", "popen", "execv"):
        monkeypatch.setattr(os, name, forbidden)


def laughs(depth=40):
    """Lists, each of the one before twice: a text without an end."""
    each = [b"]\x94" + (b"(h" + bytes([i - 1]) + b"h" + bytes([i - 1]) + b"e" if i else b"") for i in range(depth)]
    return Raw(b"(" + b"".join(each) + b"t")


def snapshot(**options):
    """A network of EDM's with these options, and no parameters."""
    net = persistent("SongUNet", {"_init_kwargs": {**options_of(TINY, 16), **options}, "_modules": {}})
    return pickled({"ema": persistent("EDMPrecond", {"_modules": {"model": net}})}, 4)


def called_again(name, argument, times):
    """One call of a function, with an argument that the file holds once, again and again."""
    start = encode(Name(name)) + b"\x94" + argument + b"\x94\x85\x94"
    return b"\x80\x04" + start + b"h\x00h\x02R" * times + b"."


def deep(depth, opcode=b"\x85"):
    """A tuple in a tuple in a tuple …"""
    return b"\x80\x04" + b")" + opcode * depth + b"."


def stored(values, keys=("7",)):
    """A storage within a pickle."""
    key = Persistent(("storage", Name("torch ByteStorage"), "7", "cpu", len(values)))
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}, key]
    keys = keys if isinstance(keys, Raw) else list(keys)
    return b"".join(map(pickled, [*head, keys])) + struct.pack("<q", len(values)) + values


MALICIOUS = {
    "os.system": pickled({"ema": Call("os system", ("touch broken",))}, 4),
    "posix.system": pickled({"ema": Call("posix system", ("touch broken",))}, 4),
    "eval": pickled({"ema": Call("builtins eval", ("open('broken', 'w')",))}, 4),
    "getattr": pickled({"ema": Call("builtins getattr", ("a", "b"))}, 4),
    "a class by name": pickled({"ema": Object("subprocess Popen", {"args": "ls"})}, 4),
    "source": pickled({"ema": Call("torch_utils.persistence _reconstruct_persistent_obj", ({"module_src": "boom"},))}, 4),
    "torch.load": pickled({"ema": Call("torch load", ("x",))}, 4),
    "text opcodes": b"\x80\x04cos\nsystem\n(S'ls'\ntR.",
    "instance": b"\x80\x04(S'ls'\nios\nsystem\n.",
    "extension": b"\x80\x04\x82\x01.",
    "nested tuples": deep(50_000),
    "nested tuples as a key": b"\x80\x04}" + deep(50_000)[2:-1] + b"Ns.",
    "a list in itself": b"\x80\x04]\x94h\x00a.",
    "a dictionary in itself": b"\x80\x04}\x94X\x03\x00\x00\x00emah\x00s.",
    "many lists": b"\x80\x04" + b"]" * 2_000_000 + b".",
    "many sets": b"\x80\x04" + b"\x8f" * 2_000_000 + b".",
    "a long size, often": called_again("torch Size", b"](" + b"K\x01" * 100_000 + b"e", 10_000),
    "a long text, often": called_again(
        "_codecs encode", encode("x" * 1_000_000) + b"\x94" + encode("latin1") + b"\x86", 10_000
    ),
    "a storage, often": called_again("torch.storage _load_from_bytes", encode(stored(bytes(1_000_000))), 10_000),
    "a storage named by tuples": called_again(
        "torch.storage _load_from_bytes", encode(stored(b"", Raw(b"](" + deep(200_000)[2:-1] + b"e"))), 1
    ),
    "an option of tuples": snapshot(embedding_type=Raw(deep(200_000)[2:-1])),
    "sizes of tuples": snapshot(attn_resolutions=[Raw(deep(200_000)[2:-1])]),
    "an option of lists": snapshot(encoder_type=laughs()),
    "filters of lists": snapshot(resample_filter=laughs()),
    "channels of lists": snapshot(in_channels=laughs(), out_channels=laughs()),
    "many marks": b"\x80\x04" + b"(" * 2_000_000 + b".",
    "a text of 2⁴⁰": b"\x80\x04\x8d" + struct.pack("<Q", HUGE) + b"a.",
    "bytes of 2⁴⁰": b"\x80\x04\x8e" + struct.pack("<Q", HUGE) + b"a.",
    "bytes of 2³²": b"\x80\x04B" + struct.pack("<I", 2**32 - 1) + b"a.",
    "a number of 2³¹ bytes": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
    "a frame of 2⁶³": b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b".",
    "popped too often": b"\x80\x04\x87.",
    "no end": b"\x80\x04}",
    "nothing": b"",
    "storage in storage": pickled(
        {"ema": Call("torch.storage _load_from_bytes", (pickled(Call("torch.storage _load_from_bytes", (b"x",))),))}, 4
    ),
    "a storage of 2⁴⁰": pickled(
        {"ema": Call("torch._utils _rebuild_tensor_v2", (Call("torch.storage _load_from_bytes", (b"\x80\x02.",)), 0))}, 4
    ),
}  # fmt: skip


SAID = {
    **dict.fromkeys(("many lists", "many sets", "a long text, often", "a storage, often"), "too many objects"),
    "nested tuples as a key": "as a key",
    "a long size, often": "not that of a tensor",
    "a storage named by tuples": "the length that its tensors name",
    "an option of tuples": "embedding_type: ((",
    "sizes of tuples": "its attn_resolutions is ((",
    "an option of lists": "encoder_type ([], [[",
    "filters of lists": "resample_filter: ([], [[",
    "channels of lists": "its in_channels is ([], [[",
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_malicious_pickle_is_one_line(tmp_path, nothing_runs, name):
    path = tmp_path / "network-snapshot.pkl"
    path.write_bytes(MALICIOUS[name])
    tracemalloc.start()
    said = refused(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * len(MALICIOUS[name]) + 50e6
    assert SAID.get(name, "") in said
    assert list(tmp_path.iterdir()) == [path]


STATES = {
    "wild strides": ({"x": tensor("0", (2, 2), (HUGE - 1, 1), 24)}, "reaches outside"),
    "an offset of 2⁴⁰": ({"x": tensor("0", (2,), (1,), 24, HUGE)}, "none can have"),
    "a shape of 2⁴⁰": ({"x": tensor("0", (HUGE,), (0,), 24)}, "none can have"),
    "a storage of 2⁴⁰": ({"x": tensor("0", (2,), (1,), HUGE)}, "none can have"),
    "another storage": ({"x": tensor("9", (2,), (1,), 24)}, "data/9"),
    "one storage, many tensors": ({str(i): tensor("0", (24,), (1,), 24) for i in range(400)}, "more than the file"),
    "two descriptions": ({"x": tensor("0", (2,), (1,), 24), "y": tensor("0", (2,), (1,), 12)}, "in two ways"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_malicious_archive_is_one_line(tmp_path, nothing_runs, name):
    model, said = STATES[name]
    path = write_zip(tmp_path / "x.pth", {"model": model, "step": 1}, {"0": bytes(96)})
    if name == "one storage, many tensors":  # each is a few bytes in the file, and would be 4 KiB
        path = write_zip(
            path, {"model": {k: tensor("0", (6000,), (1,), 6000) for k in model}, "step": 1}, {"0": bytes(24000)}
        )
    assert said in refused(path, weights="raw")


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", pickled({"model": {"x": tensor("0", (4,), (1,), 4_000_000)}}))
        archive.writestr("model/data/0", bytes(16_000_000))
    tracemalloc.start()
    assert "compressed" in refused(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_modules_that_are_no_tree_are_refused(tmp_path):
    """Modules of shared modules, thirty levels deep, would be a thousand million parameters."""

    def module(inside):
        made = encode(Object("torch.nn.modules.container ModuleDict", {"_modules": inside}))
        return Raw(made + b"\x94")  # the i-th is kept as number i

    shared = [module({})] + [module({"a": Raw(b"h" + bytes([i])), "b": Raw(b"h" + bytes([i]))}) for i in range(30)]
    net = persistent("SongUNet", {"_init_kwargs": options_of(TINY, 16), "_modules": {"x": Raw(b"h" + bytes([30]))}})
    path = tmp_path / "x.pkl"
    path.write_bytes(pickled({"all": shared, "ema": persistent("EDMPrecond", {"_modules": {"model": net}})}, 4))
    assert "not a tree" in refused(path)


@pytest.mark.parametrize("change", ["length", "end", "shape", "dtype", "header", "missing"])
def test_a_malicious_safetensors_file_is_one_line(tmp_path, change):
    folder = diffusers_folder(tmp_path / "unet", edm_net(**DDPM)[1])
    path = folder / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entry = header["conv_in.weight"]
    match change:
        case "length":
            content = struct.pack("<Q", HUGE) + content[8:]
        case "end":
            entry["data_offsets"] = [0, HUGE]
        case "shape":
            entry["shape"] = [HUGE, HUGE]
        case "dtype":
            entry["dtype"] = "object"
        case "header":
            content = content[:8] + b"[" * length + content[8 + length :]
    if change in ("end", "shape", "dtype"):
        words = json.dumps(header).encode()
        content = struct.pack("<Q", len(words)) + words + content[8 + length :]
    path.write_bytes(content)
    if change == "missing":
        path.unlink()
    refused(folder)


EXPORTED = {
    "blocks": ({"net": {"blocks": 10**9}}, "larger than its"),
    "width": ({"net": {"width": 2**40}}, "larger than its"),
    "levels": ({"net": {"multipliers": [1] * 10**4}}, "larger than its"),
    "transformer": (
        {"net": {"type": "DiTConfig", "width": 4, "heads": 1, "depth": 10**9}, "objects": {}},
        "larger than its",
    ),
    "perceptron": ({"net": {"type": "MLPConfig", "width": 4, "depth": 10**9}, "objects": {}}, "larger than its"),
    "spectrum": (
        {"model": {"data_std": "spectrum "}, "objects": {"data_std": "AAAA"}},
        "configuration is none of a run",
    ),
    "records": ({"records": {}, "data": {"type": "ImageFolder", "path": "/dev/zero"}}, "does not tell the shape"),
    "sampling": ({"sampling": [1]}, "configuration is none of a run"),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_file_that_describes_anything_is_one_line(tmp_path, nothing_runs, name):
    change, said = EXPORTED[name]
    config = describe(COLOUR) | {RECORDS: {"shape": [8, 8, 3]}, OBJECTS: objects(COLOUR)}
    for part, value in change.items():
        whole = not isinstance(value, dict) or not value or "type" in value
        config[part] = value if whole else config.get(part, {}) | value
    file = epath.Path(tmp_path / "x.safetensors")
    arrays = {"net.x": np.ones(40, np.float32)} | {f"net.{i}": np.ones((0, 2**39), np.float32) for i in range(9)}
    weights.write(file, weights.Weights(arrays, config, {}))
    with pytest.raises(gddim.UserError, match=said):
        gddim.load(file)


def test_what_an_exported_file_says_of_itself_is_an_object(tmp_path):
    file = epath.Path(tmp_path / "x.safetensors")
    weights.write(file, weights.Weights({"x": np.ones(4, np.float32)}, {"type": "Experiment"}, [1]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(gddim.UserError, match="no objects"):
        gddim.load(file)


@pytest.mark.parametrize("length", [2**24, 2**62])
def test_long_headers_are_not_read(tmp_path, length):
    """Python makes thirty times as many bytes of them."""
    file = epath.Path(tmp_path / "1-of-1.safetensors")
    file.write_bytes(struct.pack("<Q", length) + b"[" * 2**24)
    tracemalloc.start()
    for read in (weights.read, lambda file: compact.read(file.parent), lambda file: compact.peek(file.parent)):
        with pytest.raises(gddim.UserError, match="header of"):
            read(file)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
