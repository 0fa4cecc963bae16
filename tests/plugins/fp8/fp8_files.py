"""
Stored tensors for the tests, their values read by the oracle and not by the code under test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from quantplug.spec import LinearShape
from quantplug_fp8.scheme import FP8Scheme
from quantplug_testkit.oracles import floats

ELEMENTS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


def finite_bytes(element: str) -> np.ndarray:
    """Return the bytes that are finite numbers."""
    return np.flatnonzero(np.isfinite(floats.values(element))).astype(np.uint8)


def octets(tensor: torch.Tensor) -> np.ndarray:
    """Return the bytes of an 8-bit tensor."""
    return tensor.view(torch.uint8).numpy()


def float8(array: np.ndarray, element: str) -> torch.Tensor:
    """Return bytes as a tensor of that type."""
    return torch.from_numpy(np.ascontiguousarray(array)).view(getattr(torch, element))


def tile(params: dict[str, object], n: int, k: int) -> tuple[int, int]:
    """Return rows and inputs that share a scale, from the words of the parameters."""
    match params.get("strategy", "channel"):
        case "tensor":
            return n, k
        case "channel":
            return 1, k
        case "group":
            return 1, int(params["group_size"])
        case _:
            return int(params.get("block_n", 128)), int(params.get("block_k", 128))


def expanded(scales: np.ndarray, params: dict[str, object], n: int, k: int) -> np.ndarray:
    """Return the scale of every element, `[N, K]`, one after the other."""
    rows, columns = tile(params, n, k)
    grid = scales.reshape(-(-n // rows), -(-k // columns))
    return np.array([[grid[i // rows, j // columns] for j in range(k)] for i in range(n)]).reshape(n, k)


@dataclass
class Layer:
    """One stored layer."""

    params: dict[str, object]
    scheme: FP8Scheme
    shape: LinearShape
    tensors: dict[str, torch.Tensor]

    def values(self) -> np.ndarray:
        """Return what the oracle reads from the tensors, float64 `[N, K]`, rounded once to float32."""
        n, k = self.shape.out_features, self.shape.in_features
        (name,) = {"weight_scale", "weight_scale_inv"} & self.tensors.keys()
        scales = self.tensors[name].to(torch.float64).numpy()
        if self.params.get("inverse"):
            scales = (1 / scales).astype(np.float32).astype(np.float64)
        codes = floats.decode(octets(self.tensors["weight"]), str(self.params.get("element", ELEMENTS[0])))
        return (codes * expanded(scales, self.params, n, k)).astype(np.float32)


def stored_layer(
    n: int,
    k: int,
    seed: int = 0,
    *,
    scale_dtype: torch.dtype = torch.float32,
    scale_shape: tuple[int, ...] | None = None,
    name: str | None = None,
    **params: object,
) -> Layer:
    """Return a random layer of finite codes and positive scales, as a file with these parameters stores it."""
    random = np.random.default_rng(seed)
    element = str(params.get("element", ELEMENTS[0]))
    scheme = FP8Scheme.build(params, "test")
    shape = LinearShape(n, k)
    spec = scheme.params(shape)[1]
    scales = torch.from_numpy(random.lognormal(-4, 2, spec.shape).astype(np.float32)).to(scale_dtype)
    tensors = {
        "weight": float8(random.choice(finite_bytes(element), (n, k)), element),
        name or spec.suffix: scales.reshape(spec.shape if scale_shape is None else scale_shape),
    }
    if scheme.activation is not None and not scheme.activation.dynamic:
        tensors["input_scale"] = torch.tensor([0.03125])
    return Layer(params, scheme, shape, tensors)
