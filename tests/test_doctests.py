"""The examples in docstrings."""

import doctest
import importlib

import pytest

import gddim

MODULES = (
    "samplers.adams", "samplers.grids", "samplers.solver", "samplers.method", "sde.base", "sde.cld", "sde.general",
    "sde.path", "sde.vp", "model", "denoiser",
    "loss", "nn", "nn.mlp", "nn.ncsnpp", "data", "data.sources",
)  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"gddim.{name}")
    failed, tried = doctest.testmod(module, extraglobs={"gddim": gddim})
    assert tried
    assert not failed
