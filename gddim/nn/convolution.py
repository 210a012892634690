"""A convolution whose gradients are convolutions that XLA runs fast in a loop on a CPU, too.

XLA:CPU has fast kernels for the labels `b01f_01io->b01f` only, unless the operation stands outside every loop. The
gradients that JAX derives have other labels: inside `lax.scan` they take fifty times as long. Here both are written
with those labels. It is a primitive because the backward pass of a `jax.custom_vjp` under `jax.vmap` holds a gradient
of the kernel for every example before it sums them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

LEAST, MOST = 2**16, 3 * 2**17  # numbers of the wider of two parts, on each device: of the size of a core's cache
LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv_same(x: Float[Array, "n h w i"], kernel: Float[Array, "k k i o"]) -> Float[Array, "n h w o"]:
    """Convolution with an odd kernel, stride 1 and zeros beyond the border."""
    return _conv_same.bind(x, kernel)


def _canonical(x: Array, kernel: Array) -> Array:
    if kernel.shape[0] == 1:
        return x @ kernel[0, 0]
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def _mirrored(kernel: Array) -> Array:
    """That of the transposed convolution: about its centre, and outputs for inputs."""
    return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)


def _input_gradient(cotangent: Array, _: Any, kernel: Array) -> Array:
    return conv_same(cotangent, _mirrored(kernel))


def _kernel_gradient(cotangent: Array, x: Array, kernel: Any) -> Array:
    """`Σ_n x[n, h+a-k/2, w+b-k/2, i] cotangent[n, h, w, o]`: channels i as the batch, the cotangent as the kernel."""
    shape, dtype = kernel.aval.shape, kernel.aval.dtype

    def canonical(x: Array, cotangent: Array) -> Array:
        """A sum over parts of the images, as every output runs over all of the cotangent, at memory's pace if it is large.

        XLA copies the first k² times, as it gathers its patches: it is the one of fewer channels.
        """
        if x.shape[-1] > cotangent.shape[-1]:
            return _mirrored(canonical(cotangent, x))
        if shape[0] == 1:
            return jnp.tensordot(x, cotangent, ((0, 1, 2), (0, 1, 2)))[None, None]
        (n, h), border, devices = cotangent.shape[:2], shape[0] // 2, jax.device_count()
        examples, rows, values = n, h, cotangent.size // devices
        while examples % (2 * devices) == 0 and examples >= 8 * devices and values * examples >= 2 * LEAST * n:
            examples //= 2
        while rows % 2 == 0 and values * examples * rows > MOST * n * h:
            rows //= 2
        above = border if rows < h else 0  # rows that a part takes from its neighbours, or zeros
        x = jnp.pad(x, [(0, 0), (above, above), (0, 0), (0, 0)])
        strided = [a.reshape(examples, -1, *a.shape[1:]) for a in (x, cotangent)]  # every device has a share of a part

        def part(i: int | Array) -> Array:
            example, row = i // (h // rows), i % (h // rows) * rows
            patches, weights = (
                lax.dynamic_slice(a, (0, example, row, 0, 0), (examples, 1, high, *a.shape[3:]))[:, 0]
                for a, high in zip(strided, (rows + 2 * above, rows), strict=True)
            )
            padding = [(border - above,) * 2, (border,) * 2]
            return lax.conv_general_dilated(
                patches.transpose(3, 1, 2, 0), weights.transpose(1, 2, 0, 3), (1, 1), padding, dimension_numbers=LAYOUT
            )

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
