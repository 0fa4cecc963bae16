"""Who sees operators of torch, and who carries a tangent."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from quantplug import seen
from quantplug.seen import carries_tangent, is_seen


def test_this_torch_knows_who_sees_operators():
    """One that did not would take the long way every time."""
    questions = seen._dispatch_modes, seen._function_modes, seen._transformation, seen._tracer
    assert [ask() for ask in questions] == [0, 0, None, None]
    assert forward_ad._current_level == -1


def test_nobody_sees_a_plain_call():
    x = torch.ones(2)
    assert not is_seen(x, None)
    assert not is_seen(x, torch.ones(2))
    with torch.no_grad(), torch.inference_mode():
        assert not is_seen(x, None)


def test_tensors_are_seen_that_are_more_than_numbers():
    x = torch.ones(2)
    for special in (
        torch.ones(2, requires_grad=True),
        torch.nn.Parameter(torch.ones(2), requires_grad=False),
        torch.ones(2, device="meta"),
    ):
        assert is_seen(special, None)
    assert is_seen(x, torch.ones(2, requires_grad=True))
    assert is_seen(x, torch.nn.Parameter(torch.ones(2), requires_grad=False))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Dispatched, Functions])
def test_modes_see(mode):
    with mode():
        assert is_seen(torch.ones(2), None)
    assert not is_seen(torch.ones(2), None)


@pytest.mark.parametrize(
    "watch",
    [torch.func.vmap, torch.func.grad, torch.func.jacrev, torch.func.jacfwd, lambda function: make_fx(function)],
    ids=["vmap", "grad", "jacrev", "jacfwd", "make_fx"],
)
def test_transformations_see(watch):
    found, outside = [], torch.ones(2)

    def function(x):
        found.append(is_seen(outside, None))
        return x.sum()

    made = watch(function)
    made(torch.ones(2, 3))
    assert all(found)
    assert found


def test_the_compiler_and_the_tracer_see(monkeypatch):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + int(is_seen(x, None)), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(2)).tolist() == [1, 1]
    monkeypatch.setattr(seen, "_tracer", object)
    assert is_seen(torch.ones(2), None)


def test_a_tangent_is_carried_while_its_level_lasts():
    x = torch.ones(2)
    assert not carries_tangent(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones(2))
        assert carries_tangent(dual)
        assert carries_tangent(x, dual)
        assert not carries_tangent(x)
    assert not carries_tangent(dual)
    found = []
    torch.func.jvp(lambda x: found.append(carries_tangent(x)) or x, (x,), (x,))
    assert found == [True]
