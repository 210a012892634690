"""The training states that gDDIM's authors published: flax's msgpack format, read without flax or pickle."""

import collections
import math
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from gddim.convert.networks import Names, fill
from gddim.errors import UserError, from_extra, place
from gddim.nn import NCSNpp

M = TypeVar("M")

WEIGHTS = {"ema": ("params_ema",), "raw": ("optimizer", "target")}
BLOCK = {"norm_in": "GroupNorm_0", "conv_in": "Conv_0", "time": "Dense_0", "norm_out": "GroupNorm_1",
         "conv_out": "Conv_1", "shortcut": "Conv_2"}  # fmt: skip
ATTENTION = {"norm": "GroupNorm_0", "query": "NIN_0", "key": "NIN_1", "value": "NIN_2", "out": "NIN_3"}
TOP = {"time.0": "Dense_0", "time.1": "Dense_1", "conv_in": "Conv_0", "norm_out": "GroupNorm_0", "conv_out": "Conv_1"}


def load_flax(path: epath.PathLike, model: M, weights: Literal["ema", "raw"] = "ema") -> M:
    """The model with the parameters of a published training state, the averaged ones or the raw ones.

    `model` is an `NCSNpp` or holds one as `.net`; its own parameters serve as shapes, so `eqx.filter_eval_shape` of
    its construction will do. Raises `UserError` naming the parameters that are missing, unexpected or of another
    shape, by their published paths.
    """
    return assign(read_state(path), model, weights, epath.Path(path))


def read_state(path: epath.PathLike) -> dict[Any, Any]:
    """A flax msgpack file as nested dictionaries of NumPy arrays, by hand: neither flax nor pickle is involved."""
    path = place(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    try:
        state = _join(_unpacked(content))
    except Exception as error:  # whatever msgpack and NumPy make of bytes that are not theirs
        raise UserError(f"{path} is no flax msgpack file, or not all of it: {error!r:.200}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a training state")
    return state


def assign(state: dict[Any, Any], model: M, weights: Literal["ema", "raw"], source: Any) -> M:
    """`load_flax` of a state that has been read; `source` is what errors call it."""
    net = getattr(model, "net", model)
    if not isinstance(net, NCSNpp):
        raise UserError(f"published checkpoints hold an NCSNpp, not a {type(net).__name__}")
    place, tree = WEIGHTS[weights], state
    for word in place:
        tree = tree.get(word) if isinstance(tree, dict) else None
    if not isinstance(tree, dict):
        raise UserError(
            f"{source} holds no {'.'.join(place)}, where {weights} weights are; it has {', '.join(map(str, state)):.200}"
        )
    found = dict(_flatten(tree["params"] if set(tree) == {"params"} else tree))
    return fill(model, published_names(net), found, source)


def published_names(net: NCSNpp) -> Names:
    """For each of our parameters, in the tree's order, the published ones that are stacked in it: paths and shapes.

    Flax numbers the modules of a class in the order of their calls, which is the order of our tree.
    """
    numbers: dict[str, range] = {}
    count: collections.Counter[str] = collections.Counter()
    fir = net.config.fir

    def name(path: str, i: int, stacked: int) -> str:
        def module(kind: str, place: str) -> str:
            if place not in numbers:
                numbers[place] = range(count[kind], count[kind] + stacked)
                count[kind] += stacked
            return f"{kind}_{numbers[place][i]}"

        *words, leaf = path.split(".")
        place, last = ".".join(words[:-1]), words[-1] if words else ""
        if path == "frequencies":
            return "GaussianFourierProjection_0/W"
        if words[-2:-1] == ["attention"]:
            leaf = leaf if last == "norm" else {"weight": "W", "bias": "b"}[leaf]
            return f"{module('AttnBlockpp', place)}/{ATTENTION[last]}/{leaf}"
        if last == "progressive" and fir:
            return f"{module('Downsample', '.'.join(words))}/Conv2d_0/{leaf}"
        leaf = "kernel" if leaf == "weight" else leaf
        if last == "progressive":
            return f"{module('Downsample', '.'.join(words))}/Conv_0/{leaf}"
        if ".".join(words) in TOP:
            return f"{TOP['.'.join(words)]}/{leaf}"
        return f"{module('ResnetBlockBigGANpp', place)}/{BLOCK[last]}/{leaf}"

    names = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(net):
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        stacked, shape = (leaf.shape[0], leaf.shape[1:]) if ".runs." in path else (1, leaf.shape)
        names.append({name(path, i, stacked): shape for i in range(stacked)})
    return names


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _unpacked(content: bytes) -> Any:
    with from_extra("train"):
        import msgpack

    left = 2**18 + len(content) // 100  # entries, each of a byte or more, and a hundred bytes here

    def counted(value: Any) -> Any:
        nonlocal left
        left -= 1 + len(value)
        if left < 0:
            raise UserError("it has more entries than arrays have reason to")
        return value

    hooks: dict[str, Any] = {"ext_hook": _extension, "object_hook": counted, "list_hook": counted}
    return msgpack.unpackb(content, **hooks, strict_map_key=False, max_array_len=2**16, max_map_len=2**16)


def _extension(code: int, data: bytes) -> Any:
    """Flax's extension types: 1 an array, 2 a complex number, 3 a scalar; each a packed tuple."""
    import msgpack

    if code not in (1, 2, 3):
        raise ValueError(f"extension type {code}")
    if code == 2:
        return complex(*msgpack.unpackb(data))
    shape, name, values = msgpack.unpackb(data)
    dtype = jnp.dtype(name)  # knows bfloat16
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(values):
        raise ValueError(f"{len(values)} bytes for an array {shape} of {name}")
    return np.frombuffer(values, dtype).reshape(shape)


def _join(tree: Any) -> Any:
    """Arrays of a gigabyte and more are stored in pieces; here they become whole."""
    if not isinstance(tree, dict):
        return tree
    if "__msgpack_chunked_array__" not in tree:
        return {name: _join(value) for name, value in tree.items()}
    shape, chunks = ([part[str(i)] for i in range(len(part))] for part in (tree["shape"], tree["chunks"]))
    return np.concatenate(chunks).reshape([int(n) for n in shape])
