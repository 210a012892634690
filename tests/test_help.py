"""What a command line shows of itself: help by verb, completion in a shell, the list of experiments."""

import re
import shutil
import subprocess
import sys
from typing import get_args

import pytest
from command_line import options_told, status_of

import experiments.__main__
from experiments import blur_cifar10, cld_digits
from gddim.experiment.command import Verb
from gddim.experiment.shown import NEEDED


def told(capsys, experiment, *words):
    assert status_of(experiment, *words, "--help") == 0
    said = capsys.readouterr().out
    return said, options_told(said)


@pytest.mark.parametrize("module", [cld_digits, blur_cifar10], ids=lambda m: m.EXPERIMENT.name)
def test_a_verbs_help_is_what_it_needs_of_all_that_there_is(module, capsys):
    said, everything = told(capsys, module.EXPERIMENT)
    assert ">>>" not in said
    assert "Raises" not in said
    groups = {}
    for verb in NEEDED:
        said, options = told(capsys, module.EXPERIMENT, verb)
        assert options < everything
        assert f"(default: {verb})" in re.sub(r"[\s│]+", " ", said)
        groups[verb] = {option.split(".")[0] for option in options if "." in option}
    assert {"--train", "--net", "--model"} <= groups["train"]
    assert "--eval" not in groups["train"]
    assert not {"--train", "--net", "--model", "--sde"} & (groups["sample"] | groups["evaluate"])
    assert groups["evaluate"] - groups["sample"] == {"--eval"}
    assert set(NEEDED) == set(get_args(Verb)) - {"run"}


def completed(script, *words):
    line = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _complete_module x '{words[-1]}' '{words[-2]}'"
    command = f"{script}\n{ask}\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash is here")
def test_bash_completes_verbs_options_and_words(capsys, monkeypatch):
    scripts = ""
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as of a file
    for name in ("cld_digits", "blur_cifar10"):
        monkeypatch.setattr(sys, "argv", [f"experiments/{name}.py"])
        assert status_of(sys.modules[f"experiments.{name}"].EXPERIMENT, "--completion") == 0
        scripts += capsys.readouterr().out
    start = ["python", "experiments/cld_digits.py"]
    assert completed(scripts, *start, "sam") == ["sample"]
    assert completed(scripts, *start, "sample", "--sampling.n") == ["--sampling.nfe"]
    assert completed(scripts, *start, "--net.dtype", "b") == ["bfloat16"]
    assert completed(scripts, *start, "--workdir", "s") == []  # left to bash, which knows the files
    assert completed(scripts, *start, "--dry-run", "sam") == ["sample"]
    assert completed(scripts, "python", "-m", "pytest", "sam") == []
    assert "--sde.m-inv" in completed(scripts, *start, "--sde")
    assert "--sde.m-inv" not in completed(scripts, "python", "experiments/blur_cifar10.py", "--sde")


def test_every_experiment_is_listed_with_a_line(capsys):
    experiments.__main__.main()
    lines = dict(re.findall(r"^python -m experiments\.(\w+) +(\S.+)$", capsys.readouterr().out, flags=re.MULTILINE))
    assert {"cld_digits", "cifar10", "points_vp", "solvers", "benchmark"} <= set(lines)
    assert "processes" not in lines
    assert "__main__" not in lines
    assert lines["cld_digits"].startswith("The main job")
