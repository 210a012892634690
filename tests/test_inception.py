"""The feature network against the published implementation."""

import dataclasses
import hashlib
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
