"""
What modules that hold prepared weights have in common: where those came from, stored parameters, no moving about.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from quantplug.errors import LoadError, QuantplugError, RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from quantplug.ledger import Ledger
    from quantplug.moekernel import Kernel
    from quantplug.plan import LayerPlan, Segment

_POISON_BYTE = 0xA5


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """
    Where the bytes of a loaded tensor are: enough to copy them again.

    Attributes:
        file: absolute path of the safetensors file.
        name: tensor name in it.
        sha256: digest of its bytes when they were read.
    """

    file: str
    name: str
    sha256: str


class PreparedModule(torch.nn.Module):
    """
    A module whose weights a kernel has prepared; it refuses to be moved or cast, because kernel layouts cannot follow.

    Args:
        layer: its plan; quantized.
    """

    def __init__(self, layer: LayerPlan) -> None:
        super().__init__()
        self.path = layer.path
        self.sources: tuple[SourceTensor, ...] = ()
        """Where its stored tensors came from; () when a framework's loader filled it."""
        self._layer = layer
        self._dtype: torch.dtype = getattr(torch, layer.problem.dtype if layer.problem is not None else "float32")
        self._device: torch.device | None = None
        """Where the prepared tensors lie; None as long as there are none."""
        self._ledger: Ledger | None = None

    @property
    def parameter_count(self) -> int:
        """Number of weights and biases, as a dense module of its size would have them."""
        raise NotImplementedError

    def process_weights_after_loading(self, device: torch.device | str = "cpu") -> None:
        """
        Turn the parameters that `create_weights` allocated, and a framework's loader filled, into the kernel's layout.

        Raises:
            RunError: `QP-RUN-STATE` when `create_weights` was not called.
            LoadError: `QP-LOAD-UNFILLED` when the loader left elements unwritten; the parameters stay.
            CheckpointError: `QP-ST-…` when their values are not what the format allows; the parameters stay.
        """
        if self._ledger is None:
            raise RunError("QP-RUN-STATE", self.path, "create_weights was not called")
        self._ledger.close(self.path)
        self._install_parameters(torch.device(device))
        for name in list(self._parameters):
            del self._parameters[name]
        self._ledger = None

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        """Hold a prepared tensor; its sizes never change, and so torch.compile need not take them for x's."""
        torch._dynamo.mark_static(tensor)
        self.register_buffer(f"prepared_{name.replace('.', '_')}", tensor, persistent=False)

    @contextmanager
    def _preparing(self, kernel: Kernel) -> Iterator[None]:
        """Give what a kernel raises while it prepares this layer a place and a code (`QP-LOAD-PREPARE`)."""
        try:
            yield
        except QuantplugError:
            raise
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise LoadError(
                "QP-LOAD-PREPARE",
                self.path,
                f"kernel {kernel.name} accepted the layer and then failed: {type(error).__name__}: {error}",
                fix=f'Report it to its maker; a policy with deny = ["{kernel.name}"] chooses another.',
            ) from error

    def _no_way_back(self, what: str) -> LoadError:
        """Return the error about a layer whose stored form cannot be had from what its kernel holds."""
        return LoadError(
            "QP-LOAD-SOURCE", self.path, what, expected="the source file, or a kernel that can unprepare",
            fix="Keep the checkpoint directory where it was, or load with another kernel.",
        )  # fmt: skip

    def _install_parameters(self, device: torch.device) -> None:
        """Decode and prepare the filled parameters."""
        raise NotImplementedError

    def _allocate(
        self,
        name: str,
        shape: tuple[int, ...],
        dtypes: tuple[torch.dtype, ...],
        other_shapes: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        parameter = torch.nn.Parameter(_poisoned(shape, dtypes[0]), requires_grad=False)
        # Engines look for this attribute on the parameter.
        setattr(parameter, "weight_loader", self._loader(f"{self.path}.{name}", dtypes, other_shapes))  # noqa: B010
        self.register_parameter(name, parameter)
        if self._ledger is not None:
            self._ledger.expect(f"{self.path}.{name}", shape)

    def _loader(
        self, name: str, dtypes: tuple[torch.dtype, ...], other_shapes: tuple[tuple[int, ...], ...]
    ) -> Callable[..., None]:
        untouched = True

        def load(parameter: torch.nn.Parameter, tensor: torch.Tensor, start: tuple[int, ...] | None = None) -> None:
            nonlocal untouched
            if start is None and tuple(tensor.shape) in other_shapes:
                tensor = tensor.reshape(parameter.shape)
            start = (0,) * parameter.dim() if start is None else start
            box = tuple((begin, begin + size) for begin, size in zip(start, tensor.shape, strict=True))
            allowed = dtypes if untouched else (parameter.dtype,)
            if tensor.dtype not in allowed:
                expected = " or ".join(map(str, dict.fromkeys(allowed)))
                raise LoadError("QP-LOAD-PREPARE", name, f"loaded as {tensor.dtype}", expected=expected)
            if self._ledger is not None:
                self._ledger.write(name, box)
            if parameter.dtype != tensor.dtype:
                parameter.data = _poisoned(tuple(parameter.shape), tensor.dtype, parameter.device)
            untouched = False
            parameter.data[tuple(slice(begin, end) for begin, end in box)] = tensor

        return load

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        if self._device is not None:
            before = torch.empty(0, dtype=self._dtype, device=self._device)
            after: Any = fn(before)
            if after.device != before.device or after.dtype != before.dtype:
                raise RunError(
                    "QP-RUN-MOVE", self.path, f"asked to become {after.dtype} on {after.device}",
                    expected=f"{self._dtype} on {self._device}, as prepared",
                    fix="Load the checkpoint again with the dtype and device you want.",
                )  # fmt: skip
            return self
        torch.nn.Module._apply(self, fn, recurse)
        return self


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """Return a tensor in which what is never written shows."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if dtype.is_floating_point:
        return tensor.fill_(float("nan"))
    tensor.view(torch.uint8).fill_(_POISON_BYTE)
    return tensor


def named_tensors(segment: Segment, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return stored tensors by name; of those that a format may leave out, the ones that the source has."""
    had = None if segment.quantize else dict(segment.tensors)
    return {f"{segment.name}.{suffix}": tensor for suffix, tensor in stored.items() if had is None or suffix in had}
