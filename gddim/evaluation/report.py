"""Results as tables in the layout of the papers, and as a plot of distance against network calls."""

import itertools
import json
import math
import os
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from gddim.errors import UserError
from gddim.evaluation.cell import Row
from gddim.evaluation.figures import (
    LEGEND,
    MARKERS,
    SUFFIXES,
    Look,
    encode,
    label_in_words,
    looks,
    new_figure,
    number,
    processes_in_words,
)
from gddim.evaluation.paper_tables import OTHERS, TABLES, Published
from gddim.evaluation.statistics import FEW, OF_CLASS
from gddim.evaluation.sweep import FLOOR
from gddim.storage import write_whole

PROCESS = "process"  # the title of a column
TITLES = {
    "kid": "KID",
    "energy": "energy distance",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "Inception Score",
}
MORE_IS_BETTER = ("precision", "recall", "inception_score")
ERRORS = {  # that a metric states itself
    "kid": ("kid_error", "KID ± its standard error"),
    "inception_score": ("inception_score_spread", "Inception Score ± its standard deviation over ten parts"),
}


class Entry(NamedTuple):
    """The seeds of one cell: mean and spread of a metric, the least of a distance, mean number of network calls.

    The spread is the standard deviation over seeds, of a single one the error that the metric itself states, if any.
    """

    mean: float
    spread: float
    least: float | None
    seeds: int
    nfe: float

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        least = "" if self.seeds < 2 or self.least is None else f", least {_digits(self.least)}"
        told = self.spread or self.seeds > 1
        return f"{_digits(self.mean)} ± {self.spread:.2g}{least}" if told else _digits(self.mean)


def _digits(value: float) -> str:
    """Two decimals, as papers print distances; three digits of what is small."""
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


class Group(NamedTuple):
    """Rows that may stand in one table: the same model, reference, feature space and number of samples. They may be of
    several processes, which one network can serve.
    """

    rows: list[Row]
    floor: Row | None

    @property
    def provenance(self) -> Row:
        return self.rows[0]["provenance"]

    @property
    def samples(self) -> int:
        return self.rows[0]["cell"]["samples"]

    @property
    def seeds(self) -> set[int]:
        return {row["cell"]["seed"] for row in self.rows}

    @property
    def processes(self) -> list[str]:
        """By their words, `cld` or `cld:gamma=0.1`, in order; rows that have none tell `CLD(m_inv=4.0, …)`."""
        return list(dict.fromkeys(map(_process, self.rows)))

    @property
    def heading(self) -> str:
        """The name of the run, its step, the process in words, an average other than that of training, and a guide."""
        name, step = (self.provenance.get(key) for key in ("experiment", "step"))
        run = ", ".join([name, *([f"step {step}"] if step is not None else [])]) + ": " if name else ""
        guide, weights = (self.provenance.get(key) for key in ("guide", "weights"))
        average = f", {weights}" if weights not in (None, "EMA") else ""
        return run + processes_in_words(self.processes) + average + (f", guided by {guide}" if guide else "")

    @property
    def against(self) -> str:
        """What is compared with what."""
        of = {None: "", "as the data": ", of classes as often as in the data,"}
        drawn = f"{self.samples:,} samples{of.get(self.provenance.get('classes'), ', of classes in equal numbers,')}"
        return f"{drawn} against {self.provenance['reference']['source']}, {self.provenance['features']}"

    def title(self, metric: str) -> str:
        """What a metric is called here: a Fréchet distance of few samples says how few."""
        inception = self.provenance["features"].startswith("inception")
        name = TITLES.get(metric) or ("FID" if inception else "Fréchet distance")
        few = metric == "frechet" and self.samples < FEW
        return f"{name} of only {self.samples:,} samples" if few else name

    def published(self) -> list[Published]:
        """Other people's rows for the same process, or of another network altogether, where the metric is theirs: Inception
        features of CIFAR-10."""
        source = str(self.provenance["reference"]["source"]).lower().replace("-", "")
        same = self.provenance["features"].startswith("inception") and re.search(r"cifar10(?!\d)", source) is not None
        processes = {row["provenance"]["process"].split("(")[0] for row in self.rows}
        return [row for row in TABLES if same and row.process in (*processes, *OTHERS)]

    def entries(self, metric: str) -> dict[str, dict[int | None, Entry]]:
        """By sampler, then by budget of calls (None: adaptive)."""
        found: dict[str, dict[int | None, list[Row]]] = {}
        if metric != "frechet" and not any(metric in row["metrics"] for row in self.rows):
            return {}
        for row in self.rows:
            if metric in row["metrics"] or "not_finite" in row["measured"]:
                found.setdefault(self._label(row), {}).setdefault(row["cell"]["nfe"], []).append(row)
        error = ERRORS[metric][0] if metric in ERRORS and len(self.seeds) == 1 else None
        return {
            label: {nfe: _entry(rows, metric, error) for nfe, rows in cells.items()} for label, cells in found.items()
        }

    def _label(self, row: Row) -> str:
        """The sampler, with what else differs between the rows of its process, that after a semicolon if there are others."""
        words, spelled = [row["cell"]["sampler"]], _process(row)
        for name in ("last", "power", "t_min"):
            told = {other["cell"].get(name) for other in self.rows if _process(other) == spelled} - {None}
            if len(told) > 1 and row["cell"].get(name) is not None:
                words.append(f"{name}={row['cell'].get(name)}")
        short = [process.split("(")[0] for process in self.processes]
        process = spelled.split("(")[0] if len(set(short)) == len(short) else spelled
        return ", ".join(words) + (f"; {process}" if len(short) > 1 else "")


def _process(row: Row) -> str:
    return row["cell"].get("process", row["provenance"]["process"])


def _entry(rows: list[Row], metric: str, error: str | None) -> Entry:
    last = rows[-1]["cell"].get("parameters")  # of a table that was fitted again under its name
    rows = [row for row in rows if row["cell"].get("parameters") == last]
    values = [row["metrics"].get(metric, math.inf) for row in rows]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 and np.isfinite(values).all() else 0.0
    if error:
        spread = rows[0]["metrics"].get(error, 0.0)
    nfe = float(np.mean([row["measured"]["nfe"] for row in rows]))
    least = None if metric in MORE_IS_BETTER else min(values)
    return Entry(float(np.mean(values)), spread, least, len(values), nfe)


def groups(rows: Sequence[Row]) -> list[Group]:
    """Rows by what they may be compared with, in the order in which they were computed."""
    found: dict[str, list[Row]] = {}
    floors: dict[str, Row] = {}
    for row in rows:
        origin = json.dumps(row["provenance"] | {"process": None}, sort_keys=True)
        if row["cell"]["sampler"] == FLOOR:
            floors[origin] = row
        else:
            found.setdefault(json.dumps([origin, row["cell"]["samples"]]), []).append(row)
    return [Group(rows, floors.get(json.loads(key)[0])) for key, rows in found.items()]


def table(rows: Sequence[Row]) -> str:
    """Markdown: for each group its origin, then for each metric the samplers against the network calls."""
    return "\n".join(line for group in groups(rows) for line in _section(group))


def _section(group: Group) -> list[str]:
    lines = [f"## {group.heading}: {group.against}", ""]
    for paragraph in about(group):
        lines += [paragraph, ""]
    for cells in tables(group):
        rule = ["---" if i == 0 or name == PROCESS else "---:" for i, name in enumerate(cells[0])]
        lines += [*(f"| {' | '.join(row)} |" for row in [cells[0], rule, *cells[1:]]), ""]
    return lines


def about(group: Group) -> list[str]:
    """Where the numbers of a group come from, and what their ± means; a paragraph each."""
    known = ("checkpoint", "weights", "commit")
    values = [f"{name} {group.provenance[name]}" for name in known if group.provenance.get(name) is not None]
    found = [f"{', '.join(values)}."] if values else []
    if len(group.seeds) > 1:
        found.append(f"Mean ± standard deviation over {len(group.seeds)} seeds.")
    elif errors := [words for error, words in ERRORS.values() if any(error in row["metrics"] for row in group.rows)]:
        found.append(f"{', '.join(errors)}.")
    costs = {(row["measured"]["nfe"], row["measured"].get("evaluations")) for row in group.rows}
    if told := [f"{n:g} at NFE {nfe:g}" for nfe, n in sorted(costs, key=lambda cost: cost[0]) if n]:
        found.append(f"Network evaluations a sample, two in a call that is guided: {', '.join(told)}.")
    return found


def tables(group: Group) -> list[list[list[str]]]:
    """For each metric the samplers against the network calls, as rows of cells, the first its header; where there are
    several processes the second column tells them. Last the samplers against the classes of the data, where it has such.
    """
    found = [_metric_table(group, metric) for metric in ("frechet", *TITLES)]
    return [each for each in (*found, _class_table(group)) if each]


def _class_table(group: Group) -> list[list[str]]:
    """Each class's Fréchet distance, of samples that are as many times fewer, at the most network calls."""
    names = {name for row in group.rows for name in row["metrics"] if name.startswith(OF_CLASS)}
    if not names:
        return []
    of = {
        name.removeprefix(OF_CLASS): group.entries(name) for name in sorted(names, key=lambda name: (len(name), name))
    }
    first = next(iter(of.values()))
    most = max((nfe for cells in first.values() for nfe in cells if nfe is not None), default=None)
    at = "" if most is None else f" at NFE {most}"
    found = [[f"{group.title('frechet')}, by class{at}", *(f"class {k}" for k in of)]]
    for label, cells in first.items():  # at its own most calls, as of an adaptive sampler, where it has none of these
        own = most if most in cells else max(cells, key=lambda nfe: nfe or 0)
        found.append(
            [label, *(_told(each[label][own], most) if own in each.get(label, {}) else "" for each in of.values())]
        )
    if group.floor:
        values = [group.floor["metrics"].get(f"{OF_CLASS}{k}") for k in of]
        told = ["" if value is None else _digits(value) for value in values]
        found.append([f"{group.floor['cell']['source']} (floor)", *told])
    return found


def _metric_table(group: Group, metric: str) -> list[list[str]]:
    entries = group.entries(metric)
    columns = sorted({nfe for cells in entries.values() for nfe in cells if nfe is not None})
    adaptive = any(None in cells for cells in entries.values())
    if not entries:
        return []
    several = len(group.processes) > 1
    named = lambda label, process: [label, process] if several else [label]
    numbers = [*(f"NFE {nfe}" for nfe in columns), *(["adaptive"] if adaptive else [])]
    found = [[*named(group.title(metric), PROCESS), *numbers]]
    for label, cells in entries.items():
        sampler, _, process = label.partition("; ")
        line = [*named(sampler, process), *(_told(cells[nfe], nfe) if nfe in cells else "" for nfe in columns)]
        if adaptive:
            line.append(_told(cells[None], None) if None in cells else "")
        found.append(line)
    for row in group.published() if metric == "frechet" else []:
        if set(row.values) & set(columns):
            values = [_published(row.values.get(nfe, "")) for nfe in columns]
            found.append([*named(f"*{row.label}*", row.process), *values, *([""] if adaptive else [])])
    if group.floor and metric in group.floor["metrics"]:
        value = _digits(group.floor["metrics"][metric])
        found.append([*named(f"{group.floor['cell']['source']} (floor)", ""), *[value] * len(numbers)])
    return found


def _told(entry: Entry, budget: int | None) -> str:
    """An entry, with its network calls where they are not those of the column."""
    return str(entry) if entry.nfe == budget else f"{entry} at {entry.nfe:.0f}"


def _published(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def plot(rows: Sequence[Row], path: os.PathLike) -> None:
    """The Fréchet distance against the network calls made, as `path`, a PNG, and beside it as SVG and PDF.

    Raises `UserError` for no rows.
    """
    figure = chart(rows)
    for suffix in SUFFIXES:
        write_whole(epath.Path(path).with_suffix(suffix), encode(figure, suffix))


def chart(rows: Sequence[Row]) -> Any:
    """A panel for each group, log axes: one line a sampler, its floor, published rows; one legend for all, beside them.

    Of groups that differ by no more than a commit or a version the last is drawn.
    """
    found = list({(group.heading, group.against): group for group in groups(rows)}.values())
    if not found:
        raise UserError("there are no results yet to plot")
    columns = min(2, len(found))
    height = -(-len(found) // columns)
    figure, panels = new_figure(height, columns, (4.4 * columns + 1.9, 3.4 * height))
    shared = looks(label for group in found for label in group.entries("frechet"))
    for axes, group in zip(panels, found, strict=False):
        _chart_group(axes, group, shared)
    for axes in panels[len(found) :]:
        axes.remove()
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines() if line.get_label()[0] != "_"}
    ours = {label_in_words(label): look.family for label, look in shared.items()}
    names = [*sorted(ours, key=ours.__getitem__), *(name for name in lines if name not in ours)]
    beside = -(-len(names) // (18 * height))  # columns
    figure.set_figwidth(4.4 * columns + 1.9 * beside)
    figure.legend([lines[name] for name in names], names, **LEGEND, ncols=beside)
    return figure


def _chart_group(axes: Any, group: Group, shared: dict[str, Look]) -> None:
    budgets: set[int] = set()
    for label, cells in group.entries("frechet").items():
        look, points = shared[label], sorted(cells.values(), key=lambda entry: entry.nfe)
        whole = [entry for entry in points if math.isfinite(entry.mean)]
        nfe, mean, spread = ([getattr(entry, name) for entry in whole] for name in ("nfe", "mean", "spread"))
        style = {"color": look.color, "marker": look.marker, "linestyle": look.line}
        axes.plot(nfe, mean, label=label_in_words(label), **style, markersize=4.5, linewidth=1.3)
        if any(spread):
            axes.errorbar(nfe, mean, spread, fmt="none", ecolor=look.color, capsize=2)
        budgets |= {budget for budget in cells if budget is not None}
        if lost := [entry.nfe for entry in points if not math.isfinite(entry.mean)]:
            edge = {"transform": axes.get_xaxis_transform(), "clip_on": False, "color": look.color}
            axes.plot(lost, [1.0] * len(lost), "x", label="diverged", **edge)
    for row, marker in zip(group.published(), itertools.cycle(MARKERS)):
        values = {nfe: value for nfe, value in row.values.items() if not isinstance(value, str)}
        if len(values) > 1:  # of a single one the table tells
            style = {"color": looks([row.sampler])[row.sampler].color, "marker": marker, "markersize": 4.5}
            label = f"{row.label}, {row.process}" if len(group.processes) > 1 else row.label
            axes.plot([*values], [*values.values()], "--", label=label, **style, fillstyle="none", linewidth=0.8)
            budgets |= set(values)
    if group.floor and "frechet" in group.floor["metrics"]:
        label = f"{group.floor['cell']['source']} (floor)"
        axes.axhline(group.floor["metrics"]["frechet"], color="black", linestyle=(0, (1, 1.5)), label=label)
    axes.set(xscale="log", yscale="log", xlabel="network calls", ylabel=group.title("frechet"))
    title = "\n".join(line for words in (group.heading, group.against) for line in textwrap.wrap(words, 64))
    axes.set_title(title, loc="left", fontsize=8)
    number(axes.xaxis, budgets)
    number(axes.yaxis)
