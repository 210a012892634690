"""The feature network against the published implementation, and the reader of its weight file against hostile files."""

import dataclasses
import hashlib
import struct
import zipfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gddim.errors import UserError
from gddim.evaluation import inception
from gddim.evaluation.inception import InceptionFeatures
from gddim.evaluation.metrics import Moments, frechet_distance
from gddim.evaluation.torch_reader import read_torch

apply = eqx.filter_jit(lambda space, images: space(images))


@pytest.fixture(scope="module")
def space(gddim_data: Path) -> InceptionFeatures:
    return InceptionFeatures.load(gddim_data / "inception" / "pt_inception_trunk.pth")


def cifar(folder: Path, name: str, count: int) -> np.ndarray:
    records = np.fromfile(folder / "cifar-10-batches-bin" / name, np.uint8, count * 3073).reshape(count, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def test_features_equal_the_published_ones(space: InceptionFeatures, gddim_data: Path, fixtures_dir: Path):
    published = np.load(fixtures_dir / "inception_features.npz")["test_first_16"]
    features = np.asarray(apply(space, cifar(gddim_data, "test_batch.bin", 16)))
    assert features.dtype == np.float32
    assert np.abs(features - published).max() < 2e-4


@pytest.mark.slow
def test_frechet_distance_of_300_training_and_300_test_images(
    space: InceptionFeatures, gddim_data: Path, fixtures_dir: Path
):
    published = float(np.load(fixtures_dir / "inception_features.npz")["fid_first_300_train_vs_test"])
    moments = []
    for name in ("data_batch_1.bin", "test_batch.bin"):
        images = cifar(gddim_data, name, 300)
        moments.append(Moments.of(np.concatenate([np.asarray(apply(space, x)) for x in np.split(images, 10)])))
    assert frechet_distance(*moments) == pytest.approx(published, abs=0.02)


@pytest.mark.slow
def test_features_do_not_depend_on_batch_or_devices(space: InceptionFeatures, gddim_data: Path):
    images = cifar(gddim_data, "test_batch.bin", 32)
    whole = np.asarray(apply(space, images))
    parts = np.concatenate([np.asarray(apply(space, part)) for part in np.split(images, 8)])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = np.asarray(apply(space, jax.device_put(images, NamedSharding(mesh, P("data")))))
    np.testing.assert_array_equal(parts, whole)
    np.testing.assert_array_equal(spread, parts)


@pytest.mark.parametrize(("size", "offset"), [(32, 0.5), (299, 0.5), (500, 0.5), (32, 0.0), (299, 0.0)])
def test_interpolation_is_exact_on_a_ramp_between_the_outermost_pixels(size: int, offset: float):
    weights = inception._interpolation(size, "pytorch-fid" if offset else "tf1")
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    expected = np.clip((np.arange(299) + offset) * size / 299 - offset, 0, size - 1)
    np.testing.assert_allclose(weights @ np.arange(size), expected, atol=2e-4)


def test_interpolation_equals_bilinear_resizing_with_pixel_centres_at_half_positions():
    image = np.random.default_rng(0).random((20, 24, 3), np.float32)
    rows, columns = inception._interpolation(20, "pytorch-fid"), inception._interpolation(24, "pytorch-fid")
    expected = jax.image.resize(jnp.asarray(image), (299, 299, 3), "bilinear", antialias=False)
    np.testing.assert_allclose(np.einsum("Hh,hwc,Ww->HWc", rows, image, columns), expected, atol=1e-5)


def test_conventions_are_different_spaces_and_grey_images_are_images(space: InceptionFeatures, gddim_data: Path):
    other = dataclasses.replace(space, convention="tf1")
    assert other.name != space.name
    images = cifar(gddim_data, "test_batch.bin", 4)
    ours, theirs = np.asarray(apply(space, images)), np.asarray(apply(other, images))
    assert 0.1 < np.linalg.norm(ours - theirs) / np.linalg.norm(ours) < 0.4
    grey = images[..., :1]
    np.testing.assert_allclose(apply(space, grey), apply(space, np.repeat(grey, 3, axis=-1)), atol=1e-5)
    with pytest.raises(UserError, match="1 or 3 channels"):
        space(jnp.zeros((1, 8, 8, 2), jnp.uint8))


@pytest.mark.slow
def test_bfloat16_is_a_space_of_its_own_and_tells_by_how_much_it_differs(space: InceptionFeatures, gddim_data: Path):
    half = dataclasses.replace(space, precision="bfloat16")
    images = cifar(gddim_data, "test_batch.bin", 32)
    features = np.asarray(apply(half, images))
    assert features.dtype == np.float32
    exact = np.asarray(apply(space, images))
    (deviation,) = half.details(images).values()
    assert deviation == pytest.approx(np.linalg.norm(features - exact) / np.linalg.norm(exact), rel=1e-2)
    assert 1e-4 < deviation < 0.05
    assert half.name == space.name.replace("float32", "bfloat16") != space.name
    assert space.details(images) == {}
    with pytest.raises(UserError, match="'float16' given, accepted are float32, bfloat16"):
        InceptionFeatures.load(gddim_data / "inception" / "pt_inception_trunk.pth", precision="float16")
    print(f"deviation {deviation:.3%}")


def test_probabilities_are_the_softmax_of_the_last_layer_without_bias():
    kernel = 0.03 * np.random.default_rng(1).standard_normal((2048, 5))
    network = inception.InceptionV3({}, jnp.asarray(kernel, jnp.float32))
    features = np.random.default_rng(2).random((7, 2048), np.float32)
    expected = jax.nn.softmax(jnp.asarray(features @ kernel.astype(np.float32)), axis=1)
    found = InceptionFeatures(network, "", "tf1").probabilities(features)
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_unknown_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"something else")
    with pytest.raises(UserError, match=hashlib.sha256(b"something else").hexdigest()):
        InceptionFeatures.load(file)
    with pytest.raises(UserError, match="no file"):
        InceptionFeatures.load(tmp_path / "missing.pth")
    with pytest.raises(UserError, match="pytorch-fid, tf1"):
        InceptionFeatures.load(file, "pillow")
    monkeypatch.setenv("GDDIM_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"put https.*6726825d.pth into {tmp_path}"):
        InceptionFeatures.load()


@dataclasses.dataclass(frozen=True)
class Name:
    """Pickles as a reference to a global of this name."""

    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """Pickles as a call of a global."""

    name: str
    arguments: tuple


@dataclasses.dataclass(frozen=True)
class Persistent:
    """Pickles as a reference to something outside of the pickle."""

    key: tuple


def encode(value: object) -> bytes:
    """The opcodes of protocol 2 that put a value on the stack, as PyTorch writes them."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"\x8a" + bytes([10]) + value.to_bytes(10, "little", signed=True)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(encode, value)) + b"t"
        case list():
            return b"](" + b"".join(map(encode, value)) + b"e"
        case dict():
            return b"}(" + b"".join(encode(k) + encode(v) for k, v in value.items()) + b"u"
        case Name(name):
            return b"c" + name.replace(" ", "\n").encode() + b"\n"
        case Call(name, arguments):
            return encode(Name(name)) + encode(arguments) + b"R"
        case Persistent(key):
            return encode(key) + b"Q"
    raise TypeError(value)


def pickled(value: object) -> bytes:
    return b"\x80\x02" + encode(value) + b"."


def tensor(key: str, shape: tuple, strides: tuple, count: int, offset: int = 0, kind: str = "FloatStorage") -> Call:
    storage = Persistent(("storage", Name(f"torch {kind}"), key, "cpu", count))
    hooks = Call("collections OrderedDict", ())
    return Call("torch._utils _rebuild_tensor_v2", (storage, offset, shape, strides, False, hooks))


def write_zip(path: Path, tree: object, storages: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickled(tree))
        for key, raw in storages.items():
            archive.writestr(f"model/data/{key}", raw)
    return path


def write_stream(path: Path, tree: object, storages: dict[str, bytes]) -> Path:
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}, tree, list(storages)]
    body = [struct.pack("<q", len(raw) // 4) + raw for raw in storages.values()]
    path.write_bytes(b"".join([*map(pickled, head), *body]))
    return path


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
        ({"x": tensor("0", (2,), (1,), 24, -1)}, "reaches outside"),
        ({"x": tensor("0", (2,), (-1,), 24)}, "reaches outside"),
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
        with pytest.raises(UserError, match=r"opcode (INST|STRING|NEWOBJ)"):
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
