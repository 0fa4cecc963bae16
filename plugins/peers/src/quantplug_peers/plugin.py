"""The hooks of this plugin."""

from __future__ import annotations

quantplug_api = ">=1,<2"
