"""Checkpoints of other code bases, written here in small: what is read is what was written, or is refused in one line."""

import dataclasses
import struct

import jax
import numpy as np
import pytest
from checkpoint_files import (
    Call,
    diffusers_folder,
    edm_net,
    edm_tree,
    options_of,
    pickled,
    refused,
    score_sde_state,
    tensor,
    write_zip,
)  # fmt: skip

import gddim
from gddim import convert
from gddim.convert import edm, recognition, score_sde
from gddim.nn import NCSNppConfig


@pytest.mark.parametrize("changes", [{}, {"classes": 3, "augment": 9}, {"style": "adm", "augment": 9}], ids=str)
def test_an_edm_file_is_read_as_it_was_written(tmp_path, changes):
    adm = changes.get("style") == "adm"
    if adm:
        changes = {**changes, "width": 64, "embedding": "positional_open", "eps": 1e-5, "head": 64, "classes": 3}
    config, net = edm_net(**changes)
    options = options_of(config, 16, **({} if adm else {"embedding_type": "positional", "channel_mult_noise": 1}))
    number = Call("numpy.core.multiarray scalar", (Call("numpy dtype", ("f8", False, True)), struct.pack("<d", 0.25)))
    tree = edm_tree(net, "DhariwalUNet" if adm else "SongUNet", options, sigma_data=number)
    path = tmp_path / "x.pkl"
    path.write_bytes(pickled(tree, protocol=4))
    found = convert.read(path)
    assert found.experiment.model.data_std == 0.25
    read = found.model.net
    for (keys, mine), other in zip(jax.tree_util.tree_leaves_with_path(net), jax.tree.leaves(read), strict=True):
        missing = adm and jax.tree_util.keystr(keys).endswith("label.bias")  # ADM's has none
        np.testing.assert_array_equal(other, 0 * mine if missing else mine)


@pytest.mark.parametrize("fir", [False, True])
@pytest.mark.parametrize("fourier", [False, True])
def test_a_score_sde_file_is_read_as_it_was_written(tmp_path, fir, fourier):
    config = NCSNppConfig(
        width=8, multipliers=(1, 3, 2), blocks=2, attention=(16,), fir=fir,
        embedding="fourier" if fourier else "positional", progressive_input="residual" if fir else "none",
    )  # fmt: skip
    net = config.build((32, 32, 3), 3, jax.random.key(0))
    path = write_zip(tmp_path / "subvp.pth", *score_sde_state(net, np.geomspace(30, 0.01, 1000)))
    found = convert.read(path)
    assert (found.step, found.experiment.net.multipliers, found.experiment.net.attention) == (12, (1, 3, 2), (16,))
    assert found.experiment.sde == (gddim.VE(60.0) if fourier else gddim.SubVP())
    for (keys, mine), other in zip(
        jax.tree_util.tree_leaves_with_path(net), jax.tree.leaves(found.model.net), strict=True
    ):
        sign = -1 if fourier and jax.tree_util.keystr(keys).startswith(".conv_out") else 1  # it says −ε
        np.testing.assert_array_equal(other, sign * mine)
    raw = convert.read(tmp_path / "subvp.pth", "raw").model.net
    np.testing.assert_array_equal(raw.time[0].weight, net.time[0].weight + 1)


PLAIN = NCSNppConfig(
    width=8, multipliers=(1, 2), blocks=1, attention=(8,), fir=False, embedding="positional", progressive_input="none"
)


def state_file(path, config=PLAIN, inputs=3, sigmas=(50.0, 0.01), **changes):
    """A training state, beside whose parameters there are others."""
    tree, storages = score_sde_state(config.build((16, 16, inputs), 3, jax.random.key(0)), sigmas)
    shapes = {f"x{i}": shape for i, shape in enumerate(changes.values())}
    for name, key in zip(changes, shapes, strict=True):
        size = int(np.prod(shapes[key]))
        storages[key] = bytes(4 * size)
        tree["model"][name] = tensor(key, shapes[key], tuple(np.cumprod((1, *shapes[key][:0:-1])).tolist()[::-1]), size)
    return write_zip(path, tree, storages)


def test_what_a_training_state_does_not_tell_is_as_published_or_said(tmp_path):
    """The height of images, the range of σ, what is added to a covariance."""
    path = state_file(tmp_path / "x.pth")
    assert convert.read(path).experiment.data.shape == (32, 32, 3)
    found = convert.read(path, size=16).experiment
    assert (found.data.shape, found.net.attention) == ((16, 16, 3), (8,))
    assert "multiples of 2" in refused(path, size=15)
    fourier = dataclasses.replace(PLAIN, embedding="fourier")
    state_file(path, fourier, sigmas=None)
    assert convert.read(path, process="ve").experiment.sde == gddim.VE(100.0)
    assert "CLD-SGM's VPSDE, which is not read, unless --process says" in refused(path)
    for config, epsilon in ((fourier, 1e-9), (PLAIN, 1e-6)):
        assert convert.read(state_file(path, config, inputs=6)).experiment.sde.epsilon == epsilon


@pytest.mark.parametrize(
    ("parameter", "shape", "said"),
    [
        ("all_modules.3.NIN_0.W", (8, 8), "has DDPM's blocks"),
        ("all_modules.90.Conv.weight", (8, 3, 1, 1), "has input or output skips"),
        ("all_modules.90.weight", (3, 8, 3, 3), "has input or output skips"),
        ("all_modules.90.weight", (8, 8), "is not told the noise level"),
        ("other.weight", (8, 8), "which NCSN++ has not"),
        ("all_modules.3.two\nlines", (8, 8), "unexpected: all_modules.3.two lines"),
    ],
)
def test_other_options_of_score_sde_are_one_line(tmp_path, parameter, shape, said):
    assert said in refused(state_file(tmp_path / "x.pth", **{parameter: shape}), weights="raw")


def test_a_step_that_is_none_is_told(tmp_path):
    tree, storages = score_sde_state(PLAIN.build((16, 16, 3), 3, jax.random.key(0)), (50.0, 0.01))
    path = write_zip(tmp_path / "x.pth", tree | {"step": -3}, storages)
    assert "its step is -3; accepted is a whole number of at least 0, below 2³¹" in refused(path)


DDPM = {"style": "ddpm", "groups": 4}


def test_a_folder_of_diffusers_is_read_as_it_was_written(tmp_path):
    config, net = edm_net(**DDPM)
    found = convert.read(diffusers_folder(tmp_path / "unet", net))
    assert found.experiment.net == config
    assert found.experiment.sde == gddim.VP.from_betas(np.linspace(1e-4, 0.3, 20))
    for mine, other in zip(jax.tree.leaves(net), jax.tree.leaves(found.model.net), strict=True):
        np.testing.assert_array_equal(other, mine)
    centred = diffusers_folder(tmp_path / "centred", net, downsample_padding=1)
    assert convert.read(centred).experiment.net == dataclasses.replace(config, style="diffusers")
    said = []
    net = dataclasses.replace(found.model, net=lambda x, level, cond=None, *, key=None: said.append(level) or x)
    net(np.zeros((4, 4, 1, 3), np.float32), 20.0)  # the last time, which diffusers calls 19
    assert said == [19.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "read is UNet2DModel"),
        ({"downsample_padding": 2}, "downsample_padding is 2"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"block_out_channels": [8, 12]}, "not multiples"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "mirrored"),
        ({"layers_per_block": 10**9}, "larger than its"),
        ({"block_out_channels": [8, 8 * 10**9]}, "larger than its"),
        ({"layers_per_block": 2}, "missing: "),
    ],
)
def test_another_architecture_of_diffusers_is_one_line(tmp_path, options, said):
    assert said in refused(diffusers_folder(tmp_path / "unet", edm_net(**DDPM)[1], **options))


PRECONDITIONED = {
    "VPPrecond": ({"beta_min": 0.1, "beta_d": 19.9, "M": 1000}, (gddim.VP(0.1, 20.0), 999.0, 0.0)),
    "VEPrecond": ({"sigma_min": 0.03, "sigma_max": 100}, (gddim.VE(100.0), 0.5, 0.0)),
    "iDDPMPrecond": ({"C_1": 0.001, "C_2": 0.008, "M": 10}, (None, 1.0, -1.0)),
}


@pytest.mark.parametrize("outer", PRECONDITIONED)
def test_networks_of_edms_other_preconditioners_are_eps_of_their_processes(tmp_path, outer):
    ve, outputs = outer == "VEPrecond", 6 if outer == "iDDPMPrecond" else 3
    config, net = edm_net(outputs=outputs, **({"embedding": "fourier"} if ve else {}))
    more = {"embedding_type": "fourier", "channel_mult_noise": 2} if ve else {}
    options = options_of(config, 16, out_channels=outputs, **more)
    state, (sde, *level) = PRECONDITIONED[outer]
    path = tmp_path / "x.pkl"
    path.write_bytes(pickled(edm_tree(net, "SongUNet", options, outer, **state), 4))
    found = convert.read(path)
    model = found.model
    assert [model.time_scale, model.offset] == level
    np.testing.assert_array_equal(model.net.conv_out.bias, (-1 if ve else 1) * net.conv_out.bias[:3])
    if ve:
        assert (found.experiment.sampling.power, found.experiment.sampling.t_min) == (None, 0.03)  # the process's own 7
    if sde is None:  # its noise levels, from the largest to 0, by its own recursion
        alpha = lambda j: np.sin(0.5 * np.pi * j / 10 / 1.008) ** 2
        levels = [0.0]
        for j in range(10, 0, -1):
            levels.append(np.sqrt((levels[-1] ** 2 + 1) / max(alpha(j - 1) / alpha(j), 0.001) - 1))
        noise = [model.sde.noise_factor(t)[0, 0] / model.sde.transition(t, 0.0)[0, 0] for t in np.arange(1.0, 11.0)]
        np.testing.assert_allclose(noise, levels[1:], rtol=1e-10)
    else:
        assert model.sde == sde
    path.write_bytes(pickled(edm_tree(net, "SongUNet", options, "Precond"), 4))
    assert "channels and returns 6" in refused(path) or "read are EDMPrecond" in refused(path)


def test_an_edm_sampler_keeps_within_what_its_network_supports(tmp_path):
    config, net = edm_net()
    path = tmp_path / "x.pkl"
    for bounds, wanted in ({}, (80.0, 0.002)), ({"sigma_min": 0.01, "sigma_max": 40.0}, (40.0, 0.01)), (
        {"sigma_min": 0, "sigma_max": float("inf")}, (80.0, 0.002)
    ):  # fmt: skip
        tree = edm_tree(net, "SongUNet", options_of(config, 16), sigma_data=0.5, **bounds)
        path.write_bytes(pickled(tree, protocol=4))
        found = recognition.parse(path).experiment
        assert (found.sde.sigma_max, found.sampling.t_min) == wanted


def test_adm_attends_where_there_is_a_whole_head(tmp_path):
    config, net = edm_net(
        style="adm", width=32, embedding="positional_open", eps=1e-5, head=64, attention=(16, 8), multipliers=(1, 2)
    )
    assert all(run.attention is None for run in net.down[0].runs)
    assert all(run.attention is not None for run in net.down[1].runs)
    path = tmp_path / "x.pkl"
    path.write_bytes(pickled(edm_tree(net, "DhariwalUNet", options_of(config, 16), sigma_data=0.5), protocol=4))
    read = convert.read(path).model.net
    for mine, other in zip(jax.tree.leaves(net), jax.tree.leaves(read), strict=True):
        np.testing.assert_array_equal(other, mine)


def test_names_are_the_published_ones():
    """Blocks with attention take two numbers; EDM's parts are named by the size that they come to."""
    config = NCSNppConfig(width=8, multipliers=(1, 2), blocks=1, attention=(8,), fir=True)
    net = config.build((16, 16, 3), 3, jax.random.key(0))
    numbered = [name for each in score_sde.names(net) for name in each]
    expected = (
        "0.W", "1.weight", "2.bias", "3.weight", "4.GroupNorm_0.weight", "4.Conv_1.bias", "5.Dense_0.weight",
        "5.Conv_2.weight", "6.Conv2d_0.weight", "7.Conv_2.weight", "8.NIN_0.W", "8.NIN_3.b", "8.GroupNorm_0.bias",
        "9.Conv_0.weight", "10.NIN_1.W", "11.Dense_0.bias", "12.Conv_2.weight", "13.Conv_2.weight", "14.NIN_2.b",
        "15.Conv_2.weight", "16.Conv_2.weight", "17.Conv_2.weight", "18.weight", "19.bias",
    )  # fmt: skip
    assert {f"all_modules.{name}" for name in expected} <= set(numbered)
    assert max(int(name.split(".")[1]) for name in numbered) == 19
    named = {name for each in edm.names(net) for name in each}
    assert named >= {
        *("map_noise.freqs", "map_layer1.bias", "enc.16x16_conv.weight", "enc.16x16_block0.norm0.weight"),
        *(
            "enc.8x8_down.skip.weight",
            "enc.8x8_aux_residual.weight",
            "enc.8x8_block0.qkv.1.weight",
            "dec.8x8_in0.proj.bias",
        ),
        *("dec.8x8_in1.affine.weight", "dec.8x8_block1.norm2.weight", "dec.16x16_up.conv1.weight"),
        *("dec.16x16_block1.skip.bias", "dec.16x16_aux_norm.bias", "dec.16x16_aux_conv.weight"),
    }
