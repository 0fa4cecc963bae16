"""
Descriptions in the words of Quark's exporter, as its published checkpoints have them.

Sources: the `quantization_config` of amd/Kimi-K2.5-MXFP4 and amd/DeepSeek-V4-Pro-MXFP4, as tests of engines carry it,
and Quark's own `to_dict` (github.com/amd/Quark, `quark/torch/quantization/config/config.py`).
"""

from __future__ import annotations

import copy

MX = {
    "dtype": "fp4",
    "is_dynamic": False,
    "qscheme": "per_group",
    "ch_axis": -1,
    "group_size": 32,
    "block_size": None,
    "symmetric": None,
    "round_method": "half_even",
    "scale_type": "float",
    "scale_format": "e8m0",
    "scale_calculation_mode": "even",
    "mx_element_dtype": None,
    "observer_cls": "PerBlockMXObserver",
    "is_scale_quant": False,
    "enable_buffer_reuse": False,
    "max_input_numel": 4194304,
}
PLAIN = {**MX, "scale_format": None, "scale_calculation_mode": None, "symmetric": True, "group_size": None}
TENSOR = {**PLAIN, "dtype": "fp8_e4m3", "qscheme": "per_tensor", "ch_axis": None}
CHANNEL = {**PLAIN, "dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 0}
TOKEN = {**CHANNEL, "ch_axis": 1, "is_dynamic": True}
INT8 = {**CHANNEL, "dtype": "int8"}


def layer(weight: object, inputs: object = None, outputs: object = None) -> dict[str, object]:
    """Return the description of one layer."""
    return {
        "weight": weight,
        "input_tensors": inputs,
        "output_tensors": outputs,
        "bias": None,
        "target_device": None,
    }


def section(weight: object = TENSOR, inputs: object = TENSOR, **changes: object) -> dict[str, object]:
    """Return a whole `quantization_config`, some keys changed; `...` takes one out."""
    whole: dict[str, object] = {
        "quant_method": "quark",
        "global_quant_config": layer(weight, inputs),
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "kv_cache_quant_config": {},
        "kv_cache_post_rope": False,
        "exclude": ["lm_head"],
        "algo_config": None,
        "softmax_quant_spec": None,
        "quant_mode": "eager_mode",
        "version": "0.12+9d3d471cdf1",
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
    }
    return copy.deepcopy({key: value for key, value in {**whole, **changes}.items() if value is not ...})
