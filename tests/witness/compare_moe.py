"""
Hold the experts that quantplug loads against what the tool that wrote them decodes: for `tests.witness.compare`,
wherever a `make_moe_*.py` stored facts.

Values: every quantized module of the bare checkpoint, next-N layers among them, and each expert's first and second
product, in units in the last place of float32. Logits: in float32 through the `reference` kernel, against those that
plain Transformers computed in the tool's environment from the decoded weights. The order of sums differs there, so that
logits may differ by ten times `rounding`, which moe_logits.py measured as the effect of a rounding of every weight;
weights that are n units apart may cost n times that.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from tests.witness.experts import by_expert, is_expert
from tests.witness.held import ROOM, our_model, reference_only, ulps

from quantplug.load import LoadedLayers, load_layers
from quantplug.planner import plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


def pairs(
    loaded: LoadedLayers, decoded: Mapping[str, torch.Tensor], *, interleaved: bool
) -> Iterator[tuple[str, torch.Tensor | None, torch.Tensor | None]]:
    """Yield (name, our values, the tool's values); None where one of them has a module whole."""
    of_tool = by_expert(decoded, interleaved=interleaved)
    for path in dict.fromkeys((*of_tool, *loaded.experts)):
        module, experts = loaded.experts.get(path), of_tool.get(path, {})
        if module is None or len(experts) != module.problem.experts:
            yield path, None, None
            continue
        for expert, parts in sorted(experts.items()):
            w13, w2 = module.dequantize(expert)
            yield f"{path}.{expert} gate and up", w13, torch.cat([parts["gate_proj"], parts["up_proj"]])
            yield f"{path}.{expert} down", w2, parts["down_proj"]
    linear = {name.removesuffix(".weight"): tensor for name, tensor in decoded.items() if not is_expert(name)}
    for path in dict.fromkeys((*linear, *loaded.modules)):
        ours = loaded.modules[path].dequantize(torch.float32) if path in loaded.modules else None
        yield path, ours, linear.get(path)


def compare_moe(root: Path, name: str) -> dict[str, Any]:
    """Return the figures of one checkpoint."""
    directory = root / "ckpt" / name
    decoded = load_file(root / "decompressed" / f"{name}.safetensors")
    family = json.loads((root / "facts" / f"{name}.json").read_text())["family"]
    loaded = load_layers(plan(directory, dtype="float32", policy=reference_only()), directory)
    distance, alone = 0, []
    for key, ours, theirs in pairs(loaded, decoded, interleaved=family.startswith("gpt-oss")):
        if ours is None or theirs is None:
            alone.append(key)
        else:
            distance = max(distance, ulps(ours, theirs.to(torch.float32)))
    stored = load_file(root / "logits" / f"{name}.safetensors")
    model = our_model(directory).eval()
    with torch.inference_mode():
        found = model(stored["input_ids"]).logits.float()
    difference = float((found - stored["logits"]).abs().max())
    allowed = ROOM * float(stored["rounding"]) * max(1, distance)
    return {
        "name": name,
        "layers": len(decoded),
        "dtype": "float32",
        "ulps": distance,
        "logits": difference,
        "allowed": allowed,
        "spread": float(stored["logits"].std()),
        "alone": alone,
        "agrees": difference <= allowed and not alone,
    }
