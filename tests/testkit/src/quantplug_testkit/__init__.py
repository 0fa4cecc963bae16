"""Oracles, strategies, conformance classes and the bug zoo of quantplug."""
