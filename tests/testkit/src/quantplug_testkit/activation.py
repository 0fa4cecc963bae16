"""
What files store about x, made to order, and x as a kernel sees it that quantizes as a file permits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.weight import ActivationParams
from quantplug_testkit.oracles import floats
from quantplug_testkit.oracles.activation import Quantized, quantize

if TYPE_CHECKING:
    import numpy as np

    from quantplug.spec import ActivationSpec
    from quantplug_testkit.oracles.canonical import Floats


def make_activation(spec: ActivationSpec | None, generator: np.random.Generator) -> ActivationParams | None:
    """
    Return random parameters for standard normal x, or None where a file stores none.

    Static scales reach as far as 2 to 3, so that some x saturate; zero points are off the middle. Global scales bring
    amax within the range that float8_e4m3fn scales have.
    """
    if spec is None or (spec.dynamic and not spec.global_scale):
        return None
    if spec.dynamic:
        factor = generator.uniform(2.0, 6.0) / (floats.largest(spec.element) * floats.largest(spec.scale_dtype))
        return ActivationParams(global_scale=torch.tensor(factor, dtype=torch.float32))
    levels = floats.largest(spec.element) if spec.element.floating else 2 ** (spec.element.bits - 1) - 1
    scale = torch.tensor(generator.uniform(2.0, 3.0) / levels, dtype=torch.float32)
    if spec.element.signed:
        return ActivationParams(scale)
    middle = 1 << (spec.element.bits - 1)
    return ActivationParams(scale, torch.tensor(int(generator.integers(middle // 2, middle)), dtype=torch.uint8))


def quantized(x: Floats, spec: ActivationSpec, params: ActivationParams | None) -> Quantized:
    """
    Return what a finite x `[M, K]` becomes, by the oracle.

    Args:
        x: float64, exactly what the kernel is given.
        spec: what the file permits.
        params: what it stores about x, for one segment.
    """
    stored = ActivationParams() if params is None else params
    return quantize(
        x,
        spec,
        scale=None if stored.scale is None else float(stored.scale),
        zero=0 if stored.zero is None else int(stored.zero),
        global_scale=1.0 if stored.global_scale is None else float(stored.global_scale),
    )
