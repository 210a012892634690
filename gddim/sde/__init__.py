"""Linear SDEs: several in closed form, any other from its coefficients."""

from gddim.sde.base import AbstractLinearSDE as AbstractLinearSDE
from gddim.sde.blurring import Blurring as Blurring
from gddim.sde.cld import CLD as CLD
from gddim.sde.general import LinearSDE as LinearSDE
from gddim.sde.langevin import PSLD as PSLD
from gddim.sde.langevin import CriticallyDamped as CriticallyDamped
from gddim.sde.path import VE as VE
from gddim.sde.path import FlowMatching as FlowMatching
from gddim.sde.path import GaussianPath as GaussianPath
from gddim.sde.vp import VP as VP
from gddim.sde.vp import SubVP as SubVP
