"""The Denoiser's data variance by frequency: what it is for, where it comes from, what does not fit."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from experiments import blurred_cld_cifar10, cld_cifar10_denoiser
from experiments.processes import blurred_langevin
from gddim.denoiser import reduction
from gddim.experiment import Model, Spectrum, cli
from gddim.experiment.workdir import describe
from gddim.sde.blurring import idct2

SIZE = 8
STD = tuple(tuple(2.0 / (1 + i + 2 * j) for j in range(SIZE)) for i in range(SIZE))
PROCESSES = {"blurring": gddim.Blurring(size=SIZE, sigma_max=3.0), "blurred CLD": blurred_langevin(SIZE)}


def written(path: Path, rms) -> str:
    np.savez(path, rms=np.asarray(rms), std=np.asarray(rms))
    return str(path)


def swapped(process: str, word: str):
    """The experiment of a process in our parameterisation, with another standard deviation given on the command line."""
    experiment = {"blurred": blurred_cld_cifar10, "plain": cld_cifar10_denoiser}[process].EXPERIMENT
    return cli.parse(experiment, ["train", "--model.data-std", word]).experiment


@pytest.mark.parametrize("name", PROCESSES)
def test_gaussian_data_of_that_spectrum_give_unit_inputs_and_targets(name):
    """Of every frequency, at every time; and a number instead, however right on the whole, does not."""
    sde, ts, count = PROCESSES[name], np.array([1e-4, 0.02, 0.3, 0.9], np.float32), 4000

    def draws(std, t, key):
        """What the network sees and what it should say, `(H, W)` frequencies, and its loss if it says 0."""
        seen = []

        def zero(x, level, cond=None, *, key=None):
            seen.append(x)
            return jnp.zeros((SIZE, SIZE, 1))

        model = gddim.Denoiser(sde, zero, data_std=std)
        data_key, eps_key = jax.random.split(key)
        x0 = idct2(jax.random.normal(data_key, (SIZE, SIZE, 1)) * jnp.asarray(STD)[..., None])
        eps = jax.random.normal(eps_key, (SIZE, SIZE, sde.k, 1))
        loss = model.loss(x0, t, eps)
        u = sde.perturb(sde.lift(x0), t, eps)
        sigma, s = reduction(sde, t, jnp.float32)[0], jnp.asarray(std)
        target = (sde.from_pixels(x0) - model.denoise(u, t))[..., 0] * jnp.sqrt(s**2 + sigma**2) / (s * sigma)
        return sde.from_pixels(seen[-1])[..., 0], target, loss

    def moments(std):
        run = jax.vmap(jax.vmap(lambda t, key: draws(std, t, key), (None, 0)), (0, None))
        x, target, loss = run(jnp.asarray(ts), jax.random.split(jax.random.key(0), count))
        return jnp.mean(x**2, 1), jnp.mean(target**2, 1), jnp.mean(loss, 1)

    x, target, loss = jax.jit(lambda: moments(STD))()
    assert np.all(np.abs(x - 1) < 6 * math.sqrt(2 / count))
    assert np.all(np.abs(target - 1) < 6 * math.sqrt(2 / count))
    np.testing.assert_allclose(loss, 1, atol=6 * math.sqrt(2 / count / SIZE**2))
    x, target, _ = jax.jit(lambda: moments(math.sqrt(np.mean(np.square(STD)))))()
    assert np.max(np.abs(x - 1)) > 1
    assert np.max(np.abs(target - 1)) > 1


def test_the_shipped_spectrum_is_that_of_the_data(gddim_data):
    from gddim.data import CIFAR10
    from gddim.data.moments import moments, spectrum

    source = CIFAR10(root=str(gddim_data)).train()
    shipped = blurred_cld_cifar10.EXPERIMENT.model.data_std
    assert isinstance(shipped, Spectrum)
    np.testing.assert_allclose(shipped.rms, spectrum(source)[1], rtol=1e-9)
    number = cld_cifar10_denoiser.EXPERIMENT.model.data_std
    assert number == pytest.approx(moments(source).rms, abs=5e-4)
    assert np.sqrt(np.mean(np.square(shipped.rms))) == pytest.approx(moments(source).rms, rel=1e-9)  # Parseval


def test_a_number_or_a_file_on_the_command_line(tmp_path):
    rms = np.linspace(0.1, 4, 1024).reshape(32, 32)
    experiment = swapped("blurred", written(tmp_path / "s.npz", rms))
    np.testing.assert_array_equal(experiment.model.data_std.rms, rms)
    assert swapped("blurred", "0.25").model.data_std == 0.25
    told = describe(experiment)["model"]["data_std"]
    assert told.startswith("spectrum 32x32, rms ")
    assert told == describe(dataclasses.replace(experiment))["model"]["data_std"]
    rms[3, 4] *= 1 + 1e-12
    assert told != str(Spectrum.read(written(tmp_path / "other.npz", rms)))


@pytest.mark.parametrize("wrong", ["0", "-1", "nan", "nowhere.npz", "text.npz", "zero.npz", "small.npz"])
def test_what_is_no_standard_deviation_is_refused(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.npz").write_text("0.5")
    written(tmp_path / "zero.npz", np.zeros((32, 32)))
    written(tmp_path / "small.npz", np.ones((8, 8)))
    with pytest.raises(gddim.UserError, match=r"data.std"):
        swapped("blurred", wrong).build(jax.random.key(0))


def test_a_spectrum_needs_a_process_by_frequency():
    with pytest.raises(gddim.UserError, match="data_std"):
        gddim.Denoiser(gddim.CLD(), lambda x, level, cond=None, *, key=None: x[..., :1], data_std=STD)


def test_model_takes_a_number():
    assert Model(data_std=0.3).data_std == 0.3
    with pytest.raises(gddim.UserError, match="data_std"):
        Model(data_std=0.0)
