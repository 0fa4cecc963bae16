"""
One linear layer on a GPU, by number of rows: `python -m benchmarks.gpu.linear [--quick] [--json FILE]`.

Each figure is the median microseconds of a call in a replayed graph, over weights that are cold. Beside it stand the
ratio to BF16 `F.linear` in the same run, the floor (bytes of the weight over the device's read bandwidth), and peers.
Every kernel's result is first held against a float32 product.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.timing import COLD_BYTES, copies_of, per_call
from quantplug.spec import (
    ElementType,
    LinearProblem,
    PerBlock,
    PerChannel,
    PerGroup,
    SegmentSpec,
    WeightSpec,
    scale_shape,
)
from quantplug.weight import Prepared, Weight
from quantplug_triton.kernel import TritonKernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantplug.kernel import LinearKernel

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192))
ROWS = (1, 4, 16, 64, 128, 512, 2048)
FORMATS = {
    "int4 g128": WeightSpec(ElementType.INT4, PerGroup(128), "float16"),
    "uint4 g64": WeightSpec(ElementType.UINT4, PerGroup(64), "float16"),
    "int8 channel": WeightSpec(ElementType.INT8, PerChannel(), "float16"),
    "fp8 block": WeightSpec(ElementType.FLOAT8_E4M3FN, PerBlock(128, 128), "float32"),
    "mxfp8": WeightSpec(ElementType.FLOAT8_E4M3FN, PerGroup(32), "float8_e8m0fnu"),
    "mxfp4": WeightSpec(ElementType.FLOAT4_E2M1FN, PerGroup(32), "float8_e8m0fnu"),
}
KERNELS: tuple[LinearKernel, ...] = (TritonKernel(),)
_LARGEST_ERROR = 1e-2
"""Of the norm of the difference, over that of the product: far above what is right; the tests are the strict ones."""


def random_weight(spec: WeightSpec, n: int, k: int, device: torch.device) -> Weight:
    """Return a weight of plausible values."""
    generator = torch.Generator(device).manual_seed(0)

    def integers(low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=torch.int32)

    shape, bits = scale_shape(spec.granularity, n, k), spec.element.bits
    if spec.element.floating:
        codes = integers(0, 1 << bits, (n, k)).to(torch.uint8)
        if bits == 8:
            # Without the two codes that are not numbers, and not larger than 8.
            codes = (codes & 0xBF).view(torch.float8_e4m3fn)
    elif spec.element.signed:
        codes = integers(-(1 << (bits - 1)), 1 << (bits - 1), (n, k)).to(torch.int8)
    else:
        codes = integers(0, 1 << bits, (n, k)).to(torch.uint8)
    if spec.scale_dtype == "float8_e8m0fnu":
        scales = integers(118, 122, shape).to(torch.uint8).view(torch.float8_e8m0fnu)
    else:
        scales = torch.rand(shape, generator=generator, device=device) * 0.01 + 0.005
        scales = scales.to(getattr(torch, spec.scale_dtype))
    zeros = integers(0, 1 << bits, shape).to(torch.uint8) if spec.zero_points else None
    return Weight(codes, scales, spec, zeros)


def measure(
    kernel: LinearKernel, name: str, n: int, k: int, rows: tuple[int, ...], read: float
) -> list[dict[str, Any]]:
    """Return the figures of one format and shape."""
    spec, device = FORMATS[name], torch.device("cuda")
    problem = LinearProblem(k, (SegmentSpec(n, spec),), "bfloat16")
    weight = random_weight(spec, n, k, device)
    values = weight.dequantize(torch.float32)
    on_cpu = Weight(weight.codes.cpu(), weight.scales.cpu(), spec, None if weight.zeros is None else weight.zeros.cpu())
    first = kernel.prepare(problem, [on_cpu], [None], device)
    turns = [Prepared(first.layout_id, problem, tensors, first.meta) for tensors in copies_of(dict(first.tensors))]
    dense = values.to(torch.bfloat16)
    dense_turns = [t["w"] for t in copies_of({"w": dense})]
    figures = []
    for m in rows:
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        wanted = x.to(torch.float32) @ values.t()
        error = float((kernel.apply(x, first, None).to(torch.float32) - wanted).norm() / wanted.norm())
        if not error < _LARGEST_ERROR:
            raise SystemExit(f"{kernel.name} is wrong for {name} {n} x {k}, {m} rows: relative error {error}")
        ours = per_call(lambda p, x=x: kernel.apply(x, p, None), turns)
        bf16 = per_call(lambda w, x=x: torch.nn.functional.linear(x, w), dense_turns)
        figures.append({
            "kernel": kernel.name, "format": name, "shape": [n, k], "rows": m, "us": ours, "bf16_us": bf16,
            "ratio_to_bf16": bf16 / ours, "error": error, "bytes": first.nbytes,
            "read_floor_us": first.nbytes / read * 1e6, **_peers(name, weight, values, x),
        })  # fmt: skip
    return figures


def _peers(name: str, weight: Weight, values: torch.Tensor, x: torch.Tensor) -> dict[str, float]:
    """Return the microseconds of peers for a format: torch's own int4 product, for few rows."""
    if name != "int4 g128" or x.shape[0] > 64:
        return {}
    k = weight.in_features
    codes = (weight.codes.to(torch.int32) + 8).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    scales = weight.scales.t().to(torch.bfloat16)
    pairs = torch.stack([scales, torch.zeros_like(scales)], dim=2).contiguous()
    turns = copies_of({"packed": packed, "pairs": pairs})
    operator: Callable[..., torch.Tensor] = torch.ops.aten._weight_int4pack_mm
    group = k // weight.scales.shape[1]
    found = operator(x, packed, group, pairs)
    wanted = x.to(torch.float32) @ values.t()
    if not float((found.to(torch.float32) - wanted).norm() / wanted.norm()) < 2 * _LARGEST_ERROR:
        return {}
    return {"torch_int4_us": per_call(lambda t: operator(x, t["packed"], group, t["pairs"]), turns)}


def read_bandwidth() -> float:
    """Return bytes per second of reading 2 GiB: what torch's sum reaches."""
    turns = [torch.ones(1 << 29, device="cuda")]
    return turns[0].nbytes / (per_call(lambda t: t.sum(), turns) * 1e-6)


def main() -> None:
    """Print a line per point; write JSON where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one format, two shapes, few rows")
    parser.add_argument("--format", nargs="+", choices=tuple(FORMATS), default=tuple(FORMATS))
    options = parser.parse_args()
    read = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, reads {read / 1e12:.2f} TB/s, cold {COLD_BYTES}")
    formats = options.format[:1] if options.quick else options.format
    rows = ROWS[:5] if options.quick else ROWS
    results = []
    for kernel in KERNELS:
        for name in formats:
            for n, k in SHAPES[:2] if options.quick else SHAPES:
                for f in measure(kernel, name, n, k, rows, read):
                    results.append(f)
                    print(
                        f"{f['kernel']} {name:12} {n:6} x {k:6} M={f['rows']:5} {f['us']:8.1f} us  x bf16 "
                        f"{f['ratio_to_bf16']:5.2f}  read floor {f['read_floor_us']:6.1f} us  error {f['error']:.1e}"
                        + (f"  torch int4 {f['torch_int4_us']:.1f} us" if "torch_int4_us" in f else ""),
                        flush=True,
                    )
    if options.json:
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "read": read, "points": results}))


if __name__ == "__main__":
    main()
