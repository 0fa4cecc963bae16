"""
The GPTQ oracle against files that other tools wrote, with the values that those tools themselves read from them.

Each file holds a few layers of one tiny checkpoint as its maker stored them and the maker's dequantized weight in
float16; `maker` in the file says by which tool, version and command.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from quantplug_testkit.compare import assert_bitwise_equal
from quantplug_testkit.oracles.gptq import dequantize

PLUGINS = Path(__file__).parents[1] / "plugins"
DTYPES = {"I32": np.int32, "F16": np.float16}


def stores_gptq(path):
    """Whether a file holds what this oracle reads; codes in planes, AWQ's order and floating point are not GPTQ."""
    config = json.loads(path.read_text())["config"]["quantization_config"]
    if config["quant_method"] == "auto-round":
        return config.get("packing_format") in ("auto_round", "auto_round:auto_gptq", "auto_round:gptqmodel")
    return config["quant_method"] == "gptq" and config.get("checkpoint_format") != "gptq_p"


FILES = [
    path
    for maker in ("gptq", "auto-round")
    for path in sorted((PLUGINS / maker / "golden").glob("*.json"))
    if stores_gptq(path)
]


def array(stored):
    return np.frombuffer(base64.b64decode(stored["data"]), DTYPES[stored["dtype"]]).reshape(stored["shape"])


def stores_zeros_as_they_are(config):
    if config["quant_method"] == "auto-round":
        return config["packing_format"] in ("auto_round", "auto_round:gptqmodel")
    return config.get("checkpoint_format") == "gptq_v2"


def subtracts_words(config, bits):
    makers = (config.get("meta") or {}).get("quantizer") or []
    return config.get("checkpoint_format") == "gptq" and bits != 3 and any("gptqmodel" in maker for maker in makers)


def test_there_are_golden_files():
    """An empty directory would let everything pass."""
    assert len(FILES) >= 25


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_oracle_reads_what_the_maker_wrote(path):
    """Bit by bit: the float64 values, rounded to float16, are the maker's."""
    document = json.loads(path.read_text())
    config = document["config"]["quantization_config"]
    read = 0
    for name, layer in document["layers"].items():
        if "dequantized" not in layer:
            continue
        tensors = {suffix: array(stored) for suffix, stored in layer["tensors"].items() if stored["dtype"] in DTYPES}
        expected = array(layer["dequantized"])
        bits = tensors["qweight"].shape[0] * 32 // expected.shape[1]
        values = dequantize(
            tensors["qweight"],
            tensors["qzeros"],
            tensors["scales"],
            tensors.get("g_idx"),
            bits,
            -(-expected.shape[1] // tensors["scales"].shape[0]),
            v2=stores_zeros_as_they_are(config),
            sym=config["sym"],
            whole_words=subtracts_words(config, bits),
        )
        assert_bitwise_equal(values.astype(np.float16) + 0, expected + 0, f"{path.stem} {name}")
        read += 1
    assert read
