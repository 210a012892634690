"""`cld_cifar10` with the mixed score: R⁻¹(0, v) is added to what the network says.

    python -m experiments.cld_cifar10_mixed

Dockhorn, Vahdat, Kreis, ICLR 2022 (arXiv 2112.07068), as used by gDDIM. Here it was not trained to the end.
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
