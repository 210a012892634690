"""A convolution whose gradients are convolutions that XLA runs fast in a loop on a CPU, too.

XLA:CPU has fast kernels for the labels `b01f_01io->b01f` only, unless the operation stands outside every loop. The
gradients that JAX derives have other labels: inside `lax.scan` they take fifty times as long. Here both are written
with those labels. It is a primitive because the backward pass of a `jax.custom_vjp` under `jax.vmap` holds a gradient
of the kernel for every example before it sums them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

CACHED = 2**18  # values, 1 MiB: what a core's cache holds with room to spare


def conv_same(x: Float[Array, "n h w i"], kernel: Float[Array, "k k i o"]) -> Float[Array, "n h w o"]:
    """Convolution with an odd kernel, stride 1 and zeros beyond the border."""
    return _conv_same.bind(x, kernel)


def _canonical(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _input_gradient(cotangent: Array, _: Any, kernel: Array) -> Array:
    return conv_same(cotangent, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))


def _kernel_gradient(cotangent: Array, x: Array, kernel: Any) -> Array:
    """`Σ_n x[n, h+a-k/2, w+b-k/2, i] cotangent[n, h, w, o]`: channels i as the batch, the cotangent as the kernel."""
    shape, dtype = kernel.aval.shape, kernel.aval.dtype

    def canonical(x: Array, cotangent: Array) -> Array:
        """A sum over parts of the images, as every output runs over all of the cotangent, at memory's pace if it is large."""
        (n, h), size = cotangent.shape[:2], shape[0]
        examples, rows = n, h
        if cotangent.size > CACHED:
            examples = math.gcd(n, 8) if n % 4 == 0 else n
            while rows % 2 == 0 and cotangent.size * examples * rows > CACHED // 4 * n * h:
                rows //= 2
        x = jnp.pad(x, [(0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)])
        strided = [a.reshape(examples, -1, *a.shape[1:]) for a in (x, cotangent)]  # every device has a share of a part

        def part(i: int | Array) -> Array:
            above, below = (
                lax.dynamic_slice(
                    a, (0, i // (h // rows), i % (h // rows) * rows, 0, 0), (examples, 1, high, *a.shape[3:])
                )
                for a, high in zip(strided, (rows + size - 1, rows), strict=True)
            )
            above, below = above[:, 0].transpose(3, 1, 2, 0), below[:, 0].transpose(1, 2, 0, 3)
            return lax.conv_general_dilated(above, below, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

        y, count = part(0), n // examples * (h // rows)
        y = lax.fori_loop(1, count, lambda i, y: y + part(i), y) if count > 1 else y
        return y.transpose(1, 2, 0, 3)

    def native(x: Array, cotangent: Array) -> Array:
        return jax.linear_transpose(lambda w: _canonical(x, w), jax.ShapeDtypeStruct(shape, dtype))(cotangent)[0]

    return lax.platform_dependent(x, cotangent, cpu=canonical, default=native)


def _batch(arguments: tuple[Array, Array], axes: tuple[int | None, int | None]) -> tuple[Array, int]:
    """Examples join the batch; kernels that differ between examples are left to JAX."""
    x, kernel = arguments
    if axes[1] is not None:
        return jax.vmap(_canonical, axes)(x, kernel), 0
    x = jnp.moveaxis(x, axes[0] or 0, 0)
    y = conv_same(x.reshape(-1, *x.shape[2:]), kernel)
    return y.reshape(*x.shape[:2], *y.shape[1:]), 0


_conv_same = Primitive("conv_same")
_conv_same.def_impl(jax.jit(_canonical))
_conv_same.def_abstract_eval(lambda x, kernel: x.update(shape=(*x.shape[:-1], kernel.shape[-1])))
mlir.register_lowering(_conv_same, mlir.lower_fun(_canonical, multiple_results=False))
ad.defbilinear(_conv_same, _input_gradient, _kernel_gradient)
batching.primitive_batchers[_conv_same] = _batch
