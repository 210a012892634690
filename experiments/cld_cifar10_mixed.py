"""`cld_cifar10` with the mixed score: R⁻¹(0, v) is added to what the network says.

    python -m experiments.cld_cifar10_mixed --workdir runs/cld_cifar10_mixed

Paper: Dockhorn, Vahdat, Kreis, ICLR 2022 (arXiv 2112.07068), who introduced the mixed score; here in gDDIM's coordinates.
Hardware: 8 accelerators of the A100 class for some days. Steps: 1,000,000 of 128 images.
Expected: near `cld_cifar10` (FID 3.39 / 2.26 at NFE 20 / 50, arXiv 2206.05564).
Measured: nothing yet.
"""

import dataclasses

from experiments import cld_cifar10
from gddim.experiment import Model, main

EXPERIMENT = dataclasses.replace(
    cld_cifar10.EXPERIMENT,
    name="cld_cifar10_mixed",
    model=Model(predicts="eps", mixed_score=True),
)

if __name__ == "__main__":
    main(EXPERIMENT)
