"""
quantplug: quantized checkpoints on any hardware, through plugins, with every decision readable before a weight is read.
"""

from __future__ import annotations
