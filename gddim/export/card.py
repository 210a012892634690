"""The page that goes with a network: what it is, what it draws, how well, and how to use it."""

from __future__ import annotations

import re
from typing import Any

from etils import epath

from gddim.errors import UserError
from gddim.evaluation.figures import process_in_words
from gddim.evaluation.report import table
from gddim.evaluation.sweep import RESULTS, read_rows
from gddim.experiment.outputs import origin_of
from gddim.experiment.workdir import OBJECTS, RECORDS
from gddim.samplers import load_table
from gddim.weights import Weights

UNSTATED = "not stated: ask whoever trained it"


def picture(run: epath.Path, weights: Weights) -> epath.Path | None:
    """The run's picture of samples, where it is of the step that is exported."""
    path = run / "samples.png"
    if not (run.is_dir() and path.exists()):
        return None
    try:
        return path if (origin_of(path) or {}).get("step") == weights.about.get("step") else None
    except UserError:
        return None


def results(run: epath.Path, weights: Weights) -> str:
    """The run's table of the parameters that are exported, before or after they are rounded; nothing where it has none."""
    path = run / RESULTS
    rows = read_rows(path) if run.is_dir() and path.exists() else []
    rows = [row for row in rows if row["provenance"].get("checkpoint") in _digests(weights)]
    return table(rows) if rows else ""


def tables(folder: epath.Path, weights: Weights) -> list[epath.Path]:
    """The files of the tables that were fitted to the parameters that are exported, before or after they are rounded."""
    found = sorted(folder.glob("*.npz")) if folder.exists() else []
    return [path for path in found if load_table(path).about["network"] in _digests(weights)]


def _digests(weights: Weights) -> set[str]:
    return {weights.about[name] for name in ("checkpoint", "rounded_from") if name in weights.about}


def card(weights: Weights, file: str, image: str | None, results: str = "", note: str = "", own: bool = False) -> str:
    """The page in Markdown; `own`: of a network that belongs to its process also where it predicts data."""
    config, about = weights.config, weights.about
    told = config.get(OBJECTS, {}).get("sde") or config["sde"]["type"]
    data = config["model"]["predicts"] == "data"
    serves = f"{'a denoiser' if data else 'the ε'} of {process_in_words(told)}"
    option = argument = ""
    if data and not own:
        serves, option, argument = "one network for every process of gddim", " --process cld", ', process="cld"'
    parts = [
        f"# {config['name']}",
        f"A diffusion model of {about['parameters']:,} parameters: {serves} ([gddim](https://arxiv.org/abs/2206.05564)).",
        note,
        f"![Samples]({image})" if image else "",
        f'    model = gddim.load("{file}")\n    images = model.sample(16{argument}, nfe=20)',
        f"    python -m gddim.generate {file}{option} --nfe 20 --seeds 0-63 OUT" if _pictures(weights) else "",
        f"## Results\n\n{results.strip()}" if results else "",
        f"## Facts\n\n| | |\n| --- | --- |\n{_facts(weights)}",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def front_matter(weights: Weights) -> str:
    """What the Hugging Face hub reads at the head of a page."""
    known = weights.licence.lower() if re.fullmatch(r"[A-Za-z0-9.+-]+", weights.licence) else "other"
    kind = "pipeline_tag: unconditional-image-generation\n" if _pictures(weights) else ""
    return f"---\nlicense: {known}\nlibrary_name: gddim\n{kind}---\n\n"


def _pictures(weights: Weights) -> bool:
    """Whether what it draws are pictures."""
    shape = weights.config[RECORDS]["shape"]
    return len(shape) == 3 and shape[-1] in (1, 3)


def _facts(weights: Weights) -> str:
    config, about = weights.config, weights.about
    records, train = config.get(RECORDS, {}), config.get("train", {})
    average, shape = about.get("weights"), tuple(records["shape"])
    count = f"{records['count']:,} × " if "count" in records else ""
    facts: dict[str, Any] = {
        "data": f"{config['data'].get('type')}, {count}{shape}, digest {records.get('digest', 'not kept')}",
        "trained through": config.get(OBJECTS, {}).get("sde") or config["sde"]["type"],
        "steps": f"{about.get('step', 0):,} of {train.get('batch')}: {about.get('images', 0):,} images",
        "parameters": {"ema": f"average, decay {train.get('ema')}", "raw": "of the last step"}.get(
            str(average), f"average, σ_rel {average}"
        ),
        "kept in": about["dtype"],
        "digest of the parameters": about.get("checkpoint"),
        "rounded from those of": about.get("rounded_from"),
        "exported by": ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        "commit": about.get("commit"),
        "licence": weights.licence or UNSTATED,
    }
    if config["data"].get("type") == "Elsewhere":  # how it was trained, a converted checkpoint does not tell
        facts |= {"data": f"of whoever published it, {shape}", "steps": None, "parameters": None}
    return "\n".join(f"| {name} | {fact} |" for name, fact in facts.items() if fact)
