"""A published network of classes and colours from its file to a run elsewhere, a shared file, and pictures of every process."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import edm_net, edm_tree, options_of, pickled
from PIL import Image

import gddim
from gddim import convert, export, generate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Moved since it was converted, and its source deleted."""
    folder = tmp_path_factory.mktemp("run")
    config, net = edm_net(classes=3, augment=9)
    source = folder / "x.pkl"
    source.write_bytes(pickled(edm_tree(net, "SongUNet", options_of(config, 16), sigma_data=0.5), 4))
    assert convert.main([str(source), str(folder / "run")]) == 0
    source.unlink()
    return (folder / "run").rename(folder / "moved")


def test_a_converted_run_has_the_classes_of_its_network(run, tmp_path):
    model = gddim.load(run)
    assert (model.classes, model.shape) == (3, (16, 16, 3))
    assert export.main([str(run), str(tmp_path / "a.safetensors"), "--licence=cc-by-nc-sa-4.0"]) == 0
    shared = gddim.load(tmp_path / "a.safetensors")
    assert shared.classes == 3
    for mine, other in zip(jax.tree.leaves(model), jax.tree.leaves(shared), strict=True):
        np.testing.assert_array_equal(other, mine)
    page = (tmp_path / "a.md").read_text()
    assert "| data | of whoever published it, (16, 16, 3) |" in page
    assert "decay" not in page, "how it was trained is not known"


@pytest.mark.parametrize("sde", [gddim.VP(), gddim.CLD(), gddim.PSLD()], ids=["VP", "CLD", "PSLD"])
def test_what_it_foresees_is_alike_through_every_process(run, sde):
    """y and σ in float64, by `y = ψᵀΣ⁻¹u / (ψᵀΣ⁻¹ψ)`, `σ = (ψᵀΣ⁻¹ψ)^{-1/2}`."""
    model, cond = gddim.load(run), {"label": jnp.asarray(2)}
    seen, _ = model.through(process=sde)
    denoise, denoiser = (jax.jit(lambda *x, f=f: f(*x)) for f in (seen.denoise, model.denoiser))
    for t in (0.1, 0.4, 0.9):
        u = np.random.default_rng(0).normal(size=(16, 16, sde.k, 3))
        R, psi = sde.noise_factor(t), sde.transition(t, 0.0)[:, 0]
        weights = np.linalg.solve(R @ R.T, psi)
        precision = psi @ weights
        y = np.einsum("j,hwjc->hwc", weights, u) / precision
        found = denoise(jnp.asarray(u, jnp.float32), jnp.float32(t), cond)
        expected = denoiser(jnp.asarray(y, jnp.float32), jnp.float32(precision**-0.5), cond)
        assert float(jnp.max(jnp.abs(found - expected))) < 1e-5 * float(jnp.max(jnp.abs(expected)))


def test_its_pictures_of_every_process_are_in_colour_and_of_its_classes(run, tmp_path):
    drawn = {}
    for process in ("ve", "vp", "cld", "psld"):
        out = tmp_path / process
        words = [f"--process={process}", "--sampler=gddim:3:data@band", "--nfe=4", "--seeds=0-1", "--classes", "2", "0"]
        assert generate.main([str(run), str(out), *words, "--batch=8"]) == 0
        assert {path.name for path in out.iterdir()} == {"grid.png", "000000.png", "000001.png"}
        with Image.open(out / "000001.png") as image:
            told = json.loads(next(iter(image.info.values())))
            drawn[process] = np.asarray(image)
        assert (told["process"], told["class"]) == (process, 0)
        assert drawn[process].shape == (16, 16, 3)
        assert np.std(drawn[process]) > 1
    assert len({image.tobytes() for image in drawn.values()}) == len(drawn)
