"""Published checkpoints of other code bases: converted networks say what theirs said, and sample through every process."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import status_of
from etils import epath

import gddim
from gddim import convert
from gddim.convert.cld_sgm import read_cld_sgm
from gddim.convert.score_sde import State, read_score_sde
from gddim.data import to_uint8
from gddim.errors import UserError
from gddim.experiment.checkpoints import restore_ema
from gddim.experiment.plan import Plan

QUICK = {"xla_backend_optimization_level": 0}
EDM = ("edm_ddpmpp_cond", "edm_ncsnpp_uncond")


def published(folder, name):
    """A fixture that has been read, and what its code base said."""
    found = convert.read(folder / "checkpoints" / f"{name}.{'pkl' if name in EDM else 'pth'}")
    with np.load(folder / "checkpoints" / f"{name}_io.npz") as io:
        return found, dict(io)


def compiled(function, *arguments):
    return jax.jit(lambda *each: function(*each)).lower(*arguments).compile(compiler_options=QUICK)(*arguments)


def labels_of(io):
    return {"label": jnp.asarray(io["labels"], jnp.int32)} if io["labels"].size else None


def off(found, expected):
    return float(np.max(np.abs(np.asarray(found) - expected)) / np.max(np.abs(expected)))


@pytest.mark.parametrize("name", EDM)
def test_an_edm_network_denoises_as_it_did_and_alike_through_every_process(fixtures_dir, name):
    found, io = published(fixtures_dir, name)
    model, cond = found.model, labels_of(io)
    assert found.experiment.model.data_std == 0.5
    denoise = jax.vmap(model.denoiser, in_axes=(0, 0, None if cond is None else 0))
    x, sigma = jnp.asarray(io["x"]), jnp.asarray(io["sigma"])
    assert off(compiled(denoise, x, sigma, cond), io["denoised"]) < 1e-5
    one = None if cond is None else jax.tree.map(lambda label: label[2], cond)
    u = jax.random.normal(jax.random.key(0), (16, 16, 4, 3))
    for sde in (gddim.VP(), gddim.CLD(), gddim.PSLD()):
        seen = dataclasses.replace(model, sde=sde)
        state, t = u[..., : sde.k, :], jnp.asarray(0.4)
        y, sigma = gddim.denoiser.statistic(sde, state, t)
        expected = compiled(lambda y, sigma: model.denoiser(y, sigma, one), y, sigma)
        assert off(compiled(seen.denoise, state, t, one), expected) < 1e-5


@pytest.mark.parametrize("name", EDM)
def test_edm_samples_are_its_own(fixtures_dir, name):
    """Nine nodes of EDM's grid: eight steps of Heun, and the data foreseen at the last."""
    found, io = published(fixtures_dir, name)
    sde, ts = gddim.VE(80.0), gddim.power_grid(80.0, 0.002, 8, power=7.0)
    model, cond = dataclasses.replace(found.model, sde=sde), labels_of(io)

    def draw(latents, cond):
        eps_fn = lambda u, t: model(u, t, cond)
        u = gddim.sample(gddim.Heun(), sde, eps_fn, 80.0 * latents[:, :, None], ts)
        return model.denoise(u, jnp.asarray(ts[-1], jnp.float32), cond)

    cond = None if cond is None else jax.tree.map(lambda label: label[:2], cond)
    latents = jnp.asarray(io["latents"])
    samples = compiled(jax.vmap(draw, in_axes=(0, None if cond is None else 0)), latents, cond)
    assert off(samples, io["samples_heun9"]) < 1e-3


@pytest.mark.parametrize("name", ["scoresde_vp_ddpmpp", "scoresde_ve_ncsnpp"])
def test_a_score_sde_network_has_its_score(fixtures_dir, name):
    found, io = published(fixtures_dir, name)
    model, x, t = found.model, io["x"], io["t"]
    assert found.step == 600_000
    if "_ve_" in name:  # on [-1, 1], where all noise is twice as large
        x, t = 2 * x - 1, 2 * io["std"]
    eps = compiled(jax.vmap(lambda u, t: model(u, t)), jnp.asarray(x)[..., None, :], jnp.asarray(t))[..., 0, :]
    score = -np.asarray(eps) / io["std"][:, None, None, None]
    largest = np.max(np.abs(io["score"]), axis=(1, 2, 3))
    error = np.max(np.abs(score - io["score"]), axis=(1, 2, 3)) / largest
    assert error[0] < 1e-4
    assert np.all(error[1:] < 1e-5)


def test_a_score_sde_network_is_a_denoiser_for_every_process(fixtures_dir):
    model = published(fixtures_dir, "scoresde_vp_ddpmpp")[0].model
    y, sigma = jax.random.normal(jax.random.key(0), (16, 16, 3)), jnp.asarray(0.7)
    expected = compiled(model.denoiser, y, sigma)
    sde, t = gddim.VP(), jnp.asarray(0.5)
    alpha, noise = sde.transition(t, 0.0)[0, 0], sde.noise_factor(t)[0, 0]
    u = (alpha * y)[:, :, None]
    by_hand = y - noise / alpha * compiled(lambda u: model(u, t), u)[:, :, 0]
    assert off(compiled(lambda y: model.denoiser(y, noise / alpha), y), by_hand) < 1e-4
    eps_fn = gddim.through(gddim.CLD(), model.denoiser)
    state = jax.random.normal(jax.random.key(1), (16, 16, 2, 3))
    y, sigma = gddim.denoiser.statistic(gddim.CLD(), state, t)
    assert off(compiled(eps_fn.denoise, state, t), compiled(model.denoiser, y, sigma)) < 1e-5
    assert np.all(np.isfinite(expected))


def test_a_cld_sgm_network_is_an_eps_fn_for_cld(fixtures_dir):
    found, io = published(fixtures_dir, "cldsgm_mixed")
    model, t = found.model, jnp.asarray(io["t"], jnp.float32)
    u = jnp.asarray(io["u"]).reshape(4, 16, 16, 2, 3)
    network = compiled(jax.vmap(lambda u, t: model.net(u.reshape(16, 16, 6), t)), u, t)
    assert off(network, io["network"]) < 1e-5

    def score(u, t):
        return -model.velocity_eps(u, t) / model.sde.cholesky_factor(t)[1, 1]

    found = np.asarray(compiled(jax.vmap(score), u, t))
    for got, expected in zip(found, io["score_v"], strict=True):
        assert off(got, expected) < 1e-4
    # D by the formula, in float64 on the host, and ε of both fields that agrees with it
    eps, data = (np.asarray(compiled(jax.vmap(each), u, t), np.float64) for each in (model, model.denoise))
    for i, time in enumerate(io["t"]):
        R, psi = model.sde.noise_factor(time), model.sde.transition(time, 0.0)[:, 0]
        precision = np.linalg.inv(R @ R.T)
        state = np.asarray(io["u"][i], np.float64).reshape(16, 16, 2, 3)
        by_hand = ((precision[1] @ state) + io["score_v"][i]) / (precision @ psi)[1]
        assert off(data[i], by_hand) < 2e-3
        assert off(R @ eps[i] + psi[:, None] * data[i][..., None, :], state) < 1e-4


@pytest.mark.parametrize("name", [*EDM, "scoresde_ve_ncsnpp", "cldsgm_mixed"])
def test_the_command_knows_what_it_was_given_and_writes_a_run(fixtures_dir, tmp_path, capsys, name):
    source = fixtures_dir / "checkpoints" / f"{name}.{'pkl' if name in EDM else 'pth'}"
    assert convert.main([str(source), str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'run'}: ema weights")
    found = convert.read(source)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["type"] == "Elsewhere"
    assert config["records"]["shape"] == list(found.experiment.data.shape)
    params, step = restore_ema(Plan(found.experiment), epath.Path(tmp_path / "run"))
    assert step == found.step
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(found.model), strict=True):
        np.testing.assert_array_equal(one, other)
    assert convert.main([str(source), str(tmp_path / "run")]) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_converted_run_is_drawn_through_another_process_where_it_can_be(fixtures_dir, tmp_path, capsys):
    folder, run = fixtures_dir / "checkpoints", tmp_path / "run"
    source = str(folder / "scoresde_vp_ddpmpp.pth")
    assert convert.main([source, str(run), "--size", "16"]) == 0
    found = convert.read(source, size=16)
    words = ["--process=cld", "--sampler=gddim:3:data"]
    words += ["--sampling.samples=4", "--sampling.batch=4", "--sampling.nfe=5"]
    assert status_of(found.experiment, "sample", f"--workdir={run}", *words) == 0
    with np.load(run / "samples.npz", allow_pickle=False) as file:
        samples = file["samples"]
    sde, ts = gddim.CLD(), gddim.power_grid(1.0, 1e-3, 5)
    eps_fn = gddim.through(sde, found.model.denoiser)

    def draw(i):
        prior, noise = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
        u = sde.sample_prior(prior, (16, 16, 2, 3))
        return sde.project(gddim.sample(gddim.GDDIM(3, interpolate="data"), sde, eps_fn, u, ts, noise))

    direct = np.asarray(to_uint8(compiled(jax.vmap(draw), jnp.arange(4))))
    assert samples.shape == (4, 16, 16, 3)
    assert np.mean(np.abs(samples.astype(int) - direct.astype(int)) > 1) < 0.01
    source = str(folder / "cldsgm_mixed.pth")
    assert convert.main([source, str(tmp_path / "cld")]) == 0
    assert status_of(convert.read(source).experiment, "sample", f"--workdir={tmp_path / 'cld'}", "--process=vp") == 2
    assert "predicts the ε of cld:epsilon=1e-09 in its L coordinates" in capsys.readouterr().err


def test_what_a_file_does_not_tell_is_an_option(fixtures_dir, tmp_path, capsys):
    folder = fixtures_dir / "checkpoints"
    vp, run = str(folder / "scoresde_vp_ddpmpp.pth"), tmp_path / "run"
    assert convert.main([vp, str(run), "--process", "subvp", "--weights", "raw", "--sde.beta-max", "10"]) == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["sde"]["type"], config["sde"]["beta_max"]) == ("SubVP", 10.0)
    assert convert.read(vp, "raw").arrays["all_modules.22.bias"] != pytest.approx(
        convert.read(vp).arrays["all_modules.22.bias"]
    )
    for words, said in (
        ([str(folder / "edm_ncsnpp_uncond.pkl"), "--weights", "raw"], "leave out --weights"),
        ([str(folder / "edm_ncsnpp_uncond.pkl"), "--size", "16"], "leave out --weights, --process and --size"),
        ([str(folder / "scoresde_ve_ncsnpp.pth"), "--process", "vp"], "as for VE alone"),
        ([str(fixtures_dir / "ncsnpp_positional.msgpack")], "give --experiment NAME"),
        ([str(folder / "cldsgm_mixed.names.txt")], "is no EDM pickle"),
        ([str(folder / "nowhere")], "cannot be read"),
    ):
        assert convert.main([words[0], str(tmp_path / "other"), *words[1:]]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    with pytest.raises(UserError, match="not here"):
        convert.read(vp).experiment.data.train()


def state(**options) -> State:
    """What is read of a file beside its arrays, of a network of sinusoids."""
    config = gddim.nn.NCSNppConfig(**{"width": 16, "embedding": "positional"} | options)
    return State({}, np.geomspace(50.0, 0.01, 9), 0, config, inputs=3, outputs=3, side=32)


def test_networks_of_other_processes_are_not_taken_for_the_usual_one():
    with pytest.raises(gddim.UserError, match=r"VE of discrete times .* which is not read"):
        read_score_sde(state(progressive_input="residual"), "ncsnpp.pth")
    assert read_score_sde(state(progressive_input="residual"), "ncsnpp.pth", "vp").experiment.sde == gddim.VP()
    assert read_score_sde(state(progressive_input="none"), "ddpmpp.pth").experiment.sde == gddim.VP()
    paper, later = (read_cld_sgm(state(blocks=blocks), "celeba.pth").experiment.sde for blocks in (2, 4))
    assert (paper.beta0, paper.beta1, later.beta0, later.beta1) == (4.0, 0.0, 0.1, 6.9)
