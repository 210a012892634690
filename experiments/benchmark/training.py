"""What training costs: the step of each experiment, the loop around it, and its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import math
import pkgutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

import experiments
from experiments import cld_cifar10, cld_digits
from experiments.benchmark.profiles import profile
from experiments.benchmark.table import Row, Target, interleaved, on_cpu
from gddim.checkpoint import Checkpointer
from gddim.data import DATA, LABEL, Digits, batches, classes_of, prefetch
from gddim.experiment import Experiment
from gddim.experiment.checkpoints import items_of
from gddim.experiment.plan import Plan
from gddim.experiment.workdir import describe
from gddim.logs import Log
from gddim.nn import DiTConfig, NCSNppConfig
from gddim.parallel import global_batch, peak_flops, tell
from gddim.train import TrainState, train

SMALL = {  # networks on a CPU, which would compile for an hour
    NCSNppConfig: {"width": 16, "multipliers": (1, 2), "blocks": 1},
    DiTConfig: {"width": 64, "depth": 2, "heads": 2},
}


AIMS = {"cifar10": 0.3, cld_cifar10.EXPERIMENT.name: 0.4}  # of the measured peak of an accelerator, at the best batch
BATCHES = (128, 256, 512, 1024)


class Steps:
    """The compiled training step of an experiment, with a state and a batch of noise for it; a call makes one step."""

    def __init__(self, experiment: Experiment):
        self.plan = Plan(experiment)
        shape = (experiment.train.batch, *experiment.data.shape)
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, shape, np.uint8) if len(shape) == 4 else rng.standard_normal(shape, np.float32)
        label = np.arange(len(image), dtype=np.int32) % max(classes_of(experiment.data), 1)
        records = {DATA: image, LABEL: label} if classes_of(experiment.data) else image
        self.batch = global_batch(records, self.plan.mesh)
        self.leaves, self.structure = jax.tree.flatten(self.plan.init())
        start = time.perf_counter()
        self.program = self.plan.update(flip=len(shape) == 4).lower(self.leaves, self.batch).compile()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> Any:
        self.leaves, metrics = self.program(self.leaves, self.batch)
        return metrics

    @property
    def state(self) -> TrainState:
        """Where the steps have led."""
        return self.structure.unflatten(self.leaves)


def loop(steps: int = 100, repeats: int = 10) -> Iterator[Row]:
    """The share of the training loop's wall time that the jitted step takes by itself: digits, real loader and log."""
    bare = Steps(cld_digits.EXPERIMENT)
    settings, source, mesh = cld_digits.EXPERIMENT.train, cld_digits.EXPERIMENT.data.train(), bare.plan.mesh

    def only_steps() -> Any:
        return [bare() for _ in range(steps)][-1]

    def whole(log: Log, placed: Iterator[Any]) -> None:
        begin = int(bare.state.step)
        _, state = train(
            bare.state, bare.program, placed, step=begin, steps=begin + steps, log=log,
            report_every=settings.report_every, save=lambda step, state: None, save_every=steps,
        )  # fmt: skip
        bare.leaves = jax.tree.leaves(state)

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        log = stack.enter_context(contextlib.closing(Log(folder, step=0, steps=steps, batch=settings.batch)))
        placed = prefetch(batches(source, settings.batch, 0), lambda rows: global_batch(rows, mesh))
        stack.callback(placed.close)
        with contextlib.redirect_stdout(io.StringIO()):
            alone, together = interleaved(only_steps, lambda: whole(log, placed), repeats=repeats)
    title = f"digits, {steps} steps alone, in the loop's time"
    yield Row(title, alone, "s", f"{steps} steps in the training loop", together, Target("ratio", "≥", 0.98))


def labels(steps: int = 10, repeats: int = 15) -> Iterator[Row]:
    """What a step costs with labels, some of them dropped, over one without: digits."""
    plain, settings = cld_digits.EXPERIMENT, dataclasses.replace(cld_digits.EXPERIMENT.train, label_dropout=0.1)
    works = [Steps(plain), Steps(dataclasses.replace(plain, data=Digits(labels=True), train=settings))]
    without, told = interleaved(
        *(lambda work=work: [work() for _ in range(steps)][-1] for work in works), repeats=repeats
    )
    title = f"digits, {steps} steps with labels, some dropped"
    yield Row(title, told, "s", "without labels", without, Target("ratio", "≤", 1.02))


def checkpoint(saves: int = 7, steps: int = 20) -> Iterator[Row]:
    """How long the training thread waits for a save, over the time between two."""
    experiment = cld_digits.EXPERIMENT if on_cpu() else _for_accelerators(cld_cifar10.EXPERIMENT)
    work, waits = Steps(experiment), []
    (seconds,) = interleaved(lambda: [work() for _ in range(steps)], repeats=3)
    with tempfile.TemporaryDirectory() as folder:
        saved = Checkpointer(epath.Path(folder) / "checkpoints", keep_last=1)
        for step in range(saves):
            jax.block_until_ready(work())
            start = time.perf_counter()
            saved.save(step, items_of(work.state), describe(experiment))
            waits.append(time.perf_counter() - start)
            saved.wait()  # the next save of a run comes long after
        saved.close()
    every = experiment.train.save_every
    size = sum(x.nbytes for x in work.leaves) / 2**20
    title, baseline = f"save of {experiment.name}, {size:.0f} MiB", f"{every:,} steps, the default interval"
    yield Row(title, float(np.median(waits[1:])), "s", baseline, seconds / steps * every, Target("ratio", "≤", 0.02))


def all_experiments() -> list[Experiment]:
    """Of every experiment file."""
    names = [module.name for module in pkgutil.iter_modules(experiments.__path__) if not module.ispkg]
    modules = [importlib.import_module(f"experiments.{name}") for name in names]
    return [module.EXPERIMENT for module in modules if hasattr(module, "EXPERIMENT")]


def networks(names: tuple[str, ...] = (), repeats: int = 5) -> Iterator[Row]:
    """The training step of each experiment (or of those named): reduced on a CPU, on accelerators as it is.

    There those that are to reach a share of the peak come first, with a profile, and then at several batches.
    """
    found = [each for each in all_experiments() if not names or each.name in names]
    own = {each.name: as_measured(each).train.batch for each in found}
    aimed = [each for each in found if each.name in AIMS and not on_cpu()]
    wanted = [(each, own[each.name]) for each in aimed]
    wanted += [(each, batch) for each in aimed for batch in BATCHES if batch != own[each.name]]
    wanted += [(each, own[each.name]) for each in found if each not in aimed]
    full: dict[str, float] = {}
    for experiment, batch in wanted:
        try:
            if batch < full.get(experiment.name, math.inf):
                yield from _network(resized(as_measured(experiment), batch), experiment, repeats)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            full[experiment.name] = batch
            tell(f"{experiment.name}: no room on the device for batches from {batch} on")


def _network(sized: Experiment, experiment: Experiment, repeats: int) -> Iterator[Row]:
    work, size = Steps(sized), sized.train.batch
    dtype = getattr(sized.net, "dtype", "float32")
    product, operations = matrix_product(dtype)
    seconds, peak = interleaved(work, product, repeats=repeats)
    title = f"{experiment.name}{', reduced' * (sized.net != experiment.net and on_cpu())}, {dtype}, batch {size}"
    yield Row(f"{title}: compilation", work.compile_seconds, "s")
    yield Row(f"{title}: training step", 1e3 * seconds, "ms")
    yield Row(f"{title}: training", size / seconds, "images/s")
    rate, best = work.plan.step_flops() / seconds, work.plan.mesh.size * operations / peak
    aim = AIMS.get(experiment.name) if peak_flops(jax.devices()[0].device_kind) else None
    target = Target("ratio", "≥", aim) if aim else None
    yield Row(f"{title}: FLOP/s", rate / 1e9, "GFLOP/s", "matrix product, measured", best / 1e9, target)
    if memory := work.program.memory_analysis():
        used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        state = sum(x.nbytes for x in work.leaves) / 2**20
        yield Row(f"{title}: memory of a step", used / 2**20, "MiB", "its state", state)
    if experiment.name in AIMS and not on_cpu() and size == experiment.train.batch:
        yield from profile(work, experiment.name)


def matrix_product(dtype: str) -> tuple[Any, float]:
    """A compiled chain of products of large square matrices on one device, and its operations."""
    n, count = (1024, 4) if on_cpu() else (8192, 16)
    a = jax.random.normal(jax.random.key(0), (n, n), dtype) / np.sqrt(n).astype(dtype)
    chain = jax.jit(lambda a: jax.lax.fori_loop(0, count, lambda _, b: jnp.matmul(a, b), a))
    return lambda: chain(a), 2.0 * n**3 * count


def resized(experiment: Experiment, batch: int | None = None, **changes: Any) -> Experiment:
    """The experiment with another batch and other fields of its network."""
    net: Any = experiment.net
    train = dataclasses.replace(experiment.train, batch=batch or experiment.train.batch)
    return dataclasses.replace(experiment, net=dataclasses.replace(net, **changes), train=train)


def as_measured(experiment: Experiment) -> Experiment:
    """As it is on accelerators, in bfloat16 where the network can; reduced on a CPU."""
    return _for_cpu(experiment) if on_cpu() else _for_accelerators(experiment)


def _for_accelerators(experiment: Experiment) -> Experiment:
    """In bfloat16, where the network can."""
    return resized(experiment, dtype="bfloat16") if isinstance(experiment.net, NCSNppConfig) else experiment


def _for_cpu(experiment: Experiment) -> Experiment:
    """Narrow and shallow, and few images at a time, but for what was made for a CPU."""
    small = experiment.name == cld_digits.EXPERIMENT.name or type(experiment.net) not in SMALL
    return experiment if small else resized(experiment, batch=8, **SMALL[type(experiment.net)])


def h200_consumption() -> float:
    """Images/s that the headline's training takes from the loader on an H200 at 40 % of its matrix peak."""
    plan = Plan(cld_cifar10.EXPERIMENT)
    return 0.4 * 989e12 / (plan.step_flops() / cld_cifar10.EXPERIMENT.train.batch)
