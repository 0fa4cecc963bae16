"""The module that runs one quantized layer."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from toy_checkpoints import toy_checkpoint, toy_registry, toy_tensors, write_checkpoint

from quantplug.errors import LoadError, RunError
from quantplug.inventory import Inventory, ModuleInfo
from quantplug.ledger import Ledger
from quantplug.load import load_layers
from quantplug.modules import QuantizedLinear
from quantplug.planner import plan
from quantplug.schemes import SchemeCache
from quantplug_testkit import toys

if TYPE_CHECKING:
    from pathlib import Path

PATH = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def empty(tmp_path: Path) -> QuantizedLinear:
    registry = toy_registry()
    made = plan(toy_checkpoint(tmp_path), platform="cpu", registry=registry)
    return QuantizedLinear(made.layer(PATH), made, registry, SchemeCache(registry))


@pytest.fixture
def ready(tmp_path: Path) -> QuantizedLinear:
    registry = toy_registry()
    directory = toy_checkpoint(tmp_path / "ready")
    made = plan(directory, platform="cpu", registry=registry)
    return load_layers(made, directory, registry=registry).modules[PATH]


def test_a_frameworks_own_loader_fills_poisoned_parameters_and_leaves_the_same_layer(
    empty: QuantizedLinear, ready: QuantizedLinear
) -> None:
    ledger = Ledger()
    empty.create_weights(ledger)
    parameters = dict(empty.named_parameters())
    assert set(parameters) == {"codes", "scale", "bias"}
    assert bool(torch.isnan(parameters["scale"]).all())
    assert parameters["codes"].view(torch.uint8).unique().tolist() == [0xA5]
    tensors = toy_tensors()
    parameters["codes"].weight_loader(parameters["codes"], tensors[f"{PATH}.codes"][:16], (0, 0))
    parameters["scale"].weight_loader(parameters["scale"], tensors[f"{PATH}.scale"])
    parameters["bias"].weight_loader(parameters["bias"], tensors[f"{PATH}.bias"])
    with pytest.raises(LoadError, match=r"codes \(512 of 1024 elements\)") as raised:
        empty.process_weights_after_loading()
    assert raised.value.code == "QP-LOAD-UNFILLED"
    parameters["codes"].weight_loader(parameters["codes"], tensors[f"{PATH}.codes"][16:], (16, 0))
    empty.process_weights_after_loading()
    assert not dict(empty.named_parameters())
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    assert torch.equal(empty(x), ready(x))


def test_reloading_writes_into_the_same_memory(empty: QuantizedLinear) -> None:
    tensors = toy_tensors()

    def fill() -> list[int]:
        ledger = Ledger()
        empty.create_weights(ledger)
        for name, parameter in empty.named_parameters():
            parameter.weight_loader(parameter, tensors[f"{PATH}.{name}"])  # type: ignore[attr-defined]
        empty.process_weights_after_loading()
        return [buffer.data_ptr() for name, buffer in empty.named_buffers() if "bias" not in name]

    first = fill()
    tensors[f"{PATH}.scale"] *= 2
    assert fill() == first
    assert torch.equal(empty.dequantize(), tensors[f"{PATH}.codes"] * tensors[f"{PATH}.scale"])


def test_a_loader_that_brings_the_wrong_dtype_or_place_is_refused(empty: QuantizedLinear) -> None:
    empty.create_weights(Ledger())
    codes = empty.get_parameter("codes")
    with pytest.raises(LoadError, match=r"loaded as torch\.float32; expected torch\.int8"):
        codes.weight_loader(codes, torch.zeros(32, 32))
    with pytest.raises(LoadError, match="inside"):
        codes.weight_loader(codes, torch.zeros(32, 32, dtype=torch.int8), (1, 0))
    assert codes.view(torch.uint8).unique().tolist() == [0xA5]


def test_a_parameter_takes_any_dtype_that_the_format_has_with_its_first_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales in bfloat16 come as they are, in pieces; after the first, the dtype stands. The account is kept."""
    declared = toys.ToyScheme.params

    def params(self, shape):
        codes, scale = declared(self, shape)
        return codes, replace(scale, dtypes=("float32", "bfloat16", "float16"))

    monkeypatch.setattr(toys.ToyScheme, "params", params)
    registry = toy_registry()
    made = plan(toy_checkpoint(tmp_path), platform="cpu", registry=registry)
    layer = QuantizedLinear(made.layer(PATH), made, registry, SchemeCache(registry))
    layer.create_weights(Ledger())
    tensors = toy_tensors()
    narrow = tensors[f"{PATH}.scale"].bfloat16()
    scale = layer.get_parameter("scale")
    with pytest.raises(LoadError, match=r"float64; expected torch\.float32 or torch\.bfloat16 or torch\.float16"):
        scale.weight_loader(scale, narrow.double())
    with pytest.raises(LoadError, match="inside"):
        scale.weight_loader(scale, narrow, (1, 0))
    assert scale.dtype == torch.float32, "what was refused changed nothing"
    scale.weight_loader(scale, narrow[:16], (0, 0))
    assert scale.dtype == torch.bfloat16
    assert bool(scale[16:].isnan().all()), "the rest is poisoned as before"
    with pytest.raises(LoadError, match=r"torch\.float32; expected torch\.bfloat16"):
        scale.weight_loader(scale, narrow[16:].float(), (16, 0))
    layer.get_parameter("codes").weight_loader(layer.get_parameter("codes"), tensors[f"{PATH}.codes"])
    layer.get_parameter("bias").weight_loader(layer.get_parameter("bias"), tensors[f"{PATH}.bias"].float())
    with pytest.raises(LoadError, match=r"scale \(16 of 32 elements\)"):
        layer.process_weights_after_loading()
    scale.weight_loader(scale, narrow[16:], (16, 0))
    layer.process_weights_after_loading()
    assert torch.equal(layer.dequantize(), tensors[f"{PATH}.codes"] * narrow.float())


@pytest.mark.parametrize(
    ("x", "code", "text"),
    [
        (torch.zeros(2, 31, dtype=torch.bfloat16), "QP-RUN-SHAPE", "x is [2, 31]; expected [..., 32]"),
        (torch.zeros(2, 32), "QP-RUN-DTYPE", "Cast x, or load with dtype='float32'"),
        (torch.zeros(2, 32, dtype=torch.bfloat16, device="meta"), "QP-RUN-DEVICE", "x lies on meta; expected cpu"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(ready: QuantizedLinear, x: torch.Tensor, code: str, text: str) -> None:
    with pytest.raises(RunError) as raised:
        ready(x)
    assert (raised.value.code, text in str(raised.value)) == (code, True)


def test_using_a_layer_before_it_is_loaded_is_refused(empty: QuantizedLinear) -> None:
    with pytest.raises(RunError, match="not prepared") as raised:
        empty(torch.zeros(1, 32, dtype=torch.bfloat16))
    assert raised.value.code == "QP-RUN-STATE"
    with pytest.raises(RunError, match="create_weights was not called"):
        empty.process_weights_after_loading()


@pytest.mark.parametrize("shape", [(32,), (0, 32), (1, 32), (2, 3, 32), (2, 1, 5, 32)])
def test_any_leading_shape_is_kept(ready: QuantizedLinear, shape: tuple[int, ...]) -> None:
    y = ready(torch.ones(shape, dtype=torch.bfloat16))
    assert y.shape == (*shape[:-1], 32)
    assert y.dtype == torch.bfloat16


def test_a_prepared_layer_refuses_to_be_moved_or_cast_and_accepts_what_changes_nothing(ready: QuantizedLinear) -> None:
    for move in (lambda: ready.half(), lambda: ready.to("meta"), lambda: ready.float()):
        with pytest.raises(RunError) as raised:
            move()
        assert raised.value.code == "QP-RUN-MOVE"
    assert ready.to("cpu").to(torch.bfloat16) is ready
    assert ready(torch.ones(1, 32, dtype=torch.bfloat16)).shape == (1, 32)


def test_a_deep_copy_runs_on_its_own(ready: QuantizedLinear) -> None:
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    twin = copy.deepcopy(ready)
    expected = ready(x)
    for buffer in ready.buffers():
        buffer.zero_()
    assert torch.equal(twin(x), expected)


def test_rows_decide_between_kernels_of_one_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for kind in (toys.ToyKernel, toys.ToyManyRows):

        def apply(self, x, prepared, bias, _kind=kind):
            calls.append(_kind.name)
            return super(toys.ToyKernel, self).apply(x, prepared, bias)

        monkeypatch.setattr(kind, "apply", apply)
    registry = toy_registry()
    directory = toy_checkpoint(tmp_path)
    made = plan(directory, platform="cpu", registry=registry)
    layer = load_layers(made, directory, registry=registry).modules[PATH]
    for rows in (0, 1, 15, 16, 300):
        layer(torch.ones(rows, 32, dtype=torch.bfloat16))
    assert calls == ["toy.fast", "toy.fast", "toy.fast", "toy.many", "toy.many"]


def test_a_fused_layer_of_unequal_segments_is_split_and_saved_shard_by_shard(tmp_path: Path) -> None:
    shards = ("a.q_proj", "a.k_proj")
    scheme = toys.ToyScheme.build({}, "test")
    dense = {name: torch.randn(16, 32) for name in shards}
    tensors = {f"{n}.{s}": t for n in shards for s, t in scheme.encode(scheme.quantize(dense[n])).items()}
    tensors |= {f"{name}.bias": torch.randn(16).bfloat16() for name in shards}
    directory = write_checkpoint(tmp_path, tensors, {"quant_method": "toy"})
    registry = toy_registry()
    inventory = Inventory((ModuleInfo("a.qk_proj", "linear", shards=shards),))
    made = plan(directory, platform="cpu", registry=registry, inventory=inventory)
    layer = load_layers(made, directory, registry=registry).modules["a.qk_proj"]
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    values = torch.cat([tensors[f"{n}.codes"].float() * tensors[f"{n}.scale"] for n in shards])
    bias = torch.cat([tensors[f"{n}.bias"] for n in shards]).float()
    assert torch.equal(layer(x), torch.nn.functional.linear(x.float(), values, bias).bfloat16())
    saved = layer.encode()
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())


def test_the_printout_names_scheme_and_kernels(ready: QuantizedLinear) -> None:
    assert str(ready) == "QuantizedLinear(toy limit 127, in=32, out=32, kernel=toy.fast, toy.many)"
