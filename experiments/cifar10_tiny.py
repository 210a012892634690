"""One denoiser of 1.3 million parameters for every process: CIFAR-10 as far as two CPU cores carry it.

    python -m experiments.cifar10_tiny sample      # with experiments/weights, where nothing was trained
    python -m experiments.cifar10_tiny --workdir runs/cifar10_tiny

Paper: none; `cifar10` in small, with the same preconditioning and noise levels. 1,260,547 parameters, 0.58 GFLOP an image.
Hardware: two idle CPU cores, 67 images/s, two hours. Steps: 6,600 of 64 images, the last 2,500 of falling learning rate.
Expected: colours and outlines, no objects; through CLD samplers in the order that large networks have.
Measured: FID 71.5 through VP and 74.9 through CLD by `gddim:3:data` at 10 calls, 5,000 samples; loss, speed and other
samplers in experiments/results/cifar10.md.
"""

from pathlib import Path

from gddim.data import CIFAR10
from gddim.experiment import Evaluation, Experiment, Model, Sampling, Training, main
from gddim.nn import NCSNppConfig
from gddim.samplers import GDDIM, CholeskyMultistep, EulerMaruyama
from gddim.samplers.words import BEST
from gddim.sde import CLD, VP

EXPERIMENT = Experiment(
    name="cifar10_tiny",
    sde=VP(),
    net=NCSNppConfig(
        width=32,
        multipliers=(1, 2, 2),
        blocks=1,
        attention=(8,),
        dropout=0.0,
        embedding="positional",
        fir=False,
        progressive_input="none",
    ),
    data=CIFAR10(),  # mirrored at random
    model=Model(data_std=0.5),
    train=Training(
        steps=6_600,
        batch=64,
        sigma_mean=-0.9,  # as far as σ = 157, where sampling starts
        sigma_std=1.6,
        learning_rate=1e-3,
        warmup=500,
        cooldown=2_500,
        ema=0.9995,
        report_every=500,
        save_every=2_000,
    ),
    sampling=Sampling(nfe=20),
    eval=Evaluation(
        samplers=(EulerMaruyama(), CholeskyMultistep(2), GDDIM(3), GDDIM(3, interpolate="data"), BEST),
        processes=(None, CLD()),
        nfe=(5, 10, 20, 50),
        samples=5_000,
        batch=100,
    ),
    weights=str(Path(__file__).parent / "weights" / "cifar10_tiny.safetensors"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
