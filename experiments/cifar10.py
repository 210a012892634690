"""One small denoiser of CIFAR-10 for every process, to be trained in windows on a borrowed accelerator.

    python -m experiments.cifar10 --workdir runs/cifar10 --train.minutes 25
    python infra/window.py OUT --limit 30 -- experiments.cifar10      # laws and speed, training, a table, all in 30 minutes
    python -m experiments.cifar10 sample      # with the weights in experiments/weights, where they are and nothing was trained

Paper: none; preconditioning and log-normal noise are EDM's (arXiv 2206.00364), the two averages EDM2's (arXiv 2312.02696): of
those --sampling.ema makes any length. 15,780,931 parameters, 4.66 GFLOP an image forward, wide where images are small and a
parameter costs least: 64, (1, 2, 2, 2) with 4 blocks is of the same size and costs 11 % more, 96, (1, 2, 2) with 2 blocks 58 %.
Hardware: one accelerator of the H100 class. Steps: 80,000 of 512 images, 41 million in all; a window is some of them.
Expected: FID below 15 after the first window of 25 minutes, 8 after three, 5 after eight.
Augmentation is off (--train.augment 0.12 is EDM's, and 576 parameters more): in some windows so small a network learns no image
by heart, and what it would be told of takes its share of them.
Measured: nothing yet; `cifar10_tiny` is the same on two CPU cores. The large table, of the average that is best on other seeds,
and three seeds of what matters most:

    python -m experiments.cifar10 evaluate --workdir runs/cifar10 --eval.ema 0.03 0.05 0.07 0.1 0.15 \\
        --eval.nfe 4 5 6 8 10 15 20 35 50 --eval.processes own cld psld langevin --eval.samplers em cholesky:2 gddim:1 \\
        gddim:2 gddim:3 gddim:2:data gddim:3:data gddim:3:data:free@tuned gddim:1:lam=0.3 gddim:1:lam=1 heun rk45
    python -m experiments.cifar10 evaluate --workdir runs/cifar10 --eval.ema 0.03 0.05 0.07 0.1 0.15 \\
        --eval.nfe 5 10 20 --eval.seeds 3 --eval.samplers gddim:3:data:free@tuned gddim:3:data gddim:3
"""

from pathlib import Path

from gddim.data import CIFAR10
from gddim.experiment import Evaluation, Experiment, Model, Sampling, Training, main
from gddim.nn import NCSNppConfig
from gddim.samplers import GDDIM, CholeskyMultistep, EulerMaruyama
from gddim.samplers.words import BEST
from gddim.sde import CLD, VP

EXPERIMENT = Experiment(
    name="cifar10",
    sde=VP(),
    net=NCSNppConfig(
        width=64,
        multipliers=(1, 2, 4),
        blocks=2,
        attention=(16,),
        dropout=0.0,
        embedding="positional",
        fir=False,
        progressive_input="none",
        dtype="bfloat16",
    ),
    data=CIFAR10(),  # mirrored at random
    model=Model(data_std=0.506),
    train=Training(
        steps=80_000,
        batch=512,
        sigma_mean=-0.9,  # as far as σ = 157, where sampling starts
        sigma_std=1.6,
        learning_rate=1e-3,
        warmup=1_000,
        cooldown=16_000,
        ema_profiles=(0.05, 0.1),
        snapshot_every=2_000,
        save_every=2_000,
    ),
    sampling=Sampling(nfe=20),
    eval=Evaluation(
        samplers=(EulerMaruyama(), CholeskyMultistep(2), GDDIM(3), GDDIM(3, interpolate="data"), BEST),
        processes=(None, CLD()),
        nfe=(5, 10, 20, 50),
        samples=50_000,
        batch=1_000,
    ),
    weights=str(Path(__file__).parent / "weights" / "cifar10.safetensors"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
