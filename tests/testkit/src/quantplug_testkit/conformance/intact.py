"""
Whether a vendor's class still holds all standard tests.
"""

from __future__ import annotations

import inspect

from quantplug_testkit.conformance.asked import Asked

_SETTINGS = ("kernel", "platform", "device")


def standard_names(standard: type[Asked]) -> tuple[str, ...]:
    """Return, in alphabetical order, the names of a conformance class that a vendor leaves alone."""
    return tuple(sorted(name for name in dir(standard) if not name.startswith("__") and name not in _SETTINGS))


def assert_intact(tests: type[Asked], standard: type[Asked]) -> None:
    """Assert that nothing of a conformance class was changed, except tests marked `xfail` with a reason."""
    __tracebackhide__ = True
    changed = [name for name in standard_names(standard) if not _is_intact(tests, standard, name)]
    assert not changed, (
        f"{tests.__name__} changes {', '.join(changed)} of {standard.__name__}; only a test may be "
        "overridden, and only under xfail with a reason"
    )


def _is_intact(tests: type[Asked], standard: type[Asked], name: str) -> bool:
    found = inspect.getattr_static(tests, name)
    if found is inspect.getattr_static(standard, name):
        return True
    if not name.startswith("test_"):
        return False
    marks = getattr(found, "pytestmark", [])
    return any(mark.name == "xfail" and mark.kwargs.get("reason") for mark in marks)
