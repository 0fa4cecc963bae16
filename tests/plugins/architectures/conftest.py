"""
Each tiny model is built once.
"""

from __future__ import annotations

import pytest
from tiny_families import build


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Return how to get (a model by family, the directory that Transformers saved it in)."""
    built = {}

    def get(family):
        if family not in built:
            directory = tmp_path_factory.mktemp(family)
            built[family] = build(family, directory), directory
        return built[family]

    return get
