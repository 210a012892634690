"""Training: the state, one jitted and donated step, and the loop around it."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from gddim.averages import rate
from gddim.errors import from_extra
from gddim.logs import Log

if TYPE_CHECKING:
    from optax import GradientTransformation

AHEAD = 2  # dispatches in flight: the device never waits for the host, and a signal is answered within two steps

Metrics = dict[str, Any]
Schedule = Callable[[Any], Array]


class Diverged(RuntimeError):
    """The loss or its gradient is not finite; nothing that came after was saved."""


class TrainState(eqx.Module):
    """All that a run needs to continue.

    Randomness is `fold_in(key(seed), step)` and the position in the data `step × batch`, so neither is stored.
    No two buffers are the same, so that all may be donated.
    """

    step: Int[Array, ""]
    """How many steps were made."""
    model: PyTree
    """The floating arrays of the model, None in place of all else; `eqx.combine` with the rest makes it whole."""
    ema: PyTree
    """Their average over the steps, which is what samples."""
    opt_state: PyTree
    """What the optimizer keeps."""
    averages: tuple[PyTree, ...] = ()
    """Averages of other lengths, from which with the first any length is rebuilt (`gddim.averages`)."""

    @classmethod
    def create(cls, model: PyTree, optimizer: GradientTransformation, others: int = 0) -> TrainState:
        """The state before the first step, in float32: fewer bits would lose what a step adds.

        `model`: a model with fresh parameters; its static half is dropped.
        `optimizer`: the one that `make_update` is given.
        `others`: averages beside the one that samples.
        """
        single = lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
        params = jax.tree.map(single, eqx.filter(model, eqx.is_inexact_array))
        copy = lambda: jax.tree.map(jnp.copy, params)
        averages = tuple(copy() for _ in range(others))
        return cls(jnp.zeros((), jnp.int32), params, copy(), optimizer.init(params), averages)


def learning_rate(peak: float, steps: int, warmup: int = 0, cooldown: int = 0) -> Schedule:
    """Linear from 0 to `peak` over the first `warmup` steps, and back to 0 over the last `cooldown` of `steps`."""

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1.0) / max(warmup, 1))
        fall = jnp.clip((steps - step) / max(min(cooldown, steps), 1), 0.0, 1.0)
        return peak * rise * (fall if cooldown else 1.0)

    return schedule


def adam(beta1: float = 0.9, clip: float = 1.0) -> GradientTransformation:
    """Adam's directions from gradients whose global norm is cut to `clip`; `make_update` goes against them."""
    with from_extra("train"):
        import optax

    def cut(updates, _):
        # as optax.clip_by_global_norm, by one factor, so that XLA makes no clipped copy of the gradient
        factor = jnp.minimum(1.0, clip / optax.global_norm(updates))
        return jax.tree.map(lambda g: factor * g, updates)

    chain = optax.chain(optax.stateless(cut), optax.scale_by_adam(b1=beta1))

    def update(updates, state, params=None, **_):
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of an integer
            return chain.update(updates, state, params)

    return optax.GradientTransformation(chain.init, update)


def make_update(
    prepare: Callable[[PyTree, PRNGKeyArray], tuple[PyTree, ...]],
    loss: Callable[..., Float[Array, ""]],
    optimizer: GradientTransformation,
    schedule: Schedule,
    *,
    seed: int,
    ema: float,
    profiles: Sequence[float] = (),
    accumulate: int = 1,
) -> Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]:
    """One training step `(state, batch) → (state, metrics)`, to be jitted with its state donated.

    A row follows from (seed, step, row) alone: neither the number of devices nor that of parts changes what is computed
    beyond rounding.

    `prepare`: `(batch, key) → rows`, a tuple of trees of arrays with an example a row, all that is random among them, of
    raw records: an array, or a tree such as `{"x0": images, "label": classes}`.
    `loss`: `loss(params, *rows)`, a mean over rows; an `AbstractObjective` has both, as `rows` and `mean_loss`.
    `optimizer`: turns a gradient into a direction (`adam`, `optax.scale_by_adam`, …), against which the parameters go.
    `schedule`: how far they go at a step of the run, which does not depend on how old the optimizer's own state is.
    `seed`: of all that is random: a step's key is `fold_in(key(seed), step)`.
    `ema`: decay of the average of the parameters, reached gradually.
    `profiles`: σ_rel of the averages by power-function profiles that are kept in its place, the first as `state.ema`.
    `accumulate`: parts into which a batch is cut, one after another, where memory is short.

    The metrics are loss, gradient norm and learning rate, scalars.
    """
    with from_extra("train"):
        import optax

    def gradient(params, rows):
        if accumulate == 1:
            return jax.value_and_grad(loss)(params, *rows)

        def strided(x):  # part a holds the rows a, a + accumulate, …: each device keeps the rows that it has
            return jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0)

        def add(total, part):
            value, grads = jax.value_and_grad(loss)(params, *part)
            return jax.tree.map(jnp.add, total, (value.astype(jnp.float32), grads)), None

        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        unroll = accumulate if jax.default_backend() == "cpu" else 1  # XLA:CPU runs convolutions in loops slowly
        total, _ = jax.lax.scan(add, zero, jax.tree.map(strided, rows), unroll=unroll)
        return jax.tree.map(lambda x: x / accumulate, total)

    def update(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        value, grads = gradient(state.model, prepare(batch, key))
        directions, opt_state = optimizer.update(grads, state.opt_state, state.model)
        pace = schedule(state.step)
        # optax's Adam corrects its bias in float64 under JAX_ENABLE_X64
        params = jax.tree.map(lambda p, d: p - pace * d.astype(p.dtype), state.model, directions)
        # a young average forgets its random start faster
        young = 9.0 / (10.0 + state.step.astype(jnp.float32))
        rates = [rate(width, state.step + 1) for width in profiles] or [jnp.maximum(1.0 - ema, young)]
        average, *others = (
            jax.tree.map(lambda e, p, share=share: e + share * (p - e), before, params)
            for share, before in zip(rates, (state.ema, *state.averages), strict=True)
        )
        metrics = {"loss": value, "grad_norm": optax.global_norm(grads), "learning_rate": pace}
        return TrainState(state.step + 1, params, average, opt_state, tuple(others)), metrics

    return update


def fuse(update: Callable) -> Callable:
    """Several steps of `update` under one dispatch, one for each of a list of batches."""
    return lambda state, batches: jax.lax.scan(update, state, jax.tree.map(lambda *rows: jnp.stack(rows), *batches))


def on_leaves(update: Callable, structure: Any) -> Callable[[list[Array], Any], tuple[list[Array], Metrics]]:
    """`update` of the leaves of a state, which a jitted call takes in faster: modules are flattened one by one in Python."""

    def of_leaves(leaves, batch):
        state, metrics = update(jax.tree.unflatten(structure, leaves), batch)
        return jax.tree.leaves(state), metrics

    return of_leaves


class Ledger:
    """The metrics of the steps dispatched so far; fetched late, so that the device never waits for the host."""

    def __init__(self):
        self._pending: collections.deque[tuple[int, Metrics]] = collections.deque()
        self._rows: list[dict[str, float]] = []

    def add(self, first: int, metrics: Metrics) -> None:
        """Note the metrics of a dispatch that starts at step `first`, and wait for the dispatch `AHEAD` before it."""
        self._pending.append((first, metrics))
        if len(self._pending) > AHEAD:
            jax.block_until_ready(self._pending[-AHEAD - 1])

    def settle(self, ahead: int = 0) -> None:
        """Fetch all but the last `ahead` dispatches; raises `Diverged` at the first step that is not finite."""
        done = [self._pending.popleft() for _ in range(len(self._pending) - ahead)]
        for (first, _), metrics in zip(done, jax.device_get([metrics for _, metrics in done]), strict=True):
            for i, values in enumerate(zip(*map(np.atleast_1d, metrics.values()), strict=True)):
                row = dict(zip(metrics, map(float, values), strict=True))
                if not (np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"])):
                    raise Diverged(f"step {first + i}: loss {row['loss']}, gradient norm {row['grad_norm']}")
                self._rows.append(row)

    def mean(self) -> dict[str, float]:
        """The mean of each metric over the steps settled since the last call."""
        rows, self._rows = self._rows, []
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}


def train(
    state: TrainState,
    update: Callable[[list[Array], PyTree], tuple[list[Array], Metrics]],
    batches: Iterator[PyTree],
    *,
    step: int,
    steps: int,
    fused: int = 1,
    log: Log,
    report_every: int,
    save: Callable[[int, TrainState], None],
    save_every: int,
    callbacks: Sequence[tuple[int, Callable[[int, TrainState], None]]] = (),
    stop: Callable[[int], bool] = lambda step: False,
) -> tuple[int, TrainState]:
    """Go from `step` to `steps`, or until `stop(step)`; the state reached is saved either way, and returned with its step.

    `state`: where to begin, at `step`.
    `update`: a step (or `fused` steps) of the leaves of a state (`on_leaves`), which it may donate.
    `batches`: what each dispatch takes, one after another.
    `fused`: steps a dispatch; dispatches end at its multiples (`next_step`).
    `log`: is told of progress, and every `report_every` steps of the metrics' means.
    `save`: `(step, state)`, every `save_every` steps, only once every step before is known to be finite.
    `callbacks`: what else is done with `(step, state)`, each after how many steps it is due (0: never), likewise; the time
    that it takes is kept out of images/s.
    `stop`: whether to end at a step, as when a signal has come.

    Raises `Diverged`, which names the first step whose loss or gradient is not finite.
    """
    ledger, saved = Ledger(), step
    leaves, structure = jax.tree.flatten(state)
    while step < steps and not stop(step):
        before, step = step, next_step(step, steps, fused)
        leaves, metrics = update(leaves, next(batches))
        ledger.add(before, metrics)
        log.tick(step)
        if _due(report_every, before, step):
            ledger.settle(AHEAD)
            if means := ledger.mean():
                log.scalars(step, means)
        if _due(save_every, before, step):  # first, for what follows may fail, or take longer than a signal waits
            ledger.settle()
            save(step, structure.unflatten(leaves))
            saved = step
        due = [do for every, do in callbacks if _due(every, before, step)]
        if due:
            ledger.settle()
        for do in due:
            with log.paused():
                do(step, structure.unflatten(leaves))
    state = structure.unflatten(leaves)
    if step > saved:
        ledger.settle()
        save(step, state)
    return step, state


def next_step(step: int, steps: int, fused: int) -> int:
    """The step after one dispatch: the next multiple of `fused`, wherever the run was resumed, or the last step."""
    return min(step - step % fused + fused, steps)


def _due(every: int, before: int, step: int) -> bool:
    return every > 0 and step // every > before // every
