"""Checksums of arrays that are split over devices and hosts."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped, UInt32

from gddim.parallel import agree


def checksums(arrays: list[jax.Array]) -> list[int]:
    """`Σ_i h(bits_i, i) mod 2³²` of each array, i the index in the whole array; the same however it is split.

    Each device sums what it holds, NumPy for a CPU, where compiling would take longer; only the sums travel. `h(·, i)` is
    one-to-one, so that a change in one element always shows, and any other with probability 1 − 2⁻³². Of an array that every
    process has for itself, that of process 0 counts.
    """
    shares, owners, first = [], [], jax.process_index() == 0
    for number, array in enumerate(arrays):
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        for shard in array.addressable_shards:
            if shard.replica_id == 0 and (first or not array.is_fully_addressable):
                offset = sum((index.start or 0) * stride for index, stride in zip(shard.index, strides, strict=True))
                part = (shard.data, np.uint32(offset % 2**32), tuple(strides))
                shares.append(_share(np, *part) if shard.device.platform == "cpu" else _on_device(*part))
                owners.append(number)
    totals = np.zeros(len(arrays), np.uint32)
    np.add.at(totals, owners, np.array(jax.device_get(shares), np.uint32))
    return [int(total) for total in agree(totals, lambda parts: parts.sum(0, dtype=np.uint32))]


def _share(xp: Any, x: Shaped[Any, "..."], offset: Any, strides: tuple[int, ...]) -> UInt32[Any, ""]:
    """The part of a checksum that one shard holds, its first element at index `offset` of the whole array."""
    bits = xp.asarray(x).reshape(*x.shape, 1)
    bits = bits.astype(np.uint8) if x.dtype == bool else bits.view(f"uint{8 * min(x.dtype.itemsize, 4)}")
    index = xp.full((1,) * bits.ndim, offset, np.uint32)
    for axis, stride in enumerate(strides):
        along = xp.arange(x.shape[axis], dtype=np.uint32).reshape(*(1,) * axis, -1, *(1,) * (x.ndim - axis))
        index = index + along * np.uint32(stride % 2**32)
    words = bits.shape[-1]  # two of 64 bits
    index = xp.concatenate([words * index + word for word in range(words)], -1)
    # The finaliser of MurmurHash3: every step can be undone, so different bits at one index never collide.
    h = bits.astype(np.uint32) ^ (index * np.uint32(0x9E3779B1))
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return xp.sum(h ^ (h >> 16), dtype=np.uint32)


_on_device = jax.jit(functools.partial(_share, jnp), static_argnums=2)
