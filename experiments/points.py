"""Five interlocked rings in the plane: critically damped Langevin diffusion without an image in sight.

    python -m experiments.points

An MLP learns the data prediction of 50,000 points, and gDDIM samples it.
Hardware: any CPU, under a minute.
"""

from gddim.data import FiveRings
from gddim.experiment import Evaluation, Experiment, Model, Sampling, Training, main
from gddim.nn import MLPConfig
from gddim.sde import CLD

EXPERIMENT = Experiment(
    name="points",
    sde=CLD(),
    net=MLPConfig(width=128, depth=3),
    data=FiveRings(),
    model=Model(data_std=1.0),
    train=Training(
        steps=4_000,
        batch=512,
        learning_rate=2e-3,
        warmup=100,
        cooldown=2_000,
        ema=0.999,
        report_every=500,
        save_every=1_000,
    ),
    sampling=Sampling(samples=4_000, batch=4_000, nfe=20),
    eval=Evaluation(samples=2_000, batch=2_000, features="pixels"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
