"""Averages by power-function profiles: the recursion, the closed forms, and lengths rebuilt from snapshots."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from gddim.averages import LONGEST, combination, exponent, inner_products, rate, width

WIDTHS = [0.01, 0.05, 0.1, 0.15, 0.25, LONGEST]


def share(sigma_rel: float, t: int) -> np.ndarray:
    """What steps 1 … t weigh in the average at t: the integral of the profile over each step."""
    return np.diff((np.arange(t + 1) / t) ** (exponent(sigma_rel) + 1))


def trajectory(steps: int, seed: int = 0) -> np.ndarray:
    """Parameters that settle, as under a falling learning rate, and wander: (steps, 5)."""
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.normal(size=(steps, 5)), 0) / np.sqrt(steps)
    return np.exp(-np.arange(steps) / (0.2 * steps))[:, None] + 0.3 * walk + 0.05 * rng.normal(size=(steps, 5))


def test_the_published_exponents():
    """EDM2: σ_rel = 0.05 and 0.10 are γ = 16.97 and 6.94."""
    np.testing.assert_allclose([exponent(0.05), exponent(0.10)], [16.97, 6.94], atol=5e-3)
    assert exponent(LONGEST) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_the_width_is_the_standard_deviation_of_the_profile(sigma_rel):
    gamma = exponent(sigma_rel)
    assert width(gamma) == pytest.approx(sigma_rel, rel=1e-12)
    moment = [quad(lambda x, n=n: (gamma + 1) * x ** (gamma + n), 0, 1, epsabs=1e-13)[0] for n in range(3)]
    assert np.sqrt(moment[2] - moment[1] ** 2) == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [-0.1, 0.0, 0.29, np.nan])
def test_a_width_that_no_profile_has_is_an_error(sigma_rel):
    with pytest.raises(ValueError, match=r"must lie in \(0, 0\.2887\]"):
        exponent(sigma_rel)


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_the_recursion_is_the_integral_of_the_profile(sigma_rel):
    theta = trajectory(500)
    average = np.zeros(5)
    for t in range(1, 501):
        average += float(rate(sigma_rel, t)) * (theta[t - 1] - average)
        if t in (1, 2, 7, 500):
            np.testing.assert_allclose(average, share(sigma_rel, t) @ theta[:t], atol=2e-6)


def test_the_rate_is_of_a_step_within_a_compiled_one():
    np.testing.assert_allclose(rate(0.05, jnp.int32(1000)), 1 - (1 - 1 / 1000) ** (exponent(0.05) + 1), rtol=1e-5)
    assert float(rate(0.05, jnp.int32(1))) == 1.0


@pytest.mark.parametrize(("t", "s"), [(300, 300), (100, 300), (300, 100)])
@pytest.mark.parametrize(("one", "other"), [(0.05, 0.05), (0.05, 0.1), (0.2, 0.07)])
def test_inner_products_are_the_integrals(t, s, one, other):
    gamma, delta = exponent(one), exponent(other)
    product = lambda x: (gamma + 1) * (x / t) ** gamma / t * (delta + 1) * (x / s) ** delta / s
    expected = quad(product, 0, min(t, s), epsabs=1e-15)[0]
    assert inner_products([t], [one], [s], [other]).item() == pytest.approx(expected, rel=1e-8)


def reference(t_a, gamma_a, t_b, gamma_b):
    """As EDM2's appendix C.2 writes it."""
    exponents = np.where(t_a < t_b, gamma_b, -gamma_a)
    top = (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** exponents
    return top / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def test_inner_products_and_coefficients_are_the_published_ones():
    steps, widths = [100, 100, 200, 200, 400, 400], [0.05, 0.1] * 3
    t, gamma = np.array(steps, float), np.array([*map(exponent, widths)])
    gram = reference(t[:, None], gamma[:, None], t[None], gamma[None])
    np.testing.assert_allclose(inner_products(steps, widths, steps, widths), gram, rtol=1e-12)
    wanted = reference(t, gamma, 400.0, exponent(0.07))
    found, _ = combination(steps, widths, 400, 0.07)
    np.testing.assert_allclose(found, np.linalg.solve(gram, wanted), rtol=1e-6, atol=1e-9)


def snapshots(count: int, steps: int) -> tuple[list[int], list[float]]:
    at = [steps * (i + 1) // count for i in range(count)]
    return [t for t in at for _ in range(2)], [0.05, 0.1] * count


def rebuilt(theta: np.ndarray, count: int, sigma_rel: float) -> tuple[np.ndarray, float]:
    steps, widths = snapshots(count, len(theta))
    x, left = combination(steps, widths, len(theta), sigma_rel)
    kept = np.stack([share(w, t) @ theta[:t] for t, w in zip(steps, widths, strict=True)])
    return x @ kept, left


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1])
def test_an_average_that_was_kept_is_rebuilt_exactly(sigma_rel):
    theta = trajectory(2_000)
    found, left = rebuilt(theta, 16, sigma_rel)
    np.testing.assert_allclose(found, share(sigma_rel, 2_000) @ theta, rtol=1e-9)
    assert left < 1e-7
    steps, widths = snapshots(16, 2_000)
    x, _ = combination(steps, widths, 2_000, sigma_rel)
    np.testing.assert_allclose(
        x, [float(pair == (2_000, sigma_rel)) for pair in zip(steps, widths, strict=True)], atol=1e-9
    )


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.2, 0.25])
def test_another_length_is_rebuilt_the_better_the_more_snapshots_there_are(sigma_rel):
    """Against the brute-force average over the whole trajectory, in units of how far apart those of two lengths are."""
    errors, lefts = [], []
    for count in (2, 8, 32):
        gaps = []
        for seed in range(5):
            theta = trajectory(4_000, seed)
            found, left = rebuilt(theta, count, sigma_rel)
            gaps.append(found - share(sigma_rel, 4_000) @ theta)
        errors.append(float(np.sqrt(np.mean(np.square(gaps)))))
        lefts.append(left)
    spread = np.sqrt(np.mean((share(0.05, 4_000) @ theta - share(0.1, 4_000) @ theta) ** 2))
    assert errors[2] < errors[1] < 1.2 * errors[0]
    assert lefts[0] > lefts[1] > lefts[2]
    assert errors[2] < 0.15 * spread, (errors, spread)


def test_a_constant_is_its_own_average_whatever_is_rebuilt():
    assert rebuilt(np.ones((4_000, 5)), 32, 0.15)[0] == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(("steps", "widths"), [([], []), ([5, 5], [0.1, 0.1]), ([5, 20], [0.1, 0.1]), ([0], [0.1])])
def test_snapshots_that_cannot_be_combined_are_an_error(steps, widths):
    with pytest.raises(ValueError, match="need some, all different, from 1 to 10"):
        combination(steps, widths, 10, 0.1)
