"""Laws of the transformer: what it costs, what it may not depend on, and that it learns."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from experiments import cifar10_dit
from gddim.data import Digits, to_unit
from gddim.experiment.plan import Plan
from gddim.loss import LogNormalNoise
from gddim.nn.dit import DiT, DiTConfig, positions
from gddim.parallel import MeshConfig
from gddim.train import adam

SMALL = DiTConfig(width=32, depth=3, heads=4, patch=2)


def built(config: DiTConfig, shape: tuple[int, ...] = (8, 12, 3), zeros: bool = False) -> DiT:
    """With random parameters where they begin at zero, so that every path counts."""
    net = config.build(shape, shape[-1], jax.random.key(0))
    if zeros:
        return net
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda p: p + 0.05 * jax.random.normal(next(keys), p.shape), net)


X = jax.random.normal(jax.random.key(2), (8, 12, 3))

# Peebles and Xie 2023, Table 4, on latents (32, 32, 4): parameters in millions, and multiply-adds in billions.
PUBLISHED = {"S": (384, 12, 6, 33, 6.06), "B": (768, 12, 12, 130, 23.0), "XL": (1152, 28, 16, 675, 118.6)}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_and_operations_are_those_published(size):
    width, depth, heads, millions, operations = PUBLISHED[size]
    config = DiTConfig(width, depth, heads, patch=2, scan_blocks=False)
    net = eqx.filter_eval_shape(lambda: config.build((32, 32, 4), 8, jax.random.key(0)))
    labels = 1001 * width  # which ours has not
    found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(net)) + labels
    assert found / 1e6 == pytest.approx(millions, rel=0.015)
    if size == "S":
        call = jax.jit(lambda net, x, level: net(x, level))
        cost = call.lower(net, jax.ShapeDtypeStruct((32, 32, 4), jnp.float32), 0.5).cost_analysis()
        assert cost["flops"] / 2e9 == pytest.approx(operations, rel=0.03)


def test_it_begins_as_nothing_and_every_parameter_is_learned():
    assert jnp.abs(built(SMALL, zeros=True)(X, 0.3)).max() < 1e-3
    slopes = eqx.filter_grad(lambda net: jnp.sum(jnp.sin(net(X, 0.3))))(built(SMALL))
    assert all(jnp.abs(slope).max() > 0 for slope in jax.tree.leaves(slopes))


def test_every_pixel_depends_on_every_pixel_and_on_the_level():
    net = built(SMALL)
    far = jax.jacobian(lambda corner: net(X.at[0, 0, 0].set(corner), 0.3)[-1, -1, -1])(X[0, 0, 0])
    assert abs(float(far)) > 1e-6
    assert jnp.abs(net(X, 0.3) - net(X, -0.7)).max() > 1e-3


def test_patches_are_tiles_of_the_image():
    """With the blocks passed over, a pixel moves the patch that it lies in, and no other."""
    net = built(SMALL)
    net = eqx.tree_at(lambda net: net.blocks, net, jax.tree.map(jnp.zeros_like, net.blocks))
    moved = jnp.abs(net(X.at[3, 6, 0].add(1.0), 0.3) - net(X, 0.3)).max(-1) > 1e-6
    expected = np.zeros((8, 12), bool)
    expected[2:4, 6:8] = True
    np.testing.assert_array_equal(moved, expected)


def test_positions_are_told_apart_by_their_distance():
    found = positions(8, 12, 32)
    gram = (found @ found.T).reshape(8, 12, 8, 12)
    assert len({tuple(row) for row in found.round(6).tolist()}) == 96
    for shift in (1, 3):
        np.testing.assert_allclose(gram[1, 2, 1 + shift, 2], gram[2, 7, 2 + shift, 7], rtol=1e-9)


@pytest.mark.parametrize("change", [{"scan_blocks": False}, {"remat": True}, {"dtype": "bfloat16"}], ids=str)
def test_how_it_is_computed_changes_rounding_alone(change):
    def slope(net):
        return eqx.filter_value_and_grad(lambda net: jnp.sum(net(X, 0.3) ** 2))(net)

    net = built(SMALL)
    other = built(dataclasses.replace(SMALL, **change))
    near = 0.05 if "dtype" in change else 1e-5
    with jax.numpy_dtype_promotion("standard"):  # attention in bfloat16 has no strict backward pass
        pairs = zip(*(jax.tree.leaves(jax.jit(slope)(each)) for each in (net, other)), strict=True)
    for a, b in pairs:
        assert jnp.linalg.norm(a - b) <= near * jnp.linalg.norm(a) + 1e-6
    assert other(X, 0.3).dtype == jnp.float32


@pytest.mark.parametrize(
    ("config", "shape", "said"),
    [
        ({"patch": 3}, (8, 12, 3), "patch: 3 does not divide the sides of the image, 8x12"),
        ({}, (6,), r"a DiT takes images \(H, W, C\), not records of 1 axes"),
        ({"heads": 5}, (8, 12, 3), "width: got 32, needs a multiple of 4 and of the 5 heads"),
        ({"depth": 0}, (8, 12, 3), "depth: got 0, needs at least 1"),
    ],
)
def test_what_it_cannot_be_is_refused(config, shape, said):
    with pytest.raises(gddim.UserError, match=said):
        dataclasses.replace(SMALL, **config).build(shape, 3, jax.random.key(0))


def test_its_state_is_sharded_like_any_other():
    experiment = dataclasses.replace(cifar10_dit.EXPERIMENT, net=SMALL, mesh=MeshConfig(fsdp=4))
    plan = Plan(experiment)
    parts = [sharding.shard_shape(leaf.shape) != leaf.shape for leaf, sharding in zip(
        jax.tree.leaves(plan.shapes.model), jax.tree.leaves(plan.shardings.model), strict=True)]  # fmt: skip
    assert sum(parts) > 0.8 * len(parts)


def test_it_learns_the_digits():
    net = DiTConfig(width=64, depth=3, heads=4, patch=2).build((8, 8, 1), 1, jax.random.key(0))
    model, optimizer = gddim.Denoiser(gddim.CLD(), net, data_std=0.75), adam(0.9, 1.0)
    images = to_unit(jnp.asarray(Digits().train()[np.arange(512)]))
    objective, params = LogNormalNoise(), eqx.filter(model, eqx.is_inexact_array)
    state = optimizer.init(params)

    @eqx.filter_jit
    def step(model, state, key):
        value, slope = eqx.filter_value_and_grad(lambda model: objective(model, images, key))(model)
        moves, state = optimizer.update(slope, state)
        return eqx.apply_updates(model, jax.tree.map(lambda move: -2e-3 * move, moves)), state, value

    values = []
    for i in range(60):
        model, state, value = step(model, state, jax.random.key(i))
        values.append(float(value))
    assert np.mean(values[-5:]) < 0.65 * np.mean(values[:5]), values
