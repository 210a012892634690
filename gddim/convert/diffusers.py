"""Folders of diffusers' `UNet2DModel`, of the architecture of DDPM on CIFAR-10 (Ho et al. 2020, arXiv 2006.11239)."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from gddim.convert.networks import Names, Part, names_of, ours
from gddim.convert.published import Elsewhere, Published
from gddim.errors import UserError
from gddim.experiment import Experiment, Model
from gddim.nn import NCSNpp, NCSNppConfig
from gddim.safetensors import parse
from gddim.sde import VP
from gddim.storage import mapped
from gddim.torch_reader import read_torch

LAYERS = {"norm_in": "norm1", "conv_in": "conv1", "time": "time_emb_proj", "norm_out": "norm2", "conv_out": "conv2",
          "shortcut": "conv_shortcut"}  # fmt: skip
ATTENTION = {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
OLDER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
TOPS = {"time.0": "time_embedding.linear_1", "time.1": "time_embedding.linear_2", "conv_in": "conv_in",
        "norm_out": "conv_norm_out", "conv_out": "conv_out"}  # fmt: skip
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.bin")
# Options of a UNet2DModel with the values that are read here, first that of one that does not say.
FIXED = {"act_fn": ("silu", "swish"), "mid_block_scale_factor": (1,), "time_embedding_type": ("positional",),
         "downsample_type": ("conv",), "upsample_type": ("conv",), "center_input_sample": (False,),
         "class_embed_type": (None,), "num_class_embeds": (None,), "add_attention": (True,),
         "resnet_time_scale_shift": ("default",),
         "mid_block_type": ("UNetMidBlock2D",), "downsample_padding": (1, 0), "attn_norm_num_groups": (None,)}  # fmt: skip
READ = (
    "sample_size",
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "dropout",
    "freq_shift",
    "flip_sin_to_cos",
    "norm_num_groups",
    "norm_eps",
    "attention_head_dim",
    "time_embedding_dim",
    "num_train_timesteps",
)  # the last of a learned embedding alone
OF_VP = (
    "DDPM",
    "DDIM",
    "PNDM",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "DEISMultistep",
    "UniPCMultistep",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "LMSDiscrete",
    "KDPM2Discrete",
    "KDPM2AncestralDiscrete",
)
LATENT_BETAS = ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete")  # Stable Diffusion's, where they do not say
JSON_LIMIT = 2**21  # bytes, which Python makes thirty times as many of


def read_diffusers(folder: Path) -> Published:
    """A U-Net's folder, or that of a pipeline with `unet/` and `scheduler/`. Raises `UserError` for another architecture."""
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    pipeline = unet.absolute().parent if unet.absolute().name == "unet" else folder
    given = _json(unet / "config.json")
    config, shape = _config(given)
    if latent := [name for name in ("vae", "vqvae") if (pipeline / name).exists()]:
        raise UserError(f"its images are latent: beside it is a {latent[0]}, which is not read")
    weights = next((unet / name for name in WEIGHTS if (unet / name).is_file()), None)
    if weights is None:
        raise UserError(f"it has no {', '.join(WEIGHTS)}")
    kept = read_torch(weights) if weights.suffix == ".bin" else parse(mapped(weights), JSON_LIMIT)[0]
    found = {}
    for name, value in kept.items():
        for older, newer in OLDER.items():
            name = name.replace(older, newer) if ".attentions." in name else name
        found[name] = ours(value)
    if given.get("flip_sin_to_cos", True) and (kernel := found.get("time_embedding.linear_1.weight")) is not None:
        found["time_embedding.linear_1.weight"] = np.roll(kernel, len(kernel) // 2, axis=0)  # cosines first
    places = (pipeline / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    schedule = next((_json(place) for place in places if place.is_file()), None)
    sde = VP.from_betas(_betas(schedule or {}))
    model = Model("eps", time_scale=1.0, time_offset=-1.0)  # diffusers counts from 0 what is 1 here
    experiment = Experiment("diffusers", sde, config, Elsewhere(shape), model)
    told = "" if schedule else ", taken for one of DDPM's schedule: it has no scheduler_config.json"
    return Published(folder, experiment, found, names, 0, f"diffusers' UNet2DModel{told}")


def _config(given: dict[str, Any]) -> tuple[NCSNppConfig, tuple[int, int, int]]:
    if given.get("_class_name") != "UNet2DModel":
        raise UserError(f"its config.json is of a {given.get('_class_name')!s:.40}; read is UNet2DModel")
    for name, accepted in FIXED.items():
        if (value := given.get(name, accepted[0])) not in accepted:
            raise UserError(f"its {name} is {value!s:.40}; read is {' or '.join(map(str, accepted))}")
    if unknown := [name for name in given if name not in READ and name not in FIXED and not name.startswith("_")]:
        raise UserError(f"its config.json has options that are not known: {', '.join(unknown):.200}")
    outputs, size, channels = given["block_out_channels"], given["sample_size"], given["in_channels"]
    sides = size if isinstance(size, list) else [size, size]
    down, up = given["down_block_types"], given["up_block_types"]
    known = ("DownBlock2D", "AttnDownBlock2D")
    attend = [kind == "AttnDownBlock2D" for kind in down]
    mirrored = [kind == "AttnUpBlock2D" for kind in reversed(up)]
    if not set(down) <= set(known) or not set(up) <= {"UpBlock2D", "AttnUpBlock2D"} or attend != mirrored:
        raise UserError(
            f"its blocks are {', '.join(map(str, [*down, *up])):.200}; read are {', '.join(known)}, mirrored"
        )
    if channels != given["out_channels"] or any(n % outputs[0] for n in outputs):
        raise UserError("its channels are not multiples of the first level's, as many out as in")
    if [type(side) for side in sides] != [int, int]:
        raise UserError(f"its sample_size is {size!s:.40}; read are a number and a list of two")
    if given.get("freq_shift", 0) not in (0, 1):
        raise UserError(f"its freq_shift is {given['freq_shift']!s:.40}; read are 0 and 1")
    config = NCSNppConfig(
        width=outputs[0],
        multipliers=tuple(n // outputs[0] for n in outputs),
        blocks=given.get("layers_per_block", 2),
        attention=tuple(sides[0] >> level for level, does in enumerate(attend) if does),
        dropout=float(given.get("dropout", 0.0)),
        embedding="positional" if given.get("freq_shift", 0) == 1 else "positional_open",
        fir=False,
        progressive_input="none",
        style="diffusers" if given.get("downsample_padding", 1) else "ddpm",
        groups=given.get("norm_num_groups", 32),
        eps=float(given.get("norm_eps", 1e-5)),
        head=given.get("attention_head_dim", 8) or 0,
        hidden=given.get("time_embedding_dim") or 0,
    )
    return config, (*sides, channels)


def _betas(found: dict[str, Any]) -> np.ndarray:
    """A schedule's, β₁ … β_N; DDPM's own where it does not say."""
    if (predicts := found.get("prediction_type", "epsilon")) != "epsilon":
        raise UserError(f"its prediction_type is {predicts!s:.40}; read is epsilon")
    if found.get("predict_epsilon") is False:  # as earlier releases of diffusers said it
        raise UserError("its predict_epsilon is False; read is True")
    kind = str(found.get("_class_name", "DDPMScheduler")).removesuffix("Scheduler")
    if kind not in OF_VP or found.get("rescale_betas_zero_snr") or found.get("use_flow_sigmas"):
        raise UserError(
            f"its scheduler is {kind:.40}, or with flow sigmas or betas rescaled: read are {', '.join(OF_VP)}"
        )
    if (betas := found.get("trained_betas")) is not None:
        return np.asarray(betas, np.float64)
    start, end = (0.00085, 0.012) if kind in LATENT_BETAS else (1e-4, 0.02)
    first, last = float(found.get("beta_start", start)), float(found.get("beta_end", end))
    steps, schedule = found.get("num_train_timesteps", 1000), found.get("beta_schedule", "linear")
    if type(steps) is not int or not 1 <= steps <= 100_000:
        raise UserError(f"its num_train_timesteps is {steps!s:.40}; accepted is a whole number from 1 to 100,000")
    match schedule:
        case "linear":
            return np.linspace(first, last, steps)
        case "scaled_linear":
            return np.linspace(math.sqrt(first), math.sqrt(last), steps) ** 2
        case "squaredcos_cap_v2":
            t = np.arange(steps + 1) / steps
            alphas = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            return np.minimum(1 - alphas[1:] / alphas[:-1], 0.999)
        case _:
            raise UserError(
                f"its beta_schedule is {schedule!s:.40}; read are linear, scaled_linear and squaredcos_cap_v2"
            )


def names(net: NCSNpp) -> Names:
    """The parameters as diffusers names them."""
    last = len(net.down) - 1

    def name(part: Part, layer: str) -> str:
        *words, leaf = layer.split(".")
        leaf = "weight" if leaf == "scale" else leaf
        if part.role == "layer":
            return f"{TOPS[part.place]}.{leaf}"
        level = last - part.level if part.side == "up" else part.level
        where = "mid_block" if part.side == "middle" else f"{part.side}_blocks.{level}"
        if part.role == "resample":
            return f"{where}.{part.side}samplers.0.conv.{leaf}"
        if words[0] == "attention":
            return f"{where}.attentions.{part.number}.{ATTENTION[words[1]]}.{leaf}"
        return f"{where}.resnets.{part.number}.{LAYERS[words[0]]}.{leaf}"

    return names_of(net, name)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > JSON_LIMIT:
        raise UserError(f"it has no {path.name}, or a very large one")
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise UserError(f"its {path.name} is not an object")
    return found
