"""What a run needs to go on elsewhere, in files of at most 16 MB.

DIR gets a checkpoint of RUN, a workdir, the newest whole one without --step: parameters in float16, each average and moment
in 8 bits (gddim.compact), so 5 bytes a parameter with one average. `--train.init DIR` begins a run with it, at its step. A DIR
that is copied to RUN/snapshots tells the averages that sampling.ema is made of.

Measured on points and digits after 1,500 and 1,000 steps, same batches and noise: with both moments the loss of the later
steps was that of the uninterrupted run to 1e-5. With the second alone it was off by less than 0.006 over ten steps and less
than 0.0005 from then on; with none it rose by 0.006 and 0.015 over ten steps, and a warm-up hid that without a later gain.
On CIFAR-10 likewise, but with none by 0.13 over ten steps and 0.002 after 80 (experiments/results/cifar10.md).
"""

import contextlib
import math
import re
from typing import Any

import numpy as np
from etils import epath

from gddim import compact
from gddim.checkpoint import Checkpointer
from gddim.errors import UserError
from gddim.experiment.snapshots import average_names
from gddim.storage import check_empty

MOMENTS = {
    "both": {"mu": "signed", "nu": "positive"},
    "second": {"nu": "positive"},
    "none": {},
}


def export_state(
    run: epath.Path, folder: epath.Path, moments: str | None = None, step: int | None = None, room: float = math.inf
) -> compact.Packed:
    """Write a checkpoint of a run, the newest whole one without a step, to a new or empty folder, with these moments of Adam,
    without a word as many as there is room for in so many MB.

    Raises `UserError` where there is none such, no room, or the folder holds something.
    """
    check_empty(folder)
    with contextlib.closing(Checkpointer(run / "checkpoints")) as saved:
        if not saved.any():
            raise UserError(f"{run} holds no run with checkpoints")
        items, step = saved.restore(None, step)
        config = saved.config(step)
    rest, ema = items["train"], items["ema"]

    def tree(prefix: str) -> dict[str, np.ndarray]:
        """In the order of the leaves of the model, whatever that of the manifest is."""
        return {path: np.asarray(rest[f"{prefix}.{path}"]) for path in ema}

    widths = config.get("train", {}).get("ema_profiles", [])
    names = average_names(len(widths))
    vectors = {"model": compact.vector(tree("model")), "ema": compact.vector(ema)}
    vectors |= {name: compact.vector(tree(name)) for name in names[1:]}
    ways = {"model": "whole"} | dict.fromkeys(names, "near")
    about: dict[str, Any] = {"config": config, "widths": dict(zip(names, widths, strict=False))}
    adam = next((path[: -len(".count")] for path in rest if re.fullmatch(r"opt_state\..*count", path)), None)
    leaves = [(path, leaf.shape) for path, leaf in ema.items()]
    size = 0
    for kept in (MOMENTS[word] for word in ([moments] if moments else MOMENTS)):
        of_adam = kept if adam else {}
        more = {name: compact.vector(tree(f"{adam}.{name}")) for name in of_adam}
        count = {"count": int(rest[f"{adam}.count"])} if of_adam else {}
        packed = compact.Packed(step, leaves, vectors | more, ways | of_adam, about | count)
        parts = compact.encode(packed)
        size = sum(map(len, parts))
        if size <= 1e6 * room:
            compact.write_parts(folder, parts)
            return packed
    raise UserError(f"a state of {run} takes {size / 1e6:.4g} MB, more than the --room of {room:g}")
