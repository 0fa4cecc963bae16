"""
The spelling `quant_method: "fp8"`: one scale per tensor or per block, with static or dynamic activations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.activations import spell_activation
from quantplug.config import Dialect, Field, QuantConfig
from quantplug.entries import rules_from_dynamic
from quantplug.skip import SchemeRef
from quantplug.spec import ActivationSpec, ElementType
from quantplug_fp8 import cache, gptqmodel
from quantplug_fp8.fields import (
    POSITIVE_LISTS,
    agree,
    block_size,
    layer_rules,
    positive_rules,
    refuse_meaning,
    unknown_keys,
    word,
)
from quantplug_fp8.parameters import EITHER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.config import RawConfig
    from quantplug.jsonio import Json

_ACTIVATION_SCHEMES = {"dynamic": "dynamic", "static": "static"}
_SHORT = {
    "e4m3": ElementType.FLOAT8_E4M3FN.value,
    "e4m3fn": ElementType.FLOAT8_E4M3FN.value,
    "e5m2": ElementType.FLOAT8_E5M2.value,
    "e4m3fnuz": ElementType.FLOAT8_E4M3FNUZ.value,
    "e5m2fnuz": ElementType.FLOAT8_E5M2FNUZ.value,
}
_FORMATS = {**_SHORT, **{f"float8_{name}": value for name, value in _SHORT.items()}}
_FORMAT_KEYS = ("fmt", "format", "checkpoint_format")
"""The type of the codes; GPTQModel has the latter two."""
_SCALE_FORMATS = {"float": "float32", "ue8m0": "float8_e8m0fnu"}
_MICROSCALED = (1, 32)
"""Blocks of MXFP8, whose scales are bytes."""

_DYNAMIC = "dynamic"
_READ = frozenset({
    "quant_method", "activation_scheme", "weight_block_size", "scale_fmt", "ignored_layers", "modules_to_not_convert",
    "group_size", "act_dynamic", _DYNAMIC, *_FORMAT_KEYS, *POSITIVE_LISTS, *cache.KEYS, *gptqmodel.KEYS,
})  # fmt: skip
_BOOKKEEPING = frozenset({
    "sym", "act_sym", "act_group_size", "autoround_version", "provider", "backend", "iters", "nsamples", "seqlen",
    "batch_size", "dataset", "lr", "minmax_lr", "amp", "enable_quanted_input", "enable_minmax_tuning",
    "enable_norm_bias_tuning", "low_gpu_mem_usage", "gradient_accumulate_steps",
})  # fmt: skip
"""Keys of auto-round's files of this kind that say nothing more about the tensors; listed and left out of account."""
_MEANING: dict[str, tuple[Json, ...]] = {
    "bits": (8,),
    "act_bits": (8,),
    "data_type": ("fp", "fp8"),
    "act_data_type": ("fp", "fp8"),
    "method": ("fp8",),
    "desc_act": (),
    "expert_dtype": ("fp8",),
    "modules_to_convert": (),
    "config_groups": (),
    "sparsity_config": (),
    "rotation_config": (),
}
"""Keys that would change what the tensors mean, with the values that do not."""
_DEQUANTIZE = "dequantize"


class FP8Dialect(Dialect):
    """Reads FP8 configurations as Transformers, vLLM and SGLang do."""

    name = "fp8"
    methods = ("fp8",)

    def parse(self, raw: RawConfig) -> QuantConfig:
        """
        Turn the fields into one scheme for all linear layers, and rules for those that stay whole.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-CONTRADICTION`, `QP-SKIP-PATTERN`.
        """
        refuse_meaning(raw, _MEANING)
        element = _element(raw)
        block = block_size(raw)
        scheme = word(raw, "activation_scheme", _ACTIVATION_SCHEMES, "dynamic")
        agree(raw, "act_dynamic", (scheme == "dynamic",), f"activation_scheme {scheme!r}")
        scale_format = word(raw, "scale_fmt", _SCALE_FORMATS, "float")
        permission = _activation(element, block, scale_format, static=scheme == "static")
        if gptqmodel.divides(raw):
            use = gptqmodel.scheme_ref(raw, element, block, permission)
        else:
            use = _scheme(raw, element, block, spell_activation(permission))
        positive = positive_rules(raw, use)
        effective: dict[str, Json] = {
            "activation_scheme": scheme,
            "weight_block_size": list(block) if block else None,
            "fmt": element.value,
        }
        missing = [Field(key, value, raw.origin(key)) for key, value in effective.items() if key not in raw.fields]
        return QuantConfig(
            self.name,
            None if positive else use,
            (*rules_from_dynamic(raw.fields.get(_DYNAMIC), use, raw.origin(_DYNAMIC)), *layer_rules(raw), *positive),
            (*(Field(key, value, raw.origin(key)) for key, value in raw.fields.items()), *missing),
            tuple(_notes(raw)),
            kv_cache=cache.kv_cache(raw),
        )


def _element(raw: RawConfig) -> ElementType:
    """Return the type of the codes, which several keys may name; raises `ConfigError` (`QP-CFG-…`)."""
    named = {key: word(raw, key, _FORMATS, "") for key in _FORMAT_KEYS if raw.fields.get(key) is not None}
    if len(set(named.values())) > 1:
        key, *_ = named
        agree(raw, key, (), f"{' and '.join(list(named)[1:])} of another type")
    return ElementType(next(iter(named.values()), ElementType.FLOAT8_E4M3FN.value))


def _activation(
    element: ElementType, block: tuple[int, int] | None, scale_format: str, *, static: bool
) -> ActivationSpec:
    """Return what the readers do with x: one stored scale, or dynamic ones per token or along the width of a block."""
    if static:
        return ActivationSpec(element, "tensor", dynamic=False)
    if block is None:
        return ActivationSpec(element, "token", dynamic=True)
    return ActivationSpec(element, "group", dynamic=True, group_size=block[1], scale_dtype=scale_format)


def _scheme(raw: RawConfig, element: ElementType, block: tuple[int, int] | None, activation: str) -> SchemeRef:
    if block == _MICROSCALED and element is ElementType.FLOAT8_E4M3FN and activation.endswith(_SCALE_FORMATS["ue8m0"]):
        return _ref("mxfp8", {"scale_name": "weight_scale_inv", "activation": activation})
    # How the scales are called does not follow from the configuration: the engines' per-tensor files have weight_scale
    # and input_scale, those that Transformers writes weight_scale_inv and activation_scale.
    params: dict[str, Json] = {"element": element.value, "scale_name": EITHER, "activation": activation}
    if block is None:
        agree(raw, "group_size", (0, -1), "no weight_block_size")
        by_row = raw.fields.get("group_size") == -1
        return _ref("fp8", {**params, "strategy": "channel" if by_row else "tensor"})
    agree(raw, "group_size", (list(block),), f"weight_block_size {list(block)}")
    return _ref("fp8", {**params, "strategy": "block", "block_n": block[0], "block_k": block[1]})


def _ref(name: str, params: Mapping[str, Json]) -> SchemeRef:
    return SchemeRef(name, tuple(sorted(params.items())))


def _notes(raw: RawConfig) -> list[str]:
    notes = unknown_keys(raw, _READ | _MEANING.keys() | _BOOKKEEPING | {_DEQUANTIZE})
    if not raw.fields.keys() & {"weight_block_size", "group_size", gptqmodel.METHOD}:
        notes.append(
            f"{raw.origin('weight_block_size')}: scales are one per tensor, as for vLLM and SGLang; Transformers would "
            "take blocks of 128 x 128"
        )
    if raw.fields.get(_DEQUANTIZE):
        notes.append(f"{raw.origin(_DEQUANTIZE)} tells another reader what to do with the weights; not used here")
    return notes
