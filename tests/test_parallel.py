"""Meshes and shardings: the same training on any of them, the state split as promised, costs as on paper."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from gddim import UserError
from gddim.nn import NCSNppConfig
from gddim.parallel import (
    MeshConfig,
    activation_bytes,
    batch_sharding,
    bytes_per_device,
    collectives,
    default_rule,
    global_batch,
    init_sharded,
    make_mesh,
    mesh_in_words,
    on_paper,
    peak_flops,
    per_device_batch,
    replicated,
    round_up,
    state_shardings,
    step_cost,
)
from gddim.parallel.mesh import init_programs
from gddim.train import TrainState, adam, make_update

OPTIMIZER = adam()
MESHES = {"8 data": (8, 1), "8 fsdp": (1, 8), "2 × 4": (2, 4)}


def mesh_of(data: int, fsdp: int):
    return make_mesh(MeshConfig(data, fsdp), jax.devices()[: data * fsdp])


def abstract(data: int, fsdp: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def network():
    return eqx.nn.MLP(8, 8, 64, 2, jax.nn.silu, key=jax.random.key(0))


def loss(params, x0, noise):
    model = eqx.combine(params, eqx.filter(network(), eqx.is_array, inverse=True))
    return jnp.mean((jax.vmap(model)(x0 + noise) - noise) ** 2)


def compile_step(mesh, accumulate: int = 1):
    """A fresh state in its shards, and the compiled step."""
    state = init_sharded(lambda: TrainState.create(network(), OPTIMIZER), mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    update = make_update(
        lambda x0, key: (x0, jax.random.normal(key, x0.shape)),
        lambda params, *batch: loss(jax.lax.with_sharding_constraint(params, replicated(mesh)), *batch),
        OPTIMIZER, lambda step: jnp.float32(1e-3), seed=0, ema=0.9, accumulate=accumulate,
    )  # fmt: skip
    step = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
    batch = jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=batch_sharding(mesh))
    return state, step.lower(state, batch).compile()


def five_steps(mesh, accumulate: int = 1) -> tuple[list[float], TrainState]:
    state, step = compile_step(mesh, accumulate)
    losses = []
    for batch in np.random.default_rng(0).standard_normal((5, 32, 8)).astype(np.float32):
        state, metrics = step(state, global_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.fixture(scope="module")
def on_one_device():
    return five_steps(mesh_of(1, 1))


@pytest.mark.parametrize(("shape", "accumulate"), [*((s, 1) for s in MESHES.values()), ((1, 1), 2), ((2, 2), 4)])
def test_five_steps_agree_on_every_mesh(on_one_device, shape, accumulate):
    losses, state = five_steps(mesh_of(*shape), accumulate)
    np.testing.assert_allclose(losses, on_one_device[0], rtol=0, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), state, on_one_device[1])


def test_initial_parameters_are_the_same_on_every_mesh(on_one_device):
    def make():
        return TrainState.create(network(), OPTIMIZER)

    expected = make()
    for shape in MESHES.values():
        jax.tree.map(np.testing.assert_array_equal, init_sharded(make, mesh_of(*shape)), expected)


def test_fsdp_divides_the_state_from_the_start():
    config = NCSNppConfig(width=16, multipliers=(1, 2), blocks=1, attention=(4,))
    mesh = mesh_of(1, 8)
    state = init_sharded(lambda: TrainState.create(config.build((8, 8, 2), 1, jax.random.key(0)), OPTIMIZER), mesh)
    leaves = jax.tree.leaves(state)
    held = {device: 0 for device in jax.devices()}
    for shard in (shard for leaf in leaves for shard in leaf.addressable_shards):
        held[shard.device] += shard.data.nbytes
    total = sum(leaf.nbytes for leaf in leaves)
    assert max(held.values()) <= 1.05 * total / 8
    assert set(held.values()) == {bytes_per_device(state)}
    shapes = eqx.filter_eval_shape(lambda: state)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state_shardings(shapes, mesh)
    )
    assert bytes_per_device(placed) == bytes_per_device(state)


def test_nothing_empty_is_in_the_programs_of_the_initial_state():
    """XLA of jax 0.11.2 crashes on an empty constant inside `shard_map`."""
    make = lambda: NCSNppConfig(width=16, multipliers=(1, 2), blocks=1).build((8, 8, 2), 1, jax.random.key(0))
    shapes = eqx.filter(eqx.filter_eval_shape(make), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    for program in init_programs(make, shapes, mesh_of(1, 8)):
        assert "tensor<0x" not in program.lower().as_text()


def test_no_device_holds_the_whole_state_while_it_is_made():
    def make():
        return [jax.random.normal(jax.random.key(i), (64, 1024)) for i in range(64)]

    programs = init_programs(make, jax.eval_shape(make), mesh_of(1, 8))
    memory = [program.lower().compile().memory_analysis() for program in programs]
    total = 64 * 64 * 1024 * 4
    assert sum(each.output_size_in_bytes for each in memory) <= 1.01 * total / 8
    assert max(each.temp_size_in_bytes for each in memory) <= 1.01 * total / 4


def test_initialisation_passes_through_what_is_no_array():
    model = init_sharded(network, mesh_of(2, 4))
    assert (model.in_size, model.depth) == (8, 2)
    assert model(jnp.ones(8)).shape == (8,)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 64, 128), P(None, None, None, "fsdp")),  # the largest axis
        ((3, 3, 64, 64), P(None, None, None, "fsdp")),  # the last of equals
        ((128, 100), P("fsdp")),  # divisible, though not the last
        ((100, 130), P()),  # none is divisible
        ((16,), P()),  # too small
        ((), P()),
    ],
)
def test_the_rule(shape, spec):
    assert default_rule("", shape, abstract(1, 8)) == spec
    assert default_rule("", shape, abstract(8, 1)) == P()


def test_a_rule_of_ones_own_sees_paths():
    def rule(path, shape, mesh):
        return P() if path.startswith("ema/layers/0/") else default_rule(path, shape, mesh)

    shapes = eqx.filter_eval_shape(lambda: TrainState.create(network(), OPTIMIZER))
    shardings = state_shardings(shapes, abstract(1, 8), rule)
    assert shardings.ema.layers[0].weight.spec == P()
    assert shardings.ema.layers[1].weight.spec == shardings.model.layers[1].weight.spec == P(None, "fsdp")


@pytest.mark.parametrize("spec", [P("fsdp"), P(None, ("data", "fsdp")), P(None, None, "fsdp")])
def test_a_rule_that_does_not_divide_is_refused_by_path(spec):
    shapes = {"dense": {"weight": jax.ShapeDtypeStruct((10, 12), jnp.float32)}}
    with pytest.raises(UserError, match=r"does not divide dense/weight of shape \(10, 12\)"):
        state_shardings(shapes, abstract(2, 4), lambda *_: spec)


def test_meshes_go_by_process_and_fit_the_devices():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(make_mesh(MeshConfig(fsdp=4)).shape) == {"data": 2, "fsdp": 4}
    backwards = make_mesh(MeshConfig(), jax.devices()[::-1])
    assert list(backwards.devices.flat) == jax.devices()
    assert set(backwards.axis_types) == {AxisType.Auto}
    for config in (MeshConfig(fsdp=3), MeshConfig(data=3), MeshConfig(4, 4), MeshConfig(fsdp=0), MeshConfig(data=-2)):
        with pytest.raises(UserError, match=r"mesh\.data"):
            make_mesh(config)
    assert per_device_batch(16, make_mesh()) == 2
    assert [round_up(count, 8) for count in (1, 8, 9)] == [8, 8, 16]
    for batch in (12, 0, -8):
        with pytest.raises(UserError, match="multiple of 8"):
            per_device_batch(batch, make_mesh())


def test_each_device_is_given_its_own_rows():
    mesh = mesh_of(2, 4)
    batch = np.arange(16 * 3).reshape(16, 3)
    placed = global_batch(batch, mesh)
    np.testing.assert_array_equal(placed, batch)
    rows = [np.asarray(shard.data) for shard in sorted(placed.addressable_shards, key=lambda s: s.device.id)]
    np.testing.assert_array_equal(np.concatenate(rows), batch)
    assert "2 × fsdp=4, 0.0 MiB" in mesh_in_words(mesh, {"batch": placed})


def test_the_compiled_step_sends_what_the_paper_says():
    shapes = eqx.filter_eval_shape(lambda: TrainState.create(network(), OPTIMIZER))
    params = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes.model))
    found = {name: collectives(compile_step(mesh_of(*shape))[1].as_text() or "") for name, shape in MESHES.items()}
    # Gradients, and a few numbers such as the loss; nothing else where every device has everything.
    assert set(found["8 data"]) == {"all-reduce"}
    assert params <= found["8 data"]["all-reduce"][1] <= params + 64
    for name, (data, fsdp) in (("8 fsdp", (1, 8)), ("2 × 4", (2, 4))):
        mesh = abstract(data, fsdp)
        split = sum(
            leaf.size * 4
            for leaf, sharding in zip(
                *map(jax.tree.leaves, (shapes.model, state_shardings(shapes.model, mesh))), strict=True
            )
            if sharding.spec
        )
        assert found[name]["all-gather"][1] == split  # each parameter once
        assert params <= found[name]["all-reduce"][1] <= params + 64  # XLA:CPU has no reduce-scatter pass
        cost = step_cost(shapes.model, shapes, 100, 32, mesh)
        assert cost.sent == round(
            2 * (split * (fsdp - 1) / fsdp + split / fsdp * (data - 1) / data + (params - split) * 7 / 8)
        )
        assert (cost.batch, cost.activations, cost.working) == (4, 400, params + split * (fsdp - 1) // fsdp)


def test_accumulation_sends_gradients_after_every_part_and_keeps_one_part_at_a_time():
    shapes = eqx.filter_eval_shape(lambda: TrainState.create(network(), OPTIMIZER))
    params = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes.model))
    whole, parts = (step_cost(shapes.model, shapes, 100, 32, abstract(2, 4), accumulate=a) for a in (1, 4))
    sent = collectives(compile_step(mesh_of(2, 4), 4)[1].as_text() or "")
    assert 4 * params <= sent["all-reduce"][1] <= 4 * params + 256
    assert sent["all-gather"][1] < params
    gathered = sent["all-gather"][1] * 3 // 4
    assert parts.sent == gathered + 4 * (whole.sent - gathered)
    assert parts.working == whole.working + params  # the sum over parts
    assert (parts.batch, parts.activations) == (whole.batch, whole.activations // 4)


def test_the_paper_follows_the_rule_and_shows_small_numbers():
    shapes = eqx.filter_eval_shape(lambda: TrainState.create(network(), OPTIMIZER))

    def whole_model(path, shape, mesh):
        return P() if path.startswith("model/") else default_rule(path, shape, mesh)

    params = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes.model))
    assert step_cost(shapes.model, shapes, 100, 32, abstract(1, 8), whole_model).working == params
    lines = on_paper(shapes.model, shapes, 100, 32, whole_model, accumulate=2)
    assert re.search(r"64 H100: 64 × .* 2 examples .* 0\.0000841 .* = 0\.000126 of 80 GB; 0\.0000828 GB", lines[-1])
    odd = on_paper(shapes.model, shapes, 100, 32, lambda *_: P(("data", "fsdp")))
    assert re.match(r"v5p-256: rule: .* does not divide model/layers/0/weight of shape \(64, 8\)", odd[1])


def test_activations_are_those_that_the_backward_pass_needs():
    params = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    row = jax.ShapeDtypeStruct((64,), jnp.float32)

    def product(w, x):
        return jnp.sum(jnp.sin(x @ w))

    assert activation_bytes(product, params, (row,)) in range(2 * 256, 2 * 256 + 8)  # x, and cos of the product


def test_collectives_are_read_in_every_spelling():
    text = """
  %all-gather.3 = f32[64,16]{1,0} all-gather(%p), replica_groups=mesh['a'=4], dimensions={0}
  %ar = (bf16[8]{0:T(256)}, /*index=1*/f32[]) all-reduce(%x, %y), to_apply=%add
  %ags = (f32[2]{0}, f32[16]{0}) all-gather-start(%q), dimensions={0}
  ROOT %agd = f32[16]{0} all-gather-done(%ags)
  %rs = pred[4]{0} reduce-scatter(%z), dimensions={0}
  %fusion = f32[100]{0} fusion(%all-gather.3), kind=kLoop
"""
    assert collectives(text) == {"all-gather": (2, 64 * 16 * 4 + 64), "all-reduce": (1, 20), "reduce-scatter": (1, 4)}


def test_peak_rates_by_kind():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5p") == peak_flops("TPU v5") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 NVL") == 835e12
    assert (peak_flops("NVIDIA L4"), peak_flops("NVIDIA L40S")) == (121e12, 362e12)
    for kind in ("cpu", "NVIDIA L40", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "TPU v4 lite"):
        assert peak_flops(kind) is None, kind
