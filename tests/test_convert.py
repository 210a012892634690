"""Published checkpoints: what is read is what was saved, the networks say what the published ones said."""

import dataclasses
import re
import struct
from pathlib import Path

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from etils import epath

import gddim
from gddim import convert
from gddim.convert.flax import assign
from gddim.experiment.checkpoints import restore_ema
from gddim.experiment.plan import Plan
from gddim.nn import MLPConfig, NCSNppConfig

FOURIER = NCSNppConfig(width=16, blocks=1)
POSITIONAL = dataclasses.replace(FOURIER, fir=False, embedding="positional", progressive_input="none")
PUBLISHED = {"ncsnpp_fir_fourier": (FOURIER, 6), "ncsnpp_positional": (POSITIONAL, 3)}
TINY = NCSNppConfig(width=4, multipliers=(1, 1), blocks=1, attention=(16,))
TINY_OPTIONS = ["--net.width", "4", "--net.multipliers", "1", "1", "--net.blocks", "1"]


def shapes_of(config, channels=6, size=32):
    return eqx.filter_eval_shape(config.build, (size, size, channels), channels, jax.random.key(0))


def fresh(config, seed=0):
    return config.build((32, 32, 6), 6, jax.random.key(seed))


def load(path, model, weights="ema"):
    return assign(convert.read_state(path), model, weights, path)


def encode(x):
    """As flax packs an array."""
    body = msgpack.packb((x.shape, x.dtype.name, np.ascontiguousarray(x).tobytes()))
    return msgpack.ExtType(1, body)


def state_of(ema, raw, step=7):
    """A training state with the layout of the published ones, arrays not yet packed."""

    def tree(net):
        nested: dict = {}
        for names, leaf in zip(convert.published_names(net), jax.tree.leaves(net), strict=True):
            parts = np.asarray(leaf).reshape(len(names), *next(iter(names.values())))
            for name, part in zip(names, parts, strict=True):
                *folders, last = name.split("/")
                inner = nested
                for folder in folders:
                    inner = inner.setdefault(folder, {})
                inner[last] = part
        return nested

    return {"params_ema": tree(ema), "optimizer": {"target": tree(raw)}, "step": np.asarray(step, np.int32)}


def write(path: Path, state) -> Path:
    pack = lambda tree: {k: pack(v) for k, v in tree.items()} if isinstance(tree, dict) else encode(tree)
    path.write_bytes(msgpack.packb(pack(state)))
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_network_says_what_it_said(fixtures_dir, name, dtype):
    config, channels = PUBLISHED[name]
    net = load(fixtures_dir / f"{name}.msgpack", shapes_of(dataclasses.replace(config, dtype=dtype), channels))
    with np.load(fixtures_dir / f"{name}_io.npz") as io:
        x, t, expected = (jnp.asarray(io[key]) for key in ("net_input", "t", "net_output"))
    run = jax.jit(lambda net, x, t: jax.vmap(net)(x, t)).lower(net, x, 999 * t)
    difference = run.compile(compiler_options={"xla_backend_optimization_level": 0})(net, x, 999 * t) - expected
    if dtype == "float32":
        assert jnp.max(jnp.abs(difference)) <= 1e-4
    else:
        assert jnp.sqrt(jnp.mean(difference**2)) <= 0.03 * jnp.sqrt(jnp.mean(expected**2))


def test_names_are_the_published_ones(fixtures_dir):
    names = convert.published_names(shapes_of(FOURIER))
    lines = sorted(f"{name} {shape}" for each in names for name, shape in each.items())
    assert lines == sorted((fixtures_dir / "ncsnpp_fir_fourier.names.txt").read_text().splitlines())


def test_an_imported_network_samples(fixtures_dir):
    """Twenty steps in one program are those of a loop written down here, in float64 but for the network."""
    sde = gddim.CLD()
    net = load(fixtures_dir / "ncsnpp_fir_fourier.msgpack", shapes_of(FOURIER))
    sampler, ts = gddim.GDDIM(3), gddim.power_grid(sde.horizon, 1e-3, 20)
    u = sde.sample_prior(jax.random.key(0), (32, 32, 2, 3))

    def draw(net, u):
        return gddim.sample(sampler, sde, gddim.EpsModel(sde, net), u, ts)

    options = {"xla_backend_optimization_level": 0}
    found = np.asarray(jax.jit(draw).lower(net, u).compile(compiler_options=options)(net, u))
    call = jax.jit(lambda net, x, t: net(x, t)).lower(net, jnp.zeros((32, 32, 6)), 999.0)
    call = call.compile(compiler_options=options)
    table, history, state = sampler.coefficients(sde, ts), [], np.asarray(u, np.float64)
    for t, psi, weights in zip(ts, table.psi, table.weights, strict=False):
        eps = np.asarray(call(net, jnp.asarray(state, jnp.float32).reshape(32, 32, 6), 999.0 * t)).reshape(u.shape)
        history = [eps.astype(np.float64), *history[:2]]
        state = psi @ state + sum(w @ e for w, e in zip(weights, history, strict=False))
    assert np.all(np.isfinite(found))
    assert np.std(found - state) < 1e-3 * np.std(state)


@pytest.mark.parametrize(
    "change", [{}, {"fir": False}, {"embedding": "positional", "progressive_input": "none"}], ids=str
)
def test_both_sets_of_weights_are_read_as_they_were_saved(tmp_path, change):
    config = dataclasses.replace(TINY, **change)
    ema, raw = fresh(config), fresh(config, 1)
    path = write(tmp_path / "state", state_of(ema, raw))
    chex.assert_trees_all_equal(load(path, shapes_of(config)), ema)
    chex.assert_trees_all_equal(load(path, shapes_of(config), "raw"), raw)
    model = load(path, gddim.EpsModel(gddim.CLD(), shapes_of(config)))
    chex.assert_trees_all_equal(model.net, ema)


def test_large_arrays_in_pieces_scalars_and_bfloat16_are_read(tmp_path):
    whole, coarse = np.arange(24, dtype=np.float32).reshape(4, 6), jnp.arange(6, dtype=jnp.bfloat16)
    pieces = {str(i): encode(whole.reshape(-1)[9 * i : 9 * i + 9]) for i in range(3)}
    scalar = msgpack.ExtType(3, msgpack.packb(((), "int32", np.int32(5).tobytes())))
    tree = {
        "big": {"__msgpack_chunked_array__": True, "shape": {"0": 4, "1": 6}, "chunks": pieces},
        "coarse": encode(np.asarray(coarse)),
        "scalar": scalar,
        "complex": msgpack.ExtType(2, msgpack.packb((1.0, -2.0))),
        "none": None,
    }
    path = tmp_path / "state"
    path.write_bytes(msgpack.packb(tree))
    state = convert.read_state(path)
    np.testing.assert_array_equal(state["big"], whole)
    np.testing.assert_array_equal(state["coarse"], np.asarray(coarse))
    assert (int(state["scalar"]), state["complex"], state["none"]) == (5, 1 - 2j, None)


def test_every_parameter_that_does_not_match_is_named(tmp_path):
    state = state_of(fresh(TINY), fresh(TINY))
    tree = state["params_ema"]
    del tree["Dense_1"]["bias"]
    tree["Conv_0"]["kernel"] = np.zeros((3, 3, 9, 4), np.float32)
    tree["Conv_1"]["bias"] = np.zeros(6, np.int32)
    tree["Extra_0"] = {"W": np.zeros((2, 5), np.float32)}
    with pytest.raises(gddim.UserError) as caught:
        load(write(tmp_path / "state", state), shapes_of(TINY))
    for line in (
        "4 parameter(s)",
        "missing: Dense_1/bias (16,)",
        "shape: Conv_0/kernel is (3, 3, 9, 4), the network's (3, 3, 6, 4)",
        "type: Conv_1/bias is int32",
        "unexpected: Extra_0/W (2, 5)",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no flax msgpack file"),
        (b"\x80\x04K\x01.", "no flax msgpack file"),
        (msgpack.packb([1, 2]), "holds a list"),
        (msgpack.packb({"step": 1}), "holds no params_ema"),
        (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((2,), "float32", b"1234")))}), "no flax msgpack file"),
        (
            msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((1,), "object", b"12345678")))}),
            "no flax msgpack file",
        ),
        (msgpack.packb({"a": msgpack.ExtType(9, b"")}), "extension type 9"),
        (msgpack.packb({1: 2}), "holds no params_ema, where ema weights are; it has 1"),
        (msgpack.packb([[{}] * 50_000] * 20), "more entries than"),
        (b"\x81\xa1a\xdd" + struct.pack(">I", 10**6) + bytes(10**6), "exceeds max_array_len"),
    ],
)
def test_what_is_no_training_state_is_refused(tmp_path, content, says):
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(gddim.UserError, match=says):
        load(tmp_path / "state", shapes_of(TINY))


def test_a_truncated_or_missing_file_is_refused(tmp_path):
    path = write(tmp_path / "state", state_of(fresh(TINY), fresh(TINY)))
    path.write_bytes(path.read_bytes()[:-100])
    for each in (path, tmp_path / "nowhere"):
        with pytest.raises(gddim.UserError, match=each.name):
            load(each, shapes_of(TINY))


def test_only_the_published_kind_of_network_is_loaded(tmp_path):
    net = MLPConfig(width=8, depth=1).build((2,), 2, jax.random.key(0))
    with pytest.raises(gddim.UserError, match="MLP"):
        load(write(tmp_path / "state", state_of(fresh(TINY), fresh(TINY))), net)


def test_the_command_writes_a_run(tmp_path, capsys):
    ema, raw = fresh(TINY), fresh(TINY, 1)
    source, workdir = write(tmp_path / "state", state_of(ema, raw, step=7)), tmp_path / "run"
    command = [str(source), str(workdir), "--experiment", "cld_cifar10", *TINY_OPTIONS]
    assert convert.main(command) == 0
    assert "python -m experiments.cld_cifar10 sample" in capsys.readouterr().out
    experiment = convert.load_experiment("cld_cifar10")
    plan = Plan(dataclasses.replace(experiment, net=TINY))
    params, step = restore_ema(plan, epath.Path(workdir))
    assert step == 7
    chex.assert_trees_all_equal(jax.device_get(plan.model(params).net), jax.device_get(ema))
    before = sorted(path.stat().st_mtime_ns for path in workdir.rglob("*"))
    assert convert.main(command) == 2  # a run is never overwritten
    assert "holds a run already" in capsys.readouterr().err
    assert before == sorted(path.stat().st_mtime_ns for path in workdir.rglob("*"))


@pytest.mark.parametrize("full", ["gddim.checkpoint.free_bytes", "gddim.convert.command.write_config"])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, capsys, monkeypatch, full):
    def no_room(*arguments):
        if full.endswith("free_bytes"):
            return 0.0
        raise OSError("config.json: No space left on device")

    source, workdir = write(tmp_path / "state", state_of(fresh(TINY), fresh(TINY, 1))), tmp_path / "run"
    command = [str(source), str(workdir), "--experiment", "cld_cifar10", *TINY_OPTIONS]
    with monkeypatch.context() as patch:
        patch.setattr(full, no_room)
        assert convert.main(command) == 2
    assert re.fullmatch(r"error: .*(no room for a checkpoint|No space left).*\n", capsys.readouterr().err)
    assert convert.main(command) == 0


@pytest.mark.parametrize("name", [".x", "experiments..x", "."])
def test_the_name_of_no_module_is_one_line(tmp_path, capsys, name):
    assert convert.main([str(tmp_path / "state"), str(tmp_path / "run"), "--experiment", name]) == 2
    assert re.fullmatch(
        rf"error: --experiment {re.escape(name)}: .*give the name of a module.*\n", capsys.readouterr().err
    )


@pytest.mark.parametrize("step", [-1, 2**31, [0, 1], 1.5])
def test_a_step_that_is_none_is_refused(tmp_path, capsys, step):
    state = state_of(fresh(TINY), fresh(TINY)) | {"step": np.asarray(step)}
    options = ["--experiment", "cld_cifar10", *TINY_OPTIONS]
    assert convert.main([str(write(tmp_path / "state", state)), str(tmp_path / "run"), *options]) == 2
    assert "accepted is a whole number of at least 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--experiment", "nothing"], "nothing"),
        (["--experiment", "processes"], "EXPERIMENT"),
        (["--experiment", "cld_cifar10", "--net.wdth", "4"], "unknown option --net.wdth; accepted: --net.width"),
        (["--experiment", "cld_cifar10_denoiser"], "predicts"),
        (["--experiment", "cld_cifar10", *TINY_OPTIONS, "--net.dropout", "2"], "dropout"),
        (["--experiment", "vp_cifar10", *TINY_OPTIONS], "does not fit this network"),
        (["--experiment", "cld_cifar10", *TINY_OPTIONS, "--dry-run"], "--dry-run and --step are for"),
    ],
)
def test_a_wrong_command_is_one_error_and_writes_nothing(tmp_path, capsys, options, says):
    source = write(tmp_path / "state", state_of(fresh(TINY), fresh(TINY)))
    assert convert.main([str(source), str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert not (tmp_path / "run").exists()
