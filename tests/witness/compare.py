"""
Hold what quantplug loads against the weights that the tool which wrote a checkpoint decodes from it itself:
`python -m tests.witness.compare DIR [NAME …] [--json]`, where DIR holds what the `make_*.py` of this folder made.

For every checkpoint `DIR/ckpt/NAME` with decoded weights `DIR/decompressed/NAME.safetensors`: each layer's values, in
float32, in units in the last place; then the logits of the whole model in float32, run through the `reference` kernel,
against those of an ordinary dense model of Transformers that holds the tool's weights. Both models multiply by the same
operator, so that equal weights must give equal logits, to the bit. Where weights differ (the tool computes in another
order, or offers them in bfloat16 only), the logits may differ by what that explains: ten times what a model shows whose
weights are moved by as much, at random. How mixtures of experts are compared, compare_moe.py says.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from tests.witness.compare_moe import compare_moe
from tests.witness.held import REFUSED, ROOM, our_model, ulps

from quantplug.errors import QuantplugError

if TYPE_CHECKING:
    from collections.abc import Mapping

TEXT = (
    "The lighthouse keeper climbed the stairs each evening, and each evening the sea answered with its own slow light. "
)


def tokens(directory: Path) -> torch.Tensor:
    """Return a few dozen tokens of English for the model in a directory."""
    from transformers import AutoTokenizer

    encoded: torch.Tensor = AutoTokenizer.from_pretrained(directory)(TEXT * 3, return_tensors="pt").input_ids
    return encoded


def dense_model(directory: Path, decoded: Mapping[str, torch.Tensor], others: Any) -> Any:
    """Return the same architecture, dense, with the tool's weights, and everything else as in our model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    state = {name: tensor.to(torch.float32) for name, tensor in decoded.items()}
    ours = {**dict(others.named_parameters()), **dict(others.named_buffers())}
    for name, parameter in model.named_parameters():
        source = state[name] if name in state else ours[name]
        parameter.data = source.detach().clone().to(torch.float32)
    return model


def compare(root: Path, name: str) -> dict[str, Any]:
    """Return the figures of one checkpoint."""
    directory = root / "ckpt" / name
    decoded = load_file(root / "decompressed" / f"{name}.safetensors")
    model = our_model(directory).eval()
    layers = dict(model.named_modules())
    distance, moved = 0, {}
    for key, theirs in decoded.items():
        ours = layers[key.removesuffix(".weight")].dequantize(torch.float32)
        moved[key] = ours - theirs.to(torch.float32)
        if theirs.dtype != torch.float32:
            ours = ours.to(theirs.dtype)
        distance = max(distance, ulps(ours.to(torch.float32), theirs.to(torch.float32)))
    ids = tokens(directory)
    dense = dense_model(directory, decoded, model)
    with torch.inference_mode():
        found, wanted = model(ids).logits, dense(ids).logits
        difference = float((found - wanted).abs().max())
        allowed = 0.0
        if any(bool(difference.any()) for difference in moved.values()):
            generator = torch.Generator().manual_seed(0)
            for key, parameter in dense.named_parameters():
                if key in moved:
                    signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                    parameter.data += moved[key].abs() * signs
            allowed = ROOM * float((dense(ids).logits - wanted).abs().max())
    return {
        "name": name,
        "layers": len(decoded),
        "dtype": str(next(iter(decoded.values())).dtype).removeprefix("torch."),
        "ulps": distance,
        "logits": difference,
        "allowed": allowed,
        "spread": float(wanted.std()),
        "agrees": difference <= allowed,
    }


def main() -> int:
    """Print a line per checkpoint; the exit code is the number of those that do not agree."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    names = options.names or sorted(file.name for file in (options.directory / "ckpt").iterdir())
    results = []
    for name in names:
        if not (options.directory / "decompressed" / f"{name}.safetensors").exists():
            continue
        experts = (options.directory / "facts" / f"{name}.json").exists()
        try:
            result = (compare_moe if experts else compare)(options.directory, name)
        except QuantplugError as error:
            code, why = REFUSED.get(name, ("", ""))
            result = {"name": name, "refused": str(error), "agrees": error.code == code}
            if result["agrees"]:
                print(f"{name:38} refused as it must be ({code}): {why}", file=sys.stderr, flush=True)
            else:
                print(f"{name:38} REFUSED: {error}", file=sys.stderr, flush=True)
        else:
            result["agrees"] = result["agrees"] and name not in REFUSED
        results.append(result)
        if "refused" in result:
            continue
        if not options.json:
            print(
                f"{result['name']:38} {result['layers']:4} layers, decoded in {result['dtype']:8}: weights within "
                f"{result['ulps']} ulp, logits within {result['logits']:.2g} (spread {result['spread']:.1f}, allowed "
                f"{result['allowed']:.2g}) {'agrees' if result['agrees'] else 'DIFFERS'}",
                flush=True,
            )
    if options.json:
        print(json.dumps(results, indent=2))
    return sum(not result["agrees"] for result in results)


if __name__ == "__main__":
    sys.exit(main())
