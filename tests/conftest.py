"""
Fixtures that tests of several packages share.
"""

from __future__ import annotations

import sys

import pytest
from installed_site import Site


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Return an empty `Site` on the import path; what is imported from it is forgotten afterwards."""
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(directory)
    yield Site(directory)
    for name, module in list(sys.modules.items()):
        if str(directory) in str(getattr(module, "__file__", None)):
            del sys.modules[name]
