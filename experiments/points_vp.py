"""Five interlocked rings in the plane with the variance-preserving process; all else as in `points`.

    python -m experiments.points_vp

Hardware: any CPU, under a minute.
"""

import dataclasses

from experiments import points
from gddim.experiment import main
from gddim.sde import VP

EXPERIMENT = dataclasses.replace(points.EXPERIMENT, name="points_vp", sde=VP())

if __name__ == "__main__":
    main(EXPERIMENT)
