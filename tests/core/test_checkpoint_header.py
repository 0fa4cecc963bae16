"""
Broken safetensors files: each refused with its code and place, nothing touched, and a good file opened afterwards.
"""

from __future__ import annotations

import os
import time
from itertools import pairwise

import pytest

from quantplug.checkpoint import open_checkpoint
from quantplug.errors import CheckpointError
from quantplug.header import DTYPES, MAX_TENSORS
from quantplug_testkit.checkpoints import BITS, filled, fingerprint, safetensors_bytes, write_checkpoint

PAIR = {"a": filled("F32", (2, 3), 1), "b": filled("I8", (5,), 2)}
ONE = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


def field(name, key, value):
    """Return a file whose header says something else about one field."""

    def edit(header):
        header[name][key] = value

    return safetensors_bytes(PAIR, edit=edit)


def entry(value):
    """Return a file in which the entry of tensor `b` is something else."""
    return safetensors_bytes(PAIR, edit=lambda header: header.update(b=value))


def named(name):
    """Return a good file with one tensor of that name."""
    return safetensors_bytes({name: filled("U8", (1,))})


def raw(header, data=b"x", **more):
    """Return a file with these very header bytes."""
    return safetensors_bytes({"": ("U8", (len(data),), data)}, header=header, **more)


GOOD = safetensors_bytes(PAIR)
CUT = "cut short"
FAULTY = "faulty tool"
NOT = "not a safetensors file"

# What is broken -> file, code, and words of where, what, expected and fix.
BROKEN = {
    "empty": (b"", "QP-ST-HEADER", "", "has 0 bytes", "8 bytes of header length", CUT),
    "7 bytes": (GOOD[:7], "QP-ST-HEADER", "", "has 7 bytes", "8 bytes of header length", CUT),
    "header cut": (GOOD[:40], "QP-ST-HEADER", ": byte 0", "header length is", "at most 32", CUT),
    "length 2**63": (raw(b"{}", length=1 << 63), "QP-ST-HEADER", ": byte 0", f"is {1 << 63}", "100000000", NOT),
    "length over the cap": (raw(b"{}", length=100_000_001), "QP-ST-HEADER", ": byte 0", "100000001", "at most", NOT),
    "length over the file": (raw(b"{}", b"", length=3), "QP-ST-HEADER", ": byte 0", "length is 3", "at most 2", CUT),
    "length zero": (raw(b"", b""), "QP-ST-HEADER", "header", "is empty", "a JSON object", ""),
    "leading space": (raw(b" {}", b""), "QP-ST-HEADER", "header", "begins with 0x20", "a JSON object", ""),
    "a pickle": (b"\x80\x04\x95\x10" + bytes(60), "QP-ST-HEADER", "byte 0", "length is", "at most", NOT),
    "not JSON": (raw(b'{"a":}', b""), "QP-ST-HEADER", "header (byte 8 to 14)", "column 6", "valid JSON", FAULTY),
    "a list": (raw(b"[]", b""), "QP-ST-HEADER", "header", "begins with 0x5B", "a JSON object", ""),
    "not UTF-8": (raw(b'{"\xff":1}', b""), "QP-ST-HEADER", "header", "not UTF-8 at byte 2", "UTF-8", FAULTY),
    "NUL padding": (raw(b"{}\0\0", b""), "QP-ST-HEADER", "header", "NUL at byte 2", "UTF-8", FAULTY),
    "two objects": (raw(b"{}{}", b""), "QP-ST-HEADER", "header", "Extra data", "valid JSON", FAULTY),
    "deep": (raw(b'{"a":' + b"[" * 99_000, b""), "QP-ST-HEADER", "header", "more than 64 deep", "64 levels", FAULTY),
    "5,000 digits": (field("a", "shape", [10**4000]), "QP-ST-HEADER", "header", "4001 characters", "64 bits", FAULTY),
    "a name twice": (
        raw(b'{"a":' + ONE + b',"a":' + ONE + b"}"), "QP-ST-NAME", "header", "'a' twice", "every key once", FAULTY
    ),
    "half a character": (
        raw(b'{"\\ud800":' + ONE + b"}"), "QP-ST-HEADER", "header", "half of a surrogate", "whole characters", FAULTY
    ),
    "no name": (named(""), "QP-ST-NAME", "''", "its name is empty", "1 to 1024 bytes", FAULTY),
    "long name": (named("x" * 1025), "QP-ST-NAME", "'xxx", "has 1025 bytes", "1 to 1024 bytes", FAULTY),
    "long name in bytes": (named("ä" * 513), "QP-ST-NAME", "'ää", "has 1026 bytes", "1 to 1024 bytes", FAULTY),
    "NUL in a name": (named("a\0b"), "QP-ST-NAME", "'a\\x00b'", "U+0000 at position 1", "printable", FAULTY),
    "line end in a name": (named("a\nb"), "QP-ST-NAME", "'a\\nb'", "U+000A at position 1", "printable", FAULTY),
    "bidi override": (named("a\u202eb"), "QP-ST-NAME", "tensor", "U+202E at position 1", "printable", FAULTY),
    "path in a name": (named("../../x"), "QP-ST-NAME", "'../../x'", "path component '..'", "without '..'", FAULTY),
    "unknown dtype": (field("a", "dtype", "F31"), "QP-ST-DTYPE", ": a", "dtype 'F31'", "F32", "newer quantplug"),
    "dtype torch lacks": (field("a", "dtype", "F6_E2M3"), "QP-ST-DTYPE", ": a", "'F6_E2M3'", "F8_E4M3", "newer"),
    "dtype no string": (field("a", "dtype", ["F32"]), "QP-ST-DTYPE", ": a", "['F32']", "F32", "newer quantplug"),
    "shape no list": (field("a", "shape", 6), "QP-ST-HEADER", ": a", "shape is 6", "list of integers", FAULTY),
    "float size": (field("a", "shape", [2, 3.0]), "QP-ST-HEADER", ": a", "has 3.0 in it", "list of integers", FAULTY),
    "true as size": (field("b", "shape", [True, 5]), "QP-ST-HEADER", ": b", "has True", "list of integers", FAULTY),
    "negative size": (field("a", "shape", [-2, -3]), "QP-ST-SHAPE", ": a", "the size -2", "0 to", FAULTY),
    "size 2**48": (field("a", "shape", [0, 1 << 48]), "QP-ST-SHAPE", ": a", f"{1 << 48}", "0 to", FAULTY),
    "9 dimensions": (field("a", "shape", [1] * 9), "QP-ST-SHAPE", ": a", "9 dimensions", "at most 8", FAULTY),
    "2**47 elements": (field("a", "shape", [1 << 24, 1 << 23]), "QP-ST-SHAPE", ": a", f"{1 << 47}", "fewer", FAULTY),
    "wrong size": (field("a", "shape", [2, 4]), "QP-ST-SHAPE", ": a", "24 bytes", "32 bytes for shape [2, 4]", FAULTY),
    "half a byte": (
        raw(b'{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}'), "QP-ST-SHAPE", ": a", "1 bytes", "1.5 bytes",
        FAULTY,
    ),
    "offsets no list": (field("a", "data_offsets", "0,24"), "QP-ST-HEADER", ": a", "'0,24'", "[start, end]", FAULTY),
    "three offsets": (field("a", "data_offsets", [0, 24, 24]), "QP-ST-HEADER", ": a", "24]", "[start, end]", FAULTY),
    "float offset": (field("a", "data_offsets", [0, 24.0]), "QP-ST-HEADER", ": a", "24.0", "integers", FAULTY),
    "negative offset": (field("a", "data_offsets", [-24, 0]), "QP-ST-HEADER", ": a", "-24", "0 <= start", FAULTY),
    "minus zero": (
        raw(b'{"a":' + ONE.replace(b"[0,", b"[-0,") + b"}"), "QP-ST-HEADER", ": a", "[-0.0, 1]", "integers", FAULTY
    ),
    "offsets reversed": (field("a", "data_offsets", [24, 0]), "QP-ST-HEADER", ": a", "[24, 0]", "start <= end", FAULTY),
    "overlap": (field("b", "data_offsets", [20, 25]), "QP-ST-LAYOUT", ": b", "inside a", "without overlap", FAULTY),
    "hole": (field("b", "data_offsets", [25, 30]), "QP-ST-LAYOUT", ": b", "a hole behind a", "overlap or hole", FAULTY),
    "hole at the front": (field("a", "data_offsets", [4, 28]), "QP-ST-LAYOUT", ": a", "the header", "hole", FAULTY),
    "past the end": (GOOD[:-1], "QP-ST-LAYOUT", "", "1 too few", "the end of b", CUT),
    "bytes left over": (GOOD + b"zz", "QP-ST-LAYOUT", "", "2 too many", "the end of b", FAULTY),
    "entry no object": (entry([]), "QP-ST-HEADER", ": b", "has a list", "exactly dtype, shape", FAULTY),
    "entry null": (entry(None), "QP-ST-HEADER", ": b", "has null", "exactly dtype, shape", FAULTY),
    "entry lacks a field": (entry({"dtype": "I8"}), "QP-ST-HEADER", ": b", "['dtype']", "exactly dtype", FAULTY),
    "entry with another field": (
        field("b", "code", 1), "QP-ST-HEADER", ": b", "'code'", "exactly dtype, shape and data_offsets", FAULTY
    ),
    "metadata no object": (
        safetensors_bytes({}, edit=lambda header: header.update(__metadata__=[1])),
        "QP-ST-HEADER", ": __metadata__", "is a list", "values are strings", FAULTY,
    ),
    "metadata no string": (
        safetensors_bytes({}, edit=lambda header: header.update(__metadata__={"format": 1})),
        "QP-ST-HEADER", ": __metadata__", "'format' is 1", "values are strings", FAULTY,
    ),
    "too many tensors": (
        raw(b"{" + b",".join(b'"%d":' % n + ONE for n in range(MAX_TENSORS + 1)) + b"}"),
        "QP-ST-HEADER", "header", f"describes {MAX_TENSORS + 1} tensors", f"at most {MAX_TENSORS}", "",
    ),
    "too many tensors, disguised": (
        raw(b"{" + b",".join(b'"%d":1' % n for n in range(MAX_TENSORS + 2)) + b"}"),
        "QP-ST-HEADER", "header", f"describes {MAX_TENSORS + 2} tensors", f"at most {MAX_TENSORS}", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_its_place_and_the_next_one_opens(tmp_path, case):
    data, code, where, what, expected, fix = BROKEN[case]
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "model.safetensors").write_bytes(data)
    before, begin = fingerprint(tmp_path), time.thread_time()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(bad)
    assert time.thread_time() - begin < 2
    assert fingerprint(tmp_path) == before
    error = caught.value
    assert error.code == code
    assert error.where.startswith(str(bad / "model.safetensors"))
    assert where in error.where.removeprefix(str(bad / "model.safetensors"))
    assert what in error.what
    assert expected in error.expected
    assert fix in error.fix
    assert str(error).isprintable()
    good = write_checkpoint(tmp_path / "good", PAIR)
    assert list(open_checkpoint(good).tensors) == ["a", "b"]


@pytest.mark.parametrize("kind", ["directory", "pipe", "dangling link", "missing after the listing"])
def test_a_file_that_is_no_file_is_refused_without_waiting(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to("gone.safetensors")
    else:
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    before, begin = fingerprint(tmp_path), time.thread_time()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert time.thread_time() - begin < 2
    assert fingerprint(tmp_path) == before
    assert (caught.value.code, caught.value.where) == ("QP-ST-FILE", str(path))
    assert caught.value.expected == "a safetensors file"
    assert caught.value.fix


def test_names_that_look_the_same_are_refused(tmp_path):
    """'é' as one character and as two; the Kelvin sign, which normalises to a plain K."""
    for one, other in (("caf\u00e9.weight", "cafe\u0301.weight"), ("K.weight", "\u212a.weight")):
        write_checkpoint(tmp_path, {one: filled("U8", (1,)), other: filled("U8", (1,))})
        with pytest.raises(CheckpointError, match="is the same text as") as caught:
            open_checkpoint(tmp_path)
        assert caught.value.code == "QP-ST-NAME"
    write_checkpoint(tmp_path, {"café.weight": filled("U8", (1,)), "кафе..weight": filled("U8", (1,))})
    assert len(open_checkpoint(tmp_path).tensors) == 2


def test_every_dtype_and_every_odd_but_legal_shape_is_read(tmp_path):
    tensors = {f"{dtype} {shape}": filled(dtype, shape) for dtype in BITS for shape in ((), (0,), (2, 0, 3), (4, 2))
               if not (dtype == "F4" and shape == ())}  # fmt: skip
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors))
    assert {name: bits for name, (_, bits) in DTYPES.items()} == BITS
    assert list(checkpoint.tensors) == sorted(tensors, key=lambda name: checkpoint.tensors[name].start)
    for name, (dtype, shape, data) in tensors.items():
        header = checkpoint.tensors[name]
        assert (header.name, header.shape, header.nbytes) == (name, tuple(shape), len(data))
        assert header.dtype == DTYPES[dtype][0]
    headers = sorted(checkpoint.tensors.values(), key=lambda header: (header.start, header.end))
    assert all(one.end == two.start for one, two in pairwise(headers))


def test_every_dtype_is_spelled_as_torch_spells_it():
    import torch

    for name, bits in DTYPES.values():
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        # One element of the packed four-bit type holds two of the file's.
        assert torch.empty(0, dtype=dtype).element_size() * 8 == (8 if bits == 4 else bits)


def test_data_in_another_order_than_the_header_is_fine(tmp_path):
    def swap(header):
        header["a"]["data_offsets"], header["b"]["data_offsets"] = [5, 29], [0, 5]

    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(PAIR, edit=swap, metadata={"format": "pt"}))
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["b", "a"]
    assert checkpoint.metadata == {"format": "pt"}
    size = (tmp_path / "model.safetensors").stat().st_size
    assert checkpoint.tensors["a"].end == size
    assert checkpoint.tensors["b"].start == size - 29
