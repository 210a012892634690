"""Blurring diffusion on CIFAR-10 with the deep network, which sees pixels: the BDM rows of gDDIM's tables.

    python -m experiments.blur_cifar10

Hoogeboom, Salimans 2022 (arXiv 2209.05557). Published FID at NFE 10 / 20 / 50 by gDDIM: 4.52 / 2.97 / 2.49, where its own
ancestral sampler needs 1,000. Here it was not trained.
"""

import dataclasses

from experiments import vp_cifar10
from gddim.experiment import main
from gddim.sde import Blurring

EXPERIMENT = dataclasses.replace(
    vp_cifar10.EXPERIMENT,
    name="blur_cifar10",
    sde=Blurring(size=32, horizon=Blurring().start_time()),  # noise-to-signal ratio 80, where sampling starts
)

if __name__ == "__main__":
    main(EXPERIMENT)
