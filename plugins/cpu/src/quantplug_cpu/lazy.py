"""
The functions that multiply, imported with torch when a layer is prepared, at hand when it runs.

An import statement in `apply` would cost a decoding step half a microsecond per layer with nothing left to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from quantplug.weight import Prepared

    Product = Callable[[torch.Tensor, Prepared, torch.Tensor | None], torch.Tensor]

PRODUCTS: dict[int | str, Product] = {}
"""
By the number of nibbles that a code is packed as, 0 when it keeps its byte; by name where there is no choice.
"""


def import_product(key: int | str) -> Product:
    """Import one of the functions and keep it in `PRODUCTS`."""
    if key == "dense":
        from quantplug_cpu.whole import multiply
    elif key == "w8a8":
        from quantplug_cpu.quantized import multiply
    elif key:
        from quantplug_cpu.product import multiply
    else:
        from quantplug_cpu.rowwise import multiply
    PRODUCTS[key] = multiply
    return multiply
