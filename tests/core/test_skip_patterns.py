"""
Expressions out of files: what real ones say is accepted, what could run without bound is refused before it runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from quantplug.errors import CheckpointError, ConfigError
from quantplug.patterns import MAX_NAME, MAX_PATTERN, MAX_STEPS, check_name, compile_glob, examine, vet
from quantplug.ruleindex import RuleIndex
from quantplug.skip import Entry, EntryKind

REAL = [
    r".*self_attn.*",
    r".*\.[qkv]_proj$",
    r".*\.q_proj$",
    r".*\.(?:1[0-5])\..*",
    r".*mlp\.(gate|up|gate_up|down)_proj.*",
    r".*layers\.0\..*",
    r".*\.moe\..*",
    r".*lm_head",
    r"vision_tower.*",
    r"model\.layers\.1",
    r"^model\.layers\.0\.self_attn\.q_proj$",
    r"^(?!.*lm_head).*$",
    r"^(?!.*(?:lm_head|embed))(?=.*layers).*proj$",
    r"^((?!experts).)*$",
    r".*layers.*mlp.*experts.*down_proj.*",
    r".*language_model.*layers.*self_attn.*q_proj.*",
    r".*layers\.(0|1|2|3|10|11|12|59|60)\..*mlp.*(gate|up|down)_proj",
    r"model\.layers\.([0-9]|[1-5][0-9])\.self_attn\.(q|k|v|o)_proj",
    r"(?:model\.)?(?:language_model\.)?layers\.\d+\..*",
    r"(?:[a-z0-9_]+\.)*down_proj",
    r".*experts\.\d+\.(gate|up|down)_proj",
    r"model\.layers\.(?:[0-9]|1[0-9])\.(?P<part>mlp|self_attn)\..*",
    r".*.*.*.*.*X",
    r".*",
]

HOSTILE = {
    r"model.*\.(a+)+$": "in several ways",
    r"(([a-z_0-9])+\.?)+X$": "in several ways",
    r"(a|a)*b": "in several ways",
    r"(a|aa)+$": "in several ways",
    r"(x+x+)+y": "in several ways",
    r"(\w+\s?)*$": "in several ways",
    r"^(([a-z])+.)+[A-Z]([a-z])+$": "in several ways",
    r"(a|b|ab)*c": "in several ways",
    r"(?!(a+)+$)b": "in several ways",
    r"(?=(a|a)*b)": "in several ways",
    r"(.*)*X": "what may be empty",
    r"(a*)+b": "what may be empty",
    r"(a?|b)*c": "what may be empty",
    r"(?:a|)*b": "what may be empty",
    r"(a)\1": "refers back to a group",
    r"(?P<n>a)(?P=n)": "refers back to a group",
    r"(a)?(?(1)b|c)": "depends on whether a group matched",
    r"(?i)lm_head": "sets flags",
    r"(?x) a b": "sets flags",
    r"(?i:lm)_head": "sets flags",
    r"(?-i:lm)_head": "sets flags",
    r"a++b": "uses possessive repeat",
    r"[a-z]*[a-z0-9]*[a-z_]*\w*X": "steps on one name",
    r".*(.*.*.*)x": "steps on one name",
    r".*(?!.*[ab].*[bc].*[cd]x)X": "steps on one name",
    r"(.*a){20}": "steps on one name",
    r"(a?){25}a{25}": "steps on one name",
    "a?" * 60 + "a" * 60: "steps on one name",
    r"((a{0,100}){0,100}){0,100}": "steps on one name",
    r"(?:(?:a|a){0,60}){0,60}b": "steps on one name",
}


@pytest.mark.parametrize("pattern", REAL)
@pytest.mark.parametrize("mode", ["match", "fullmatch"])
def test_what_real_configurations_say_is_accepted(pattern, mode):
    assert examine(pattern, "config.json", mode).steps <= MAX_STEPS


@pytest.mark.parametrize(("pattern", "reason"), HOSTILE.items(), ids=lambda text: str(text)[:24])
@pytest.mark.parametrize("mode", ["match", "fullmatch", "search"])
def test_what_could_run_without_bound_is_refused_at_once(pattern, reason, mode):
    """The refusal names the pattern, where it stands, and why; and takes no time itself."""
    started = time.thread_time()
    with pytest.raises(ConfigError) as error:
        vet(pattern, "config.json: quantization_config.ignore[3]", mode)
    assert time.thread_time() - started < 0.5
    assert error.value.code == "QP-SKIP-PATTERN"
    assert error.value.where == "config.json: quantization_config.ignore[3]"
    assert reason in error.value.what
    assert repr(pattern) in error.value.what
    assert str(MAX_NAME) in error.value.expected
    assert "without nested or overlapping repetitions" in error.value.fix
    assert vet("lm_head", "caller").match("lm_head"), "a good pattern afterwards works"


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("(a", "malformed at position 0: missing ), unterminated subpattern"),
        ("a)", "malformed at position 1: unbalanced parenthesis"),
        ("[a", "malformed at position 0: unterminated character set"),
        ("*.mlp", "malformed at position 0: nothing to repeat"),
        ("a**", "malformed at position 2: multiple repeat"),
        ("a{3,2}", "malformed at position 2: min repeat greater than max repeat"),
        ("\\", "malformed at position 0: bad escape (end of pattern)"),
        ("(?P<1>a)", "malformed at position 4: bad character in group name"),
        ("(?<=a*)b", "malformed: look-behind requires fixed-width pattern"),
        ("a(?i)b", "malformed at position 1: global flags not at the start of the expression"),
        ("a{99999999999999}", "malformed: the repetition number is too large"),
        ("[[a]b]", "malformed: Possible nested set at position 1"),
    ],
)
def test_malformed_expressions_are_refused_with_the_position(pattern, what):
    with pytest.raises(ConfigError) as error:
        vet(pattern, "here")
    assert error.value.code == "QP-SKIP-PATTERN"
    assert what in error.value.what
    assert "re module" in error.value.expected


def test_a_pattern_has_a_longest_length():
    vet("a" * MAX_PATTERN, "here")
    compile_glob("a" * MAX_PATTERN, "here")
    for read in (vet, compile_glob):
        with pytest.raises(
            ConfigError, match=r"here: a pattern of 257 characters \('aaaa.*at most 256.*QP-SKIP-PATTERN"
        ):
            read("a" * (MAX_PATTERN + 1), "here")


def test_a_pattern_is_text():
    with pytest.raises(ConfigError, match=r"here: a pattern is of type bytes; expected text \[QP-SKIP-PATTERN\]"):
        vet(b"lm_head", "here")


@pytest.mark.parametrize(("name", "what"), [("m" * 513, "513 characters"), ("a\nb", "control"), ("a\x00b", "control")])
def test_module_names_are_limited_too(name, what):
    """The bound on a pattern's time holds for names of limited length only."""
    check_name("m" * MAX_NAME)
    with pytest.raises(CheckpointError) as error:
        check_name(name)
    assert error.value.code == "QP-ST-NAME"
    assert what in error.value.what
    assert len(str(error.value)) < 300


def test_expressions_without_gaps_are_compiled_as_they_are():
    assert vet(r"model\.layers\.[0-9]+", "here").pattern == r"model\.layers\.[0-9]+"


ADVERSARIAL = r"""
import sys, time
from quantplug.errors import ConfigError
from quantplug.patterns import examine
real = sys.argv[1].split("\x01")
names = [f"model.language_model.layers.{l}.mlp.experts.{e}.{p}_proj"
         for l in range(60) for e in range(256) for p in ("gate", "up", "down")]
assert len(names) == 46080
for pattern in real:
    accepts = examine(pattern, "test").accepts
    started = time.process_time()
    for name in names:
        accepts(name)
    took = time.process_time() - started
    assert took < 5, (pattern, took)
# The costliest accepted patterns, each on texts made to fit it, on names as long as they may be.
fitting = ["a" * 512, "." * 512, "ab" * 256, "a." * 256, "layers.0." * 28 + "mlp" * 40 + "gate" * 30, "aA_0." * 102]
costly = [r"[a-c]*[a-d]*[a-e]*X", r"[a-z]*[a-z0-9]*X", r".*(\w+\.){0,9}x", r".*(a|b|c)*x", r"(a?){20}a{20}",
          r".*(?!.*[ab].*X)X", r".*(?:a|aa)[ab]*x", r"(?:[a-z]+\.)*X", r".*(gate|up)?(_|p)*(x|y)"]
accepted = 0
for pattern in real + costly:
    for mode in ("match", "fullmatch", "search"):
        try:
            accepts = examine(pattern, "test", mode).accepts
        except ConfigError:
            continue
        accepted += 1
        for name in fitting:
            started = time.process_time()
            accepts(name)
            took = time.process_time() - started
            assert took < 2, (pattern, mode, name[:10], took)
assert accepted > 75, accepted
print("done")
"""


def test_every_accepted_pattern_ends_in_bounded_time():
    """On 46,080 names as a large model has, and on the worst names; in a process that is killed if it hangs."""
    done = subprocess.run(
        [sys.executable, "-c", ADVERSARIAL, "\x01".join(REAL)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("below", [False, True])
def test_globs_take_linear_time(below):
    accepts = compile_glob("*a" * 100 + "b", "here", below=below).accepts
    started = time.thread_time()
    assert not accepts("a" * MAX_NAME)
    assert time.thread_time() - started < 0.5


def test_matching_as_a_whole_has_a_time_limit():
    """Many costly patterns, each bounded, stop with an error; a fresh index then works."""
    entries = [Entry(p, EntryKind.REGEX, p, "here") for p in (r"[a-c]*[a-d]*[XY]", r"[a-c]*[a-d]*[a-e]{0,99}X")]
    index = RuleIndex(entries, seconds=0.05)
    started = time.thread_time()
    with pytest.raises(ConfigError) as error:
        all(index.hits("abc" * 60 + str(number)) == [] for number in range(10_000))
    assert time.thread_time() - started < 10
    assert error.value.code == "QP-SKIP-PATTERN"
    assert re.fullmatch(r"after [\d,]+ module names", error.value.where)
    assert "matching has taken 0.05 s; the costliest of 2 patterns is '[a-c]*[a-d]*[a-e]{" in error.value.what
    assert "paths in their place" in error.value.fix
    assert RuleIndex(entries).hits("lm_head") == []
