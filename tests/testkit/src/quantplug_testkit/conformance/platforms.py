"""
What kernels of either kind are asked to run on, and in.
"""

from __future__ import annotations

from quantplug.platform import Platform

DTYPES = ("bfloat16", "float16", "float32")

PLATFORMS: tuple[Platform, ...] = tuple(
    Platform.parse(text)
    for text in (
        "cpu",
        "cpu:x86_64",
        "cpu:aarch64",
        "cuda",
        "cuda:8.0",
        "cuda:9.0",
        "cuda:12.0",
        "npu:910b",
        "xpu",
        "abacus:7",
    )
)
"""Platforms that a kernel is asked about, most of which are not at hand."""
