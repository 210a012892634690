"""Results as tables in the layout of the papers, and as a plot of distance against network calls."""

import io
import json
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from gddim.errors import UserError
from gddim.evaluation.cell import Row
from gddim.evaluation.published import TABLES, Published
from gddim.evaluation.statistics import FEW, write_whole
from gddim.evaluation.sweep import FLOOR

TITLES = {
    "kid": "KID",
    "energy": "energy distance",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "Inception Score",
}
ERRORS = {  # that a metric states itself
    "kid": ("kid_error", "KID ± its standard error"),
    "inception_score": ("inception_score_spread", "Inception Score ± its standard deviation over ten parts"),
}


class Entry(NamedTuple):
    """The seeds of one cell: mean and spread of a metric, mean number of network calls.

    The spread is the standard deviation over seeds, of a single one the error that the metric itself states, if any.
    """

    mean: float
    spread: float
    seeds: int
    nfe: float

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        return f"{_digits(self.mean)} ± {self.spread:.2g}" if self.spread or self.seeds > 1 else _digits(self.mean)


def _digits(value: float) -> str:
    """Two decimals, as papers print distances; three digits of what is small."""
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


class Group(NamedTuple):
    """Rows that may stand in one table: the same model, reference, feature space and number of samples."""

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
    def process(self) -> str:
        return self.provenance["process"].split("(")[0]

    def title(self, metric: str) -> str:
        """What a metric is called here: a Fréchet distance of few samples says how few."""
        inception = self.provenance["features"].startswith("inception")
        name = TITLES.get(metric) or ("FID" if inception else "Fréchet distance")
        few = metric == "frechet" and self.samples < FEW
        return f"{name} of only {self.samples:,} samples" if few else name

    def published(self) -> list[Published]:
        """Other people's rows for the same process, where the metric is theirs: Inception features of CIFAR-10."""
        source = str(self.provenance["reference"]["source"]).lower().replace("-", "")
        same = self.provenance["features"].startswith("inception") and "cifar10" in source
        return [row for row in TABLES if same and row.process == self.process]

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
        """The sampler, with what else differs between the rows of this group."""
        words = [row["cell"]["sampler"]]
        for name in ("last", "power", "t_min"):
            if len({other["cell"].get(name) for other in self.rows}) > 1:
                words.append(f"{name}={row['cell'].get(name)}")
        return ", ".join(words)


def _entry(rows: list[Row], metric: str, error: str | None) -> Entry:
    values = [row["metrics"].get(metric, math.inf) for row in rows]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 and np.isfinite(values).all() else 0.0
    if error:
        spread = rows[0]["metrics"].get(error, 0.0)
    return Entry(float(np.mean(values)), spread, len(values), float(np.mean([row["measured"]["nfe"] for row in rows])))


def groups(rows: Sequence[Row]) -> list[Group]:
    """Rows by what they may be compared with, in the order in which they were computed."""
    found: dict[str, list[Row]] = {}
    floors: dict[str, Row] = {}
    for row in rows:
        origin = json.dumps(row["provenance"], sort_keys=True)
        if row["cell"]["sampler"] == FLOOR:
            floors[origin] = row
        else:
            found.setdefault(json.dumps([origin, row["cell"]["samples"]]), []).append(row)
    return [Group(rows, floors.get(json.loads(key)[0])) for key, rows in found.items()]


def table(rows: Sequence[Row]) -> str:
    """Markdown: for each group its origin, then for each metric the samplers against the network calls."""
    return "\n".join(line for group in groups(rows) for line in _section(group))


def _section(group: Group) -> list[str]:
    origin = group.provenance
    known = ("experiment", "checkpoint", "step", "weights", "features", "commit")
    lines = [
        f"## {group.process}: {group.samples:,} samples against {origin['reference']['source']}",
        "",
        ", ".join(f"{name} {origin[name]}" for name in known if origin.get(name) is not None) + ".",
        "",
    ]
    if len(group.seeds) > 1:
        lines += [f"Mean ± standard deviation over {len(group.seeds)} seeds.", ""]
    elif told := [words for error, words in ERRORS.values() if any(error in row["metrics"] for row in group.rows)]:
        lines += [f"{', '.join(told)}.", ""]
    for metric in ("frechet", *TITLES):
        lines += _metric_table(group, metric)
    return lines


def _metric_table(group: Group, metric: str) -> list[str]:
    entries = group.entries(metric)
    columns = sorted({nfe for cells in entries.values() for nfe in cells if nfe is not None})
    adaptive = any(None in cells for cells in entries.values())
    if not entries:
        return []
    header = [group.title(metric), *(f"NFE {nfe}" for nfe in columns), *(["adaptive"] if adaptive else [])]
    body = []
    for label, cells in entries.items():
        line = [label, *(_told(cells[nfe], nfe) if nfe in cells else "" for nfe in columns)]
        if adaptive:
            line.append(_told(cells[None], None) if None in cells else "")
        body.append(line)
    for row in group.published() if metric == "frechet" else []:
        if set(row.values) & set(columns):
            values = [_published(row.values.get(nfe, "")) for nfe in columns]
            body.append([f"*{row.label}*", *values, *([""] if adaptive else [])])
    if group.floor and metric in group.floor["metrics"]:
        value = _digits(group.floor["metrics"][metric])
        body.append([f"{group.floor['cell']['source']} (floor)", *[value] * (len(header) - 1)])
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [*(f"| {' | '.join(cells)} |" for cells in [header, rule, *body]), ""]


def _told(entry: Entry, budget: int | None) -> str:
    """An entry, with its network calls where they are not those of the column."""
    return str(entry) if entry.nfe == budget else f"{entry} at {entry.nfe:.0f}"


def _published(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def plot(rows: Sequence[Row], path: os.PathLike, metric: str = "frechet") -> None:
    """A PNG of the metric against the network calls made, log axes: one line a sampler, a floor, published rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = groups(rows)
    if not found:
        raise UserError("there are no results yet to plot")
    figure = Figure(figsize=(6.5 * len(found), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, group in zip(figure.subplots(1, len(found), squeeze=False).flat, found, strict=True):
        _draw(axes, group, metric)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(epath.Path(path), buffer.getvalue())


def _draw(axes: Any, group: Group, metric: str) -> None:
    entries = group.entries(metric)
    for label, cells in entries.items():
        points = sorted((entry for entry in cells.values() if math.isfinite(entry.mean)), key=lambda entry: entry.nfe)
        nfe, mean = [entry.nfe for entry in points], [entry.mean for entry in points]
        axes.errorbar(nfe, mean, [entry.spread for entry in points], marker="o", markersize=3, label=label)
    for row in group.published():
        values = {nfe: value for nfe, value in row.values.items() if not isinstance(value, str)}
        axes.plot(list(values), list(values.values()), "--", marker=".", linewidth=0.8, label=row.label)
    if group.floor and metric in group.floor["metrics"]:
        axes.axhline(group.floor["metrics"][metric], color="grey", linestyle=":", label="floor")
    ticks = sorted({round(entry.nfe) for cells in entries.values() for entry in cells.values()})
    axes.set(xscale="log", yscale="log", xlabel="network calls", ylabel=group.title(metric), title=group.process)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=7)
