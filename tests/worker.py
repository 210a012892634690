"""One process of a small run, started by tests/test_multihost.py.

python tests/worker.py train --workdir DIR …   the command line of an experiment on points
python tests/worker.py colour VERB …   that of an experiment on small colour images
python tests/worker.py load DIR   gddim.load of a run, its newest step, on a device of each process
python tests/worker.py five DIR DATA FSDP ACCUMULATE   five steps of a small U-Net; losses and state go to DIR
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from runs import COLOUR

from gddim.checkpoint import Checkpointer
from gddim.data import Digits, FiveRings, Source, batches
from gddim.experiment import Experiment, Model, Training, main
from gddim.experiment.plan import Plan
from gddim.loading import load
from gddim.nn import MLPConfig, NCSNppConfig
from gddim.parallel import MeshConfig, global_batch, initialize
from gddim.sde import CLD

jax.block_until_ready(jax.numpy.zeros(()))  # as a process whose coefficients are JAX's does when it is imported


class Recorded:
    """A source that writes down which records are read, a line a batch."""

    def __init__(self, source: Source, file: Path):
        self.source, self.file = source, file
        self.shape, self.dtype, self.flip = source.shape, source.dtype, source.flip
        self.left = int(os.environ["RECORDS_UNTIL"])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        with self.file.open("a") as file:
            file.write(json.dumps(indices.tolist()) + "\n")
        self.left -= 1
        if self.left == 0 and jax.process_index() == 1:
            raise RuntimeError("the disk is on fire")
        return self.source[indices]


@dataclass(frozen=True)
class RecordedRings:
    """Five rings; what each process reads goes to a file of its own in $RECORDS.

    With $RECORDS_UNTIL=n process 1 fails to read after n batches, with $RECORDS_LOST=n it lacks n records.
    """

    shape = (2,)

    def train(self) -> Source:
        folder = Path(os.environ["RECORDS"])
        lost = jax.process_index() * int(os.environ.get("RECORDS_LOST", 0))
        return Recorded(FiveRings(1_000 - lost).train(), folder / f"{jax.process_index()}-of-{jax.process_count()}")

    def test(self) -> Source:
        return FiveRings(1_000).test()


POINTS = Experiment(
    name="worker",
    sde=CLD(),
    net=MLPConfig(width=64, depth=2),
    data=RecordedRings(),
    model=Model(data_std=1.0),
    train=Training(steps=60, batch=64, warmup=10, ema=0.99, report_every=1_000, save_every=5),
)
UNET = Experiment(
    name="worker_unet",
    sde=CLD(),
    net=NCSNppConfig(width=16, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.0, embedding="positional"),
    data=Digits(),
    train=Training(steps=5, batch=16, warmup=10),
)


def five_steps(folder: Path, data: int, fsdp: int, accumulate: int) -> None:
    initialize()
    train = replace(UNET.train, accumulate=accumulate)
    plan = Plan(replace(UNET, train=train, mesh=MeshConfig(data, fsdp)))
    leaves, structure = jax.tree.flatten(plan.init())
    update, source = plan.update(flip=False), Digits().train()
    rows = batches(source, train.batch, UNET.seed, 0, jax.process_index(), jax.process_count())
    losses = []
    for _ in range(5):
        leaves, metrics = update(leaves, global_batch(next(rows), plan.mesh))
        losses.append(float(metrics["loss"]))
    state, saved = structure.unflatten(leaves), Checkpointer(folder)
    saved.save(5, {"model": state.model, "ema": state.ema}, {"losses": losses})
    saved.close()


if __name__ == "__main__":
    if sys.argv[1] == "five":
        five_steps(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    elif sys.argv[1] == "load":
        initialize()
        print("loaded", load(sys.argv[2], data=RecordedRings()).shape)
    elif sys.argv[1] == "colour":
        main(COLOUR, sys.argv[2:])
    else:
        main(POINTS)
