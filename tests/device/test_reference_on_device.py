"""The reference kernel on an accelerator: what serves every format where no other kernel is installed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

import quantplug
from quantplug.inventory import Inventory, ModuleInfo
from quantplug.platform import Platform
from quantplug.plugins import registry
from quantplug.policy import Policy
from quantplug_testkit.bounds import linear_bound
from quantplug_testkit.canonical import segment_of, to_float64
from quantplug_testkit.compare import assert_within
from quantplug_testkit.oracles.linear import linear

if TYPE_CHECKING:
    from pathlib import Path

PATH = "model.layers.0.mlp.up_proj"


def test_a_gptq_layer_with_act_order_loads_and_computes_on_the_device(tmp_path: Path, cuda: torch.device) -> None:
    """Planned for the machine at hand, loaded onto it, and held to the bound that the oracle derives."""
    params = {"bits": 4, "group_size": 32, "sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"}
    scheme = registry().scheme("gptq").item.build(params, "test")
    torch.manual_seed(1)
    inputs = torch.randn(512, 96)
    weight = scheme.quantize(torch.randn(48, 96), hessian=inputs.T @ inputs)
    assert weight.g_idx is not None
    save_file(
        {f"{PATH}.{suffix}": tensor for suffix, tensor in scheme.encode(weight).items()}, tmp_path / "model.safetensors"
    )
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": {"quant_method": "gptq", **params}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    policy = Policy.parse({"rule": [{"pin": "reference"}]}, "test")
    plan = quantplug.plan(tmp_path, inventory=Inventory((ModuleInfo(PATH, "linear"),)), policy=policy)
    major, minor = torch.cuda.get_device_capability(cuda)
    assert (plan.platform.kind, plan.platform.arch) == (Platform.parse("cuda").kind, f"{major}.{minor}")
    assert plan.decisions[0].kernel == "reference"
    assert any("slow reference kernel" in warning for warning in plan.warnings)
    layer = quantplug.load_layers(plan, tmp_path, device=cuda).modules[PATH]
    for rows in (0, 1, 17):
        x = torch.randn(rows, 96, dtype=torch.bfloat16)
        actual = layer(x.to(cuda))
        segments = [segment_of(weight)]
        values = segments[0].values()
        assert_within(
            to_float64(actual.cpu()),
            linear(to_float64(x), values, None),
            linear_bound(to_float64(x), segments, None, "bfloat16", ()),
            f"{rows} rows on {cuda}",
        )
