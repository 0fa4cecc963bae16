"""
The parameters of the three formats, as a dialect or a caller spells them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.activations import read_activation
from quantplug.errors import ConfigError
from quantplug.jsonio import get_str

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantplug.jsonio import Json
    from quantplug.spec import ActivationSpec

SCALE_NAMES = ("weight_scale", "weight_scale_inv")
EITHER = "either"
"""As a scale name: the file may use either of the two."""
WEIGHT_NAMES = ("weight_packed", "weight")
GLOBAL_NAMES = ("weight_global_scale", "weight_scale_2")
"""The first stores the reciprocal, the second the factor itself; so do the first and second of the next."""
INPUT_GLOBAL_NAMES = ("input_global_scale", "input_scale")
INPUT_SCALE = "input_scale"
"""The stored scale of x where it is one number for all of x."""


def check_known(params: Mapping[str, Json], known: Sequence[str], scheme: str, where: str) -> None:
    """
    Refuse parameters that a scheme does not have.

    Raises:
        ConfigError: `QP-CFG-UNKNOWN`.
    """
    for key in sorted(params.keys() - set(known)):
        raise ConfigError(
            "QP-CFG-UNKNOWN", f"{where}: {key}", f"is no parameter of {scheme}", expected=" or ".join(known)
        )


def read_name(params: Mapping[str, Json], key: str, choices: Sequence[str], where: str) -> str:
    """Return which of several names a file uses, by default the first; raises `ConfigError` (`QP-CFG-FIELD`)."""
    return get_str(params, key, f"{where}: {key}", default=choices[0], choices=choices)


def read_permission(params: Mapping[str, Json], where: str, *, global_scale: bool) -> ActivationSpec | None:
    """
    Read `activation`: a floating-point type with dynamic scales, or with one stored scale for all of x.

    Args:
        params: of the scheme.
        where: where they stand.
        global_scale: whether the format can store a factor of all dynamic scales of x.

    Raises:
        ConfigError: `QP-CFG-FIELD`.
    """
    place = f"{where}: activation"
    spec = read_activation(params.get("activation"), place)
    if spec is None:
        return None
    if not spec.element.floating:
        what, expected = f"quantizes x to {spec.element}", "a floating-point type"
    elif not spec.dynamic and spec.granularity != "tensor":
        what, expected = f"stores scales per {spec.granularity}", "'tensor' for stored scales: a layer stores one"
    elif spec.global_scale and not global_scale:
        what, expected = "has a global scale of x", "none: only NVFP4 stores one"
    else:
        return spec
    raise ConfigError("QP-CFG-FIELD", place, what, expected=expected)
