"""The self-test of processes finds what is wrong with them: a good process with one member broken, many times."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gddim.check import laws, main
from gddim.sde import CLD, VP, AbstractLinearSDE, Blurring
from gddim.sde.linalg import matrix, namespace, product, transpose


def broken(good: AbstractLinearSDE, **members: Callable[..., Any]) -> AbstractLinearSDE:
    """The process with other members, each a function of the good process and of the member's arguments."""
    abstract = {name: (lambda sde, *args, name=name: getattr(sde, name)(*args)) for name in ABSTRACT}
    body: dict[str, Any] = {
        name: (lambda self, *args, fn=fn: fn(good, *args)) for name, fn in (abstract | members).items()
    }
    body |= dict(k=good.k, horizon=good.horizon, __annotations__={"k": ClassVar[int], "horizon": ClassVar[float]})
    kind: Any = type(AbstractLinearSDE)
    return kind("Broken", (AbstractLinearSDE,), {**body, "__module__": __name__})()


ABSTRACT = ("transition", "noise_factor", "to_pixels", "from_pixels")


def scaled(by: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """R times a function of the namespace and the time."""

    def noise_factor(sde: AbstractLinearSDE, t: Any) -> Any:
        xp = namespace(t)
        return sde.noise_factor(t) * xp.asarray(by(xp, xp.asarray(t)))[..., None, None]

    return noise_factor


def turned(angle: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """R times a rotation by an angle that is a function of time."""

    def noise_factor(sde: AbstractLinearSDE, t: Any) -> Any:
        xp = namespace(t)
        cos, sin = (f(xp.asarray(angle(xp, xp.asarray(t)))) for f in (xp.cos, xp.sin))
        return sde.noise_factor(t) @ matrix(xp, [[cos, -sin], [sin, cos]])

    return noise_factor


def bump(at: float, width: float) -> Callable[[Any, Any], Any]:
    return lambda xp, t: xp.exp(-(((t - at) / width) ** 2))


def signal(sde: AbstractLinearSDE, t: Any, s: Any, by: Callable[[Any, Any], Any]) -> Any:
    xp = namespace(t, s)
    return sde.transition(t, s) * (by(xp, xp.asarray(t)) / by(xp, xp.asarray(s)))[..., None, None]


narrow = lambda xp, t: xp.where(abs(t - 0.72) < 2e-4, 1.01, 1.0)
MISTAKES: dict[str, tuple[AbstractLinearSDE, str, Callable[..., Any]]] = {
    "R has a notch at 0.6": (VP(), "noise_factor", scaled(lambda xp, t: 1 - 0.3 * bump(0.6, 0.02)(xp, t))),
    "R of a blur has a notch": (Blurring(8), "noise_factor", scaled(lambda xp, t: 1 - 0.3 * bump(0.6, 0.02)(xp, t))),
    "R has a spike at 0.72": (VP(), "noise_factor", scaled(lambda xp, t: 1 + 0.01 * bump(0.72, 1e-3)(xp, t))),
    "R jumps up and down": (VP(), "noise_factor", scaled(narrow)),
    "R jumps up": (VP(), "noise_factor", scaled(lambda xp, t: xp.where(t < 0.31, 0.999, 1.0))),
    "R turns for a moment": (CLD(), "noise_factor", turned(lambda xp, t: 1e-3 * bump(0.72, 1e-2)(xp, t))),
    "R is another factor of Σ": (CLD(), "noise_factor", CLD.cholesky_factor),
    "R is transposed": (CLD(), "noise_factor", lambda sde, t: transpose(sde.noise_factor(t))),
    "R is wrong at small times": (VP(), "noise_factor", scaled(lambda xp, t: xp.where(t < 1e-4, 0.9, 1.0))),
    "R of CLD ends at 1e-5": (CLD(), "noise_factor", lambda sde, t: sde.noise_factor(namespace(t).maximum(t, 1e-5))),
    "R is no number at small times": (VP(), "noise_factor", scaled(lambda xp, t: xp.where(t < 1e-7, np.nan, 1.0))),
    "R is in single precision": (VP(), "noise_factor", lambda sde, t: sde.noise_factor(t).astype(np.float32).astype(t.dtype)),
    "Ψ is no semigroup": (VP(), "transition", lambda sde, t, s: 0.999 * sde.transition(t, s) + 0.001),
    "Ψ is not 1 at first": (VP(), "transition", lambda sde, t, s: 1.001 * sde.transition(t, s)),
    "Ψ has a spike": (VP(), "transition", lambda sde, t, s: signal(sde, t, s, narrow)),
    "Ψ is transposed": (CLD(), "transition", lambda sde, t, s: transpose(sde.transition(t, s))),
    "to_pixels scales": (Blurring(8), "to_pixels", lambda sde, u: 1.01 * sde.to_pixels(u)),
    "to_pixels flips": (VP(), "to_pixels", lambda sde, u: u[::-1]),
    "from_pixels is left out": (Blurring(8), "from_pixels", lambda sde, x: x),
    "lift scales": (VP(), "lift", lambda sde, x: 1.01 * sde.lift(x)),
    "lift moves": (CLD(), "lift", lambda sde, x: sde.lift(x) + 0.1 * sde.lift(x)[..., ::-1, :]),
    "project takes the velocity": (CLD(), "project", lambda sde, u: u[..., 1, :]),
    "project is not to pixels": (Blurring(8), "project", lambda sde, u: u[..., 0, :]),
    "perturb forgets the signal": (VP(), "perturb", lambda sde, u0, t, eps: u0 + product(sde.noise_factor(t), eps)),
    "perturb takes Σ": (
        VP(), "perturb",
        lambda sde, u0, t, eps: product(sde.transition(t, 0.0), u0) + product(sde.covariance(t), eps),
    ),
    "the prior is too wide": (VP(), "sample_prior", lambda sde, key, shape: 1.03 * sde.sample_prior(key, shape)),
    "the prior has a mean": (VP(), "sample_prior", lambda sde, key, shape: 0.3 + sde.sample_prior(key, shape)),
    "the prior is uniform": (
        VP(), "sample_prior", lambda sde, key, shape: jax.random.uniform(key, shape, minval=-(3**0.5), maxval=3**0.5)
    ),
    "the prior is white": (CLD(), "sample_prior", lambda sde, key, shape: jax.random.normal(key, shape)),
    "the prior has no key": (VP(), "sample_prior", lambda sde, key, shape: sde.sample_prior(jax.random.key(0), shape)),
    "the prior is grey": (
        VP(), "sample_prior",
        lambda sde, key, shape: jnp.broadcast_to(sde.sample_prior(key, (*shape[:-1], 1)), shape),
    ),
    "half is doubled": (VP(), "velocity_factors", lambda sde, t: (sde.velocity_factors(t)[0], sde.diffusion_squared(t))),
    "the drift is backward": (VP(), "velocity_factors", lambda sde, t: (-sde.drift(t), sde.velocity_factors(t)[1])),
    "drift": (VP(), "drift", lambda sde, t: 2 * sde.drift(t)),
    "diffusion": (VP(), "diffusion_squared", lambda sde, t: sde.diffusion_squared(t) ** 0.5),
    "covariance": (VP(), "covariance", lambda sde, t: sde.noise_factor(t)),
    "Cholesky factor": (CLD(), "cholesky_factor", lambda sde, t: sde.noise_factor(t)),
    "score": (VP(), "score", lambda sde, eps, t: -sde.score(eps, t)),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name: str):
    good, member, mistake = MISTAKES[name]
    assert any(not law.holds for law in laws(broken(good, **{member: mistake}))), name


@pytest.mark.parametrize(
    "process",
    [
        broken(VP(), noise_factor=scaled(lambda xp, t: 1.1)),
        broken(VP(), noise_factor=scaled(lambda xp, t: xp.sqrt(1 + bump(0.0, 0.1)(xp, t) / 9))),
        broken(CLD(), noise_factor=turned(lambda xp, t: 0.3 + 0 * t)),
    ],
    ids=["another diffusion", "another Σ_0", "a constant rotation"],
)
def test_another_process_is_no_mistake(process: AbstractLinearSDE):
    """What follows from Ψ and R alone cannot be told from what was meant: the report says so."""
    wrong = [law for law in laws(process) if not law.holds]
    assert not wrong, wrong


def test_the_report_tells_what_it_cannot_tell(capsys: pytest.CaptureFixture[str]):
    assert main(["gddim:VP"]) == 0
    said = capsys.readouterr().out
    assert "every law holds" in said
    assert "cannot be checked: that Σ_0 and GGᵀ are the ones meant, a constant rotation R Q" in said
