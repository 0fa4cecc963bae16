r"""
How many steps Python's backtracking matcher can take on an expression, bounded from its parse tree alone.

A backtracking matcher retries whatever follows an element once for every way in which the element can match. So each
element gets two numbers, for one start position in a text of given length: the `ways` it can match (how often what
follows is tried) and the `steps` to exhaust them. In a sequence ways multiply, in a choice they add, and a repeated
group whose body matches in two ways multiplies them once per iteration: that is the exponential case, and refused.
Without refinement `[a-z]+\.` would count as many ways as there are letters; but no letter is a dot, so only the
longest run survives. Hence every element is judged together with the set of characters that may come next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import comb
from typing import TYPE_CHECKING

from quantplug.regextree import (
    ANYTHING,
    END,
    LINE,
    Anchor,
    Chars,
    Choice,
    Cut,
    Look,
    Repeat,
    Run,
    Text,
    UnboundedError,
    union,
)

if TYPE_CHECKING:
    from quantplug.regextree import Expression, Node, Sequence

_SATURATED = 10**30


@dataclass(frozen=True, slots=True)
class _Next:
    """What may come next: the characters, and the steps to find out that the next one is not among them."""

    mask: int
    cost: int


@dataclass(frozen=True, slots=True)
class _Bound:
    ways: int
    steps: int


def worst_steps(expression: Expression, length: int, *, whole: bool = False) -> int:
    """
    Return an upper bound on the steps of matching at the start of any line of up to `length` characters.

    Args:
        expression: what is matched.
        length: characters.
        whole: whether the text has to end where the match ends (`fullmatch`).

    Raises:
        UnboundedError: for repetitions that make the number of ways grow exponentially.

    """
    nodes = expression.nodes
    last = nodes[-1] if nodes else None
    if isinstance(last, Run) and not last.least and (not whole or (last.most is None and last.mask == LINE)):
        nodes = nodes[:-1]  # whoever arrives there has matched
    return length + 1 + _Analysis(length).sequence(nodes, _Next(END, 1)).steps


class _Analysis:
    """Bounds for texts of up to `length` characters."""

    def __init__(self, length: int) -> None:
        self._length = length

    def sequence(self, nodes: Sequence, follow: _Next) -> _Bound:
        if not nodes:
            return _Bound(1, 0)
        follows = [follow]
        for node in reversed(nodes[1:]):
            follows.append(_enter(node, follows[-1]))
        ways, steps, before, runs, others = 1, 0, 0, 0, 1
        for node, after in zip(nodes, reversed(follows), strict=True):
            bound = self._node(node, after)
            steps += ways * bound.steps
            if isinstance(node, Text) and before:
                # After a free run of characters a literal matches only where it occurs, not at every place.
                ways = min(ways, before * (self._length // node.period + 1))
            before = ways if isinstance(node, Run) else 0
            if isinstance(node, Run) and bound.ways > 1:
                runs += 1
            else:
                others *= bound.ways
            # Runs end one after the other: their ends are non-decreasing positions, not any combination of positions.
            ways = min(ways * bound.ways, others * comb(self._length + runs, runs), _SATURATED)
        return _Bound(ways, min(steps, _SATURATED))

    def _node(self, node: Node, follow: _Next) -> _Bound:
        if isinstance(node, Text):
            return _Bound(1, node.length)
        if isinstance(node, (Look, Cut)):
            return _Bound(1, 1 + self.sequence(node.body, _Next(END, 1)).steps)
        if isinstance(node, Choice):
            return self._choice(node, follow)
        if isinstance(node, Run):
            return self._run(node, follow)
        if isinstance(node, Repeat):
            return self._group(node, follow)
        return _Bound(1, 1)

    def _choice(self, node: Choice, follow: _Next) -> _Bound:
        bounds = [self.sequence(branch, follow) for branch in node.branches]
        masks = [_enter_sequence(branch, follow).mask for branch in node.branches]
        # One text starts with one character, so only branches that share a first character add up.
        ways = max(
            sum(bound.ways for bound, mask in zip(bounds, masks, strict=True) if mask >> bit & 1) for bit in range(130)
        )
        return _Bound(max(ways, 1), 1 + sum(bound.steps for bound in bounds))

    def _run(self, node: Run, follow: _Next) -> _Bound:
        taken = self._length if node.most is None else min(node.most, self._length)
        choices = max(taken - node.least, 0) + 1
        if node.mask & follow.mask:
            return _Bound(choices, taken + choices)
        return _Bound(1, taken + choices * (1 + follow.cost))

    def _group(self, node: Repeat, follow: _Next) -> _Bound:
        most = self._length + 1 if node.most is None else node.most
        if node.most is None and node.width == 0:
            raise UnboundedError("repeats without limit what may be empty")
        iterations = min(most, self._length // node.width) if node.width else most
        entry = _enter_sequence(node.body, follow)
        again = _Next(entry.mask | follow.mask, entry.cost + follow.cost) if most > 1 else follow
        body = self.sequence(node.body, again)
        settled = not entry.mask & follow.mask
        once = body.steps + follow.cost + 2
        if body.ways == 1:
            ways = 1 if settled else max(iterations - node.least, 0) + 1
            return _Bound(ways, (iterations + 1) * once)
        if node.most is None:
            raise UnboundedError("repeats without limit what can match the same text in several ways")
        tries = last = 1
        for _ in range(iterations):
            last = last * body.ways
            tries += last
            if tries > _SATURATED:
                return _Bound(_SATURATED, _SATURATED)
        return _Bound(last if settled else tries, tries * once)


def _enter_sequence(nodes: Sequence, follow: _Next) -> _Next:
    return reduce(lambda after, node: _enter(node, after), reversed(nodes), follow)


def _enter(node: Node, follow: _Next) -> _Next:
    """Return what may come next before `node`, given what may come next after it."""
    if isinstance(node, (Text, Chars)):
        return _Next(node.mask, 1)
    if isinstance(node, Anchor):
        return _Next(follow.mask, follow.cost + 1) if node.mask is None else _Next(node.mask, 1)
    if isinstance(node, Look):
        return _Next(ANYTHING, 0)  # every character "may" come next, so nobody relies on the cost of failing here
    if isinstance(node, Cut):
        return _enter_sequence(node.body, follow)
    if isinstance(node, Choice):
        entries = [_enter_sequence(branch, follow) for branch in node.branches]
        return _Next(union(entry.mask for entry in entries), 1 + sum(entry.cost for entry in entries))
    entry = _Next(node.mask, 1) if isinstance(node, Run) else _enter_sequence(node.body, follow)
    if node.least:
        return _Next(entry.mask, entry.cost + 1)
    return _Next(entry.mask | follow.mask, entry.cost + follow.cost + 1)
