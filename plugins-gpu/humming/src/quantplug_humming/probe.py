"""
Whether the package is here.
"""

from __future__ import annotations

from functools import cache

from quantplug.kernel import Rejected


@cache
def probe() -> Rejected | None:
    """Return why the kernels cannot be used on this machine, or None."""
    try:
        import humming
    except (ImportError, RuntimeError, OSError) as error:
        return Rejected("dependency", f"humming cannot be imported: {error}", "pip install humming-kernels")
    version = str(getattr(humming, "__version__", ""))
    if not version.startswith("0.1."):
        return Rejected("dependency", f"humming-kernels is {version or 'of an unknown version'}", "install 0.1.19")
    return None


@cache
def probe_experts() -> Rejected | None:
    """Return why the kernel for experts cannot be used, which also needs Triton, or None."""
    refusal = probe()
    if refusal is not None:
        return refusal
    try:
        import triton  # noqa: F401  # nothing of it is needed here
    except ImportError as error:
        return Rejected("dependency", f"triton cannot be imported: {error}", "pip install triton")
    return None
