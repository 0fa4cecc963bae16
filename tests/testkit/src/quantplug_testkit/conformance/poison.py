"""
Memory that nobody has written yet, made visible.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """
    Let every `torch.empty` within return NaN (the largest value for integers), so that what is never written shows.

    The fill comes with torch's deterministic mode. Operators that have no deterministic form only warn about it, and
    those warnings are not the point here.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # a property of the module, which type checkers do not see
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
            settings.fill_uninitialized_memory = fill
