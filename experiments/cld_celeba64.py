"""`cld_cifar10` on CelebA, 64×64: 4 blocks a level, EMA 0.999.

    python -m experiments.cld_celeba64 --data.root DIR --workdir runs/cld_celeba64

Paper: Zhang, Tao, Chen, "gDDIM", ICLR 2023 (arXiv 2206.05564), appendix. DIR holds the aligned JPEGs.
Hardware: 8 accelerators of the A100 class for some days. Steps: 1,000,000 of 128 images.
Expected: as in the paper's appendix, which is not at hand here; of CIFAR-10, see `cld_cifar10`.
Measured: nothing yet.
"""

import dataclasses

from experiments import cld_cifar10
from gddim.data import CelebA
from gddim.experiment import main

EXPERIMENT = dataclasses.replace(
    cld_cifar10.EXPERIMENT,
    name="cld_celeba64",
    net=dataclasses.replace(cld_cifar10.NET, blocks=4),
    data=CelebA(size=64),
    train=dataclasses.replace(cld_cifar10.EXPERIMENT.train, ema=0.999),
)

if __name__ == "__main__":
    main(EXPERIMENT)
