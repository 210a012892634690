"""The training states that gDDIM's authors published: flax's msgpack format, read without flax or pickle."""

import collections
import math
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
import numpy as np
from etils import epath

from gddim.convert.networks import Names, Part, fill, names_of, parts
from gddim.convert.score_sde import ATTENTION, LAYERS
from gddim.errors import UserError, from_extra, place
from gddim.nn import NCSNpp

M = TypeVar("M")
BINARY = {0xC4: 1, 0xC5: 2, 0xC6: 4}  # bytes of the length of so many bytes, by what comes before it, in msgpack

WEIGHTS = {"ema": ("params_ema",), "raw": ("optimizer", "target")}
TOP = {"time.0": "Dense_0", "time.1": "Dense_1", "conv_in": "Conv_0", "norm_out": "GroupNorm_0", "conv_out": "Conv_1"}


def read_state(path: epath.PathLike) -> dict[Any, Any]:
    """A flax msgpack file as nested dictionaries of NumPy arrays, by hand: neither flax nor pickle is involved."""
    path = place(path)
    try:
        with path.open("rb") as file:
            state = _join(_unpacked(file, path.stat().length))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # whatever msgpack and NumPy make of bytes that are not theirs
        raise UserError(f"{path} is no flax msgpack file, or not all of it: {error!r:.200}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a training state")
    return state


def assign(state: dict[Any, Any], model: M, weights: Literal["ema", "raw"], source: Any) -> M:
    """The model with the parameters of a published training state, the averaged ones or the raw ones.

    `model` is an `NCSNpp` or holds one as `.net`; its own parameters serve as shapes, so `eqx.filter_eval_shape` of
    its construction will do. `source` is what errors call the state. Raises `UserError` naming the parameters that are
    missing, unexpected or of another shape, by their published paths.
    """
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

    Flax numbers the modules of a class in the order of their calls.
    """
    modules: dict[tuple[Part, str], str] = {}
    count: collections.Counter[str] = collections.Counter()
    for part in parts(net):
        kinds = {"layer": (), "progressive": ("Downsample",)}.get(part.role, ("ResnetBlockBigGANpp",))
        for kind in (*kinds, *("AttnBlockpp",) * part.attends):
            modules[part, kind] = f"{kind}_{count[kind]}"
            count[kind] += 1

    def name(part: Part, layer: str) -> str:
        *words, leaf = layer.split(".")
        kernel = "kernel" if leaf == "weight" else leaf
        if part.place == "frequencies":
            return "GaussianFourierProjection_0/W"
        if part.role == "layer":
            return f"{TOP[part.place]}/{kernel}"
        if part.role == "progressive":
            return f"{modules[part, 'Downsample']}/{f'Conv2d_0/{leaf}' if net.config.fir else f'Conv_0/{kernel}'}"
        if words[0] == "attention":
            leaf = leaf if words[1] == "norm" else {"weight": "W", "bias": "b"}[leaf]
            return f"{modules[part, 'AttnBlockpp']}/{ATTENTION[words[1]]}/{leaf}"
        return f"{modules[part, 'ResnetBlockBigGANpp']}/{LAYERS[words[0]]}/{kernel}"

    return names_of(net, name)


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _unpacked(file: Any, size: int) -> Any:
    """What a file holds; of its bytes no more than an array at a time are in memory twice."""
    with from_extra("train"):
        import msgpack

    left = 2**18 + size // 100  # entries, each of a byte or more, and a hundred bytes here

    def counted(value: Any) -> Any:
        nonlocal left
        left -= 1 + len(value)
        if left < 0:
            raise UserError("it has more entries than arrays have reason to")
        return value

    hooks: dict[str, Any] = {"ext_hook": _extension, "object_hook": counted, "list_hook": counted}
    lengths = {"max_buffer_size": size, "max_array_len": 2**16, "max_map_len": 2**16}
    unpacker = msgpack.Unpacker(file, read_size=min(size, 2**20), strict_map_key=False, **hooks, **lengths)
    found = unpacker.unpack()
    if unpacker.tell() != size:
        raise ValueError(f"{size - unpacker.tell()} bytes after its end")
    return found


def _extension(code: int, data: bytes) -> Any:
    """Flax's extension types: 1 an array, 2 a complex number, 3 a scalar; each a packed tuple."""
    import msgpack

    if code not in (1, 2, 3):
        raise ValueError(f"extension type {code}")
    if code == 2:
        return complex(*msgpack.unpackb(data))
    head = msgpack.Unpacker()
    head.feed(data[:1024])
    parts, shape, name = head.read_array_header(), head.unpack(), head.unpack()
    start, dtype = head.tell(), jnp.dtype(name)  # knows bfloat16
    start += 1 + BINARY[data[start]]  # the length of the values, which are the rest, and no copy
    told, values = int.from_bytes(data[head.tell() + 1 : start]), len(data) - start
    if parts != 3 or dtype.hasobject or not math.prod(shape) * dtype.itemsize == values == told:
        raise ValueError(f"{values} bytes for an array {shape} of {name}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def _join(tree: Any) -> Any:
    """Arrays of a gigabyte and more are stored in pieces; here they become whole."""
    if not isinstance(tree, dict):
        return tree
    if "__msgpack_chunked_array__" not in tree:
        return {name: _join(value) for name, value in tree.items()}
    shape, chunks = ([part[str(i)] for i in range(len(part))] for part in (tree["shape"], tree["chunks"]))
    return np.concatenate(chunks).reshape([int(n) for n in shape])
