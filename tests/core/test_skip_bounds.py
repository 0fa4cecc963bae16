"""
The bound on a backtracking matcher's steps, against a backtracking matcher that counts them.

The twin below is the textbook algorithm over the parse tree of the standard library; it shares nothing with the
analysis. Every pattern that the analysis accepts has to take no more comparisons than it says, on any text.
"""

from __future__ import annotations

import re
from re import _constants as ops
from re import _parser as parser

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from quantplug.backtracking import worst_steps
from quantplug.errors import ConfigError
from quantplug.patterns import examine
from quantplug.regextree import UnboundedError, parse

ATOMS = [
    "a", "b", "ab", "aa", "aba", ".", "[ab]", "[^a]", r"\.", r"\w", r"[^\w]", r"\d",
    "a*", "b+", ".*", ".*?", "[ab]*", "[^b]+",
]  # fmt: skip
EDGES = ["^", "$", r"\b", r"\Z", ""]


def grow(inner):
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{0,3}", "{1,2}?"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
        inner.map(lambda body: f"(?={body})"),
        inner.map(lambda body: f"(?!{body})"),
        inner.map(lambda body: f"(?>{body})"),
    )


PATTERNS = st.recursive(st.sampled_from(ATOMS + EDGES), grow, max_leaves=7)
TEXTS = st.text("ab.1", max_size=9)


class Twin:
    """Match by backtracking; `comparisons` counts the characters looked at."""

    def __init__(self, pattern, text):
        self.text, self.comparisons = text, 0
        self.tree = parser.parse(pattern)

    def match(self, *, whole=False):
        return self.run(list(self.tree), 0, lambda at: not whole or at == len(self.text))

    def run(self, items, at, then):
        if not items:
            return then(at)
        (op, argument), rest = items[0], items[1:]
        if op in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
            self.comparisons += 1
            return at < len(self.text) and self.char(op, argument, self.text[at]) and self.run(rest, at + 1, then)
        if op is ops.BRANCH:
            return any(self.run([*branch, *rest], at, then) for branch in argument[1])
        if op is ops.SUBPATTERN:
            return self.run([*argument[3], *rest], at, then)
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            return self.repeat(op is ops.MAX_REPEAT, *argument, 0, at, lambda end: self.run(rest, end, then))
        if op in (ops.ASSERT, ops.ASSERT_NOT):
            found = self.run(list(argument[1]), at, lambda end: True)
            return found is (op is ops.ASSERT) and self.run(rest, at, then)
        if op is ops.ATOMIC_GROUP:
            ends = []
            return self.run(list(argument), at, lambda end: ends.append(end) or True) and self.run(rest, ends[0], then)
        if str(op) == "FAILURE":  # `(?!)` since Python 3.13
            return False
        assert op is ops.AT
        return self.edge(argument, at) and self.run(rest, at, then)

    def repeat(self, greedy, least, most, body, done, at, then):
        def more():
            def again(end):
                if end == at and done >= least:
                    return then(end)  # an iteration that took nothing is the last one
                return self.repeat(greedy, least, most, body, done + 1, end, then)

            return (most is ops.MAXREPEAT or done < most) and self.run(list(body), at, again)

        def leave():
            return done >= least and then(at)

        return (more() or leave()) if greedy else (leave() or more())

    @staticmethod
    def char(op, argument, char):
        if op is ops.ANY:
            return char != "\n"
        if op is ops.IN:
            negated = argument[0][0] is ops.NEGATE
            return negated != any(Twin.member(*item, char) for item in argument[negated:])
        return (chr(argument) == char) is (op is ops.LITERAL)

    @staticmethod
    def member(op, argument, char):
        if op is ops.LITERAL:
            return chr(argument) == char
        word = char.isalnum() or char == "_"
        return {
            ops.CATEGORY_WORD: word, ops.CATEGORY_NOT_WORD: not word, ops.CATEGORY_DIGIT: char.isdigit(),
        }[argument]  # fmt: skip

    def edge(self, kind, at):
        size = len(self.text)
        if kind is ops.AT_BOUNDARY:
            before, after = self.text[:at][-1:], self.text[at:][:1]
            return (before not in ("", ".")) != (after not in ("", "."))
        return at == (0 if kind in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING) else size)


@given(PATTERNS, TEXTS, st.booleans())
@settings(max_examples=700, deadline=None)
@example("(?:a|ab)(?:c|bcd)*", "abab", True)
@example("(a?){3}a{3}", "aaa", True)
@example("(a)*", "", False)
@example("(?>(.*?)?)", "1", True)
@example("(?:(?!)|a)b", "ab", True)
@example(".*a.*a.*b", "aaaaaaaaa", False)
@example("((?!b).)*a", "aaaaaaaaa", False)
@example("(?:a*\\.)*b", "a.aa.aa.", False)
def test_no_text_takes_more_comparisons_than_the_bound_says(pattern, text, whole):
    """The bound holds for the algorithm; and the twin answers as `re` does, so it is that algorithm."""
    try:
        bound = worst_steps(parse(pattern), len(text), whole=whole)
    except UnboundedError:
        assume(False)
    assume(bound < 200_000)  # the twin is slow
    twin = Twin(pattern, text)
    compiled = re.compile(pattern)
    assert bool(twin.match(whole=whole)) is bool((compiled.fullmatch if whole else compiled.match)(text))
    assert twin.comparisons <= bound


@given(PATTERNS, TEXTS, st.sampled_from(["match", "fullmatch", "search"]))
@settings(max_examples=700, deadline=None)
@example("a.*b.*[ab]1.*a", "aabab1ba", "match")
@example("(?:a|ab).*b", "ab", "match")
@example("b|a.*b", "ab", "search")
@example("^a", "ba", "search")
@example(r"[.*]a.*\.*b.*", "*ab", "match")
def test_a_simplified_expression_accepts_the_same_names(pattern, text, mode):
    """What `examine` compiles answers every name as the original expression does in its mode."""
    try:
        vetted = examine(pattern, "test", mode)
    except ConfigError:
        assume(False)
    assert bool(vetted.accepts(text)) is bool(getattr(re.compile(pattern), mode)(text))


@given(PATTERNS, TEXTS)
@settings(max_examples=500, deadline=None)
def test_the_literal_head_starts_every_accepted_name(pattern, text):
    """Names that do not begin with the head need not be asked."""
    try:
        vetted = examine(pattern, "test", "match")
    except ConfigError:
        assume(False)
    if vetted.accepts(text):
        assert text.startswith(vetted.head)


@given(PATTERNS, st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_the_bound_never_falls_when_texts_grow(pattern, length):
    try:
        tree = parse(pattern)
        assert worst_steps(tree, length) <= worst_steps(tree, length + 1)
    except UnboundedError:
        assume(False)
