"""The network that travels with the repository is the one that its experiment describes, and was trained."""

from pathlib import Path

import jax
import numpy as np
from etils import epath

import gddim
from experiments.cifar10_tiny import EXPERIMENT
from gddim import weights
from gddim.data import CIFAR10, data_alone
from gddim.experiment.workdir import describe


def test_the_file_is_of_the_experiment():
    config, own = weights.read(epath.Path(str(EXPERIMENT.weights))).config, describe(EXPERIMENT)
    assert [config[part] for part in ("net", "model", "sde")] == [own[part] for part in ("net", "model", "sde")]


def test_it_denoises_images_it_has_not_seen_better_than_a_shrinkage(gddim_data: Path):
    images = data_alone(CIFAR10(root=str(gddim_data)).test())[np.arange(16)]
    x = images.astype(np.float32) / 127.5 - 1
    sigmas = np.array([0.1, 0.3, 1.0, 3.0], np.float32)
    y = x + sigmas[:, None, None, None, None] * np.random.default_rng(0).normal(size=(4, *x.shape)).astype(np.float32)
    denoiser = gddim.load(str(EXPERIMENT.weights)).denoiser
    denoised = jax.jit(jax.vmap(jax.vmap(denoiser, (0, None))))(y, sigmas)
    shrinkage = np.mean(x**2) * sigmas**2 / (np.mean(x**2) + sigmas**2)  # the error of c y with the best c
    found = np.mean((np.asarray(denoised) - x) ** 2, axis=(1, 2, 3, 4)) / shrinkage
    assert np.all(found < np.array([0.3, 0.2, 0.25, 0.45])), found
