"""
Sharded checkpoints: index and shards must agree, and every shard must lie inside the checkpoint.
"""

from __future__ import annotations

import json
import os
import time

import pytest

from quantplug.checkpoint import INDEX_FILE, open_checkpoint
from quantplug.errors import CheckpointError
from quantplug_testkit.checkpoints import filled, fingerprint, index_of, safetensors_bytes, write_checkpoint

SHARDS = {
    "model-00001-of-00002.safetensors": {"a.weight": filled("F32", (2, 2)), "b.weight": filled("F32", (2, 2))},
    "model-00002-of-00002.safetensors": {"c.weight": filled("BF16", (4,))},
}
FIRST, SECOND = SHARDS


def mapped(**changes):
    """Return the right index with some entries of weight_map changed; None removes one."""
    index = index_of(SHARDS)
    index["weight_map"] |= {name.replace("_", "."): shard for name, shard in changes.items()}
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard is not None}
    return index


# What is broken -> index (bytes as they are, or an object), code, and words of where, what and expected.
BROKEN = {
    "not JSON": (b"{", "QP-ST-INDEX", INDEX_FILE, "not JSON at line 1", "valid JSON"),
    "empty": (b"", "QP-ST-INDEX", INDEX_FILE, "is empty", "valid JSON"),
    "UTF-16": ("{}".encode("utf-16"), "QP-ST-INDEX", INDEX_FILE, "UTF-16", "UTF-8"),
    "a key twice": (
        b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "QP-ST-INDEX", INDEX_FILE, "'a' twice", "once",
    ),
    "a list": ([], "QP-ST-INDEX", INDEX_FILE, "is not an object", "weight_map"),
    "no weight_map": ({"metadata": {}}, "QP-ST-INDEX", INDEX_FILE, "has the keys ['metadata']", "weight_map"),
    "weight_map a list": ({"weight_map": ["a"]}, "QP-ST-INDEX", INDEX_FILE, "not an object", "weight_map"),
    "weight_map empty": ({"weight_map": {}}, "QP-ST-INDEX", INDEX_FILE, "empty", "weight_map"),
    "shard a number": (mapped(a_weight=1), "QP-ST-INDEX", "weight_map", "of 'a.weight' is 1", "the name of a file"),
    "shard null": ({"weight_map": {"a": None}}, "QP-ST-INDEX", "weight_map", "is None", "the name of a file"),
    "parent": (mapped(a_weight="../x.safetensors"), "QP-ST-PATH", "'a.weight'", "leaves the checkpoint", "in the"),
    "parent inside": (mapped(a_weight="x/../y.safetensors"), "QP-ST-PATH", "'a.weight'", "leaves", "in the"),
    "dot": (mapped(a_weight="./x.safetensors"), "QP-ST-PATH", "'a.weight'", "shortest form", "in the checkpoint"),
    "absolute": (mapped(a_weight="/etc/x.safetensors"), "QP-ST-PATH", "'a.weight'", "absolute", "in the checkpoint"),
    "drive": (mapped(a_weight="C:\\x.safetensors"), "QP-ST-PATH", "'a.weight'", "another system", "in the"),
    "drive, relative": (mapped(a_weight="C:x.safetensors"), "QP-ST-PATH", "'a.weight'", "another system", "in the"),
    "UNC": (mapped(a_weight="\\\\host\\x.safetensors"), "QP-ST-PATH", "'a.weight'", "another system", "in the"),
    "double slash": (mapped(a_weight="//host/x.safetensors"), "QP-ST-PATH", "'a.weight'", "absolute", "in the"),
    "address": (mapped(a_weight="https://x/y.safetensors"), "QP-ST-PATH", "'a.weight'", "another system", "in the"),
    "NUL": (mapped(a_weight="x\0.safetensors"), "QP-ST-PATH", "'a.weight'", "control character", "in the checkpoint"),
    "pickle": (mapped(a_weight="x.bin"), "QP-ST-PATH", "'a.weight'", "not a safetensors file", "in the checkpoint"),
    "suffix only": (mapped(a_weight=".safetensors"), "QP-ST-PATH", "'a.weight'", "not a safetensors", "in the"),
    "no name": (mapped(a_weight=""), "QP-ST-PATH", "'a.weight'", "'' is not a safetensors file", "in the checkpoint"),
    "shard missing": (mapped(a_weight="model-9.safetensors"), "QP-ST-FILE", "model-9", "does not exist", "safetensors"),
    "tensor nowhere": (mapped(x_weight=FIRST), "QP-ST-INDEX", INDEX_FILE, f"x.weight ({FIRST})", "in its shard"),
    "tensor elsewhere": (
        mapped(a_weight=SECOND), "QP-ST-INDEX", INDEX_FILE, f"a.weight (in {FIRST}, not {SECOND})", "in its shard",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_index_is_refused_with_its_place_and_the_right_one_opens(tmp_path, case):
    index, code, where, what, expected = BROKEN[case]
    directory = write_checkpoint(tmp_path / "checkpoint", shards=SHARDS)
    right = (directory / INDEX_FILE).read_bytes()
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(SHARDS[FIRST]))
    (directory / INDEX_FILE).write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
    before, begin = fingerprint(tmp_path), time.thread_time()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    assert time.thread_time() - begin < 2
    assert fingerprint(tmp_path) == before
    error = caught.value
    assert error.code == code
    assert error.where.startswith(str(directory))
    assert where in error.where
    assert what in error.what
    assert expected in error.expected
    assert error.fix
    (directory / INDEX_FILE).write_bytes(right)
    assert list(open_checkpoint(directory).tensors) == ["a.weight", "b.weight", "c.weight"]


@pytest.mark.parametrize("kind", ["directory", "pipe", "dangling link", "too large"])
def test_an_index_that_is_no_ordinary_file_is_refused_without_waiting(tmp_path, kind):
    path = tmp_path / INDEX_FILE
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "too large":
        path.touch()
        os.truncate(path, 100_000_001)
    else:
        path.symlink_to("gone.json")
    begin = time.thread_time()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert time.thread_time() - begin < 2
    assert (caught.value.code, caught.value.where) == ("QP-ST-FILE", str(path))
    assert caught.value.fix


def test_a_tensor_in_two_shards_is_refused_even_when_the_bytes_are_equal(tmp_path):
    shards = {FIRST: SHARDS[FIRST], SECOND: SHARDS[SECOND] | {"a.weight": SHARDS[FIRST]["a.weight"]}}
    write_checkpoint(tmp_path, shards=shards)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert (caught.value.code, caught.value.where) == ("QP-ST-INDEX", f"{tmp_path}: a.weight")
    assert caught.value.what == f"lies in {FIRST} and in {SECOND}"
    assert caught.value.expected == "every tensor in one file"


def test_a_list_of_many_missing_tensors_is_cut_and_counted(tmp_path):
    directory = write_checkpoint(tmp_path, shards=SHARDS)
    index = index_of(SHARDS)
    index["weight_map"] |= {f"x{number:03}": FIRST for number in range(500)}
    (directory / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"500 tensor\(s\).*x019 .* and 480 more"):
        open_checkpoint(directory)


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    shards = {f"model-{n}.safetensors": {f"t{n}": filled("U8", (n,))} for n in (10, 9, 2, 1)}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, shards=shards))
    assert list(checkpoint.tensors) == ["t1", "t2", "t9", "t10"]
    assert checkpoint.files == tuple(f"model-{n}.safetensors" for n in (1, 2, 9, 10))
    assert [header.file for header in checkpoint.tensors.values()] == list(checkpoint.files)
    assert checkpoint.warnings == ()


def test_shards_in_a_folder_below_belong_to_the_checkpoint(tmp_path):
    (tmp_path / "parts").mkdir()
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, shards={"parts/one.safetensors": SHARDS[FIRST]}))
    assert checkpoint.files == ("parts/one.safetensors",)


@pytest.mark.parametrize("total", [1, 12.5, "much", None, True])
def test_a_wrong_total_size_is_only_a_warning(tmp_path, total):
    directory = write_checkpoint(tmp_path, shards=SHARDS)
    index = index_of(SHARDS) | {"metadata": {"total_size": total}}
    (directory / INDEX_FILE).write_text(json.dumps(index))
    warnings = open_checkpoint(directory).warnings
    if isinstance(total, (int, float)) and total is not True:
        assert warnings == (f"{directory / INDEX_FILE}: total_size says {total}, the tensors have 40 bytes",)
    else:
        assert warnings == ()


def test_what_the_index_forgets_is_read_and_what_it_does_not_name_is_not(tmp_path):
    """Files beside the shards are not opened, so that a broken one harms nobody."""
    directory = write_checkpoint(tmp_path, shards=SHARDS)
    (directory / INDEX_FILE).write_text(json.dumps(mapped(b_weight=None)))
    (directory / "adapter.safetensors").write_bytes(b"garbage")
    checkpoint = open_checkpoint(directory)
    assert list(checkpoint.tensors) == ["a.weight", "b.weight", "c.weight"]
    assert checkpoint.warnings == (
        f"{directory / INDEX_FILE}: 1 tensor(s) of its shards are not listed: b.weight",
        f"adapter.safetensors in {directory}: not part of the checkpoint, not read",
    )
