"""A trained network in one file of the safetensors format: its parameters by their names, and in the metadata all else.

The metadata are text: `format`; `config`, the configuration of its run as JSON; `about`, where it comes from, as JSON;
`licence`; `sha256`, the digest of all of them and of the parameters. What the names are, and how to use the arrays without
this package, stands in experiments/weights/README.md.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float

from gddim import safetensors
from gddim.compact import digest_of
from gddim.errors import UserError
from gddim.storage import mapped, write_whole

FORMAT = "gddim model 1"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": jnp.dtype(jnp.bfloat16)}


class Weights(NamedTuple):
    """A trained network."""

    arrays: dict[str, Float[np.ndarray, "..."]]
    """Its parameters by their paths in the model, in float32, or in bfloat16 but for frequencies of Fourier features."""
    config: dict[str, Any]
    """The configuration of its run."""
    about: dict[str, Any]
    """Where it comes from: step, images, which average, digest of the parameters and of what they were rounded
    from, versions, commit."""
    licence: str = ""


def encode(weights: Weights) -> bytes:
    """The file, the same bytes for the same network."""
    told = {"format": FORMAT, "licence": weights.licence}
    told |= {
        name: json.dumps(value, sort_keys=True)
        for name, value in (("config", weights.config), ("about", weights.about))
    }
    return safetensors.encode(weights.arrays, told | {"sha256": _digest(weights.arrays, told)})


def write(path: epath.Path, weights: Weights) -> None:
    """Write a file, whole or not at all."""
    write_whole(path, encode(weights))


def read(path: epath.Path) -> Weights:
    """The network in a file. Raises `UserError` unless it is one, whole, and as it was written."""
    try:
        arrays, told = safetensors.parse(mapped(path))
        if told.get("format") != FORMAT:
            raise UserError(f"its format is {told.get('format')!r:.80}")
        digest = told.pop("sha256")
        found = Weights(arrays, json.loads(told["config"]), json.loads(told["about"]), told["licence"])
        if not isinstance(found.config, dict) or not isinstance(found.about, dict):
            raise UserError("its config and about are no objects")
    except Exception as error:  # whatever JSON and the disk make of bytes that are not theirs
        raise UserError(f"{path} is no file of python -m gddim.export: {error!s:.200}") from error
    if digest != _digest(arrays, told):
        raise UserError(f"{path} is damaged: its bytes are not those that were written")
    return found


def _digest(arrays: Mapping[str, np.ndarray], told: Mapping[str, str]) -> str:
    return hashlib.sha256((digest_of(arrays) + json.dumps(dict(told), sort_keys=True)).encode()).hexdigest()
