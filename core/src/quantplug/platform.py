"""
What machine a plan is for: a value, never a look at the machine.

`Platform.parse` builds the value for hardware one does not have; `detect` (in `detect.py`) is the only code that looks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantplug.errors import PlanError

_GRAMMAR = re.compile(r"(?P<kind>[a-z][a-z0-9_]{0,15})(:(?P<arch>[a-z0-9][a-z0-9._-]{0,31}))?")


@dataclass(frozen=True, slots=True)
class Platform:
    """
    One kind of machine.

    Attributes:
        kind: torch device type ("cpu", "cuda", "npu").
        arch: architecture within the kind ("x86_64", "9.0", "910b"), "" when it was not said.
        features: named abilities ("avx512_bf16"); empty when not known, so a kernel must not require one to accept.
        memory: bytes of device memory, or None when not known; never part of a plan's hash.
        versions: (name, version) of what runs there ("torch", "2.13.0"), sorted; empty for a parsed platform.
        device: what the machine at hand calls itself ("NVIDIA H100 80GB HBM3"), which measured times are kept by; ""
            for a parsed platform.
    """

    kind: str
    arch: str = ""
    features: frozenset[str] = frozenset()
    memory: int | None = None
    versions: tuple[tuple[str, str], ...] = ()
    device: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """
        Read `kind` or `kind:arch` ("cpu", "cuda:9.0", "npu:910b").

        Raises:
            PlanError: `QP-PLAN-PLATFORM` when the text does not follow that grammar.
        """
        found = _GRAMMAR.fullmatch(text)
        if found is None:
            raise PlanError(
                "QP-PLAN-PLATFORM",
                f"platform {text!r}",
                "not a platform",
                expected="KIND or KIND:ARCH, such as cpu, cuda:9.0 or npu:910b",
            )
        return cls(found["kind"], found["arch"] or "")

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}" if self.arch else self.kind
