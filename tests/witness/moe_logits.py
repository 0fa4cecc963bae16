"""
Run what a tool decoded, dense and in float32, in plain transformers, and store the logits.

    OMP_NUM_THREADS=1 /tmp/witness/venvs/hf/bin/python tests/witness/moe_logits.py /tmp/witness [NAME ...]

A process of its own, since llm-compressor changes how transformers loads mixtures of experts until its process ends.
OUT/logits/NAME.safetensors gets `input_ids` [1, tokens] and `logits` [1, tokens, words]; `margin` [tokens]: how far, in
what a router returns first, the last of the best experts lies above the next one, the least of all layers (groups and
biases of experts left aside); `rounding` [1]: the largest change of any logit when every weight is moved by 2^-23 of
itself, up or down at random, which is what another order of the same sums may cost.

Where two experts are nearly as good for a token, a rounding anywhere chooses between them. So of several sequences
that one is taken which is farthest from it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from moe_common import dense_state, sequences
from moe_models import TOP_K
from safetensors.torch import load_file, save_file

NEXT_N = "model.layers.2."
ROUTERS = ("TopkRouter", "TopKRouter", "TextRouter")


def dense_copy(out: Path, name: str, family: str) -> Path:
    """Write the decoded checkpoint as a dense one of its family."""
    decoded = out / "decompressed" / f"{name}.safetensors"
    dense, copy = out / "ckpt" / f"dense-moe-{family}", out / "scratch" / f"dense-{name}"
    copy.mkdir(parents=True, exist_ok=True)
    (copy / "config.json").write_text((dense / "config.json").read_text())
    state = load_file(dense / "model.safetensors")
    if decoded.exists():
        state = dense_state(out / "ckpt" / name, load_file(decoded), family)
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def dense_model(copy: Path) -> Any:
    """Load a dense checkpoint whole, in float32."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        copy, dtype=torch.float32, output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    # transformers knows the next-N layers of GLM's released models by number (46, 92): it names ours, and drops it too
    report["unexpected_keys"] = {key for key in report["unexpected_keys"] if not key.startswith(NEXT_N)}
    if wrong := {key: sorted(value) for key, value in report.items() if value}:
        raise ValueError(f"{copy.name} did not load whole: {wrong}")
    return model.eval()


def margins(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the least margin of any router, for each token of each sequence."""
    found: list[torch.Tensor] = []

    def watch(_module: Any, _inputs: Any, output: Any) -> None:
        scores = (output[0] if isinstance(output, tuple) else output).float()
        best = scores.reshape(*ids.shape, -1).topk(TOP_K + 1, dim=-1).values
        found.append(best[..., TOP_K - 1] - best[..., TOP_K])

    routers = [module for module in model.modules() if type(module).__name__.endswith(ROUTERS)]
    hooks = [module.register_forward_hook(watch) for module in routers]
    model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(found).amin(0)


@torch.inference_mode()
def run(copy: Path) -> dict[str, torch.Tensor]:
    """Return what is stored about a dense checkpoint."""
    model, ids = dense_model(copy), sequences()
    margin = margins(model, ids)
    best = int(margin.amin(-1).argmax())
    ids = ids[best : best + 1].contiguous()
    logits = model(ids).logits.float().contiguous()
    if not torch.isfinite(logits).all():
        raise ValueError(f"{copy.name}: logits are not finite")
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
        parameter.mul_(1 + signs * torch.finfo(torch.float32).eps)
    rounding = (model(ids).logits.float() - logits).abs().max().reshape(1)
    return {"input_ids": ids, "logits": logits, "margin": margin[best].contiguous(), "rounding": rounding}


def main() -> None:
    """Store the logits of every name given, or of every mixture of experts that was made."""
    out = Path(sys.argv[1]).resolve()
    (out / "logits").mkdir(exist_ok=True)
    facts = {path.stem: json.loads(path.read_text())["family"] for path in sorted((out / "facts").glob("*.json"))}
    dense = {path.name: path.name.removeprefix("dense-moe-") for path in sorted((out / "ckpt").glob("dense-moe-*"))}
    families = dense | facts
    for name in sys.argv[2:] or families:
        target = out / "logits" / f"{name}.safetensors"
        if target.exists():
            continue
        try:
            found = run(dense_copy(out, name, families[name]))
        except (RuntimeError, ValueError) as error:  # a file that its family cannot be: a witness for refusing it
            print(f"{name}: NO LOGITS: {error}"[:300], flush=True)
            continue
        save_file(found, target)
        spread, margin = float(found["logits"].std()), float(found["margin"].min())
        print(f"{name}: std {spread:.3f}, margin {margin:.1e}, rounding {float(found['rounding']):.1e}", flush=True)


if __name__ == "__main__":
    main()
