"""
Write golden files of layers that fill neither their words nor those of zero points, with compressed-tensors 0.20.0.

    pip install torch==2.13.0 transformers compressed-tensors==0.20.0      (the CPU build of torch)
    python make_uneven.py OUT

OUT/uneven-w<bits>.json then holds one random layer, 11 x 45, per channel and asymmetric: its tensors as the tool's
compressor returned them, the arguments, and what it decompressed them to, float32 `[N, K]`. A tensor is
`{"dtype", "shape", "data"}`, the data in base64, little-endian and row-major.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

N, K = 11, 45


def spelled(tensor: torch.Tensor) -> dict[str, object]:
    """Return a tensor as JSON."""
    data = bytes(tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist())
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "data": base64.b64encode(data).decode()}


def main() -> None:
    """Write every width that the project reads."""
    out = Path(sys.argv[1])
    for bits in (2, 3, 4, 8):
        generator = torch.Generator().manual_seed(bits)
        args = QuantizationArgs(num_bits=bits, strategy="channel", symmetric=False)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        half = 1 << (bits - 1)
        layer = {
            "weight": torch.randn(N, K, generator=generator),
            "weight_scale": torch.rand(N, 1, generator=generator) + 0.01,
            "weight_zero_point": torch.randint(-half, half, (N, 1), generator=generator).to(torch.int8),
        }
        stored = PackedQuantizationCompressor.compress(layer, scheme)
        values = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
        document = {
            "maker": {
                "tool": "compressed-tensors", "version": compressed_tensors.__version__, "torch": torch.__version__,
            },
            "weights": {"num_bits": bits, "strategy": "channel", "symmetric": False},
            "tensors": {suffix: spelled(tensor) for suffix, tensor in sorted(stored.items())},
            "dequantized": spelled(values),
        }  # fmt: skip
        path = out / f"uneven-w{bits}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
