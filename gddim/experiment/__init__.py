"""An experiment: its dataclass, its command line, and what the verbs do."""

from gddim.experiment.cli import main as main
from gddim.experiment.config import Evaluation as Evaluation
from gddim.experiment.config import Experiment as Experiment
from gddim.experiment.config import Model as Model
from gddim.experiment.config import Sampling as Sampling
from gddim.experiment.config import Training as Training
from gddim.experiment.spectrum import Spectrum as Spectrum
