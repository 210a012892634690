"""A model in one line: what a run, one of its averages or a file draws, with none of what it was trained with at hand."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import status_of
from runs import COLOUR, NET, Colours, LabelledColours, make_run

import gddim
from gddim import generate
from gddim.data import Digits, FiveRings, to_uint8
from gddim.experiment import Experiment, Model
from gddim.loading import Loaded
from gddim.nn import MLPConfig
from gddim.parallel import make_mesh


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "w")


@pytest.fixture(scope="module")
def model(run) -> Loaded:
    return gddim.load(run)


def near(x, y):
    np.testing.assert_allclose(x, y, atol=2e-5 * float(jnp.abs(y).max()))


def test_it_draws_what_the_command_draws(run):
    assert status_of(COLOUR, "sample", f"--workdir={run}") == 0
    with np.load(run / "samples.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(to_uint8(gddim.load(run, mesh=make_mesh()).sample(8)), file["samples"])


def test_samples_are_numbered_and_come_under_jit_vmap_and_a_mesh(run, model):
    key = jax.random.key(3)
    images = model.sample(5, key=key)
    assert (images.shape, images.dtype) == ((5, 8, 8, 3), jnp.float32)
    assert float(jnp.std(images)) > 0.1
    near(model.sample(jnp.asarray([3, 1]), key=key), images[jnp.asarray([3, 1])])
    near(jax.jit(lambda model, key: model.sample(5, key=key))(model, key), images)
    keys = jnp.stack([key, jax.random.key(4)])
    near(jax.vmap(lambda key: model.sample(5, key=key))(keys)[0], images)
    spread = gddim.load(run, mesh=jax.make_mesh((2, 4), ("one", "other")))
    assert len(spread.sample(8).sharding.device_set) == 8
    near(spread.sample(5, key=key), images)


def test_it_is_asked_for_another_process_sampler_and_number_of_calls(model):
    cld = model.sample(2, process="cld", sampler="gddim:2", nfe=3)
    near(model.sample(2, process=gddim.CLD(), sampler=gddim.GDDIM(2), nfe=3), cld)
    solver = gddim.Method(gddim.GDDIM(2), nfe=3).solver(gddim.CLD())
    first = jax.random.split(jax.random.fold_in(jax.random.key(0), 1))
    u = gddim.CLD().sample_prior(first[0], (8, 8, 2, 3))
    through = gddim.through(gddim.CLD(), model.denoiser)
    found = gddim.CLD().project(solver(through, u, jax.random.key(1)).state)
    np.testing.assert_allclose(found, cld[1], atol=3e-3)  # CLD multiplies rounding by e^8


def test_the_times_of_the_run_are_not_those_of_another_process(model):
    model = dataclasses.replace(model, settings=dataclasses.replace(model.settings, t_min=0.05, power=7.0))
    for name, end, power in ((None, 0.05, 7), ("vp", 0.05, 7), ("cld", 1e-3, 2)):
        _, solver = model.through(process=name, sampler="gddim:2", nfe=3)
        np.testing.assert_allclose(solver.rows.time, gddim.power_grid(1.0, end, 3, power=power)[:-1], rtol=1e-6)


def test_it_is_an_eps_fn_and_tells_the_data(model):
    u, t = model.sde.sample_prior(jax.random.key(0), (8, 8, 1, 3)), jnp.asarray(0.4)
    data = model.denoise(u, t)
    assert data.shape == (8, 8, 3)
    psi, R = model.sde.transition(t, 0.0)[0, 0], model.sde.noise_factor(t)[0, 0]
    near(psi * data[..., None, :] + R * model(u, t), u)
    near(model.denoiser(u[..., 0, :] / psi, R / psi), data)


def test_a_network_of_eps_has_no_denoiser_and_foresees_the_data_all_the_same(tmp_path, capsys):
    sde = gddim.CLD()
    net = dataclasses.replace(NET, embedding="fourier")
    experiment = dataclasses.replace(COLOUR, sde=sde, net=net, model=Model(predicts="eps"))
    model = gddim.load(make_run(tmp_path / "w", experiment))
    assert not isinstance(model.model, gddim.Denoiser)
    u, t = sde.sample_prior(jax.random.key(0), (8, 8, 2, 3)), jnp.asarray(0.4)
    R_inv = jnp.linalg.inv(sde.noise_factor(t))
    w = R_inv @ sde.transition(t, 0.0)[:, :1]
    off = R_inv @ u - w @ model.denoise(u, t)[..., None, :] - model(u, t)
    assert float(jnp.abs(w.T @ off).max()) < 1e-4 * float((w**2).sum()), (
        "what ε says along R⁻¹ψ, where alone it is of the data"
    )
    assert not hasattr(model, "denoiser")
    with pytest.raises(gddim.UserError, match="predicts the ε of CLD"):
        model.sample(1, process="vp")
    for guide in (2.0, lambda D: D):
        with pytest.raises(gddim.UserError, match="cannot be guided"):
            model.sample(1, guide=guide)
    for words in ([], ["--guide.checkpoint=1"]):
        assert generate.main([str(tmp_path / "w"), str(tmp_path / "out"), "--guide.scale=2", *words]) == 2
        assert "guide: the network predicts the ε of cld and cannot be guided" in capsys.readouterr().err

    flow = gddim.load(make_run(tmp_path / "flow", dataclasses.replace(experiment, sde=gddim.FlowMatching())))
    u = jax.random.normal(jax.random.key(0), (8, 8, 1, 3))
    drawn = gddim.sample(gddim.GDDIM(2, interpolate="data"), flow.sde, flow, u, [1.0, 0.5, 0.1])  # from where ψ = 0
    assert bool(jnp.isfinite(drawn).all())


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted: the pictures that are there are whole"),
        (MemoryError(), 1, "error: out of memory: give a smaller --batch"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"), 1, "error: out of memory: "),
    ],
    ids=["Ctrl-C", "host", "device"],
)
def test_pictures_that_are_not_drawn_to_the_end_end_in_a_line(error, status, says, monkeypatch, capsys):
    def drawing(options):
        raise error

    monkeypatch.setattr(generate, "_generate", drawing)
    assert generate.main(["RUN", "OUT"]) == status
    said = capsys.readouterr().err
    assert said.startswith(says)
    assert said.count("\n") == 1


def test_steps_and_averages_are_chosen(run, model):
    u, t = jnp.ones((8, 8, 1, 3)), 0.5
    found = [gddim.load(run, **which)(u, t) for which in ({"step": 1}, {"step": 2}, {"weights": "raw"})]
    np.testing.assert_array_equal(found[1], model(u, t))
    assert float(jnp.abs(found[0] - found[1]).max()) > 1e-3
    assert float(jnp.abs(found[2] - found[1]).max()) > 1e-3


def test_the_network_computes_in_another_type(run, model):
    coarse = gddim.load(run, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(coarse)} == {jnp.dtype("float32")}
    x, y = (each.denoiser(jnp.ones((8, 8, 3)), 0.5) for each in (coarse, model))
    assert 0 < float(jnp.abs(x - y).max()) < 0.05 * float(jnp.abs(y).max())


def test_classes_that_the_run_has_not_are_refused_in_a_line(tmp_path):
    model = gddim.load(make_run(tmp_path / "w", dataclasses.replace(COLOUR, data=LabelledColours(5))))
    for classes, said in (
        ([5, 1], "given are 1 to 5, accepted are 0 to 4"),
        ([1, 2, 3], r"given int64\[3\], accepted are whole numbers, one or 2"),
        ([1.5, 2], "given float64"),
    ):
        with pytest.raises(gddim.UserError, match=f"classes: {said}"):
            model.sample(2, classes=classes, nfe=2)


ELSEWHERE = """
import sys
import gddim
model = gddim.load(sys.argv[1])
assert model.sample(2, nfe=2).shape == (2, 8, 8, 3)
assert not {"experiments", "runs"} & set(sys.modules)
"""


def test_neither_file_data_nor_mesh_are_needed(run, tmp_path):
    root = str(Path(gddim.__file__).parents[1])
    (tmp_path / "gddim").symlink_to(Path(root) / "gddim")
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "GDDIM_DATA")}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(run)],
        cwd=tmp_path, env=env | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def own_process() -> gddim.LinearSDE:
    return gddim.LinearSDE(lambda t: [[-1.0]], lambda t: [[2.0]], [[0.01]], horizon=3.0)


def test_objects_of_your_own_are_asked_for_by_name(tmp_path):
    sde = own_process()
    workdir = make_run(tmp_path / "w", dataclasses.replace(COLOUR, sde=sde))
    with pytest.raises(
        gddim.UserError, match=r"its process, LinearSDE\(.* was given as a Python object: give it as sde="
    ):
        gddim.load(workdir)
    assert gddim.load(workdir, sde=sde).sample(1).shape == (1, 8, 8, 3)
    with pytest.raises(gddim.UserError, match=r"another sde than the run's: .*sde.beta_max: "):
        gddim.load(workdir, sde=gddim.VP())


@dataclasses.dataclass(frozen=True)
class OwnConfig:
    width: int = 4

    def build(self, in_shape, out_channels, key):
        return dataclasses.replace(NET, width=self.width).build(in_shape, out_channels, key)


def test_a_network_of_your_own_and_data_of_an_older_run_are_asked_for(tmp_path):
    experiment = dataclasses.replace(COLOUR, net=OwnConfig())
    workdir = make_run(tmp_path / "w", experiment, records=None)
    with pytest.raises(gddim.UserError, match=r"its data, Colours\(count=16\), were given .*: give them as data="):
        gddim.load(workdir)
    with pytest.raises(
        gddim.UserError, match=r"its network, OwnConfig\(width=4\), is none .*give its configuration as net="
    ):
        gddim.load(workdir, data=Colours())
    assert gddim.load(workdir, data=Colours(), net=OwnConfig()).shape == (8, 8, 3)
    with pytest.raises(gddim.UserError, match=r"net.width: the run has 4, this command 8"):
        gddim.load(workdir, data=Colours(), net=OwnConfig(8))


def test_an_older_run_of_this_packages_own_is_read(tmp_path):
    sde = gddim.PSLD()
    experiment = Experiment("older", sde, NET, Digits(), sampling=COLOUR.sampling, train=COLOUR.train)
    model = gddim.load(make_run(tmp_path / "w", experiment, records=None, objects=None))
    assert model.sde == sde
    assert model.shape == (8, 8, 1)


REFUSED = {
    "nowhere": "holds no run",
    "empty": "holds no run",
    "a file": "is no file of python -m gddim.export",
    "something else": "holds something else",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_run_is_refused_in_a_line(what, tmp_path):
    path = tmp_path / "x"
    if what == "a file":
        path.write_bytes(b"thesis")
    elif what != "nowhere":
        path.mkdir()
        if what == "something else":
            (path / "thesis.tex").write_text("x")
    with pytest.raises(gddim.UserError, match=REFUSED[what]) as caught:
        gddim.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "--workdir" not in str(caught.value)


def test_what_a_run_does_not_hold_is_refused_in_a_line(run, model, tmp_path):
    with pytest.raises(gddim.UserError, match=r"no whole checkpoint of step 7 \(saved: \[1, 2\]"):
        gddim.load(run, step=7)
    with pytest.raises(gddim.UserError, match="weights best: accepted are ema, raw and a length"):
        gddim.load(run, weights="best")
    with pytest.raises(gddim.UserError, match="is made of snapshots"):
        gddim.load(run, weights=0.1)
    with pytest.raises(gddim.UserError, match="unknown sampler 'ddim'"):
        model.sample(1, sampler="ddim")
    with pytest.raises(gddim.UserError, match="nfe must be at least 1, not 0"):
        model.sample(1, nfe=0)
    later = tmp_path / "w"
    make_run(later, dataclasses.replace(COLOUR, net=NET))
    config = json.loads((later / "config.json").read_text())
    config["net"]["heads"] = 3
    (later / "config.json").write_text(json.dumps(config))
    with pytest.raises(gddim.UserError, match=r"NCSNppConfig has no heads in this release"):
        gddim.load(later)
    points = dataclasses.replace(COLOUR, net=MLPConfig(8, 1), data=FiveRings(40, 10))
    with pytest.raises(gddim.UserError, match="a MLPConfig computes in the type of its input"):
        gddim.load(make_run(tmp_path / "p", points), dtype="bfloat16")
