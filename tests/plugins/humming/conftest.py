"""The stand-in for humming, for tests that ask for it."""

from __future__ import annotations

import sys

import humming_stand_in
import pytest

from quantplug_humming.choice import choose
from quantplug_humming.prepare import layer_config
from quantplug_humming.product import way


@pytest.fixture
def stand_in(monkeypatch):
    """Put the stand-in where the package would be; what was remembered of either is forgotten."""
    for remembered in (choose, layer_config, way):
        remembered.cache_clear()
    for name, module in humming_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    yield sys.modules["humming"]
    for remembered in (choose, layer_config, way):
        remembered.cache_clear()
