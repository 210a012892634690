"""A blurred CLD on CIFAR-10: a 2×2 system for every frequency, which nobody has trained yet.

    python -m experiments.blurred_cld_cifar10

`experiments.processes.blurred_langevin` in our parameterisation. Solving its coefficients takes about a minute once.
"""

import dataclasses

from experiments import cld_cifar10_denoiser
from experiments.processes import blurred_langevin
from gddim.experiment import main

EXPERIMENT = dataclasses.replace(
    cld_cifar10_denoiser.EXPERIMENT,
    name="blurred_cld_cifar10",
    sde=blurred_langevin(32),
)

if __name__ == "__main__":
    main(EXPERIMENT)
