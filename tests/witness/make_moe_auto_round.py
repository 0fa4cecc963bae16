"""
Write mixtures of experts with auto-round (round to nearest, no tuning), and what it decodes each expert to.

The environment is that of make_auto_round.py; the dense models are those of moe_models.py.

    OMP_NUM_THREADS=1 /tmp/witness/venvs/ar/bin/python tests/witness/make_moe_auto_round.py /tmp/witness [NAME ...]

Checkpoints go to OUT/ckpt/NAME, the decoded weights to OUT/decompressed/NAME.safetensors (float32: auto-round's own
torch layer, given each expert's tensors in turn, with float32 scales, and the identity; for `llm_compressor` exports,
compressed-tensors in the same environment), facts about it to OUT/facts/NAME.json.

moe-ar-gpt-oss-autoround-w4g64 is to be refused: auto-round takes the rows of gpt-oss' transposed experts for their
outputs, so `down_proj` comes out turned, and `gate_proj` holds the first half of the inputs.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from make_auto_round import awq_decode
from make_moe_compressed_tensors import decode as ct_decode
from moe_common import calibration, modules, record, stored
from safetensors.torch import save_file

W4 = {"group_size": 64, "sym": True}
W4_ASYM = {"group_size": 64, "sym": False}

# By name: the family, format, scheme, and what else AutoRound is told.
SPECS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "moe-ar-qwen3-autoround-w4g64": ("qwen3-moe", "auto_round", "W4A16", W4),
    "moe-ar-qwen3-autoround-w4g64-asym": ("qwen3-moe", "auto_round", "W4A16", W4_ASYM),
    "moe-ar-qwen3-gptq-w4g64": ("qwen3-moe", "auto_gptq", "W4A16", W4),
    "moe-ar-qwen3-awq-w4g64-asym": ("qwen3-moe", "auto_awq", "W4A16", W4_ASYM),
    "moe-ar-qwen3-llmc-nvfp4": ("qwen3-moe", "llm_compressor", "NVFP4", {}),
    "moe-ar-qwen3-llmc-mxfp8": ("qwen3-moe", "llm_compressor", "MXFP8", {}),
    "moe-ar-mixtral-autoround-w4g64": ("mixtral", "auto_round", "W4A16", W4),
    "moe-ar-deepseek-v3-autoround-w4g64": ("deepseek-v3", "auto_round", "W4A16", W4),
    "moe-ar-glm4-autoround-w4g64": ("glm4-moe", "auto_round", "W4A16", W4),
    "moe-ar-gpt-oss-autoround-w4g64": ("gpt-oss", "auto_round", "W4A16", W4),
    "moe-ar-gemma4-autoround-w4g64": ("gemma4", "auto_round", "W4A16", W4),
}

SMALL_ASYM = {"group_size": 32, "sym": False}
SPECS |= {
    "small-ar-qwen3-awq-w4g32-asym": ("qwen3-moe-small", "auto_awq", "W4A16", SMALL_ASYM),
    "small-ar-qwen3-autoround-w4g32-asym": ("qwen3-moe-small", "auto_round", "W4A16", SMALL_ASYM),
}
"""As above, in models small enough to be kept with the tests."""


def quantize(dense: Path, target: Path, form: str, scheme: str, arguments: dict[str, Any]) -> None:
    """Write one checkpoint; auto-round adds a folder of its own naming, which is taken away."""
    from auto_round import AutoRound

    rows = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row))} for row in calibration()]
    data = {"dataset": rows, "nsamples": len(rows), "seqlen": len(calibration()[0]), "batch_size": 1}
    rounding = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu"}
    AutoRound(str(dense), scheme=scheme, **rounding, **data, **arguments).quantize_and_save(str(target), format=form)
    if not (target / "config.json").exists():
        (inner,) = (folder for folder in target.iterdir() if folder.is_dir() and not folder.name.startswith("."))
        for file in inner.iterdir():
            file.rename(target / file.name)
        inner.rmdir()


def packed_decode(source: Path) -> dict[str, torch.Tensor]:
    """Decode GPTQ's layout with the layer that auto-round would put each module into."""
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    written = json.loads((source / "config.json").read_text())["quantization_config"]
    minus_one = "auto_gptq" in written.get("packing_format", "auto_gptq")
    layer_class = (qlinear_torch_zp if minus_one else qlinear_torch).QuantLinear
    decoded = {}
    for name, local in modules(stored(source)).items():
        if "qweight" not in local:
            continue
        rows, columns = local["qweight"].shape[0] * 32 // written["bits"], local["qweight"].shape[1]
        layer = layer_class(written["bits"], written["group_size"], rows, columns, bias=False)
        layer.qweight, layer.qzeros, layer.scales = local["qweight"], local["qzeros"], local["scales"].float()
        layer.post_init()
        decoded[f"{name}.weight"] = layer(torch.eye(rows)).detach().T.contiguous()
    return decoded


def main() -> None:
    """Make every checkpoint named, or all of them."""
    out = Path(sys.argv[1]).resolve()
    failed = []
    for name in sys.argv[2:] or SPECS:
        family, form, scheme, arguments = SPECS[name]
        target, start = out / "ckpt" / name, time.time()
        if target.exists():
            continue
        partial = target.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            quantize(out / "ckpt" / f"dense-moe-{family}", partial, form, scheme, arguments)
        except Exception as error:  # noqa: BLE001 - a witness that fails must not stop the others
            failed.append(name)
            print(f"FAILED {name}: {type(error).__name__}: {error}"[:1500], flush=True)
            continue
        note = f"{time.time() - start:.0f} s"
        decode = {"llm_compressor": ct_decode, "auto_awq": awq_decode}.get(form, packed_decode)
        try:
            save_file(decode(partial), out / "decompressed" / f"{name}.safetensors")
        except Exception as error:  # noqa: BLE001 - the file is a witness even where its tool cannot read it
            note += f"; NOT decoded: {type(error).__name__}: {error}"[:400]
        partial.rename(target)
        record(out, name, family, note)
    print("failed:", failed, flush=True)


if __name__ == "__main__":
    main()
