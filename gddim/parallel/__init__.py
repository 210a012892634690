"""Meshes, shardings, many hosts: the only package that makes meshes or asks how many processes there are."""

from gddim.parallel.cost import activation_bytes as activation_bytes
from gddim.parallel.cost import collectives as collectives
from gddim.parallel.cost import on_paper as on_paper
from gddim.parallel.cost import peak_flops as peak_flops
from gddim.parallel.cost import step_cost as step_cost
from gddim.parallel.mesh import MeshConfig as MeshConfig
from gddim.parallel.mesh import Rule as Rule
from gddim.parallel.mesh import batch_sharding as batch_sharding
from gddim.parallel.mesh import bytes_per_device as bytes_per_device
from gddim.parallel.mesh import default_rule as default_rule
from gddim.parallel.mesh import describe as describe
from gddim.parallel.mesh import global_batch as global_batch
from gddim.parallel.mesh import init_sharded as init_sharded
from gddim.parallel.mesh import make_mesh as make_mesh
from gddim.parallel.mesh import per_device_batch as per_device_batch
from gddim.parallel.mesh import replicated as replicated
from gddim.parallel.mesh import state_shardings as state_shardings
from gddim.parallel.processes import EXIT_LOST as EXIT_LOST
from gddim.parallel.processes import EXIT_PREEMPTED as EXIT_PREEMPTED
from gddim.parallel.processes import PreemptionGuard as PreemptionGuard
from gddim.parallel.processes import await_verdict as await_verdict
from gddim.parallel.processes import ending_on_sigterm as ending_on_sigterm
from gddim.parallel.processes import initialize as initialize
from gddim.parallel.processes import leave as leave
from gddim.parallel.processes import on_main as on_main
