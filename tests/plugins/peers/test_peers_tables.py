"""
The rules of other engines against what those engines answered.

`data/peer-answers.tsv` has the cases of `tests/core/data/skip-cases.tsv` that exist in the two releases, with the
answers of their own functions (executed where that was possible without a GPU, else read); the second table is that of
the engines' matchers, executed, one pattern and one module a row.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from quantplug_peers import matching
from quantplug_peers.sglang import SGLangReader
from quantplug_peers.transformers import TransformersReader
from quantplug_peers.vllm import VLLMReader, in_exact_mode, in_substring_mode

with (Path(__file__).parent / "data" / "peer-answers.tsv").open(encoding="utf-8", newline="") as file:
    CASES = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))

GROUPS = {"group_0": {"targets": ["Linear"]}}
SECTIONS = {
    "fp8": ("fp8", "modules_to_not_convert"),
    "compressed-tensors": ("compressed-tensors", "ignore"),
    "CT": ("compressed-tensors", "ignore"),
    "modelopt": ("modelopt", "exclude_modules"),
    "awq": ("awq", "modules_to_not_convert"),
    "bnb": ("bitsandbytes", "llm_int8_skip_modules"),
    "quark": ("quark", "exclude"),
    "gptq dynamic": ("gptq", "dynamic"),
    "gptq modules": ("gptq", "modules_in_block_to_quantize"),
}
"""Beginning of the name of a list -> method and key; the longest that fits."""


def section(case):
    key = max((start for start in SECTIONS if case["list"].startswith(start)), key=len)
    method, name = SECTIONS[key]
    return method, {"quant_algo": "FP8", "config_groups": GROUPS, name: json.loads(case["entries"])}


def expected(cell):
    """The answer that a cell of the table stands for; `...` when it has none."""
    text = cell.replace("*", "").partition("(")[0].strip()
    if text.startswith("raise"):
        return "error"
    if text.startswith(("override", "quantize", "128", "no rule")):
        return "quantized"
    return "dense" if text == "skip" else ...


def in_mode(mode, entries, path):
    rules = {"exact": in_exact_mode, "substring": in_substring_mode}.get(mode)
    if rules is not None:
        return rules(entries)(path, "")
    return matching.skipped(matching.with_shards(matching.suffixes(entries), path))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_sglang(case):
    method, fields = section(case)
    found = re.fullmatch(r"Linear (.+) / MoE (.+)", case["sglang"])
    cells = {"Linear": found[1], "FusedMoE": found[2]} if found else {"": case["sglang"]}
    for class_name, cell in cells.items():
        if expected(cell) is not ...:
            assert SGLangReader().decides(method, fields, case["path"], class_name) == expected(cell)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_vllm(case):
    method, fields = section(case)
    want = expected(case["vllm"])
    entries = json.loads(case["entries"])
    for mode, word in re.findall(r"(substring|suffix): (skip|quantize)", case["vllm"]):
        assert in_mode(mode, entries, case["path"]) == {"skip": "dense", "quantize": "quantized"}[word]
    if want is ...:
        return
    if "substr mode" in case["list"]:
        assert in_mode("substring", entries, case["path"]) == want
        return
    answer = VLLMReader().decides(method, fields, case["path"])
    if method == "gptq" and "dynamic" in fields and not case["vllm"].startswith(("skip", "override")):
        assert answer is None, "no rule says anything, and what is stored decides"
    else:
        assert answer == want


def test_the_cases_are_those_of_the_matchers_table_that_the_releases_have():
    assert len(CASES) == 107
    assert len({case["id"] for case in CASES}) == 107


MATCHERS = """
model.layers.34.        model.layers.34.mlp.experts.0.down_proj  skip  -     skip  -     skip  -
model.layers.34.        model.layers.340.mlp.down_proj           skip  -     -     -     -     -
mlp.gate                model.layers.0.mlp.gate                  skip  -     skip  skip  skip  -
mlp.gate                model.layers.0.mlp.gate_up_proj          -     -     skip  -     -     -
gate                    model.layers.0.mlp.shared_gate           skip  -     skip  -     -     -
lm_head                 lm_head                                  skip  skip  skip  skip  skip  skip
lm_head                 language_model.lm_head                   skip  -     skip  skip  skip  -
re:.*lm_head            lm_head                                  -     -     -     -     -     skip
*.mlp.*                 model.layers.0.mlp.down_proj             error -     -     -     -     -
model.layers.1          model.layers.1.self_attn.o_proj          skip  -     skip  -     skip  -
model.layers.1          model.layers.11.self_attn.o_proj         -     -     skip  -     -     -
layers.1                model.layers.1.self_attn.o_proj          -     -     skip  -     skip  -
linear_attn.in_proj     model.layers.0.linear_attn.in_proj       skip  -     skip  skip  skip  -
self_attn.qkv_proj      model.layers.0.self_attn.qkv_proj        skip  -     skip  skip  -     -
model.visual            visual.blocks.0.attn.proj                -     -     -     -     -     -
re:visual.*             model.visual.blocks.0.attn.proj          -     -     -     -     -     -
self_attn.q_proj.linear model.layers.0.self_attn.q_proj          -     -     -     -     -     -
"""
"""Pattern, module; then Transformers 5.23, vLLM exact, substring, suffix, SGLang 0.5.23, compressed-tensors 0.20."""


@pytest.mark.parametrize("row", MATCHERS.strip().splitlines(), ids=lambda row: "_".join(row.split()[:2]))
def test_every_matcher_on_every_row(row):
    pattern, path, *cells = row.split()
    words = {"skip": "dense", "-": "quantized", "error": "error"}
    want = [words[cell] for cell in cells]
    lists = {"modules_to_not_convert": [pattern]}
    answers = [
        TransformersReader().decides("fp8", lists, path),
        in_mode("exact", [pattern], path),
        in_mode("substring", [pattern], path),
        in_mode("suffix", [pattern], path),
        # The matcher itself: for fp8, SGLang first adds every entry with and without the root of the model.
        SGLangReader().decides("blockwise_int8", lists, path),
        TransformersReader().decides("compressed-tensors", {"ignore": [pattern], "config_groups": GROUPS}, path),
    ]
    assert answers == want
