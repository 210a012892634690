"""The Python in the README runs as it stands."""

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_of_the_readme(block):
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    if "images" in names:
        assert names["images"].shape == (4, 8, 8, 3)
