"""Laws of the distances: exactness of streaming moments, closed forms on Gaussians, unbiasedness, degenerate input."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from gddim.evaluation import metrics
from gddim.evaluation.features import PixelFeatures
from gddim.evaluation.metrics import Gaussian, Moments
from gddim.evaluation.statistics import Statistics


def stream(features: np.ndarray, sizes: list[int]) -> Moments:
    moments = Moments.empty(features.shape[1])
    for part in np.split(features, np.cumsum(sizes)[:-1]):
        moments = moments.merge(Moments.of(part))
    return moments


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("sizes", [[1] * 2000, [7] * 285 + [5], [500, 0, 1500], [1999, 1]])
def test_moments_do_not_depend_on_how_the_stream_is_cut(sizes: list[int], offset: float):
    features = (offset + np.random.default_rng(0).standard_normal((2000, 24)) * np.arange(1, 25)).astype(np.float64)
    found = stream(features, sizes)
    assert found.count == 2000
    np.testing.assert_allclose(found.mean, features.mean(axis=0), rtol=1e-12, atol=1e-12)
    exact = np.cov(features.astype(np.longdouble).T)
    assert np.abs(found.covariance - exact).max() <= 1e-9 * np.abs(exact).max()


@pytest.mark.parametrize("stops", [(700,), (1, 1_234, 1_999)])
def test_statistics_of_a_stream_stopped_and_continued_from_a_file_are_the_same(tmp_path: Path, stops: tuple[int, ...]):
    features = np.random.default_rng(3).normal(30.0, 0.1, (2_000, 24)).astype(np.float32)
    space, origin = PixelFeatures(), {"features": "pixels"}
    whole, found = Statistics.of(features, space, 0, origin), None
    for first, last in itertools.pairwise((0, *stops, 2_000)):
        part = Statistics.of(features[first:last], space, first, origin)
        (found.then(part) if found else part).save(tmp_path / "state.npz")
        found = Statistics.load(tmp_path / "state.npz")
    assert found
    assert found.count == 2_000
    np.testing.assert_allclose(found.moments.mean, whole.moments.mean, rtol=1e-12)
    error = np.abs(found.moments.covariance - whole.moments.covariance).max()
    assert error < 1e-9 * np.abs(whole.moments.covariance).max()
    np.testing.assert_array_equal(found.subset, whole.subset)


def test_moments_merge_is_symmetric_and_refuses_what_is_not_finite():
    x = np.random.default_rng(1).standard_normal((50, 3))
    a, b = Moments.of(x[:20]), Moments.of(x[20:])
    np.testing.assert_allclose(a.merge(b).scatter, b.merge(a).scatter, rtol=1e-12)
    x[3, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 50 rows"):
        Moments.of(x)
    with pytest.raises(ValueError, match="2 samples"):
        _ = Moments.of(x[:1]).covariance


def test_frechet_distance_of_gaussians_in_closed_form():
    rng = np.random.default_rng(2)
    basis, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    a, b = rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6)
    b[:2] = 0.0  # a singular covariance is no special case
    mean = rng.standard_normal(6)
    left, right = Gaussian(np.zeros(6), basis * a @ basis.T), Gaussian(mean, basis * b @ basis.T)
    expected = mean @ mean + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert metrics.frechet_distance(left, right) == pytest.approx(expected, rel=1e-12)
    assert metrics.frechet_distance(right, left) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_does_not_need_commuting_covariances():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(3)
    a, b = (m @ m.T for m in rng.standard_normal((2, 8, 8)))
    expected = np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert metrics.frechet_distance(Gaussian(np.zeros(8), a), Gaussian(np.zeros(8), b)) == pytest.approx(expected)


@pytest.mark.parametrize("count", [2, 40, 900])
def test_frechet_distance_of_a_set_with_itself_vanishes_also_for_fewer_samples_than_dimensions(count: int):
    rng = np.random.default_rng(4)
    features = rng.standard_normal((count, 96)) * np.geomspace(1e-4, 30, 96)
    moments, reordered = Moments.of(features), stream(features[::-1], [1] * count)
    assert 0 <= metrics.frechet_distance(moments, moments) < 1e-6
    assert 0 <= metrics.frechet_distance(moments, reordered) < 1e-6
    constant = Moments.of(np.ones((5, 96)))
    trace = np.trace(moments.covariance) + np.square(moments.mean - 1).sum()
    assert metrics.frechet_distance(moments, constant) == pytest.approx(trace)
    with pytest.raises(ValueError, match="96 cannot be compared with those of 3"):
        metrics.frechet_distance(moments, Moments.empty(3))


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.5])
def test_kid_is_unbiased_and_its_error_is_the_spread_of_repetitions(shift: float):
    rng = np.random.default_rng(5)
    draws = [(rng.standard_normal((60, 8)), rng.standard_normal((90, 8)) + shift) for _ in range(400)]
    values, errors = np.array([metrics.kid(a, b) for a, b in draws]).T
    large, _ = metrics.kid(rng.standard_normal((4000, 8)), rng.standard_normal((4000, 8)) + shift)
    assert abs(values.mean() - large) < 4 * values.std() / np.sqrt(400)
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(values.std(), rel=0.2)


def test_kid_equals_its_definition():
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((9, 4)), rng.standard_normal((7, 4))

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / 4 + 1) ** 3

    def off_diagonal(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    expected = off_diagonal(kernel(a, a)) + off_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean()
    assert metrics.kid(a, b)[0] == pytest.approx(expected)
    many = rng.standard_normal((1100, 4))  # more than one block of rows
    itself = off_diagonal(kernel(many, many)) + off_diagonal(kernel(b, b)) - 2 * kernel(many, b).mean()
    assert metrics.kid(many, b)[0] == pytest.approx(itself)


def test_energy_distance_in_closed_form_and_without_bias():
    a, b = np.array([[0.0], [1.0]]), np.array([[3.0], [5.0]])
    assert metrics.energy_distance(a, b) == pytest.approx(2 * (3 + 5 + 2 + 4) / 4 - 1 - 2)
    rng = np.random.default_rng(7)
    values = [metrics.energy_distance(rng.standard_normal((30, 2)), rng.standard_normal((40, 2))) for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)


def test_precision_sees_what_is_not_data_and_recall_what_is_missing():
    rng = np.random.default_rng(8)
    centres = np.array([[0.0, 0.0], [100.0, 0.0]])
    data = rng.standard_normal((400, 2)) + centres[np.arange(400) % 2]
    assert metrics.precision_recall(data, data) == (1.0, 1.0)
    one_mode = rng.standard_normal((400, 2))
    precision, recall = metrics.precision_recall(one_mode, data)
    assert precision > 0.9
    assert 0.4 < recall < 0.5
    half_outside = np.concatenate([data[:200], data[:200] + 1000])
    assert metrics.precision_recall(half_outside, data)[0] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="accepted are 1 to 399"):
        metrics.precision_recall(data, data, k=400)


def test_precision_of_known_points_on_a_line():
    data = np.array([[0.0], [1.0], [2.0], [10.0]])
    samples = np.array([[2.5], [3.5], [11.0], [30.0]])
    assert metrics.precision_recall(samples, data, k=1) == (0.75, 0.5)


def test_inception_score_of_sure_and_even_classes_is_their_number():
    sure = np.tile(np.eye(4), (25, 1))
    assert metrics.inception_score(np.tile(np.eye(10), (100, 1)))[0] == pytest.approx(10, abs=0.3)  # of classes in turn
    assert metrics.inception_score(sure, splits=5)[0] == pytest.approx(4.0, abs=0.2)
    assert metrics.inception_score(np.full((100, 4), 0.25)) == pytest.approx((1.0, 0.0))


def test_inception_score_equals_its_definition_for_every_cut_of_the_stream():
    p = np.random.default_rng(10).dirichlet(np.full(7, 0.3), 90)
    turns = [int(turn * (5**0.5 - 1) / 2 % 1 * 10) for turn in range(9)]  # of ten rows in turn each in another split
    order = [10 * turn + (split - turned) % 10 for split in range(10) for turn, turned in enumerate(turns)]
    splits = p[order].reshape(10, 9, 7)
    scores = [np.exp(np.mean(np.sum(q * np.log(q / q.mean(axis=0)), axis=1))) for q in splits]
    assert metrics.inception_score(p) == pytest.approx((np.mean(scores), np.std(scores)))
    parts = [metrics.ScoreSums.of(p[i:j], first=i) for i, j in [(0, 4), (4, 5), (5, 83), (83, 90)]]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert merged.score() == pytest.approx((np.mean(scores), np.std(scores)))
    with pytest.raises(ValueError, match="accepted are 1 to 90"):
        metrics.inception_score(p, splits=91)


def test_a_set_is_compared_with_itself_as_with_a_copy():
    x = np.random.default_rng(7).standard_normal((50, 8))
    assert metrics.kid(x, x) == metrics.kid(x, x.copy())


@pytest.mark.parametrize("entry", [np.nan, np.inf, -1.0])
def test_a_covariance_that_is_none_is_refused(entry: float):
    bad = Gaussian(np.zeros(3), np.diag([1.0, 1.0, entry]))
    with pytest.raises(ValueError, match="the covariance"):
        metrics.frechet_distance(bad, Gaussian(np.zeros(3), np.eye(3)))
