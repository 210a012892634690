"""A trained network as a file that stands alone, and as a program that needs none of this package."""

from __future__ import annotations

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from gddim.checkpoint import by_path
from gddim.compact import is_fixed
from gddim.evaluation.provenance import software
from gddim.experiment.checkpoints import checkpoint_digest
from gddim.experiment.trained import Trained
from gddim.experiment.workdir import RECORDS
from gddim.loading import Loaded
from gddim.weights import DTYPES, Weights

PLATFORMS = ("cpu", "cuda", "tpu")


def exported(found: Trained, dtype: str, licence: str) -> Weights:
    """The network as a file has it: parameters in a type, but for frequencies of Fourier features, which stay float32, the
    configuration of its run, where it comes from.

    Where the type rounds them, `about` has the digest of what they become, by which what reads the file calls them in tables
    and results, and as `rounded_from` that of what they were.
    """
    rounded = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            x if is_fixed(jax.tree_util.keystr(path, simple=True, separator=".")) else x.astype(DTYPES[dtype])
        ),
        found.params,
    )
    kept = jax.tree.map(lambda x, like: x.astype(like.dtype), rounded, found.params)
    told = dict(found.about)
    before = told.pop("licence", "")
    if (digest := checkpoint_digest(kept)) != told["checkpoint"]:
        told |= {"checkpoint": digest, "rounded_from": told["checkpoint"]}
    arrays = {name: np.asarray(leaf) for name, leaf in by_path(rounded).items()}
    about = told | {"parameters": sum(x.size for x in arrays.values()), "dtype": dtype, **software()}
    config = shareable(found.config)
    config[RECORDS] = {"shape": [*found.experiment.data.shape]} | config.get(RECORDS, {})
    return Weights(arrays, config, about, licence or before)


def shareable(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a run without what is of its machine, or of what is made with the network: the mesh, where data and
    other files lay, tables among them, evaluations, the length of an average that the parameters are already.
    """
    told = {name: value for name, value in config.items() if name not in ("mesh", "rule", "eval", "weights")}
    data = config.get("data", {}).items()
    told["data"] = {name: value for name, value in data if name == "type" or not isinstance(value, str)}
    if RECORDS in told:
        told[RECORDS] = {name: value for name, value in told[RECORDS].items() if name != "stamp"}
    if "table:" in str(told.get("sampler")):
        del told["sampler"]
    changes = {"train": {"init": None}, "sampling": {"ema": 0.0}}
    return told | {part: told.get(part, {}) | change for part, change in changes.items()}


def portable(model: Loaded, **how: Any) -> bytes:
    """A sampler as a program in StableHLO, of seeds `(b,)` uint32, any b, to samples `(b, *dims, C)`: parameters and
    coefficients are in it. `jax.export.deserialize(bytes).call(seeds)` runs it on CPU, CUDA or TPU without this package.

    `how`: as in `Loaded.sample`.
    """
    seeds = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b"), jnp.uint32)
    program = jax.export.export(jax.jit(lambda seeds: model.sample_seeds(seeds, **how)), platforms=PLATFORMS)
    return bytes(program(seeds).serialize())
