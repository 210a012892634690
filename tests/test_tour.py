"""The notebook: what it stores, and that its cells run one after another."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

TOUR = Path(__file__).parents[1] / "experiments" / "tour.ipynb"
CELLS = json.loads(TOUR.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_holds_its_pictures_and_is_small():
    outputs = [output for cell in CELLS for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert not any(output["output_type"] == "error" for output in outputs)
    assert TOUR.stat().st_size < 1.5e6


@pytest.mark.slow
def test_the_cells_of_the_notebook_run(monkeypatch):
    assert (
        sum('"1500"' in line and '"750"' in line for cell in CELLS for line in cell["source"]) == 1
    )  # steps and cooldown
    pictures = []
    monkeypatch.setattr(plt, "show", lambda: pictures.append(plt.gcf()))
    names: dict = {}
    for source in ("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"):
        exec(compile(source.replace('"1500"', '"30"').replace('"750"', '"0"'), TOUR.name, "exec"), names)
    assert len(pictures) == 4
    assert names["same"].shape == names["model"].shape == (8, 8, 1)
    assert all(np.isfinite(image).all() for images in names["rows"].values() for image in images)
