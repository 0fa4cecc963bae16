"""
Damaged and mislabelled layers: one stable code each, the element named, the tensors untouched, a good layer afterwards.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gptq_files import stored_layer

from quantplug.errors import CheckpointError, ConfigError
from quantplug_gptq.scheme import GPTQScheme
from quantplug_testkit.oracles import gptq as oracle

SYM, ASYM = GPTQScheme(4, 32), GPTQScheme(4, 32, sym=False)
V2, ACT = GPTQScheme(4, 32, checkpoint_format="gptq_v2"), GPTQScheme(4, 32, desc_act=True)
N, K = 24, 64


def constant_zeros(value: int) -> torch.Tensor:
    return torch.from_numpy(oracle.pack_columns(np.full((2, N), value, np.uint8), 4).copy())


def at(tensor: torch.Tensor, place: tuple[int, ...], value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


VALUES = {
    "NaN scale": (
        SYM, "scales", lambda t: at(t, (1, 5), float("nan")), "QP-ST-SCALE", r"scales\[1, 5\]: is nan \(1 of 48",
    ),
    "infinite scale": (
        SYM, "scales", lambda t: at(t, (0, 0), float("-inf")), "QP-ST-SCALE", r"scales\[0, 0\]: is -inf",
    ),
    "v2 zero points in a v1 file": (
        SYM, "qzeros", lambda t: constant_zeros(8), "QP-ST-ZEROS",
        "stores 8 for group 0, row 0; expected 7 everywhere.*looks like checkpoint_format gptq_v2",
    ),
    "v1 zero points in a v2 file": (
        V2, "qzeros", lambda t: constant_zeros(7), "QP-ST-ZEROS",
        "stores 7 .*; expected 8 everywhere.*looks like checkpoint_format gptq;",
    ),
    "another constant": (SYM, "qzeros", lambda t: constant_zeros(3), "QP-ST-ZEROS", "stores 3 .*of another kind"),
    "asymmetric zero points": (
        SYM, "qzeros", lambda t: at(t, (1, 2), 0x77757777), "QP-ST-ZEROS",
        "stores 5 for group 1, row 20; .*looks asymmetric",
    ),
    "group too large": (
        ACT, "g_idx", lambda t: at(t, (9,), 2), "QP-ST-GIDX", r"g_idx\[9\]: is 2; expected a group from 0 to 1",
    ),
    "negative group": (ACT, "g_idx", lambda t: at(t, (9,), -1), "QP-ST-GIDX", r"g_idx\[9\]: is -1"),
    "unused group": (
        ACT, "g_idx", lambda t: torch.zeros_like(t), "QP-ST-GIDX", "leaves 1 of 2 groups .* the first of them 1",
    ),
    "act-order that is not announced": (
        SYM, "g_idx", lambda t: t.flip(0), "QP-ST-GIDX",
        r"g_idx\[0\]: is 1, .*desc_act false; expected 0.*desc_act to true",
    ),
    "floating-point words": (SYM, "qweight", lambda t: t.float(), "QP-ST-DTYPE", "dtype float32; expected int32"),
    "64-bit words": (SYM, "qzeros", lambda t: t.long(), "QP-ST-DTYPE", "dtype int64; expected int32"),
    "integer scales": (SYM, "scales", lambda t: t.int(), "QP-ST-DTYPE", "dtype int32; expected float16 or bfloat16"),
    "transposed words": (SYM, "qweight", lambda t: t.t(), "QP-ST-SHAPE", r"shape \[24, 8\]; expected \[8, 24\]"),
    "scales of one group": (SYM, "scales", lambda t: t[:1], "QP-ST-SHAPE", r"shape \[1, 24\]; expected \[2, 24\]"),
    "short g_idx": (SYM, "g_idx", lambda t: t[:-1], "QP-ST-SHAPE", r"shape \[63\]; expected \[64\]"),
    "no scales": (SYM, "scales", lambda t: None, "QP-ST-MISSING", "scales: is not there"),
    "no g_idx where act-order needs it": (ACT, "g_idx", lambda t: None, "QP-ST-MISSING", "g_idx: is not there"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_bad_tensors_are_named_and_nothing_is_lost(name):
    """Each fault has its code and a text that says where and what; the same scheme then decodes a good layer."""
    scheme, suffix, change, code, text = VALUES[name]
    layer = stored_layer(scheme, N, K, seed=3)
    bad = {**layer.tensors, suffix: change(layer.tensors[suffix])}
    bad = {key: tensor for key, tensor in bad.items() if tensor is not None}
    before = {key: tensor.clone() for key, tensor in bad.items()}
    with pytest.raises(CheckpointError, match=text) as caught:
        scheme.decode(bad, layer.shape, "model.layers.0.mlp.up_proj")
    assert caught.value.code == code
    assert caught.value.where.startswith(f"model.layers.0.mlp.up_proj.{suffix}")
    assert all(torch.equal(bad[key].nan_to_num(), before[key].nan_to_num()) for key in bad)
    good = scheme.decode(layer.tensors, layer.shape, "layer").dequantize(torch.float64).numpy()
    assert np.array_equal(good, layer.values().astype(np.float32))


@pytest.mark.parametrize("scheme", [ASYM, GPTQScheme(3, 32, sym=False)])
@pytest.mark.parametrize("suffix", ["qweight", "qzeros"])
def test_bits_where_no_code_is_stored_must_be_zero(scheme, suffix):
    """28 inputs and 28 outputs end inside a word; what follows must be 0."""
    layer = stored_layer(scheme, 28, 28)
    layer.tensors[suffix][-1, -1] |= -(1 << 31)
    with pytest.raises(
        CheckpointError, match=r"field \d+ of stream \d+ holds \d+; expected 0 in every field from 28"
    ) as caught:
        scheme.decode(layer.tensors, layer.shape, "layer")
    assert caught.value.code == "QP-ST-PADDING"


def shapes(scheme: GPTQScheme, n: int, k: int) -> dict[str, tuple[int, ...]]:
    return {suffix: tuple(tensor.shape) for suffix, tensor in stored_layer(scheme, n, k).tensors.items()}


@pytest.mark.parametrize(
    ("stored", "fits"),
    [
        (shapes(GPTQScheme(8, 32), 64, 128), "bits 8 and group_size 32"),
        (shapes(GPTQScheme(2, 32), 64, 128), "bits 2 and group_size 32"),
        (shapes(GPTQScheme(3, 32), 64, 128), "bits 3 and group_size 32"),
        (shapes(GPTQScheme(4, 64), 64, 128), "bits 4 and group_size 64"),
        (shapes(GPTQScheme(4, -1), 64, 128), "bits 4 and group_size -1"),
        ({**shapes(GPTQScheme(4, 32), 64, 128), "scales": (4, 32)}, "bits 4 and group_size 32"),
        ({**shapes(GPTQScheme(4, 32), 64, 128), "qzeros": (4, 5)}, "fit no GPTQ layer"),
    ],
)
def test_shapes_that_contradict_the_configuration_say_what_they_would_fit(stored, fits):
    """Shapes are evidence: the error names the parameters they belong to."""
    with pytest.raises(CheckpointError, match=fits) as caught:
        GPTQScheme(4, 32).shape_of(stored, "model.layers.0.mlp.up_proj")
    assert caught.value.code == "QP-ST-SHAPE"


def test_the_same_without_g_idx():
    """Then K follows from the bits, so the zero points decide."""
    stored = shapes(GPTQScheme(8, 32), 64, 128)
    del stored["g_idx"]
    with pytest.raises(CheckpointError, match="bits 8 and group_size 32"):
        GPTQScheme(4, 32).shape_of(stored, "layer")


def test_tensors_of_the_wrong_rank_or_missing():
    """Found while planning, from headers alone."""
    stored = shapes(SYM, 64, 128)
    with pytest.raises(CheckpointError, match=r"layer.scales: shape \[64\]; expected 2 dimensions") as caught:
        SYM.shape_of({**stored, "scales": (64,)}, "layer")
    assert caught.value.code == "QP-ST-SHAPE"
    del stored["qzeros"]
    with pytest.raises(CheckpointError, match="qzeros: is not there") as caught:
        SYM.shape_of(stored, "layer")
    assert caught.value.code == "QP-ST-MISSING"


GOOD = {"bits": 4, "group_size": 64}
PARAMS = {
    "bits missing": ({"group_size": 64}, "QP-CFG-FIELD", "bits is missing"),
    "bits 0": ({**GOOD, "bits": 0}, "QP-CFG-FIELD", "the integer 0"),
    "bits negative": ({**GOOD, "bits": -4}, "QP-CFG-FIELD", "the integer -4"),
    "bits 5": ({**GOOD, "bits": 5}, "QP-CFG-FIELD", "one of 2, 3, 4, 8"),
    "bits 3.0": ({**GOOD, "bits": 3.0}, "QP-CFG-FIELD", "the number 3.0"),
    "bits a string": ({**GOOD, "bits": "4"}, "QP-CFG-FIELD", "the string '4'"),
    "bits true": ({**GOOD, "bits": True}, "QP-CFG-FIELD", "bits is true"),
    "bits huge": ({**GOOD, "bits": 10**9}, "QP-CFG-FIELD", "the integer 1000000000"),
    "group missing": ({"bits": 4}, "QP-CFG-FIELD", "group_size is missing"),
    "group 0": ({**GOOD, "group_size": 0}, "QP-CFG-FIELD", "-1 .one group over all inputs."),
    "group -2": ({**GOOD, "group_size": -2}, "QP-CFG-FIELD", "the integer -2"),
    "group -128": ({**GOOD, "group_size": -128}, "QP-CFG-FIELD", "the integer -128"),
    "group huge": ({**GOOD, "group_size": 10**12}, "QP-CFG-FIELD", "at most 1048576"),
    "group null": ({**GOOD, "group_size": None}, "QP-CFG-FIELD", "group_size is null"),
    "sym a string": ({**GOOD, "sym": "false"}, "QP-CFG-FIELD", "the string 'false'"),
    "sym null": ({**GOOD, "sym": None}, "QP-CFG-FIELD", "sym is null"),
    "desc_act 1": ({**GOOD, "desc_act": 1}, "QP-CFG-FIELD", "desc_act is the integer 1"),
    "format a number": ({**GOOD, "checkpoint_format": 2}, "QP-CFG-FIELD", "the integer 2"),
    "format unknown": ({**GOOD, "checkpoint_format": "gptq_v3"}, "QP-CFG-UNKNOWN", "'gptq_v3' is not a known layout"),
    "format marlin": ({**GOOD, "checkpoint_format": "marlin"}, "QP-CFG-REFUSED", "'marlin' is not read: .*GPU kernel"),
    "format planar": ({**GOOD, "checkpoint_format": "gptq_p"}, "QP-CFG-REFUSED", "bit planes"),
    "offset unknown": ({**GOOD, "zeros_offset": "byte"}, "QP-CFG-FIELD", "the string 'byte'"),
    "parameter unknown": ({**GOOD, "block": 3}, "QP-CFG-UNKNOWN", "block: is no parameter of gptq"),
}


@pytest.mark.parametrize("name", PARAMS)
def test_bad_parameters(name):
    """Types are taken as they are written, ranges are checked, and the message says where the parameter came from."""
    params, code, text = PARAMS[name]
    with pytest.raises(ConfigError, match=text) as caught:
        GPTQScheme.build(params, "the caller")
    assert caught.value.code == code
    assert caught.value.where.startswith("the caller")
