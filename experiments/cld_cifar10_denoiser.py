"""`cld_cifar10` with our parameterisation, a preconditioned denoiser that serves every process, sampled by its data prediction.

    python -m experiments.cld_cifar10_denoiser --workdir runs/cld_cifar10_denoiser

Paper: none; preconditioning and noise levels are those of Karras et al. 2022 (arXiv 2206.00364), here seen through CLD.
`data_std` is the root mean square of CIFAR-10 in [−1, 1], as `python -m gddim.data std cifar10` measures it.
Hardware: 8 accelerators of the A100 class for some days. Steps: 1,000,000 of 128 images.
Expected: below the headline's 13.41 and 3.39 at NFE 10 and 20 (arXiv 2206.05564); the one meant to beat it.
Measured: in small alone, by release 0.1: experiments/results/cld_cifar10_reduced.md; `cld_digits` is the same on small images.
"""

import dataclasses

from experiments import cld_cifar10
from gddim.experiment import Model, Sampling, main

EXPERIMENT = dataclasses.replace(
    cld_cifar10.EXPERIMENT,
    name="cld_cifar10_denoiser",
    net=dataclasses.replace(cld_cifar10.NET, embedding="positional"),
    model=Model(predicts="data", data_std=0.506),
    sampling=Sampling(nfe=20),
)

if __name__ == "__main__":
    main(EXPERIMENT)
