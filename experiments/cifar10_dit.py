"""CIFAR-10 by a transformer, DiT-S/2, that serves every process: the second image network, and a room of its own.

    python -m experiments.cifar10_dit --workdir runs/cifar10_dit

Paper: Peebles and Xie 2023 (arXiv 2212.09748), with preconditioning, noise levels and augmentation of Karras et al. 2022 (arXiv
2206.00364).
Sizes (width, depth, heads): S 384, 12, 6; B 768, 12, 12; L 1024, 24, 16; XL 1152, 28, 16. `--dry-run` prints parameters and
operations: S/2 has 32.5 M and 12.3 GFLOP an image, forward (published on 4 channels, with labels: 33 M, 6.06 G multiply-adds).
Hardware: 8 accelerators of the A100 class for a day. Steps: 400,000 of 256 images.
Expected: behind a U-Net of equal cost on so few images, which is what it is compared with.
Measured: nothing yet but its laws; the same network learns the digits in test_dit.
"""

from gddim.data import CIFAR10
from gddim.experiment import Evaluation, Experiment, Model, Sampling, Training, main
from gddim.nn import DiTConfig
from gddim.sde import CLD, VP

EXPERIMENT = Experiment(
    name="cifar10_dit",
    sde=VP(),
    net=DiTConfig(dtype="bfloat16"),
    data=CIFAR10(),
    model=Model(data_std=0.506),
    train=Training(
        steps=400_000,
        batch=256,
        sigma_mean=-0.9,
        sigma_std=1.6,
        learning_rate=2e-4,
        warmup=5_000,
        ema_profiles=(0.05, 0.1),
        augment=0.12,  # it sees every image 2,000 times
    ),
    sampling=Sampling(nfe=20),
    eval=Evaluation(processes=(None, CLD()), samples=50_000),
)

if __name__ == "__main__":
    main(EXPERIMENT)
