"""Networks: the published sizes and formulas, and that no way of running them changes what they compute."""

import dataclasses
import itertools
import math

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d, upfirdn

from gddim.errors import UserError
from gddim.nn import MLPConfig, NCSNpp, NCSNppConfig
from gddim.nn.layers import (
    Attention,
    Conv,
    Draw,
    GroupNorm,
    downsample,
    downsample_conv,
    fourier_embedding,
    sinusoidal_embedding,
    upsample,
)
from gddim.nn.ncsnpp import Block

HEADLINE = NCSNppConfig()
PLAIN = NCSNppConfig(blocks=4, embedding="positional", fir=False, progressive_input="none")
SMALL = NCSNppConfig(width=8, multipliers=(1, 2), blocks=2, attention=(4,))
LEVEL = NCSNppConfig(width=8, multipliers=(1,), blocks=2, attention=(8,))
SHAPE = (8, 8, 6)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def shaken(config, in_shape=SHAPE, out_channels=6):
    """A network whose parameters are all at work: fresh ones start with many near zero."""
    net = config.build(in_shape, out_channels, jax.random.key(0))
    leaves, structure = jax.tree.flatten(net)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        structure,
        [leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)],
    )


def keyed(net):
    return lambda x, level, key: net(x, level, key=key)


def compiled(function, *arguments):
    """What a function gives when compiled, in a quarter of the usual time, to a slower program."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function).lower(*arguments).compile(compiler_options=options)(*arguments)


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


@pytest.mark.parametrize(
    ("config", "channels", "published"),
    [
        (HEADLINE, 6, 107_597_446),
        (HEADLINE, 3, 107_587_075),
        (PLAIN, 6, 61_811_334),
        (dataclasses.replace(PLAIN, width=32), 6, 3_883_686),
    ],
    ids=["headline", "3 channels", "4 blocks", "width 32"],
)
def test_parameters_are_as_many_as_published(config, channels, published):
    net = eqx.filter_eval_shape(config.build, (32, 32, channels), channels, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(net)) == published


def outputs_and_gradients(config):
    net = shaken(config)

    def run(net, x, t, keys):
        def loss(net):
            y = jax.vmap(keyed(net))(x, t, keys)
            return jnp.mean(y**2), y

        return eqx.filter_grad(loss, has_aux=True)(net)

    keys = jax.random.split(jax.random.key(3), 2)
    grads, y = compiled(run, net, normal(2, 2, *SHAPE), jnp.array([3.0, 700.0]), keys)
    return y, jax.tree.leaves(grads)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (LEVEL, {"scan_blocks": True, "remat": True}),
        pytest.param(SMALL, {"scan_blocks": True}, marks=pytest.mark.slow),
        pytest.param(SMALL, {"remat": True}, marks=pytest.mark.slow),
    ],
    ids=["both, one level", "scan", "remat"],
)
def test_scanning_and_recomputing_blocks_change_nothing(config, change):
    plain, other = outputs_and_gradients(config), outputs_and_gradients(dataclasses.replace(config, **change))
    assert rms(plain[0]) > 0.1
    for ours, theirs in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        assert rms(ours - theirs) <= 2e-5 * rms(theirs) + 1e-9


def test_scanned_blocks_are_compiled_once():
    """The convolutions in the program, those of a function once for each of its calls."""
    config = dataclasses.replace(SMALL, blocks=8, attention=())

    def count(jaxpr) -> int:
        inner = [getattr(value, "jaxpr", value) for eqn in jaxpr.eqns for value in eqn.params.values()]
        own = sum(eqn.primitive.name == "conv_same" for eqn in jaxpr.eqns)
        return own + sum(count(jaxpr) for jaxpr in inner if hasattr(jaxpr, "eqns"))

    def convolutions(config) -> int:
        net = eqx.filter_eval_shape(config.build, SHAPE, 6, jax.random.key(0))
        x, t = jax.ShapeDtypeStruct(SHAPE, jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
        return count(jax.make_jaxpr(lambda net, x, t: net(x, t))(net, x, t).jaxpr)

    assert convolutions(config) > 70
    assert convolutions(dataclasses.replace(config, scan_blocks=True)) < 36


def test_bfloat16_is_within_three_percent():
    x, t = normal(2, *SHAPE), jnp.array(300.0)
    full, half = (
        compiled(lambda *a: a[0](*a[1:]), shaken(dataclasses.replace(SMALL, dtype=dtype)), x, t)
        for dtype in ("float32", "bfloat16")
    )
    assert half.dtype == jnp.float32
    assert 0 < rms(full - half) < 0.03 * rms(full)


def test_a_batch_is_its_examples():
    net = shaken(LEVEL)
    x, t = normal(2, 3, *SHAPE), jnp.array([1.0, 50.0, 999.0])
    keys = jax.random.split(jax.random.key(4), 3)
    together = compiled(lambda net, *rows: jax.vmap(keyed(net))(*rows), net, x, t, keys)
    alone = compiled(lambda net, *rows: jax.lax.map(lambda row: keyed(net)(*row), rows), net, x, t, keys)
    assert rms(together - alone) < 1e-5 * rms(alone)


def test_dropout_acts_with_a_key_only():
    x, t, keys = normal(2, *SHAPE), jnp.array(300.0), jax.random.split(jax.random.key(0), 2)

    def outputs(net, x, t, keys):
        return net(x, t), net(x, t, key=keys[0]), net(x, t, key=keys[1])

    plain, a, b = compiled(outputs, shaken(LEVEL), x, t, keys)
    without = compiled(outputs, shaken(dataclasses.replace(LEVEL, dropout=0.0)), x, t, keys)
    for each in without:
        chex.assert_trees_all_close(each, plain, atol=1e-5)
    assert min(rms(a - b), rms(a - plain)) > 1e-3 * rms(a)


@pytest.mark.parametrize("resample", ["none", "down", "up"])
def test_dropout_keeps_the_mean(resample):
    """A block is affine in what it drops: with a share of one half, a mask and its complement average to none."""
    config = dataclasses.replace(SMALL, dropout=0.5)
    block = Block(8, 8, config, draw=Draw(jax.random.key(0)), resample=resample)
    block = eqx.tree_at(lambda b: b.conv_out.weight, block, normal(5, 3, 3, 8, 8))
    x, time = normal(1, 8, 8, 8), normal(2, 32)
    plain = block(x, time)
    keep = jax.random.bernoulli(jax.random.key(3), 0.5, plain.shape)
    chex.assert_trees_all_close((block(x, time, keep) + block(x, time, ~keep)) / 2, plain, atol=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_dropout_drops_its_share_of_every_block(share):
    net = dataclasses.replace(SMALL, dropout=share).build(SHAPE, 6, jax.random.key(0))
    stacked = [np.asarray(mask) for mask in net._masks(jax.random.key(0), *SHAPE[:2])]
    masks = [mask for each in stacked for mask in each.reshape(-1, *each.shape[-3:])]
    fine, coarse = (8, 8, 8), (4, 4, 16)
    down, middle, up = [fine, fine, (4, 4, 8), coarse, coarse], [coarse] * 2, [*[coarse] * 3, (8, 8, 16), *[fine] * 3]
    assert [mask.shape for mask in masks] == down + middle + up
    for mask in masks:
        assert abs(mask.mean() - (1 - share)) < 5 * math.sqrt(share * (1 - share) / mask.size)
    for a, b in itertools.pairwise([mask for mask in masks if mask.shape == fine]):
        agree = share**2 + (1 - share) ** 2
        assert abs(np.mean(a == b) - agree) < 5 * math.sqrt(agree * (1 - agree) / a.size)


@pytest.mark.parametrize("channels", [8, 48, 160])
def test_group_norm_is_its_formula(channels):
    x = 3 + 2 * np.asarray(normal(0, 4, 6, channels), np.float64)
    norm = GroupNorm(channels)
    norm = eqx.tree_at(lambda n: (n.scale, n.bias), norm, (normal(1, channels), normal(2, channels)))
    groups = min(channels // 4, 32)
    split = x.reshape(24, groups, -1)
    mean, variance = split.mean((0, 2), keepdims=True), split.var((0, 2), keepdims=True)
    y = ((split - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * np.asarray(norm.scale) + np.asarray(norm.bias)
    found = norm(jnp.asarray(x, jnp.float32)), norm(jnp.asarray(x, jnp.float32), swish=True)
    chex.assert_trees_all_close(found, (y, y / (1 + np.exp(-y))), atol=2e-5)


def test_attention_is_its_formula():
    x = normal(0, 3, 4, 8)
    layer = Attention(GroupNorm(8), 1, math.sqrt(0.5), draw=Draw(jax.random.key(1)))
    layer = eqx.tree_at(lambda a: a.out.weight, layer, normal(2, 8, 8))
    layer = jax.tree.map(lambda leaf: leaf + 0.3 * normal(3, *leaf.shape), layer)
    h = np.asarray(layer.norm(x), np.float64).reshape(12, 8)
    q, k, v = (h @ np.asarray(d.weight) + np.asarray(d.bias) for d in (layer.query, layer.key, layer.value))
    weights = np.exp(q @ k.T / np.sqrt(8))
    out = weights / weights.sum(1, keepdims=True) @ v @ np.asarray(layer.out.weight) + np.asarray(layer.out.bias)
    chex.assert_trees_all_close(layer(x), (np.asarray(x) + out.reshape(x.shape)) / np.sqrt(2), atol=2e-5)


def test_resampling_filters_are_those_of_scipy():
    x, taps = np.asarray(normal(0, 6, 8, 3), np.float64), np.array([1.0, 3.0, 3.0, 1.0])
    up = upfirdn(taps / 4, upfirdn(taps / 4, x, up=2, axis=0)[1:13], up=2, axis=1)[:, 1:17]
    down = upfirdn(taps / 8, x, axis=0)[2:14:2][:3]
    down = upfirdn(taps / 8, down, axis=1)[:, 2:18:2][:, :4]
    single = jnp.asarray(x, jnp.float32)
    chex.assert_trees_all_close(upsample(single, fir=True), up, atol=1e-5)
    chex.assert_trees_all_close(downsample(single, fir=True), down, atol=1e-5)
    chex.assert_trees_all_close(upsample(single, fir=False), x.repeat(2, 0).repeat(2, 1), atol=1e-6)
    chex.assert_trees_all_close(downsample(single, fir=False), x.reshape(3, 2, 4, 2, 3).mean((1, 3)), atol=1e-6)


def test_the_strided_convolution_is_that_of_the_filtered_image():
    x, taps = np.asarray(normal(0, 6, 8, 2), np.float64), np.array([1.0, 3.0, 3.0, 1.0]) / 8
    conv = Conv(2, 4, draw=Draw(jax.random.key(1)))
    padded = np.pad(x, ((2, 2), (2, 2), (0, 0)))
    smooth = np.stack([correlate2d(padded[..., i], np.outer(taps, taps), "valid") for i in range(2)], axis=-1)
    w = np.asarray(conv.weight, np.float64)
    y = [sum(correlate2d(smooth[..., i], w[..., i, o], "valid")[::2, ::2] for i in range(2)) for o in range(4)]
    chex.assert_trees_all_close(
        downsample_conv(jnp.asarray(x, jnp.float32), conv, fir=True), np.stack(y, axis=-1), atol=1e-5
    )


def test_time_embeddings_are_their_formulas():
    frequencies = np.array([-20.0, 0.3, 16.0])
    angles = 2 * np.pi * frequencies * np.log(321.0)
    found = fourier_embedding(jnp.float32(321.0), jnp.asarray(frequencies, jnp.float32))
    chex.assert_trees_all_close(found, np.concatenate([np.sin(angles), np.cos(angles)]), atol=1e-3)
    angles = 321.0 * 10000.0 ** (-np.arange(4) / 3)
    expected = np.concatenate([np.sin(angles), np.cos(angles), [0.0]])
    chex.assert_trees_all_close(sinusoidal_embedding(jnp.float32(321.0), 9), expected, atol=1e-4)


def test_frequencies_are_fixed_and_of_scale_16():
    net = dataclasses.replace(SMALL, width=512, multipliers=(1,), blocks=1).build((2, 2, 1), 1, jax.random.key(0))
    assert net.frequencies is not None
    assert abs(rms(net.frequencies) - 16) < 5 * 16 / math.sqrt(2 * 512)
    grad = jax.grad(lambda w: jnp.sum(fourier_embedding(jnp.array(9.0), w)))(net.frequencies)
    assert not np.any(grad)


def test_kernels_start_with_the_published_variance():
    draw = Draw(jax.random.key(0))
    kernel = draw.kernel((3, 3, 40, 200))
    assert abs(rms(kernel) - math.sqrt(1 / (9 * 120))) < 0.01 * rms(kernel)
    fresh = SMALL.build(SHAPE, 6, jax.random.key(0))
    last = rms(fresh.conv_out.weight)
    assert abs(last - math.sqrt(1e-10 / (9 * 7))) < 0.1 * last


@pytest.mark.parametrize("size", [(10, 16), (16, 6), (0, 8)])
def test_sides_that_cannot_be_halved_are_refused(size):
    config = dataclasses.replace(SMALL, multipliers=(1, 2, 2))
    with pytest.raises(UserError, match=rf"multiples of 4; got {size[0]}x{size[1]}"):
        config.build((*size, 3), 3, jax.random.key(0))


@pytest.mark.parametrize(
    "wrong",
    [{"width": 3}, {"multipliers": ()}, {"blocks": 0}, {"dropout": 1.0}],
    ids=str,
)
def test_what_no_network_has_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        dataclasses.replace(SMALL, **wrong)


def test_a_width_without_equal_groups_is_refused():
    with pytest.raises(UserError, match="width"):
        NCSNppConfig(width=30).build((8, 8, 3), 3, jax.random.key(0))


def test_an_mlp_takes_points():
    net = shaken(MLPConfig(width=16, depth=2), (4,), 2)
    x, t = normal(0, 5, 4), jnp.linspace(1.0, 900.0, 5)
    together = jax.vmap(net)(x, t)
    alone = jnp.stack([net(*row) for row in zip(x, t, strict=True)])
    assert together.shape == (5, 2)
    chex.assert_trees_all_close(together, alone, atol=1e-5)
    assert rms(net(x[0], t[0]) - net(x[0], t[1])) > 1e-3
    with pytest.raises(UserError, match="depth"):
        MLPConfig(depth=0)


@pytest.mark.parametrize("t", [500.0, np.float64(500), jnp.asarray(500.0)])
def test_times_may_be_python_floats(t):
    net = NCSNpp(SMALL, SHAPE, 6, key=jax.random.key(0))
    x = normal(0, *SHAPE)
    np.testing.assert_array_equal(net(x, t), net(x, jnp.asarray(500.0)))


@pytest.mark.parametrize(("config", "shape"), [(SMALL, (8,)), (MLPConfig(), (8, 8, 3))])
def test_records_of_another_kind_are_refused(config, shape):
    with pytest.raises(UserError, match=rf"not records of {len(shape)} axes"):
        config.build(shape, 3, jax.random.key(0))
