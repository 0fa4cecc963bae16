"""MXFP8, MXFP4 and NVFP4 checkpoints for quantplug."""
