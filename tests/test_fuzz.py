"""Mutations of checkpoints: each is read or refused in one line, nothing is executed; and what reading one takes of memory.

`GDDIM_MUTATIONS=10000 pytest -m slow tests/test_fuzz.py` makes ten thousand of the published files.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import msgpack
import numpy as np
import pytest
from checkpoint_files import (
    diffusers_folder,
    edm_net,
    edm_tree,
    options_of,
    pickled,
    score_sde_state,
    write_stream,
    write_zip,
)
from runs import make_run

from gddim import export
from gddim.nn import NCSNppConfig

TINY = NCSNppConfig(width=4, multipliers=(1, 2), blocks=1, attention=(16,), fir=False, progressive_input="none")
COUNT = int(os.environ.get("GDDIM_MUTATIONS", "500"))
PUBLISHED = (
    "checkpoints/edm_ddpmpp_cond.pkl",
    "checkpoints/edm_ncsnpp_uncond.pkl",
    "checkpoints/scoresde_vp_ddpmpp.pth",
    "checkpoints/scoresde_ve_ncsnpp.pth",
    "checkpoints/cldsgm_mixed.pth",
    "ncsnpp_fir_fourier.msgpack",
    "ncsnpp_positional.msgpack",
)


def run(program: str, *argv: str) -> list[float]:
    """The numbers that a program of a process of its own tells."""
    words = [sys.executable, "-Werror", *((program,) if program.endswith(".py") else ("-c", program)), *argv]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


def fuzz(path: Path, count: int, seed: int) -> None:
    """Every mutation of a file is read, or refused in one line, in little more memory than the file."""
    refusals, grown = run(str(Path(__file__).with_name("fuzz.py")), str(path), str(count), str(seed))
    assert refusals > count // 20
    assert grown < 2 * path.stat().st_size + 2**25


@pytest.mark.parametrize("kind", ["edm", "score_sde"])
def test_dozens_of_mutations_of_a_small_file_are_read_or_refused(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "edm":
        config, net = edm_net()
        path.write_bytes(pickled(edm_tree(net, "SongUNet", options_of(config, 16), sigma_data=0.5), protocol=4))
    else:
        write_zip(path, *score_sde_state(TINY.build((32, 32, 3), 3, jax.random.key(0)), np.geomspace(30, 0.01, 9)))
    fuzz(path, 60, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_mutations_of_published_files_are_read_or_refused(fixtures_dir, name):
    fuzz(fixtures_dir / name, COUNT // len(PUBLISHED), seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ours", "diffusers"])
def test_mutations_of_safetensors_are_read_or_refused(tmp_path, kind):
    if kind == "ours":
        path = tmp_path / "a.safetensors"
        assert export.main([str(make_run(tmp_path / "run")), str(path)]) == 0
    else:
        net = edm_net(style="ddpm", groups=4)[1]
        path = diffusers_folder(tmp_path / "unet", net) / "diffusion_pytorch_model.safetensors"
    fuzz(path, COUNT, seed=3)


# How many bytes the process grows by, over what it takes for a small file of the kind, as a share of the large one.
PEAK = """
import resource, sys
from pathlib import Path
from gddim import convert

def peak(path):
    convert.read_state(path) if path.endswith("flax") else convert.read(path)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

small, large = sys.argv[1:]
before = peak(small)
files = [Path(large), *Path(large).glob("*")]
print((peak(large) - before) / sum(file.stat().st_size for file in files if file.is_file()))
"""


def write(kind: str, path: Path, width: int) -> str:
    more = {"style": "ddpm", "groups": 4} if kind == "diffusers" else {}
    config, net = edm_net(width=width, blocks=2, **more)
    match kind:
        case "edm":
            path.write_bytes(pickled(edm_tree(net, "SongUNet", options_of(config, 16), sigma_data=0.5), protocol=4))
        case "archive":
            write_zip(path, *score_sde_state(net, np.float32([50.0, 0.01])))
        case "older":
            write_stream(path, *score_sde_state(net, np.float32([50.0, 0.01])))
        case "diffusers":
            options = {"block_out_channels": [width, 2 * width], "layers_per_block": 2}
            return str(diffusers_folder(path, net, **options))
        case "flax":
            values = np.ones((width, width, 100), np.float32)
            one = msgpack.ExtType(1, msgpack.packb((values.shape, "float32", values.tobytes())))
            path.write_bytes(msgpack.packb({"params_ema": {str(i): one for i in range(20)}}))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["edm", "archive", "older", "diffusers", "flax"])
def test_reading_a_large_checkpoint_takes_less_than_twice_its_memory(tmp_path, kind):
    small, large = (write(kind, tmp_path / f"{width}.{kind}", width) for width in (8, 160))
    (share,) = run(PEAK, small, large)
    assert share < 1.7
