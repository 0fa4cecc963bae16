"""
Every error quantplug raises on purpose, with its stable code.

A message answers four questions in this order: where, what is, what must be, what to do. The code never changes
once released; programs match on it, people search for it. `CODES` is the whole list, and raising a code that is not
in it is a programming error that the tests catch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

_CODES: dict[str, str] = {
    # plugins
    "QP-PLUG-STRICT": "a plugin failed to load and QUANTPLUG_STRICT=1 asks for an error",
    "QP-PLUG-METADATA": "the metadata of an installed distribution cannot be read, or is shadowed by another version",
    "QP-PLUG-API": "a plugin does not say which version of the hooks it speaks, or speaks another one",
    "QP-PLUG-HOOK": "a plugin implements a hook that does not exist, or with the wrong signature",
    "QP-PLUG-CONFLICT": "two plugins claim one name, or several could answer and none is named",
    "QP-PLUG-MISSING": "a plugin, scheme, kernel, dialect, platform or host that is asked for is not installed",
    "QP-PLUG-ALLOW": "QUANTPLUG_PLUGINS names a plugin that is not installed",
    "QP-PLUG-RENAME": "rules that rename modules are malformed, or could be applied for ever",
    "QP-PLUG-CALL": "a plugin raised, or returned something of the wrong type, when it was asked",
    # config.json and its neighbours
    "QP-CFG-FILE": "a configuration file is missing, unreadable, too large or not a regular file",
    "QP-CFG-ENCODING": "a configuration file is not UTF-8",
    "QP-CFG-JSON": "a configuration file is not valid JSON, or is nested too deeply",
    "QP-CFG-DUPLICATE": "a JSON object has the same key twice",
    "QP-CFG-NUMBER": "a JSON number is NaN, infinite or too long",
    "QP-CFG-METHOD": "quant_method is missing, malformed or not known to an installed dialect",
    "QP-CFG-FIELD": "a field has the wrong type or a value outside its range",
    "QP-CFG-UNKNOWN": "a field that changes the meaning of the tensors is not understood",
    "QP-CFG-CONTRADICTION": "two sources of configuration contradict each other",
    "QP-CFG-OVERRIDE": "the caller's wish contradicts the checkpoint",
    "QP-CFG-REFUSED": "a format is recognised and deliberately not supported",
    # skip rules
    "QP-SKIP-PATTERN": "a pattern is malformed, too long or could run without bound",
    "QP-SKIP-SHARDS": "the shards of a fused module, or the experts of a layer, are not all skipped or all kept",
    "QP-SKIP-EVIDENCE": "a rule and the stored tensors disagree (strict mode)",
    "QP-SKIP-AMBIGUOUS": "the stored tensors of a layer are neither a whole quantized layer nor a dense one",
    # safetensors files and tensors
    "QP-ST-FILE": "a checkpoint file is missing, unreadable, not a regular file, or there is none",
    "QP-ST-HEADER": "a safetensors header is malformed or larger than allowed",
    "QP-ST-LAYOUT": "tensor data overlap, leave holes, or do not cover the file",
    "QP-ST-SHAPE": "a tensor's shape, dtype and byte count do not belong together, or exceed the limits",
    "QP-ST-DTYPE": "a tensor has a dtype that is unknown, or not the one its format declares",
    "QP-ST-NAME": "a tensor name is empty, too long, not printable, or appears twice in some spelling",
    "QP-ST-PATH": "a shard path leaves the checkpoint directory or is not a safetensors file",
    "QP-ST-INDEX": "the index is malformed, or it and the files it names do not agree",
    "QP-ST-CHANGED": "a file changed while it was read",
    "QP-ST-MISSING": "a tensor that a layer needs is not in the checkpoint",
    "QP-ST-EXTRA": "a checkpoint tensor is claimed by nobody",
    "QP-ST-SCALE": "a scale is NaN, infinite, or negative where the format forbids it",
    "QP-ST-CODE": "a code of a weight is NaN or infinite",
    "QP-ST-ZEROS": "zero points contradict the declared format",
    "QP-ST-GIDX": "g_idx is out of range, leaves a group unused, or contradicts the declared format",
    "QP-ST-PADDING": "bits that the format leaves unused are set",
    # planning
    "QP-PLAN-NOKERNEL": "no installed kernel accepts a layer",
    "QP-PLAN-PIN": "a policy pins a kernel that cannot run the layer",
    "QP-PLAN-POLICY": "a policy is malformed or names what does not exist",
    "QP-PLAN-PLATFORM": "a platform is not known or not spelled as expected",
    "QP-PLAN-TIMINGS": "measured times cannot be stored, or nothing can be measured",
    "QP-PLAN-JSON": "a serialized plan is malformed or of another version",
    "QP-PLAN-EXPERTS": "the experts of a layer cannot be brought to one contract without rounding",
    "QP-PLAN-DRAFT": "a draft model is not there, or would run at another precision than its files say",
    "QP-PLAN-MODEL": "the model's modules and the checkpoint's tensors do not belong together",
    # loading
    "QP-LOAD-CLAIM": "a tensor is claimed twice",
    "QP-LOAD-UNFILLED": "elements of a parameter were never written",
    "QP-LOAD-OVERLAP": "elements of a parameter were written twice",
    "QP-LOAD-PREPARE": "a kernel raised while it prepared a layer",
    "QP-LOAD-SOURCE": "the source bytes of a layer are gone, so it cannot be written in its checkpoint form",
    # running
    "QP-RUN-SHAPE": "an input has the wrong number of features",
    "QP-RUN-DTYPE": "an input has a dtype the prepared layer does not take",
    "QP-RUN-DEVICE": "an input lies on another device than the layer",
    "QP-RUN-GRAD": "an input wants a gradient that the kernel does not give",
    "QP-RUN-MOVE": "a prepared layer cannot be moved or cast; load it again instead",
    "QP-RUN-STATE": "a layer is used before its weights are prepared",
    # converting and writing
    "QP-CONV-EXISTS": "the destination exists and is not an interrupted conversion of the same source",
    "QP-CONV-SPACE": "the destination disk is full or not writable",
    "QP-CONV-SOURCE": "the source is not a dense checkpoint",
    "QP-CONV-SCHEME": "the scheme that is to be written can only be read",
    "QP-CONV-VALUE": "a dense weight is NaN or infinite and cannot be quantized",
    "QP-CONV-SPEC": "a weight does not obey the contract of the scheme that is to write it",
    "QP-CONV-CALIBRATION": "the calibration text is missing, too short or the model cannot be run",
    # what lint reports, and never raises
    "QP-LINT-UNUSED": "an entry of the configuration matches no module",
    "QP-LINT-READING": "an entry is read otherwise, or matches more, than its text suggests",
    "QP-LINT-SHARDS": "shards that engines run as one layer are stored in different ways",
    "QP-LINT-ZERO": "stored scales are 0, so that what they scale is 0, too",
    "QP-LINT-TINY": "stored scales are subnormal, so that they lost precision and some processors take them for 0",
    "QP-LINT-HUGE": "stored scales are so large that dequantized weights may overflow",
    "QP-LINT-CODE": "stored codes are NaN or infinite",
    "QP-LINT-PEER": "another engine would decide otherwise about a layer than its stored tensors say",
    "QP-LINT-NOTE": "something that reading the checkpoint brought up",
    # hosts
    "QP-HOST-VERSION": "a framework is missing or older than the adapter needs",
    "QP-HOST-INPUT": "a request to a framework or to a running model is malformed",
    "QP-HOST-MODEL": "a framework does not know a model, or cannot build it",
    "QP-HOST-TOKENIZER": "a checkpoint has no tokenizer that the framework can read",
    "QP-HOST-DEVICE": "a model is to be spread over devices in a way that cannot be served",
}

CODES: Mapping[str, str] = MappingProxyType(_CODES)

_SHOWN = 20


class QuantplugError(Exception):
    """
    The base of every deliberate error.

    Attributes:
        code: stable identifier, a key of `CODES`.
        where: file, tensor, byte, module path or plugin concerned.
        what: what was found there.
        expected: what must be there, and who says so ("" when `what` says it all).
        fix: what the reader can do ("" when nothing is known).
    """

    def __init__(self, code: str, where: str, what: str, *, expected: str = "", fix: str = "") -> None:
        if code not in _CODES:
            raise ValueError(f"undeclared error code {code!r}")
        self.code = code
        self.where = where
        self.what = what
        self.expected = expected
        self.fix = fix
        text = f"{where}: {what}"
        if expected:
            text += f"; expected {expected}"
        if fix:
            text += f". {fix}"
        super().__init__(f"{text} [{code}]")

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword arguments do not pickle by default; ranks and worker processes need them to.
        return (_rebuild, (type(self), self.code, self.where, self.what, self.expected, self.fix))

    def to_json(self) -> dict[str, str]:
        """Return the five fields as a JSON object, for `--json` output and logs."""
        return {"code": self.code, "where": self.where, "what": self.what, "expected": self.expected, "fix": self.fix}


def _rebuild(kind: type[QuantplugError], code: str, where: str, what: str, expected: str, fix: str) -> QuantplugError:
    return kind(code, where, what, expected=expected, fix=fix)


class PluginError(QuantplugError):
    """A plugin is missing, in conflict, or misbehaved (`QP-PLUG-…`)."""


class ConfigError(QuantplugError):
    """A configuration cannot be read or contradicts itself or the caller (`QP-CFG-…`, `QP-SKIP-…`)."""


class CheckpointError(QuantplugError):
    """A checkpoint file or tensor is not what its header, index or format says (`QP-ST-…`)."""


class PlanError(QuantplugError):
    """No plan satisfies what was asked (`QP-PLAN-…`)."""


class LoadError(QuantplugError):
    """Loading was refused or rolled back (`QP-LOAD-…`)."""


class RunError(QuantplugError):
    """A prepared layer was used in a way it cannot serve (`QP-RUN-…`)."""


class ConvertError(QuantplugError):
    """A checkpoint could not be written (`QP-CONV-…`)."""


class HostError(QuantplugError):
    """A framework could not run the checkpoint (`QP-HOST-…`)."""


def list_names(names: Collection[str]) -> str:
    """Return up to 20 names, sorted, and a count of the rest; what cannot be printed is escaped."""
    shown = ", ".join(name if name.isprintable() else ascii(name) for name in sorted(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
