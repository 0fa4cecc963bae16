"""
Broken configurations: each refused with its code and both sides, nothing touched, and a good one read afterwards.
"""

from __future__ import annotations

import os
import time

import pytest
from config_plugins import Raiser, Recorder, registry_of, write_files

from quantplug.config import resolve_config
from quantplug.errors import ConfigError, PluginError
from quantplug_testkit.checkpoints import fingerprint

MAIN = {"quant_method": "abc", "bits": 4}
SECTION = "config.json: quantization_config"
REGISTRY = registry_of(
    Recorder("abc", ("abc", "abc_fast"), ("abc_config.json", "shared_config.json")),
    Recorder("xyz", ("xyz", "common"), ("shared_config.json",)),
    Recorder("also", ("also", "common")),
)


def section(**fields):
    return {"config_json": {"quantization_config": fields}}


def method(value):
    return section(quant_method=value, bits=4)


GRAMMAR = "1 to 64 letters"
# What is broken -> files, override, code, and words of where, what, expected and fix.
BROKEN = {
    "config.json missing": ({}, None, "QP-CFG-FILE", "config.json", "does not exist", "regular JSON file", "path"),
    "config.json empty": ({"config_json": b""}, None, "QP-CFG-JSON", "config.json", "is empty", "JSON", "again"),
    "config.json cut": (
        {"config_json": b'{"quantization_config": {'}, None, "QP-CFG-JSON", "config.json", "too early", "JSON", "again"
    ),
    "config.json a list": ({"config_json": []}, None, "QP-CFG-FIELD", "config.json", "a list of 0", "an object", ""),
    "bits twice": (
        {"config_json": b'{"quantization_config": {"quant_method": "abc", "bits": 4, "bits": 8}}'},
        None, "QP-CFG-DUPLICATE", "config.json", "'bits' twice", "once", "Correct the file",
    ),
    "NaN": (
        {"config_json": b'{"quantization_config": {"damp": NaN}}'}, None, "QP-CFG-NUMBER", "config.json", "NaN",
        "finite", "Correct the file",
    ),
    "section a string": (
        {"config_json": {"quantization_config": "abc"}}, None, "QP-CFG-FIELD", SECTION, "the string 'abc'", "object", ""
    ),
    "text section a list": (
        {"config_json": {"text_config": {"quantization_config": [1]}}}, None, "QP-CFG-FIELD",
        "config.json: text_config.quantization_config", "a list of 1", "an object", "",
    ),
    "own file a list": (
        {"config_json": {}, "abc_config_json": [1]}, None, "QP-CFG-FIELD", "abc_config.json", "a list", "object", ""
    ),
    "own file broken": (
        section(**MAIN) | {"abc_config_json": b"{"}, None, "QP-CFG-JSON", "abc_config.json", "line 1", "JSON", "Correct"
    ),
    "no method": (
        section(bits=4, group_size=64), None, "QP-CFG-METHOD", SECTION, "has no quant_method, only bits, group_size",
        "abc, abc_fast, also, common, xyz", "override={'quant_method': ...}",
    ),
    "no method in a shared file": (
        {"config_json": {}, "shared_config_json": {"bits": 4}}, None, "QP-CFG-METHOD", "shared_config.json",
        "has no quant_method", "abc", "override",
    ),
    "method unknown": (
        method("abd"), None, "QP-CFG-METHOD", f"{SECTION}.quant_method", "no installed plugin reads quant_method 'abd'",
        "abc (plug-abc)", "Did you mean 'abc'? Install",
    ),
    "method dotted": (method("os.system"), None, "QP-CFG-METHOD", SECTION, "'os.system'", "abc (plug-abc)", "Install"),
    "method a path": (method("../evil"), None, "QP-CFG-METHOD", SECTION, "'../evil'", GRAMMAR, ""),
    "method a repository": (method("owner/repo"), None, "QP-CFG-METHOD", SECTION, "'owner/repo'", GRAMMAR, ""),
    "method an address": (method("https://evil"), None, "QP-CFG-METHOD", SECTION, "'https://evil'", "never a path", ""),
    "method empty": (method(""), None, "QP-CFG-METHOD", SECTION, "the string ''", GRAMMAR, ""),
    "method long": (method("a" * 65), None, "QP-CFG-METHOD", SECTION, "'aaaa", GRAMMAR, ""),
    "method with a space": (method("abc "), None, "QP-CFG-METHOD", SECTION, "'abc '", GRAMMAR, ""),
    "method with a line end": (method("abc\n"), None, "QP-CFG-METHOD", SECTION, "'abc\\n'", GRAMMAR, ""),
    "method a number": (method(4), None, "QP-CFG-METHOD", SECTION, "the integer 4", GRAMMAR, ""),
    "method null": (method(None), None, "QP-CFG-METHOD", SECTION, "null", GRAMMAR, ""),
    "own file contradicts": (
        section(**MAIN) | {"abc_config_json": {"bits": 8}}, None, "QP-CFG-CONTRADICTION", "abc_config.json: bits",
        f"is 8, while {SECTION}.bits is 4", "the same in both places", "correct or remove",
    ),
    "own file names another method": (
        section(**MAIN) | {"abc_config_json": {"quant_method": "xyz"}}, None, "QP-CFG-CONTRADICTION",
        "abc_config.json: quant_method", f"is 'xyz', while {SECTION}.quant_method is 'abc'", "the same", "correct",
    ),
    "true is not 1": (
        section(**MAIN, sym=True) | {"abc_config_json": {"sym": 1}}, None, "QP-CFG-CONTRADICTION",
        "abc_config.json: sym", f"is 1, while {SECTION}.sym is True", "the same", "correct",
    ),
    "rules differ": (
        section(**MAIN, dynamic={"a": {"bits": 2}}) | {"abc_config_json": {"dynamic": {"a": {"bits": 3}}}}, None,
        "QP-CFG-CONTRADICTION", "abc_config.json: dynamic", "an object with 1 keys", "the same", "correct",
    ),
    "lists differ": (
        section(**MAIN, skip=["a", "b"]) | {"abc_config_json": {"skip": ["b", "a"]}}, None, "QP-CFG-CONTRADICTION",
        "abc_config.json: skip", "a list of 2", "the same", "correct",
    ),
    "two sections contradict": (
        {"config_json": {"quantization_config": MAIN, "compression_config": {"bits": 3}}}, None, "QP-CFG-CONTRADICTION",
        "config.json: compression_config.bits", f"is 3, while {SECTION}.bits is 4", "the same", "correct",
    ),
    "text section contradicts": (
        {"config_json": {"quantization_config": MAIN, "text_config": {"quantization_config": {"bits": 3}}}}, None,
        "QP-CFG-CONTRADICTION", "text_config.quantization_config.bits", "is 3, while", "the same", "remove",
    ),
    "caller contradicts": (
        section(**MAIN), {"bits": 8}, "QP-CFG-OVERRIDE", "caller", f"bits is 8, while {SECTION}.bits is 4",
        "the value of the file", "Drop bits from the override",
    ),
    "caller contradicts the method": (
        section(**MAIN), {"quant_method": "xyz"}, "QP-CFG-OVERRIDE", "caller", "quant_method is 'xyz', while",
        "the value of the file", "Drop quant_method",
    ),
    "caller gives no JSON": (
        section(**MAIN), {"skip": ("a",)}, "QP-CFG-OVERRIDE", "caller", "skip is ('a',)", "a plain JSON value", ""
    ),
    "caller wants a dense file quantized": (
        {"config_json": {}}, {"quant_method": "abc", "bits": 4}, "QP-CFG-OVERRIDE", "caller",
        "bits, quant_method given for a checkpoint whose config.json names no quantization", "the weights are dense",
        "quantize them while loading",
    ),
    "a file that nobody reads": (
        {"config_json": {}, "hf_quant_config_json": {"quantization": {}}}, None, "QP-CFG-METHOD",
        "hf_quant_config.json", "describes a quantization that config.json does not",
        "dense weights without hf_quant_config.json", "Install",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_configuration_is_refused_with_both_sides(tmp_path, case):
    files, override, code, where, what, expected, fix = BROKEN[case]
    bad = write_files(tmp_path / "bad", **files)
    before, begin = fingerprint(tmp_path), time.thread_time()
    with pytest.raises(ConfigError) as caught:
        resolve_config(bad, REGISTRY, override=override)
    assert time.thread_time() - begin < 2
    assert fingerprint(tmp_path) == before
    error = caught.value
    assert error.code == code
    assert where in error.where
    assert what in error.what
    assert expected in error.expected
    assert fix in error.fix
    assert str(error).isprintable()
    good = write_files(tmp_path / "good", config_json={"quantization_config": MAIN})
    assert resolve_config(good, REGISTRY).dialect == "abc"


@pytest.mark.parametrize("name", ["config.json", "abc_config.json"])
@pytest.mark.parametrize("kind", ["directory", "pipe", "dangling link", "too large"])
def test_a_configuration_that_is_no_ordinary_file_is_refused_without_waiting(tmp_path, name, kind):
    write_files(tmp_path, config_json={"quantization_config": MAIN})
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to("gone.json")
    else:
        path.touch()
        os.truncate(path, 1 << 30)
    begin = time.thread_time()
    with pytest.raises(ConfigError) as caught:
        resolve_config(tmp_path, REGISTRY)
    assert time.thread_time() - begin < 2
    assert (caught.value.code, caught.value.where) == ("QP-CFG-FILE", str(path))


def test_a_method_that_two_plugins_claim_is_an_error_that_names_both(tmp_path):
    write_files(tmp_path, **method("common"))
    with pytest.raises(PluginError) as caught:
        resolve_config(tmp_path, REGISTRY)
    assert caught.value.code == "QP-PLUG-CONFLICT"
    assert "plug-also" in str(caught.value)
    assert "plug-xyz" in str(caught.value)


def test_an_unknown_method_shows_which_plugins_failed(tmp_path):
    registry = registry_of(Recorder("abc", ("abc",)), Recorder("broken", ("NOT A METHOD",)))
    assert registry.failures
    write_files(tmp_path, **method("broken"))
    with pytest.raises(ConfigError, match="plug-broken"):
        resolve_config(tmp_path, registry)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (ValueError("boom"), "ValueError: boom"),
        (SystemExit(0), "SystemExit"),
        (RecursionError(), "RecursionError"),
        (None, "it returned NoneType, not QuantConfig"),
        ({"bits": 4}, "it returned dict, not QuantConfig"),
    ],
)
def test_a_dialect_that_fails_is_named_and_the_process_lives_on(tmp_path, answer, words):
    registry = registry_of(Raiser("bad", answer), Recorder("abc", ("abc",)))
    bad = write_files(tmp_path / "bad", **method("bad"))
    with pytest.raises(PluginError) as caught:
        resolve_config(bad, registry)
    assert (caught.value.code, caught.value.where) == ("QP-PLUG-CALL", "dialect bad of plug-bad")
    assert words in caught.value.what
    assert "config.json: quantization_config" in caught.value.what
    good = write_files(tmp_path / "good", **section(**MAIN))
    assert resolve_config(good, registry).dialect == "abc"


def test_what_a_dialect_refuses_on_purpose_stays_its_own_error(tmp_path):
    refusal = ConfigError("QP-CFG-REFUSED", "here", "is not supported")
    write_files(tmp_path, **method("bad"))
    with pytest.raises(ConfigError) as caught:
        resolve_config(tmp_path, registry_of(Raiser("bad", refusal)))
    assert caught.value is refusal
