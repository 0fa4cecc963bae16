"""
Checked loading: every tensor claimed once, every element written, all or nothing.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A callback that is told how far a long operation is; what it raises never disturbs the operation."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """
        Report progress.

        Args:
            stage: what is going on ("read", "convert").
            done: units finished, rising within a stage.
            total: units in all.
        """
