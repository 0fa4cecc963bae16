"""ModelOpt checkpoints for quantplug."""
