"""The convolution of our own, and its gradients, are XLA's."""

import chex
import jax
import jax.numpy as jnp
import pytest

from gddim.nn import convolution
from gddim.nn.convolution import conv_same


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def plain(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def check(x, kernel, outputs, where):
    """Sum and both gradients of `x`, images of a batch for each of a number of calls."""
    cotangent = normal(2, *x.shape[:-1], outputs)

    def every(conv):
        def loss(x, kernel, cotangent):
            if where == "vmap":
                y = jax.vmap(conv, (0, None))(x, kernel)
            elif where == "scan":
                y = jax.lax.scan(lambda _, x: (None, conv(x, kernel)), None, x)[1]
            else:
                y = jnp.stack([conv(row, kernel) for row in x])
            return jnp.sum(y * cotangent)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, kernel, cotangent)  # XLA folds what is constant, slowly

    chex.assert_trees_all_close(every(conv_same), every(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("where", ["plain", "vmap", "scan"])
def test_gradients_of_the_convolution_are_those_of_autodiff(size, where):
    check(normal(0, 4, 2, 6, 5, 3), normal(1, size, size, 3, 7), 7, where)


@pytest.mark.parametrize(
    ("shape", "size", "outputs"),
    [
        ((16, 4, 6, 3), 3, 5),
        ((16, 4, 6, 5), 3, 3),
        ((24, 6, 4, 2), 5, 3),
        ((3, 8, 3, 1), 3, 4),
        ((3, 8, 3, 4), 3, 1),
        ((8, 5, 4, 2), 3, 2),
        ((8, 5, 4, 3), 1, 2),
    ],
    ids=[
        "examples",
        "fewer outputs",
        "sixes of examples",
        "rows",
        "rows, fewer outputs",
        "an odd number of rows",
        "pixels",
    ],
)
def test_a_gradient_of_the_kernel_in_parts_is_the_whole_one(shape, size, outputs, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(convolution, "LEAST", 16)
    monkeypatch.setattr(convolution, "MOST", 64)
    check(normal(0, 2, *shape), normal(1, size, size, shape[-1], outputs), outputs, "scan")


def test_a_kernel_for_every_example_is_convolved_with_its_own():
    x, kernel = normal(0, 3, 2, 4, 4, 2), normal(1, 3, 3, 3, 2, 5)
    alone = jnp.stack([conv_same(*pair) for pair in zip(x, kernel, strict=True)])
    chex.assert_trees_all_close(jax.vmap(conv_same)(x, kernel), alone, atol=1e-5)
