"""The network that travels with the repository was trained; test_experiments has it that its experiment describes it."""

from pathlib import Path

import jax
import numpy as np

import gddim
from experiments.cifar10_tiny import EXPERIMENT
from gddim.data import CIFAR10


def test_it_denoises_images_it_has_not_seen_better_than_a_shrinkage(gddim_data: Path):
    images = CIFAR10(root=str(gddim_data)).test()[np.arange(16)]
    x = images.astype(np.float32) / 127.5 - 1
    sigmas = np.array([0.1, 0.3, 1.0, 3.0], np.float32)
    y = x + sigmas[:, None, None, None, None] * np.random.default_rng(0).normal(size=(4, *x.shape)).astype(np.float32)
    denoiser = gddim.load(str(EXPERIMENT.weights)).denoiser
    denoised = jax.jit(jax.vmap(jax.vmap(denoiser, (0, None))))(y, sigmas)
    shrinkage = np.mean(x**2) * sigmas**2 / (np.mean(x**2) + sigmas**2)  # the error of c y with the best c
    found = np.mean((np.asarray(denoised) - x) ** 2, axis=(1, 2, 3, 4)) / shrinkage
    assert np.all(found < np.array([0.3, 0.2, 0.25, 0.45])), found
