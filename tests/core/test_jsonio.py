"""
JSON from untrusted files: one meaning or an error with code and place, never a wait, a crash or a surprise.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantplug.errors import ConfigError
from quantplug.jsonio import (
    get_bool,
    get_int,
    get_list_of_str,
    get_mapping,
    get_str,
    parse_json,
    read_json,
)
from quantplug.jsontext import MAX_DEPTH

GOOD = b'{"bits": 4}'

BAD_TEXT = {
    "empty": (b"", "QP-CFG-JSON", "is empty"),
    "white space only": (b" \n\t", "QP-CFG-JSON", "is empty"),
    "byte order mark": (b"\xef\xbb\xbf{}", "QP-CFG-ENCODING", "byte order mark (byte 0 is 0xEF)"),
    "UTF-16 with mark": ('{"a": 1}'.encode("utf-16"), "QP-CFG-ENCODING", "is UTF-16"),
    "UTF-16 without mark": ('{"a": 1}'.encode("utf-16-le"), "QP-CFG-ENCODING", "NUL at byte 1"),
    "not UTF-8": (b'{"a": "\xff"}', "QP-CFG-ENCODING", "is not UTF-8 at byte 7 (0xFF)"),
    "overlong UTF-8": (b'{"a": "\xc0\xaf"}', "QP-CFG-ENCODING", "byte 7"),
    "encoded surrogate": (b'{"a": "\xed\xa0\x80"}', "QP-CFG-ENCODING", "byte 7"),
    "lone surrogate": (b'{"a": ["\\ud800x"]}', "QP-CFG-ENCODING", "half of a surrogate pair"),
    "lone surrogate in a key": (b'{"\\uDC00": 1}', "QP-CFG-ENCODING", "half of a surrogate pair"),
    "truncated": (
        b'{"a": [1,\n 2',
        "QP-CFG-JSON",
        "line 2 column 3: Expecting ',' delimiter (the text ends",
    ),
    "not JSON": (b"{'a': 1}", "QP-CFG-JSON", "line 1 column 2"),
    "two values": (b"{} {}", "QP-CFG-JSON", "line 1 column 4: Extra data"),
    "trailing comma": (b'{"a": 1,}', "QP-CFG-JSON", "line 1 column"),
    "comment": (b"{} // no", "QP-CFG-JSON", "line 1 column 4"),
    "raw control character": (b'{"a": "\x01"}', "QP-CFG-JSON", "Invalid control character"),
    "a key twice": (b'{"bits": 4, "bits": 8}', "QP-CFG-DUPLICATE", "the key 'bits' twice in one object"),
    "a key twice, deeper": (b'{"a": [{"b": 1, "\\u0062": 1}]}', "QP-CFG-DUPLICATE", "the key 'b' twice"),
    "NaN": (b'{"a": NaN}', "QP-CFG-NUMBER", "the constant NaN"),
    "Infinity": (b"[-Infinity]", "QP-CFG-NUMBER", "the constant -Infinity"),
    "overflow": (b'{"a": 1e999}', "QP-CFG-NUMBER", "the number 1e999"),
    "integer of 5,000 digits": (b'{"a": ' + b"1" * 5000 + b"}", "QP-CFG-NUMBER", "an integer of 5000 characters"),
    "float of 5,000 digits": (b'{"a": ' + b"1" * 5000 + b".5}", "QP-CFG-NUMBER", "too large or too long"),
    "65 deep": (b"[" * 65 + b"]" * 65, "QP-CFG-JSON", "nested more than 64 deep"),
    "100,000 deep": (b'{"a":' * 100_000, "QP-CFG-JSON", "nested more than 64 deep"),
    "16 million brackets": (b"[" * 16_000_000, "QP-CFG-JSON", "16000000 values"),
    "9 million values": (b"[" + b"1," * 9_000_000 + b"1]", "QP-CFG-JSON", "values and more"),
    "40 million strings": (b'""' * 40_000_000, "QP-CFG-JSON", "strings"),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_text_is_refused_with_code_and_place_within_two_seconds(case):
    data, code, words = BAD_TEXT[case]
    begin = time.thread_time()
    with pytest.raises(ConfigError) as caught:
        parse_json(data, "here.json")
    assert time.thread_time() - begin < 2
    assert (caught.value.code, caught.value.where) == (code, "here.json")
    assert words in caught.value.what
    assert caught.value.fix == "Correct the file, or download it again."
    assert parse_json(GOOD, "good") == {"bits": 4}


def test_brackets_and_quotes_inside_strings_do_not_count_as_nesting():
    value = {"a": "[" * 1000, '"[{\\': '\\"' + "[{" * 100 + "\\", "b": ["\\\\", "]"]}
    assert parse_json(json.dumps(value).encode(), "x") == value


def test_the_deepest_nesting_allowed_is_read():
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, "x") is not None


def test_a_stack_that_is_almost_used_up_is_an_error_of_ours():
    def descend(left: int) -> None:
        if left:
            descend(left - 1)
        else:
            parse_json(b"[" * 60 + b"]" * 60, "x")

    depth = 0
    frame = sys._getframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    # From Python 3.12 on the C parser has a stack of its own, and then this simply works.
    with contextlib.suppress(ConfigError, RecursionError):
        descend(sys.getrecursionlimit() - depth - 25)
    assert parse_json(GOOD, "good") == {"bits": 4}


def test_minus_zero_is_no_integer():
    """Readers disagree about it: the safetensors package takes it for a float."""
    assert type(parse_json(b"-0", "x")) is float


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=20,
    ),
    st.booleans(),
)  # fmt: skip
def test_what_json_writes_is_read_back_equal(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_json(text.encode(), "x") == value


@given(st.binary(max_size=60) | st.text('[]{}",:\\u0d8 1eNa-.\n', max_size=60).map(str.encode))
def test_any_bytes_are_read_as_the_standard_reader_does_or_refused(data):
    try:
        value = parse_json(data, "x")
    except ConfigError:
        return
    assert json.loads(data) == value


@pytest.fixture
def odd_files(tmp_path):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere.json")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "large").write_bytes(b" " * 2000 + GOOD)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        yield tmp_path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "does not exist"),
        ("directory", "is a directory, not a regular file"),
        ("pipe", "is a named pipe, not a regular file"),
        ("socket", "is a socket, not a regular file"),
        ("/dev/zero", "is a character device, not a regular file"),
        ("dangling", "is a symbolic link to nowhere.json, which does not exist"),
        ("loop", "cannot be read: Too many levels of symbolic links"),
        ("large", "2011 bytes are more than the 1024 allowed"),
        ("x" * 300, "cannot be read: File name too long"),
    ],
)
def test_what_is_no_ordinary_file_is_refused_without_waiting(odd_files, name, words):
    begin = time.thread_time()
    with pytest.raises(ConfigError) as caught:
        read_json(odd_files / name, limit=1024)
    assert time.thread_time() - begin < 2
    assert caught.value.code == "QP-CFG-FILE"
    assert caught.value.where == str(odd_files / name)
    assert words in caught.value.what
    assert caught.value.expected == "a regular JSON file of at most 1 KiB"
    assert caught.value.fix
    assert os.path.lexists(odd_files / name) or name in ("missing", "x" * 300)


def test_an_unreadable_file_is_refused(tmp_path):
    path = tmp_path / "secret.json"
    path.write_bytes(GOOD)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        read_json(path)


def test_a_file_is_read_through_a_link_and_named_as_asked(tmp_path):
    (tmp_path / "real.json").write_bytes(b'{"bits": }')
    (tmp_path / "link.json").symlink_to("real.json")
    with pytest.raises(ConfigError) as caught:
        read_json(tmp_path / "link.json", where="config.json")
    assert caught.value.where == "config.json"
    (tmp_path / "real.json").write_bytes(GOOD)
    assert read_json(str(tmp_path / "link.json")) == {"bits": 4}


FIELDS = {
    "bits": 4, "flag": True, "ratio": 3.0, "text": "4", "names": ["a", "b"], "mixed": ["a", 1],
    "rules": {"z": 1, "a": 2}, "null": None, "minus": -1,
}  # fmt: skip


def test_fields_of_the_right_type_are_returned_as_they_are():
    assert get_int(FIELDS, "bits", "o", choices=(2, 4)) == 4
    assert get_int(FIELDS, "minus", "o", minimum=-1, maximum=10) == -1
    assert get_bool(FIELDS, "flag", "o") is True
    assert get_str(FIELDS, "text", "o", choices=("4", "8")) == "4"
    assert get_list_of_str(FIELDS, "names", "o") == ("a", "b")
    assert list(get_mapping(FIELDS, "rules", "o")) == ["z", "a"]


def test_defaults_stand_in_for_absent_fields_only():
    assert get_int({}, "bits", "o", default=0) == 0
    assert get_bool({}, "flag", "o", default=False) is False
    assert get_str({}, "text", "o", default="") == ""
    assert get_list_of_str({}, "names", "o", default=()) == ()
    assert get_mapping({}, "rules", "o", default={}) == {}
    with pytest.raises(ConfigError, match="null is null"):
        get_int(FIELDS, "null", "o", default=0)


@pytest.mark.parametrize(
    ("get", "key", "words", "expected"),
    [
        (get_int, "flag", "flag is true", "an integer"),
        (get_int, "ratio", "ratio is the number 3.0", "an integer"),
        (get_int, "text", "text is the string '4'", "an integer"),
        (get_int, "null", "null is null", "an integer"),
        (get_int, "absent", "absent is missing", "an integer"),
        (get_bool, "bits", "bits is the integer 4", "true or false"),
        (get_bool, "text", "text is the string '4'", "true or false"),
        (get_bool, "absent", "absent is missing", "true or false"),
        (get_str, "bits", "bits is the integer 4", "a string"),
        (get_str, "names", "names is a list of 2", "a string"),
        (get_list_of_str, "text", "text is the string '4'", "a list of strings"),
        (get_list_of_str, "mixed", "mixed[1] is the integer 1", "a string"),
        (get_list_of_str, "absent", "absent is missing", "a list of strings"),
        (get_mapping, "names", "names is a list of 2", "an object"),
        (get_mapping, "absent", "absent is missing", "an object"),
    ],
)
def test_fields_of_another_type_are_refused_in_plain_words(get, key, words, expected):
    with pytest.raises(ConfigError) as caught:
        get(FIELDS, key, "config.json: quantization_config.x")
    error = caught.value
    assert (error.code, error.where) == ("QP-CFG-FIELD", "config.json: quantization_config.x")
    assert (error.what, error.expected) == (words, expected)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"choices": (2, 8)}, "an integer, one of 2, 8"),
        ({"minimum": 5}, "an integer, at least 5"),
        ({"maximum": 3}, "an integer, at most 3"),
        ({"minimum": 8, "maximum": 9}, "an integer, at least 8, at most 9"),
    ],
)
def test_integers_out_of_range_are_refused_with_the_range(limits, expected):
    with pytest.raises(ConfigError) as caught:
        get_int(FIELDS, "bits", "o", **limits)
    assert (caught.value.what, caught.value.expected) == ("bits is the integer 4", expected)


def test_a_string_that_is_no_choice_is_refused_and_cut_to_a_line():
    with pytest.raises(ConfigError) as caught:
        get_str({"format": "x" * 500}, "format", "o", choices=("gptq", "gptq_v2"))
    assert caught.value.expected == "one of 'gptq', 'gptq_v2'"
    assert len(caught.value.what) < 100
