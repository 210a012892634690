"""The README runs as it stands: its Python, and its commands on small things in the places of the words in capitals."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from gddim.data import CIFAR10
from gddim.experiment.cli import main, parse
from gddim.samplers.words import parse_sampler, sampler_name

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LINES = re.findall(r"^    (.*(?:\\\n.*)*)", README, re.MULTILINE)
COMMANDS = {command for line in LINES for command in re.findall(r"python -m (?:experiments|gddim)\.\w[^#]*", line)}


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_of_the_readme(block, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    names = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    if "images" in names:
        side = 32 if "experiments/weights" in block else 8
        assert names["images"].shape == (4, side, side, 3)


@pytest.mark.parametrize("command", sorted(c for c in COMMANDS if "-m experiments" in c))
def test_options_of_the_experiments_in_the_readme(command):
    """They are accepted; what they do is tested on small experiments in test_cli and test_verbs."""
    module, *argv = shlex.split(command.replace("\\\n", ""))[2:]
    command = parse(importlib.import_module(module).EXPERIMENT, argv)
    assert command.dry_run == ("--dry-run" in argv)


@pytest.fixture
def things(tmp_path) -> dict[str, str]:
    """What the words in capitals stand for."""
    rng = np.random.default_rng(0)
    for folder, size in (("PHOTOS", 40), ("SAMPLES", 6), ("DATA", 6)):
        (tmp_path / folder).mkdir()
        for i in range(5):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(tmp_path / folder / f"{i}.png")
    return {name: str(tmp_path / name) for name in ("PHOTOS", "SAMPLES", "DATA", "SHARDS", "TABLE", "runs")}


@pytest.mark.parametrize("module", ["gddim.data", "gddim.evaluation"])
def test_commands_of_the_readme(module, things, monkeypatch, capsys):
    found = sorted(command for command in COMMANDS if f"-m {module} " in command)
    assert found
    for command in found:
        words = shlex.split(re.sub("|".join(things), lambda name: things[name.group()], command))[3:]
        for word in words:
            if word.endswith("results.jsonl"):
                Path(word).parent.mkdir(parents=True)
                Path(word).write_text(
                    (Path(__file__).parents[1] / "experiments/results/cld_digits/results.jsonl").read_text()
                )
        pixels = ["--features", "pixels"] if words[0] == "fid" else []  # without the weights of Inception
        monkeypatch.setattr(sys, "argv", [module, *words, *pixels])
        assert not importlib.import_module(f"{module}.__main__").main()
        assert capsys.readouterr().out


NET = ["--net.width=8", "--net.blocks=2", "--net.multipliers", "1", "1"]
TINY = {
    "train": [*NET, "--train.steps=2", "--train.batch=8", "--train.save-every=1"],
    "sample": [*NET, "--sampling.samples=8", "--sampling.batch=8"],
    "evaluate": [*NET, "--eval.samples=8", "--eval.batch=8", "--eval.reference=reference.npz"],
}


@pytest.mark.slow  # compiles as much as a run does
def test_a_run_of_the_readme_from_training_to_its_table(gddim_data, tmp_path, monkeypatch, capsys):
    """Its commands for `cld_cifar10` one after another, on the real data: with a network of a toy's size, few samples and
    their own reference.
    """
    monkeypatch.setenv("GDDIM_DATA", str(gddim_data))
    monkeypatch.chdir(tmp_path)
    few = CIFAR10(str(gddim_data)).test()[np.arange(64)]
    np.savez("few.npz", few)
    evaluation = importlib.import_module("gddim.evaluation.__main__")
    monkeypatch.setattr(sys, "argv", ["gddim.evaluation", "stats", "few.npz", "reference.npz"])
    evaluation.main()
    found = [
        c for c in re.findall(r"^    python -m (\w.*)", README, re.MULTILINE) if "runs/cld " in c or "runs/cld/" in c
    ]
    verbs = []
    for line in found:
        module, *words = shlex.split(line.replace("DATA", str(gddim_data)))
        if module in ("gddim.export", "gddim.generate"):
            continue  # test_export runs them
        if module == "gddim.evaluation":
            monkeypatch.setattr(sys, "argv", [module, *words])
            evaluation.main()
            continue
        words = ["train"] * words[0].startswith("--") + words  # of "run", whose other parts follow
        with pytest.raises(SystemExit) as ended, jax.numpy_dtype_promotion("standard"):  # JAX's attention needs it
            main(importlib.import_module(module).EXPERIMENT, [*words, *TINY[words[0]]])
        assert ended.value.code == 0, capsys.readouterr().err
        verbs.append(words[0])
    assert verbs == ["train", "sample", "evaluate"]
    assert "FID of only 8 samples" in Path("TABLE.md").read_text()
    with np.load("runs/cld/samples.npz", allow_pickle=False) as file:
        assert file["samples"].shape == (8, 32, 32, 3)


def test_the_table_of_the_readme_is_that_of_the_results():
    results = Path(__file__).parents[1] / "experiments/results/cld_digits/results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    cell = lambda row: tuple(row["cell"].get(key) for key in ("process", "sampler", "nfe"))
    found = {cell(row): row["metrics"]["frechet"] for row in rows if "cell" in row}
    names = {
        "Euler on the probability flow": ("cld", "em"),
        "multistep in L, order 2": ("cld", "cholesky:2"),
        "gDDIM in R, order 3": ("cld", "gddim:3"),
        "gDDIM in R, order 3, on the predicted data": ("cld", "gddim:3:data"),
        "the same network and sampler through VP": ("vp", "gddim:3:data"),
    }
    for name, row in names.items():
        (line,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", README, re.MULTILINE)
        told = [float(cell.strip(" *")) for cell in line.split("|")]
        np.testing.assert_allclose(told, [found[*row, nfe] for nfe in (6, 10, 20, 50)], rtol=6e-3)


def test_the_table_of_our_own_network_is_that_of_the_results():
    results = Path(__file__).parents[1] / "experiments/results/cifar10.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    found = {
        tuple(row["cell"][key] for key in ("sampler", "process", "nfe")): row["metrics"]["frechet"] for row in rows
    }
    columns = [(process, nfe) for process in ("vp", "cld") for nfe in (5, 10, 20)]
    (table,) = re.findall(r"^\| `cifar10_tiny` \|.*\n\| ---.*\n((?:\|.*\n)+)", README, re.MULTILINE)
    for line in table.splitlines():
        word, *told = (cell.strip(" `") for cell in line.strip("|").split("|"))
        scaled = sampler_name(parse_sampler(word).for_data((32, 32, 3)))
        for column, value in zip(columns, told, strict=True):
            assert value == "–" or float(value) == pytest.approx(found[scaled, *column], abs=0.051), (word, column)


@pytest.mark.slow
def test_the_self_test_of_the_readme():
    from gddim.check import main

    (command,) = (command for command in COMMANDS if "-m gddim.check" in command)
    assert main(shlex.split(command)[3:]) == 0
