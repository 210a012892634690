"""What samplers say of a function that is no ε, or of a derivative that they do not have."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from gddim.samplers import GDDIM, RK45, Heun

U = jnp.zeros((4, 4, 2, 3))
GRID = [1.0, 0.5, 0.1]


@pytest.mark.parametrize("sampler", [GDDIM(2), Heun(), RK45()], ids=repr)
@pytest.mark.parametrize(
    ("result", "name"),
    [
        (lambda u: (u, u), "tuple"),
        (lambda u: [u], "list"),
        (lambda u: {"eps": u}, "dict"),
        (lambda u: None, "NoneType"),
    ],
)
def test_eps_fn_returns_one_array(sampler: Any, result: Any, name: str):
    with pytest.raises(
        ValueError, match=f"^eps_fn returned a {name}; it must return ε alone, one array of the shape of u"
    ):
        gddim.sample(sampler, gddim.CLD(), lambda u, t: result(u), U, GRID)


def test_a_numpy_array_is_an_array():
    zero = gddim.sample(GDDIM(1), gddim.CLD(), lambda u, t: np.zeros(u.shape, np.float32), U + 1, GRID)
    np.testing.assert_array_equal(zero, gddim.sample(GDDIM(1), gddim.CLD(), lambda u, t: 0 * u, U + 1, GRID))


def rk45(u: Any) -> Any:
    return gddim.sample(RK45(1e-2, 1e-2), gddim.VP(), lambda u, t: u * jnp.sin(t), u, GRID)


@pytest.mark.parametrize(
    "derivative", [jax.jacfwd(rk45), jax.jit(jax.jacfwd(rk45)), jax.hessian(lambda u: rk45(u).sum())]
)
def test_rk45_has_no_forward_mode(derivative: Any):
    with pytest.raises(ValueError, match=r"^RK45 has no forward-mode derivative \(jvp, jacfwd, hessian\): use grad"):
        derivative(jnp.ones((1, 2)))


def test_rk45_has_a_reverse_mode_and_other_samplers_both():
    u = jnp.ones((1, 2))
    backward = jax.jacrev(rk45)(u).reshape(2, 2)
    step = 1e-2
    ends = [rk45(u + sign * jnp.asarray([[step, 0.0]])).reshape(2) for sign in (1, -1)]
    np.testing.assert_allclose(backward[:, 0], (ends[0] - ends[1]) / (2 * step), rtol=1e-2, atol=1e-2)
    exact = lambda u: gddim.sample(GDDIM(2), gddim.VP(), lambda u, t: u * jnp.sin(t), u, GRID)
    np.testing.assert_allclose(jax.jacfwd(exact)(u), jax.jacrev(exact)(u), rtol=1e-5, atol=1e-6)
