"""Llama and models that are laid out like it: dense, nothing but the common names."""

from __future__ import annotations

from quantplug.names import Architecture

LLAMA = Architecture("llama", ("llama", "mistral"))
