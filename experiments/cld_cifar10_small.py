"""`cld_cifar10` with the smaller published network: 4 blocks a level, sinusoidal embedding, no FIR filters.

    python -m experiments.cld_cifar10_small --workdir runs/cld_cifar10_small

Paper: Zhang, Tao, Chen, "gDDIM", ICLR 2023 (arXiv 2206.05564). 61,811,334 parameters.
Hardware: 8 accelerators of the A100 class, about half the time of `cld_cifar10`. Steps: 1,000,000 of 128 images.
Expected: somewhat above `cld_cifar10`, whose FID is 2.26 at NFE 50; the paper's tables are of the larger network.
Measured: nothing yet.
"""

import dataclasses

from experiments import cld_cifar10
from gddim.experiment import main

NET = dataclasses.replace(cld_cifar10.NET, blocks=4, embedding="positional", fir=False, progressive_input="none")
EXPERIMENT = dataclasses.replace(
    cld_cifar10.EXPERIMENT,
    name="cld_cifar10_small",
    net=NET,
)

if __name__ == "__main__":
    main(EXPERIMENT)
