"""The main job: critically damped Langevin diffusion on real 8×8 digits, sampled by gDDIM in 6 to 50 network calls.

    python -m experiments.cld_digits

1,500 handwritten digits train a small NCSN++ that predicts the data; 297 are held out for the evaluation.
Hardware: 2 CPU cores, 6 minutes.
"""

from gddim.data import Digits
from gddim.experiment import Evaluation, Experiment, Model, Sampling, Training, main
from gddim.nn import NCSNppConfig
from gddim.sde import CLD

EXPERIMENT = Experiment(
    name="cld_digits",
    sde=CLD(),
    net=NCSNppConfig(
        width=24,
        multipliers=(1, 1),
        blocks=1,
        attention=(4,),
        dropout=0.0,
        embedding="positional",
        fir=False,
        progressive_input="none",
    ),
    data=Digits(),
    model=Model(data_std=0.75),
    train=Training(
        steps=3_000,
        batch=64,
        learning_rate=2e-3,
        warmup=100,
        cooldown=1_500,
        ema=0.999,
        report_every=200,
        save_every=1_000,
    ),
    sampling=Sampling(samples=100, batch=25, nfe=20),
    eval=Evaluation(samples=500, batch=500, features="pixels"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
