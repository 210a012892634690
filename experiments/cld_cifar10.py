"""The headline: critically damped Langevin diffusion on CIFAR-10 with the published network and parameterisation.

    python -m experiments.cld_cifar10 --workdir runs/cld_cifar10

Paper: Zhang, Tao, Chen, "gDDIM", ICLR 2023 (arXiv 2206.05564). NCSN++ with 8 blocks a level, 107,597,446 parameters.
Hardware: 8 accelerators of the A100 class for some days. Steps: 1,000,000 of 128 images.
Expected (its tables): FID 13.41 / 3.39 / 2.26 / 2.26 at NFE 10 / 20 / 50 / 100, 2.86 at 27.
Measured: only reduced (width 32, 1 block, 300 steps on 2 CPU cores): experiments/results/cld_cifar10_reduced.md.
"""

from gddim.data import CIFAR10
from gddim.experiment import Evaluation, Experiment, Model, Sampling, Training, main
from gddim.nn import NCSNppConfig
from gddim.samplers import GDDIM
from gddim.sde import CLD

NET = NCSNppConfig(
    width=128,
    multipliers=(1, 2, 2, 2),
    blocks=8,
    attention=(16,),
    dropout=0.1,
    embedding="fourier",
    fir=True,
    progressive_input="residual",
)
EXPERIMENT = Experiment(
    name="cld_cifar10",
    sde=CLD(),
    net=NET,
    data=CIFAR10(),
    model=Model(predicts="eps"),
    train=Training(steps=1_000_000, batch=128, learning_rate=2e-4, warmup=5_000, clip=1.0, ema=0.9999),
    sampling=Sampling(sampler=GDDIM(3), nfe=50, last="euler"),
    eval=Evaluation(nfe=(10, 20, 27, 50), samples=50_000, batch=1_000),
    seed=8,
)

if __name__ == "__main__":
    main(EXPERIMENT)
