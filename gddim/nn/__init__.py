"""Networks: per-example Equinox modules `net(x, t, key=None)`, called under `jax.vmap`."""

from gddim.nn.mlp import MLP as MLP
from gddim.nn.mlp import MLPConfig as MLPConfig
from gddim.nn.ncsnpp import NCSNpp as NCSNpp
from gddim.nn.ncsnpp import NCSNppConfig as NCSNppConfig
