"""
What GPTQModel adds to the spelling `quant_method: "fp8"`: scales that divide, and words of its own for what shares one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.activations import spell_activation
from quantplug.errors import ConfigError
from quantplug.skip import SchemeRef
from quantplug_fp8.fields import agree, word
from quantplug_fp8.parameters import SCALE_NAMES

if TYPE_CHECKING:
    from quantplug.config import RawConfig
    from quantplug.jsonio import Json
    from quantplug.spec import ActivationSpec, ElementType

SEMANTICS = "weight_scale_semantics"
METHOD = "weight_scale_method"
KEYS = frozenset({SEMANTICS, METHOD, "lm_head", "meta", "pack_dtype"})
"""Its own keys. A head that is quantized is found by its tensors; how words are packed does not concern bytes."""

_SEMANTICS = {"inverse": "inverse"}
_STRATEGIES = {"tensor": "tensor", "row": "channel", "block": "block"}


def divides(raw: RawConfig) -> bool:
    """
    Return whether the stored scales divide: where that is said, or the file speaks of scales in GPTQModel's words.

    Its own reader knows one meaning, and takes it where none is named.

    Raises:
        ConfigError: `QP-CFG-FIELD` for a meaning that is not known.
    """
    if raw.fields.get(SEMANTICS) is None:
        return raw.fields.get(METHOD) is not None
    return word(raw, SEMANTICS, _SEMANTICS, "") == "inverse"


def scheme_ref(
    raw: RawConfig, element: ElementType, block: tuple[int, int] | None, permission: ActivationSpec | None
) -> SchemeRef:
    """
    Return the scheme `fp8` with scales that divide, always called `weight_scale_inv`.

    Args:
        raw: the configuration.
        element: type of the codes.
        block: rows and inputs of a block, if there is one.
        permission: to quantize x, as other files of this method have it. GPTQModel does so per tensor and per row;
            where scales are per block it never does.

    Raises:
        ConfigError: `QP-CFG-FIELD`; `QP-CFG-CONTRADICTION` when the keys do not come together.
    """
    strategy = "channel" if block is None else "block"
    if raw.fields.get(METHOD) is not None:
        strategy = word(raw, METHOD, _STRATEGIES, "")
    if (strategy == "block") != (block is not None):
        raise ConfigError(
            "QP-CFG-CONTRADICTION",
            raw.origin(METHOD),
            f"{METHOD} is {raw.fields[METHOD]!r}, beside "
            + ("no weight_block_size" if block is None else f"weight_block_size {list(block)}"),
            expected="'block' with a weight_block_size, another one without",
            fix="Find out which one describes the tensors, and correct or remove the other.",
        )
    agree(raw, "group_size", (-1,), f"{METHOD} {strategy!r}: its writer stores no other")
    params: dict[str, Json] = {
        "element": element.value,
        "strategy": strategy,
        "scale_name": SCALE_NAMES[1],
        "inverse": True,
        "activation": spell_activation(permission if block is None else None),
    }
    if block is not None:
        params |= {"block_n": block[0], "block_k": block[1]}
    return SchemeRef("fp8", tuple(sorted(params.items())))
