"""What others published, read without importing or running any of it: `python -m gddim.convert SOURCE RUN`.

>>> from pathlib import Path
>>> from gddim import convert
>>> def sampled_through_cld(snapshot: Path, u):  # EDM's network, trained on no such process
...     denoise = convert.read(snapshot).model.denoiser
...     sde = gddim.CLD()
...     sampler = gddim.GDDIM(3, interpolate="data")
...     return gddim.sample(sampler, sde, gddim.through(sde, denoise), u, gddim.power_grid(1.0, 1e-3, 10))
"""

from gddim.convert.command import convert as convert
from gddim.convert.command import convert_published as convert_published
from gddim.convert.command import load_experiment as load_experiment
from gddim.convert.command import main as main
from gddim.convert.flax import published_names as published_names
from gddim.convert.flax import read_state as read_state
from gddim.convert.published import Published as Published
from gddim.convert.recognition import read as read
