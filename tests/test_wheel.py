"""The wheel in a fresh environment, outside of a checkout: all that the README says of an installed package."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = re.search(r"```python\n(.*?EXPERIMENT = replace.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
TINY = ("--net.width=8", "--net.blocks=1", "--net.multipliers", "1", "1", "--net.attention", "16")
UNREACHABLE = ("connection", "resolve", "No matching distribution", "Could not find a version", "timed out")

pytestmark = pytest.mark.slow


def pip(python: Path | str, *words: str) -> None:
    """Without a registry there is no wheel to be tried."""
    done = subprocess.run([python, "-m", "pip", "--disable-pip-version-check", *words], capture_output=True, text=True)
    if done.returncode and any(word in done.stderr for word in UNREACHABLE):
        pytest.skip(f"no registry of packages can be reached: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (path,) = folder.iterdir()
    return path


def installed(wheel: Path, folder: Path, extras: str):
    """Run a Python with the wheel and these extras, in an empty folder."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python, here = folder / "venv" / "bin" / "python", folder / "empty"
    pip(python, "install", "--quiet", "-c", str(ROOT / "infra" / "constraints.txt"), f"{wheel}{extras}")
    here.mkdir()
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}

    def run(*words: str, status: int = 0) -> str:
        done = subprocess.run([python, *words], capture_output=True, text=True, cwd=here, env=env)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def whole(wheel, tmp_path_factory):
    return installed(wheel, tmp_path_factory.mktemp("whole"), "[all]")


def test_the_wheel_holds_the_package_and_the_experiments(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"gddim", "experiments"}
    assert {"gddim/py.typed", "experiments/cifar10_spectrum.npz", "experiments/weights/README.md"} <= names
    assert not [name for name in names if name.startswith("experiments/results/")]


def test_the_package_alone_samples_and_says_what_it_lacks(wheel, tmp_path):
    run = installed(wheel, tmp_path, "")
    program = (
        "import gddim, jax; sde = gddim.CLD(); u = sde.sample_prior(jax.random.key(0), (2, 2, 2, 3)); "
        "times = gddim.power_grid(1.0, 1e-3, 2); model = gddim.Denoiser(sde, lambda x, *_, key=None: x, data_std=0.5); "
        "print(gddim.sample(gddim.GDDIM(order=2), sde, model, u, times).shape, gddim.__file__)"
    )
    said = run("-c", program)
    assert said.startswith("(2, 2, 2, 3)")
    assert str(ROOT) not in said
    for words in ("-m experiments.cld_digits", "-m gddim.generate a.safetensors OUT"):
        assert re.fullmatch(r".*pip install 'gddim\[(train|eval)\]'\n", run(*words.split(), status=2)), words


def test_a_file_of_the_readme_trains_on_images_outside_of_a_checkout(whole, tmp_path):
    assert PHOTOS
    images = tmp_path / "photos"
    images.mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), np.uint8)):
        Image.fromarray(image).save(images / f"{i}.png")
    (tmp_path / "photos.py").write_text(PHOTOS[1].replace('"photos", size', f'"{images}", size'))
    more = ("--train.steps=2", "--train.batch=4", "--workdir=RUN")
    assert "FLOP" in whole(str(tmp_path / "photos.py"), "--dry-run", *TINY)
    whole(str(tmp_path / "photos.py"), "train", *TINY, *more)
    assert "2 pictures" in whole("-m", "gddim.generate", "RUN", "OUT", "--seeds=0-1", "--nfe=2", "--process=cld")
    whole("-m", "gddim.export", "RUN", "a.safetensors")
    assert "(1, 32, 32, 3)" in whole("-c", "import gddim; print(gddim.load('a.safetensors').sample(1, nfe=2).shape)")


def test_the_experiments_are_there_outside_of_a_checkout(whole, fixtures_dir):
    said = whole("-m", "experiments.cld_digits", "--dry-run")
    assert "FLOP" in said
    assert "FLOP" in whole("-m", "experiments.blurred_cld_cifar10", "--dry-run", *TINY)
    assert "law holds" in whole("-m", "gddim.check", "experiments.processes:phase_space_langevin")
    words = ("--experiment", "cld_cifar10", "--net.width=16", "--net.blocks=1")
    said = whole("-m", "gddim.convert", str(fixtures_dir / "ncsnpp_fir_fourier.msgpack"), "PUBLISHED", *words)
    assert "python -m experiments.cld_cifar10 sample" in said
    said = whole("-m", "gddim.convert", str(fixtures_dir / "checkpoints" / "edm_ddpmpp_cond.pkl"), "EDM")
    assert "EDM's EDMPrecond" in said
    said = whole("-m", "gddim.convert", "EDM", "AGAIN", "--experiment", "cld_cifar", status=2)
    assert said.count("\n") == 1
