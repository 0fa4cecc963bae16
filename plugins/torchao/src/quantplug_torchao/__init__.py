"""torchao checkpoints for quantplug."""
