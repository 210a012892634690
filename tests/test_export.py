"""A network in a file: what comes out is what went in, by this package or by the format's own reader alone."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from command_line import status_of
from etils import epath
from PIL import Image
from runs import COLOUR, LabelledColours, make_run
from test_report import cifar_row

import gddim
from experiments.cifar10_tiny import EXPERIMENT
from gddim import compact, export, generate, weights
from gddim.checkpoint import by_path
from gddim.data import ImageFolder, to_uint8
from gddim.errors import harmless, place
from gddim.evaluation.figures import KEY
from gddim.evaluation.sweep import RESULTS
from gddim.experiment.checkpoints import checkpoint_digest
from gddim.experiment.outputs import write_figure
from gddim.experiment.pictures import gallery
from gddim.experiment.trained import find
from gddim.experiment.workdir import describe, reserved
from gddim.export.card import card, results
from gddim.export.model import exported, shareable
from gddim.nn import DiTConfig

PAGE = Path(__file__).parents[1] / "experiments" / "weights" / "README.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = make_run(tmp_path_factory.mktemp("run") / "w")
    picture = gallery(np.zeros((4, 8, 8, 3), np.uint8))
    write_figure(epath.Path(workdir) / "samples", picture, {"step": 2})
    return workdir


@pytest.fixture(scope="module")
def files(run, tmp_path_factory) -> Path:
    """a.safetensors in float32, b.safetensors in bfloat16, and a hub's folder of the latter."""
    out = tmp_path_factory.mktemp("out")
    assert (
        export.main([str(run), str(out / "a.safetensors"), "--licence=apache-2.0", "--note=Trained on nothing."]) == 0
    )
    hub = ["--dtype=bfloat16", f"--hub-layout={out / 'hub'}"]
    assert export.main([str(out / "a.safetensors"), str(out / "b.safetensors"), *hub]) == 0
    return out


def test_a_file_draws_what_the_run_draws_bit_for_bit(run, files):
    key = jax.random.key(1)
    wanted, found = (gddim.load(each).sample(4, key=key) for each in (run, files / "a.safetensors"))
    np.testing.assert_array_equal(found, wanted)
    assert float(jnp.std(wanted)) > 0.1


@pytest.mark.parametrize("name", ["b.safetensors", "hub"])
def test_bfloat16_is_within_its_rounding(run, files, name):
    model, coarse = gddim.load(run), gddim.load(files / name)
    for x, y in zip(jax.tree.leaves(coarse), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(x, y.astype(jnp.bfloat16).astype(jnp.float32))
    x, y = (each.denoiser(jnp.ones((8, 8, 3)), 0.5) for each in (coarse, model))
    assert 0 < float(jnp.abs(x - y).max()) < 0.02 * float(jnp.abs(y).max())


def test_the_formats_own_reader_reads_it(run, files):
    model = gddim.load(run)
    with safetensors.safe_open(files / "a.safetensors", framework="np") as file:
        told, found = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    wanted = by_path(model.model)
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name])
    about, config = json.loads(told["about"]), json.loads(told["config"])
    assert (about["step"], about["images"], about["weights"], about["dtype"]) == (2, 16, "ema", "float32")
    assert about["versions"]["gddim"] == gddim.__version__
    assert told["licence"] == "apache-2.0"
    assert config["records"]["shape"] == [8, 8, 3]
    assert len(told["sha256"]) == 64


def test_the_page_names_every_array(files):
    """Names in code spans, `N` for a number and `*` for the rest."""
    named = re.findall(r"`(net\.[\w.*]+)`", PAGE.read_text())
    patterns = [re.escape(name).replace("N", r"\d+").replace(r"\*", ".+") for name in named]
    net = dataclasses.replace(COLOUR.net, attention=(8,), progressive_input="residual")
    fourier = dataclasses.replace(net, embedding="fourier")
    for config in (net, fourier, DiTConfig(width=16, depth=2, heads=2), gddim.MLPConfig(8, 2)):
        shape = (2,) if isinstance(config, gddim.MLPConfig) else (8, 8, 3)
        made = by_path({"net": config.build(shape, shape[-1], jax.random.key(0))})
        assert not [name for name in made if not any(re.fullmatch(pattern, name) for pattern in patterns)]


def test_the_page_beside_it_tells_of_it(files):
    page = (files / "a.md").read_text()
    for words in (
        "# colour",
        "Trained on nothing.",
        "![Samples](a.png)",
        "| licence | apache-2.0 |",
        "of 8: 16 images",
    ):
        assert words in page
    assert (files / "a.png").exists()
    hub = (files / "hub" / "README.md").read_text()
    assert hub.startswith("---\nlicense: apache-2.0\nlibrary_name: gddim\n")
    assert {path.name for path in (files / "hub").iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_a_file_says_nothing_of_the_machine(tmp_path, files):
    run = dataclasses.replace(COLOUR, data=ImageFolder("/home/me/photos", 8))
    config = json.loads(json.dumps(describe(run)))
    config["train"]["init"] = "/home/me/run"
    assert "/home" not in json.dumps(shareable(config))


def test_damage_is_noticed(files, tmp_path):
    content, path = (files / "a.safetensors").read_bytes(), tmp_path / "x.safetensors"
    rng = np.random.default_rng(0)
    for position in [*rng.integers(0, len(content), 30), 3, len(content) - 1]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(flipped))
        with pytest.raises(gddim.UserError, match=r"x\.safetensors is (damaged|no file of)"):
            weights.read(place(str(path)))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(gddim.UserError, match="is no file of"):
        gddim.load(path)


REFUSED = {
    "RUN": "give FILE.safetensors, --hub-layout DIR or --stablehlo FILE",
    "RUN x.bin": "must end with .safetensors",
    "RUN FILES/a.safetensors": "a.safetensors is there already",
    "RUN new.safetensors --hub-layout FILES": "is there already, and is not overwritten",
    "RUN new.safetensors --stablehlo FILES/a.md": "a.md is there already",
    "RUN new.safetensors --weights=best": "accepted are ema, raw and a length",
    "RUN new.safetensors --weights=0.5": r"weights 0.5: a length σ_rel must lie in (0, 0.289]",
    "RUN new.safetensors --step=9": "no whole checkpoint of step 9",
    "FILES/a.safetensors new.safetensors --step=2": "holds one set of parameters",
    "nowhere new.safetensors": "nowhere holds no run",
    "RUN new.safetensors --nfe=3": "--nfe is of --stablehlo",
    "RUN --stablehlo new --process=blurred": "unknown process 'blurred'",
    "RUN --stablehlo new --sampler=heun --nfe=1": "makes at least",
    "RUN --state": "--state is written to a folder of its own",
    "RUN new --state --step=9": "no whole checkpoint of step 9",
    "RUN new --state --weights=raw": "--weights is of FILE.safetensors, --hub-layout and --stablehlo",
    "RUN new --state --licence=mit": "--licence is of FILE.safetensors and --hub-layout",
    "RUN new --state --sampler=heun": "--sampler is of --stablehlo",
    "RUN new.safetensors --moments=both": "--moments is of --state",
    "RUN new.safetensors --room=3": "--room is of --state",
    "RUN --stablehlo new --dtype=bfloat16": "--dtype is of FILE.safetensors and --hub-layout",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_exported_is_one_line_and_nothing_is_written(words, run, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert export.main(words.replace("RUN", str(run)).replace("FILES", str(files)).split()) == 2
    said = capsys.readouterr().err
    assert REFUSED[words] in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_state_is_of_the_step_that_is_asked_for_or_the_newest_whole_one(run, tmp_path, caplog):
    assert export.main([str(run), str(tmp_path / "1"), "--state", "--step=1"]) == 0
    assert compact.peek(epath.Path(tmp_path / "1"))[0] == 1
    shutil.copytree(run, tmp_path / "w")
    manifest = tmp_path / "w" / "checkpoints" / "2" / "manifest" / "metadata"
    manifest.write_text(manifest.read_text()[:-9])
    assert export.main([str(tmp_path / "w"), str(tmp_path / "left"), "--state"]) == 0
    assert "2 is damaged" in caplog.text
    first, left = (compact.read(epath.Path(tmp_path / name)) for name in ("1", "left"))
    assert left.step == 1
    np.testing.assert_array_equal(left.vectors["model"], first.vectors["model"])


def test_a_file_names_the_digest_of_what_it_holds_and_rows_and_tables_of_it_go_with_it(run, files, tmp_path):
    """Which is what the verbs call the network when they read the file, and `gddim.load` when a table is of it."""
    of = {name: find(epath.Path(files / name)) for name in ("a.safetensors", "b.safetensors", "hub")}
    whole, rounded = (checkpoint_digest(of[name].params) for name in ("a.safetensors", "b.safetensors"))
    assert whole != rounded
    assert of["a.safetensors"].about["checkpoint"] == find(epath.Path(run)).about["checkpoint"] == whole
    for name in ("b.safetensors", "hub"):
        assert (of[name].about["checkpoint"], of[name].about["rounded_from"]) == (rounded, whole)
    again = exported(of["b.safetensors"], "float32", "")
    assert (again.about["checkpoint"], again.about["rounded_from"]) == (rounded, whole)
    page = card(again, "again.safetensors", None)
    assert 'process="cld"' in page
    assert "process" not in card(again, "again.safetensors", None, own=True).partition("## Facts")[0]  # by frequency
    assert "gddim.generate again.safetensors" in page
    points = again._replace(config=again.config | {"records": again.config["records"] | {"shape": [2]}})
    assert "gddim.generate" not in card(points, "again.safetensors", None), "which makes pictures"
    other = exported(of["a.safetensors"], "float32", "mit")
    assert (other.licence, other.about.get("licence")) == ("mit", None)
    assert f"| digest of the parameters | {rounded} |\n| rounded from those of | {whole} |" in page
    table = cifar_row("gddim:3", 10, 7.25)
    rows = [table | {"provenance": table["provenance"] | {"checkpoint": each}} for each in (whole, rounded, "another")]
    (tmp_path / RESULTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = results(epath.Path(tmp_path), again)
    assert [each for each in (whole, rounded, "another") if f"checkpoint {each}" in told] == [whole, rounded]


def test_the_file_that_travels_with_the_repository_names_its_digest():
    found = find(epath.Path(str(EXPERIMENT.weights)))
    assert checkpoint_digest(found.params) == found.about["checkpoint"]
    row = json.loads((PAGE.parents[1] / "results" / "cifar10.jsonl").read_text().splitlines()[0])
    assert row["provenance"]["checkpoint"] == found.about["checkpoint"]
    assert (
        f"| digest of the parameters | {found.about['checkpoint']} |" in (PAGE.parent / "cifar10_tiny.md").read_text()
    )


ALONE = """
import sys
sys.modules |= {"gddim": None, "equinox": None}  # not to be imported
import jax.export
import numpy as np
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
for seeds in ([5, 6, 7], [6]):
    np.save(f"{len(seeds)}.npy", program.call(np.array(seeds, np.uint32)))
assert program.platforms == ("cpu", "cuda", "tpu")
"""


def test_a_sampler_is_a_program_without_this_package(files, tmp_path):
    path = tmp_path / "program"
    file = str(files / "a.safetensors")
    assert export.main([file, "--stablehlo", str(path), "--process=cld", "--sampler=gddim:2:data", "--nfe=3"]) == 0
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(path)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    three, one = (np.load(tmp_path / f"{n}.npy") for n in (3, 1))
    np.testing.assert_allclose(one[0], three[1], atol=1e-4)
    how = {"process": "cld", "sampler": "gddim:2:data", "nfe": 3}
    np.testing.assert_allclose(three, gddim.load(file).sample_seeds(jnp.asarray([5, 6, 7]), **how), atol=1e-4)


def test_a_seed_makes_one_picture_whatever_other_seeds_there_are(files, tmp_path, capsys):
    words = [str(files / "a.safetensors"), "--process=cld", "--nfe=3", "--batch=8"]
    assert generate.main([*words, str(tmp_path / "many"), "--seeds=0-8,11"]) == 0
    assert generate.main([*words, str(tmp_path / "one"), "--seeds=11"]) == 0
    names = {path.name for path in (tmp_path / "many").iterdir()}
    assert names == {"grid.png", "000011.png", *(f"{i:06d}.png" for i in range(9))}
    assert (tmp_path / "one" / "000011.png").read_bytes() == (tmp_path / "many" / "000011.png").read_bytes()
    assert (tmp_path / "many" / "000000.png").read_bytes() != (tmp_path / "many" / "000011.png").read_bytes()
    with Image.open(tmp_path / "one" / "000011.png") as image:
        assert (image.mode, image.size) == ("RGB", (8, 8))
        told = json.loads(image.info[KEY])
    assert (told["seed"], told["process"], told["nfe"], told["step"]) == (11, "cld", 3, 2)
    first = gddim.load(files / "a.safetensors").sample(1, process="cld", nfe=3, key=jax.random.key(11))[0]
    with Image.open(tmp_path / "one" / "000011.png") as image:
        assert np.abs(np.asarray(image).astype(int) - np.asarray(to_uint8(first)).astype(int)).max() <= 1


def test_seeds_are_of_the_classes_that_are_asked_for(tmp_path):
    workdir = make_run(tmp_path / "w", dataclasses.replace(COLOUR, data=LabelledColours(5)))

    def drawn(*words):
        assert generate.main([str(workdir), *words, "--seeds=0-2", "--nfe=2", "--batch=8"]) == 0
        return [Image.open(tmp_path / "out" / words[-1] / f"{seed:06d}.png") for seed in range(3)]

    out = lambda name: str(tmp_path / "out" / name)
    some, none = drawn("--classes", "3", "-1", out("some")), drawn(out("all"))
    assert [json.loads(image.info[KEY])["class"] for image in some] == [3, -1, 3]
    assert [json.loads(image.info[KEY])["class"] for image in none] == [0, 1, 2]
    wanted = to_uint8(gddim.load(workdir).sample(1, classes=3, nfe=2, key=jax.random.key(2)))[0]
    assert np.abs(np.asarray(some[2]).astype(int) - np.asarray(wanted).astype(int)).max() <= 1
    assert np.any(np.asarray(some[2]) != np.asarray(none[2]))


NOT_DRAWN = {
    "FILES/b.safetensors FILES/hub": "is there already",
    "FILES/b.safetensors new --seeds=3-1": "--seeds 3-1: a range rises",
    "FILES/b.safetensors new --seeds=a": "--seeds a: accepted are numbers and ranges",
    "FILES/b.safetensors new --seeds=-1": "--seeds -1: a range rises, within 0",
    "FILES/b.safetensors --classes 1 3 new": "this run knows no classes",
    "FILES/b.safetensors new --batch=0": "--batch must be at least 1",
    "FILES/b.safetensors new --nfe=0": "nfe must be at least 1",
    "FILES/b.safetensors new --sampler=ddim": "unknown sampler 'ddim'",
    "FILES/a.md new": "is no file of python -m gddim.export",
}


@pytest.mark.parametrize("words", NOT_DRAWN)
def test_what_cannot_be_drawn_is_one_line_and_nothing_is_written(words, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert generate.main(words.replace("FILES", str(files)).split()) == 2
    said = capsys.readouterr().err
    assert NOT_DRAWN[words] in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_of_shipped_weights_alone_is_held_as_it_is_and_names_them(tmp_path):
    run = epath.Path(make_run(tmp_path / "w", steps=(), weights="a.safetensors"))
    with (
        reserved(run, training=False),
        pytest.raises(gddim.UserError, match="in use by another command that samples"),
        reserved(run, training=False),
    ):
        pass
    with reserved(run), reserved(run, training=False):
        made = [path.name for path in run.iterdir() if not harmless(path.name)]
        assert made == ["config.json"], "nothing of a run is made but what holds it"
    with pytest.raises(gddim.UserError, match=r"train it first, or give a\.safetensors, its weights without one"):
        gddim.load(run)


def test_shipped_weights_are_used_where_there_is_no_trained_run(files, tmp_path, capsys):
    shipped = dataclasses.replace(COLOUR, weights=str(files / "a.safetensors"))
    workdir = tmp_path / "w"
    assert status_of(shipped, "sample", f"--workdir={workdir}") == 0
    said = capsys.readouterr()
    assert f"--workdir {workdir} holds no checkpoint: {files / 'a.safetensors'} is used\n" in said.err
    assert "8 samples of step 2 by gddim:3:free:data:data_std=0.87@tuned: NFE 4" in said.out
    assert (workdir / "samples.png").exists()
    assert not (workdir / "checkpoints").exists()
    with pytest.raises(gddim.UserError, match=rf"train it first, or give {files / 'a.safetensors'}, its weights"):
        gddim.load(workdir)
    assert status_of(shipped, "sample", f"--workdir={workdir}", "--step=2") == 2
    assert "--step 2: " in capsys.readouterr().err
    assert status_of(shipped, "sample", f"--workdir={workdir}", "--net.width=8") == 2
    assert "net.width: the run has 4, this command 8" in capsys.readouterr().err
    missing = dataclasses.replace(COLOUR, weights=str(files / "c.safetensors"))
    assert status_of(missing, "sample", f"--workdir={tmp_path / 'new'}") == 2
    assert "holds no run: train it first" in capsys.readouterr().err
    assert status_of(shipped, "train", f"--workdir={workdir}", "--train.steps=1") == 0, (
        "the folder is still free for a run"
    )
    assert status_of(shipped, "sample", f"--workdir={workdir}") == 0
    assert "samples of step 1 by" in capsys.readouterr().out
