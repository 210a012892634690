"""The kin of NCSN++: DDPM's and ADM's U-Nets, class labels, images of other sizes."""

import dataclasses
import math

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gddim.errors import UserError
from gddim.nn import NCSNppConfig
from gddim.nn.layers import Attention, Draw, GroupNorm, downsample, downsample_conv
from gddim.nn.ncsnpp import Block

SMALL = NCSNppConfig(
    width=8, multipliers=(1, 2), blocks=1, attention=(4,), embedding="positional", fir=False, progressive_input="none"
)
KIN = {
    "DDPM": dataclasses.replace(SMALL, style="ddpm", groups=4),
    "diffusers": dataclasses.replace(SMALL, style="diffusers", groups=4),
    "ADM": dataclasses.replace(SMALL, style="adm", embedding="positional_open", eps=1e-5, head=4),
    "EDM's NCSN++": dataclasses.replace(SMALL, embedding="fourier_linear", fir=True, progressive_input="residual"),
    "averaged": dataclasses.replace(SMALL, progressive_input="averaged", features=12, hidden=20),
}


def built(config, seed=0):
    """With no parameter at zero."""
    net = config.build((8, 8, 3), 3, jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(net))))
    return jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(next(keys), leaf.shape), net)


@pytest.mark.parametrize("name", KIN)
def test_the_kin_take_any_size_and_drop_with_a_key_only(name):
    net = built(dataclasses.replace(KIN[name], dropout=0.5, scan_blocks=True))
    x = jax.random.normal(jax.random.key(2), (16, 4, 3))
    call = jax.jit(lambda x, key: net(x, 0.3, key=key))
    plain, dropped = call(x, None), call(x, jax.random.key(0))
    assert plain.shape == x.shape
    assert float(jnp.max(jnp.abs(plain - dropped))) > 1e-3
    np.testing.assert_allclose(net(x, 0.3), plain, rtol=2e-4, atol=2e-4)
    for bad in ((9, 8, 3), (8, 8, 4), (0, 8, 3)):
        with pytest.raises(ValueError, match="takes sides that are multiples of 2"):
            net(jnp.zeros(bad), 0.3)


def test_a_strided_convolution_of_diffusers_is_that_of_ddpm_seen_in_a_mirror():
    conv = built(KIN["DDPM"]).down[0].resample
    x, mirrored = jax.random.normal(jax.random.key(2), (8, 6, 8)), lambda x: x[::-1, ::-1]
    other = eqx.tree_at(lambda conv: conv.weight, conv, mirrored(conv.weight))
    expected = mirrored(downsample_conv(x, conv, fir=False))
    np.testing.assert_allclose(downsample_conv(mirrored(x), other, fir=False, centred=True), expected, atol=1e-6)
    assert float(jnp.abs(downsample_conv(mirrored(x), other, fir=False) - expected).max()) > 0.1


def test_levels_may_narrow_and_widen_again():
    """Blocks of one shape, to which the skip connections bring now more channels, now fewer, are no run."""
    net = built(dataclasses.replace(SMALL, multipliers=(2, 1, 2)))
    assert jax.eval_shape(net, jnp.zeros((8, 8, 3)), 0.3).shape == (8, 8, 3)


@pytest.mark.parametrize("style", ["ncsnpp", "adm"])
def test_a_class_enters_and_none_is_no_class(style):
    net = built(dataclasses.replace(SMALL, style=style, classes=3))
    x = jax.random.normal(jax.random.key(2), (8, 8, 3))
    call = jax.jit(lambda label: net(x, 0.3, {"label": label}))
    said = [np.asarray(call(jnp.int32(label))) for label in range(4)]
    assert min(np.abs(said[i] - said[j]).max() for i in range(3) for j in range(i)) > 1e-4
    np.testing.assert_allclose(said[3], net(x, 0.3), rtol=1e-4, atol=1e-4)  # a class that there is not
    for cond in ({"class": 1}, {"label": 1, "more": 2}, {"label": jnp.zeros(3)}, 1):
        with pytest.raises(ValueError, match=r'takes None or \{"label": class\}'):
            net(x, 0.3, cond)
    with pytest.raises(ValueError, match="takes None"):
        built(SMALL)(x, 0.3, {"label": 1})


def test_the_label_joins_the_embedding_as_edm_has_it():
    """One-hot times √n, through the linear map, onto the features."""
    net = built(dataclasses.replace(SMALL, classes=4))
    x = jax.random.normal(jax.random.key(2), (8, 8, 3))
    shifted = eqx.tree_at(lambda net: net.label.bias, net, net.label.bias + 2.0 * net.label.weight[1])
    np.testing.assert_allclose(shifted(x, 0.3), net(x, 0.3, {"label": 1}), rtol=1e-4, atol=1e-4)


def test_adms_block_is_its_formula():
    config = KIN["ADM"]
    block = Block(8, 8, config, draw=Draw(jax.random.key(0)), resample="down")
    keys = iter(jax.random.split(jax.random.key(1), 99))
    block = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), block)
    x, time = jax.random.normal(jax.random.key(2), (4, 4, 8)), jax.random.normal(jax.random.key(3), (32,))
    scale, shift = jnp.split(block.time(time), 2)
    h = block.conv_in(downsample(block.norm_in(x, swish=True), fir=False))
    h = jax.nn.swish(block.norm_out(h) * (scale + 1)[None, None] + shift[None, None])
    assert block.shortcut is None
    chex.assert_trees_all_close(block(x, time), downsample(x, fir=False) + block.conv_out(h), atol=1e-5)


def test_heads_attend_apart():
    """Two heads of four channels are two attentions, each over its own."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    layer = Attention(GroupNorm(8), 2, 1.0, draw=Draw(jax.random.key(1)))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    layer = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), layer)
    h = np.asarray(layer.norm(x)).reshape(6, 8)
    q, k, v = (h @ np.asarray(d.weight) + np.asarray(d.bias) for d in (layer.query, layer.key, layer.value))
    parts = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = np.exp(q[:, head] @ k[:, head].T / math.sqrt(4))
        parts.append(weights / weights.sum(1, keepdims=True) @ v[:, head])
    out = np.concatenate(parts, 1) @ np.asarray(layer.out.weight) + np.asarray(layer.out.bias)
    chex.assert_trees_all_close(layer(x), np.asarray(x) + out.reshape(x.shape), atol=2e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": -1},
        {"groups": 0},
        {"eps": 0.0},
        {"head": -1},
        {"features": -2},
        {"hidden": -1},
        {"features": 2, "embedding": "positional"},
        {"features": 7, "embedding": "fourier"},
    ],
)
def test_options_that_cannot_be_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        dataclasses.replace(SMALL, **change)
