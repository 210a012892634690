"""A trained network for others: a file, a folder as hubs have them, a program without this package; a state to go on with."""

from gddim.export.command import main as main
from gddim.export.state import export_state as export_state
