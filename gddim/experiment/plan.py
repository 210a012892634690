"""An experiment made ready for the devices: everything that is known before an array exists."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray, PyTree

from gddim.data import AUGMENT, DATA, augmented, cond_of, random_flip, to_unit, x0_and_cond
from gddim.experiment.config import Experiment
from gddim.loss import Row, drop_labels
from gddim.parallel import (
    activation_bytes,
    init_sharded,
    make_mesh,
    on_paper,
    per_device_batch,
    replicated,
    state_shardings,
)
from gddim.train import TrainState, adam, fuse, learning_rate, make_update, on_leaves


class Plan:
    """The mesh, the training step and the shapes of the state of an experiment, checked against each other.

    For all devices of all processes, or for `devices`, which may be descriptions of some that are not here.
    `dtype` is that of the records; until it is known, images are taken for bytes and all else for float32.
    Raises `UserError` for what does not fit: the mesh and the devices, the images and the network.
    """

    def __init__(self, experiment: Experiment, devices: Sequence[Any] | None = None, dtype: Any = None):
        train = experiment.train
        self.experiment = experiment
        self.dtype = np.dtype(dtype or ("uint8" if len(experiment.data.shape) == 3 else "float32"))
        self.mesh = make_mesh(experiment.mesh, devices)
        self.schedule = learning_rate(train.learning_rate, train.steps, train.warmup, train.cooldown)
        self.optimizer = adam(train.beta1, train.clip)
        model = eqx.filter_eval_shape(experiment.build, jax.random.key(experiment.seed))
        self.static = eqx.filter(model, lambda leaf: not isinstance(leaf, jax.ShapeDtypeStruct))
        shapes = eqx.filter_eval_shape(self._init)
        self.shardings = state_shardings(shapes, self.mesh, experiment.rule)
        self.shapes = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, self.shardings
        )

    def check_batch(self) -> None:
        """Raise `UserError` where the devices do not divide the batches of training; samples are drawn in their own."""
        per_device_batch(self.experiment.train.batch, self.mesh, self.experiment.train.accumulate)

    @property
    def rounds(self) -> bool:
        """Whether samples are brought to bytes, as the images of the data are; floating fields, as latents, are not."""
        return self.dtype == np.uint8 and len(self.experiment.data.shape) == 3

    @property
    def state_bytes(self) -> int:
        """Of the whole state, and so of a checkpoint."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.shapes))

    def init(self) -> TrainState:
        """The state before the first step, made in its shards."""
        return init_sharded(self._init, self.mesh, self.experiment.rule)

    def _init(self) -> TrainState:
        model = self.experiment.build(jax.random.key(self.experiment.seed))
        return TrainState.create(model, self.optimizer, max(0, len(self.experiment.train.ema_profiles) - 1))

    def model(self, params: PyTree) -> Any:
        """The model that has these parameters, whole on every device.

        Left to itself XLA splits some layers over fsdp, and sends activations around in every call.
        """
        return eqx.combine(jax.lax.with_sharding_constraint(params, replicated(self.mesh)), self.static)

    def prepare(self, batch: PyTree, key: PRNGKeyArray, flip: bool) -> Row:
        """The rows of the objective: scaled records, perhaps mirrored or augmented, with levels, noises and dropout keys."""
        flip_key, noise_key = jax.random.split(key)
        x0, cond = x0_and_cond(batch)
        share = self.experiment.train.augment
        x0 = to_unit(random_flip(x0, flip_key) if flip and not share else x0)
        if share:  # with mirror images of its own
            x0, told = augmented(x0, jax.random.split(flip_key, len(x0)), share)
            cond = {**(cond or {}), AUGMENT: told}
        return drop_labels(self.experiment.objective.rows(x0, noise_key, cond), self.experiment.train.label_dropout)

    def loss(self, params: PyTree, *rows: PyTree) -> Float[jax.Array, ""]:
        """The mean over what `prepare` made."""
        return self.experiment.objective.mean_loss(self.model(params), Row(*rows))

    def step(self, flip: bool) -> Callable:
        """The pure training step of a batch of records."""
        train = self.experiment.train
        return make_update(
            partial(self.prepare, flip=flip),
            self.loss,
            self.optimizer,
            self.schedule,
            seed=self.experiment.seed,
            ema=train.ema,
            profiles=train.ema_profiles,
            accumulate=train.accumulate,
        )

    def update(self, flip: bool) -> Callable:
        """The jitted step of the state's leaves, whose buffers it takes over; several steps if the experiment fuses them."""
        step = fuse(self.step(flip)) if self.experiment.train.fused > 1 else self.step(flip)
        step = on_leaves(step, jax.tree.structure(self.shapes))
        return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.leaves(self.shardings), None))

    def image_flops(self) -> float:
        """Floating-point operations of the network for one image, forward, as XLA counts them."""
        state = jax.ShapeDtypeStruct(self.experiment.state_shape, jnp.float32)
        plan, cond = self._unrolled, x0_and_cond(self._record())[1]
        program = jax.jit(lambda params, u, t, cond: plan.model(params)(u, t, cond))
        return _flops(program, plan.shapes.model, state, jax.ShapeDtypeStruct((), jnp.float32), cond)

    def step_flops(self) -> float:
        """Those of loss and gradient in a step; Adam's, tens for each parameter, are a thousandth of them."""
        plan, rows = self._unrolled, self._rows(self.experiment.train.batch)
        return _flops(jax.jit(jax.grad(plan.loss)), plan.shapes.model, *rows)

    @cached_property
    def _unrolled(self) -> Plan:
        """The same without loops over blocks, of which XLA counts one turn, and with nothing computed twice."""
        net: Any = self.experiment.net
        fields = {"scan_blocks", "remat"} & set(getattr(net, "__dataclass_fields__", ()))
        if not any(getattr(net, name) for name in fields):
            return self
        net = dataclasses.replace(net, **dict.fromkeys(fields, False))
        return Plan(dataclasses.replace(self.experiment, net=net), [*self.mesh.devices.flat], self.dtype)

    def activation_bytes(self) -> int:
        """What the forward pass keeps of an image, by its trace."""
        row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self._rows(1))
        return activation_bytes(self.loss, self.shapes.model, row)

    def on_paper(self) -> list[str]:
        """What a step would need on some large machines."""
        shapes, train = self.shapes, self.experiment.train
        activations = self.activation_bytes()
        return on_paper(shapes.model, shapes, activations, train.batch, self.experiment.rule, train.accumulate)

    def _rows(self, count: int) -> Row:
        """The shapes of what `prepare` makes."""
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), self._record())
        return jax.eval_shape(partial(self.prepare, flip=False), batch, jax.random.key(0))

    def _record(self) -> PyTree:
        """The shapes of a record, known before any is read."""
        data = self.experiment.data
        x0 = jax.ShapeDtypeStruct(data.shape, self.dtype)
        if cond := cond_of(data):
            return {DATA: x0, **jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(cond))}
        return x0


def _flops(program: Any, *arguments: Any) -> float:
    """As an accelerator's program has them: a CPU's has loops, of which XLA counts one turn (`gddim.nn.convolution`)."""
    return (program.trace(*arguments).lower(lowering_platforms=("cuda",)).cost_analysis() or {}).get("flops", math.nan)
