"""The quantplug command."""
