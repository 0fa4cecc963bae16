"""auto-round checkpoints for quantplug."""
