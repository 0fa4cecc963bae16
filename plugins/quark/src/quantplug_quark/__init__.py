"""Quark checkpoints for quantplug."""
