"""
What a look at a checkpoint found: immutable findings, each with its place, what is there, and what to do.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from quantplug.errors import QuantplugError
    from quantplug.jsonio import Json

Severity = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""Worst first: what cannot be loaded or computes something else; what probably is a mistake; what is good to know."""


@dataclass(frozen=True, slots=True)
class Finding:
    """
    One finding.

    Attributes:
        code: stable identifier, a key of `errors.CODES`.
        severity: how bad it is.
        where: file, tensor, entry or module concerned.
        what: what was found there.
        fix: what the reader can do, "" when nothing is known.
        names: modules or tensors that it concerns, the first few.
        count: how many it concerns, those in `names` included.
    """

    code: str
    severity: Severity
    where: str
    what: str
    fix: str = ""
    names: tuple[str, ...] = ()
    count: int = 0

    @classmethod
    def of(cls, error: QuantplugError) -> Finding:
        """Return an error as a finding: what stops planning or loading."""
        what = error.what + (f"; expected {error.expected}" if error.expected else "")
        return cls(error.code, "error", error.where, what, error.fix)


@dataclass(frozen=True, slots=True)
class LintReport:
    """
    All findings about one checkpoint, the worst first.

    Attributes:
        source: the directory.
        dialect: who read its configuration, "" for a dense checkpoint or one whose configuration cannot be read.
        findings: what was found.
        modules: how many modules were looked at.
        scales: how many stored scale tensors were read.
        codes: how many stored weights were read (a deep look only).
        peers: (name, release) of the engines that were compared with.
    """

    source: str
    dialect: str
    findings: tuple[Finding, ...]
    modules: int = 0
    scales: int = 0
    codes: int = 0
    peers: tuple[tuple[str, str], ...] = ()

    @property
    def worst(self) -> Severity | None:
        """The worst severity, None when nothing was found."""
        return next((severity for severity in SEVERITIES if self.count(severity)), None)

    def count(self, severity: Severity) -> int:
        """Return how many findings have a severity."""
        return Counter(finding.severity for finding in self.findings)[severity]

    def to_json(self) -> dict[str, Json]:
        """Return the report as plain JSON."""
        body: dict[str, Json] = asdict(self)
        body["findings"] = [{**asdict(finding), "names": list(finding.names)} for finding in self.findings]
        body["peers"] = [list(peer) for peer in self.peers]
        return body | {"worst": self.worst}
