"""
Write the golden files with GPTQModel itself, on a CPU, in about a minute.

    python make_gptqmodel.py OUT [case ...]

OUT/golden/<case>.json then holds, for one or two layers of a tiny random model, the tensors exactly as GPTQModel wrote
them, the configuration as written, every tensor's name, dtype and shape, and GPTQModel's own dequantized weight
`[N, K]` (`TorchLinear.dequantize_weight` of the reloaded checkpoint with float16 scales, transposed). Of a layer the
first 32 output rows are kept, so that the files stay small: rows of a packed layer do not depend on each other.
A tensor is `{"dtype", "shape", "data"}`, the data in base64, little-endian and row-major.

The environment, of its own; GPTQModel 7.7.0 declares torch>=2.14.1 but quantizes and runs on a CPU with 2.13.0:

    pip install torch==2.13.0 setuptools wheel ninja packaging numpy        (the CPU build)
    pip install torch==2.13.0 accelerate==1.15.0 transformers==5.23.0 safetensors==0.8.0 threadpoolctl device-smi \
        'protobuf>=7.36.2' pillow requests pypcre==0.6.4 tokenicer==0.0.14 logbar==0.4.15 jinja2 maturin datasets \
        pyarrow dill torchao==0.18.0 defuser==0.0.28
    pip install --no-build-isolation --no-deps gptqmodel==7.7.0
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # TorchLinear compiles dequantize_weight otherwise
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its thread pool refuses to start on fewer than three cores

import gptqmodel
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROWS = 32
DOWN = "model.layers.0.mlp.down_proj"  # N = 128, K = 192
KEY = "model.layers.0.self_attn.k_proj"  # N = 64, K = 128
NAMES = {torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16"}
BIAS = {"attention_bias": True, "mlp_bias": True}
ACT = {"desc_act": True, "act_group_aware": False}

# case -> (arguments of QuantizeConfig, further arguments of LlamaConfig, layers to keep)
CASES = {
    "w2g64-sym": ({"bits": 2, "group_size": 64, "sym": True}, {}, [KEY]),
    "w2g32-asym-v1": ({"bits": 2, "group_size": 32, "sym": False}, {}, [KEY]),
    "w3g64-sym": ({"bits": 3, "group_size": 64, "sym": True}, {}, [KEY]),
    "w3g32-asym-v1": ({"bits": 3, "group_size": 32, "sym": False}, {}, [KEY]),
    "w3g32-asym-v2": ({"bits": 3, "group_size": 32, "sym": False, "format": "gptq_v2"}, {}, [KEY]),
    "w4g64-sym": ({"bits": 4, "group_size": 64, "sym": True}, {}, [KEY]),
    "w4g64-sym-v2": ({"bits": 4, "group_size": 64, "sym": True, "format": "gptq_v2"}, {}, [KEY]),
    "w4g32-sym-bias": ({"bits": 4, "group_size": 32, "sym": True}, BIAS, [KEY]),
    "w4chan-sym": ({"bits": 4, "group_size": -1, "sym": True, "act_group_aware": False}, {}, [KEY]),
    "w4g32-asym-v1": ({"bits": 4, "group_size": 32, "sym": False}, {}, [KEY]),
    "w4g32-asym-v2": ({"bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"}, {}, [KEY]),
    "w4g32-sym-desc": ({"bits": 4, "group_size": 32, "sym": True, **ACT}, {}, [DOWN]),
    "w4g64-asym-desc": ({"bits": 4, "group_size": 64, "sym": False, **ACT}, {}, [DOWN]),
    "w4g128-sym-ragged": ({"bits": 4, "group_size": 128, "sym": True}, {}, [DOWN]),  # 192 inputs: one group and a half
    "w8g32-sym": ({"bits": 8, "group_size": 32, "sym": True}, {}, [KEY]),
    "w8chan-sym-desc": ({"bits": 8, "group_size": -1, "sym": True, **ACT}, {}, [KEY]),
    "w8g64-asym-v1": ({"bits": 8, "group_size": 64, "sym": False}, {}, [KEY]),
    "w4g64-sym-dynamic": (
        {
            "bits": 4,
            "group_size": 64,
            "sym": True,
            "dynamic": {r"-:.*\.k_proj": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": 32}},
        },
        {},
        [DOWN],
    ),
    "w4g64-sym-lmhead": ({"bits": 4, "group_size": 64, "sym": True, "lm_head": True}, {}, ["lm_head", KEY]),
    "w3g64-sym-planar": ({"bits": 3, "group_size": 64, "sym": True, "format": "gptq_p"}, {}, [KEY]),
    "w6g64-sym-planar": ({"bits": 6, "group_size": 64, "sym": True}, {}, [KEY]),  # becomes gptq_p by itself
}


def dense_model(path: Path, extra: dict[str, bool]) -> None:
    """Save a one-layer Llama in which some rows need zero point 0, some the largest, and inputs differ in weight."""
    torch.manual_seed(20240607)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=128,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **extra,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 1).mul_(torch.rand(128) + 0.2)
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            weight = module.weight.normal_(0, 0.06)
            weight.mul_(torch.rand(1, weight.shape[1]) + 0.5)  # so that activation order is not the identity
            if module.bias is not None:
                module.bias.normal_(0, 0.1)
            if name != "lm_head":
                for row in (2, 3, 9, 31, 40):
                    weight[row] = weight[row].abs() + 0.08
                for row in (5, 10):
                    weight[row] = -weight[row].abs() - 0.08
    model.to(torch.bfloat16).save_pretrained(path)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 128)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    ).save_pretrained(path)


def calibration() -> list[dict[str, list[int]]]:
    """Return random sequences, always the same."""
    ids = torch.randint(3, 128, (64, 96), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row.tolist(), "attention_mask": [1] * 96} for row in ids]


def spell(tensor: torch.Tensor) -> dict[str, object]:
    """Return a tensor as JSON."""
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return {
        "dtype": NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "data": base64.b64encode(data).decode(),
    }


def cut(suffix: str, tensor: torch.Tensor, outputs: int) -> torch.Tensor:
    """Keep the first rows of a layer; stored tensors have them along their last axis, packed in `qzeros`."""
    if suffix == "g_idx":
        return tensor
    return tensor[..., : tensor.shape[-1] * ROWS // outputs]


def make(case: str, out: Path) -> None:
    """Quantize, save, reload, and write the golden file of one case."""
    arguments, extra, kept = CASES[case]
    dense, checkpoint = out / ("dense-bias" if extra else "dense"), out / "checkpoint" / case
    if not dense.exists():
        dense_model(dense, extra)
    torch.manual_seed(0)
    model = GPTQModel.load(str(dense), QuantizeConfig(**arguments, offload_to_disk=False), device="cpu")
    model.quantize(calibration(), batch_size=8)
    model.save(str(checkpoint))
    loaded = GPTQModel.load(str(checkpoint), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    modules = dict(loaded.model.eval().named_modules())
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    layers = {}
    for layer in kept:
        module = modules[layer]
        module.scales = module.scales.to(torch.float16)
        stored = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.rpartition(".")[0] == layer}
        outputs = stored["scales"].shape[1]
        layers[layer] = {
            "tensors": {suffix: spell(cut(suffix, tensor, outputs)) for suffix, tensor in stored.items()},
            "dequantized": spell(TorchLinear.dequantize_weight(module).T[:ROWS]),
        }
    document = {
        "maker": {
            "tool": "gptqmodel",
            "version": gptqmodel.__version__,
            "torch": torch.__version__,
            "command": f"python make_gptqmodel.py OUT {case}",
            "arguments": arguments,
        },
        "config": {
            "quantization_config": json.loads((checkpoint / "config.json").read_text())["quantization_config"],
            "quantize_config.json": json.loads((checkpoint / "quantize_config.json").read_text()),
            "safetensors_metadata": metadata,
        },
        "stored": {name: [NAMES[tensor.dtype], list(tensor.shape)] for name, tensor in tensors.items()},
        "layers": layers,
    }
    path = out / "golden" / f"{case}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(case, path.stat().st_size, "bytes")


if __name__ == "__main__":
    for name in sys.argv[2:] or CASES:
        make(name, Path(sys.argv[1]))
