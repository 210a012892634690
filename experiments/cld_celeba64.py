"""`cld_cifar10` on CelebA, 64×64: 4 blocks a level, EMA 0.999.

    python -m experiments.cld_celeba64 --data.root DIR

Zhang, Tao, Chen, ICLR 2023 (arXiv 2206.05564), appendix. Here it was not trained.
"""

import dataclasses

from experiments import cld_cifar10
from gddim.data import CelebA
from gddim.experiment import main

EXPERIMENT = dataclasses.replace(
    cld_cifar10.EXPERIMENT,
    name="cld_celeba64",
    net=dataclasses.replace(cld_cifar10.EXPERIMENT.net, blocks=4),  # pyright: ignore[reportArgumentType]
    data=CelebA(size=64),
    train=dataclasses.replace(cld_cifar10.EXPERIMENT.train, ema=0.999),
)

if __name__ == "__main__":
    main(EXPERIMENT)
