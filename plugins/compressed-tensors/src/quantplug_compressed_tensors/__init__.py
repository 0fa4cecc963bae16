"""compressed-tensors checkpoints for quantplug."""
