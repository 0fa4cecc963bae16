"""
Schemes built from references, once per distinct set of parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.errors import ConvertError

if TYPE_CHECKING:
    import torch

    from quantplug.registry import Registry
    from quantplug.scheme import LinearScheme
    from quantplug.skip import SchemeRef
    from quantplug.weight import Weight


def quantize_dense(
    scheme: LinearScheme, dense: torch.Tensor, where: str, *, hessian: torch.Tensor | None = None
) -> Weight:
    """
    Quantize one dense weight `[N, K]`, which must be finite.

    Args:
        scheme: the format to quantize to.
        dense: any float dtype.
        where: its name, for messages.
        hessian: as `LinearScheme.quantize` takes it.

    Raises:
        ConvertError: `QP-CONV-VALUE` with the place of the first element that is not finite.
    """
    if not bool(dense.isfinite().all()):
        bad = (~dense.isfinite()).nonzero()[0].tolist()
        raise ConvertError("QP-CONV-VALUE", where, f"is not finite at {bad}", expected="finite weights")
    return scheme.quantize(dense, hessian=hessian)


class SchemeCache:
    """The schemes that one plan or load uses."""

    def __init__(self, registry: Registry) -> None:
        self.plugins: set[str] = set()
        """Distributions whose schemes were used."""
        self._registry = registry
        self._schemes: dict[SchemeRef, LinearScheme] = {}

    def get(self, ref: SchemeRef, where: str) -> LinearScheme:
        """
        Return the scheme a reference names.

        Args:
            ref: name and parameters.
            where: who refers to it, for messages.

        Raises:
            PluginError: `QP-PLUG-MISSING` when no installed plugin provides it.
            ConfigError: `QP-CFG-…` when it refuses the parameters.
        """
        if ref not in self._schemes:
            provided = self._registry.scheme(ref.name)
            self.plugins.add(provided.plugin)
            self._schemes[ref] = provided.item.build(dict(ref.params), where)
        return self._schemes[ref]
