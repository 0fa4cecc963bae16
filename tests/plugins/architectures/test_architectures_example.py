"""
The example of CONTRIBUTING.md is a family.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from tiny_families import REFERENCE

from quantplug.hooks import hookimpl
from quantplug.load import load_layers
from quantplug.planner import plan
from quantplug.plugins import build_registry
from quantplug_mx import plugin as mx

ROOT = Path(__file__).resolve().parents[3]


def test_the_family_that_contributing_shows_reads_its_files(tmp_path):
    """A dense file of that layout, quantized on load: gate and up are where the rule says they are."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Add a family\n")[2].partition("\n## ")[0]
    names = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1), names)  # the text is this repository's own
    example = names["EXAMPLE"]
    family = SimpleNamespace(quantplug_architectures=hookimpl(lambda: [example]))
    registry = build_registry({"mx": mx, "example": family})
    generator = torch.Generator().manual_seed(0)
    w13, w2 = (torch.randn(shape, generator=generator).bfloat16() for shape in ((3, 64, 32), (3, 16, 64)))
    container = "model.layers.0.feed_forward.experts"
    save_file({f"{container}.w13": w13, f"{container}.w2": w2}, tmp_path / "model.safetensors")
    config = {"model_type": "example_moe", "moe_num_experts": 3, "moe_top_k": 1, "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = plan(tmp_path, registry=registry, policy=REFERENCE, dtype="float32", quantize="mxfp8")
    module = load_layers(made, tmp_path, registry=registry).experts[container]
    scheme = registry.scheme("mxfp8").item.build({}, "test")
    for expert in range(3):
        first, second = module.dequantize(expert)
        up, gate = w13[expert].T.contiguous().chunk(2)
        assert torch.equal(first, torch.cat([scheme.quantize(part).dequantize() for part in (gate, up)]))
        assert torch.equal(second, scheme.quantize(w2[expert].T.contiguous()).dequantize())
    assert example.renames(container) == "model.layers.0.mlp.experts"
