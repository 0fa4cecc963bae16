"""Run quantized checkpoints in Transformers through quantplug."""
