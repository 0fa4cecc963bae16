"""
The keys that AWQ configurations are known to carry besides those that say how layers are stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from quantplug.config import RawConfig
    from quantplug.jsonio import Json

READ = frozenset({
    "quant_method", "method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "sym", "version", "format",
    "checkpoint_format", "backend", "lm_head", "dynamic", "modules_to_not_convert", "to_quant_block_names",
    "block_name_to_quantize",
})  # fmt: skip
"""Keys that the dialect acts on."""

BOOKKEEPING = frozenset({
    # how the file was made
    "meta", "provider", "autoround_version", "iters", "nsamples", "seqlen", "batch_size", "dataset", "lr", "amp",
    "minmax_lr", "scale_dtype", "enable_quanted_input", "enable_minmax_tuning", "enable_norm_bias_tuning",
    "low_gpu_mem_usage", "gradient_accumulate_steps", "act_dynamic", "act_sym", "act_group_size", "act_data_type",
    "model_free", "damp_percent", "true_sequential",
    # which kernel other readers should take
    "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "ipex_config",
})  # fmt: skip
"""Keys that say nothing about the tensors; listed and left out of account."""

_MEANING: dict[str, tuple[Json, ...]] = {
    "pack_dtype": ("int32",),
    "data_type": ("int",),
    "act_bits": (16, 32),
    "desc_act": (),
    "adapter": (),
    "activation": (),
    "activation_scheme": (),
    "extra_config": (),
    "rotation": (),
    "rotation_config": (),
    "spinquant_config": (),
    "super_bits": (),
    "super_group_size": (),
    "config_groups": (),
    "kv_cache_scheme": (),
    "static_kv_dtype": (),
    "static_attention_dtype": (),
}
"""Keys that would change what the tensors mean, with the values that do not."""


def check_meaning(fields: Mapping[str, Json], origin: Callable[[str], str]) -> None:
    """
    Refuse a key that changes the meaning of the tensors in a way that is not read.

    Args:
        fields: an object of the configuration.
        origin: where a key stands.

    Raises:
        ConfigError: `QP-CFG-UNKNOWN`.
    """
    for key, harmless in _MEANING.items():
        value = fields.get(key)
        if value is None or value is False or value in ({}, [], "", *harmless):
            continue
        raise ConfigError(
            "QP-CFG-UNKNOWN",
            origin(key),
            f"{key} is {describe_json(value)}, which changes what the tensors mean in a way that is not read",
            expected=" or ".join(map(repr, harmless)) if harmless else "none",
            fix="Use a copy of the model in plain AWQ form, or convert the dense model (quantplug convert).",
        )


def unknown_keys(raw: RawConfig) -> list[str]:
    """Return notes about keys that nobody here has heard of."""
    return [
        f"{raw.origin(key)} is not known to this reader and left out of account"
        for key in raw.fields
        if key not in READ and key not in BOOKKEEPING and key not in _MEANING
    ]
