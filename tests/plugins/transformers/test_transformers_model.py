"""What an ordinary `PreTrainedModel` can do, a loaded one can do; what it cannot is refused before it has changed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import config_of, dequantized, quantize, write_dense
from transformers import Trainer, TrainingArguments

from quantplug.errors import RunError
from quantplug.modules import QuantizedLinear
from quantplug_transformers import from_pretrained


@pytest.fixture(scope="module")
def model(checkpoint, registry):
    return from_pretrained(checkpoint, registry=registry)


def test_generate_gives_the_tokens_of_the_dense_model(checkpoint, registry, ids, tmp_path) -> None:
    model = from_pretrained(checkpoint, dtype="float32", registry=registry)
    dense = dequantized(checkpoint, tmp_path / "dense")
    wanted = dense.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), wanted)
    static = model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation="static")
    assert torch.equal(static, wanted)


def test_generate_takes_its_defaults_from_the_checkpoint(model, ids) -> None:
    assert 1 <= model.generate(ids).shape[1] - ids.shape[1] <= 7


@pytest.fixture
def short(registry, tmp_path):
    """A model of one layer, which compiles faster."""
    dense = write_dense(tmp_path / "dense", config_of("llama", num_hidden_layers=1))
    torch.compiler.reset()
    yield from_pretrained(quantize(dense, tmp_path / "source"), registry=registry)
    torch.compiler.reset()


def test_forward_compiles_in_one_graph(short, ids) -> None:
    compiled = torch.compile(short.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(ids).logits, short(ids).logits)


def test_decoding_with_a_static_cache_compiles_once(short, ids) -> None:
    wanted = short.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    short.forward = torch.compile(short.forward, backend=counter, fullgraph=True)
    found = short.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(found, wanted)
    # The prompt and a single token are two shapes.
    assert counter.frame_count == 2


def test_staying_is_moving_too(model, ids) -> None:
    expected = model(ids).logits
    assert model.to("cpu") is model
    assert model.cpu() is model
    assert model.eval() is model
    assert torch.equal(model(ids).logits, expected)
    copied = copy.deepcopy(model)
    assert copied.to(torch.bfloat16) is copied
    assert copied.bfloat16()(ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("meta"),
        lambda m: m.to("meta", torch.float32),
        lambda m: m.to_empty(device="meta"),
    ],
)
def test_a_move_that_a_prepared_layer_cannot_follow_is_refused_and_nothing_has_moved(model, ids, move) -> None:
    expected = model(ids).logits
    with pytest.raises(RunError, match=r"model\.layers\.0\.self_attn\.q_proj: asked to become") as caught:
        move(model)
    assert caught.value.code == "QP-RUN-MOVE"
    assert "Load the checkpoint again" in caught.value.fix
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "cpu")}
    assert torch.equal(model(ids).logits, expected)


def test_a_copy_is_equal_and_shares_nothing(model, ids) -> None:
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, model(ids).logits)
    assert copied.quantplug_plan == model.quantplug_plan
    ours, theirs = ({t.data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (model, copied))
    assert ours.isdisjoint(theirs)
    for module in copied.modules():
        if isinstance(module, QuantizedLinear):
            for buffer in module.buffers():
                buffer.zero_()
    assert not torch.equal(copied(ids).logits, model(ids).logits)
    with pytest.raises(RunError):
        copied.half()


def test_a_model_can_be_pickled(model, ids) -> None:
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_memory_footprint_counts_what_is_prepared(model) -> None:
    dense = sum(parameter.nbytes for parameter in model.parameters())
    rotary = sum(b.nbytes for n, b in model.named_buffers() if "rotary" in n)
    assert model.get_memory_footprint() == dense + rotary + model.quantplug_report.prepared_bytes


def test_parameters_are_counted_as_in_the_dense_model(model, checkpoint, tmp_path) -> None:
    dense = dequantized(checkpoint, tmp_path / "dense")
    assert model.num_parameters() == dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) == 0


def test_training_is_refused(model, ids, tmp_path) -> None:
    with pytest.raises(ValueError, match="quantized"):
        Trainer(model, TrainingArguments(str(tmp_path), report_to=[]))
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(ids, labels=ids).loss.backward()


def test_gradients_reach_inputs_through_the_reference_kernel(checkpoint, registry, ids, tmp_path) -> None:
    def gradient(model) -> torch.Tensor:
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=inputs).logits.sum().backward()
        return inputs.grad

    model = from_pretrained(checkpoint, dtype="float32", registry=registry)
    assert torch.equal(gradient(model), gradient(dequantized(checkpoint, tmp_path / "dense")))


def test_input_of_another_dtype_is_refused_by_name(model) -> None:
    with pytest.raises(RunError, match="q_proj") as caught:
        model(inputs_embeds=torch.zeros(1, 3, 64))
    assert caught.value.code == "QP-RUN-DTYPE"
