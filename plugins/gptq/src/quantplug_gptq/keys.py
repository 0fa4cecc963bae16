"""
The keys that GPTQ configurations are known to carry besides those that say how layers are stored.
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
    "bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "is_marlin_format", "method",
    "quant_method", "lm_head", "dynamic", "modules_in_block_to_quantize", "block_name_to_quantize",
    "to_quant_block_names", "modules_to_not_convert", "meta",
})  # fmt: skip
"""Keys that the dialect acts on."""

BOOKKEEPING = frozenset({
    # how the file was made
    "quantizer", "true_sequential", "damp_percent", "damp_auto_increment", "static_groups", "mse", "act_group_aware",
    "gptaq", "foem", "dataset", "tokenizer", "batch_size", "pad_token_id", "max_input_length", "model_seqlen",
    "cache_block_outputs", "module_name_preceding_first_block", "model_name_or_path", "model_file_base_name",
    "offload_to_disk", "offload_to_disk_path", "pack_impl", "fallback", "hessian", "autoround_version", "provider",
    "iters", "nsamples", "seqlen", "lr", "minmax_lr", "amp", "scale_dtype", "enable_quanted_input",
    "enable_minmax_tuning", "enable_norm_bias_tuning", "low_gpu_mem_usage", "gradient_accumulate_steps",
    # which kernel other readers should take
    "backend", "kernel", "use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16", "use_triton",
})  # fmt: skip
"""Keys that say nothing about the tensors; listed and left out of account."""

_MEANING: dict[str, tuple[Json, ...]] = {
    "pack_dtype": ("int32",),
    "data_type": ("int",),
    "act_bits": (16, 32),
    "adapter": (),
    "activation": (),
    "activation_scheme": (),
    "rotation": (),
    "rotation_config": (),
    "spinquant_config": (),
    "super_bits": (),
    "super_group_size": (),
    "config_groups": (),
    "sparsity_config": (),
    "kv_cache_scheme": (),
    "kv_cache_quant_algo": (),
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
            fix="Use a copy of the model in plain GPTQ form, or convert the dense model (quantplug convert).",
        )


def unknown_keys(raw: RawConfig) -> list[str]:
    """Return notes about keys that nobody here has heard of."""
    return [
        f"{raw.origin(key)} is not known to this reader and left out of account"
        for key in raw.fields
        if key not in READ and key not in BOOKKEEPING and key not in _MEANING
    ]
