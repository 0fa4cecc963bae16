"""
The error classes: what they say, and what programs can rely on.
"""

from __future__ import annotations

import json
import pickle
import re

import pytest

from quantplug import errors
from quantplug.errors import CODES, ConfigError, PluginError, QuantplugError

CLASSES = [thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, QuantplugError)]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({}, "config.json: bits is 5 [QP-CFG-FIELD]"),
        ({"expected": "2, 3, 4 or 8"}, "config.json: bits is 5; expected 2, 3, 4 or 8 [QP-CFG-FIELD]"),
        ({"fix": "Ask its maker"}, "config.json: bits is 5. Ask its maker [QP-CFG-FIELD]"),
        (
            {"expected": "2, 3, 4 or 8", "fix": "Ask its maker"},
            "config.json: bits is 5; expected 2, 3, 4 or 8. Ask its maker [QP-CFG-FIELD]",
        ),
    ],
)
def test_a_message_says_where_what_what_else_and_what_to_do(more, text):
    assert str(ConfigError("QP-CFG-FIELD", "config.json", "bits is 5", **more)) == text


def test_the_parts_are_attributes_and_json():
    error = PluginError("QP-PLUG-MISSING", "scheme 'x'", "is missing", expected="y", fix="z")
    assert (error.code, error.where, error.what) == ("QP-PLUG-MISSING", "scheme 'x'", "is missing")
    assert (error.expected, error.fix) == ("y", "z")
    assert json.loads(json.dumps(error.to_json())) == {
        "code": "QP-PLUG-MISSING", "where": "scheme 'x'", "what": "is missing", "expected": "y", "fix": "z",
    }  # fmt: skip


def test_an_undeclared_code_is_a_programming_error():
    with pytest.raises(ValueError, match="undeclared error code 'QP-NEW'"):
        QuantplugError("QP-NEW", "here", "something")


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_errors_cross_process_borders_whole(kind):
    """Worker processes and ranks hand their errors over by pickling."""
    error = kind("QP-CFG-FIELD", "a", "b", expected="c", fix="d")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.to_json()) == (str(error), error.to_json())


def test_codes_are_uniform_and_cannot_be_changed():
    assert all(re.fullmatch(r"QP-[A-Z]+-[A-Z]+", code) for code in CODES)
    assert all(text and not text.endswith(".") for text in CODES.values())
    with pytest.raises(TypeError):
        CODES["QP-NEW-CODE"] = "x"
