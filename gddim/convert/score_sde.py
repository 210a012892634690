"""The checkpoints of score_sde_pytorch (Song et al. 2021, arXiv 2011.13456): the continuous DDPM++ and NCSN++.

A file holds the list of modules in the order of their calls, without names, options or process; what its shapes do not tell
is that of the published configurations: a network with Fourier features is of the VE SDE, told σ, on data in [0, 1], and
returns `σ score`; one with sinusoids is of VP (or sub-VP), is told 999 t and returns ε, unless it sees the input on its way
down, as that of VE of discrete times does, which is not read. Sizes are known by the attention, which those configurations have
at 16; FIR filters by the convolutions of the input on its way down, which theirs have.
"""

from __future__ import annotations

import io
import os
import reprlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gddim.convert.networks import Names, Part, names_of, ours, parts
from gddim.convert.published import Elsewhere, Published
from gddim.errors import UserError
from gddim.experiment import Experiment, Model, Sampling
from gddim.nn import NCSNpp, NCSNppConfig
from gddim.sde import VE, VP, SubVP
from gddim.torch_reader import arrays, torch_tree

LAYERS = {"norm_in": "GroupNorm_0", "conv_in": "Conv_0", "time": "Dense_0", "norm_out": "GroupNorm_1",
          "conv_out": "Conv_1", "shortcut": "Conv_2"}  # fmt: skip
ATTENTION = {"norm": "GroupNorm_0", "query": "NIN_0", "key": "NIN_1", "value": "NIN_2", "out": "NIN_3"}
ATTEND_AT = 16  # the height of images with attention in the published configurations
SIGMA_MAX = 50.0  # CIFAR-10's, of a file that does not tell it
UNTOLD = (
    "; taken as published is also that sums are divided by √2 (--net.no-rescale), and how large images are (--size)"
)
FIXED = ("sigmas", "all_modules.0.W")  # are in no average
SUB_VP = ("subvp", "sub_vp", "sub-vp")  # as names of published files have it
Process = Literal["vp", "subvp", "ve"]


@dataclass(frozen=True)
class State:
    """A training state of score_sde_pytorch or CLD-SGM, and what the shapes in it tell."""

    arrays: dict[str, np.ndarray]
    """The parameters by their modules' numbers, in our layout."""
    sigmas: np.ndarray | None
    """A range of noise levels, which score_sde's have, of every process."""
    step: int
    config: NCSNppConfig
    inputs: int
    """Channels of the images that the network takes,"""
    outputs: int
    """and returns."""
    side: int
    """Height of the images."""

    @classmethod
    def read(cls, file: io.BufferedReader, weights: Literal["ema", "raw"], size: int | None = None) -> State:
        """`size`: the height of the images. Raises `UserError` for another kind of file, and whatever bytes lead to."""
        tree = torch_tree(file)
        if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
            raise UserError(
                "it holds no model; the states of score_sde and CLD-SGM have model, ema, optimizer and step"
            )
        room = os.fstat(file.fileno()).st_size
        state = {str(name).removeprefix("module."): tensor for name, tensor in tree["model"].items()}
        model = dict(state)
        if weights == "ema":
            trained = [name for name in state if name not in FIXED]
            ema = tree.get("ema")
            averaged = ema.get("shadow_params") if isinstance(ema, dict) else None
            if not isinstance(averaged, list) or len(averaged) != len(trained):
                raise UserError(f"its ema.shadow_params is not a list of as many as its model trains, {len(trained)}")
            state |= zip(trained, averaged, strict=True)
        step = tree.get("step", 0)
        if type(step) is not int or not 0 <= step < 2**31:
            raise UserError(
                f"its step is {reprlib.repr(step):.60}; accepted is a whole number of at least 0, below 2³¹"
            )
        found = arrays(state, room)
        vectors = [name for name in model if name not in FIXED and found[name].ndim == 1]
        if weights == "ema" and vectors:
            raw = arrays({name: model[name] for name in vectors}, room)
            apart = np.concatenate([raw[name] - found[name] for name in vectors])
            if np.ptp(apart) < 1e-6:  # a state that is its average and a constant, as test files are, was moved whole
                found |= {name: found[name] - np.mean(apart).astype(np.float32) for name in FIXED if name in found}
        sigmas = found.pop("sigmas", None)
        found = {name: value if name.endswith(".W") else ours(value) for name, value in found.items()}
        return cls(found, sigmas, step, *shapes_of(found, size))


def read_score_sde(state: State, source: Any, process: Process | None = None) -> Published:
    """Raises `UserError` for a network of another kind."""
    config, found = state.config, dict(state.arrays)
    named = any(word in str(source).lower() for word in SUB_VP)
    if state.sigmas is None and process is None:
        raise UserError(
            "it has no sigmas, so it is of CLD-SGM's VPSDE, which is not read, unless --process says score_sde's"
        )
    if config.fourier:
        sigma_max = SIGMA_MAX if state.sigmas is None else float(f"{np.max(state.sigmas):.12g}")
        if not 0 < sigma_max < 1e6 or process not in (None, "ve"):
            raise UserError("its network takes the logarithm of σ, as for VE alone, or its range of σ is none")
        last = max(int(name.split(".")[1]) for name in found)
        for name in (f"all_modules.{last}.weight", f"all_modules.{last}.bias"):
            found[name] = -found[name]
        # on data in [-1, 1] all σ are twice those on [0, 1]
        sde, model, told = VE(2 * sigma_max), Model("eps", time_scale=0.5), "VE, on images that it saw in [0, 1]"
        sampling = Sampling(t_min=0.02)
    elif process == "ve":
        raise UserError("its network is told times, not σ: VE of discrete times is not read")
    elif process is None and config.progressive_input != "none" and not named:
        raise UserError(
            "its network is told times and sees the input on its way down, as that of VE of discrete times "
            "(ve/cifar10_ncsnpp), which is not read, unless --process says vp or subvp"
        )
    else:
        sub = process == "subvp" or (process is None and named)
        sde, model, sampling = (SubVP() if sub else VP()), Model("eps"), Sampling()
        one, other = ("sub-VP", "VP") if sub else ("VP", "sub-VP")
        told = f"{one}, which the file does not tell from {other} (--process), or from networks of discrete times"
    data = Elsewhere((state.side, state.side, state.outputs))
    experiment = Experiment("score_sde", sde, config, data, model, sampling=sampling)
    return Published(source, experiment, found, names, state.step, f"score_sde's, taken for one of {told}{UNTOLD}")


def shapes_of(found: dict[str, np.ndarray], size: int | None = None) -> tuple[NCSNppConfig, int, int, int]:
    """The network's configuration, its channels in and out, and the height of its images, from the shapes of its modules."""
    modules: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, value in found.items():
        word, number, *layer = name.split(".")
        if word != "all_modules" or not number.isdecimal() or len(number) > 4:
            raise UserError(f"its model has a {name:.60}, which NCSN++ has not")
        modules.setdefault(int(number), {})[".".join(layer)] = value.shape
    order = [modules[n] for n in sorted(modules)]
    blocks = [module for module in order if "Dense_0.weight" in module]
    _check_kind(order)
    fourier = "W" in order[0]
    features, hidden = order[fourier]["weight"]
    channels, width = order[2 + fourier]["weight"][2:]
    resampling = [
        module["Conv_0.weight"][2:] == module["Conv_1.weight"][2:] and "Conv_2.weight" in module for module in blocks
    ]
    # L levels of b blocks: b and one resampling on the way down, b + 1 and one on the way up, 2 in the middle
    per_level = resampling.index(True) if any(resampling) else (len(blocks) - 3) // 2
    levels, odd = divmod(len(blocks), 2 * per_level + 3)
    if odd or per_level < 1:
        raise UserError(f"its model has {len(blocks)} residual blocks, which are not those of whole levels")
    firsts = [blocks[level * (per_level + 1)]["Conv_1.weight"][-1] for level in range(levels)]
    attending, at = set(), -1
    for module in order:
        at += "Dense_0.weight" in module
        if "NIN_0.W" in module and at < levels * (per_level + 1) - 1:
            attending.add(at // (per_level + 1))
    side = size or (ATTEND_AT << min(attending) if attending else 32)
    kernels = [module for module in order[3 + fourier :] if set(module) <= {"Conv2d_0.weight", "Conv2d_0.bias"}]
    strided = [module for module in order[3 + fourier :] if set(module) <= {"Conv_0.weight", "Conv_0.bias"}]
    config = NCSNppConfig(
        width=width,
        multipliers=tuple(first // width for first in firsts),
        blocks=per_level,
        attention=tuple(side >> level for level in sorted(attending)),
        embedding="fourier" if fourier else "positional",
        fir=bool(kernels),
        progressive_input="residual" if kernels or strided else "none",
        features=features,
        hidden=hidden,
    )
    return config, channels, order[-1]["weight"][-1], side


def _check_kind(order: list[dict[str, tuple[int, ...]]]) -> None:
    """Raise `UserError` for options of score_sde's that ours has not."""
    levels = sum(len(module.get("weight", ())) == 2 for module in order)
    images = sum(len(module.get("weight", ())) == 4 for module in order)  # convolutions from images or to them
    combined = ("Conv.weight" in module or module.get("Conv_0.weight", ())[:1] == (1,) for module in order)
    for wrong, what in (
        (levels != 2, "is not told the noise level"),
        (any({"NIN_0.W", "Conv_0.weight"} <= module.keys() for module in order), "has DDPM's blocks"),
        (images != 2 or any(combined), "has input or output skips"),
    ):
        if wrong:
            raise UserError(
                f"its network {what}: read are DDPM++ and NCSN++, of BigGAN's blocks, with images at its ends"
            )


def names(net: NCSNpp) -> Names:
    """The parameters as score_sde numbers them: a module for each block, attention and other layer, in the order of calls."""
    numbers: dict[tuple[str, int], int] = {}
    for part in parts(net):
        last = max(numbers.values(), default=-1)
        numbers[part.place, part.index] = last + 1
        if part.attends:
            numbers[f"{part.place}.attention", part.index] = last + 2

    def name(part: Part, layer: str) -> str:
        *words, leaf = layer.split(".")
        number = numbers[part.place, part.index]
        if part.place == "frequencies":
            return f"all_modules.{number}.W"
        if words[:1] == ["attention"]:
            leaf = {"weight": "W", "bias": "b"}.get(leaf, leaf) if words[1] != "norm" else leaf
            words, number = [ATTENTION[words[1]]], number + 1
        elif part.role == "progressive":
            words = ["Conv2d_0" if net.config.fir else "Conv_0"]
        elif part.role != "layer":
            words = [LAYERS[words[0]]]
        return ".".join([f"all_modules.{number}", *words, "weight" if leaf == "scale" else leaf])

    return names_of(net, name)
