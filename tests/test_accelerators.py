"""What accelerators are given, as far as it can be told without one."""

import collections
import dataclasses
import importlib.util
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
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


KERNELS = """
%sliced (whole: f32[64,1048576]) -> f32[4,1048576] {
  %whole = f32[64,1048576]{1,0} parameter(0)
  %row = f32[4,1048576]{1,0} slice(%whole), slice={[3:7], [0:1048576]}
  ROOT %negative = f32[4,1048576]{1,0} negate(%row)
}

%product (a: bf16[4096,4096], b: bf16[4096,4096]) -> f32[4096,4096] {
  %a = bf16[4096,4096]{1,0} parameter(0)
  %b = bf16[4096,4096]{1,0} parameter(1)
  ROOT %dot.1 = f32[4096,4096]{1,0} dot(%a, %b), lhs_contracting_dims={0}, rhs_contracting_dims={0}
}

%stored (stack: f32[8,4194304], turn: f32[1,4194304], at: s32[]) -> f32[8,4194304] {
  %stack = f32[8,4194304]{1,0} parameter(0)
  %turn = f32[1,4194304]{1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %update.1 = f32[8,4194304]{1,0} dynamic-update-slice(%stack, %turn, %at, %at)
}

%body.1 (loop: (s32[], f32[8,4194304], f32[1,4194304])) -> (s32[], f32[8,4194304], f32[1,4194304]) {
  %loop = (s32[], f32[8,4194304]{1,0}, f32[1,4194304]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%loop), index=0
  %c = f32[8,4194304]{1,0} get-tuple-element(%loop), index=1
  %u = f32[1,4194304]{1,0} get-tuple-element(%loop), index=2
  %s = f32[8,4194304]{1,0} fusion(%c, %u, %i), kind=kLoop, calls=%stored
  ROOT %t = (s32[], f32[8,4194304]{1,0}, f32[1,4194304]{1,0}) tuple(%i, %s, %u)
}

%condition.1 (l: (s32[], f32[8,4194304], f32[1,4194304])) -> pred[] {
  %l = (s32[], f32[8,4194304]{1,0}, f32[1,4194304]{1,0}) parameter(0)
}

ENTRY %main (x: bf16[512,32,32,64], w: bf16[128,3,3,64], m: bf16[4096,4096], f: f32[64,1048576]) -> f32[9] {
  %x = bf16[512,32,32,64]{3,2,1,0} parameter(0)
  %w = bf16[128,3,3,64]{3,2,1,0} parameter(1)
  %m = bf16[4096,4096]{1,0} parameter(2)
  %f = f32[64,1048576]{1,0} parameter(3)
  %conv.1 = (bf16[512,32,32,128]{3,2,1,0}, u8[9999999999]{0}) custom-call(%x, %w), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBiasActivationForward"
  %y = bf16[512,32,32,128]{3,2,1,0} get-tuple-element(%conv.1), index=0
  %conv.2 = (bf16[512,32,32,64]{3,2,1,0}, u8[0]{0}) custom-call(%y, %w), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %conv.3 = (bf16[128,3,3,64]{3,2,1,0}, u8[0]{0}) custom-call(%x, %y), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %gemm.1 = (f32[4096,4096]{1,0}, s8[4194304]{0}) custom-call(%m, %m), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"]}}}
  %gemm.2 = f32[4096,4096]{1,0} fusion(%m, %m), kind=kCustom, calls=%product
  %v = f32[4,1048576]{1,0} fusion(%f), kind=kLoop, calls=%sliced
  %z = f32[4,1048576]{1,0} copy(%v)
  %few = f32[9]{0} reduce(%z), dimensions={0}
  %few.1 = f32[9]{0} copy(%few)
  %state = (s32[], f32[8,4194304]{1,0}, f32[1,4194304]{1,0}) tuple(%few, %f, %v)
  %while.1 = (s32[], f32[8,4194304]{1,0}, f32[1,4194304]{1,0}) while(%state), condition=%condition.1, body=%body.1, \
backend_config={"known_trip_count":{"n":"8"}}
}
"""


def test_a_roofline_counts_the_operations_and_the_bytes_of_each_kernel():
    convolution = 2 * (512 * 32 * 32) * 128 * (3 * 3 * 64)  # and as many for either gradient
    product = 2 * 4096 * 4096 * 4096
    products = (3 * convolution + 2 * product) / (0.65 * 989e12)
    array = 4 * 4 * 1048576
    index = 4
    # Its slice in and out; a copy; a sum; eight times a turn of a loop, stored in a stack.
    moved = (2 * array + 2 * array + (array + 4 * 9) + 8 * (2 * array + index)) / (0.85 * 4.8e12)
    smallest = 2e-6
    np.testing.assert_allclose(ahead.roofline(KERNELS), (products + moved + smallest, products), rtol=1e-12)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setitem(ahead.PLUGINS, "tpu", "no_such_plugin")
    with pytest.raises(UserError, match=r"a chip of v5e needs no_such_plugin: pip install 'gddim\[tpu\]'"):
        next(ahead.ahead(("a chip of v5e",)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a chip of v5e", "an H200", "cifar10 on an H200"])
def test_a_step_compiles_for_an_accelerator_that_is_not_here(name, monkeypatch):
    machine = ahead.MACHINES[name]
    if not importlib.util.find_spec(ahead.PLUGINS[machine.platform]):
        pytest.skip(f"no {ahead.PLUGINS[machine.platform]}: its wheel is hundreds of megabytes")
    small = resized(machine.experiment, width=16, multipliers=(1, 2), blocks=1)
    monkeypatch.setitem(ahead.MACHINES, name, machine._replace(experiment=small))
    with jax.numpy_dtype_promotion("standard"):  # JAX lowers the gradient of bfloat16 attention by no other
        compilation, memory, estimate = ahead.ahead((name,))
    assert compilation.figure.startswith(f"{small.name} on {name.removeprefix('cifar10 on ')}, bfloat16")
    assert memory.baseline_value is not None
    assert memory.value < 3 * memory.baseline_value
    assert estimate.value > (estimate.baseline_value or 0)
