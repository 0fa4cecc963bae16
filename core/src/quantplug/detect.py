"""
The only code that looks at the machine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from quantplug.platform import Platform


class PlatformProvider(ABC):
    """Recognises one kind of machine; a plugin's `quantplug_platforms` returns instances."""

    kind: ClassVar[str]
    """The `Platform.kind` it recognises, unique among installed plugins."""

    @abstractmethod
    def detect(self) -> Platform | None:
        """
        Return the platform at hand, or None when this machine is not of that kind.

        Called at most once per process. Imports torch or a vendor package only when something cheap (a device file)
        says that the machine may be of that kind.
        """
