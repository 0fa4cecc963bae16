"""FP8 checkpoints for quantplug: per tensor, channel and block."""
