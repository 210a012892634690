"""Records that are dictionaries: from the source through pipeline, fused steps, parts of a batch and shards to the network."""

import dataclasses
from pathlib import Path

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import make_run

import gddim
from gddim.data import ArraySource, Source, batches, data_alone, identity, moments, prefetch, prepare, spectrum
from gddim.errors import UserError
from gddim.experiment import Evaluation, Experiment, Model, Training
from gddim.experiment.cli import main
from gddim.experiment.measure import held_out
from gddim.experiment.plan import Plan
from gddim.nn import NCSNppConfig
from gddim.parallel import MeshConfig, global_batch
from gddim.train import TrainState, next_step

COUNT, BATCH = 32, 16
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
LABELS = IMAGES[:, 0, 0, 0].astype(np.int64) % 5  # an image tells its label, mirrored or not
IMAGES[:, 0, -1, 0] = IMAGES[:, 0, 0, 0]


class Classes(eqx.Module):
    """A linear map of each pixel, a number for the class, and one for the level."""

    weight: jax.Array
    table: jax.Array

    def __call__(self, x, level, cond=None, *, key=None):
        label = 0 if cond is None else cond["label"]
        return x @ self.weight + self.table[label][None, None] / (1 + level**2)


@dataclasses.dataclass(frozen=True)
class ClassesConfig:
    """A network that is told the class."""

    classes: int = 5
    """How many there are."""

    def build(self, in_shape, out_channels, key):
        weight, table = jax.random.split(key)
        return Classes(
            0.1 * jax.random.normal(weight, (in_shape[-1], out_channels), jnp.float32),
            jax.random.normal(table, (self.classes, out_channels), jnp.float32),
        )


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Colour images with their classes."""

    shape = (8, 8, 3)
    cond = {"label": np.int64(0)}

    def train(self) -> Source:
        return ArraySource({"x0": IMAGES, "label": LABELS}, flip=True)

    def test(self) -> Source:
        return self.train()


class Read:
    """A source that is no array, which Grain's threads read."""

    shape, dtype, flip = IMAGES.shape[1:], IMAGES.dtype, True

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, indices):
        return {"x0": IMAGES[indices], "label": LABELS[indices]}


PICTURES = Experiment(
    name="pictures",
    sde=gddim.CLD(),
    net=ClassesConfig(),
    data=Pictures(),
    model=Model(data_std=0.6),
    train=Training(steps=2 * COUNT // BATCH, batch=BATCH, warmup=1, ema=0.9, learning_rate=0.05),
    eval=Evaluation(samples=16, batch=16, nfe=(4,), features="pixels", samplers=(gddim.GDDIM(2),)),
)


def change(**settings) -> Experiment:
    return dataclasses.replace(PICTURES, train=dataclasses.replace(PICTURES.train, **settings))


def run(experiment: Experiment, source: Source) -> TrainState:
    """Two epochs."""
    plan, settings, step = Plan(experiment), experiment.train, 0
    rows = batches(source, settings.batch, experiment.seed)

    def groups():
        for start in range(0, settings.steps, settings.fused):
            group = [next(rows) for _ in range(next_step(start, settings.steps, settings.fused) - start)]
            yield group if settings.fused > 1 else group[0]

    update = plan.update(flip=source.flip)
    leaves, structure = jax.tree.flatten(plan.init())
    for batch in prefetch(groups(), lambda group: global_batch(group, plan.mesh)):
        leaves, _ = update(leaves, batch)
        step += settings.fused
    assert step == settings.steps
    return structure.unflatten(leaves)


@pytest.fixture(scope="module")
def plain() -> TrainState:
    return run(PICTURES, Pictures().train())


@pytest.mark.parametrize("source", [Pictures().train(), Read()], ids=["memory", "read"])
def test_every_record_comes_once_an_epoch_with_its_own_label(source):
    rows = batches(source, BATCH, seed=3)
    found = [next(rows) for _ in range(2 * COUNT // BATCH)]
    for epoch in (found[: COUNT // BATCH], found[COUNT // BATCH :]):
        images, labels = (np.concatenate([batch[name] for batch in epoch]) for name in ("x0", "label"))
        assert sorted(map(bytes, images)) == sorted(map(bytes, IMAGES))
        np.testing.assert_array_equal(labels, images[:, 0, 0, 0] % 5)
    alone = batches(ArraySource(IMAGES), BATCH, seed=3)
    for batch in found:
        np.testing.assert_array_equal(batch["x0"], next(alone))
    parts = [next(batches(source, BATCH, 3, 0, index, 2)) for index in range(2)]
    chex.assert_trees_all_equal(jax.tree.map(lambda *part: np.concatenate(part), *parts), found[0])


@pytest.mark.parametrize(
    ("other", "source"),
    [
        (change(accumulate=2), Pictures().train()),
        (change(fused=2), Pictures().train()),
        (change(fused=4, accumulate=2), Read()),
        (dataclasses.replace(change(accumulate=2, fused=2), mesh=MeshConfig(data=2, fsdp=4)), Pictures().train()),
    ],
    ids=["accumulated", "fused", "both, read", "both, 2x4 devices"],
)
def test_how_the_work_is_cut_changes_nothing_but_rounding(plain, other, source):
    assert jax.device_count() == 8
    found = run(other, source)
    for part in ("model", "ema"):
        chex.assert_trees_all_close(getattr(found, part), getattr(plain, part), atol=1e-5)


def test_the_labels_are_trained_on(plain):
    """Another label of the same images is another gradient, and a class that never comes is not moved."""
    swapped = run(PICTURES, ArraySource({"x0": IMAGES, "label": LABELS[::-1]}, flip=True))
    assert np.abs(swapped.model.net.table - plain.model.net.table).max() > 1e-3
    fresh = Plan(PICTURES).init().model.net.table
    ones = run(PICTURES, ArraySource({"x0": IMAGES, "label": np.ones(COUNT, np.int32)}, flip=True)).model.net.table
    np.testing.assert_array_equal(ones[2:], fresh[2:])
    assert np.all(ones[1] != fresh[1])


def test_a_dictionary_of_data_alone_is_the_data_bit_for_bit():
    found = run(PICTURES, ArraySource({"x0": IMAGES}, flip=True))
    chex.assert_trees_all_equal(found, run(PICTURES, ArraySource(IMAGES, flip=True)))


def test_each_device_has_its_own_rows_of_every_array():
    plan = Plan(PICTURES)
    batch = {"x0": IMAGES[:16], "label": LABELS[:16]}
    placed = global_batch(batch, plan.mesh)
    for name, whole in batch.items():
        assert {shard.data.shape[0] for shard in placed[name].addressable_shards} == {2}
        np.testing.assert_array_equal(placed[name], whole)


def test_costs_are_known_before_a_record_is_read():
    plan = Plan(PICTURES)
    assert plan.image_flops() > 0
    assert plan.step_flops() > 0
    assert plan.activation_bytes() > 0


def test_the_whole_job_takes_records_with_labels(tmp_path: Path, capsys):
    """Trained with them, in two parts and one dispatch, and evaluated on the images alone."""
    argv = ["--workdir", str(tmp_path), "--train.accumulate", "2", "--train.fused", "2", "--sampling.samples", "8"]
    with pytest.raises(SystemExit) as stop:
        main(PICTURES, ["run", *argv])
    assert stop.value.code == 0, capsys.readouterr().err
    assert {"results.md", "samples.npz"} <= {path.name for path in tmp_path.iterdir()}


def test_a_network_of_labels_that_are_no_classes_is_loaded_without_its_data(tmp_path: Path):
    net = NCSNppConfig(
        width=8, multipliers=(1,), blocks=1, attention=(), dropout=0.0, embedding="positional", classes=5
    )
    run = make_run(tmp_path / "w", dataclasses.replace(PICTURES, net=net), (1,))
    assert gddim.load(run).sample(2, nfe=2).shape == (2, 8, 8, 3)
    assert gddim.load(run, data=Pictures()).shape == (8, 8, 3)


def test_the_batch_of_training_is_not_that_of_samples():
    plan = Plan(change(batch=6))
    with pytest.raises(UserError, match="batch 6 cannot be split over 8"):
        plan.check_batch()


# What a record is.


def test_held_out_records_keep_what_conditions_them_be_it_a_class_or_not():
    records = held_out(PICTURES)[np.array([3, 1])]
    np.testing.assert_array_equal(records["label"], LABELS[[3, 1]])


def test_the_data_alone_are_what_is_measured():
    for source in (Pictures().train(), Read()):
        alone = data_alone(source)
        np.testing.assert_array_equal(alone[np.array([3, 1])], IMAGES[[3, 1]])
        assert (len(alone), alone.shape, alone.dtype, alone.flip) == (COUNT, (8, 8, 3), np.uint8, True)
        assert moments(source) == moments(ArraySource(IMAGES))
        np.testing.assert_array_equal(spectrum(source), spectrum(ArraySource(IMAGES)))
    images = ArraySource(IMAGES)
    assert data_alone(images) is images


def test_rows_pick_from_every_array():
    source = ArraySource({"x0": IMAGES, "label": LABELS}, rows=np.arange(9, 3, -1))
    found = source[np.array([0, 5])]
    np.testing.assert_array_equal(found["x0"], IMAGES[[9, 4]])
    np.testing.assert_array_equal(found["label"], LABELS[[9, 4]])
    np.testing.assert_array_equal(data_alone(source)[np.array([0, 5])], IMAGES[[9, 4]])


def test_a_label_is_part_of_what_a_data_set_is():
    known = identity(Pictures().train())
    assert identity(Read()) == known
    labels = LABELS.copy()
    labels[7] += 1
    changed = [
        {"x0": IMAGES, "label": labels},
        {"x0": IMAGES, "label": LABELS.astype(np.int32)},
        {"x0": IMAGES, "class": LABELS},
        {"x0": IMAGES},
        IMAGES,
    ]
    digests = {identity(ArraySource(records, flip=True))["digest"] for records in changed}
    assert len(digests | {known["digest"]}) == 6


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ({"image": IMAGES, "label": LABELS}, "need 'x0', the data, beside image, label"),
        ({"x0": IMAGES, "label": LABELS[:9]}, r"'label' must be numbers of each of 32 records, not int64 \(9,\)"),
        ({"x0": IMAGES, "label": LABELS.astype(str)}, "'label' must be numbers of each of 32 records, not <U"),
    ],
    ids=["no data", "too few", "words"],
)
def test_what_is_no_record_is_refused(records, says):
    with pytest.raises(UserError, match=says):
        ArraySource(records)


def test_shards_hold_arrays_and_classes_alone(tmp_path: Path):
    with pytest.raises(UserError, match="one array a record, and its label, an int32; these are x0 uint8, label int64"):
        prepare(Pictures(), tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
