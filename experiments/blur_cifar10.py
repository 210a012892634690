"""Blurring diffusion on CIFAR-10 with the deep network, which sees pixels: the BDM rows of gDDIM's tables.

    python -m experiments.blur_cifar10 --workdir runs/blur_cifar10

Paper: Hoogeboom, Salimans 2022 (arXiv 2209.05557), sampled by gDDIM (arXiv 2206.05564).
Hardware: 8 accelerators of the A100 class for some days. Steps: 1,000,000 of 128 images.
Expected (gDDIM's tables): FID 4.52 / 2.97 / 2.49 / 2.47 at NFE 10 / 20 / 50 / 100; its own ancestral sampler 29.8 at 50.
Measured: nothing yet. For our parameterisation: `--model.predicts data --model.data-std experiments/cifar10_spectrum.npz`.
"""

import dataclasses

from experiments import vp_cifar10
from gddim.experiment import main
from gddim.sde import Blurring

EXPERIMENT = dataclasses.replace(
    vp_cifar10.EXPERIMENT,
    name="blur_cifar10",
    sde=Blurring(size=32, horizon=Blurring().start_time()),  # noise-to-signal ratio 80, where sampling starts
    sampling=dataclasses.replace(vp_cifar10.EXPERIMENT.sampling, t_min=1e-3),
)

if __name__ == "__main__":
    main(EXPERIMENT)
