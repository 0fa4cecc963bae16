"""INT8 checkpoints for quantplug: W8A8 and W8A16."""
