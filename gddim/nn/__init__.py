"""Networks: Equinox modules of one example, `net(x, level, cond=None, *, key=None)`, called under `jax.vmap`.

`x`: an image `(H, W, C_in)` or a point `(C_in,)`; what is returned has `C_out` channels and the same positions.
`level`: the noise level, a number: `ln(σ)/4` of a `Denoiser`, `999 t` of an `EpsModel`, as published.
`cond`: what conditions the network: a dictionary of what a record holds beside its data, or None.
`key`: randomness, as dropout; None where there is none.

A network of your own is such a module, and a frozen dataclass that builds it, whose fields become options:

>>> import dataclasses, equinox as eqx, jax
>>> from gddim.experiment import Experiment
>>> from gddim.data import Digits
>>> class Linear(eqx.Module):
...     weight: jax.Array
...     def __call__(self, x, level, cond=None, *, key=None):
...         return x @ self.weight / (1 + level**2)
>>> @dataclasses.dataclass(frozen=True)
... class LinearConfig:
...     scale: float = 1.0
...     def build(self, in_shape, out_channels, key):
...         return Linear(self.scale * jax.random.normal(key, (in_shape[-1], out_channels)))
>>> model = Experiment("mine", gddim.CLD(), LinearConfig(), Digits()).build(jax.random.key(0))
>>> model(jax.numpy.ones((8, 8, 2, 1)), 0.5).shape
(8, 8, 2, 1)
"""

from gddim.nn.dit import DiT as DiT
from gddim.nn.dit import DiTConfig as DiTConfig
from gddim.nn.mlp import MLP as MLP
from gddim.nn.mlp import MLPConfig as MLPConfig
from gddim.nn.ncsnpp import NCSNpp as NCSNpp
from gddim.nn.ncsnpp import NCSNppConfig as NCSNppConfig
