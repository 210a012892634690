"""Your own images, a folder or a zip of them: a denoiser that samples through every process.

    python -m experiments.photos --data.path photos
    python -m experiments.photos --data.path photos --data.size 32 --model.data-std 0.4    # what follows prints that number

`python -m gddim.data std photos --size 64` prints the rms of the images, `prepare` makes shards of what is larger than memory.
Where the Inception weights are not there the run trains and samples, and says what `evaluate` needs.
Paper: none; preconditioning and log-normal noise are EDM's (arXiv 2206.00364).
Hardware: one accelerator. Steps: 50,000 of 64 images, for some thousands of images; stop it when training/*.png please you.
Measured: nothing, for nobody has the same images.
"""

from gddim.data import ImageFolder
from gddim.experiment import Evaluation, Experiment, Model, Sampling, Training, main
from gddim.nn import NCSNppConfig
from gddim.samplers import GDDIM
from gddim.sde import CLD, VP

EXPERIMENT = Experiment(
    name="photos",
    sde=VP(),
    net=NCSNppConfig(
        width=64,
        multipliers=(1, 2, 2, 4),
        blocks=2,
        attention=(16,),
        dropout=0.13,  # few images are learnt by heart
        embedding="positional",
        fir=False,
        progressive_input="none",
        dtype="bfloat16",
    ),
    data=ImageFolder("photos", size=64, flip=True),
    model=Model(data_std=0.5),
    train=Training(
        steps=50_000,
        batch=64,
        sigma_mean=-0.6,  # as far as σ = 157, where sampling starts
        sigma_std=1.6,
        learning_rate=3e-4,
        warmup=1_000,
        cooldown=10_000,
        ema=0.9995,
        show_every=1_000,
        save_every=1_000,
    ),
    sampling=Sampling(nfe=10),
    eval=Evaluation(samplers=(GDDIM(3, interpolate="data"),), processes=(None, CLD()), nfe=(5, 10, 20), samples=5_000),
)

if __name__ == "__main__":
    main(EXPERIMENT)
