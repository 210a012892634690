"""Figures as papers print them: colours that the colour-blind tell apart, names in words, PNG with SVG and PDF beside it."""

import html
import io
import math
import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any, NamedTuple

from gddim.errors import from_extra

SUFFIXES = (".png", ".svg", ".pdf")
KEY = "gddim"  # of what a PNG tells about itself
# Okabe and Ito's (2008) without yellow and black, then two of Tol's: by eye and by simulation none is another.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#882255", "#999933")
MARKERS = "osD^vPXp*h<>"
LINES: tuple[Any, ...] = (
    *("-", "--", ":", "-."),
    *((0, dashes) for dashes in ((8, 2), (3, 1, 1, 1, 1, 1), (1, 3), (8, 2, 2, 2))),
)
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "pdf.fonttype": 42,  # text that can be searched and edited
    "svg.hashsalt": "gddim",  # the same bytes for the same figure
}
LEGEND = {"loc": "outside right upper", "frameon": False, "fontsize": 8}

_SAMPLERS = {
    "gddim": "gDDIM",
    "cholesky": "multistep in L",
    "em": "Euler",
    "heun": "Heun",
    "sscs": "SSCS",
    "rk45": "RK45",
}
_FAMILIES = ("gddim", "gddim:data", "cholesky", "em", "heun", "sscs", "rk45")
_PROCESSES = {
    "vp": "variance-preserving diffusion",
    "cosine": "variance-preserving diffusion, cosine schedule",
    "subvp": "sub-variance-preserving diffusion",
    "ve": "variance-exploding diffusion",
    "flow": "flow matching",
    "cld": "critically damped Langevin diffusion",
    "psld": "phase-space Langevin diffusion",
    "langevin": "critically damped Langevin diffusion of order",
    "blurring": "blurring diffusion",
    "linearsde": "a linear SDE",
}


def process_in_words(spelled: str) -> str:
    """A process by what papers call it, `CLD(m_inv=4.0, …)` or `cld:gamma=0.1` for example; one of the user's own by the
    name of its class or function.
    """
    name, *options = _local(spelled.split("(")[0]).split(":")
    words = _PROCESSES.get(name.lower(), name.replace("_", " "))
    if name == "langevin":
        words += f" {next((o.removeprefix('order=') for o in options if o.startswith('order=')), 3)}"
    return words


def processes_in_words(spelled: Iterable[str]) -> str:
    """Several, each once: "a, b and c"."""
    *others, last = dict.fromkeys(map(process_in_words, spelled))
    return f"{', '.join(others)} and {last}" if others else last


def _local(process: str) -> str:
    """The word of a process, `package.module:object`, without its module."""
    return re.sub(r"^\w+(\.\w+)+:", "", process)


def label_in_words(label: str) -> str:
    """A row's label, `gddim:3:data` or `gddim:3:data, last=euler; VP`, as "gDDIM, order 3, data" and so on."""
    sampler, _, process = label.partition("; ")
    sampler, *rest = sampler.split(", ")
    sampler, _, grid = sampler.partition("@")
    name, *options = sampler.split(":")
    if name == "table":  # told by the file's name, not by where it lies
        name, options = f"learned table {PurePath(':'.join(options)).stem}", []
    options += [*([f"{grid} grid"] if grid else []), *rest]
    spelled = (f"order {o}" if o.isdecimal() else o.replace("lam=", "λ=").replace("=", " = ") for o in options)
    return ", ".join([_SAMPLERS.get(name, name), *spelled, *([_local(process)] if process else [])])


class Look(NamedTuple):
    """How a row of a table is drawn."""

    family: int
    color: Any
    marker: str
    line: str


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """Of each row: the colour of its sampler's family, which does not depend on the other rows, lighter for lower members;
    a marker by order, λ and whatever else tells it from its family; a kind of line by process.
    """
    split = {label: _family(label) for label in dict.fromkeys(labels)}
    families, members, processes = ({parts[i] for parts in split.values()} for i in range(3))
    families = [*_FAMILIES, *sorted(families.difference(_FAMILIES))]
    members, processes = sorted(members), sorted(processes)
    found = {}
    for label, (family, member, process) in split.items():
        own = sorted({m for f, m, _ in split.values() if f == family})
        number, share = families.index(family), (own.index(member) + 1) / len(own)
        color = _lighter(PALETTE[number % len(PALETTE)], 0.5 * (1 - share))
        marker, line = MARKERS[members.index(member) % len(MARKERS)], LINES[processes.index(process) % len(LINES)]
        found[label] = Look(number, color, marker, line)
    return found


def _family(label: str) -> tuple[str, str, str]:
    """`gddim:3:data; VP` as `gddim:data`, `3`, `VP`: what a sampler interpolates makes a family, numbers and
    correctors do not.
    """
    sampler, _, process = label.partition("; ")
    name, *options = re.split(":|, ", sampler)
    kinds = [option for option in options if option.isalpha() and option not in ("corrector", "free")]
    return ":".join([name, *kinds]), ":".join(option for option in options if option not in kinds), process


def _lighter(color: str, share: float) -> tuple[float, ...]:
    """A colour `#rrggbb`, that share of the way to white."""
    channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return tuple(channel + share * (1 - channel) for channel in channels)


def new_figure(rows: int, columns: int, size: tuple[float, float], title: str = "") -> tuple[Any, list[Any]]:
    """A figure that needs no display and no global state, and its axes in reading order."""
    with from_extra("eval"):
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        if title:
            figure.suptitle(title, fontsize=10)
        return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def encode(figure: Any, suffix: str, description: str = "") -> bytes:
    """A figure as a file of one of `SUFFIXES`, which holds this `description`."""
    from matplotlib import rc_context

    metadata = {
        ".png": {KEY: description},
        ".svg": {"Date": None, "Description": description},
        ".pdf": {"CreationDate": None, "Subject": description},
    }
    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format=suffix.removeprefix("."), metadata=metadata[suffix])
    return buffer.getvalue()


def description_in(content: bytes, suffix: str) -> str:
    """The description in a file that `encode` made; some exception for another."""
    if suffix == ".png":
        with from_extra("eval"):
            from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            return image.info[KEY]
    if suffix == ".svg":
        return html.unescape(re.findall(r"<dc:description>(.*?)</dc:description>", content.decode())[0])
    return re.sub(r"\\([()\\])", r"\1", re.findall(rb"/Subject \((.*?[^\\])\)[ \n]", content)[0].decode())


def number(axis: Any, ticks: Iterable[int] = ()) -> None:
    """Plain numbers on a logarithmic axis: these, as far as they stand apart; without any 1, 2, 5, 10, …, where need be by
    an axis that is longer than its data; and of data within a factor of 2 in steps of 1, 2 or 5.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    gap, apart = (high / low) ** 0.045, []
    for tick in sorted(ticks):
        if not apart or tick >= gap * apart[-1]:
            apart.append(tick)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    round_ones = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    if not apart and high > 2 * low and sum(low <= tick <= high for tick in round_ones) < 2:
        around = max(tick for tick in round_ones if tick <= low), min(tick for tick in round_ones if tick >= high)
        axis.set_view_interval(*around, ignore=True)
    low, high = axis.get_view_interval()
    if not apart and high > 2 * low:
        apart = [tick for tick in round_ones if low <= tick <= high]
        if len(apart) > 24:  # over many decades their powers of ten, at most 12
            powers = [float(f"1e{decade}") for decade in decades]
            apart = [tick for tick in powers[:: -(-len(powers) // 12)] if low <= tick <= high]
    axis.set_major_locator(FixedLocator(apart) if apart else MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axis.set_minor_locator(NullLocator())
