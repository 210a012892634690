"""Values that a CPU computes once."""

import chex
import jax
import jax.numpy as jnp
import pytest

from gddim.nn.whole import whole


def read_twice(x, keep):
    y = keep(x * x - 3 * x)
    return y.T * 2, jnp.concatenate([y, y[1:] + 1])


def gradient(x, keep):
    return jax.grad(lambda x: sum(jnp.sum(jnp.sin(y)) for y in read_twice(x, keep)))(x)


@pytest.mark.parametrize("f", [read_twice, gradient])
def test_a_value_kept_whole_is_the_same(f):
    x = jax.random.normal(jax.random.key(0), (3, 5, 4))
    kept, plain = (jax.jit(jax.vmap(lambda x, keep=keep: f(x, keep)))(x) for keep in (whole, lambda x: x))
    chex.assert_trees_all_close(kept, plain, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(f(x[0], whole), jax.tree.map(lambda y: y[0], plain), rtol=1e-5, atol=1e-5)


def test_a_cpu_computes_it_once_and_an_accelerator_is_told_nothing():
    x = jax.ShapeDtypeStruct((512, 64), jnp.float32)
    keeping, not_keeping = (jax.jit(lambda x, keep=keep: read_twice(x, keep)) for keep in (whole, lambda x: x))
    times = [f.lower(x).compile().as_text().count(" subtract(") for f in (keeping, not_keeping)]
    assert times == [1, 2]
    ours, plain = (f.trace(x).lower(lowering_platforms=("cuda",)).as_text() for f in (keeping, not_keeping))
    assert ours == plain
