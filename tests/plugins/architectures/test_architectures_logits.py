"""
Whole models: quantized ones give the logits of dense ones that hold the same values.

Every projection, dense layers' and experts', is rounded on a coarse grid, so that a wrong one shows. Both models run in
float32, by the same operators in another order where experts are added up; what float32 makes of that is measured, as
the distance of the dense model from itself in float64.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_families import DENSE_FAMILIES, FAMILIES, REFERENCE, WORDS

from quantplug.convert import convert
from quantplug.load import load_layers
from quantplug.planner import plan
from quantplug_transformers import from_pretrained

ROOM = 10
IDS = torch.randint(3, WORDS, (1, 24), generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Run tiny products on one thread: waking a second one takes longer than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def dense_twin(tiny, directory):
    """Return the model of the family with every value that a converted checkpoint holds, in float64."""
    loaded = load_layers(plan(directory, dtype="float32", policy=REFERENCE), directory)
    model = type(tiny.model)(tiny.model.config).to(torch.float64).eval()
    model.set_experts_implementation("eager")  # the others have no float64
    model.load_state_dict({name: t.to(torch.float64) for name, t in tiny.model.state_dict().items()})
    renames = {name.replace("block_sparse_moe", "mlp"): name for name in (*loaded.modules, *loaded.experts)}
    parts = dict(model.named_modules())
    with torch.no_grad():
        for path, stored in renames.items():
            if stored in loaded.modules:
                parts[path].weight.copy_(loaded.modules[stored].dequantize(torch.float32))
                continue
            for number in range(loaded.experts[stored].problem.experts):
                both, down = loaded.experts[stored].dequantize(number)
                if tiny.family == "gpt_oss":
                    both = torch.stack(both.chunk(2), 1).flatten(0, 1)
                turned = tiny.family in ("gpt_oss", "llama4")
                parts[path].gate_up_proj[number] = both.T if turned else both
                parts[path].down_proj[number] = down.T if turned else down
    return model


@pytest.mark.parametrize("family", [family for family in (*FAMILIES, *DENSE_FAMILIES) if family != "llama4"])
def test_a_quantized_model_gives_the_logits_of_a_dense_one_with_its_values(family, models, tmp_path):
    """
    Routers, shared experts, biases, the function between the products, and who is added up with what weight.

    Not Llama 4's, whose block calls its experts otherwise: the adapter refuses those.
    """
    tiny, source = models(family)
    directory = tmp_path / "converted"
    convert(source, directory, scheme="mxfp4", params={})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference kernel announces itself
        model = from_pretrained(directory, dtype="float32", policy=REFERENCE).eval()
    assert sum(layer.kind == "experts" and layer.quantized for layer in model.quantplug_plan.layers) == len(
        tiny.experts
    )
    twin = dense_twin(tiny, directory)
    with torch.inference_mode():
        found = model(IDS).logits
        exact = twin(IDS).logits
        dense = twin.to(torch.float32)(IDS).logits
        original = tiny.model.to(torch.float32)(IDS).logits
    tiny.model.to(torch.bfloat16)
    rounding = float((dense - exact).abs().max())
    assert float((found - exact).abs().max()) <= ROOM * rounding
    assert float((original - exact).abs().max()) > 100 * ROOM * rounding
