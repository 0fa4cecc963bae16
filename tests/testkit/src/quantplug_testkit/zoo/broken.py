"""
What all kernels of the zoo share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from quantplug.reference import ReferenceKernel
from quantplug_testkit.canonical import copy_weight

if TYPE_CHECKING:
    from quantplug.weight import Prepared, Weight


class Broken(ReferenceKernel):
    """
    The reference kernel with one fault.

    Attributes:
        caught_by: the conformance tests that are named as catching it; others may, too.
    """

    caught_by: ClassVar[tuple[str, ...]] = ("test_product_is_within_the_derived_bound",)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = f"zoo.{cls.__name__.lower()}"


class Misread(Broken):
    """Reads the weights wrongly when it multiplies; keeps them as they should be."""

    caught_by: ClassVar[tuple[str, ...]] = (
        "test_every_weight_is_used_at_its_place",
        "test_product_is_within_the_derived_bound",
    )

    def misread(self, weight: Weight) -> Weight:
        """Return what is multiplied with instead of a segment; it may be changed in place."""
        raise NotImplementedError

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Return the values of the misread segments."""
        return torch.cat([self.misread(copy_weight(weight)).dequantize(dtype) for weight in self.unprepare(prepared)])
