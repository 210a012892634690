"""Laws of the measurements of images, and of the numbers that say what a restored one is worth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gddim.evaluation.metrics import psnr, ssim
from gddim.guidance import check_linear
from gddim.measurements import blur, grey, inpainting, least_norm, pooling, sensing

SHAPE = (12, 8, 3)
MISSING = np.random.default_rng(0).random(SHAPE[:2]) < 0.4
OPERATORS = {
    "inpaint": (inpainting(MISSING), (int((~MISSING).sum()), 3)),
    "sr2": (pooling(2), (6, 4, 3)),
    "deblur": (blur(1.5, *SHAPE[:2]), SHAPE),
    "colour": (grey, (12, 8, 1)),
    "sense": (sensing(0.25, SHAPE), (72,)),
}
X = jax.random.normal(jax.random.key(0), SHAPE)


@pytest.mark.parametrize("name", OPERATORS)
def test_each_is_linear_and_of_its_shape(name):
    operator, shape = OPERATORS[name]
    assert operator(X).shape == shape
    check_linear(operator, SHAPE, np.zeros(shape))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_a_mask_of_numbers_is_missing_where_it_is_not_0(dtype):
    np.testing.assert_array_equal(inpainting(255 * MISSING.astype(dtype))(X), inpainting(MISSING)(X))
    with pytest.raises(ValueError, match=r"missing has shape \(12, 8, 1\); accepted is \(H, W\)"):
        inpainting(MISSING[..., None])
    for size in (MISSING.shape[0] - 1, MISSING.shape[0] + 1):
        with pytest.raises(ValueError, match="their sizes must agree"):
            inpainting(MISSING)(jnp.ones((size, *X.shape[1:])))
    with pytest.raises(ValueError, match=r"std=0\.0 must be > 0"):
        blur(0.0, 8, 8)


def test_constants_stay_what_they_are_where_pixels_are_averaged():
    for name in ("inpaint", "sr2", "deblur", "colour"):
        operator = OPERATORS[name][0]
        np.testing.assert_allclose(operator(jnp.full(SHAPE, 0.3)), 0.3, atol=1e-6)
    np.testing.assert_array_equal(OPERATORS["inpaint"][0](X), X[~MISSING])
    np.testing.assert_allclose(pooling(4)(X)[1, 1], X[4:8, 4:8].mean((0, 1)), atol=1e-6)


def test_a_blur_is_the_convolution_with_a_gaussian_and_reflects_at_the_borders():
    point = jnp.zeros((21, 21, 1)).at[10, 8].set(1.0)
    found = np.asarray(blur(1.2, 21, 21)(point))[..., 0]
    rows, columns = np.indices((21, 21))
    expected = np.exp(-((rows - 10) ** 2 + (columns - 8) ** 2) / (2 * 1.2**2))
    np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-6)
    corner = np.asarray(blur(1.2, 21, 21)(jnp.zeros((21, 21, 1)).at[0, 0].set(1.0)))
    np.testing.assert_allclose(corner.sum(), 1, atol=0.05)
    assert corner[0, 0] > 2.5 * found.max()


def test_projections_are_orthonormal_and_none_is_seen_twice():
    operator, (m,) = OPERATORS["sense"]
    A = jax.jacobian(lambda x: operator(x.reshape(SHAPE)))(jnp.zeros(X.size))
    np.testing.assert_allclose(A @ A.T, np.eye(m), atol=1e-5)


@pytest.mark.parametrize("name", ["inpaint", "sr2", "colour", "sense"])
def test_the_smallest_image_that_is_measured_so(name):
    operator, _ = OPERATORS[name]
    found = least_norm(operator, operator(X), SHAPE)
    np.testing.assert_allclose(operator(found), operator(X), atol=1e-4)
    assert jnp.vdot(found, X - found) == pytest.approx(0, abs=1e-2), "what was not seen is not in it"


def test_psnr_and_ssim():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, SHAPE)
    assert psnr(x, x) == 100
    assert psnr(x + 0.2, x) == pytest.approx(20)
    assert ssim(x, x) == pytest.approx(1)
    y = np.clip(x + 0.3 * rng.normal(size=SHAPE), -1, 1)
    assert ssim(y, x) == pytest.approx(ssim(x, y))
    weights = [np.exp(-((np.arange(n) - n // 2) ** 2) / 4.5) for n in (11, 7)]
    kernel = np.outer(*weights) / np.outer(*weights).sum()
    each = []
    for i in range(2):
        for j in range(2):
            for c in range(3):
                a, b = (z[i : i + 11, j : j + 7, c] for z in (x, y))
                ma, mb = (kernel * a).sum(), (kernel * b).sum()
                va, vb = (kernel * (a - ma) ** 2).sum(), (kernel * (b - mb) ** 2).sum()
                cov = (kernel * (a - ma) * (b - mb)).sum()
                each.append((2 * ma * mb + 4e-4) * (2 * cov + 3.6e-3) / ((ma**2 + mb**2 + 4e-4) * (va + vb + 3.6e-3)))
    assert ssim(y, x) == pytest.approx(np.mean(each))
    assert 0 < ssim(y, x) < ssim(np.clip(x + 0.1 * rng.normal(size=SHAPE), -1, 1), x) < 1
