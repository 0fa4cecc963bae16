"""
Tests that need an accelerator: `pytest tests/device` on a machine that has one. Elsewhere they are skipped, and say so.
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def cuda() -> torch.device:
    """The first CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: torch.cuda.is_available() is False here")
    return torch.device("cuda")
