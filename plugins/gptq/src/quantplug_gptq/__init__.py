"""GPTQ checkpoints for quantplug: 2, 3, 4 and 8 bit, act-order, dynamic rules."""
