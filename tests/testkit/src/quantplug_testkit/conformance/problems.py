"""
The fixed, public catalogue of problems that kernels are tried on, each named after what goes wrong there.

A kernel is tried on those that its own `supports` accepts: claiming less in the test means being chosen less often.
"""

from __future__ import annotations

from quantplug.spec import ActivationSpec, ElementType, LinearProblem, SegmentSpec
from quantplug_testkit.conformance.activations import ACTIVATIONS
from quantplug_testkit.conformance.floats import FLOATS
from quantplug_testkit.conformance.hazard import Hazard, weight
from quantplug_testkit.conformance.integers import INTEGERS
from quantplug_testkit.conformance.platforms import DTYPES, PLATFORMS

__all__ = ["CATALOGUE", "DTYPES", "PLATFORMS", "UNUSUAL", "Hazard"]

CATALOGUE: tuple[Hazard, ...] = (*INTEGERS, *FLOATS, *ACTIVATIONS)
"""Every family, in every dtype."""

_PLAIN = (SegmentSpec(64, weight("uint4", 32)),)

UNUSUAL: tuple[LinearProblem, ...] = (
    LinearProblem(128, _PLAIN, "float64"),
    LinearProblem(128, _PLAIN, "float8_e4m3fn"),
    LinearProblem(128, _PLAIN, "int32"),
    LinearProblem(128, _PLAIN, "bfloat16", activation=ActivationSpec(ElementType.INT8, "token", dynamic=True)),
    LinearProblem(128, _PLAIN, "bfloat16", activation=ActivationSpec(ElementType.FLOAT8_E4M3FN, "group", True, 128)),
    LinearProblem(0, _PLAIN, "bfloat16"),
    LinearProblem(128, (SegmentSpec(0, weight("uint4", 32)),), "bfloat16"),
    LinearProblem(1, (SegmentSpec(1, weight("uint2", 1)),), "bfloat16"),
    LinearProblem(2**31, (SegmentSpec(2**20, weight("int4", 128)),), "bfloat16"),
    LinearProblem(128, _PLAIN * 64, "bfloat16", bias=True),
    LinearProblem(7919, (SegmentSpec(7907, weight("uint3", 61, act_order=True)),), "float16", bias=True),
    LinearProblem(128, (SegmentSpec(64, weight("uint4", 32, scale_dtype="float8_e4m3fn")),), "bfloat16"),
)
"""Problems that a kernel is asked about and never has to run."""
