"""
What one stored linear layer is: its rule and its tensors brought together, from headers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.errors import CheckpointError, ConfigError, list_names
from quantplug.evidence import DENSE_DTYPES, DENSE_SUFFIX
from quantplug.plan import Segment
from quantplug.schemes import SchemeCache
from quantplug.spec import LinearShape

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from quantplug.checkpoint import TensorHeader
    from quantplug.config import QuantConfig
    from quantplug.evidence import StoredModules
    from quantplug.inventory import ModuleInfo
    from quantplug.matcher import Matcher
    from quantplug.registry import Registry
    from quantplug.scheme import LinearScheme
    from quantplug.skip import Ruling, SchemeRef
    from quantplug.spec import ParamSpec, WeightSpec


class Settler:
    """Settles shards one by one; equal schemes are built once."""

    def __init__(
        self, config: QuantConfig, matcher: Matcher, stored: StoredModules, registry: Registry, *, strict: bool
    ) -> None:
        self.schemes = SchemeCache(registry)
        self.warnings: dict[str, None] = {}
        """What came up so far, once each."""
        self._config = config
        self._matcher = matcher
        self._stored = stored
        self._strict = strict

    def settle(self, module: ModuleInfo, name: str, ruling: Ruling) -> tuple[SchemeRef | None, str]:
        """Let the stored tensors confirm the ruling for one shard, or overrule it where they are unambiguous."""
        if self._config.on_load:
            if ruling.use is not None and DENSE_SUFFIX not in self._stored.tensors(name):
                raise self.missing(module)
            return ruling.use, ""
        asked = ruling.use or self._matcher.otherwise(module, name)
        if asked is None:
            return None, ""
        scheme = self.schemes.get(asked, self._config.dialect)
        described = self._stored.metadata(name)
        if described:
            scheme.check_metadata(described, {s: h.shape for s, h in self._stored.tensors(name).items()}, name)
        evidence = self._stored.judge(name, scheme.suffixes, scheme.required_suffixes)
        if evidence == "both":
            raise ConfigError(
                "QP-SKIP-AMBIGUOUS",
                name,
                "stores both a dense weight and "
                + ", ".join(sorted((scheme.suffixes - {DENSE_SUFFIX}) & self._stored.tensors(name).keys())),
                expected="one of the two",
                fix="The file was written wrongly; ask its maker, or delete one of the two.",
            )
        if evidence == "partial":
            lacking = sorted(scheme.required_suffixes - self._stored.tensors(name).keys())
            raise CheckpointError(
                "QP-ST-MISSING",
                name,
                f"lacks {', '.join(lacking)}",
                expected=f"every tensor of {scheme.describe()}",
                fix="The file is incomplete; download or convert it again.",
            )
        if evidence == "absent" and ruling.use is not None:
            raise self.missing(module)
        stored_as = asked if evidence == "quantized" else None
        if (stored_as is None) == (ruling.use is None):
            return ruling.use, ""
        said = "keeps it whole" if ruling.use is None else f"assigns {scheme.describe()}"
        note = f"evidence: {self.words(ruling)} {said}, but {name} is stored {'quantized' if stored_as else 'dense'}"
        if self._strict:
            raise ConfigError(
                "QP-SKIP-EVIDENCE",
                name,
                note.removeprefix("evidence: "),
                expected="rules and tensors to agree (strict)",
                fix="Plan without strict to let the tensors decide.",
            )
        self.warnings[note] = None
        return stored_as, note

    def segment(self, name: str, ref: SchemeRef, in_features: int) -> Segment:
        """
        Return a quantized shard, its tensors checked against what its scheme declares.

        Args:
            name: its checkpoint path.
            ref: the scheme it is stored by, or is to be quantized to.
            in_features: K when the model says so, else 0.

        Raises:
            CheckpointError: `QP-ST-SHAPE`, `QP-ST-DTYPE`.
            ConfigError: `QP-CFG-…` when the scheme cannot describe such a layer.
        """
        scheme = self.schemes.get(ref, self._config.dialect)
        stored = self._stored.tensors(name)
        if self._config.on_load:
            return self._dense_segment(name, ref, scheme, stored[DENSE_SUFFIX])
        shapes = {suffix: header.shape for suffix, header in stored.items() if suffix in scheme.suffixes}
        shape = scheme.shape_of(shapes, name)
        if in_features not in (0, shape.in_features):
            # Packed rows whose last word is not full fit more than one width; of those, the model's own counts.
            same = LinearShape(shape.out_features, in_features)
            shape = same if _all_fit(scheme.params(same), shapes) else shape
        tensors = []
        for param in scheme.params(shape):
            header = stored.get(param.suffix)
            if header is None:
                continue
            if header.shape != param.shape and header.shape not in param.other_shapes:
                raise CheckpointError(
                    "QP-ST-SHAPE",
                    f"{header.file}: {header.name}",
                    f"shape {list(header.shape)}",
                    expected=f"{list(param.shape)} for a {shape.out_features} x {shape.in_features} layer in "
                    f"{scheme.describe()}",
                    fix="Check bits and group_size in the configuration.",
                )
            if header.dtype not in param.dtypes:
                raise CheckpointError(
                    "QP-ST-DTYPE",
                    f"{header.file}: {header.name}",
                    f"dtype {header.dtype}",
                    expected=" or ".join(param.dtypes),
                )
            tensors.append((param.suffix, header.name))
        return Segment(name, ref, shape, tuple(tensors))

    def _dense_segment(self, name: str, ref: SchemeRef, scheme: LinearScheme, header: TensorHeader) -> Segment:
        """Return a segment that is stored dense and quantized while loading."""
        where = f"{header.file}: {header.name}"
        if len(header.shape) != 2:
            raise CheckpointError("QP-ST-SHAPE", where, f"shape {list(header.shape)}", expected="two dimensions")
        if header.dtype not in DENSE_DTYPES:
            raise CheckpointError("QP-ST-DTYPE", where, f"dtype {header.dtype}", expected=" or ".join(DENSE_DTYPES))
        shape = LinearShape(*header.shape)
        try:
            scheme.params(shape)
        except ConfigError as error:
            raise ConfigError(
                error.code, name, error.what, expected=error.expected, fix=error.fix or f"Skip it: skip=[{name!r}]."
            ) from error
        return Segment(name, ref, shape, ((DENSE_SUFFIX, header.name),), quantize=True)

    def contract(self, segment: Segment) -> WeightSpec:
        """Return the contract of a shard's weight: its scheme's, for the dtypes that its tensors are stored in."""
        scheme = self.schemes.get(segment.scheme, segment.name)
        if segment.quantize:
            return scheme.weight_spec()
        stored = self._stored.tensors(segment.name)
        return scheme.stored_spec({suffix: stored[suffix].dtype for suffix, _ in segment.tensors})

    def words(self, ruling: Ruling) -> str:
        """Return who decided, for people."""
        if ruling.rule is not None:
            return f"{ruling.rule.entry.text} ({ruling.rule.entry.origin})"
        if ruling.shards:
            return "; ".join(f"{shard}: {text}" for shard, text in ruling.shards)
        if self._config.on_load:
            return "quantized on load, as the caller wishes"
        return f"default of {self._config.dialect}" if self._config.dialect else "the checkpoint is dense"

    def missing(self, module: ModuleInfo, names: Iterable[str] = ()) -> CheckpointError:
        """Return the error about a module without tensors, or about those of its shards that have none."""
        lacking = list(names)
        return CheckpointError(
            "QP-ST-MISSING",
            module.path,
            f"the checkpoint has no tensors for {list_names(lacking) if lacking else 'it'}",
            expected="a dense weight or the tensors of a quantized layer under "
            + ("each of them" if lacking else " or ".join(module.shards or (module.name,))),
            fix="The checkpoint belongs to another model, or is incomplete.",
        )


def _all_fit(params: Iterable[ParamSpec], stored: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether every stored tensor has a shape that is declared for it."""
    return all(stored.get(p.suffix, p.shape) in (p.shape, *p.other_shapes) for p in params)
