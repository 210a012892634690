"""Options of published networks: each is read, can be told, or is refused in one line; none is passed over."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from checkpoint_files import (
    diffusers_folder,
    edm_net,
    edm_tree,
    options_of,
    pickled,
    refused,
    score_sde_state,
    tensor,
    write_zip,
)

import gddim
from gddim import convert
from gddim.nn import NCSNppConfig
from gddim.nn.blocks import Block
from gddim.nn.layers import Draw
from gddim.safetensors import parse

TINY = NCSNppConfig(width=4, multipliers=(1, 2), blocks=1, attention=(16,))


def test_sums_are_divided_by_the_square_root_of_two_or_not(tmp_path):
    """skip_rescale, which no file tells: a block, its attention and the input on its way down."""
    x, time = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(8, 8, 8), (16,)]))
    for attend in (False, True):
        blocks = [
            Block(8, 8, dataclasses.replace(TINY, rescale=rescale), draw=Draw(jax.random.key(2)), attend=attend)
            for rescale in (True, False)
        ]
        # with fresh parameters the branches are nothing: what is left is the shortcut
        divided, plain = (np.asarray(block(x, time)) for block in blocks)
        np.testing.assert_allclose(plain, divided * math.sqrt(2) ** (1 + attend), atol=1e-5)


def test_the_command_is_told_that_sums_are_not_divided(tmp_path, capsys):
    net = TINY.build((32, 32, 3), 3, jax.random.key(0))
    path = write_zip(tmp_path / "x.pth", *score_sde_state(net, np.geomspace(30, 0.01, 9)))
    assert "(--net.no-rescale)" in convert.read(path).told
    assert convert.main([str(path), str(tmp_path / "run"), "--net.no-rescale"]) == 0
    assert '"rescale": false' in (tmp_path / "run" / "config.json").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"skip_scale": 1.0}, "options that are not known: ['skip_scale']"),
        ({"num_heads": 2}, "options that are not known: ['num_heads']"),
    ],
)
def test_options_of_edm_that_are_not_known_are_refused(tmp_path, options, said):
    config, net = edm_net()
    path = tmp_path / "x.pkl"
    path.write_bytes(pickled(edm_tree(net, "SongUNet", options_of(config, 16, **options), sigma_data=0.5), 4))
    assert said in refused(path)


@pytest.mark.parametrize(
    ("options", "schedule", "said"),
    [
        ({"mystery": 1}, {}, "options that are not known: mystery"),
        ({"mid_block_type": None}, {}, "its mid_block_type is None"),
        ({"sample_size": None}, {}, "its sample_size is None"),
        ({}, {"_class_name": "ScoreSdeVeScheduler"}, "its scheduler is ScoreSdeVe"),
        ({}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "its scheduler is FlowMatchEulerDiscrete"),
        ({}, {"rescale_betas_zero_snr": True}, "betas rescaled"),
    ],
)
def test_options_of_diffusers_that_are_not_read_are_refused(tmp_path, options, schedule, said):
    folder = diffusers_folder(tmp_path / "unet", edm_net(style="ddpm", groups=4)[1], **options)
    (folder / "scheduler_config.json").write_text(json.dumps(schedule))
    assert said in refused(folder)


@pytest.mark.parametrize(
    ("kind", "ends"), [("DDPM", (1e-4, 0.02)), ("HeunDiscrete", (0.00085, 0.012)), ("KDPM2Discrete", (0.00085, 0.012))]
)
def test_betas_that_a_schedule_does_not_say_are_those_of_its_kind(tmp_path, kind, ends):
    folder = diffusers_folder(tmp_path / "unet", edm_net(style="ddpm", groups=4)[1])
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": f"{kind}Scheduler"}))
    assert convert.read(folder).experiment.sde == gddim.VP.from_betas(np.linspace(*ends, 1000))


def test_a_folder_of_diffusers_as_others_write_it(tmp_path):
    """Pickled weights, attention's older names, sides one by one, a pipeline's U-Net, and none of its schedule."""
    config, net = edm_net(style="ddpm", groups=4)
    unet = diffusers_folder(tmp_path / "pipeline" / "unet", net, sample_size=[16, 16], act_fn="swish")
    arrays, _ = parse((unet / "diffusion_pytorch_model.safetensors").read_bytes())
    older = {name.replace(".to_q.", ".query.").replace(".to_out.0.", ".proj_attn."): x for name, x in arrays.items()}
    assert older.keys() != arrays.keys()
    keys = {name: str(i) for i, name in enumerate(older)}
    strides = {name: tuple(step // 4 for step in x.strides) for name, x in older.items()}
    tree = {name: tensor(keys[name], x.shape, strides[name], x.size) for name, x in older.items()}
    write_zip(unet / "diffusion_pytorch_model.bin", tree, {keys[name]: x.tobytes() for name, x in older.items()})
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    found = convert.read(unet)
    assert found.experiment.net == config
    for mine, other in zip(jax.tree.leaves(net), jax.tree.leaves(found.model.net), strict=True):
        np.testing.assert_array_equal(other, mine)
    scheduler = unet.parent / "scheduler"
    scheduler.mkdir()
    (unet / "scheduler_config.json").rename(scheduler / "scheduler_config.json")
    assert convert.read(unet).experiment.sde == convert.read(unet.parent).experiment.sde == found.experiment.sde
    (scheduler / "scheduler_config.json").unlink()
    assert "taken for one of DDPM's schedule" in convert.read(unet).told
    (unet.parent / "vqvae").mkdir()
    for folder in (unet, unet.parent):
        assert "latent: beside it is a vqvae" in refused(folder)
