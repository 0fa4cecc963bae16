"""
Fixtures that tests of several packages share.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from installed_site import Site

if not Path("/dev/nvidiactl").exists():
    # Without a GPU, Triton's kernels run through its interpreter. It has to know before anything imports triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# What somebody measured on this machine has no part in what is tested.
os.environ["QUANTPLUG_TIMINGS"] = "off"


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
