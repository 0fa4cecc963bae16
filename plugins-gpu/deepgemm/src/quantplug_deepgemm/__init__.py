"""The FP8 products of the package sgl-deep-gemm for quantplug."""
