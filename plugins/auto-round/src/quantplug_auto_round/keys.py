"""
The keys that auto-round's configurations are known to carry, and those that change the tensors in a way not read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from quantplug.jsonio import Json

BLOCKS = ("block_name_to_quantize", "to_quant_block_names", "quant_block_list")
"""Keys that name the blocks outside of which nothing is quantized."""
_REFUSED = ("super_bits", "super_group_size", "rotation_config", "spinquant_config", "static_kv_dtype",
            "static_attention_dtype")  # fmt: skip
KNOWN = frozenset({
    "quant_method", "bits", "group_size", "sym", "data_type", "packing_format", "extra_config",
    "modules_to_not_convert", "fmt", "weight_block_size", "act_bits", "act_data_type", "act_dynamic", "act_sym",
    "act_group_size", *BLOCKS, *_REFUSED,
    # how the file was made, or which kernel other readers should take
    "autoround_version", "provider", "backend", "iters", "nsamples", "seqlen", "batch_size", "dataset", "lr", "amp",
    "minmax_lr", "scale_dtype", "enable_quanted_input", "enable_minmax_tuning", "enable_norm_bias_tuning",
    "low_gpu_mem_usage", "gradient_accumulate_steps", "desc_act", "damp_percent", "true_sequential", "model_free",
    "activation_scheme", "static_kv_granularity", "static_attention_granularity",
})  # fmt: skip
FIX = "Use a copy of the model in another form (GPTQ, compressed-tensors), or convert the dense model."


def check_meaning(fields: Mapping[str, Json], origin: Callable[[str], str]) -> None:
    """
    Refuse a key that changes the meaning of the tensors in a way that is not read.

    Raises:
        ConfigError: `QP-CFG-UNKNOWN`.
    """
    for key in _REFUSED:
        if fields.get(key):
            raise ConfigError(
                "QP-CFG-UNKNOWN",
                origin(key),
                f"{key} is {describe_json(fields[key])}, which changes what the tensors mean in a way that is not read",
                expected="none",
                fix=FIX,
            )
