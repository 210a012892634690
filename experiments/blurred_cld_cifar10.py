"""A blurred CLD on CIFAR-10: a 2×2 system for every frequency, which nobody has trained yet.

    python -m experiments.blurred_cld_cifar10 --workdir runs/blurred_cld_cifar10

Paper: none; `experiments.processes.blurred_langevin` in our parameterisation, whose noise has a spectrum here, so that the
network belongs to this process. The data's standard deviation by frequency stands in cifar10_spectrum.npz, as
`python -m gddim.data std cifar10 --spectrum FILE` measures it.
Hardware: 8 accelerators of the A100 class for some days. Steps: 1,000,000 of 128 images.
Expected: unknown; beside it stand `cld_cifar10` (FID 2.26 at NFE 50) and `blur_cifar10` (2.49), arXiv 2206.05564.
Measured: nothing yet. Its coefficients are solved once, in seconds.
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
