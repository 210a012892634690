"""The checkpoints of CLD-SGM (Dockhorn et al. 2022, arXiv 2112.07068): score_sde's NCSN++ of a velocity's ε, in L coordinates.

Their process and whether their score is mixed is not in the file; they are those of the published configurations, of which
CelebA's with four blocks a level, of after the paper, has another β. Their covariance has 1e-9 added to its diagonal at every t
(1e-6 CelebA's, whose levels are sinusoids), ours at t = 0, from where it decays: that changes the score of the velocity by less
than 1e-4, from t = 1e-3 on.
"""

from typing import Any

from gddim.convert.published import Elsewhere, Published
from gddim.convert.score_sde import UNTOLD, State, names
from gddim.experiment import Experiment, Model, Sampling
from gddim.samplers import GDDIM
from gddim.sde import CLD


def read_cld_sgm(state: State, source: Any) -> Published:
    """A network that takes position and velocity."""
    data = Elsewhere((state.side, state.side, state.outputs))
    epsilon = 1e-9 if state.config.fourier else 1e-6
    later = not state.config.fourier and state.config.blocks == 4  # CelebA's, of after the paper
    beta0, beta1 = (0.1, 6.9) if later else (4.0, 0.0)
    experiment = Experiment(
        "cld_sgm", CLD(m_inv=4.0, beta0=beta0, beta1=beta1, gamma=0.04, epsilon=epsilon), state.config, data,
        Model("velocity", mixed_score=True), sampling=Sampling(GDDIM(3, interpolate="data"), last="data"),
    )  # fmt: skip
    return Published(
        source,
        experiment,
        dict(state.arrays),
        names,
        state.step,
        f"CLD-SGM's, taken for one of M = 1/4, β = {'0.1 + 6.9 t' if later else '4'}, γ = 0.04, mixed (--sde.gamma …, "
        f"--model.no-mixed-score){UNTOLD}",
    )
