"""Checkpoints: every bit comes back on any mesh, or the step counts as damaged; nothing else is touched."""

import json
import logging
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from gddim import UserError
from gddim.checkpoint import Checkpointer, checksums
from gddim.parallel import MeshConfig, make_mesh, state_shardings

MESHES = [(1, 1), (1, 8), (2, 4), (4, 1)]
CONFIG = {"learning_rate": 2e-4, "name": "test", "multipliers": [1, 2]}


def mesh_of(data: int, fsdp: int):
    return make_mesh(MeshConfig(data, fsdp), jax.devices()[: data * fsdp])


def make():
    keys = jax.random.split(jax.random.key(0), 3)
    normal = jax.random.normal(keys[0], (64, 48))
    return {
        "train": {
            "step": jnp.int32(7),
            "weights": [normal, jax.random.normal(keys[1], (3, 3, 8, 16)), None],
            "half": jax.random.normal(keys[2], (32, 33)).astype(jnp.bfloat16),
            "mask": jnp.arange(24) % 3 == 0,
            "bytes": jnp.arange(40, dtype=jnp.uint8),
            "many": [jnp.full((2,), i, jnp.float32) for i in range(12)],  # more than ten, to be kept in order
        },
        "ema": {"weights": 0.5 * normal},
    }


def on(mesh):
    """The state, in its shards: the same bits on any mesh, which making it there need not give."""
    state = make()
    return jax.device_put(state, state_shardings(state, mesh))


def asked_of(state, mesh):
    """What a restore onto another mesh asks for: shapes and shardings alone."""
    shardings = state_shardings(state, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with steps 10 and 20 of one state, written by eight devices."""
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    saved = Checkpointer(folder)
    for step in (10, 20):
        saved.save(step, on(mesh_of(1, 8)), CONFIG)
    saved.close()
    return folder


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("shape", MESHES)
def test_every_bit_comes_back_on_any_mesh(written, shape):
    mesh = mesh_of(*shape)
    asked = asked_of(make(), mesh)
    state, step = Checkpointer(written).restore(asked)
    assert step == 20
    assert_same(state, make())
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, asked)


def test_one_item_can_be_read_alone(folder):
    ema = asked_of(make()["ema"], mesh_of(1, 1))
    shutil.rmtree(folder / "20" / "train")
    items, step = Checkpointer(folder).restore({"ema": ema})
    assert (list(items), step) == (["ema"], 20)
    assert_same(items["ema"], make()["ema"])


def test_the_configuration_comes_back(written):
    assert Checkpointer(written).config(20) == CONFIG
    assert Checkpointer(written).steps() == [10, 20]


def test_donated_buffers_may_change_while_they_are_written(tmp_path):
    state = on(mesh_of(1, 8))
    spoil = jax.jit(lambda s: jax.tree.map(lambda x: jnp.zeros_like(x), s), donate_argnums=0)
    saved = Checkpointer(tmp_path / "run")
    for step in range(3):
        saved.save(step, state, CONFIG)
        state = spoil(state)
        state = on(mesh_of(1, 8))
    saved.close()
    for step in range(3):
        assert_same(Checkpointer(tmp_path / "run").restore(asked_of(make(), mesh_of(1, 1)), step)[0], make())


def test_checksums_are_the_same_on_every_mesh():
    sums = {tuple(checksums(jax.tree.leaves(on(mesh_of(*shape))))) for shape in MESHES}
    assert len(sums) == 1


@given(st.integers(0, 2**32 - 1), st.integers(0, 31), st.sampled_from(["float32", "bfloat16", "uint8", "bool"]))
def test_a_checksum_sees_any_single_bit_and_any_exchange(where, bit, dtype):
    width = np.dtype("uint8" if dtype == "bool" else dtype).itemsize
    values = np.random.default_rng(where).integers(0, 2 if dtype == "bool" else 256, 60 * width, dtype=np.uint8)
    place, changed, swapped = where % len(values), values.copy(), values.copy()
    changed[place] ^= 1 if dtype == "bool" else 1 << bit % 8
    swapped[:width], swapped[-width:] = values[-width:], values[:width]

    def total(raw):
        return checksums([jnp.asarray(raw.view(dtype).reshape(12, 5))])[0]

    assert total(values) != total(changed)
    assert (total(values) == total(swapped)) == (values == swapped).all()


def test_wide_elements_count_in_full():
    with jax.enable_x64(True):
        x = jnp.arange(10, dtype=jnp.float64)
        y = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint64) ^ jnp.uint64(1 << 63), jnp.float64)
        assert checksums([x]) != checksums([y])


def damage(path: Path, how: str) -> None:
    blobs = sorted((f for f in path.rglob("*") if f.parent.name == "d"), key=lambda f: f.stat().st_size)
    match how:
        case "truncated":
            for blob in blobs:  # of one alone it might be what a later one replaced
                blob.write_bytes(blob.read_bytes()[: blob.stat().st_size // 2])
        case "lost blob":
            blobs[-1].unlink()
        case "lost item":
            shutil.rmtree(path / "train")
        case "lost manifest":
            shutil.rmtree(path / "manifest")
        case "another configuration":
            manifest = path / "manifest" / "metadata"
            manifest.write_text(manifest.read_text().replace("0.0002", "0.0003"))
        case "empty":
            shutil.rmtree(path)
            path.mkdir()


@pytest.mark.parametrize(
    "how", ["truncated", "lost blob", "lost item", "lost manifest", "another configuration", "empty"]
)
def test_a_damaged_step_falls_back_and_says_so(folder, how, caplog):
    damage(folder / "20", how)
    asked = asked_of(make(), mesh_of(2, 4))
    state, step = Checkpointer(folder).restore(asked)
    assert step == 10
    assert_same(state, make())
    assert f"{folder / '20'} is damaged" in caplog.text
    assert [record.getMessage().count("\n") for record in caplog.records] == [0]
    with pytest.raises(UserError, match="no whole checkpoint of step 20"):
        Checkpointer(folder).restore(asked, step=20)
    damage(folder / "10", how)
    with pytest.raises(UserError, match=r"no whole checkpoint .*damaged: \[10, 20\]"):
        Checkpointer(folder).restore(asked)


def flip_bytes(folder: Path, times: int, seed: int) -> dict[str, int]:
    """What became of each of `times` single bytes changed anywhere in step 20: half by size, half by file."""
    files = [f for f in sorted((folder / "20").rglob("*")) if f.is_file() and f.stat().st_size]
    sizes = [f.stat().st_size for f in files]
    rng, asked, expected = random.Random(seed), asked_of(make(), mesh_of(1, 4)), make()
    found = {"detected": 0, "harmless": 0}
    for i in range(times):
        file = rng.choices(files, sizes if i % 2 else None)[0]
        whole = file.read_bytes()
        bad = bytearray(whole)
        bad[rng.randrange(len(bad))] ^= rng.randrange(1, 256)
        file.write_bytes(bad)
        state, step = Checkpointer(folder).restore(asked)
        assert_same(state, expected)
        found["detected" if step == 10 else "harmless"] += 1
        file.write_bytes(whole)
    return found


def test_no_flipped_byte_passes(folder, caplog):
    caplog.set_level(logging.CRITICAL)
    found = flip_bytes(folder, 100, seed=1)
    assert found["detected"] > 20


@pytest.mark.slow
def test_none_of_2000_flipped_bytes_passes(folder, caplog):
    caplog.set_level(logging.CRITICAL)
    assert flip_bytes(folder, 2000, seed=2)["detected"] > 400


def test_training_on_after_a_fall_back_replaces_what_was_damaged(folder, caplog):
    damage(folder / "20", "truncated")
    saved = Checkpointer(folder)
    state, step = saved.restore(asked_of(make(), mesh_of(1, 1)))
    assert step == 10
    saved.save(15, state, CONFIG)
    saved.wait()
    assert saved.steps() == [10, 15, 20]  # perhaps 20 was only unreadable for a moment: it ages like any other
    saved.save(20, state, CONFIG)
    saved.close()
    assert_same(Checkpointer(folder).restore(asked_of(make(), mesh_of(1, 1)), step=20)[0], make())


def test_a_damaged_step_does_not_crowd_out_a_whole_one(folder):
    damage(folder / "20", "truncated")
    saved = Checkpointer(folder, keep_last=1)
    state, step = saved.restore(asked_of(make(), mesh_of(1, 1)))
    assert step == 10
    for step in (12, 15, 20):  # by then the damaged one is crowded out itself
        saved.save(step, state, CONFIG)
    saved.close()
    assert Checkpointer(folder).restore(asked_of(make(), mesh_of(1, 1)))[1] == 20


def test_a_step_is_never_overwritten(folder):
    saved = Checkpointer(folder)
    saved.save(20, on(mesh_of(2, 4)), CONFIG)  # the same state once more, from another mesh
    with pytest.raises(UserError, match="different step 20"):
        saved.save(20, jax.tree.map(jnp.zeros_like, make()), CONFIG)
    saved.close()
    assert_same(Checkpointer(folder).restore(asked_of(make(), mesh_of(1, 1)))[0], make())


@pytest.mark.parametrize("there", ["notes.txt", "results/a.png"])
def test_a_folder_that_holds_something_else_is_refused(tmp_path, there):
    file = tmp_path / there
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(UserError, match=r"notes|results"):
        Checkpointer(tmp_path)
    with pytest.raises(UserError, match="a file"):
        Checkpointer(file)
    assert file.read_text() == "mine"


def test_nothing_is_written_before_the_first_save(tmp_path):
    saved = Checkpointer(tmp_path / "run")
    with pytest.raises(UserError, match="no whole checkpoint"):
        saved.restore({"ema": jnp.zeros(3)})
    saved.close()
    assert not (tmp_path / "run").exists()


def test_a_half_written_step_is_passed_over_and_cleared_away(folder):
    shutil.copytree(folder / "20", folder / "30.orbax-checkpoint-tmp")
    (folder / "30.orbax-checkpoint-tmp" / "manifest" / "metadata").unlink()
    saved = Checkpointer(folder)
    assert saved.restore(asked_of(make(), mesh_of(1, 1)))[1] == 20
    saved.save(30, make(), CONFIG)
    saved.close()
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20", "30"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: {**s, "ema": {"weights": s["ema"]["weights"].astype(jnp.bfloat16)}}, "ema.*float(32|64).*bfloat16"),
        (lambda s: {**s, "ema": {"weights": s["ema"]["weights"][:32]}}, r"\[64, 48\].*\[32, 48\]"),
        (lambda s: {**s, "ema": {**s["ema"], "bias": jnp.zeros(3)}}, "bias.*nowhere"),
        (lambda s: {**s, "ema": {}}, "wanted nowhere"),
        (lambda s: {**s, "average": s["ema"]}, "average.*saved nowhere"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(written, change, says):
    with pytest.raises(UserError, match=says):
        Checkpointer(written).restore(change(make()))


@pytest.mark.parametrize("leaf", [np.zeros(3), 1.0, "text", jnp.zeros((0, 3)), len])
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, leaf):
    saved = Checkpointer(tmp_path / "run")
    with pytest.raises(TypeError, match="ema: weights"):
        saved.save(1, {"ema": {"weights": leaf}}, {})
    saved.close()
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    saved = Checkpointer(tmp_path)
    saved.save(1, {"ema": jnp.arange(100)}, {})
    saved.wait()
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 399))
        with pytest.raises(OSError, match=r"no room for a checkpoint of 0\.0 MiB .*those that are whole remain"):
            saved.save(2, {"ema": jnp.arange(100)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    saved.save(2, {"ema": jnp.arange(100)}, {})
    saved.close()
    assert saved.steps() == [1, 2]


def test_relative_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = Checkpointer("run")
    saved.save(1, {"ema": jnp.arange(3)}, {})
    saved.close()
    assert json.loads((tmp_path / "run" / "1" / "manifest" / "metadata").read_text())["items"]["ema"]


def test_a_url_stays_one(monkeypatch):
    monkeypatch.setattr(type(epath.Path("gs://bucket")), "exists", lambda self: False)
    assert str(Checkpointer("gs://bucket/run/checkpoints").directory) == "gs://bucket/run/checkpoints"
