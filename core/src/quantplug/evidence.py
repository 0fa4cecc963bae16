"""
What the stored tensors say about each module, and the account of who consumes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from quantplug.errors import CheckpointError, list_names
from quantplug.expertnames import one_expert
from quantplug.kvcache import is_kv_scale
from quantplug.plan import LeftTensors
from quantplug.skip import SCHEMED

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from quantplug.checkpoint import Checkpoint, TensorHeader
    from quantplug.inventory import Inventory, ModuleInfo
    from quantplug.plan import LayerPlan

Evidence = Literal["quantized", "partial", "dense", "both", "absent"]

DENSE_SUFFIX = "weight"
BIAS_SUFFIX = "bias"
DENSE_DTYPES = ("bfloat16", "float16", "float32")
"""What the `weight` of a layer that stayed whole may be."""
_CODE_DTYPES = ("int8", "uint8", "int32", "uint32")
_CODE_NAMES = (DENSE_SUFFIX, "_proj", "_blocks", "_packed", "_scale", "_scales", "_zero_point", "qweight", "qzeros")
NOT_RUN = "not run by the model class"
"""Why tensors are left that an engine has no module for, on purpose."""
# Values that every engine computes anew from the configuration; old exporters stored them all the same.
_DERIVED_SUFFIXES = ("rotary_emb.inv_freq", "attn.masked_bias", "attention.masked_bias")


def holds_codes(header: TensorHeader) -> bool:
    """
    Whether a stored tensor holds quantized values, whatever the format.

    Floats of 8 bits and less are codes or scales, nothing else is stored so. Integers are told by their names as well,
    since models have integers of their own: positions, masks, counters.
    """
    suffix = header.name.rpartition(".")[2]
    return header.dtype.startswith(("float8", "float4")) or (
        header.dtype in _CODE_DTYPES and suffix.endswith(_CODE_NAMES)
    )


def check_whole(module: ModuleInfo, headers: Iterable[TensorHeader]) -> None:
    """
    Check that none of the tensors of a module that stays as it is holds quantized values.

    Raises:
        CheckpointError: `QP-ST-DTYPE`, saying what cannot be read yet, or that no rule concerns it.
    """
    for header in filter(holds_codes, headers):
        if module.kind in SCHEMED:
            why = "the rules that concern this layer name no format that stores them so"
            fix = "Check that the configuration belongs to these files; a layer that stays whole has a dense weight."
        else:
            what = "embeddings" if module.kind == "embedding" else "such a module"
            why = f"{what} in quantized form cannot be read"
            fix = "Use a copy of the model that keeps them whole, in bfloat16 for instance."
            if module.kind == "other" and (len(header.shape) > 2 or "experts" in header.name.split(".")):
                why = "no name rule of its family says how its experts lie"
                fix = "Describe the family: a plugin's quantplug_architectures returns its rules."
        raise CheckpointError(
            "QP-ST-DTYPE",
            f"{header.file}: {header.name}",
            f"dtype {header.dtype}: it holds quantized values, and {why}",
            expected=" or ".join(DENSE_DTYPES),
            fix=fix,
        )


class StoredModules:
    """The tensors of a checkpoint by module path and suffix."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._modules: dict[str, dict[str, TensorHeader]] = {}
        self.kv_scales = tuple(name for name in checkpoint.tensors if is_kv_scale(name))
        """Names of stored scales of a cache of keys and values; they belong to no module."""
        handed = frozenset(self.kv_scales)
        for header in checkpoint.tensors.values():
            if header.name in handed:
                continue
            module, _, suffix = header.name.rpartition(".")
            self._modules.setdefault(module, {})[suffix] = header
        self._said: dict[str, dict[str, str]] = {}
        for name, text in checkpoint.metadata.items():
            module, dot, suffix = name.rpartition(".")
            if dot:
                self._said.setdefault(module, {})[suffix] = text

    @property
    def paths(self) -> Collection[str]:
        """Module paths that have tensors."""
        return self._modules.keys()

    def tensors(self, module: str) -> Mapping[str, TensorHeader]:
        """Return the tensors directly below a module path, by suffix; empty when there are none."""
        return self._modules.get(module, {})

    def metadata(self, module: str) -> Mapping[str, str]:
        """Return what the files' `__metadata__` says under names of a module's tensors, by suffix; mostly nothing."""
        return self._said.get(module, {})

    def unstack(self, inventory: Inventory) -> None:
        """
        Let every projection of stacked experts be a module, whose tensors have the shapes that one expert's have.

        Raises:
            CheckpointError: `QP-ST-SHAPE` for a tensor that does not hold as many experts as the layer has.
        """
        for module in inventory:
            if module.experts is None or not module.experts.files.stacked:
                continue
            stored = self._modules.get(module.name, {})
            for suffix, (projection, ending) in module.experts.files.stacked_names.items():
                header = stored.pop(suffix, None)
                if header is None:
                    continue
                if not ending.common and header.shape[:1] != (module.experts.count,):
                    raise CheckpointError(
                        "QP-ST-SHAPE",
                        f"{header.file}: {header.name}",
                        f"shape {list(header.shape)}",
                        expected=f"{module.experts.count} experts along the first axis",
                        fix="Check the number of experts in config.json, and that the files belong to this model.",
                    )
                path = f"{module.name}.{projection}"
                self._modules.setdefault(path, {})[ending.suffix] = one_expert(header, ending)

    def judge(self, module: str, suffixes: Collection[str], required: Collection[str]) -> Evidence:
        """
        Say what the stored tensors of a module are.

        Args:
            module: checkpoint path.
            suffixes: those of the format in question; it may have a `weight` of its own, in a dtype of its own.
            required: those it cannot do without.
        """
        stored = self.tensors(module)
        dense = DENSE_SUFFIX in stored and (DENSE_SUFFIX not in suffixes or stored[DENSE_SUFFIX].dtype in DENSE_DTYPES)
        found = [suffix for suffix in suffixes if suffix in stored and not (dense and suffix == DENSE_SUFFIX)]
        if not found:
            return "dense" if dense else "absent"
        if dense:
            return "both"
        return "quantized" if all(suffix in stored for suffix in required) else "partial"

    def account(
        self, layers: Iterable[LayerPlan], inventory: Inventory, elsewhere: Collection[str] = ()
    ) -> tuple[LeftTensors, ...]:
        """
        Check that every tensor is claimed exactly once, and return those left on purpose, by reason.

        Args:
            layers: the plans of all modules.
            inventory: the modules.
            elsewhere: tensors that another plan accounts for, when a model and its draft lie in the same files.

        Raises:
            CheckpointError: `QP-ST-EXTRA` listing the tensors that nobody claims.
        """
        claimed = {name for layer in layers for name in layer.tensors}
        claimed |= {name for layer in layers for segment in layer.segments for _, name in segment.tensors}
        tied = {module.name: module.tied_to for module in inventory if module.tied_to}
        unused = frozenset(inventory.unused)
        handed = frozenset(self.kv_scales)
        left: dict[str, list[str]] = {}
        extra: list[str] = []
        for name in self._checkpoint.tensors:
            if name in claimed or name in handed or name in elsewhere:
                continue
            owner = tied.get(name.rpartition(".")[0])
            if owner:
                left.setdefault(f"stale copy: tied to {owner}", []).append(name)
            elif name in unused:
                left.setdefault(NOT_RUN, []).append(name)
            elif name.endswith(_DERIVED_SUFFIXES):
                left.setdefault("derived buffer: computed from the configuration", []).append(name)
            else:
                extra.append(name)
        if extra:
            raise CheckpointError(
                "QP-ST-EXTRA",
                str(self._checkpoint.directory),
                f"{len(extra)} tensor(s) are claimed by no module: {list_names(extra)}",
                expected="every tensor to belong to one module of the model",
                fix="A scale or zero point here usually means that a skip rule hides a quantized layer.",
            )
        return tuple(LeftTensors(reason, tuple(names)) for reason, names in left.items())
