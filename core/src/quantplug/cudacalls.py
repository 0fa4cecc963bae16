"""
What torch's own compiled code asks CUDA, without what its public functions take on the host besides.

A layer without a graph pays for these at every call. Each has the public function where this torch lacks the other.
"""

from __future__ import annotations

import torch

stream_of = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda device: torch.cuda.current_stream(device).cuda_stream
)
"""The current stream of a device as the driver knows it; a stream object costs 2 us."""

current_device = getattr(torch._C, "_cuda_getDevice", None) or torch.cuda.current_device
"""The index of the current device, without the question whether CUDA is initialized: for who holds a tensor there."""

empty = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None) or (
    lambda size, strides, dtype: torch.empty_strided(size, strides, dtype=dtype, device="cuda")
)
"""Memory on the current device, of a size, strides and a dtype, past the dispatcher."""
