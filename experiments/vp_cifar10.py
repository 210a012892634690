"""The variance-preserving SDE on CIFAR-10 with the continuous DDPM++ (deep) network: the DDPM rows of gDDIM's tables.

    python -m experiments.vp_cifar10 --workdir runs/vp_cifar10

Paper: Song et al., ICLR 2021 (arXiv 2011.13456), sampled by gDDIM (arXiv 2206.05564), which is DDIM of order 3 here.
Hardware: 8 accelerators of the A100 class for some days. Steps: 1,000,000 of 128 images.
Expected (gDDIM's tables): FID 4.17 / 3.03 / 2.59 / 2.56 at NFE 10 / 20 / 50 / 100; Euler–Maruyama 31.2 at 50.
Measured: nothing yet.
"""

import dataclasses

from experiments import cld_cifar10, cld_cifar10_small
from gddim.experiment import main
from gddim.sde import VP

EXPERIMENT = dataclasses.replace(
    cld_cifar10.EXPERIMENT,
    name="vp_cifar10",
    sde=VP(),
    net=dataclasses.replace(cld_cifar10_small.NET, blocks=8),
)

if __name__ == "__main__":
    main(EXPERIMENT)
