"""EDM's pickles (Karras et al. 2022, arXiv 2206.00364): persistent classes, of which only names and states are read.

`ema` is a preconditioned U-Net: `EDMPrecond` a denoiser of every process, the others ε of theirs; of what iDDPM's says, the
variance is left out. SongUNet is DDPM++ or NCSN++, DhariwalUNet ADM.
"""

import dataclasses
import re
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from gddim.convert.networks import Names, Part, names_of, ours
from gddim.convert.published import Elsewhere, Published
from gddim.errors import UserError
from gddim.experiment import Experiment, Model, Sampling
from gddim.nn import NCSNpp, NCSNppConfig
from gddim.pickles import Calls, Thing, unpickle
from gddim.sde import VE, VP
from gddim.storage import mapped
from gddim.torch_reader import CALLS, Tensor, Window, arrays, empty

LAYERS = {"norm_in": "norm0", "conv_in": "conv0", "time": "affine", "norm_out": "norm1", "conv_out": "conv1",
          "shortcut": "skip", "attention.norm": "norm2", "attention.query": "qkv.0", "attention.key": "qkv.1",
          "attention.value": "qkv.2", "attention.out": "proj"}  # fmt: skip
NETS = {"SongUNet": "ncsnpp", "DhariwalUNet": "adm"}
KNOWN = {
    *("img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim", "model_channels", "channel_mult"),
    *("channel_mult_emb", "num_blocks", "attn_resolutions", "dropout", "label_dropout", "embedding_type"),
    *("channel_mult_noise", "encoder_type", "decoder_type", "resample_filter"),
}
EMBEDDINGS = {"fourier": "fourier_linear", "positional": "positional"}


def _persistent(meta: Any) -> Thing:
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str):
        raise UserError("it holds an object that EDM's persistence does not write")
    return Thing(meta["class_name"], meta.get("state"))


PICKLED: Calls = {
    **CALLS,
    "torch_utils.persistence _reconstruct_persistent_obj": _persistent,
    "torch.nn.modules.container ModuleDict": lambda: Thing("ModuleDict"),
    "torch.nn.modules.container ModuleList": lambda: Thing("ModuleList"),
    "dnnlib.util EasyDict": empty,
}


def read_edm(path: Path) -> Published:
    """The averaged network of a snapshot. Raises `UserError` for another kind of network, and whatever bytes lead to."""
    size = path.stat().st_size
    tree = unpickle(Window(mapped(path)), PICKLED, size)
    outer = tree.get("ema") if isinstance(tree, dict) else None
    model = _part(outer, "_modules").get("model")
    options = _part(model, "_init_kwargs")
    if outer is None or model is None or model.name not in NETS:
        raise UserError(f"its ema is not a network of {' or '.join(NETS)} in a preconditioner")
    if unknown := sorted(map(str, options.keys() - KNOWN)) or model.state.get("_init_args"):
        raise UserError(f"its {model.name} has options that are not known: {_shown(unknown)}")
    config = _song(options) if model.name == "SongUNet" else _dhariwal(options)
    found = _adapted(arrays(dict(_tensors(model)), size), config)
    channels, side = _whole(options, "in_channels"), _whole(options, "img_resolution")
    means = 1 + (outer.name == "iDDPMPrecond")  # which returns a variance, too
    if means * channels != (returned := _whole(options, "out_channels")):
        raise UserError(f"its network takes {channels} channels and returns {returned}")
    data = Elsewhere((side, side, channels), config.classes)
    process = _process(outer, found, config, channels)
    told = f"EDM's {outer.name} of a {model.name}"
    return Published(path, Experiment("edm", net=process.pop("net"), data=data, **process), found, names, 0, told)


def _process(outer: Thing, found: dict[str, np.ndarray], config: NCSNppConfig, channels: int) -> dict[str, Any]:
    """What the preconditioner makes of the network. A network that says −ε gets its last layer negated."""
    state, last = outer.state, [name for name in found if re.search(r"(_aux|out)_conv\.(weight|bias)$", name)]
    match outer.name:
        case "EDMPrecond":  # EDM's sampler, --sampler heun, keeps within what the network supports
            top, end = min(80.0, float(state.get("sigma_max", 80))), max(0.002, float(state.get("sigma_min", 0)))
            return {
                "sde": VE(top), "net": config, "model": Model("data", data_std=float(state["sigma_data"])),
                "sampling": Sampling(nfe=35, t_min=end),
            }  # fmt: skip
        case "VPPrecond":
            sde = VP(float(state["beta_min"]), float(state["beta_min"] + state["beta_d"]))
            return {"sde": sde, "net": config, "model": Model("eps", time_scale=float(state["M"] - 1))}
        case "VEPrecond":
            if not config.fourier:
                raise UserError("its VEPrecond tells a positional network the logarithm of σ, which none of ours takes")
            found |= {name: -found[name] for name in last}
            net, end = dataclasses.replace(config, embedding="fourier"), float(state.get("sigma_min", 0.02))
            how = {"model": Model("eps", time_scale=0.5), "sampling": Sampling(t_min=end)}
            return {"sde": VE(float(state["sigma_max"])), "net": net, **how}
        case "iDDPMPrecond":  # counts noise levels down to 0, which are told up from 0
            found |= {name: found[name][..., :channels] for name in last}
            if (steps := _whole(state, "M")) > 100_000:
                raise UserError(f"its M is {steps}, where a number of steps must be")
            alphas = np.sin(np.pi / 2 * np.arange(steps, -1, -1) / steps / (float(state["C_2"]) + 1)) ** 2
            sde = VP.from_betas(1 - np.maximum(alphas[1:] / alphas[:-1], float(state["C_1"])))
            return {"sde": sde, "net": config, "model": Model("eps", time_scale=1.0, time_offset=-1.0)}
        case _:
            read = "EDMPrecond, VPPrecond, VEPrecond and iDDPMPrecond"
            raise UserError(f"its ema is a {outer.name:.40}; read are {read}")


def _song(given: dict[str, Any]) -> NCSNppConfig:
    width, filters = _whole(given, "model_channels"), given.get("resample_filter", [1, 1])
    if filters not in ([1, 1], [1, 3, 3, 1]):
        raise UserError(f"resample_filter: {_shown(filters)}; known are [1, 1] and [1, 3, 3, 1]")
    encoder, decoder = given.get("encoder_type", "standard"), given.get("decoder_type", "standard")
    if encoder not in ("standard", "residual") or decoder != "standard":
        said = f"encoder_type {_shown(encoder)}, decoder_type {_shown(decoder)}"
        raise UserError(f"{said}: known are standard or residual, and standard")
    embedding = given.get("embedding_type", "positional")
    if embedding not in list(EMBEDDINGS):
        raise UserError(f"embedding_type: {_shown(embedding)}; known are {', '.join(EMBEDDINGS)}")
    return NCSNppConfig(
        width=width,
        multipliers=_wholes(given, "channel_mult", (1, 2, 2, 2)),
        blocks=_whole(given, "num_blocks", 4),
        attention=_wholes(given, "attn_resolutions", (16,)),
        dropout=given.get("dropout", 0.1),
        embedding=EMBEDDINGS[embedding],  # pyright: ignore[reportArgumentType]
        fir=len(filters) == 4,
        progressive_input="averaged" if encoder == "residual" and len(filters) == 2 else
        ("residual" if encoder == "residual" else "none"),
        classes=_whole(given, "label_dim", 0),
        augment=_whole(given, "augment_dim", 0),
        features=width * _whole(given, "channel_mult_noise", 1),
        hidden=width * _whole(given, "channel_mult_emb", 4),
    )  # fmt: skip


def _dhariwal(given: dict[str, Any]) -> NCSNppConfig:
    width = _whole(given, "model_channels")
    return NCSNppConfig(
        width=width,
        multipliers=_wholes(given, "channel_mult", (1, 2, 3, 4)),
        blocks=_whole(given, "num_blocks", 3),
        attention=_wholes(given, "attn_resolutions", (32, 16, 8)),
        dropout=given.get("dropout", 0.1),
        embedding="positional_open",
        fir=False,
        progressive_input="none",
        style="adm",
        classes=_whole(given, "label_dim", 0),
        augment=_whole(given, "augment_dim", 0),
        hidden=width * _whole(given, "channel_mult_emb", 4),
        eps=1e-5,
        head=64,
    )


def _whole(given: dict[str, Any], name: str, default: int | None = None) -> int:
    value = given.get(name, default)
    if type(value) is not int or not 0 <= value < 2**20:
        raise UserError(f"its {name} is {_shown(value)}, where a number of these must be")
    return value


def _wholes(given: dict[str, Any], name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    values = given.get(name, default)
    if not isinstance(values, list | tuple) or len(values) > 32:
        raise UserError(f"its {name} is {_shown(values)}, where numbers must be")
    return tuple(_whole({name: value}, name) for value in values)


def _shown(value: Any) -> str:
    """In a few words: what is listed within a list again and again would be a text without an end."""
    return f"{reprlib.repr(value):.60}"


def _part(thing: Any, name: str) -> dict[str, Any]:
    """An attribute of a module that is a dictionary; empty where there is none."""
    state = thing.state if isinstance(thing, Thing) else None
    value = state.get(name) if isinstance(state, dict) else None
    return value if isinstance(value, dict) else {}


def _tensors(module: Thing) -> list[tuple[str, Tensor]]:
    """The parameters and buffers of a module and of all within, by their paths; each module is met once."""
    found, left, met = [], [("", module)], set()
    while left:
        prefix, thing = left.pop()
        if id(thing) in met:
            raise UserError("its modules are not a tree")
        met.add(id(thing))
        for kind in ("_parameters", "_buffers"):
            found += [(f"{prefix}{name}", x) for name, x in _part(thing, kind).items() if isinstance(x, Tensor)]
        left += [(f"{prefix}{name}.", x) for name, x in _part(thing, "_modules").items() if isinstance(x, Thing)]
    return found


def _adapted(found: dict[str, np.ndarray], config: NCSNppConfig) -> dict[str, np.ndarray]:
    """In our layout: queries, keys and values apart; without the filters."""
    made: dict[str, np.ndarray] = {}
    for name, value in found.items():
        *_, module, leaf = f".{name}".split(".")
        if leaf == "resample_filter":
            continue
        if module == "qkv" and value.shape[0] % (3 * (heads := config.heads(max(value.shape[0] // 3, 1)) or 1)) == 0:
            split = value.reshape(heads, -1, 3, *value.shape[1:2])  # of a kernel (3C, C, 1, 1), or a bias (3C,)
            for i in range(3):
                part = split[:, :, i].reshape(-1, *value.shape[1:2])
                made[f"{name.removesuffix(leaf)}{i}.{leaf}"] = ours(part)
        elif config.style == "adm" and name in ("map_layer0.weight", "map_augment.weight"):  # cosines first
            axis = int(module == "map_augment")
            made[name] = np.roll(ours(value), value.T.shape[axis] // 2, axis=axis)
        else:
            made[name] = ours(value[..., 0, 0] if module == "proj" and value.ndim == 4 else value)
    if config.style == "adm" and config.classes:
        made["map_label.bias"] = np.zeros(config.hidden_features, np.float32)
    return made


def names(net: NCSNpp) -> Names:
    """The parameters as EDM names them, queries, keys and values as if they were apart."""
    side, song = net.in_shape[0], net.config.style == "ncsnpp"
    tops = {"frequencies": "map_noise.freqs", "time.0": "map_layer0", "time.1": "map_layer1", "label": "map_label",
            "augment": "map_augment.weight",
            "conv_in": f"enc.{side}x{side}_conv", "norm_out": f"dec.{side}x{side}_aux_norm" if song else "out_norm",
            "conv_out": f"dec.{side}x{side}_aux_conv" if song else "out_conv"}  # fmt: skip

    def module(part: Part) -> str:
        if part.role == "layer":
            return tops[part.place]
        size = side >> part.level
        match part.side, part.role:
            case "middle", _:
                return f"dec.{size}x{size}_in{part.number}"
            case "down", "block":
                return f"enc.{size}x{size}_block{part.number}"
            case "up", "block":
                return f"dec.{size}x{size}_block{part.number}"
            case "down", role:
                return f"enc.{size // 2}x{size // 2}_{'down' if role == 'resample' else 'aux_residual'}"
            case _:
                return f"dec.{2 * size}x{2 * size}_up"

    def name(part: Part, layer: str) -> str:
        place, _, leaf = layer.rpartition(".")
        words = [module(part), LAYERS.get(place, place), "weight" if leaf == "scale" else leaf]
        return ".".join(filter(None, words))

    return names_of(net, name)
