"""What is needed for what: the package alone for processes, samplers, networks and files; one line names the extra else."""

import json
import re
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import jax
import numpy as np
import pytest
from packaging.requirements import Requirement
from runs import make_run

import gddim
from gddim import export

ROOT = Path(__file__).resolve().parents[1]
CORE = ("jax", "equinox", "jaxtyping", "numpy", "etils[epath]")


def needed(*lines: str) -> set[str]:
    """The distributions that these requirements bring."""
    found: set[tuple[str, str]] = set()
    left = [(Requirement(line).name, extra) for line in lines for extra in (*Requirement(line).extras, "")]
    while left:
        name, extra = each = left.pop()
        if each not in found:
            found.add(each)
            for one in map(Requirement, distribution(name).requires or ()):
                if one.marker is None or one.marker.evaluate({"extra": extra}):
                    left += [(one.name, inner) for inner in (*one.extras, "")]
    return {normal(name) for name, _ in found}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_package_alone_requires_five():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(Requirement(line).name for line in project["dependencies"]) == sorted(
        line.split("[")[0] for line in CORE
    )


# Whatever is not of the five is absent, as far as an import can tell.
BLOCKED = """
import json, sys, importlib.metadata
absent, version = json.loads(sys.argv.pop(1)), importlib.metadata.version
sys.modules |= dict.fromkeys(absent)
importlib.metadata.version = lambda name: version("of nothing" if name in absent else name)
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Run a program, in a folder of its own, where the five alone are installed."""
    kept, folder = needed(*CORE) | {"gddim"}, tmp_path_factory.mktemp("alone")
    absent = [top for top, owners in packages_distributions().items() if not kept & set(map(normal, owners))]
    assert {"optax", "tyro", "orbax", "grain", "PIL", "tqdm", "safetensors", "matplotlib", "diffrax"} <= set(absent)

    def call(program: str, *argv: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", BLOCKED + program, json.dumps(absent), *argv]
        return subprocess.run(words, capture_output=True, text=True, cwd=folder)

    return call


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the words in capitals stand for: a run, and a file of it."""
    folder = tmp_path_factory.mktemp("files")
    run, file = make_run(folder / "run"), folder / "a.safetensors"
    assert export.main([str(run), str(file)]) == 0
    return {"RUN": str(run), "FILE": str(file)}


def test_every_module_is_imported_with_the_five_alone(alone):
    done = alone(
        "import importlib, pkgutil, gddim, gddim.nn\n"
        "for module in pkgutil.walk_packages(gddim.__path__, 'gddim.'):\n"
        "    module.name.endswith('__main__') or importlib.import_module(module.name)\n"
        "import experiments.cld_cifar10, experiments.processes\n"
    )
    assert not done.stdout + done.stderr


def test_a_point_is_sampled_in_one_step_with_the_five_alone(alone):
    """Of data that are one point, ε is `R⁻¹(u − ψx₀)`, and one step is exact but for the noise of the end."""
    done = alone(
        "import gddim, jax, jax.numpy as jnp\n"
        "sde, x0 = gddim.CLD(), jnp.linspace(-1, 1, 12).reshape(2, 2, 3)\n"
        "def eps(u, t):\n"
        "    u = u - sde.transition(t, 0.0) @ sde.lift(x0)\n"
        "    return jnp.linalg.solve(sde.noise_factor(t), u)\n"
        "u = sde.sample_prior(jax.random.key(0), (2, 2, 2, 3))\n"
        "end = gddim.sample(gddim.GDDIM(1), sde, eps, u, gddim.power_grid(1.0, 1e-3, 1))\n"
        "print(float(jnp.abs(sde.project(end) - x0).max()))\n"
    )
    assert float(done.stdout) < 0.03, done.stderr


@pytest.mark.slow
def test_a_file_is_loaded_sampled_and_written_again_with_the_five_alone(alone, files, tmp_path):
    done = alone(
        "import gddim, numpy as np\n"
        "images = gddim.load(sys.argv[1]).sample(2, process='cld', nfe=3)\n"
        "np.save(sys.argv[2], images)\n"
        "from gddim import export\n"
        "sys.exit(export.main([sys.argv[1], 'again.safetensors', '--dtype=bfloat16']))\n",
        files["FILE"],
        str(tmp_path / "x.npy"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = gddim.load(files["FILE"]).sample(2, process="cld", nfe=3)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), found, atol=1e-4)


LACKING = {
    "gddim.sample(gddim.RK45(), gddim.VP(), lambda u, t: u, np.ones((2, 2, 1, 3)), np.array([1, 1e-3]))": "eval",
    "gddim.load('gs://bucket/run')": "gcs",
    "gddim.load('s3://bucket/run')": "s3",
    "gddim.convert.read_state('gs://bucket/state')": "gcs",
    "next(gddim.data.batches(np.ones((4, 2)), 2, seed=0))": "train",
    "gddim.data.Digits().train()": "train",
    "gddim.train.adam()": "train",
    "gddim.evaluation.figures.new_figure(1, 1, (1, 1))": "eval",
}


def test_what_is_missing_is_one_error_that_names_the_extra(alone):
    done = alone(
        "import gddim, gddim.convert, gddim.data, gddim.evaluation.figures, gddim.train, numpy as np\n"
        f"for each in {list(LACKING)!r}:\n"
        "    try:\n"
        "        eval(each)\n"
        "    except gddim.UserError as error:\n"
        "        print(error)\n"
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(LACKING), done.stderr
    for line, (each, name) in zip(lines, LACKING.items(), strict=True):
        assert f"pip install 'gddim[{name}]'" in line, each


COMMANDS = {
    "experiments.points --workdir NEW": "train",
    "experiments.cld_cifar10 --help": "train",
    "gddim.export RUN NEW.safetensors": "train",
    "gddim.export FILE --stablehlo NEW": "eval",
    "gddim.convert FILE NEW --experiment cld_cifar10": "train",
    "gddim.generate FILE NEW": "eval",
    "gddim.generate RUN NEW": "eval",
    "gddim.evaluation fid NEW NEW": "eval",
    "gddim.data std digits": "train",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_line_ends_in_one_line_that_names_the_extra(alone, files, command):
    module, *words = command.split()
    program = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    done = alone(program, *(files.get(word, word) for word in words))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"pip install 'gddim[{COMMANDS[command]}]'" in done.stderr


@pytest.mark.slow
def test_the_laws_of_an_experiments_process_are_checked_with_the_five_alone(alone):
    done = alone("from gddim import check; sys.exit(check.main(['experiments.processes:phase_space_langevin']))")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("platforms", ["cuda", "cuda,cpu"])
def test_an_accelerator_asked_for_without_its_plugin_is_one_error(alone, files, monkeypatch, platforms):
    if jax.extend.backend.backends().keys() - {"cpu"}:
        pytest.skip("there is one")
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    done = alone(
        "import gddim\ntry: gddim.load(sys.argv[1])\nexcept gddim.UserError as error: print(error)", files["FILE"]
    )
    assert "pip install 'gddim[cuda]'" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
