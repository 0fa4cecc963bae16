"""
Tiny random models, dense and quantized, written as checkpoints.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from quantplug.plugins import build_registry
from quantplug.weight import Weight
from quantplug_gptq import plugin as gptq
from quantplug_gptq.scheme import GPTQScheme

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

    from quantplug.registry import Registry

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PARAMS = {"bits": 4, "group_size": 32, "sym": False, "desc_act": False}


def gptq_registry() -> Registry:
    """Return a registry with the GPTQ format and no kernel but the reference."""
    return build_registry({"quantplug-gptq": gptq})


def config_of(model_type: str, **fields: object) -> PreTrainedConfig:
    """Return a tiny configuration of a model family."""
    return AutoConfig.for_model(model_type, **{**SMALL, **fields})


def write_dense(directory: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a random model whose weights are large enough that layers matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    model.save_pretrained(directory)
    return directory


def linear_names(directory: Path) -> list[str]:
    """Return the paths of the linear layers that a checkpoint stores, but the output head."""
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stored = load_file(directory / "model.safetensors").keys()
    linear = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [path for path in linear if f"{path}.weight" in stored and module_head(model) != path]


def module_head(model: PreTrainedModel) -> str:
    """Return the path of the output head."""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), "")


def rounded(dense: torch.Tensor, scheme: GPTQScheme) -> Weight:
    """Return the nearest values on an asymmetric grid per group."""
    groups = dense.float().unflatten(1, (-1, scheme.group_size))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    top = 2**scheme.bits - 1
    scales = ((high - low) / top).clamp_min(1e-5).half()
    zeros = (-low / scales.float()).round().clamp(0, top)
    codes = (groups / scales.float()[..., None]).round().add(zeros[..., None]).clamp(0, top)
    return Weight(codes.flatten(1).to(torch.uint8), scales, scheme.weight_spec(), zeros.to(torch.uint8))


def quantize(
    dense: Path,
    directory: Path,
    *,
    keep: Callable[[str], bool] = lambda path: False,
    head: bool = False,
    **section: object,
) -> Path:
    """Write a dense checkpoint again in GPTQ form, rounding to nearest; `head` stores a head of its own, too."""
    directory.mkdir()
    for file in dense.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(file, directory / file.name)
    tensors = load_file(dense / "model.safetensors")
    scheme = GPTQScheme.build(PARAMS, "test")
    chosen = [path for path in linear_names(dense) if not keep(path)]
    values = {path: tensors.pop(f"{path}.weight") for path in chosen}
    if head:
        values["lm_head"] = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).flip(0)
        tensors.pop("lm_head.weight", None)
    for path, value in values.items():
        stored = scheme.encode(rounded(value, scheme))
        tensors |= {f"{path}.{suffix}": tensor.contiguous() for suffix, tensor in stored.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    kept = {f"-:{path}": {} for path in linear_names(dense) if keep(path)}
    config["quantization_config"] = {"quant_method": "gptq", **PARAMS, "lm_head": head, "dynamic": kept, **section}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def dequantized(directory: Path, scratch: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return Transformers' own dense model with the values that a GPTQ checkpoint stands for."""
    scratch.mkdir()
    tensors = load_file(directory / "model.safetensors")
    scheme = GPTQScheme.build(PARAMS, "test")
    dense: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        path, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            stored = {s: tensors[f"{path}.{s}"] for s in scheme.suffixes if f"{path}.{s}" in tensors}
            shape = scheme.shape_of({s: tuple(t.shape) for s, t in stored.items()}, path)
            dense[f"{path}.weight"] = scheme.decode(stored, shape, path).dequantize(dtype).contiguous()
        elif suffix not in scheme.suffixes:
            dense[name] = tensor.to(dtype)
    save_file(dense, scratch / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    if "lm_head.weight" in dense:
        config["tie_word_embeddings"] = False
    (scratch / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(scratch, dtype=dtype)


def stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint directory, from all its files."""
    result: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            result |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
    return result


def write_tokenizer(directory: Path, *, chat: bool = True) -> None:
    """Write a tokenizer of single bytes, so that a character may take several tokens; ids 0, 1 and 2 are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )
    if chat:
        fast.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    fast.save_pretrained(directory)
