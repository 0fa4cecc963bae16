"""AWQ checkpoints for quantplug."""
