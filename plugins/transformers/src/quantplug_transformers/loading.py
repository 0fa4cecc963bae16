"""
`from_pretrained`: a checkpoint as an ordinary `PreTrainedModel`.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from quantplug.entries import path_entries
from quantplug.errors import CheckpointError, HostError, list_names
from quantplug.load import load_layers
from quantplug.onload import OnLoad
from quantplug.source import resolve_source
from quantplug_transformers.install import attach, untie
from quantplug_transformers.inventory import tied_modules
from quantplug_transformers.quantizer import METHOD, register
from quantplug_transformers.request import Request, Wishes, make_request
from quantplug_transformers.versions import require_accelerate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

    from quantplug.jsonio import Json
    from quantplug.load import Progress
    from quantplug.plan import Plan
    from quantplug.policy import Policy
    from quantplug.registry import Registry
    from quantplug_transformers.devices import DeviceMap

# Arguments of Transformers that change which bytes are read, or spread them: a plan knows nothing of them.
_REFUSED = {
    "config": "change its fields by keyword instead",
    "quantization_config": "the checkpoint says how it is quantized; use override to add to it",
    "revision": "download that revision first and pass its directory",
    "subfolder": "pass the subfolder's own path",
    "variant": "pass a directory that holds that variant only",
    "gguf_file": "convert it to safetensors first",
    "state_dict": "pass a directory",
    "key_mapping": "rename the tensors in the files",
    "ignore_mismatched_sizes": "nothing is initialised at random here",
    "torch_dtype": "say dtype",
    "use_safetensors": "only safetensors are read",
    "tp_plan": "tensor parallel loading is not served",
    "tp_size": "tensor parallel loading is not served",
    "device_mesh": "tensor parallel loading is not served",
    "distributed_config": "tensor parallel loading is not served",
    "output_loading_info": "the model carries quantplug_plan and quantplug_report",
}


def from_pretrained(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    policy: Policy | None = None,
    override: Mapping[str, Json] | None = None,
    quantize: str | None = None,
    skip: Sequence[str] = (),
    strict: bool = False,
    registry: Registry | None = None,
    progress: Progress | None = None,
    plan: Plan | None = None,
    model_class: type | None = None,
    **model_kwargs: Any,
) -> PreTrainedModel:
    """
    Load a checkpoint, quantized in any installed format or dense, as a model of Transformers.

    The model carries the plan it was loaded by as `quantplug_plan`, and what loading took as `quantplug_report`.

    Args:
        source: checkpoint directory, or a Hugging Face repository id.
        dtype: activation dtype ("bfloat16" or `torch.bfloat16`); None takes the one config.json names.
        device_map: as in Transformers, but nothing on disk; None is the CPU.
        policy: wishes about kernels; None reads the file that `QUANTPLUG_POLICY` names, if any.
        override: quantization fields the caller states; they may add to the file, never contradict it.
        quantize: name of a grid to quantize dense weights to while they are loaded ("int4-g32", "fp8", …); saved then,
            the model is a quantized checkpoint.
        skip: layers to leave whole then: paths, globs, or `re:` expressions.
        strict: whether a rule that the stored tensors contradict is an error.
        registry: plugins to use; None takes the installed ones.
        progress: told how far loading the quantized layers is.
        plan: a plan of the same checkpoint to load by; policy, override, quantize and strict are in it already.
        model_class: an Auto class or a model class; None is `AutoModelForCausalLM`.
        **model_kwargs: what Transformers' `from_pretrained` takes and a plan does not depend on
            (`attn_implementation`, `trust_remote_code`, fields of the model's configuration).

    Raises:
        QuantplugError: with a stable code, before or while loading; nothing is left behind.
    """
    register()
    refused = sorted(model_kwargs.keys() & _REFUSED.keys())
    if refused:
        raise HostError(
            "QP-HOST-INPUT", f"from_pretrained({refused[0]}=…)", "is not taken", fix=f"{_REFUSED[refused[0]]}."
        )
    if device_map is not None:
        require_accelerate()
    directory = resolve_source(source)
    builder = AutoModelForCausalLM if model_class is None else model_class
    if plan is not None and dtype is None:
        dtype = plan.dtype
    wish = None if quantize is None else OnLoad(quantize, path_entries(list(skip), "skip"))
    wishes = Wishes(dtype, device_map, policy, override, wish, strict, registry, progress)
    config, unused = read_config(directory, model_kwargs)
    model = skeleton(builder, config, directory)
    request = make_request(model, directory, wishes, plan)
    if request.quantized.intersection(tied_modules(model)):
        untie(config)
    if request.section:
        config.quantization_config = {"quant_method": METHOD, "source": dict(request.section), "request": request}
    loaded = _load(builder, config, request, device_map, unused)
    if not request.section:
        attach(loaded, request.plan, directory, load_layers(request.plan, directory, registry=request.registry))
    return loaded


def read_config(directory: Path, fields: Mapping[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """
    Return the model configuration with some fields set, and those of `fields` that are none of its own.

    Raises:
        HostError: `QP-HOST-MODEL` when Transformers does not know the model or refuses the configuration.
    """
    with _model_errors(directory, "does not accept its config.json"):
        config, unused = AutoConfig.from_pretrained(str(directory), return_unused_kwargs=True, **fields)
    if "trust_remote_code" in fields:
        unused["trust_remote_code"] = fields["trust_remote_code"]
    return config, unused


def skeleton(builder: Any, config: PreTrainedConfig, directory: Path) -> PreTrainedModel:
    """
    Return the model without storage: names, shapes and classes only.

    Raises:
        HostError: `QP-HOST-MODEL` when it cannot be built.
    """
    with _model_errors(directory, f"cannot build {config.model_type!r} as {builder.__name__}"), torch.device("meta"):
        build = builder.from_config if hasattr(builder, "from_config") else builder
        model: PreTrainedModel = build(copy.deepcopy(config))
    return model


def _load(
    builder: Any, config: PreTrainedConfig, request: Request, device_map: DeviceMap | None, arguments: dict[str, Any]
) -> PreTrainedModel:
    weights = getattr(config, "transformers_weights", None)
    # Transformers and the core must read the same files, whatever else lies in the directory.
    config.transformers_weights = request.weights_file
    model, info = builder.from_pretrained(
        str(request.directory),
        config=config,
        dtype=getattr(torch, request.plan.dtype),
        device_map=device_map,
        use_safetensors=True,
        output_loading_info=True,
        **arguments,
    )
    model.config.transformers_weights = weights
    if weights is None:
        del model.config.transformers_weights
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = [str(item) for item in info.get(kind) or ()]
        if found:
            raise CheckpointError(
                "QP-ST-EXTRA" if kind == "unexpected_keys" else "QP-ST-MISSING",
                str(request.directory),
                f"Transformers loaded it with {kind.replace('_', ' ')}: {list_names(found)}",
                expected="every parameter from one stored tensor",
                fix="Please report it: the check before loading should have found this.",
            )
    return cast("PreTrainedModel", model)


@contextmanager
def _model_errors(directory: Path, what: str) -> Iterator[None]:
    """Give what Transformers raises about a model a place and a code."""
    errors = (ValueError, TypeError, KeyError, AttributeError, ImportError, OSError, RuntimeError, StrictDataclassError)
    try:
        yield
    except errors as error:
        raise HostError(
            "QP-HOST-MODEL",
            str(directory),
            f"Transformers {transformers.__version__} {what} ({type(error).__name__}: {str(error)[:500]})",
            expected="a model that this version of Transformers has",
            fix="Upgrade transformers if the model is newer than it; pass trust_remote_code=True only if you trust the "
            "code in the checkpoint, and model_class if it is no causal language model.",
        ) from error
