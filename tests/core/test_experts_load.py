"""Experts from files to results: planned, loaded one after the other, run, written back, filled by another's loader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.autograd import forward_ad
from toy_checkpoints import toy_registry
from toy_experts import HIDDEN, container, dense_moe, expected, toy_moe, write_moe

from quantplug.convert import Calibration, convert
from quantplug.entries import path_entries
from quantplug.errors import CheckpointError, ConfigError, LoadError, QuantplugError, RunError
from quantplug.hooks import hookimpl
from quantplug.host import Host
from quantplug.kernel import Traits
from quantplug.ledger import Ledger
from quantplug.load import load_layers
from quantplug.moemodules import QuantizedExperts
from quantplug.plan import Plan
from quantplug.planner import plan
from quantplug.policy import Policy
from quantplug.schemes import SchemeCache
from quantplug.writeback import stored_tensors
from quantplug_testkit.plain_experts import PlainExperts

REGISTRY = toy_registry()


def made(directory: Path, **arguments: object) -> Plan:
    return plan(directory, platform="cpu", registry=REGISTRY, **arguments)


def loaded(directory: Path, **arguments: object) -> dict[str, QuantizedExperts]:
    return dict(load_layers(made(directory), directory, registry=REGISTRY, **arguments).experts)


def routed(rows: int = 5, experts: int = 4, top_k: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, HIDDEN, generator=generator)
    scores = torch.rand(rows, experts, generator=generator)
    weights, ids = scores.topk(top_k)
    return x, weights, ids


def close(actual: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether float32 results of two products of at most 32 terms each are as near as rounding lets them be."""
    return bool(((actual.double() - wanted).abs() <= 128 * 2.0**-24 * (wanted.abs() + 100)).all())


@pytest.mark.parametrize("bias", [False, True])
def test_experts_compute_what_the_stored_tensors_say(tmp_path: Path, bias: bool) -> None:
    tensors = toy_moe(bias=bias)
    directory = write_moe(tmp_path, tensors)
    planned = made(directory)
    layer = planned.layer(container(1))
    assert (layer.kind, len(layer.segments), layer.rule) == ("experts", 12, "default of toy")
    assert planned.decision_of(layer).kernel == "loop.toy.fast"
    assert planned.layer(f"{container(1)}.2.up_proj") is layer
    assert Plan.from_json(planned.to_json()) == planned
    result = load_layers(planned, directory, registry=REGISTRY)
    assert result.report.kernels == {"loop.toy.fast": 2}
    experts = result.experts[container(1)]
    x, weights, ids = routed()
    ids[2, 1] = -1
    ids[3, 0] = 4
    assert close(experts(x, weights, ids), expected(tensors, 1, x, weights, ids))
    assert experts(x[:0], weights[:0], ids[:0]).shape == (0, HIDDEN)
    assert experts(x[None], weights[None], ids[None]).shape == (1, 5, HIDDEN)


def test_a_saved_layer_has_the_bytes_it_was_loaded_from_and_without_them_what_the_kernel_holds(tmp_path: Path) -> None:
    tensors = toy_moe()
    directory = write_moe(tmp_path, tensors)
    experts = loaded(directory)
    wanted = {name: tensor for name, tensor in tensors.items() if "experts" in name}
    for _ in range(2):
        written = dict(stored_tensors(experts))
        assert written.keys() == wanted.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in wanted.items())
        (directory / "model.safetensors").unlink(missing_ok=True)
    biased = write_moe(tmp_path / "biased", toy_moe(bias=True))
    experts = loaded(biased)
    (biased / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="QP-LOAD-SOURCE"):
        list(stored_tensors(experts))


FAULTS = {
    "dropped": (lambda t, n: t.pop(n), "QP-ST-MISSING"),
    "renamed": (lambda t, n: t.update({n.replace("gate_proj", "gate_porj"): t.pop(n)}), "QP-ST-MISSING"),
    "there twice": (lambda t, n: t.update({n.replace("experts.7.", "experts.77777."): t[n]}), "QP-ST-EXTRA"),
    "in another type": (lambda t, n: t.update({n: t[n].to(torch.int32)}), "QP-ST-DTYPE"),
    "cut short": (lambda t, n: t.update({n: t[n][:-1].contiguous()}), "QP-ST-SHAPE"),
    "whole": (lambda t, n: t.update({n.replace("codes", "weight"): t.pop(n).bfloat16()}), "QP-SKIP-AMBIGUOUS"),
}  # fmt: skip


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return a checkpoint of 13,000 expert tensors, and its tensors; the shapes are small, the names are not."""
    one = {name: tensor for name, tensor in toy_moe(1, 1).items() if "experts.0." in name}
    tensors = {name: tensor for name, tensor in toy_moe(1, 1).items() if "experts" not in name}
    for layer in range(34):
        for expert in range(64):
            for name, tensor in one.items():
                tensors[name.replace("layers.0", f"layers.{layer}").replace("experts.0", f"experts.{expert}")] = tensor
    return tmp_path_factory.mktemp("many"), tensors


@pytest.mark.parametrize("name", FAULTS)
def test_one_bad_tensor_of_13000_is_never_loaded(many: tuple[Path, dict[str, torch.Tensor]], name: str) -> None:
    directory, tensors = many
    fault, code = FAULTS[name]
    tensors = dict(tensors)
    assert sum("experts" in each for each in tensors) > 13_000
    bad = f"{container(20)}.7.gate_proj.codes"
    fault(tensors, bad)
    copies = {each: tensor.clone() for each, tensor in tensors.items()}  # safetensors stores nothing twice
    with pytest.raises(QuantplugError) as raised:
        made(write_moe(directory, copies, experts=64))
    assert raised.value.code == code
    assert f"{container(20)}.7" in str(raised.value) or "77777" in str(raised.value)


def test_a_tensor_that_lies_in_two_files_is_an_error(tmp_path: Path) -> None:
    tensors = toy_moe()
    directory = write_moe(tmp_path, tensors)
    twice = f"{container(1)}.3.up_proj.codes"
    halves = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": {twice: tensors[twice]}}
    for file, part in halves.items():
        save_file(part, directory / file)
    (directory / "model.safetensors").unlink()
    index = {name: file for file, part in halves.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    with pytest.raises(CheckpointError, match=rf"{twice}.*lies in"):
        made(directory)


def test_a_number_of_experts_that_nobody_states_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not say how many experts.*num_experts"):
        made(write_moe(tmp_path, toy_moe(), experts=None))
    with pytest.raises(ConfigError, match=r"num_experts: is the integer 0"):
        made(write_moe(tmp_path, toy_moe(), experts=0))
    with pytest.raises(ConfigError, match=r"hidden_act: is the string 'swoosh'"):
        made(write_moe(tmp_path, toy_moe(), hidden_act="swoosh"))
    with pytest.raises(CheckpointError, match="QP-ST-EXTRA"):
        made(write_moe(tmp_path, toy_moe(), experts=3))
    with pytest.raises(CheckpointError, match=r"experts\.4\.down_proj.*QP-ST-MISSING"):
        made(write_moe(tmp_path, toy_moe(), experts=5))


def test_a_list_that_names_some_experts_is_an_error_that_names_them(tmp_path: Path) -> None:
    tensors = toy_moe()
    dense = dense_moe()
    for name in ("gate_proj", "up_proj", "down_proj"):
        path = f"{container(1)}.2.{name}"
        del tensors[f"{path}.codes"], tensors[f"{path}.scale"]
        tensors[f"{path}.weight"] = dense[f"{path}.weight"]
    keep = ["re:.*mlp\\.gate$", f"{container(1)}.2"]
    directory = write_moe(tmp_path, tensors, quantization_config={"quant_method": "toy", "keep": keep})
    with pytest.raises(ConfigError, match=r"3 of its 12 projections stay whole .*experts\.2\.down_proj") as raised:
        made(directory)
    assert raised.value.code == "QP-SKIP-SHARDS"
    whole = write_moe(tmp_path / "whole", dense, quantization_config={"quant_method": "toy", "keep": ["model.layers"]})
    layer = made(whole).layer(container(0))
    assert (layer.kind, layer.quantized, len(layer.tensors)) == ("experts", False, 12)


def test_dense_experts_are_quantized_on_load_and_by_convert_alike(tmp_path: Path) -> None:
    directory = write_moe(tmp_path / "dense", dense_moe(bias=True), quantized=False)
    assert made(directory).layer(container(0)).rule == "the checkpoint is dense"
    planned = made(directory, quantize="toy")
    assert not planned.layer("model.layers.0.mlp.gate").quantized
    on_load = load_layers(planned, directory, registry=REGISTRY).experts
    written = dict(stored_tensors(on_load))
    report = convert(directory, tmp_path / "out", scheme="toy", params={}, registry=REGISTRY)
    assert report.dense == ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert written == {name: tensor for name, tensor in written.items() if torch.equal(tensor, stored[name])}
    assert sum("experts" in name for name in stored) == len(written)
    converted = loaded(tmp_path / "out")
    x, weights, ids = routed()
    assert torch.equal(on_load[container(1)](x, weights, ids), converted[container(1)](x, weights, ids))
    skip = path_entries([f"{container(1)}.2"], "skip")
    with pytest.raises(ConfigError, match=r"3 of its 12 projections are to be skipped"):
        convert(directory, tmp_path / "some", scheme="toy", params={}, skip=skip, registry=REGISTRY)
    assert not (tmp_path / "some").exists()


class Reader(Host):
    """A framework that follows a text through no layer of experts."""

    name = "reader"

    def load(self, *arguments: object, **keywords: object):
        raise NotImplementedError

    def calibrate(self, source: Path, text: str, *, tokens: int, window: int):
        return iter(())


def test_a_conversion_says_how_many_layers_no_text_reached(tmp_path: Path) -> None:
    registry = toy_registry(reader=SimpleNamespace(quantplug_hosts=hookimpl(lambda: [Reader()])))
    directory = write_moe(tmp_path / "dense", dense_moe(), quantized=False)
    out = {"scheme": "toy", "params": {}, "registry": registry}
    assert convert(directory, tmp_path / "plain", **out).rounded == 0
    assert convert(directory, tmp_path / "text", calibration=Calibration("words"), **out).rounded == 24


def test_a_framework_fills_stacked_parameters_and_nothing_may_be_left_out(tmp_path: Path) -> None:
    tensors = toy_moe(bias=True)
    directory = write_moe(tmp_path, tensors)
    planned = made(directory)
    module = QuantizedExperts(planned.layer(container(0)), planned, REGISTRY, SchemeCache(REGISTRY))
    with pytest.raises(RunError, match="QP-RUN-STATE"):
        module.process_weights_after_loading()
    with pytest.raises(RunError, match="QP-RUN-STATE"):
        module(*routed())
    for _ in range(2):
        module.create_weights(Ledger())
        assert module.get_parameter("gate_proj_codes").shape == (4, 16, HIDDEN)
        names = [name for name in tensors if name.startswith(container(0))]
        for number, name in enumerate(names):
            if number == len(names) - 1:
                with pytest.raises(LoadError, match="QP-LOAD-UNFILLED"):
                    module.process_weights_after_loading()
            expert, projection, suffix = name.removeprefix(f"{container(0)}.").split(".")
            parameter = module.get_parameter(f"{projection}_{suffix}")
            parameter.weight_loader(parameter, tensors[name], int(expert))
        with pytest.raises(LoadError, match="QP-LOAD-OVERLAP"):
            parameter.weight_loader(parameter, tensors[name], int(expert))
        places = {name: buffer.data_ptr() for name, buffer in module.named_buffers()}
        module.process_weights_after_loading()
        assert not list(module.parameters())
        assert places in ({}, {name: buffer.data_ptr() for name, buffer in module.named_buffers()})
        x, weights, ids = routed()
        assert close(module(x, weights, ids), expected(tensors, 0, x, weights, ids))


def test_an_expert_that_is_wrong_leaves_a_loaded_layer_as_it_was(tmp_path: Path) -> None:
    tensors = toy_moe()
    directory = write_moe(tmp_path, tensors)
    planned = made(directory)
    experts = load_layers(planned, directory, registry=REGISTRY).experts
    x, weights, ids = routed()
    before = experts[container(0)](x, weights, ids)
    tensors[f"{container(0)}.3.down_proj.scale"][2] = float("nan")
    write_moe(directory, tensors)
    with pytest.raises(CheckpointError, match=r"experts\.3\.down_proj\.scale"):
        load_layers(planned, directory, modules=experts, registry=REGISTRY)
    assert torch.equal(experts[container(0)](x, weights, ids), before)


def test_what_does_not_fit_is_refused_before_it_runs(tmp_path: Path) -> None:
    experts = loaded(write_moe(tmp_path, toy_moe()))[container(0)]
    x, weights, ids = routed()
    for arguments, code in (
        ((x[:, :-1], weights, ids), "QP-RUN-SHAPE"),
        ((x, weights[:, :1], ids), "QP-RUN-SHAPE"),
        ((x, weights, ids[:-1]), "QP-RUN-SHAPE"),
        ((x.double(), weights, ids), "QP-RUN-DTYPE"),
        ((x, weights, ids.float()), "QP-RUN-DTYPE"),
        ((x.to("meta"), weights, ids), "QP-RUN-DEVICE"),
        ((x, weights, ids, torch.arange(4)[None]), "QP-RUN-SHAPE"),
        ((x, weights, ids, torch.arange(4.0)), "QP-RUN-DTYPE"),
        ((x, weights, ids, torch.arange(4, device="meta")), "QP-RUN-DEVICE"),
    ):
        with pytest.raises(RunError) as raised:
            experts(*arguments)
        assert raised.value.code == code
    assert torch.equal(experts(x, weights, ids, torch.arange(4)), experts(x, weights, ids))
    with pytest.raises(RunError, match="QP-RUN-MOVE"):
        experts.half()
    assert experts.parameter_count == 4 * 3 * 16 * HIDDEN
    assert "4 experts [16, 32] top 2" in repr(experts)


class Opaque(PlainExperts):
    """Computes where autograd does not look."""

    name = layout_id = "opaque"
    traits = Traits()


def test_a_gradient_that_the_kernel_does_not_give_is_refused(tmp_path: Path) -> None:
    registry = toy_registry(opaque=SimpleNamespace(quantplug_kernels=hookimpl(lambda: [Opaque()])))
    policy = Policy.parse({"rule": [{"pin": "opaque"}]}, "test")
    directory = write_moe(tmp_path, toy_moe())
    planned = plan(directory, platform="cpu", registry=registry, policy=policy)
    experts = load_layers(planned, directory, registry=registry).experts[container(0)]
    x, weights, ids = routed()
    y = experts(x, weights, ids)
    for wanting in ((x.clone().requires_grad_(), weights, ids), (x, weights.clone().requires_grad_(), ids)):
        with pytest.raises(RunError, match="opaque gives none") as raised:
            experts(*wanting)
        assert raised.value.code == "QP-RUN-GRAD"
        with torch.no_grad():
            assert torch.equal(experts(*wanting), y)
    for number in (0, 1):
        given = [x, weights, ids]
        with forward_ad.dual_level():
            given[number] = forward_ad.make_dual(given[number], torch.ones_like(given[number]))
            with pytest.raises(RunError, match="carry a tangent, and opaque gives none") as raised:
                experts(*given)
            assert raised.value.code == "QP-RUN-GRAD"
            assert torch.equal(experts(x, weights, ids), y)


_MEASURED = """
import sys
from toy_checkpoints import toy_registry
from quantplug.load import load_layers
from quantplug.planner import plan

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

registry = toy_registry()
planned = plan(sys.argv[1], platform="cpu", registry=registry)
before = peak()
loaded = load_layers(planned, sys.argv[1], registry=registry)
print(peak() - before, loaded.report.prepared_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of a process from /proc")
def test_loading_takes_what_is_kept_and_one_expert_and_300_mb(tmp_path: Path) -> None:
    """Forty experts of 25 MB in one layer."""
    inner, hidden, experts = 4096, 2048, 40
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    tensors = {name: tensor for name, tensor in toy_moe(1, experts).items() if "experts" not in name}
    for expert in range(experts):
        for name, shape in shapes.items():
            path = f"{container(0)}.{expert}.{name}"
            tensors[f"{path}.codes"] = torch.ones(shape, dtype=torch.int8)
            tensors[f"{path}.scale"] = torch.ones(shape[0], 1)
    directory = write_moe(tmp_path, tensors, experts=experts)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(directory)], capture_output=True, text=True, check=True, env=environment
    )
    grown, kept = map(int, done.stdout.split())
    one = sum(n * k for n, k in shapes.values())
    assert kept > experts * one
    assert grown < kept + 2 * one + 300_000_000  # an expert as stored, and in canonical form
