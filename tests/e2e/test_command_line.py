"""The quantplug command as a person types it, on a tiny model: convert, plan, why, run, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

QUANTPLUG = Path(sysconfig.get_path("scripts")) / "quantplug"
TEXT = "The quick brown fox jumps over the lazy dog, and the dog looks up. " * 60


def quantplug(*arguments: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(QUANTPLUG), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120", "HF_HUB_OFFLINE": "1", **environment},
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level tokenizer, as transformers saves it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("models") / "dense"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": 0} | {c: n for n, c in enumerate(alphabet, 1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet) + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        dtype=torch.bfloat16,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def four_bit(dense: Path) -> Path:
    """The same in 4-bit GPTQ, calibrated, with an 8-bit head and one layer left whole."""
    target = dense.with_name("four-bit")
    text = dense.with_name("calibration.txt")
    text.write_text(TEXT)
    done = quantplug(
        "convert", dense, target, "--scheme", "gptq", "--bits", 4, "--group-size", 32, "--asym", "--head-bits", 8,
        "--skip", "model.layers.1.mlp.down_proj", "--calibrate", text, "--calibration-tokens", 1024,
    )  # fmt: skip
    assert "13 layers: gptq 4-bit group 32 asym" in done.stdout
    assert "1 layers: gptq 8-bit per channel sym" in done.stdout
    assert "1 linear layers left whole: model.layers.1.mlp.down_proj" in done.stdout
    return target


def test_plugins_lists_what_is_installed_and_from_where() -> None:
    done = quantplug("plugins")
    assert "quantplug-gptq 0.1.0" in done.stdout
    assert "schemes:      gptq" in done.stdout
    assert "kernels:      cpu.dense, cpu.float4, cpu.int4, cpu.int8, cpu.w8a8" in done.stdout
    assert "recipes:      fp8, fp8-block, fp8-tensor" in done.stdout
    listed = json.loads(quantplug("plugins", "--json").stdout)
    assert listed["failures"] == []
    assert listed["provides"]["quantplug-transformers"] == {"hosts": ["transformers"]}


def test_plan_shows_every_group_of_layers_with_rule_scheme_and_kernel(four_bit: Path) -> None:
    shown = quantplug("plan", four_bit).stdout
    assert "model.layers.0-1.mlp.{gate,up}_proj" in shown.replace("\n", "")
    assert "cpu.int4" in shown
    assert "not cpu.int8: uint4 has 4 bits" in shown
    assert "-:^model" in shown
    assert "14 layers quantized" in shown


def test_plan_for_hardware_that_is_not_here_says_why_its_kernels_are_slow(four_bit: Path) -> None:
    shown = quantplug("plan", four_bit, "--for", "npu:910b").stdout
    assert "on npu:910b" in shown
    assert "reference" in shown
    assert "warning" in shown
    assert "triton.wna16: runs on cuda, not on npu:910b" in shown.replace("\n", " ")


def test_plan_for_a_gpu_that_is_not_here_names_its_kernel(four_bit: Path) -> None:
    shown = quantplug("plan", four_bit, "--for", "cuda:9.0").stdout
    assert "marlin.wna16" in shown
    assert "triton.wna16" in shown
    assert re.search(r"not [\w., ]*cpu\.int4[\w., ]*: runs on cpu, not on cuda:9\.0", " ".join(shown.split()))


def test_a_dense_checkpoint_is_quantized_on_load_or_written_so_and_both_say_the_same(
    dense: Path, tmp_path: Path
) -> None:
    prompt = ("-p", "Hello", "--max-new-tokens", 6, "--json")
    loaded = json.loads(quantplug("run", dense, "--quantize", "int4-g32", *prompt).stdout)
    assert loaded["kernels"] == {"cpu.int4": 14}
    quantplug("convert", dense, tmp_path / "int4", "--quantize", "int4-g32")
    written = json.loads(quantplug("run", tmp_path / "int4", *prompt).stdout)
    assert (written["text"], written["kernels"]) == (loaded["text"], loaded["kernels"])
    shown = quantplug("plan", dense, "--quantize", "fp8", "--skip", "model.layers.1.mlp.down_proj").stdout
    assert "13 layers quantized" in shown
    assert "quantized on load, as the caller wishes" in shown.replace("\n", " ")
    for arguments in (("plan", dense, "--skip", "lm_head"), ("convert", dense, tmp_path / "none")):
        assert quantplug(*arguments, code=2).stderr
    assert "QP-PLUG-MISSING" in quantplug("run", dense, "--quantize", "int5", *prompt, code=8).stderr


def test_the_json_of_a_plan_is_a_plan(four_bit: Path) -> None:
    from quantplug.plan import Plan

    text = quantplug("plan", four_bit, "--json").stdout
    assert len(Plan.from_json(text).layers) == len(json.loads(text)["layers"])


def test_why_explains_one_layer(four_bit: Path) -> None:
    shown = quantplug("why", four_bit, "model.layers.0.mlp.up_proj").stdout
    for word in ("default of gptq", "uint4 group 32", "cpu.int4 for every M", "reference (quantplug-core): accepts"):
        assert word in shown
    kept = quantplug("why", four_bit, "model.layers.1.mlp.down_proj").stdout
    assert "none: it stays dense" in kept
    found = json.loads(quantplug("why", four_bit, "lm_head", "--json").stdout)
    assert found["decision"]["choices"][0]["kernel"] == "cpu.int8"


def test_run_streams_text_and_then_says_how_it_went(four_bit: Path) -> None:
    done = quantplug("run", four_bit, "-p", "Hello", "--max-new-tokens", 8)
    assert "tokens/s" in done.stdout
    assert "kernels cpu.int4 x 13, cpu.int8 x 1" in done.stdout
    facts = json.loads(quantplug("run", four_bit, "-p", "Hello", "--max-new-tokens", 8, "--json").stdout)
    assert facts["tokens"] <= 8
    assert facts["kernels"] == {"cpu.int4": 13, "cpu.int8": 1}
    assert facts["peak_memory_bytes"] > 0


def test_run_takes_a_dense_checkpoint_as_it_is(dense: Path) -> None:
    done = quantplug("run", dense, "-p", "Hello", "--max-new-tokens", 4)
    assert "the framework's own" in done.stdout


def test_a_policy_file_pins_a_kernel(four_bit: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('[[rule]]\nmatch = "re:.*up_proj"\npin = "reference"\n')
    shown = quantplug("why", four_bit, "model.layers.0.mlp.up_proj", "--policy", policy).stdout
    assert "kernel:    reference for every M" in shown
    through_environment = quantplug("plan", four_bit, QUANTPLUG_POLICY=str(policy)).stdout
    assert "reference" in through_environment


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["plan"], 2, "Missing argument"),
        (["plan", "CKPT", "--set", "bits"], 2, "is not KEY=VALUE"),
        (["plan", "CKPT", "--set", "bits=8"], 3, "QP-CFG-OVERRIDE"),
        (["plan", "nowhere/at/all"], 4, "QP-ST-FILE"),
        (["plan", "CKPT", "--for", "9.0"], 5, "QP-PLAN-PLATFORM"),
        (["why", "CKPT", "model.layers.9.mlp.up_proj"], 5, "QP-PLAN-MODEL"),
        (["run", "CKPT", "-p", ""], 9, "QP-HOST-INPUT"),
        (["convert", "CKPT", "OUT", "--scheme", "gptq", "--bits", "4"], 7, "QP-CONV-SOURCE"),
        (["convert", "DENSE", "OUT", "--scheme", "gptq", "--bits", "5"], 3, "QP-CFG-FIELD"),
        (["convert", "DENSE", "OUT", "--scheme", "nf4"], 8, "QP-PLUG-MISSING"),
        (["convert", "DENSE", "OUT", "--scheme", "gptq", "--calibrate", "absent.txt"], 7, "QP-CONV-CALIBRATION"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_every_kind_of_error_has_its_exit_code_and_leaves_nothing(
    dense: Path, four_bit: Path, tmp_path: Path, arguments: list[str], code: int, text: str
) -> None:
    places = {"CKPT": four_bit, "DENSE": dense, "OUT": tmp_path / "out"}
    done = quantplug(*(places.get(word, word) for word in arguments), code=code)
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    if code > 2:
        machine = quantplug(*(places.get(word, word) for word in arguments), "--json", code=code)
        assert json.loads(machine.stdout)["error"]["code"] == text


def test_a_broken_plugin_is_listed_and_costs_nothing(four_bit: Path, tmp_path: Path) -> None:
    info = tmp_path / "quantplug_broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quantplug-broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[quantplug.plugins]\nbroken = quantplug_broken.plugin\n")
    package = tmp_path / "quantplug_broken"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "plugin.py").write_text('quantplug_api = ">=1,<2"\nimport vendor_library_that_is_missing\n')
    done = quantplug("plugins", PYTHONPATH=str(tmp_path))
    assert "quantplug-broken 1.0 (broken) failed at import: ModuleNotFoundError" in done.stdout
    assert "14 layers quantized" in quantplug("plan", four_bit, PYTHONPATH=str(tmp_path)).stdout
    strict = quantplug("plugins", code=8, PYTHONPATH=str(tmp_path), QUANTPLUG_STRICT="1")
    assert "QP-PLUG-STRICT" in strict.stderr
