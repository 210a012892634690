"""Fast sampling and TPU-scale training for diffusion models driven by any linear SDE."""

from gddim import guidance as guidance
from gddim.denoiser import as_denoiser as as_denoiser
from gddim.denoiser import through as through
from gddim.errors import UserError as UserError
from gddim.loading import load as load
from gddim.loss import denoising_loss as denoising_loss
from gddim.model import Denoiser as Denoiser
from gddim.model import EpsModel as EpsModel
from gddim.nn import MLP as MLP
from gddim.nn import DiT as DiT
from gddim.nn import DiTConfig as DiTConfig
from gddim.nn import MLPConfig as MLPConfig
from gddim.nn import NCSNpp as NCSNpp
from gddim.nn import NCSNppConfig as NCSNppConfig
from gddim.samplers import GDDIM as GDDIM
from gddim.samplers import IPNDM as IPNDM
from gddim.samplers import RK45 as RK45
from gddim.samplers import SSCS as SSCS
from gddim.samplers import AnalyticStart as AnalyticStart
from gddim.samplers import CholeskyMultistep as CholeskyMultistep
from gddim.samplers import DPMSolver as DPMSolver
from gddim.samplers import EulerMaruyama as EulerMaruyama
from gddim.samplers import Heun as Heun
from gddim.samplers import Method as Method
from gddim.samplers import UniPC as UniPC
from gddim.samplers import band_grid as band_grid
from gddim.samplers import count_calls as count_calls
from gddim.samplers import karras_grid as karras_grid
from gddim.samplers import log_snr_grid as log_snr_grid
from gddim.samplers import power_grid as power_grid
from gddim.samplers import sample as sample
from gddim.samplers import two_phase_grid as two_phase_grid
from gddim.samplers import uniform_grid as uniform_grid
from gddim.sde import CLD as CLD
from gddim.sde import PSLD as PSLD
from gddim.sde import VE as VE
from gddim.sde import VP as VP
from gddim.sde import AbstractLinearSDE as AbstractLinearSDE
from gddim.sde import Blurring as Blurring
from gddim.sde import CriticallyDamped as CriticallyDamped
from gddim.sde import FlowMatching as FlowMatching
from gddim.sde import GaussianPath as GaussianPath
from gddim.sde import LinearSDE as LinearSDE
from gddim.sde import SubVP as SubVP

__version__ = "0.2.0"
