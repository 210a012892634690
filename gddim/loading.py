"""A trained network in one line, from the workdir of its run or a file, to draw from or to use in a program of your own."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree, ScalarLike, UInt32

from gddim.denoiser import reduction, statistic
from gddim.errors import UserError, place
from gddim.guidance import UNTOLD, Guidance, guided
from gddim.model import Denoiser, EpsModel, seen_through
from gddim.parallel import batch_sharding, check_backend, make_mesh, round_up
from gddim.samplers import AbstractSampler, LearnedTable, count_calls
from gddim.samplers.method import check_methods
from gddim.samplers.numbered import sample_numbered
from gddim.samplers.solver import AbstractSolver
from gddim.samplers.words import parse_sampler
from gddim.sde import AbstractLinearSDE
from gddim.sde.base import positions
from gddim.sde.linalg import product, transpose
from gddim.sde.words import parse_process, process_name


class Loaded(eqx.Module):
    """What `gddim.load` makes: a network seen through its process, an `eps_fn(u, t)` of samplers, which also draws samples.

    A pytree of its parameters: it may be an argument of `jax.jit`, and `sample` may be called under `jit` and `vmap`.
    """

    model: Any
    """The network seen through the process: a `Denoiser`, an `EpsModel` or a `VelocityModel`."""
    shape: tuple[int, ...] = eqx.field(static=True)
    """Of the data, `(*dims, C)`."""
    settings: Any = eqx.field(static=True)
    """How the run draws samples unless it is told: a `gddim.experiment.Sampling`."""
    mesh: jax.sharding.Mesh | None = eqx.field(default=None, static=True)
    """Over which samples are split."""
    classes: int = eqx.field(default=0, static=True)
    """Of the data, of which samples are; 0: none."""
    label_dropout: float = eqx.field(default=0.0, static=True)
    """The share of the data that it was told no class of, in training."""
    checkpoint: str | None = eqx.field(default=None, static=True)
    """The digest of the parameters."""
    tables: str | None = eqx.field(default=None, static=True)
    """The folder of the tables that were fitted to the network."""
    rounded_from: str | None = eqx.field(default=None, static=True)
    """The digest of what the parameters of a file were before they were rounded."""

    @property
    def sde(self) -> AbstractLinearSDE:
        """The process that the network was trained with."""
        return self.model.sde

    @property
    def denoiser(self) -> Callable[..., Float[Array, "*dims C"]]:
        """`denoiser(y, sigma, cond=None)`: `E[x₀ | x₀ + σn = y]` in pixels, as `gddim.through` takes it. A network that
        predicts the ε of several fields has none, and raises `AttributeError`."""
        model: Any = self.model
        white = isinstance(model, EpsModel) and self.sde.k == 1 and not positions(self.sde)
        if not (white or isinstance(model, Denoiser)):
            raise AttributeError(
                f"the network predicts the ε of {process_name(self.sde)} and is no denoiser of x₀ + σn"
            )
        return model.denoiser

    def __call__(self, u: Float[Array, "*dims k C"], t: ScalarLike, cond: PyTree = None) -> Float[Array, "*dims k C"]:
        """`ε(u, t)` in R coordinates of one state of the process."""
        model: Any = self.model
        return model(u, t, cond)

    def denoise(self, u: Float[Array, "*dims k C"], t: ScalarLike, cond: PyTree = None) -> Float[Array, "*dims C"]:
        """`E[x₀ | u_t = u]` `(*dims, C)` of one state of the process, in its basis."""
        model: Any = self.model
        denoise: Any = getattr(model, "denoise", None)
        if denoise is not None:
            return denoise(u, t, cond)
        y, sigma = statistic(self.sde, u, t)
        _, direction = reduction(self.sde, t, u.dtype)
        return y - product(sigma[..., None, None] * transpose(direction), model(u, t, cond))[..., 0, :]

    def sample(
        self,
        n: Any,
        *,
        sampler: AbstractSampler | str | None = None,
        nfe: int | None = None,
        process: AbstractLinearSDE | str | None = None,
        key: Any = None,
        classes: Any = None,
        guide: float | int | Callable[[Any], Any] | None = None,
    ) -> Float[Array, "n *dims C"]:
        """Samples `(n, *dims, C)` in the scale of the data: images in [-1, 1], not clipped.

        `n`: how many, numbers 0, 1, …; or the numbers themselves. Sample i depends on the parameters, the process, the
        sampler, the calls, the key and i alone, to rounding.
        `sampler`: a sampler, or its word as `"gddim:3:data"`, or `"table:NAME"`, one of those that were fitted to the network;
        `nfe`: the network calls of each; `process`: what they are drawn through, a process or its word as `"cld:gamma=0.1"`.
        Without them, those of the run, whose `t_min` and `power` are of its own process alone.
        `key`: without it that of the run's `sampling.seed`, so that its samples are those of the command line.
        `classes`: of each, whole numbers `(n,)`, or one of all, −1 for none, where the run has classes; without it those of the
        run in turn.
        `guide`: the scale of classifier-free guidance; or any function from denoisers to a denoiser, as
        `lambda D: gddim.guidance.Autoguidance(D, worse.denoiser, 2.0)` with another loaded network.

        Raises `UserError` for numbers that are none, a word that is none, too few calls, a process that the network does not
        serve, classes that are none, or not as many as samples, and without `guide` where the run's is a worse network.
        """
        model, solver = self.through(sampler=sampler, nfe=nfe, process=process, guide=guide)
        numbers = jnp.arange(n) if isinstance(n, int | np.integer) else jnp.asarray(n)
        if numbers.ndim != 1 or not len(numbers) or not jnp.issubdtype(numbers.dtype, jnp.integer):
            raise UserError(
                f"n: {n!s:.60} given, accepted are a number of samples of at least 1, and their numbers (n,)"
            )
        key = jnp.asarray(self.settings.seed if key is None else key)
        key = jax.random.wrap_key_data(key) if key.shape == (2,) else key  # as jax.random.PRNGKey makes it
        spread = self._spread(numbers)
        of = None if classes is None else self._spread(self._checked(classes, numbers.shape))
        cond = self._cond(spread, of)
        return sample_numbered(model, solver, self.shape, key, spread, cond=cond).data[: numbers.shape[0]]

    def sample_seeds(self, seeds: Int[Array, " n"] | UInt32[Array, " n"], **how: Any) -> Float[Array, "n *dims C"]:
        """Sample 0 of each seed, `(n, *dims, C)`, of the class that a sample of this number has; `how` is as in `sample`. What
        a seed makes depends on no other seed."""
        model, solver = self.through(**how)

        def one(seed: Array) -> Array:
            cond = self._cond(seed[None])
            return sample_numbered(model, solver, self.shape, jax.random.key(seed), jnp.arange(1), cond=cond).data[0]

        return jax.vmap(one)(self._spread(seeds))[: seeds.shape[0]]

    def through(
        self,
        *,
        sampler: AbstractSampler | str | None = None,
        nfe: int | None = None,
        process: AbstractLinearSDE | str | None = None,
        guide: float | int | Callable[[Any], Any] | None = None,
    ) -> tuple[Any, AbstractSolver]:
        """The network seen through a process, perhaps guided, and the solver that draws from it. Arguments, and what is
        refused, as in `sample`.
        """
        sampler = parse_sampler(sampler, self.tables) if isinstance(sampler, str) else sampler
        if isinstance(sampler, LearnedTable):
            nfe = nfe or count_calls(sampler, 1, self.settings.last)
            if line := sampler.foreign(self.checkpoint, self.rounded_from):
                warnings.warn(line, stacklevel=3)
        process = parse_process(process) if isinstance(process, str) else process
        how = self.settings if process is None else self.settings.through(process, self.sde)
        given = {"sampler": sampler, "nfe": nfe}
        how = dataclasses.replace(how, **{name: x for name, x in given.items() if x is not None})
        model = self.model if how.process is None else seen_through(self.model, how.process)
        method = how.method(model.sde, self.shape)
        check_methods([method], model.sde)
        if (callable(guide) or (how.guide.scale if guide is None else guide) != 1) and not hasattr(self, "denoiser"):
            raise UserError(
                f"guide: the network predicts the ε of {process_name(self.sde)} and cannot be guided; one of the data can"
            )
        if callable(guide):
            return guided(model, guide), method.solver(model.sde)
        if guide is None and how.guide.by_worse:
            raise UserError(
                f"guide: the run's is {how.guide}, by a worse network that is not loaded: give guide=1 for none, or a "
                "function, as lambda D: gddim.guidance.Autoguidance(D, worse.denoiser, 2.0)"
            )
        guidance = how.guide.away_from() if guide is None else Guidance(guide)
        if guidance.scale != 1 and not self.classes:
            raise UserError(f"guide {guidance.scale:g}: this run knows no classes; train one with --data.labels")
        if guidance.scale != 1 and not self.label_dropout:
            warnings.warn(UNTOLD, stacklevel=2)
        model = guidance(model)
        return model, method.solver(model.sde)

    def _cond(self, numbers: Array, classes: Array | None = None) -> PyTree:
        """What conditions samples: their classes, by number unless they are given."""
        if not self.classes:
            return None
        return {"label": self.settings.class_of(numbers, self.classes) if classes is None else classes}

    def _checked(self, classes: Any, shape: tuple[int, ...]) -> Array:
        """The class of each sample."""
        if not self.classes:
            raise UserError("classes: this run knows none; train one with --data.labels")
        try:
            given = classes if isinstance(classes, jax.Array) else np.asarray(classes)
        except jax.errors.TracerArrayConversionError:
            given = jnp.asarray(classes)
        if not jnp.issubdtype(given.dtype, jnp.integer) or given.shape not in ((), shape):
            raise UserError(
                f"classes: given {given.dtype}{[*given.shape]}, accepted are whole numbers, one or {shape[0]}"
            )
        if not isinstance(given, Tracer) and not np.all((given >= -1) & (given < self.classes)):
            told = f"given are {given.min()} to {given.max()}"
            raise UserError(f"classes: {told}, accepted are 0 to {self.classes - 1}, and -1 for no class")
        return jnp.broadcast_to(jnp.asarray(given, jnp.int32), shape)

    def _spread(self, x: Array) -> Array:
        """An array split over the mesh, filled up with its last element until that goes."""
        if self.mesh is None:
            return x
        filled = jnp.pad(x, (0, round_up(len(x), self.mesh.size) - len(x)), mode="edge")
        return jax.device_put(filled, batch_sharding(self.mesh))


def load(
    source: Any,
    *,
    step: int | None = None,
    weights: str | float | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    sde: AbstractLinearSDE | None = None,
    net: Any = None,
    data: Any = None,
) -> Loaded:
    """A trained network, to draw from or to use in a program of your own: `.sample`, `.denoise`, `.denoiser`, `.sde`.

    Everything comes from what `source` names. Its experiment's file is not imported, and neither its data nor the mesh that
    it was trained on need be there.

    `source`: the workdir of a run, local or in a bucket; a file of `python -m gddim.export`; a folder as hubs have them.
    `step`: of the checkpoint; without it the newest whole one.
    `weights`: "ema", the average that training keeps; "raw", the parameters of the step; or a length σ_rel, rebuilt from the
    snapshots of the run. Without it what the run samples with.
    `dtype`: in which the network computes; its parameters stay float32.
    `mesh`: over whose devices samples are split, whatever its axes; the parameters are whole on each.
    `sde`, `net`, `data`: the process, the network's configuration or the data set, where the run was given one of your own.

    Raises `UserError` for a source that is none of these, a step or an average that it lacks, parameters that are not those
    of its network, an accelerator asked for that JAX does not find, and, naming it, an object that it was given in Python.
    """
    from gddim.experiment.trained import find  # here, so that importing gddim does not import all that trains

    check_backend()
    mesh = mesh and make_mesh(devices=[*mesh.devices.flat])
    found = find(place(str(source)), step, weights, dtype, mesh, sde, net, data)
    return loaded(found, mesh)


def loaded(found: Any, mesh: jax.sharding.Mesh | None = None) -> Loaded:
    """What `gddim.experiment.trained.find` found, to draw from."""
    shape, settings = tuple(found.experiment.data.shape), found.experiment.sampling
    told = found.about.get("checkpoint"), found.tables, found.about.get("rounded_from")
    return Loaded(found.model, shape, settings, mesh, found.classes, found.label_dropout, *told)
