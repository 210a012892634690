"""What accelerators are given, as far as it can be told without one."""

import collections
import dataclasses
import importlib.util
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from experiments.benchmark import ahead
from experiments.benchmark.training import resized
from gddim.errors import UserError
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

    def pullback(net, *rows):
        return jax.vjp(lambda net: jax.vmap(lambda x, t, key: net(x, t, key=key))(*rows), net)[1]

    kept = jax.eval_shape(pullback, net, x, t, keys)
    size = collections.Counter()
    for leaf in jax.tree.leaves(kept):
        if batch in leaf.shape[:2]:
            size[leaf.dtype.name] += leaf.size * leaf.dtype.itemsize / batch
    assert size["float32"] < 0.1 * size["bfloat16"]
    assert size.total() < 70e6


def test_dropout_makes_no_large_array_of_short_rows():
    """A TPU pads the last axis to 128: random words split along an axis of 2 cost as much as the rest of a step."""
    net = eqx.filter_eval_shape(HEADLINE.build, (32, 32, 6), 6, jax.random.key(0))
    program = jax.make_jaxpr(jax.vmap(lambda key: net._masks(key, 32, 32)))(jax.random.split(jax.random.key(0), 2))
    shapes = [x.aval.shape for each in program.eqns for x in each.outvars]
    assert sum(math.prod(shape) > 1e6 for shape in shapes) > 10
    assert all(shape[-1] >= 128 for shape in shapes if math.prod(shape) > 1e6)


PROGRAM = """
%body.1 (p: f32[8]) -> f32[8] {
  %a = f32[8] fusion(%p), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"10"}}
}

%condition.1 (p: f32[8]) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(7)
}

%fused (p: f32[8]) -> f32[8] {
  ROOT %x = f32[8] add(%p, %p), backend_config={"window_config":{"estimated_cycles":"1000000"}}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8] while(%p), condition=%condition.1, body=%body.1, metadata={op_name="while"}
  ROOT %b = f32[8] fusion(%w), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"5"}}
}
"""


def test_cycles_of_a_loop_count_once_a_turn_and_those_inside_a_fusion_not_at_all():
    assert ahead.cycles(PROGRAM) == 7 * 10 + 5


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setitem(ahead.PLUGINS, "tpu", "no_such_plugin")
    with pytest.raises(UserError, match=r"a chip of v5e needs no_such_plugin: pip install 'gddim\[tpu\]'"):
        next(ahead.ahead(("a chip of v5e",)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a chip of v5e", "an H200"])
def test_a_step_compiles_for_an_accelerator_that_is_not_here(name, monkeypatch):
    machine = ahead.MACHINES[name]
    if not importlib.util.find_spec(ahead.PLUGINS[machine.platform]):
        pytest.skip(f"no {ahead.PLUGINS[machine.platform]}: its wheel is hundreds of megabytes")
    monkeypatch.setattr(ahead, "resized", lambda *given, **more: resized(*given, **more, multipliers=(1, 2), blocks=1))
    monkeypatch.setitem(ahead.MACHINES, name, machine._replace(width=16))
    with jax.numpy_dtype_promotion("standard"):  # JAX lowers the gradient of bfloat16 attention by no other
        _, memory, *estimate = ahead.ahead((name,))
    assert memory.baseline_value is not None
    assert memory.value < 3 * memory.baseline_value
    assert [row.value > 0 for row in estimate] == [True] * (machine.platform == "tpu")
