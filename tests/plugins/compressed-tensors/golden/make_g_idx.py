"""
Write the golden files of act-order with compressed-tensors 0.12.2, the last versions of which knew it, in seconds.

    pip install torch==2.13.0 transformers pydantic      (the CPU build of torch)
    pip install --no-deps --target OLD compressed-tensors==0.12.2
    PYTHONPATH=OLD python make_g_idx.py OUT

OUT/<case>.json then holds one random layer: its tensors as `PackedQuantizationCompressor.compress_weight` returned
them, the arguments, and what `decompress_weight` made of them, float32 `[N, K]`. A tensor is
`{"dtype", "shape", "data"}`, the data in base64, little-endian and row-major.
"""

from __future__ import annotations

import base64
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs

N, K, GROUP = 16, 128, 32


def spelled(tensor: torch.Tensor) -> dict[str, object]:
    """Return a tensor as JSON."""
    data = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "data": base64.b64encode(data).decode()}


def main() -> None:
    """Write every case: two widths, a shuffled order, and the order that was never filled in."""
    out = Path(sys.argv[1])
    compressor = PackedQuantizationCompressor(CompressionFormat.pack_quantized)
    for bits in (4, 8):
        for name in ("order", "unfilled"):
            generator = torch.Generator().manual_seed(bits)
            args = QuantizationArgs(num_bits=bits, strategy="group", group_size=GROUP, actorder="group")
            dense = torch.randn(N, K, generator=generator)
            groups = torch.arange(K, dtype=torch.int32) // GROUP
            g_idx = groups[torch.randperm(K, generator=generator)] if name == "order" else torch.full_like(groups, -1)
            index = (g_idx if name == "order" else groups).long()
            peaks = torch.stack([dense[:, index == group].abs().amax(1) for group in range(K // GROUP)], 1)
            scale = peaks * 2 / (2**bits - 1)
            stored = compressor.compress_weight(
                dense, scale, args, zero_point=torch.zeros_like(scale, dtype=torch.int8), g_idx=g_idx
            )
            stored = {**stored, "weight_scale": scale, "weight_g_idx": g_idx}
            values = compressor.decompress_weight(dict(stored), args)
            document = {
                "maker": {
                    "tool": "compressed-tensors",
                    "version": version("compressed-tensors"),
                    "torch": torch.__version__,
                },
                "weights": {"num_bits": bits, "group_size": GROUP, "actorder": "group"},
                "tensors": {suffix: spelled(tensor) for suffix, tensor in stored.items()},
                "dequantized": spelled(values.float()),
            }
            path = out / f"g-idx-w{bits}-{name}.json"
            path.write_text(json.dumps(document, indent=1) + "\n")
            print(path.name, path.stat().st_size, "bytes", float((values - dense).abs().max()))


if __name__ == "__main__":
    main()
