"""The variance-preserving SDE on CIFAR-10 with the continuous DDPM++ (deep) network: the DDPM rows of gDDIM's tables.

    python -m experiments.vp_cifar10

Song et al. 2021 (arXiv 2011.13456). Published FID at NFE 10 / 20 / 50 by gDDIM: 4.17 / 3.03 / 2.59. Here it was not trained.
"""

import dataclasses

from experiments import cld_cifar10
from gddim.experiment import main
from gddim.nn import NCSNppConfig
from gddim.sde import VP

EXPERIMENT = dataclasses.replace(
    cld_cifar10.EXPERIMENT,
    name="vp_cifar10",
    sde=VP(),
    net=NCSNppConfig(
        width=128,
        multipliers=(1, 2, 2, 2),
        blocks=8,
        attention=(16,),
        dropout=0.1,
        embedding="positional",
        fir=False,
        progressive_input="none",
    ),
)

if __name__ == "__main__":
    main(EXPERIMENT)
