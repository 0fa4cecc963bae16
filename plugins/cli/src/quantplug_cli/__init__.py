"""The quantplug command: renders what the core returns, decides nothing."""
