"""What accelerators are given, as far as it can be told without one."""

import collections
import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp

from gddim.nn import NCSNppConfig

HEADLINE = NCSNppConfig()


def test_what_a_bfloat16_step_keeps_for_its_backward_pass_is_bfloat16():
    """But for the masks, which are bytes, the softmax and the last layer."""
    net = eqx.filter_eval_shape(
        dataclasses.replace(HEADLINE, dtype="bfloat16").build, (32, 32, 6), 6, jax.random.key(0)
    )
    batch = 7  # of which no other array has as many rows
    x, t = (jax.ShapeDtypeStruct((batch, *shape), jnp.float32) for shape in ((32, 32, 6), ()))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    kept = jax.eval_shape(lambda net, *rows: jax.vjp(lambda net: jax.vmap(net)(*rows), net)[1], net, x, t, keys)
    size = collections.Counter()
    for leaf in jax.tree.leaves(kept):
        if batch in leaf.shape[:2]:
            size[leaf.dtype.name] += leaf.size * leaf.dtype.itemsize / batch
    assert size["float32"] < 0.1 * size["bfloat16"]
    assert size.total() < 70e6


def test_dropout_makes_no_large_array_of_short_rows():
    """A TPU pads the last axis to 128: random words split along an axis of 2 cost as much as the rest of a step."""
    net = eqx.filter_eval_shape(HEADLINE.build, (32, 32, 6), 6, jax.random.key(0))
    program = jax.make_jaxpr(lambda keys: jax.vmap(net._masks)(keys))(jax.random.split(jax.random.key(0), 2))
    shapes = [x.aval.shape for each in program.eqns for x in each.outvars]
    assert sum(math.prod(shape) > 1e6 for shape in shapes) > 10
    assert all(shape[-1] >= 128 for shape in shapes if math.prod(shape) > 1e6)
