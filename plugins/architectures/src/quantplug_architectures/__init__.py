"""Name rules of model families for quantplug, as data."""
