"""What others reported: CIFAR-10 FID of 50,000 samples in gDDIM (Zhang, Tao, Chen 2023, arXiv 2206.05564), and in few calls
by other networks: AGM's (arXiv 2310.07805) and EDM's (arXiv 2206.00364), that also with UniPC (arXiv 2302.04867) and
DPM-Solver-v3 (arXiv 2310.13268)."""

import re
from typing import NamedTuple

HEADLINE = (10, 20, 50, 100, 1000)
_NEAREST = {
    "gDDIM": "gddim",
    "R": "gddim",
    "L": "cholesky",
    "Euler–Maruyama": "em",
    "ancestral": "em",
    "RK45": "rk45",
    "Heun": "heun",
    "AGM-ODE": "gddim",
    "UniPC": "unipc",
    "DPM-Solver-v3": "unipc",
}
OTHERS = ("AGM", "EDM")  # whose process is none of gDDIM's: their rows stand beside those of any


class Published(NamedTuple):
    """One row of a published table: FID by number of network calls; "> 100" is all that some were given as."""

    process: str
    label: str
    values: dict[int, float | str]

    @property
    def sampler(self) -> str:
        """The word of ours that is nearest to it."""
        return _NEAREST[re.split("[ ,]", self.label)[0]]


def _row(process: str, label: str, *values: float, nfe: tuple[int, ...] = HEADLINE) -> Published:
    above = len(nfe) - len(values)  # the first ones of a row that starts above 100
    return Published(process, label, dict(zip(nfe, (*("> 100",) * above, *values), strict=True)))


TABLES = (
    _row("VP", "Euler–Maruyama, Table 3", 31.2, 12.2, 2.64),
    _row("VP", "RK45, Table 3", 52.5, 6.62, 2.63, 2.56),
    _row("VP", "Heun, Table 3", 66.25, 6.62, 2.65, 2.57, 2.56),
    _row("VP", "gDDIM, Table 3", 4.17, 3.03, 2.59, 2.56, 2.56),
    _row("Blurring", "ancestral, Table 3", 29.8, 9.73, 2.51),
    _row("Blurring", "RK45, Table 3", 68.2, 7.12, 2.58, 2.46),
    _row("Blurring", "gDDIM, Table 3", 4.52, 2.97, 2.49, 2.47, 2.46),
    _row("CLD", "Euler–Maruyama, Table 3", 57.72, 13.21, 2.39),
    _row("CLD", "RK45, Table 3", 31.7, 4.56, 2.25),
    _row("CLD", "gDDIM, Table 3", 13.41, 3.39, 2.26, 2.26, 2.25),
    _row("CLD", "L, three nodes, Table 1", 368.0, 167.0, 4.12, 3.31, nfe=(20, 30, 40, 50)),
    _row("CLD", "R, three nodes, Table 1", 3.90, 2.64, 2.37, 2.26, nfe=(20, 30, 40, 50)),
    *(
        _row("CLD", f"{name}, order 1, λ = {lam}, Table 2", fid, nfe=(50,))
        for name, row in (
            ("gDDIM", (5.17, 5.51, 12.13, 33.0, 41.0, 49.0)),
            ("Euler–Maruyama", (346.0, 168.0, 137.0, 89.0, 45.0, 57.0)),
        )
        for lam, fid in zip((0, 0.1, 0.3, 0.5, 0.7, 1), row, strict=True)
    ),
    _row("AGM", "AGM-ODE, arXiv 2310.07805", 11.88, 4.54, 2.58, nfe=(5, 10, 20)),
    _row("EDM", "UniPC on EDM's network, arXiv 2310.13268", 24.0, 2.89, 2.03, nfe=(5, 10, 20)),
    _row("EDM", "DPM-Solver-v3 on EDM's network, arXiv 2310.13268", 12.21, 2.51, nfe=(5, 10)),
    _row("EDM", "Heun, EDM, arXiv 2206.00364", 1.97, nfe=(35,)),
)
