"""A blurred CLD on CIFAR-10: a 2×2 system for every frequency, which nobody has trained yet.

    python -m experiments.blurred_cld_cifar10

`experiments.processes.blurred_langevin` in our parameterisation. Solving its coefficients takes about a minute once.
"""

import dataclasses
from pathlib import Path

from experiments import cld_cifar10_denoiser
from experiments.processes import blurred_langevin
from gddim.experiment import Model, Spectrum, main

EXPERIMENT = dataclasses.replace(
    cld_cifar10_denoiser.EXPERIMENT,
    name="blurred_cld_cifar10",
    sde=blurred_langevin(32),
    model=Model(predicts="data", data_std=Spectrum.read(Path(__file__).with_name("cifar10_spectrum.npz"))),
)

if __name__ == "__main__":
    main(EXPERIMENT)
