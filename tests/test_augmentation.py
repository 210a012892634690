"""EDM's augmentation: what it does to images, what the network is told of it, and a run with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import status_of
from runs import COLOUR, NET, Colours

import gddim
from experiments import points
from gddim.data import NUMBERS, augmented
from gddim.experiment.plan import Plan
from gddim.nn import DiTConfig

SIDES = (12, 9)


def smooth(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A colour image that goes on beyond its borders as their reflection, at any place."""
    down, across = np.pi * rows / (SIDES[0] - 1), np.pi * columns / (SIDES[1] - 1)
    return np.stack([np.cos(down) + np.cos(across), np.cos(down) * np.cos(across), np.cos(2 * down)], -1) / 2


IMAGE = smooth(*np.indices(SIDES)).astype(np.float32)
COUNT = 400
IMAGES = jnp.asarray(np.broadcast_to(IMAGE, (COUNT, *IMAGE.shape)))
augment = jax.jit(lambda share: augmented(IMAGES, jax.random.split(jax.random.key(0), COUNT), share))


def test_of_no_share_images_are_themselves_bit_for_bit():
    images, told = augment(0.0)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(told, np.zeros((COUNT, NUMBERS)))


def test_mirror_images_are_exact_and_told():
    images, told = map(np.asarray, augment(0.12))
    assert 0.4 < told[:, 0].mean() < 0.6
    assert 0.02 < told[:, 1].mean() < 0.11, "half of a share"
    only = (told[:, 2:] == 0).all(1)
    assert 0.5 < only.mean() < 0.7
    for image, (across, down, *_) in zip(images[only], told[only], strict=True):
        expected = IMAGE[:, ::-1] if across else IMAGE
        np.testing.assert_array_equal(image, expected[::-1] if down else expected)


def published(told: np.ndarray, sign: int) -> np.ndarray:
    """The inverse transformation of numbers as they are published, of which one does not tell the sign of the stretching."""
    mirrored, upset, scale, cos, sin, along, over, across, down = told
    scaled = lambda x, y: np.diag([x, y, 1.0])
    turned = lambda a: np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    stretch, direction = sign * np.hypot(along, over), np.arctan2(sign * over, sign * along)
    s, t, move = 2 ** (0.2 * scale), 2 ** (0.2 * stretch), np.eye(3)
    move[:2, 2] = -across * SIDES[1] / 8, -down * SIDES[0] / 8
    back = scaled(1 / s, 1 / s) @ turned(np.arctan2(sin, cos + 1))
    back = back @ turned(-direction) @ scaled(1 / t, t) @ turned(direction) @ move
    return scaled(1 - 2 * mirrored, 1 - 2 * upset) @ back


def test_the_numbers_say_what_was_done_as_published():
    images, told = map(np.asarray, augment(1.0))
    rows, columns = np.indices(SIDES) - (np.array(SIDES)[:, None, None] - 1) / 2
    places = np.stack([columns, rows, np.ones(SIDES)])
    for image, numbers in zip(images, told, strict=True):
        found = []
        for sign in (1, -1):
            x, y, _ = np.einsum("ij,jab->iab", published(numbers, sign), places)
            expected = smooth(y + (SIDES[0] - 1) / 2, x + (SIDES[1] - 1) / 2)
            found.append(np.abs(image - expected).max())
        assert min(found) < 0.02
    np.testing.assert_allclose(told[:, 2].std(), 1, atol=0.12)
    np.testing.assert_allclose(np.hypot(told[:, 3] + 1, told[:, 4]), 1, atol=1e-5)
    np.testing.assert_allclose(told[:, 7:].std(0), 1, atol=0.12)
    assert 0.4 < (told[:, 6] == 0).mean() < 0.6, "every second stretching is along a side"


@pytest.mark.parametrize("config", [NET, DiTConfig(width=16, depth=1, heads=2)], ids=["ncsnpp", "dit"])
def test_a_network_hears_of_it_by_a_linear_map_which_of_nothing_is_nothing(config):
    net = dataclasses.replace(config, augment=NUMBERS, classes=3).build((8, 8, 3), 3, jax.random.key(0))
    net = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), net)
    x, told = jax.random.normal(jax.random.key(1), (8, 8, 3)), jnp.arange(9.0) / 9
    call = jax.jit(lambda cond: net(x, 0.3, cond))
    one = {"label": jnp.int32(1)}
    np.testing.assert_allclose(call(one | {"augment": 0 * told}), call(one), atol=1e-6)
    np.testing.assert_allclose(call({"augment": 0 * told}), call(None), atol=1e-6)
    assert jnp.abs(call({"augment": told}) - call(None)).max() > 1e-2
    with pytest.raises(ValueError, match=r'takes None or \{"label": class, "augment": 9 numbers\}'):
        net(x, 0.3, {"augment": told[:4]})


def test_a_step_tells_the_network_and_a_run_needs_it_no_more_once_it_samples(tmp_path, capsys):
    words = [f"--workdir={tmp_path / 'w'}", "--train.augment=0.5"]
    assert status_of(COLOUR, "train", *words) == 0
    assert status_of(COLOUR, "sample", words[0], "--sampling.nfe=3") == 0
    unit = gddim.data_scale(Colours().shape)
    assert f" by gddim:3:free:data:data_std={unit}@tuned: NFE 3" in capsys.readouterr().out
    with np.load(tmp_path / "w" / "samples.npz", allow_pickle=False) as file:
        found = gddim.load(tmp_path / "w").sample(8, nfe=3)
        np.testing.assert_allclose(gddim.data.to_uint8(found).astype(int), file["samples"].astype(int), atol=1)
    experiment = dataclasses.replace(COLOUR, train=dataclasses.replace(COLOUR.train, augment=0.5))
    batch = jnp.asarray(Colours().train()[np.arange(8)])
    rows = Plan(experiment).prepare(batch, jax.random.key(0), True)
    assert rows.cond["augment"].shape == (8, NUMBERS)
    none = Plan(COLOUR).prepare(batch, jax.random.key(0), False)
    np.testing.assert_array_equal(rows.noise, none.noise)
    moved = np.abs(rows.x0 - none.x0).max((1, 2, 3)) > 0
    np.testing.assert_array_equal(moved, (rows.cond["augment"] != 0).any(1))
    assert status_of(COLOUR, "train", words[0]) == 2
    assert "train.augment: the run has 0.5, this command none" in capsys.readouterr().err


def test_what_cannot_be_augmented_is_one_line(tmp_path, capsys):
    for experiment, word, says in (
        (points.EXPERIMENT, "0.1", "train.augment 0.1: it is of images (H, W, C), and these are records (2,)"),
        (COLOUR, "1.5", "augment must be in [0, 1], not 1.5"),
        (COLOUR, "0.1 --net.augment=4", "net.augment 4: train.augment makes 9 numbers"),
    ):
        argv = ["train", f"--workdir={tmp_path / 'w'}", *f"--train.augment={word}".split()]
        assert status_of(experiment, *argv) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
