"""
The one place where whatever a plugin raises becomes data.

A plugin is somebody else's code: it may raise anything, end the process politely with `SystemExit`, or hand over an
exception whose message cannot be printed. None of that may end its host or keep other plugins from being asked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from quantplug.errors import QuantplugError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_LONGEST = 2000


@dataclass(frozen=True, slots=True)
class Fault:
    """
    What a call raised.

    Attributes:
        error: exception type and message, one line; of our own errors the message, which ends with the code.
        detail: the traceback.

    """

    error: str
    detail: str = field(default="", compare=False)


def isolated(call: Callable[[], T]) -> T | Fault:
    """
    Call, and return the answer or what was raised instead of one.

    Everything is held back but `KeyboardInterrupt`: `SystemExit`, and the panics of extension modules, are no
    `Exception`, yet none of the host's business.
    """
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - see above
        return _fault(error)


def _fault(error: BaseException) -> Fault:
    import traceback

    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - a message that raises is still only a message
        text = "(its message cannot be printed)"
    if not isinstance(error, QuantplugError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return Fault(text[:_LONGEST], "".join(traceback.format_exception(error)))
