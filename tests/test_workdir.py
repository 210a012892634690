"""What may differ between a run and the command that goes on with it: its fields say so themselves."""

import dataclasses
import json

import pytest

from experiments import cld_cifar10, points, points_vp
from gddim.data import CelebA, ImageFolder
from gddim.experiment.cli import main
from gddim.experiment.workdir import describe, differences, may_change
from gddim.nn import MLPConfig
from gddim.settings import MAY_CHANGE, MAY_CHANGE_AFTER

RUN = dataclasses.replace(cld_cifar10.EXPERIMENT, data=ImageFolder("here", 32))
EVERY = {"report_every", "show_every", "snapshot_every", "save_every", "keep_every"}
TRAIN = {"steps", "minutes", "accumulate", "fused", "keep", *EVERY}


def test_a_run_goes_on_with_whatever_changes_no_gradient():
    free = may_change(RUN)
    top = {name for name in free if "." not in name}
    assert top == {"sampling", "sampler", "process", "guide", "fit", "eval", "mesh", "rule", "weights"}
    inner = {name for name in free if name.partition(".")[0] not in top}
    assert inner == {f"train.{name}" for name in TRAIN} | {
        *("net.remat", "net.scan_blocks", "data.path", "data.skip_damaged")
    }


def test_a_trained_run_is_measured_with_whatever_shapes_no_parameter():
    more = may_change(RUN, after=True) - may_change(RUN)
    assert {name for name in more if not name.startswith("train.")} == {"train", "seed", "net.dtype", "net.dropout"}
    assert more >= {"train.batch", "train.learning_rate"}
    assert "data.root" in may_change(dataclasses.replace(RUN, data=CelebA()))


@dataclasses.dataclass(frozen=True)
class Inner:
    """A part of a network's configuration."""

    tiles: int = 1
    heads: int = 1


@dataclasses.dataclass(frozen=True)
class Net:
    """A network of somebody else, which brings its own marks."""

    width: int = 8
    kernel: str = dataclasses.field(default="plain", metadata=MAY_CHANGE)
    noise: float = dataclasses.field(default=0.1, metadata=MAY_CHANGE_AFTER)
    inner: Inner = dataclasses.field(default=Inner(), metadata=MAY_CHANGE)

    def build(self, in_shape, out_channels, key):
        return MLPConfig(self.width).build(in_shape, out_channels, key)


@pytest.mark.parametrize(
    ("change", "after", "held"),
    [
        ({"width": 9}, True, ["net.width"]),
        ({"kernel": "fast"}, False, []),
        ({"noise": 0.0}, False, ["net.noise"]),
        ({"noise": 0.0}, True, []),
        ({"inner": Inner(tiles=2, heads=2)}, False, []),
    ],
)
def test_a_network_says_itself_what_of_it_may_change(change, after, held):
    run = dataclasses.replace(points.EXPERIMENT, net=Net())
    given = dataclasses.replace(run, net=Net(**change))
    found = differences(describe(run), describe(given), may_change(given, after))
    assert [line.split(":")[0].strip() for line in found] == held


@pytest.mark.parametrize(
    "words", ["sample --workdir OLD", "train --workdir OLD", "train --workdir NEW --train.init OLD"]
)
def test_a_denoiser_of_an_earlier_release_is_refused_by_its_name(tmp_path, capsys, words):
    """Also where its arrays have the shapes of one of today's, as with a process of one field."""
    config = describe(points_vp.EXPERIMENT)
    config["train"] = {"time_power": 1.0} | {k: v for k, v in config["train"].items() if not k.startswith("sigma_")}
    (tmp_path / "OLD" / "checkpoints" / "8").mkdir(parents=True)
    (tmp_path / "OLD" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="2"):
        main(
            points_vp.EXPERIMENT,
            [word.replace("OLD", f"{tmp_path}/OLD").replace("NEW", f"{tmp_path}/NEW") for word in words.split()],
        )
    said = capsys.readouterr().err.strip()
    assert "gddim 0.1.0 reads" in said
    assert "\n" not in said
    assert not (tmp_path / "NEW").exists()


def test_a_field_that_came_later_is_told_where_it_is_not_what_all_had():
    """So that a run from before it is the same run."""
    plain = describe(RUN)
    assert not {"style", "classes", "groups"} & set(plain["net"])
    assert not {"time_scale", "time_offset"} & set(plain["model"])
    labelled = describe(dataclasses.replace(RUN, net=dataclasses.replace(cld_cifar10.NET, classes=10)))
    assert labelled["net"]["classes"] == 10
    assert differences(plain, labelled) == ["  net.classes: the run has none, this command 10"]
