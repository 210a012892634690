"""Data: the order of records, prefetching, pixels, and the sources that need no file."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gddim.data import ArraySource, Digits, FiveRings, batch_indices, batches, prefetch, random_flip, to_uint8, to_unit
from gddim.data.moments import moments, spectrum
from gddim.errors import UserError


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def numbered(n):
    """A source whose record number r is the point (r,)."""
    return ArraySource(np.arange(n, dtype=np.float32)[:, None])


# Order of records.


@given(
    n=st.integers(1, 3000), batch_size=st.integers(50, 5000), seed=st.integers(0, 2**64), epoch=st.integers(0, 10**6)
)
def test_every_epoch_is_an_exact_permutation(n, batch_size, seed, epoch):
    first, last = epoch * n // batch_size, ((epoch + 1) * n - 1) // batch_size
    drawn = np.concatenate([batch_indices(n, batch_size, seed, i) for i in range(first, last + 1)])
    ids = drawn[epoch * n - first * batch_size :][:n]
    np.testing.assert_array_equal(np.sort(ids), np.arange(n))


@given(n=st.integers(1, 500), a=st.integers(1, 64), b=st.integers(1, 64), seed=st.integers(0, 99))
def test_the_order_does_not_depend_on_the_batch_size(n, a, b, seed):
    by_a = np.concatenate([batch_indices(n, a, seed, i) for i in range(b)])
    by_b = np.concatenate([batch_indices(n, b, seed, i) for i in range(a)])
    np.testing.assert_array_equal(by_a, by_b)


def test_epochs_and_seeds_are_shuffled_independently_and_uniformly():
    n, epochs = 10, 4000
    order = batch_indices(n, n * epochs, 3, 0).reshape(epochs, n)
    place, follows = np.zeros((n, n)), np.zeros((n, n))
    for p in range(n):
        place[p] = np.bincount(order[:, p], minlength=n)
    for row in order:
        follows[row[:-1], row[1:]] += 1
    expected = epochs / n
    assert ((place - expected) ** 2 / expected).sum() < 81 + 5 * (2 * 81) ** 0.5
    pairs = follows[~np.eye(n, dtype=bool)]
    assert ((pairs - expected) ** 2 / expected).sum() < 89 + 5 * (2 * 89) ** 0.5
    assert len(np.unique(order, axis=0)) > 0.99 * epochs

    big = [batch_indices(50_000, 50_000, seed, i) for seed in (0, 1) for i in (0, 1)]
    for i, a in enumerate(big):
        for b in big[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
            assert (a == b).sum() < 10


def test_the_order_is_the_same_in_every_version():
    np.testing.assert_array_equal(batch_indices(50_000, 6, 8, 12_345_678), ORDER)


ORDER = [2041, 42049, 49458, 48934, 49228, 26483]


@settings(max_examples=15)
@given(n=st.integers(1, 300), share=st.integers(1, 5), count=st.integers(1, 6), start=st.integers(0, 10**9))
def test_the_global_batch_is_the_same_for_any_number_of_processes(n, share, count, start):
    source, size = numbered(n), share * count
    whole = next(batches(source, size, seed=5, start=start))
    parts = [next(batches(source, size, 5, start, index, count)) for index in range(count)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(whole[:, 0], batch_indices(n, size, 5, start))


def test_batches_restart_anywhere():
    source = numbered(257)
    all_of_them = take(batches(source, 16, seed=1), 40)
    for start in (1, 16, 17, 33):
        again = take(batches(source, 16, seed=1, start=start), 7)
        np.testing.assert_array_equal(again, all_of_them[start : start + 7])


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"batch_size": 7, "process_count": 2}, {"process_index": 1}, {"start": -1}]
)
def test_sizes_that_do_not_fit_are_refused(wrong):
    with pytest.raises(UserError):
        batches(**{"source": numbered(10), "batch_size": 4, "seed": 0, **wrong})


def test_an_empty_source_is_refused():
    with pytest.raises(UserError, match="empty"):
        batches(numbered(0), 4, seed=0)


# Prefetching.


def prefetch_threads():
    """Threads that still run after at most 5 s of grace: Grain's end when they notice, not at once."""
    deadline = time.monotonic() + 5
    while True:
        running = [t for t in threading.enumerate() if t.name.startswith(("gddim-prefetch", "grain-prefetch"))]
        if not running or time.monotonic() > deadline:
            return running
        time.sleep(0.01)


def test_prefetch_keeps_order_and_works_ahead():
    placed = []
    ahead = prefetch(range(10), lambda x: placed.append(x) or 2 * x, depth=3)
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(placed) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert placed == [0, 1, 2, 3]
    assert list(ahead) == list(range(2, 20, 2))
    assert not prefetch_threads()


def test_prefetch_raises_in_place_and_stops():
    def broken(x):
        if x == 3:
            raise UserError("photo.png: not a readable image")
        return x

    ahead = prefetch(range(10), broken)
    assert take(ahead, 3) == [0, 1, 2]
    with pytest.raises(UserError, match="photo"):
        next(ahead)
    assert not prefetch_threads()


class OnDisk:
    """A source that Grain's threads read."""

    def __init__(self, source: ArraySource):
        self._source = source
        self.shape, self.dtype, self.flip = source.shape, source.dtype, source.flip

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, indices):
        return self._source[indices]


@pytest.mark.parametrize("where", [lambda source: source, OnDisk], ids=["memory", "disk"])
def test_closing_prefetch_ends_every_thread(where):
    placed = []

    def place(batch):
        time.sleep(0.05)
        placed.append(batch)
        return batch

    ahead = prefetch(batches(where(numbered(100)), 8, seed=0), place)
    assert next(ahead).shape == (8, 1)
    ahead.close()
    count = len(placed)
    assert not prefetch_threads()
    time.sleep(0.2)
    assert len(placed) == count


# Pixels.


def test_every_grey_level_survives_the_way_to_the_device_and_back():
    levels = jnp.arange(256, dtype=jnp.uint8)
    unit = to_unit(levels)
    assert unit.dtype == jnp.float32
    assert (unit[0], unit[255]) == (-1, 1)
    np.testing.assert_array_equal(to_uint8(unit), levels)
    np.testing.assert_array_equal(to_uint8(unit + jnp.float32(0.49 / 127.5)), levels)
    np.testing.assert_array_equal(to_uint8(jnp.array([-7.0, 7.0])), [0, 255])
    points = jnp.array([[0.5, -3.0]])
    np.testing.assert_array_equal(to_unit(points), points)


def test_flips_are_left_to_right_half_the_time():
    images = jnp.arange(1000 * 2 * 3 * 1).reshape(1000, 2, 3, 1)
    flipped = random_flip(images, jax.random.key(0))
    same = (flipped == images).all((1, 2, 3))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 430 < mirrored.sum() < 570


# Sources that need no file.


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    train, test = Digits().train(), Digits().test()
    assert (len(train), len(test), train.shape, train.dtype, train.flip) == (1500, 297, (8, 8, 1), np.uint8, False)
    both = np.concatenate([train[np.arange(1500)], test[np.arange(297)]])[..., 0]
    levels = np.round(both * (16 / 255)).astype(np.uint8)
    assert sorted(map(bytes, levels)) == sorted(map(bytes, load_digits(return_X_y=True)[0].astype(np.uint8)))
    np.testing.assert_array_equal(Digits().test()[np.arange(9)], test[np.arange(9)])


def test_five_rings_are_circles_of_equal_weight():
    data = FiveRings(train_points=100_000, test_points=500)
    points = data.train()[np.arange(100_000)]
    assert (points.dtype, data.train().shape) == (np.float32, (2,))
    np.testing.assert_allclose(points.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(points.std(0), 1, atol=0.02)
    original = points * np.sqrt([2.166, 1.04]) + [0, 0.15]
    centres = np.array([(-1.75, 0.75), (0, 0.75), (1.75, 0.75), (-1.05, -0.75), (1.05, -0.75)])
    distance = np.abs(np.linalg.norm(original[:, None] - centres, axis=-1) - 1)
    assert distance.min(1).max() < 1e-5
    share = np.bincount(distance.argmin(1)) / len(points)
    np.testing.assert_allclose(share, 0.2, atol=0.01)
    held_out = data.test()[np.arange(500)]
    np.testing.assert_array_equal(held_out, FiveRings(test_points=500).test()[np.arange(500)])
    assert not np.isin(held_out[:, 0], points[:, 0]).all()
    assert (FiveRings(seed=1).test()[np.arange(5)] != held_out[:5]).any()


# What the Denoiser has to know.


def test_moments_are_those_of_the_scaled_data_and_the_spectrum_keeps_their_sum():
    source = Digits().train()
    x = source[np.arange(len(source))] / 127.5 - 1
    np.testing.assert_allclose(moments(source), (x.mean(), x.std(), np.sqrt((x**2).mean())), rtol=1e-12)
    std, rms = spectrum(source)
    assert std.shape == rms.shape == (8, 8)
    np.testing.assert_allclose((rms**2).mean(), (x**2).mean(), rtol=1e-12)
    np.testing.assert_allclose((std**2).mean(), x.var(0).mean(), rtol=1e-12)
    np.testing.assert_allclose(rms[0, 0], np.sqrt((x.sum((1, 2)) ** 2).mean() / 64), rtol=1e-12)
    points = moments(ArraySource(np.array([[3.0, -1.0]], np.float32)))
    np.testing.assert_allclose(points, (1, 2, np.sqrt(5)))
