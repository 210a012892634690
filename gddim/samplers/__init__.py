"""Samplers: tables of float64 coefficients, and the one loop that reads them."""

from gddim.samplers.adams import GDDIM as GDDIM
from gddim.samplers.base import Coefficients as Coefficients
from gddim.samplers.baselines import RK45 as RK45
from gddim.samplers.baselines import SSCS as SSCS
from gddim.samplers.baselines import CholeskyMultistep as CholeskyMultistep
from gddim.samplers.baselines import EulerMaruyama as EulerMaruyama
from gddim.samplers.baselines import Heun as Heun
from gddim.samplers.grids import band_grid as band_grid
from gddim.samplers.grids import karras_grid as karras_grid
from gddim.samplers.grids import log_snr_grid as log_snr_grid
from gddim.samplers.grids import power_grid as power_grid
from gddim.samplers.grids import two_phase_grid as two_phase_grid
from gddim.samplers.grids import uniform_grid as uniform_grid
from gddim.samplers.method import Method as Method
from gddim.samplers.peers import IPNDM as IPNDM
from gddim.samplers.peers import AnalyticStart as AnalyticStart
from gddim.samplers.peers import DPMSolver as DPMSolver
from gddim.samplers.peers import UniPC as UniPC
from gddim.samplers.solver import AbstractSampler as AbstractSampler
from gddim.samplers.solver import AbstractTableSampler as AbstractTableSampler
from gddim.samplers.solver import Solution as Solution
from gddim.samplers.solver import TableSolver as TableSolver
from gddim.samplers.solver import count_calls as count_calls
from gddim.samplers.solver import sample as sample
from gddim.samplers.words import Grid as Grid
from gddim.samplers.words import OnGrid as OnGrid
