"""Classes from the data to the network: what it makes of them, label dropout, samples of a class, distances by class."""

import dataclasses
import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import status_of
from data_helpers import pixels

import gddim
from experiments import points
from gddim.data import ArrayFile, ArraySource, class_counts
from gddim.data.labels import Labelled
from gddim.errors import UserError
from gddim.evaluation.cell import Cell, Evaluator
from gddim.evaluation.features import PixelFeatures
from gddim.evaluation.likelihood import bits_per_dimension
from gddim.evaluation.metrics import Moments
from gddim.evaluation.statistics import OF_CLASS, Statistics, compare, source_statistics
from gddim.evaluation.sweep import FLOOR, read_rows
from gddim.experiment import Evaluation, Experiment, Model, Sampling, Training
from gddim.experiment.plan import Plan
from gddim.experiment.workdir import describe
from gddim.loss import LogNormalNoise, drop_labels
from gddim.nn import DiTConfig, MLPConfig, NCSNppConfig
from gddim.samplers.inversion import Coder, interpolate, reconstruct
from gddim.samplers.method import Method
from gddim.samplers.numbered import sample_numbered
from gddim.samplers.solver import sharing

IMAGES = pixels(0, 32, 8, 8, 3)
LABELS = (np.arange(32) % 4).astype(np.int32)
NET = NCSNppConfig(width=8, multipliers=(1,), blocks=1, attention=(), dropout=0.0, embedding="positional", fir=False)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Colour images of four classes, or of none."""

    labels: bool = True
    shape = (8, 8, 3)

    @property
    def classes(self) -> int:
        return 4 * self.labels

    def train(self) -> ArraySource:
        return ArraySource({"x0": IMAGES, "label": LABELS} if self.labels else IMAGES)

    test = train


PICTURES = Experiment(
    name="pictures",
    sde=gddim.CLD(),
    net=NET,
    data=Pictures(),
    model=Model(data_std=0.6),
    train=Training(steps=2, batch=16, warmup=1),
    sampling=Sampling(samples=6, batch=8, nfe=3),
    eval=Evaluation(samples=16, batch=16, nfe=(3,), features="pixels", samplers=(gddim.GDDIM(2),)),
)


# Networks.


@pytest.mark.parametrize(
    ("config", "shape"),
    [(NET, (8, 8, 3)), (MLPConfig(width=8, depth=1), (2,)), (DiTConfig(width=8, depth=1, heads=2), (8, 8, 3))],
    ids=["ncsnpp", "mlp", "dit"],
)
def test_a_class_is_a_row_of_a_linear_map_and_none_is_zero(config, shape):
    net: Any = dataclasses.replace(config, classes=4).build(shape, shape[-1], jax.random.key(0))
    leaves, structure = jax.tree.flatten(net)  # of which some begin at zero
    filled = [jax.random.normal(jax.random.key(i), leaf.shape) / 4 for i, leaf in enumerate(leaves)]
    net = jax.tree.unflatten(structure, filled)
    x = jax.random.normal(jax.random.key(3), shape)
    call = eqx.filter_jit(lambda net, k: net(x, 0.3, {"label": k}))
    found = [call(net, jnp.int32(k)) for k in (-1, 0, 1, 2, 3)]
    np.testing.assert_allclose(found[0], eqx.filter_jit(lambda net: net(x, 0.3))(net), atol=1e-5)
    for a in range(5):
        for b in range(a):
            assert jnp.abs(found[a] - found[b]).max() > 1e-3
    moved = eqx.tree_at(lambda net: net.label.weight, net, net.label.weight.at[2].add(1.0))
    for k in (-1, 0, 1, 3):
        np.testing.assert_array_equal(call(moved, jnp.int32(k)), found[k + 1])
    assert jnp.abs(call(moved, jnp.int32(2)) - found[3]).max() > 1e-3
    with pytest.raises(ValueError, match="takes None or"):
        net(x, 0.3, {"size": jnp.int32(1)})
    with pytest.raises(ValueError, match="takes None"):
        config.build(shape, shape[-1], jax.random.key(0))(x, 0.3, {"label": jnp.int32(1)})


def test_the_data_say_how_many_classes_a_network_has():
    built: Any = lambda data: dataclasses.replace(PICTURES, data=data).build(jax.random.key(0)).net
    assert built(Pictures()).label.weight.shape[0] == 4
    assert built(Pictures(labels=False)).label is None
    for data, classes, says in (
        (Pictures(), 5, "net.classes 5: the data have 4"),
        (Pictures(labels=False), 4, "net.classes 4: the data have none, or are without --data.labels"),
    ):
        wrong = dataclasses.replace(PICTURES, net=dataclasses.replace(NET, classes=classes), data=data)
        with pytest.raises(UserError, match=says):
            wrong.build(jax.random.key(0))


def test_what_is_not_asked_for_is_not_told():
    told = describe(dataclasses.replace(PICTURES, data=Pictures(labels=False)))
    assert not {"label_dropout"} & set(told["train"])
    assert not {"classes", "per_class"} & set(told["sampling"])
    assert "classes" not in told["net"]
    assert "classes" not in describe(MLPConfig())


# Label dropout.


def test_label_dropout_follows_from_each_row_s_key_and_changes_nothing_else():
    rows = LogNormalNoise().rows(jnp.zeros((4000, 2)), jax.random.key(5), {"label": jnp.arange(4000) % 4})
    dropped = drop_labels(rows, 0.25)
    gone = np.asarray(dropped.cond["label"]) == -1
    assert 0.22 < gone.mean() < 0.28
    np.testing.assert_array_equal(dropped.cond["label"][~gone], rows.cond["label"][~gone])
    np.testing.assert_array_equal(dropped.noise, rows.noise)
    part = jax.tree.map(lambda x: x[1000:1500], rows)
    np.testing.assert_array_equal(drop_labels(part, 0.25).cond["label"], dropped.cond["label"][1000:1500])
    assert drop_labels(rows, 0.0) is rows
    by_class = [gone[np.arange(4000) % 4 == k].mean() for k in range(4)]
    assert max(by_class) - min(by_class) < 0.1


def test_a_step_of_training_drops_labels():
    plan = Plan(dataclasses.replace(PICTURES, train=dataclasses.replace(PICTURES.train, label_dropout=0.5)))
    batch = {"x0": jnp.asarray(IMAGES), "label": jnp.asarray(LABELS)}
    label = plan.prepare(batch, jax.random.key(0), False).cond["label"]
    assert 4 < int((label == -1).sum()) < 28
    whole = Plan(PICTURES).prepare(batch, jax.random.key(0), False)
    np.testing.assert_array_equal(whole.cond["label"], LABELS)
    without = dataclasses.replace(PICTURES, data=Pictures(labels=False), train=plan.experiment.train)
    with pytest.raises(UserError, match=r"train.label_dropout 0.5: the data are without labels: give --data.labels"):
        Plan(without)


# Samples.


def says_its_class(x, level, cond=None, *, key=None):
    return jnp.full_like(x, 0.25) * (cond["label"].astype(x.dtype) if cond else -1.0)


@pytest.mark.parametrize("make", [gddim.EpsModel, gddim.Denoiser])
def test_sample_i_is_of_the_class_that_it_is_given(make):
    model, numbers = make(gddim.VP(), says_its_class), jnp.arange(4)
    solver = Method(gddim.GDDIM(2), 4, 2.0, 1e-3, "none").solver(model.sde)

    def drawn(*classes: int):
        cond = {"label": jnp.array(classes, jnp.int32)} if classes else None
        return sample_numbered(model, solver, (4, 4, 3), jnp.asarray(0), numbers, cond=cond).data

    found = {k: drawn(k, k, k, k) for k in (-1, 0, 2)}
    np.testing.assert_allclose(found[-1], drawn(), atol=1e-5)
    for x, i, k in zip(drawn(2, 0, 2, -1), range(4), (2, 0, 2, -1), strict=True):
        np.testing.assert_allclose(x, found[k][i], atol=1e-6)
    assert jnp.abs(found[2] - found[0]).min() > 1e-3


def test_samples_are_of_all_classes_in_turn_or_of_those_that_are_asked():
    def drawn(**settings: Any) -> list[int]:
        found = PICTURES.drawn_classes(Sampling(samples=6, **settings))
        assert found is not None
        return found.tolist()

    assert drawn() == [0, 1, 2, 3, 0, 1]
    assert drawn(classes=(3, -1)) == [3, -1, 3, -1, 3, -1]
    assert drawn(per_class=2) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert drawn(classes=(2, 0), per_class=3) == [2, 2, 2, 0, 0, 0]
    plain = dataclasses.replace(PICTURES, data=Pictures(labels=False))
    assert plain.drawn_classes(Sampling()) is None
    wrong: list[tuple[Experiment, dict[str, Any], str]] = [
        (plain, {"classes": (3, 5)}, "sampling.classes 3 5: this run knows no classes; train one with --data.labels"),
        (plain, {"per_class": 10}, "sampling.per_class 10: this run knows no classes; train one with --data.labels"),
        (PICTURES, {"classes": (0, 4, -2)}, "sampling.classes 4 -2: accepted are 0 to 3, and -1 for no class"),
    ]
    for experiment, settings, says in wrong:
        with pytest.raises(UserError, match=says):
            experiment.drawn_classes(Sampling(**settings))
    with pytest.raises(UserError, match="per_class must be at least 0, not -1"):
        Sampling(per_class=-1)


def test_likelihood_and_latents_of_a_record_are_those_under_its_class():
    x = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    labels, keys, grid = (
        np.array([0, 2, 2, 0], np.int32),
        jax.random.split(jax.random.key(0), 4),
        np.linspace(0.9, 0.01, 9),
    )
    cond = {"label": jnp.asarray(labels)}

    def of(model: gddim.Denoiser, source: ArraySource, cond: Any, pair: Any) -> list[np.ndarray]:
        coder = Coder.of(model, grid, 2)
        between = interpolate(coder, jnp.asarray(x[:2]), jnp.asarray(x[2:]), 3, keys[:2], pair)
        return [
            bits_per_dimension(model, source, batch=4, t_min=0.01, rtol=1e-3, atol=1e-3).each,
            np.asarray(reconstruct(coder, jnp.asarray(x), keys, cond).latents),
            np.asarray(between)[:, [0, 2]],
        ]

    pair = ({"label": cond["label"][:2]}, {"label": cond["label"][2:]})
    bits, latents, between = of(
        gddim.Denoiser(gddim.VP(), says_its_class), ArraySource({"x0": x, "label": labels}), cond, pair
    )
    ends = labels.reshape(2, 2).T
    for k in (0, 2):
        fixed = lambda x, level, cond=None, *, key=None, k=k: says_its_class(x, level, {"label": jnp.int32(k)})
        alone = of(gddim.Denoiser(gddim.VP(), fixed), ArraySource(x), None, (None, None))
        np.testing.assert_allclose(bits[labels == k], alone[0][labels == k], rtol=1e-3)
        np.testing.assert_allclose(latents[labels == k], alone[1][labels == k], atol=1e-4)
        np.testing.assert_allclose(between[ends == k], alone[2][ends == k], atol=1e-4)
        assert np.abs(latents - alone[1])[labels != k].min() > 1e-3


# A run.

WORDS = [
    *("--train.steps=4", "--train.batch=16", "--train.warmup=1", "--net.width=16", "--net.depth=1"),
    *("--data.train-points=200", "--data.test-points=100", "--sampling.batch=8", "--sampling.nfe=3"),
    *("--eval.samples=50", "--eval.batch=50", "--eval.nfe=3", "--eval.samplers=gddim:2"),
]


def test_a_run_with_labels_from_training_to_its_table(tmp_path, capsys):
    workdir, labels = tmp_path / "w", ["--data.labels", "--train.label-dropout=0.1"]
    do = lambda *words: status_of(points.EXPERIMENT, *words, f"--workdir={workdir}", *WORDS)
    assert do("run", *labels, "--sampling.classes", "7") == 2
    assert not workdir.exists(), "refused before anything is written"
    assert do("train", *labels) == 0, capsys.readouterr().err
    config = json.loads((workdir / "config.json").read_text())
    assert (config["data"]["labels"], config["train"]["label_dropout"], config["records"]["classes"]) == (True, 0.1, 5)
    assert do("sample", "--classes", "3", "-1", "--per-class=4") == 0
    with np.load(workdir / "samples.npz", allow_pickle=False) as file:
        assert file["labels"].tolist() == [3] * 4 + [-1] * 4
        drawn = file["samples"]
    assert do("evaluate") == 0
    model = gddim.load(workdir)
    three = model.sample(4, classes=[3, 3, 3, 3])
    np.testing.assert_allclose(three, drawn[:4], atol=1e-5)
    assert np.abs(model.sample(4, classes=[1, 1, 1, 1]) - three).max() > 1e-6
    np.testing.assert_allclose(model.sample(4), model.sample(4, classes=[0, 1, 2, 3]), atol=1e-5)
    with pytest.raises(UserError, match="this run knows none"):
        dataclasses.replace(model, classes=0).sample(4, classes=[0, 0, 0, 0])
    table = (workdir / "results.md").read_text()
    assert f"only 50 samples, by class at NFE 3 | {' | '.join(f'class {k}' for k in range(5))} |" in table
    assert do("evaluate", "--eval.balance=data") == 0
    rows = [row["provenance"] for row in read_rows(workdir / "results.jsonl") if row["cell"]["sampler"] != FLOOR]
    assert [row["classes"] for row in rows] == ["i mod 5", "as the data"]
    capsys.readouterr()
    for words, says in (
        (["sample", "--data.no-labels"], "data.labels: the run has true, this command none"),
        (["sample", "--sampling.classes", "7"], "sampling.classes 7: accepted are 0 to 4, and -1"),
        (["train", "--data.labels"], "train.label_dropout: the run has 0.1, this command none"),
    ):
        assert do(*words) == 2
        assert says in capsys.readouterr().err


def test_what_follows_training_needs_no_data_to_know_the_classes(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS)
    workdir, data = tmp_path / "w", ArrayFile(str(tmp_path / "a.npz"), labels=True)
    experiment = dataclasses.replace(PICTURES, data=data)
    assert status_of(experiment, "train", f"--workdir={workdir}") == 0
    (tmp_path / "a.npz").unlink()
    assert status_of(experiment, "sample", f"--workdir={workdir}", "--sampling.per-class=2") == 0
    with np.load(workdir / "samples.npz", allow_pickle=False) as file:
        assert file["labels"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert file["samples"].shape == (8, 8, 8, 3)


# Evaluation.


def test_statistics_of_classes_are_those_of_their_samples_however_cut(tmp_path):
    space, features = PixelFeatures(), np.random.default_rng(0).normal(size=(40, 3))
    labels = np.arange(40) % 4
    whole = Statistics.of(features, space, 0, {"features": "pixels"}, labels)
    parts = [Statistics.of(features[a:b], space, a, {"features": "pixels"}, labels[a:b]) for a, b in ((0, 2), (2, 40))]
    cut = parts[0].then(parts[1])
    cut.save(tmp_path / "s.npz")
    for found in (whole, cut, Statistics.load(tmp_path / "s.npz")):
        assert set(found.classes) == {0, 1, 2, 3}
        for k, moments in found.classes.items():
            alone = Moments.of(features[labels == k])
            assert moments.count == alone.count == 10
            np.testing.assert_allclose(moments.mean, alone.mean)
            np.testing.assert_allclose(moments.scatter, alone.scatter)


def test_distances_by_class_tell_which_class_is_missed():
    """Samples of class 1 are right, and those of class 0 are of class 1."""
    rng, space = np.random.default_rng(1), PixelFeatures()
    labels = (np.arange(400) % 2).astype(np.int32)
    data = (rng.normal(size=(400, 2)) + 10 * labels[:, None]).astype(np.float32)
    reference = source_statistics(ArraySource({"x0": data, "label": labels}), space, "two", progress=False)
    samples = Statistics.of(rng.normal(size=(200, 2)) + 10, space, 0, reference.origin, np.arange(200) % 2)
    found = compare(samples, reference, ("frechet",))
    assert set(found) == {"frechet", f"{OF_CLASS}0", f"{OF_CLASS}1"}
    assert found[f"{OF_CLASS}1"] < 0.3 < 30 < found["frechet"] < found[f"{OF_CLASS}0"]


def test_samples_of_an_evaluation_are_as_many_of_each_class():
    model = gddim.Denoiser(gddim.VP(), says_its_class)
    labels = (np.arange(60) % 3).astype(np.int32)
    source = ArraySource({"x0": np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32), "label": labels})
    reference = source_statistics(source, PixelFeatures(), "points", progress=False)
    evaluator = Evaluator(model, (2,), PixelFeatures(), reference, {}, classes=3, batch=8)
    cell, kept = Cell(Method(gddim.GDDIM(1), 3, 2.0, 1e-3, "none"), 14), {}
    row = evaluator.run(cell, keep=lambda first, x: kept.update({first: x}))
    assert {f"{OF_CLASS}{k}" for k in range(3)} <= set(row["metrics"])
    numbers, solver = jnp.arange(16), sharing(cell.method.solver(model.sde))
    alone = sample_numbered(model, solver, (2,), jnp.asarray(0), numbers, cond={"label": numbers % 3}).data
    np.testing.assert_allclose(np.concatenate([kept[0], kept[8]]), alone[:14], atol=1e-5)


def test_samples_of_an_evaluation_may_be_as_often_of_each_class_as_the_data():
    labels = np.repeat(np.arange(4, dtype=np.int32), (100, 0, 250, 50))
    for source in (ArraySource({"x0": np.zeros((400, 2), np.float32), "label": labels}),
                   Labelled(ArraySource(np.zeros((400, 2), np.float32)), labels)):  # fmt: skip
        counts = class_counts(source, 5)
        assert counts.tolist() == [100, 0, 250, 50, 0]
    reference = source_statistics(ArraySource(np.zeros((8, 2), np.float32)), PixelFeatures(), "points", progress=False)
    evaluator = Evaluator(
        gddim.Denoiser(gddim.VP(), says_its_class), (2,), PixelFeatures(), reference, {}, 8, None, 5, counts
    )
    numbers = np.arange(1000, dtype=np.int32)
    np.testing.assert_allclose(np.bincount(evaluator._labels(numbers)), [250, 0, 625, 125], atol=3)
    np.testing.assert_array_equal(evaluator._labels(numbers[300:310]), evaluator._labels(numbers)[300:310])
    assert evaluator.origin["classes"] == "as the data"
