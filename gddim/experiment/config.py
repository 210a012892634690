"""What an experiment is: dataclasses of objects, each field documented for the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from jaxtyping import Int32, PRNGKeyArray

from gddim.averages import LONGEST
from gddim.data import LABEL, classes_of, cond_of
from gddim.errors import require
from gddim.experiment.fitting import Fitting
from gddim.experiment.network import Model, NetConfig, told_augmentation, told_classes
from gddim.experiment.options import SPELLED, tyro
from gddim.experiment.sampling import Sampling
from gddim.experiment.words import Process, Sampler, spell_process
from gddim.loss import AbstractObjective, LogNormalNoise, ScoreMatching
from gddim.model import Denoiser, EpsModel, VelocityModel
from gddim.parallel import MeshConfig, Rule, default_rule
from gddim.samplers import GDDIM, CholeskyMultistep, EulerMaruyama
from gddim.sde import AbstractLinearSDE
from gddim.sde.base import positions
from gddim.sde.words import process_name
from gddim.settings import LATER, MAY_CHANGE, MAY_CHANGE_AFTER

if TYPE_CHECKING:
    from gddim.data import Dataset
else:
    Dataset = Any  # tyro narrows a field to the type of its default, but not from a protocol with attributes


@dataclass(frozen=True)
class Training:
    """How the network is trained."""

    init: str | None = None
    """RUN[@STEP]: a new run begins with the whole state of another one's checkpoint, the newest without @STEP, and goes on
    from its step with this learning rate, clip, seed, …: for one that diverged. Or the folder that python -m gddim.export
    RUN DIR --state wrote, perhaps elsewhere. It needs a workdir of its own, and goes on, once stopped, by the same command."""
    steps: int = field(default=100_000, metadata=MAY_CHANGE)
    """Steps in all; a run that was stopped, or given more, continues. The cooldown moves with them."""
    minutes: float = field(default=0.0, metadata=MAY_CHANGE)
    """Minutes, from its first step on with compilation, that a command trains at most; then it saves, ends with status 75
    and tells the command that goes on, as the launchers of infra do by themselves. 0: to the last step."""
    batch: int = 128
    """Examples a step, over all devices."""
    accumulate: int = field(default=1, metadata=MAY_CHANGE)
    """Parts into which a batch is cut, one after another, where memory is short."""
    fused: int = field(default=1, metadata=MAY_CHANGE)
    """Steps a dispatch, for accelerators; slow on a CPU."""
    time_power: float | None = None
    """Noise levels are those of the process at times uniform in t^(1/time_power): 1 as published, more for more of the small
    times. None: 1 where ε is predicted or coefficients differ by frequency; else the noise is log-normal, as follows."""
    sigma_mean: float | None = None
    """Mean of ln σ, σ the standard deviation of the noise in which a prediction of data is trained. None: -1.2, EDM's."""
    sigma_std: float | None = None
    """Standard deviation of ln σ. None: 1.2, EDM's."""
    label_dropout: float = field(default=0.0, metadata=LATER)
    """Share of the labels that a step leaves out, so that the network also learns the data without a class (-1): for
    classifier-free guidance, 0.1 is usual."""
    augment: float = field(default=0.0, metadata=LATER)
    """Probability of each of EDM's geometric transformations of an image, of which the network is told, as 0.12; they mirror
    images at random, too. For long trainings on few images. 0: none."""
    learning_rate: float = 2e-4
    """Peak of Adam's learning rate."""
    warmup: int = 5_000
    """Steps over which the learning rate rises to its peak."""
    cooldown: int = 0
    """Last steps, over which it falls to zero; a run that is given more steps then rises to its peak again."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    clip: float = 1.0
    """Largest global norm of the gradient."""
    ema: float = 0.9999
    """Decay of the average of the parameters, which is what samples; reached gradually."""
    ema_profiles: tuple[float, ...] = ()
    """Lengths σ_rel of averages that take the place of that one, as 0.05 0.1: of power-function profiles, whose width is
    that share of all steps so far (EDM2). The first is what samples; of two sampling.ema makes any length."""
    snapshot_every: int = field(default=0, metadata=MAY_CHANGE)
    """Steps between two snapshots of these averages, small files in the workdir that sampling.ema reads; 0: none."""
    report_every: int = field(default=100, metadata=MAY_CHANGE)
    """Steps between two reports of loss, gradient norm, learning rate and images/s."""
    show_every: int = field(default=0, metadata=MAY_CHANGE)
    """Steps between two pictures of samples, in TensorBoard and as training/STEP.png in the workdir; 0: none."""
    save_every: int = field(default=10_000, metadata=MAY_CHANGE)
    """Steps between two checkpoints."""
    keep: int = field(default=3, metadata=MAY_CHANGE)
    """Newest checkpoints that are kept."""
    keep_every: int = field(default=0, metadata=MAY_CHANGE)
    """The first checkpoint at or after each of its multiples is kept for good, also by runs that set another; 0: none."""

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "fused", "report_every", "save_every", "keep"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup", "cooldown", "show_every", "keep_every", "snapshot_every"):
            require(getattr(self, name) >= 0, f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("learning_rate", "clip", "time_power", "sigma_std"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"{name} must be > 0, not {value}")
        mean = self.sigma_mean
        require(mean is None or math.isfinite(mean), f"sigma_mean must be finite, not {mean}")
        told = " and ".join(f"sigma_{name} {value:g}" for name, value in self.log_normal.items())
        require(
            self.time_power is None or not told,
            f"time_power {self.time_power} and {told}: accepted are time_power, or sigma_mean and sigma_std, not both",
        )
        require(0 <= self.minutes < math.inf, f"minutes must be at least 0, not {self.minutes}")
        for name in ("ema", "beta1", "label_dropout"):
            require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), not {getattr(self, name)}")
        require(0 <= self.augment <= 1, f"augment must be in [0, 1], not {self.augment}")
        for sigma in self.ema_profiles:
            require(0 < sigma <= LONGEST, f"ema_profiles must lie in (0, {LONGEST:.3f}], not {sigma}")
        require(len(set(self.ema_profiles)) == len(self.ema_profiles), "ema_profiles: give each length once")
        require(
            not self.snapshot_every or len(self.ema_profiles) > 0,
            "snapshot_every: snapshots are of ema_profiles: give two, as 0.05 0.1",
        )
        require(
            self.batch % self.accumulate == 0,
            f"batch {self.batch} must be a multiple of accumulate {self.accumulate}",
        )

    @property
    def log_normal(self) -> dict[str, float]:
        """What was given of the law of ln σ."""
        given = {"mean": self.sigma_mean, "std": self.sigma_std}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Evaluation:
    """Which samplers are compared, at how many network calls."""

    samplers: tuple[Sampler, ...] = (
        EulerMaruyama(),
        CholeskyMultistep(2),
        CholeskyMultistep(3),
        GDDIM(1),
        GDDIM(2),
        GDDIM(3),
        GDDIM(2, interpolate="data"),
        GDDIM(3, interpolate="data"),
    )
    """The rows of the table, each in one of --sampler's forms (order 1 is the same in both interpolations)."""
    processes: tuple[Process, ...] = field(default=(), metadata={SPELLED: lambda each: [*map(spell_process, each)]})
    """The processes that each of them is drawn through, in --process's forms; without any that of --process."""
    nfe: tuple[int, ...] = (6, 10, 20, 50)
    """Its columns: network calls a sample."""
    samples: int = 500
    """Samples a cell; of `likelihood`, held-out records."""
    seeds: int = 1
    """Times that each cell is drawn, with seeds from sampling.seed on; the table tells mean and spread."""
    batch: int = 500
    """Samples at a time, over all devices; another number changes samples by rounding, as in sampling."""
    features: Literal["inception", "pixels"] = "inception"
    """Where distances are measured: in Inception features to the training data (FID), or in the pixels or coordinates
    themselves to the held-out data, where the data are too small for the former."""
    convention: Literal["pytorch-fid", "tf1"] = "pytorch-fid"
    """How images are resized for the Inception network; distances of two conventions are not comparable."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """In which the Inception network runs; what bfloat16 changes is told with the results."""
    keep_samples: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write the samples of each cell into the workdir: images as PNG, anything else as npz."""
    balance: Literal["classes", "data"] = field(default="classes", metadata=LATER)
    """Of a run with labels, distances are of as many samples of each class, or of each as often as the data to train
    on have it."""
    reference: str | None = None
    """Statistics to compare with, as python -m gddim.evaluation stats writes them; without it those of the data, which are
    computed once and kept in the workdir."""
    ema: tuple[float, ...] = field(default=(), metadata=LATER)
    """Lengths σ_rel of an average, as sampling.ema takes one, to choose from: the table is of that with the least distance
    of as many samples by sampling's sampler, of the seed after the table's; without any that of sampling.ema."""
    every: int = 0
    """Training steps between two evaluations of at most 5,000 samples, by sampling's sampler, that are logged; 0: none."""

    def __post_init__(self):
        require(len(self.nfe) > 0 and min(self.nfe) >= 1, f"nfe must be positive numbers, not {self.nfe}")
        require(len(self.samplers) > 0, "samplers: give at least one")
        for name in ("samples", "seeds", "batch"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        require(self.every >= 0, f"every must be at least 0, not {self.every}")
        for sigma in self.ema:
            require(0 < sigma <= LONGEST, f"ema must lie in (0, {LONGEST:.3f}], not {sigma}")


@dataclass(frozen=True)
class Experiment:
    """A process, a network, a data set, and what is done with them."""

    name: tyro.conf.Suppress[str]
    sde: AbstractLinearSDE
    net: NetConfig
    data: Dataset
    model: Model = field(default=Model())
    train: Training = field(default=Training(), metadata=MAY_CHANGE_AFTER)
    sampling: Sampling = field(default=Sampling(), metadata=MAY_CHANGE)
    eval: Evaluation = field(default=Evaluation(), metadata=MAY_CHANGE)
    fit: Fitting = field(default=Fitting(), metadata=MAY_CHANGE | LATER)
    mesh: MeshConfig = field(default_factory=MeshConfig, metadata=MAY_CHANGE)
    rule: tyro.conf.Suppress[Rule] = field(default=default_rule, metadata=MAY_CHANGE)
    """Where each array of the state lives on the mesh, by its path: a function, to be given in the experiment's file."""
    seed: int = field(default=0, metadata=MAY_CHANGE_AFTER)
    """Seed of the parameters, the order of the data and the noise of training."""
    weights: tyro.conf.Suppress[str | None] = field(default=None, metadata=MAY_CHANGE | LATER)
    """A file of python -m gddim.export, with which what follows training goes on where the run has no checkpoint."""

    def __post_init__(self):
        require(-(2**63) <= self.seed < 2**63, f"seed must be in [−2⁶³, 2⁶³), not {self.seed}")
        sde = self.sampling.process or self.sde
        t_min, horizon = self.sampling.end(sde), sde.horizon
        require(t_min < horizon, f"sampling.t_min must be below the horizon {horizon} of the process, not {t_min}")
        if self.train.log_normal:
            white = self.model.predicts == "data" and not positions(self.sde)
            require(
                white,
                "train.sigma_mean and sigma_std are of white noise: they need a prediction of data, and a process "
                "without a spectrum; give train.time_power",
            )

    def predicting_eps(self) -> Experiment:
        """The same for the published ε, without what is set of a prediction of data alone: white noise, other processes."""
        train = replace(self.train, sigma_mean=None, sigma_std=None)
        sampling, table = replace(self.sampling, process=None), replace(self.eval, processes=())
        return replace(self, model=Model(predicts="eps"), train=train, sampling=sampling, eval=table)

    def through(self, sde: AbstractLinearSDE | None) -> AbstractLinearSDE:
        """The process that samples are drawn through: the run's own for None, or another that its network serves too.

        Raises `UserError` for another where the network belongs to its own.
        """
        if sde is None or sde == self.sde:
            return self.sde
        own, other = process_name(self.sde), process_name(sde)
        require(
            self.model.predicts == "data" or (self.model.predicts == "eps" and self.sde.k == 1),
            f"process {other}: this network predicts the ε of {own} in its {'R' if self.model.predicts == 'eps' else 'L'} "
            f"coordinates (model.predicts {self.model.predicts}, as published), of all its fields, which no other process has: "
            "only --process own is drawn here; a run with --model.predicts data is drawn through every process",
        )
        for name, process in ((own, self.sde), (other, sde)):
            require(
                not positions(process),
                f"process {other}: {name} has coefficients by position or frequency, and so a spectrum of noise: a "
                "network belongs to such a process, and is drawn through it alone",
            )
        return sde

    def evaluated(self) -> list[AbstractLinearSDE]:
        """The processes of the table. Raises `UserError` like `through`."""
        return [self.through(each) for each in self.eval.processes or (self.sampling.process,)]

    def drawn_classes(self, sampling: Sampling) -> Int32[np.ndarray, " n"] | None:
        """The class of each sample, in the order of their numbers; None where the run has none.

        Raises `UserError` for classes that the data have not.
        """
        classes, given = classes_of(self.data), sampling.classes
        if not classes:
            words = (
                " ".join(["sampling.classes", *map(str, given)])
                if given
                else f"sampling.per_class {sampling.per_class}"
            )
            asked = given or sampling.per_class
            require(not asked, f"{words}: this run knows no classes; train one with --data.labels")
            return None
        wrong = " ".join(str(each) for each in given if not -1 <= each < classes)
        require(not wrong, f"sampling.classes {wrong}: accepted are 0 to {classes - 1}, and -1 for no class")
        n = sampling.per_class * len(given or range(classes)) or sampling.samples
        return np.asarray(sampling.class_of(np.arange(n), classes))

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of one state, `(*dims, k, C)`."""
        *dims, channels = self.data.shape
        return (*dims, self.sde.k, channels)

    @property
    def objective(self) -> AbstractObjective:
        """What training minimises."""
        power = self.train.time_power
        if self.model.predicts == "data" and power is None and not positions(self.sde):
            return LogNormalNoise(**self.train.log_normal)
        return ScoreMatching(self.sde, power or 1.0)

    def build(self, key: PRNGKeyArray) -> Denoiser | EpsModel | VelocityModel:
        """The model with fresh parameters. Raises `UserError` for a spectrum, or classes, of other data."""
        share, labelled = self.train.label_dropout, LABEL in (cond_of(self.data) or {})
        require(not share or labelled, f"train.label_dropout {share}: the data are without labels: give --data.labels")
        shape = tuple(self.data.shape)
        net = told_augmentation(told_classes(self.net, self.data), self.train.augment, shape)
        return self.model.build(self.sde, net, shape, key)
