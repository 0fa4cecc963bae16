"""
What this adapter needs of other packages beyond their being installed.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from quantplug.errors import HostError

OLDEST, NEXT_MAJOR = 5, 6


def require_transformers() -> None:
    """
    Check the installed Transformers without importing it.

    Raises:
        HostError: `QP-HOST-VERSION` when it is missing, or of a major version that this adapter does not know.
    """
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = ""
    major = found.partition(".")[0]
    if not (major.isdigit() and OLDEST <= int(major) < NEXT_MAJOR):
        raise HostError(
            "QP-HOST-VERSION",
            "transformers",
            f"version {found} is installed" if found else "is not installed",
            expected=f"at least {OLDEST}.0 and below {NEXT_MAJOR}",
            fix=f'pip install "transformers>={OLDEST}.0,<{NEXT_MAJOR}"',
        )


def require_accelerate() -> None:
    """
    Check that the package is there without which Transformers takes no device map.

    Raises:
        HostError: `QP-HOST-VERSION` when it is not.
    """
    try:
        version("accelerate")
    except PackageNotFoundError:
        raise HostError(
            "QP-HOST-VERSION",
            "accelerate",
            "is not installed",
            expected="it to be there when a device_map is given",
            fix='pip install "quantplug-transformers[device-map]", or leave device_map out to load on the CPU.',
        ) from None
