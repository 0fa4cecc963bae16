"""
auto-round's spelling of a configuration, for files whose tensors have GPTQ's layout.

The scheme is named, never imported: any installed plugin that provides `gptq` decodes the tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.config import Dialect, Field, QuantConfig
from quantplug.entries import exact_or_regex_entries, merge_params, only_rules, path_entries
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_bool, get_int, get_mapping, get_str
from quantplug.skip import Entry, EntryKind, Rule, SchemeRef

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from quantplug.config import RawConfig
    from quantplug.jsonio import Json

SCHEME = "gptq"
BITS = (2, 3, 4, 8)
WHOLE_BITS = 16
"""From this width on a layer is not quantized."""

_DEFAULT_PACKING = "auto_round:auto_gptq"
_LAYOUTS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_gptq": "gptq",
    "gptq": "gptq",
    "auto": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
}
"""`packing_format` -> `checkpoint_format`: GPTQ's packing with zero points less one, or as they are."""
_OTHERS = {
    "auto_awq": "AWQ's layout",
    "awq": "AWQ's layout",
    "llm_compressor": "the layout of compressed-tensors",
    "llm_compressor_nvfp4_e5m3": "the layout of compressed-tensors",
    "fp8": "FP8 weights",
    "fp8_static": "FP8 weights and activations",
    "fp8_block": "FP8 weights",
    "mx_fp": "MXFP weights",
    "mx_fp_rceil": "MXFP weights",
    "mx_int": "MXINT weights",
    "nv_fp": "NVFP4 weights",
    "nv_fp4_with_static_gs": "NVFP4 weights",
    "mlx": "MLX's layout",
    "fake": "dense weights, quantized and put back",
}
_BLOCKS = ("block_name_to_quantize", "to_quant_block_names", "quant_block_list")
_REFUSED = ("super_bits", "super_group_size", "rotation_config", "spinquant_config", "static_kv_dtype",
            "static_attention_dtype")  # fmt: skip
_KNOWN = frozenset({
    "quant_method", "bits", "group_size", "sym", "data_type", "packing_format", "extra_config", "act_bits",
    "modules_to_not_convert", *_BLOCKS, *_REFUSED,
    # how the file was made, or which kernel other readers should take
    "autoround_version", "provider", "backend", "iters", "nsamples", "seqlen", "batch_size", "dataset", "lr", "amp",
    "minmax_lr", "scale_dtype", "enable_quanted_input", "enable_minmax_tuning", "enable_norm_bias_tuning",
    "low_gpu_mem_usage", "gradient_accumulate_steps", "act_data_type", "act_dynamic", "act_sym", "act_group_size",
    "desc_act", "damp_percent", "true_sequential", "static_kv_granularity", "static_attention_granularity",
})  # fmt: skip
_FIX = "Use a copy of the model in GPTQ form, or convert the dense model (quantplug convert)."


class AutoRoundDialect(Dialect):
    """Reads auto-round configurations in GPTQ form."""

    name = "auto-round"
    methods = ("auto-round", "auto_round", "intel/auto-round")
    files = ("quantization_config.json",)

    def parse(self, raw: RawConfig) -> QuantConfig:
        """
        Turn the fields into rules: `extra_config` first (names before expressions), then blocks that are quantized.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-REFUSED`, `QP-SKIP-PATTERN`.
        """
        packing = get_str(raw.fields, "packing_format", raw.origin("packing_format"), default=_DEFAULT_PACKING)
        layout = _layout(packing, raw.origin("packing_format"))
        _check_meaning(raw.fields, raw.origin)
        params: dict[str, Json] = {
            "bits": get_int(raw.fields, "bits", raw.origin("bits"), choices=BITS),
            "group_size": get_int(raw.fields, "group_size", raw.origin("group_size"), minimum=-1),
            "sym": get_bool(raw.fields, "sym", raw.origin("sym"), default=True),
            "desc_act": False,
            "checkpoint_format": layout,
        }
        use = SchemeRef(SCHEME, tuple(sorted(params.items())))
        rules = [*_extra_rules(raw, use), *_skipped_rules(raw)]
        positive = [rule for key in _BLOCKS for rule in only_rules(_split(raw.fields.get(key)), use, raw.origin(key))]
        if not positive:
            head = Entry("lm_head", EntryKind.SUFFIX, "lm_head", raw.where, implied=True)
            rules.append(Rule(head))
        effective = {"sym": params["sym"], "packing_format": packing}
        missing = [Field(key, value, raw.origin(key)) for key, value in effective.items() if key not in raw.fields]
        return QuantConfig(
            self.name,
            None if positive else use,
            (*rules, *positive),
            (*(Field(key, value, raw.origin(key)) for key, value in raw.fields.items()), *missing),
            tuple(
                f"{raw.origin(key)} is not known to this reader and left out of account"
                for key in raw.fields
                if key not in _KNOWN
            ),
        )


def _layout(packing: str, origin: str) -> str:
    """Return the `checkpoint_format` that a `packing_format` stands for."""
    if packing in _LAYOUTS:
        return _LAYOUTS[packing]
    what = _OTHERS.get(packing.removeprefix("auto_round:"))
    expected = " or ".join(map(repr, _LAYOUTS))
    if what is not None:
        raise ConfigError(
            "QP-CFG-REFUSED", origin, f"packing_format {packing!r} means {what}", expected=expected, fix=_FIX
        )
    raise ConfigError(
        "QP-CFG-UNKNOWN", origin, f"packing_format {packing!r} is not a known layout", expected=expected, fix=_FIX
    )


def _check_meaning(fields: Mapping[str, Json], origin: Callable[[str], str]) -> None:
    """Refuse what would change the meaning of the tensors: other numbers, quantized activations, rotations."""
    data_type = fields.get("data_type")
    if data_type not in (None, "int"):
        raise ConfigError(
            "QP-CFG-REFUSED",
            origin("data_type"),
            f"data_type is {describe_json(data_type)}",
            expected="'int'",
            fix=_FIX,
        )
    if fields.get("act_bits") is not None:
        bits = get_int(fields, "act_bits", origin("act_bits"))
        if bits < WHOLE_BITS:
            raise ConfigError(
                "QP-CFG-REFUSED",
                origin("act_bits"),
                f"activations are quantized to {bits} bits",
                expected="weights only",
                fix=_FIX,
            )
    for key in _REFUSED:
        if fields.get(key):
            raise ConfigError(
                "QP-CFG-UNKNOWN",
                origin(key),
                f"{key} is {describe_json(fields[key])}, which changes what the tensors mean in a way that is not read",
                expected="none",
                fix=_FIX,
            )


def _extra_rules(raw: RawConfig, use: SchemeRef) -> list[Rule]:
    """Return the rules of `extra_config`: single layers by name, then expressions that are searched for in names."""
    origin = raw.origin("extra_config")
    if raw.fields.get("extra_config") is None:
        return []
    layers = get_mapping(raw.fields, "extra_config", origin)
    rules = []
    for entry in exact_or_regex_entries(list(layers), origin, "search"):
        place = f"{origin}[{entry.text!r}]"
        given = {key: value for key, value in get_mapping(layers, entry.text, place).items() if value is not None}
        if given:
            rules.append(Rule(entry, _override(given, use, place)))
    return rules


def _override(given: Mapping[str, Json], use: SchemeRef, place: str) -> SchemeRef | None:
    """Return the scheme with what one layer changes, or None when that is its being left whole."""

    def origin(key: str) -> str:
        return f"{place}.{key}"

    if get_int(given, "bits", origin("bits"), default=BITS[0], minimum=1) >= WHOLE_BITS:
        return None
    _check_meaning(given, origin)
    changes: dict[str, Json] = {}
    if "bits" in given:
        changes["bits"] = get_int(given, "bits", origin("bits"), choices=BITS)
    if "group_size" in given:
        changes["group_size"] = get_int(given, "group_size", origin("group_size"), minimum=-1)
    if "sym" in given:
        changes["sym"] = get_bool(given, "sym", origin("sym"))
    return merge_params(use, changes, place)


def _skipped_rules(raw: RawConfig) -> list[Rule]:
    key = "modules_to_not_convert"
    return [Rule(entry) for entry in path_entries(raw.fields.get(key), raw.origin(key))]


def _split(value: Json) -> Json:
    """Return a comma-separated text as a list, anything else as it is."""
    if isinstance(value, str):
        return [text for text in value.split(",") if text.strip()]
    return value
