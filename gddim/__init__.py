"""Fast sampling and TPU-scale training for diffusion models driven by any linear SDE."""

from gddim.errors import UserError as UserError

__version__ = "0.1.0"
