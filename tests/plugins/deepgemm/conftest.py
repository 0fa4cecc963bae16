"""The stand-in for deep_gemm, for tests that ask for it."""

from __future__ import annotations

import os
import sys

import deepgemm_stand_in
import pytest


@pytest.fixture
def stand_in(monkeypatch):
    """Put the stand-in where the package would be."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles for the GPU here: see tests/device")
    monkeypatch.setitem(sys.modules, "deep_gemm", deepgemm_stand_in.module())
    return sys.modules["deep_gemm"]
