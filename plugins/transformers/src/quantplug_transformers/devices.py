"""
Where a model will run, out of what Transformers calls a device map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from quantplug.detect import detect
from quantplug.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedModel

    from quantplug.registry import Registry

DeviceMap = str | int | torch.device | dict[str, Any]

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
_NOWHERE = ("disk", "meta")


def refuse_device_map(device_map: object) -> None:
    """
    Refuse to leave layers on disk.

    Raises:
        HostError: `QP-HOST-DEVICE` naming the modules.
    """
    places = device_map if isinstance(device_map, dict) else {"": device_map}
    away = [module or "the model" for module, place in places.items() if str(place) in _NOWHERE]
    if away:
        raise HostError(
            "QP-HOST-DEVICE",
            "device_map",
            f"leaves {', '.join(away[:5])}{' …' if len(away) > 5 else ''} on disk",
            expected="a device that computes for every module",
            fix="Prepared layers cannot be fetched from disk piece by piece: use a machine with more memory, or a "
            "smaller model.",
        )


def platform_kind(device_map: DeviceMap | None, registry: Registry) -> str:
    """
    Return the kind of machine that a device map asks for; no map is the CPU, as in Transformers.

    Raises:
        HostError: `QP-HOST-DEVICE` when it cannot be read, or spreads over several kinds.
    """
    refuse_device_map(device_map)
    if device_map is None:
        return "cpu"
    if isinstance(device_map, str) and device_map in _AUTOMATIC:
        return detect(registry).kind
    places = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    kinds = {_device(place).type for place in places}
    if len(kinds) != 1:
        raise HostError(
            "QP-HOST-DEVICE",
            "device_map",
            f"spreads over {', '.join(sorted(kinds)) or 'nothing'}",
            expected="one kind of device, as a plan is made for one",
            fix='Name one device for everything: device_map="cpu".',
        )
    return kinds.pop()


def layer_devices(model: PreTrainedModel) -> Callable[[str], torch.device]:
    """Return who says where each module of a loaded model runs."""
    placed: Mapping[str, Any] = getattr(model, "hf_device_map", None) or {"": model.device}

    def device_of(path: str) -> torch.device:
        parts = path.split(".")
        above = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
        return _device(next((placed[name] for name in above if name in placed), model.device))

    return device_of


def _device(place: Any) -> torch.device:
    try:
        return torch.device(place)
    except (RuntimeError, TypeError) as error:
        raise HostError(
            "QP-HOST-DEVICE", "device_map", f"{place!r} is not a device", expected='such as "cpu", "cuda:0" or "auto"'
        ) from error
