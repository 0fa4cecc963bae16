"""
The door of Transformers: a quantization method called `quantplug`, whatever the checkpoint calls its own.

Transformers loads the dense tensors as always; the planned layers are replaced before, by placeholders without
parameters, and filled by the core afterwards.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantplug.errors import HostError
from quantplug_transformers.devices import layer_devices, refuse_device_map
from quantplug_transformers.install import Installation
from quantplug_transformers.request import Request, Wishes, make_request
from quantplug_transformers.saving import state_to_save

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

    from quantplug.jsonio import Json

METHOD = "quantplug"


class QuantplugConfig(QuantizationConfigMixin):
    """
    What Transformers keeps as `model.config.quantization_config`.

    It is saved as the section that the checkpoint came with, so that every tool reads what is written.

    Attributes:
        quant_method: "quantplug".
        source: the checkpoint's own section.
        request: the decided load, for the time of loading; None when Transformers was asked without `from_pretrained`
            of this package, and afterwards.
    """

    def __init__(
        self,
        quant_method: str = METHOD,
        source: Mapping[str, Json] | None = None,
        request: Request | None = None,
    ) -> None:
        self.quant_method: Any = quant_method
        self.source = dict(source or {})
        # A configuration file may hold anything under that name.
        self.request = request if isinstance(request, Request) else None

    def to_dict(self) -> dict[str, Any]:
        """Return the checkpoint's own section."""
        return copy.deepcopy(self.source)


class QuantplugQuantizer(HfQuantizer):
    """Puts planned layers into a model while Transformers loads it."""

    requires_calibration = True
    quantization_config: QuantplugConfig

    def __init__(self, quantization_config: QuantplugConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._installation: Installation | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a device map that cannot be served; called before and after Transformers has resolved it."""
        refuse_device_map(kwargs.get("device_map"))

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Replace the planned layers by placeholders; the model is on the meta device."""
        request = self.quantization_config.request
        if request is None:
            request = _request_for(model, kwargs)
            self.quantization_config.source = dict(request.section)
        self._installation = Installation(model, request)
        self._installation.place()
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Fill the placeholders; the dense tensors are loaded and the modules are where they will run."""
        if self._installation is None:
            raise HostError("QP-HOST-INPUT", METHOD, "weights were loaded before the model was prepared for them")
        installation, self._installation = self._installation, None
        self.quantization_config.request = None
        installation.fill(layer_devices(model))
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return what `save_pretrained` writes: dense tensors, and quantized layers as their files had them."""
        return state_to_save(model), {}

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """Leave the model's own conversions alone; Transformers before 5.21 passes no model."""
        return weight_conversions

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether a `Trainer` may take the model."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model by itself."""
        return True


def register() -> None:
    """
    Teach Transformers the method `quantplug`; a second call changes nothing.

    Raises:
        HostError: `QP-HOST-VERSION` when something else goes by that name.
    """
    known = AUTO_QUANTIZER_MAPPING.get(METHOD)
    if known is QuantplugQuantizer:
        return
    if known is not None:
        raise HostError(
            "QP-HOST-VERSION",
            "transformers",
            f"its method {METHOD!r} already is {known.__module__}.{known.__qualname__}",
            expected="the name to be free",
            fix="Uninstall whatever registered it.",
        )
    register_quantization_config(METHOD)(QuantplugConfig)
    register_quantizer(METHOD)(QuantplugQuantizer)


def _request_for(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> Request:
    """Decide a load from what Transformers knows: its checkpoint files, dtype and device map."""
    files = kwargs.get("checkpoint_files") or ()
    if not files:
        raise HostError(
            "QP-HOST-INPUT", METHOD, "no checkpoint files to plan for", expected="a checkpoint directory or repository",
            fix="Weights that are given as a state_dict cannot be planned.",
        )  # fmt: skip
    with _plain_torch():
        return make_request(
            model, Path(files[0]).parent, Wishes(device_map=kwargs.get("device_map"), dtype=model.dtype)
        )


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Lift the meta device and default dtype that a model is built under, for kernels that try themselves out."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
