"""What other engines would make of the same configuration, for quantplug lint."""
