"""Statistics files, and features that are taken a part at a time."""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from gddim.data import ArraySource
from gddim.errors import UserError
from gddim.evaluation.features import PixelFeatures
from gddim.evaluation.statistics import Statistics, features_of, source_statistics
from gddim.parallel import batch_sharding, make_mesh


class Told(PixelFeatures):
    """Pixels, and how many samples were taken at a time."""

    def __call__(self, samples: Float[Array, "b *shape"]) -> Float[Array, "b d"]:
        flat = samples.reshape(len(samples), -1)
        return jnp.concatenate([flat, jnp.full((len(samples), 1), len(samples), jnp.float32)], axis=1)


def test_statistics_are_those_of_all_records_and_the_subset_a_sample_of_them():
    source = ArraySource(np.arange(6000, dtype=np.float32)[:, None])
    found = source_statistics(source, PixelFeatures(), "numbers")
    assert found.moments.mean[0] == pytest.approx(2999.5)
    assert found.moments.covariance[0, 0] == pytest.approx(np.var(np.arange(6000), ddof=1))
    assert len(found.subset) == 5000
    assert abs(found.subset.mean() - 2999.5) < 30


@pytest.mark.parametrize("local", [1, 4, 5, 8, 13])
@pytest.mark.parametrize("devices", [1, 8])
def test_features_are_taken_at_most_a_chunk_of_each_device_at_a_time(local: int, devices: int):
    space, x = Told(chunk=4), jax.random.normal(jax.random.key(0), (local * devices, 3, 2))
    sharding = batch_sharding(make_mesh()) if devices > 1 else None
    x = jax.device_put(x, sharding)
    found = features_of(space, x, devices)
    np.testing.assert_array_equal(found[:, :-1], x.reshape(len(x), -1))
    assert np.all(found[:, -1] <= 4 * devices)
    lowered = eqx.filter_jit(lambda x: features_of(space, x, devices)).lower(x)
    program = lowered.compile().compiled.as_text()
    assert not any(word in program for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"origin": np.array(json.dumps({}))}, "features"),
        ({"origin": np.array(json.dumps([]))}, "indices"),
        ({"origin": np.array("{")}, "Expecting"),
        ({"moments.scatter": np.zeros((2, 3))}, "do not fit"),
        ({"moments.mean": np.zeros((3, 1))}, "do not fit"),
        ({"subset": np.zeros(3, np.float32)}, "do not fit"),
        ({"scores.counts": np.zeros(3)}, "argument"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, change: dict, says: str):
    path = tmp_path / "s.npz"
    Statistics.of(np.eye(3, dtype=np.float32), PixelFeatures(), 0, {"features": "pixels"}).save(path)
    with np.load(path) as file:
        arrays = dict(file)
    assert Statistics.load(path).count == 3
    np.savez(path, **(arrays | change))
    with pytest.raises(UserError, match=rf"s\.npz holds no statistics .*{says}"):
        Statistics.load(path)


def test_a_file_that_was_cut_short_says_what_it_lacks(tmp_path: Path):
    np.savez(tmp_path / "s.npz", **{"moments.mean": np.zeros(2)})
    with pytest.raises(UserError, match=r"it lacks the array 'count'"):
        Statistics.load(tmp_path / "s.npz")


def test_moments_of_a_data_set_are_taken_many_records_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """Each merge passes over every covariance: of Inception features eleven of 32 MB, were it done every 32 records."""
    taken, of = [], Statistics.of
    monkeypatch.setattr(Statistics, "of", lambda x, *more: taken.append(len(x)) or of(x, *more))
    numbers = np.random.default_rng(0).permutation(2500)
    source = ArraySource({"x0": numbers.astype(np.float32)[:, None], "label": numbers % 3})
    found = source_statistics(source, PixelFeatures(chunk=24), "numbers")
    assert taken == [1032, 1032, 436]  # the next multiple of 24
    for k, moments in found.classes.items():
        of_class = np.arange(k, 2500, 3)
        assert moments.count == len(of_class)
        np.testing.assert_allclose(moments.mean, of_class.mean())
        np.testing.assert_allclose(moments.scatter, np.var(of_class) * len(of_class))


@pytest.mark.parametrize("classes", [20, 21])
def test_only_a_few_classes_have_moments_of_their_own(classes: int):
    """Also where the last class comes late."""
    labels = np.r_[np.arange(2999) % (classes - 1), classes - 1, -1]
    x0 = np.zeros((3001, 1), np.float32)
    for cond in ({"label": labels}, {"label": labels, "caption": np.zeros((3001, 4))}):
        found = source_statistics(ArraySource({"x0": x0, **cond}), PixelFeatures(), "few")
        assert set(found.classes) == (set(range(20)) if classes == 20 else set())
        assert found.count == 3001
    assert not source_statistics(
        ArraySource({"x0": x0, "caption": np.zeros((3001, 4))}), PixelFeatures(), "none"
    ).classes
