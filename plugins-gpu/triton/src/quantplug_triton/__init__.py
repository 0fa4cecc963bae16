"""Portable Triton kernels for quantplug."""
