"""All of a run on one page that needs nothing but itself: pictures, tables, configuration and provenance in one HTML file."""

import base64
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from etils import epath

from gddim.errors import UserError
from gddim.evaluation.cell import Row
from gddim.evaluation.figures import KEY, PALETTE, encode, new_figure, number, processes_in_words
from gddim.evaluation.provenance import flatten
from gddim.evaluation.report import about, chart, groups, tables
from gddim.evaluation.sweep import RESULTS, read_rows
from gddim.logs import read_scalars
from gddim.storage import write_whole

REPORT = "report.html"
_OURS = '<meta name="generator" content="gddim">'
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --faint: #5c5c5c; --line: #d5d5d5; --link: #0b57a4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e7e7; --paper: #17191c; --faint: #a8a8a8; --line: #3d4147; --link: #7cb8f2; }
}
body { max-width: 68rem; margin: 0 auto; padding: 1rem 1.5rem 4rem; font: 16px/1.5 system-ui, sans-serif;
  background: var(--paper); color: var(--ink); overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { margin: 1.5rem 0 .3rem; font-size: 1rem; }
a { color: var(--link); } nav a { margin-right: 1rem; } p, figcaption { color: var(--faint); }
figure { margin: 1rem 0; overflow-x: auto; }
img { max-width: 100%; background: #ffffff; padding: .5rem; border-radius: .4rem; box-sizing: border-box; }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.wide { max-width: 100%; overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.facts td:first-child { white-space: nowrap; font-family: ui-monospace, monospace; }
"""
_PICTURES = {  # by section: files without suffix, and what they show
    "Samples": {"samples": "Samples of the averaged model."},
    "Trajectories": {
        "trajectory": "Some numbers of the data on their way from noise to data, and the ε that the network says there, in "
        "L coordinates (the Cholesky factor of Σ) and in gDDIM's R coordinates.",
        "denoise": "From noise to data: the state, and below it the data that the network foresees.",
    },
    "Latents": {
        "reconstructions": "Held-out data, and what comes back from their latents.",
        "interpolations": "Between the latents of pairs of held-out data.",
    },
}
_RESTORED = "Held-out data, what was measured of them, and samples given that."


def write_page(folder: epath.Path, rows: Sequence[Row] | None = None, out: epath.Path | None = None) -> None:
    """The page of what a run has left in its folder, as `out`, by default report.html there; with these rows of results,
    by default all of them. Raises `UserError` for a file there that is no such page.
    """
    out = out or folder / REPORT
    check_page(out)
    if rows is None:
        rows = read_rows(folder / RESULTS) if (folder / RESULTS).exists() else []
    write_whole(out, page(folder, rows).encode())


def check_page(path: epath.Path) -> None:
    """Raise `UserError` for a file that is there and was not written as a page."""
    if path.exists() and _OURS.encode() not in path.read_bytes():
        raise UserError(f"{path} was not written by this program and is not overwritten: move it away")


def page(folder: epath.Path, rows: Sequence[Row]) -> str:
    """The whole HTML, its pictures in it as data; sections of what is not there are left out."""
    found = groups(rows)
    config = _read(folder, "config.json")
    shown = {name: [_picture(folder, *item) for item in files.items()] for name, files in _PICTURES.items()}
    sections = {
        "Samples": shown["Samples"],
        "Results": [*([_figure(encode(chart(rows), ".svg"), "svg+xml", "")] if found else []), *map(_results, found)],
        "Trajectories": shown["Trajectories"],
        "Latents": shown["Latents"],
        "Restored": [_picture(folder, path.stem, _RESTORED) for path in sorted(folder.glob("restored-*.png"))],
        "Likelihood": [_facts(_read(folder, "likelihood.json") | {"experiment": None, KEY: None})],
        "Classes": [_facts(_read(folder, "classes.json") | {KEY: None})],
        "Training": [_curve(read_scalars(folder / "tensorboard", "train/loss"))],
        "Configuration": [_facts(config)],
        "Provenance": [_origin(group) for group in found],
    }
    full = {name: "\n".join(parts) for name, parts in sections.items() if any(parts)}
    name = config.get("name") or next((group.provenance.get("experiment") for group in found), None) or folder.name
    processes = [process for group in found for process in group.processes] or [config.get("sde", {}).get("type", "")]
    about = [processes_in_words(processes)]
    about += [f"step {step}" for step in dict.fromkeys(group.provenance.get("step") for group in found) if step]
    links = "".join(f'<a href="#{title.lower()}">{title}</a>' for title in full)
    body = "\n".join(f'<h2 id="{title.lower()}">{title}</h2>\n{content}' for title, content in full.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{_OURS}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(name)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(name)}</h1>
<p>{escape(", ".join(filter(None, about)))}</p>
<nav>{links}</nav>
{body}
</body>
</html>
"""


def _read(folder: epath.Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text()) if (folder / name).exists() else {}


def _picture(folder: epath.Path, name: str, caption: str) -> str:
    """A plot as SVG, of images the PNG."""
    for suffix, kind in ((".svg", "svg+xml"), (".png", "png")):
        if (path := folder / f"{name}{suffix}").exists():
            return _figure(path.read_bytes(), kind, caption)
    return ""


def _figure(content: bytes, kind: str, caption: str) -> str:
    data = base64.b64encode(content).decode()
    image = f'<img src="data:image/{kind};base64,{data}" alt="{escape(caption)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(rows: Iterable[Sequence[str]], header: Sequence[str] = (), kind: str = "") -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{_cell(cell)}</{tag}>' for cell in cells)}</tr>"

    head = f"<thead>{line(header, 'th')}</thead>" if header else ""
    body = "\n".join(line(cells, "td") for cells in rows)
    return f'<div class="wide"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    """What is *emphasised* in Markdown is so here."""
    return re.sub(r"^\*(.*)\*$", r"<em>\1</em>", escape(text))


def _facts(tree: dict[str, Any]) -> str:
    """The fields of an object by their dotted names, those of a configuration as the command line has them."""
    lines = [
        (name.removesuffix(".type"), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in flatten(tree)
        if value is not None
    ]
    return _table(lines, kind="facts") if lines else ""


def _results(group: Any) -> str:
    notes = "".join(f"<p>{escape(words)}</p>" for words in about(group))
    side_by_side = "\n".join(_table(cells[1:], cells[0]) for cells in tables(group))
    return f'<h3>{escape(f"{group.heading}: {group.against}")}</h3>{notes}<div class="tables">{side_by_side}</div>'


def _origin(group: Any) -> str:
    devices = dict.fromkeys(row["measured"].get("devices") for row in group.rows)
    processes = dict.fromkeys(row["provenance"]["process"] for row in group.rows)
    facts = group.provenance | {"process": " and ".join(processes), "devices": ", ".join(filter(None, devices))}
    return f"<h3>{escape(group.against)}</h3>{_facts(facts)}"


def _curve(losses: dict[int, float]) -> str:
    if len(losses) < 2:
        return ""
    figure, (axes,) = new_figure(1, 1, (7.0, 2.6))
    axes.plot([*losses], [*losses.values()], color=PALETTE[0], linewidth=1.2)
    axes.set(xlabel="step", ylabel="training loss")
    if min(losses.values()) > 0:
        axes.set_yscale("log")
        number(axes.yaxis)
    return _figure(encode(figure, ".svg"), "svg+xml", "Training loss, the mean of each interval.")
