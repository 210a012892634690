"""Linear SDEs: three in closed form, any other from its coefficients."""

from gddim.sde.base import AbstractLinearSDE as AbstractLinearSDE
from gddim.sde.blurring import Blurring as Blurring
from gddim.sde.cld import CLD as CLD
from gddim.sde.general import LinearSDE as LinearSDE
from gddim.sde.vp import VP as VP
