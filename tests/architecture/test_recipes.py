"""
Every recipe of every installed plugin: what a conversion announces is what is written.
"""

from __future__ import annotations

import pytest
import torch

from quantplug import registry
from quantplug.spec import LinearShape

RECIPES = {
    (name, scheme): params
    for scheme, provided in sorted(registry().schemes.items())
    for name, params in sorted(provided.item.recipes().items())
}


def test_there_are_recipes():
    """The formats that can be written without calibration are installed."""
    assert {"fp8", "int8", "int4-g64", "mxfp4", "nvfp4"} <= {name for name, _ in RECIPES}


@pytest.mark.parametrize(("name", "scheme"), RECIPES)
def test_what_a_conversion_announces_is_what_is_written(name, scheme):
    """Names, dtypes and shapes, before a weight is read and after."""
    built = registry().scheme(scheme).item.build(RECIPES[name, scheme], name)
    dense = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    announced = built.written(LinearShape(*dense.shape))
    stored = built.encode(built.quantize(dense))
    assert {spec.suffix: (spec.dtypes[0], spec.shape) for spec in announced} == {
        suffix: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for suffix, tensor in stored.items()
    }
