"""
Our header parser beside the safetensors package: what that refuses we refuse, what we accept it opens and sees alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from quantplug.checkpoint import open_checkpoint
from quantplug.errors import CheckpointError
from quantplug_testkit.checkpoints import BITS, filled, header_of, safetensors_bytes

SEEN = {"accepted": 0, "refused by both": 0, "refused by us alone": 0}

names = st.sampled_from(["a", "b.weight", "model.layers.0.mlp-0.qweight", "é", "x/y"]) | st.text(min_size=1, max_size=8)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
stored = st.builds(filled, st.sampled_from(sorted(set(BITS) - {"F4"})), shapes, st.integers(0, 255)) | st.builds(
    lambda shape: filled("F4", (*shape, 2)), shapes
)
files = st.dictionaries(names, stored, max_size=4)
odd = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.sampled_from([-0.0, 1.0, 1e3, 1 << 47, 1 << 64, 10**30]),
    st.text(max_size=4), st.sampled_from([*BITS, "F6_E2M3", "f32"]), st.lists(st.integers(-1, 30), max_size=3),
    st.just({}),
)  # fmt: skip


def outcome(data):
    """Ask both readers about the same bytes, and check that they agree where they must."""
    with TemporaryDirectory() as directory:
        path = Path(directory, "model.safetensors")
        path.write_bytes(data)
        try:
            with safe_open(path, framework="np", backend="pread") as file:
                theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError:
            theirs = None
        try:
            checkpoint = open_checkpoint(directory)
        except CheckpointError as error:
            SEEN["refused by both" if theirs is None else "refused by us alone"] += 1
            return error.code
        SEEN["accepted"] += 1
        ours = {name: header.shape for name, header in checkpoint.tensors.items()}
        assert ours == theirs
        return "accepted"


@settings(max_examples=150, deadline=None)
@given(files, st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))
def test_whole_files_are_accepted_unless_a_name_is_unprintable(tensors, metadata):
    tensors.pop("__metadata__", None)
    assert outcome(safetensors_bytes(tensors, metadata=metadata)) in ("accepted", "QP-ST-NAME")


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_headers_with_one_thing_changed(data):
    tensors = data.draw(files.filter(bool))
    header = header_of(tensors, data.draw(st.none() | st.just({"format": "pt"})))
    name = data.draw(st.sampled_from(sorted(header)))
    entry = header[name]
    if name == "__metadata__" or (data.draw(st.booleans()) and data.draw(st.booleans())):
        header[name] = data.draw(odd)
    else:
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "data_offsets", "extra"]))
        value = entry.get(key)
        if isinstance(value, list) and value and data.draw(st.booleans()):
            position = data.draw(st.integers(0, len(value) - 1))
            value[position] = data.draw(odd | st.just(value[position] + data.draw(st.integers(-2, 2))))
        elif data.draw(st.booleans()):
            entry[key] = data.draw(odd)
        else:
            entry.pop(key, None)
    outcome(safetensors_bytes(tensors, header=json.dumps(header, ensure_ascii=data.draw(st.booleans())).encode()))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_files_with_some_bytes_changed_cut_or_added(data):
    raw = bytearray(safetensors_bytes(data.draw(files), metadata=data.draw(st.none() | st.just({"format": "pt"}))))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(raw)))
        what = data.draw(st.sampled_from(["replace", "replace", "insert", "delete", "cut"]))
        new = data.draw(st.sampled_from(b'{}[]",:0123-.eE \\u\x00\n') | st.integers(0, 255))
        if what == "replace" and position < len(raw):
            raw[position] = new
        elif what == "insert":
            raw.insert(position, new)
        elif what == "delete":
            del raw[position : position + 1]
        elif what == "cut":
            del raw[position:]
    outcome(bytes(raw))


@settings(max_examples=200, deadline=None)
@given(st.text('{}[]",:0123-. abdtypeshaf_os\\u', max_size=60).map(str.encode) | st.binary(max_size=40))
@example(b'{"\\ud83d\\ude00":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}')
@example(b'{"\\ude00\\ud83d":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}')
@example(b'{"a":{"dtype":"U8","shape":[00],"data_offsets":[0,0]}}')
@example(b'{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}')
@example(b'{"a":{"dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,1]}}')
@example(b'{"a":{"dtype":"U8","shape":[281474976710656,0],"data_offsets":[0,0]}}')
@example(b'{"a":["U8",[1],[0,1]]}')
@example(b'{"__metadata__":null}')
@example(b"\xef\xbb\xbf{}")
@example(b"{}\t\r\n ")
@example(b"{}\x0c")
def test_any_bytes_as_a_header(header):
    outcome(safetensors_bytes({"": ("U8", (1,), b"x")}, header=header))
    outcome(safetensors_bytes({}, header=header))


@pytest.fixture(scope="module", autouse=True)
def all_three_outcomes_are_seen(request):
    """A comparison that never gets past the first check would prove nothing."""
    collected = {item.name for item in request.session.items if item.module is request.module}
    yield
    if len(collected) == 4 and not request.session.testsfailed:
        assert all(count > 50 for count in SEEN.values()), SEEN
