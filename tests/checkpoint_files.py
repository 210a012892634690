"""Checkpoints as other code bases write them, and pickles as nobody should: written here opcode by opcode."""

import dataclasses
import json
import struct
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from gddim import convert
from gddim.convert import diffusers, edm, score_sde
from gddim.errors import UserError
from gddim.nn import NCSNppConfig


@dataclasses.dataclass(frozen=True)
class Name:
    """Pickles as a reference to a global of this name."""

    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """Pickles as a call of a global."""

    name: str
    arguments: tuple


@dataclasses.dataclass(frozen=True)
class Raw:
    """Opcodes as they are."""

    code: bytes


@dataclasses.dataclass(frozen=True)
class Object:
    """Pickles as an object of a class, and its state."""

    name: str
    state: object


@dataclasses.dataclass(frozen=True)
class Persistent:
    """Pickles as a reference to something outside of the pickle."""

    key: tuple


def encode(value: object) -> bytes:
    """The opcodes of protocol 2 that put a value on the stack, as PyTorch writes them."""
    match value:
        case Raw(code):
            return code
        case float():
            return b"G" + struct.pack(">d", value)
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"\x8a" + bytes([10]) + value.to_bytes(10, "little", signed=True)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(encode, value)) + b"t"
        case list():
            return b"](" + b"".join(map(encode, value)) + b"e"
        case dict():
            return b"}(" + b"".join(encode(k) + encode(v) for k, v in value.items()) + b"u"
        case Name(name):
            return b"c" + name.replace(" ", "\n").encode() + b"\n"
        case Call(name, arguments):
            return encode(Name(name)) + encode(arguments) + b"R"
        case Object(name, state):
            return encode(Name(name)) + b")\x81" + encode(state) + b"b"
        case Persistent(key):
            return encode(key) + b"Q"
    raise TypeError(value)


def pickled(value: object, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + encode(value) + b"."


def tensor(key: str, shape: tuple, strides: tuple, count: int, offset: int = 0, kind: str = "FloatStorage") -> Call:
    storage = Persistent(("storage", Name(f"torch {kind}"), key, "cpu", count))
    hooks = Call("collections OrderedDict", ())
    return Call("torch._utils _rebuild_tensor_v2", (storage, offset, shape, strides, False, hooks))


def write_zip(path: Path, tree: object, storages: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickled(tree))
        for key, raw in storages.items():
            archive.writestr(f"model/data/{key}", raw)
    return path


def write_stream(path: Path, tree: object, storages: dict[str, bytes]) -> Path:
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}, tree, list(storages)]
    body = [struct.pack("<q", len(raw) // 4) + raw for raw in storages.values()]
    path.write_bytes(b"".join([*map(pickled, head), *body]))
    return path


def storage(value: np.ndarray) -> Call:
    """A tensor whose storage is a file within the pickle, as a network pickled as an object has it."""
    key = Persistent(("storage", Name("torch FloatStorage"), "7", "cpu", value.size))
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}, key, ["7"]]
    content = (
        b"".join(map(pickled, head)) + struct.pack("<q", value.size) + np.ascontiguousarray(value, "<f4").tobytes()
    )
    strides = tuple(int(n) // value.itemsize for n in np.empty(value.shape, value.dtype).strides)
    nested = Call("torch.storage _load_from_bytes", (content,))
    hooks = Call("collections OrderedDict", ())
    data = Call("torch._utils _rebuild_tensor_v2", (nested, 0, value.shape, strides, False, hooks))
    return Call("torch._utils _rebuild_parameter", (data, True, hooks))


def persistent(kind: str, state: dict) -> Call:
    """An object of a class of EDM's."""
    meta = {"type": "class", "version": 6, "module_src": "", "class_name": kind, "state": state}
    return Call("torch_utils.persistence _reconstruct_persistent_obj", (meta,))


def parameters_of(net, names) -> dict[str, np.ndarray]:
    """The parameters of a network of ours by their published names, in our layout."""
    found = {}
    for each, leaf in zip(names, jax.tree.leaves(net), strict=True):
        parts = np.asarray(leaf).reshape(len(each), *next(iter(each.values())))
        found |= zip(each, parts, strict=True)
    return found


def theirs(value: np.ndarray) -> np.ndarray:
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def edm_tree(net, kind: str, options: dict, outer: str = "EDMPrecond", **state) -> dict:
    """A snapshot of a network of ours as if it were one of EDM's, with what it has beside."""
    modules: dict = {}
    found = {name: theirs(value) for name, value in parameters_of(net, edm.names(net)).items()}
    for name in [name for name in found if ".qkv.0." in name]:
        parts = [found.pop(name.replace(".qkv.0.", f".qkv.{i}.")) for i in range(3)]
        heads = net.config.heads(len(parts[0]))
        split = np.stack([part.reshape(heads, -1, *part.shape[1:]) for part in parts], axis=2)
        merged = split.reshape(-1, *split.shape[3:])
        found[name.replace(".qkv.0.", ".qkv.")] = merged[..., None, None] if merged.ndim == 2 else merged
    if net.config.style == "adm":
        found.pop("map_label.bias", None)
        weight = found["map_layer0.weight"]
        found["map_layer0.weight"] = np.roll(weight, weight.shape[1] // 2, axis=1)
        if net.config.augment:
            weight = found["map_augment.weight"]
            found["map_augment.weight"] = np.roll(weight, len(weight) // 2, axis=0)
    for name, value in found.items():
        *folders, leaf = name.split(".")
        inner = modules
        for folder in folders:
            inner = inner.setdefault(folder, {})
        proj = folders[-1] == "proj" and leaf == "weight"
        inner[leaf] = storage(value[..., None, None] if proj else value)

    def module(tree: dict) -> Object:
        inside = {name: value for name, value in tree.items() if isinstance(value, dict)}
        own = {name: value for name, value in tree.items() if not isinstance(value, dict)}
        made = {
            "training": False,
            "_parameters": own,
            "_buffers": {},
            "_modules": {k: module(v) for k, v in inside.items()},
        }
        return Object("torch.nn.modules.container ModuleDict", made)

    top = module(modules).state
    model = persistent(kind, {**top, "_init_args": (), "_init_kwargs": options})
    ema = persistent(outer, {"_parameters": {}, "_buffers": {}, "_modules": {"model": model}, **state})
    return {"ema": ema, "loss_fn": None, "dataset_kwargs": {"path": "cifar10.zip"}}


def score_sde_state(net, sigmas=None) -> tuple[dict, dict[str, bytes]]:
    """A training state of a network of ours as score_sde writes it, and its storages; raw weights are averages plus 1,
    biases plus 2."""
    found = parameters_of(net, score_sde.names(net))
    storages: dict[str, bytes] = {}

    def kept(value: np.ndarray) -> Call:
        value, kind = np.ascontiguousarray(value), {4: "FloatStorage", 8: "DoubleStorage"}[value.itemsize]
        storages[key := str(len(storages))] = value.tobytes()
        strides = tuple(int(n) // value.itemsize for n in value.strides)
        return tensor(key, value.shape, strides, value.size, kind=kind)

    order = sorted(found, key=lambda name: int(name.split(".")[1]))
    found = {name: found[name] if name.endswith(".W") else theirs(found[name]) for name in order}
    model = {} if sigmas is None else {"module.sigmas": kept(np.asarray(sigmas))}
    fixed = "all_modules.0.W"
    apart = {name: 1 + name.endswith("bias") if name != fixed else 0 for name in found}
    model |= {f"module.{name}": kept(value + np.float32(apart[name])) for name, value in found.items()}
    averaged = [kept(value) for name, value in found.items() if name != fixed]
    ema = {"decay": None, "num_updates": 3, "shadow_params": averaged}
    return {"optimizer": {"state": {}, "param_groups": []}, "model": model, "ema": ema, "step": 12}, storages


def options_of(config, side, **more):
    return {
        "img_resolution": side, "in_channels": 3, "out_channels": 3, "label_dim": config.classes,
        "augment_dim": config.augment,
        "model_channels": config.width, "channel_mult": list(config.multipliers), "num_blocks": config.blocks,
        "attn_resolutions": list(config.attention), **more,
    }  # fmt: skip


def edm_net(seed=0, side=16, outputs=3, **changes):
    settings = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (side // 2,), "embedding": "positional"}
    config = NCSNppConfig(**{**settings, "fir": False, "progressive_input": "none", **changes})
    net = config.build((side, side, 3), outputs, jax.random.key(seed))
    return config, jax.tree.map(lambda leaf: leaf + 0.1, net)


def diffusers_folder(folder, net, **options):
    """A UNet2DModel's folder of a network of ours."""
    kinds = ["Attn" * (side in net.config.attention) for side in (16, 8)]
    config = {
        "_class_name": "UNet2DModel", "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
        "block_out_channels": [8, 16], "norm_num_groups": 4, "norm_eps": 1e-6, "attention_head_dim": None, "dropout": 0.1,
        "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)], **options,
    }  # fmt: skip
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, value in parameters_of(net, diffusers.names(net)).items():
        raw = np.ascontiguousarray(theirs(value)).tobytes()
        header[name] = {"dtype": "F32", "shape": theirs(value).shape, "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    words = json.dumps(header).encode()
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "scheduler_config.json").write_text(json.dumps({"num_train_timesteps": 20, "beta_end": 0.3}))
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(struct.pack("<Q", len(words)) + words + body)
    return folder


def refused(path, **options):
    with pytest.raises(UserError) as caught:
        convert.read(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 3000
    return message
