"""FP8 products of torch and cuBLAS for quantplug."""
