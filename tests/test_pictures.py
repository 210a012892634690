"""Pictures fit for a paper: axes that say their numbers, colours that everyone tells apart, legends beside the curves."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from runs import WHITE
from test_report import cifar_row

from gddim.errors import UserError
from gddim.evaluation.figures import PALETTE, description_in, encode, looks
from gddim.evaluation.report import chart, plot, table
from gddim.experiment.drawing import Paths
from gddim.experiment.outputs import check_names, origin_of_network, write_figure, write_json
from gddim.experiment.pictures import film, gallery, pixels, rows, trajectory
from gddim.samplers import power_grid
from gddim.sde import CLD, VP, Blurring

SAMPLERS = ("gddim:1", "gddim:3", "gddim:3:data", "cholesky:2", "em", "heun", "sscs", "rk45")
# What reds, greens and blues become for eyes without one kind of cones (Machado, Oliveira, Fernandes 2009), linear RGB.
BLIND = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
LAB = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) / [
    [0.9505],
    [1],
    [1.089],
]


def results(low: float, high: float) -> list[dict]:
    """Rows of every sampler, with distances from `high` down to `low`, and a floor."""
    found = []
    for i, sampler in enumerate(SAMPLERS):
        for nfe, share in ((6, 1.0), (10, 0.6), (20, 0.2), (50, 0.0)):
            distance = low * (high / low) ** (share * (i + 1) / len(SAMPLERS))
            found.append(cifar_row(sampler, nfe, distance, samples=500))
    floor = cifar_row("data", 0, low)
    floor["cell"]["source"] = "CIFAR10, held out"
    for row in (*found, floor):
        row["provenance"] |= {"experiment": "my_run", "step": 40, "features": "pixels"}
    return [floor, *found]


def numbers(axis: Any) -> list[float]:
    """What is written at an axis, inside of it."""
    axis.figure.canvas.draw()
    low, high = axis.get_view_interval()
    at = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    return [float(label.get_text()) for place, label in at if low <= place <= high]


@pytest.mark.parametrize(("low", "high"), [(1.1, 9.2), (2.1, 8.9), (0.004, 700.0), (10.5, 99.0), (2.2, 4.5)])
def test_the_axis_of_distances_has_numbers_at_1_2_5_also_within_a_decade(low: float, high: float):
    (axes,) = chart(results(low, high)).axes
    found = numbers(axes.yaxis)
    assert len(found) >= 2
    below, above = axes.yaxis.get_view_interval()
    assert found == [n for e in range(-4, 4) for d in (1, 2, 5) if below <= (n := float(f"{d}e{e}")) <= above]
    assert numbers(axes.xaxis) == [6, 10, 20, 50]


def test_an_axis_too_narrow_for_those_has_numbers_too():
    (axes,) = chart(results(2.2, 2.6)).axes
    assert len(numbers(axes.yaxis)) >= 2


@pytest.mark.parametrize("high", [1e9, 1e12, 1e30])
def test_an_axis_of_many_decades_has_their_powers_of_ten(high: float):
    (axes,) = chart(results(1.0, high)).axes
    found = numbers(axes.yaxis)
    assert 4 <= len(found) <= 25
    assert len(set(np.round(np.diff(np.log10(found))))) == 1


def test_a_legend_of_many_samplers_is_whole():
    words = [f"gddim:{order}:lam={lam}" for order in (1, 2, 3, 4) for lam in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)]
    figure = chart([cifar_row(word, nfe, 1.0 + nfe, samples=500) for word in words for nfe in (10, 20)])
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert len(figure.legends[0].get_texts()) >= len(words)
    assert box.y0 >= 0
    assert not box.overlaps(figure.axes[0].get_window_extent())


def seen(color: Any, kind: str | None) -> np.ndarray:
    """A colour in CIELAB, as eyes of that kind have it."""
    if isinstance(color, str):
        color = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = np.where(np.array(color) < 0.04045, np.array(color) / 12.92, ((np.array(color) + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(BLIND[kind]) @ linear, 0, 1) if kind else linear
    x, y, z = np.cbrt(LAB @ linear)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", [None, *BLIND])
def test_no_colour_is_another_for_any_eyes(kind: str | None):
    everything = [seen(color, kind) for color in (*PALETTE, "#000000", "#ffffff")]
    for i, a in enumerate(everything):
        for b in everything[:i]:
            assert np.linalg.norm(a - b) > 10


def test_a_family_has_one_colour_whatever_else_is_drawn_and_its_members_have_markers():
    alone, all_of_them = looks(["gddim:3:data"]), looks(SAMPLERS)
    assert alone["gddim:3:data"].color == all_of_them["gddim:3:data"].color
    assert len({look.family for look in all_of_them.values()}) == len(SAMPLERS) - 1
    orders = looks([f"gddim:{order}{more}" for order in (1, 2, 3) for more in ("", ":lam=0.5", ":corrector")])
    assert {look.family for look in orders.values()} == {0}
    assert len({(look.marker, look.color) for look in orders.values()}) == 9
    assert len({look.marker for look in orders.values()}) == 9


def test_the_legend_covers_nothing_and_the_title_is_the_run_and_its_process_in_words():
    for count in (1, 2):
        found = [
            row | {"provenance": row["provenance"] | {"step": i}} for i in range(count) for row in results(1.0, 60.0)
        ]
        figure = chart(found)
        figure.canvas.draw()
        assert len(figure.axes) == count
        (legend,) = figure.legends
        box = legend.get_window_extent()
        for axes in figure.axes:
            assert not box.overlaps(axes.get_window_extent())
            assert box.x1 <= figure.bbox.x1
            title = axes.get_title(loc="left")
            assert title.startswith("my_run, step ")
            assert "critically damped Langevin diffusion" in title
        names = [text.get_text() for text in legend.get_texts()]
        assert names[:3] == ["gDDIM, order 1", "gDDIM, order 3", "gDDIM, order 3, data"]
        assert names[-1] == "CIFAR10, held out (floor)"
        assert len(names) == len(SAMPLERS) + 1
        lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
        assert lines["CIFAR10, held out (floor)"].get_color() == "black"
        assert not any(name.startswith("_") for name in names)


def test_what_diverged_is_marked():
    found = results(1.0, 60.0)
    found[1] |= {"metrics": {}, "measured": {"nfe": 6.0, "not_finite": "1 of samples 0 to 7"}}
    (axes,) = chart(found).axes
    assert [list(line.get_xdata()) for line in axes.get_lines() if line.get_label() == "diverged"] == [[6.0]]


def test_processes_that_one_network_serves_stand_in_one_table_and_have_their_own_lines():
    both = results(1.0, 60.0)
    both += [row | {"provenance": row["provenance"] | {"process": "VP()"}} for row in both[1:]]
    text = table(both)
    assert text.count("## ") == 1
    assert "| gddim:3 | CLD |" in text
    assert "| gddim:3 | VP |" in text
    lines = {line.get_label(): line for line in chart(both).axes[0].get_lines()}
    a, b = lines["gDDIM, order 3, CLD"], lines["gDDIM, order 3, VP"]
    assert (a.get_color(), a.get_marker()) == (b.get_color(), b.get_marker())
    assert a.get_linestyle() != b.get_linestyle()
    again = [row | {"provenance": row["provenance"] | {"process": "CLD(m_inv=1.0)"}} for row in results(1.0, 60.0)]
    assert "| gddim:3 | CLD(m_inv=1.0) |" in table([*results(1.0, 60.0), *again]), "two of a class are not mixed"


def test_samples_of_classes_in_equal_numbers_and_as_the_data_are_two_tables_and_two_panels():
    balanced, as_data = (
        [row | {"provenance": row["provenance"] | {"classes": how}} for row in results(1.0, high)]
        for how, high in (("i mod 10", 60.0), ("as the data", 50.0))
    )
    lines = [line for line in table([*balanced, *as_data]).splitlines() if line.startswith("## ")]
    assert len({*lines}) == 2
    assert "500 samples, of classes in equal numbers, against CIFAR10" in lines[0]
    assert "500 samples, of classes as often as in the data, against CIFAR10" in lines[1]
    assert "500 samples against CIFAR10" in table(results(1.0, 60.0))
    assert len(chart([*balanced, *as_data]).axes) == 2


def test_a_plot_is_written_as_png_svg_and_pdf_the_same_bytes_each_time(tmp_path: Path):
    plot(results(1.0, 60.0), tmp_path / "a.png")
    plot(results(1.0, 60.0), tmp_path / "b.png")
    heads = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    for suffix, head in heads.items():
        content = (tmp_path / f"a{suffix}").read_bytes()
        assert content.startswith(head)
        assert content == (tmp_path / f"b{suffix}").read_bytes()


def random_paths(sde: Any, dims: tuple[int, ...], channels: int, count: int = 3) -> Paths:
    ts = power_grid(sde.horizon, 1e-3, 64)[:-1]
    draw = lambda *shape: jax.random.normal(jax.random.key(0), (len(ts), count, *dims, *shape))
    return Paths(ts, draw(sde.k, channels), draw(channels), draw(channels))


@pytest.mark.parametrize(
    ("sde", "dims", "channels", "first", "fields"),
    [
        (CLD(), (8, 8), 1, r"sample \d, pixel \(\d, \d\)$", ["position", "velocity"]),
        (CLD(), (8, 8), 3, r"sample \d, pixel \(\d, \d\), channel \d$", ["position", "velocity"]),
        (Blurring(8), (8, 8), 3, r"sample \d, pixel \(\d, \d\), channel \d$", []),
        (VP(), (), 2, r"sample \d, coordinate \d$", []),
    ],
)
def test_trajectories_have_a_legend_and_the_film_its_times(sde, dims, channels, first, fields):
    paths = random_paths(sde, dims, channels)
    figure = trajectory(sde, paths, "my_run, step 3", lines=4)
    pixels(figure)
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert all(re.match(first, name) for name in names[:4])
    assert names[4:] == fields
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)
    strip = film(paths, "my_run, step 3")
    told = [text.get_text() for text in strip.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert {"t = 1", "state", "prediction"} <= set(told)
    assert len([words for words in told if words.startswith("t = ")]) == 9
    for picture in (figure, strip):
        assert any("my_run, step 3" in text.get_text() for text in picture.texts)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_enlarges_every_pixel_alike_to_a_width_that_can_be_seen(channels: int):
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, channels), np.uint8)
    picture = pixels(gallery(images, "my_run\ngDDIM"))
    scale = 640 // (3 * 8)
    assert picture.shape[1] == 8 + 3 * (8 * scale + 2) - 2 + 8
    corner = picture.shape[0] - 8 - 3 * (8 * scale + 2) + 2
    for i, image in enumerate(images):
        y, x = corner + (i // 3) * (8 * scale + 2), 8 + (i % 3) * (8 * scale + 2)
        shown = picture[y : y + 8 * scale, x : x + 8 * scale]
        np.testing.assert_array_equal(shown, np.broadcast_to(image.repeat(scale, 0).repeat(scale, 1), shown.shape))
    assert picture[:corner].min() < 100, "there is a title"
    assert pixels(gallery(np.zeros((1, 2, 700, 3), np.uint8))).shape[1] > 640
    assert max(pixels(gallery(np.zeros((1, 700, 2, 3), np.uint8))).shape) < 4 * 700, "a tall one is no gigabytes"
    assert pixels(rows(np.zeros((2, 3, 8, 8, 1), np.float32))).shape[1] > 600


def test_what_is_neither_image_nor_point_is_shown_as_one():
    """Series `(L, C)` and volumes `(T, H, W, C)`."""
    for shape in ((16, 1), (2, 4, 4, 3)):
        data = np.random.default_rng(0).normal(size=(6, *shape)).astype(np.float32)
        assert len(gallery(data).axes) == 1
        assert len(rows(data.reshape(2, 3, *shape)).axes) == 1
        assert len(film(random_paths(VP(), shape[:-1], shape[-1])).axes) == 18


def test_a_sheet_is_no_larger_than_programs_read(monkeypatch: pytest.MonkeyPatch):
    images = np.zeros((30, 3, 32, 32, 3), np.uint8)
    several = lambda n: pixels(rows(images[:n], left=[f"{i}" for i in range(n)])).shape
    six, all = several(6), several(30)
    monkeypatch.setattr("gddim.experiment.pictures.PIXELS", 20 * 34**2)
    assert several(30) == six < all
    assert pixels(gallery(images[:, 0])).shape == pixels(gallery(images[:20, 0])).shape
    one = images[None, :, 0]  # a row of a class
    assert pixels(rows(one)).shape == pixels(rows(one[:, :20])).shape
    way = np.zeros((9, 3, 32, 32, 1), np.float32)
    strips = [film(Paths(np.linspace(1, 0.1, 9), way, way, way), shown=shown) for shown in (1, 3)]
    assert pixels(strips[0]).shape == pixels(strips[1]).shape


def test_two_networks_of_a_name_and_step_are_two_origins():
    """The weights that are shipped, and those of a training of one's own to the same step."""
    of = lambda weight: origin_of_network(WHITE, 3, {"weight": jax.numpy.full(2, weight)}, WHITE.sampling)
    assert of(1.0) == of(1.0) != of(1.001)


def test_files_tell_what_they_are_and_those_of_others_are_kept(tmp_path: Path):
    origin = {"experiment": "a (b) \\ <c> & {d}", "step": 3}
    figure = trajectory(VP(), random_paths(VP(), (), 2))
    for suffix in (".png", ".svg", ".pdf"):
        assert json.loads(description_in(encode(figure, suffix, json.dumps(origin)), suffix)) == origin
    folder = epath.Path(tmp_path)
    write_figure(folder / "t", figure, origin)
    write_figure(folder / "t", figure, origin)
    assert {path.name for path in tmp_path.iterdir()} == {"t.png", "t.svg", "t.pdf"}
    write_figure(folder / "t", figure, origin | {"step": 4})
    assert {path.name for path in tmp_path.iterdir()} == {
        f"t{n}{s}" for n in ("", "-1") for s in (".png", ".svg", ".pdf")
    }
    write_figure(folder / "s", gallery(np.zeros((4, 8, 8, 3), np.uint8)), origin)
    assert not (tmp_path / "s.svg").exists(), "pixels are no plot"
    write_figure(folder / "s-0.25", gallery(np.zeros((4, 8, 8, 3), np.uint8)), origin)
    assert (tmp_path / "s-0.25.png").exists(), "what follows a dot of the name is no suffix"
    check_names(folder, "x", "t", "s")
    (tmp_path / "t.svg").write_text("<svg>drawn by hand</svg>")
    with pytest.raises(UserError, match=r"t\.svg was not written by this program"):
        check_names(folder, "x", "t")
    (tmp_path / "t.svg").unlink()
    write_json(folder / "l.json", {"bits": 2}, origin)
    (tmp_path / "l.json").write_text('{"bits": 1}')  # as it was written before it told its origin
    write_json(folder / "l.json", {"bits": 3}, origin)
    assert [json.loads((tmp_path / name).read_text())["bits"] for name in ("l.json", "l-1.json")] == [3, 1]
    (tmp_path / "report.html").write_text("<html>mine</html>")
    with pytest.raises(UserError, match=r"report\.html was not written by this program"):
        check_names(folder, "x", "s")
