"""CUDA C++ kernels for quantized weights, compiled at run time."""
