"""A layer with a kernel for few rows and one for many: eager, compiled, differentiated, copied."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from toy_checkpoints import toy_checkpoint

from quantplug import dispatch
from quantplug.errors import RunError
from quantplug.hooks import hookimpl
from quantplug.kernel import LinearKernel, Traits
from quantplug.load import load_layers
from quantplug.planner import plan
from quantplug.plugins import build_registry
from quantplug.policy import Policy
from quantplug.reference import ReferenceKernel
from quantplug_testkit import toys

PATH = "model.layers.0.self_attn.q_proj"


class Few(toys.ToyKernel):
    """Adds 1, so that one sees who ran."""

    name = "toy.fast"

    def apply(self, x, prepared, bias):
        return super().apply(x, prepared, bias) + 1


class Many(toys.ToyManyRows):
    name = "toy.many"

    def dequantize(self, prepared, dtype):
        torch._dynamo.graph_break()  # what no compiled model gets to see
        return super().dequantize(prepared, dtype)


@hookimpl
def quantplug_kernels():
    return [Few(), Many()]


@pytest.fixture
def layer(tmp_path):
    plugin = {name: getattr(toys, name) for name in ("quantplug_api", "quantplug_schemes", "quantplug_dialects")} | {
        "quantplug_kernels": quantplug_kernels
    }
    registry = build_registry({"toys": SimpleNamespace(**plugin)})
    directory = toy_checkpoint(tmp_path)

    def make(policy=None, path=PATH):
        made = plan(directory, platform="cpu", registry=registry, policy=policy)
        return load_layers(made, directory, registry=registry).modules[path]

    return make


def counted(module):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(module, backend=backend, fullgraph=True, dynamic=True), graphs


def inputs(rows):
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows)).bfloat16()


def test_one_graph_serves_rows_on_both_sides_of_the_boundary(layer):
    module = layer()
    assert [(most, kernel.name) for most, kernel in module._choices] == [(15, "toy.fast"), (None, "toy.many")]
    compiled, graphs = counted(module)
    for rows in (2, 15, 16, 300, 3):
        assert torch.equal(compiled(inputs(rows)), module(inputs(rows))), rows
    assert len(graphs) == 1
    assert [node.target for node in graphs[0].graph.nodes if node.op == "call_function"].count(dispatch.run) == 1


@pytest.mark.parametrize("policy", [None, Policy.parse({"rule": [{"pin": "toy.fast"}]}, "test")])
def test_rows_that_are_as_many_as_a_weight_has_are_not_taken_for_its(layer, policy):
    """A graph that was made for as many rows as a prepared tensor has serves any number of them."""
    module = layer(policy, "model.layers.0.mlp.up_proj")
    assert {size for buffer in module.buffers() for size in buffer.shape} >= {48}
    compiled, graphs = counted(module)
    for rows in (48, 5, 40):
        assert torch.equal(compiled(inputs(rows)), module(inputs(rows))), rows
    assert len(graphs) == 1


def test_a_graph_for_one_number_of_rows_calls_its_kernel_and_no_operator_of_ours(layer):
    module = layer()
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append({node.target for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(inputs(1)), module(inputs(1)))
    assert len(seen) == 1
    assert dispatch.run not in seen[0]


def test_a_dense_product_is_one_operator_whatever_dequantize_does(layer):
    module = layer(Policy.parse({"rule": [{"pin": "toy.many.dense"}]}, "test"))
    compiled, graphs = counted(module)
    for rows in (1, 5):
        assert torch.equal(compiled(inputs(rows)), module(inputs(rows)))
    assert torch.equal(module(inputs(3)), torch.nn.functional.linear(
        inputs(3), module.dequantize(torch.bfloat16), module._part_biases[0]
    ))  # fmt: skip
    assert graphs


@pytest.mark.parametrize("rows", [2, 40])
def test_gradients_pass_through_the_operator(layer, rows):
    module = layer()
    compiled, _ = counted(module)
    eager, traced = (inputs(rows).requires_grad_() for _ in range(2))
    module(eager).square().sum().backward()
    compiled(traced).square().sum().backward()
    assert eager.grad is not None
    # One rounds the gradient of x once from float32, the other multiplies in bfloat16: 32 products of 8 bits each.
    assert torch.allclose(traced.grad, eager.grad, rtol=0, atol=float(eager.grad.abs().max()) * 2**-5)


def test_what_passes_no_gradients_on_is_not_asked_for_them(layer, monkeypatch):
    """Autograd looks into neither kernel; x is given the gradient times W all the same, and only where it asks."""
    for kernel in (Few, Many):
        monkeypatch.setattr(kernel, "traits", Traits(uniform_segments=True))
        apply = kernel.apply
        monkeypatch.setattr(kernel, "apply", lambda self, x, *rest, apply=apply: apply(self, x.detach(), *rest))
    module = layer()
    values = module.dequantize(torch.bfloat16)
    for rows in (3, 40):
        x = inputs(rows).requires_grad_()
        y = module(x)
        assert torch.equal(y, module(inputs(rows)))
        wanted = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        y.backward(wanted)
        assert torch.equal(x.grad, wanted @ values)
        with torch.no_grad():
            assert not module(x).requires_grad


@pytest.mark.parametrize("lacking", [(Few,), (Few, Many)])
def test_a_gradient_comes_from_whoever_dequantizes_or_is_refused(layer, monkeypatch, lacking):
    for kernel in (Few, Many):
        monkeypatch.setattr(kernel, "traits", Traits(uniform_segments=True))
        monkeypatch.setattr(kernel, "apply", lambda self, *given: ReferenceKernel().apply(*given))
    for kernel in lacking:
        monkeypatch.setattr(kernel, "dequantize", LinearKernel.dequantize)
    module, x = layer(), inputs(3).requires_grad_()
    if Many not in lacking:
        module(x).sum().backward()
        assert x.grad.any()
        return
    with pytest.raises(RunError, match=r"toy\.fast and toy\.many gives none") as raised:
        module(x)
    assert raised.value.code == "QP-RUN-GRAD"
    with torch.no_grad():
        assert torch.equal(module(x), module(inputs(3)))


def dual(function, x):
    """Return the tangent of y that a tangent of ones on x makes, None where it is lost."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def jvp(function, x):
    return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


@pytest.mark.parametrize("differentiate", [dual, jvp])
@pytest.mark.parametrize("rows", [3, 40])
def test_a_tangent_goes_through_differentiable_kernels_and_is_refused_by_others(
    layer, monkeypatch, differentiate, rows
):
    module, x = layer(), inputs(rows)
    values = module.dequantize()
    # A weight is rounded to bfloat16, and so is the sum.
    off = (differentiate(module, x) - values.sum(1)).abs()
    assert bool((off <= values.abs().sum(1) * 2**-8).all())
    for kernel in (Few, Many):
        monkeypatch.setattr(kernel, "traits", Traits(uniform_segments=True))
    module = layer()
    with pytest.raises(RunError, match=r"x carries a tangent, and toy\.fast and toy\.many gives none") as raised:
        differentiate(module, x)
    assert raised.value.code == "QP-RUN-GRAD"
    # Of another's tangent, or once it is gone, nothing is said.
    assert dual(lambda ones: ones * module(x).sum(), torch.ones(1, dtype=torch.bfloat16)) == module(x).sum()


def test_a_compiled_layer_loses_no_tangent(layer):
    """What is one operator to the compiler is none to a transformation inside: it is left out of the graph."""
    module, x = layer(), inputs(3)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: jvp(module, x), backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x), jvp(module, x))


def test_a_deep_copy_runs_compiled_on_its_own_memory(layer):
    module = layer()
    twin = copy.deepcopy(module)
    expected = module(inputs(20))
    for buffer in module.buffers():
        buffer.zero_()
    compiled, _ = counted(twin)
    assert torch.equal(compiled(inputs(20)), expected)


def test_the_operator_obeys_torchs_rules(layer):
    module = layer()
    [(bias, tensors, call)] = module._calls
    for rows in (0, 3, 20):
        torch.library.opcheck(dispatch.run, (inputs(rows).requires_grad_(), bias, tensors, call))


def test_equal_calls_share_a_number(layer):
    module = layer()
    other = layer()
    assert other._calls[0][2] == module._calls[0][2]
