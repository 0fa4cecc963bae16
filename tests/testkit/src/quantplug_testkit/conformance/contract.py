"""
What a kernel says about itself and about problems.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from unittest import mock

from quantplug.kernel import Accepted, Rejected, Traits
from quantplug_testkit.bounds import ACCUMULATOR
from quantplug_testkit.conformance.asked import Asked
from quantplug_testkit.conformance.platforms import DTYPES, PLATFORMS

if TYPE_CHECKING:
    from types import ModuleType

    from quantplug.kernel import Verdict
    from quantplug.platform import Platform

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")

# every way a kernel is known to look at the machine that it runs on
_LOOKS = (
    "os.cpu_count",
    "os.getenv",
    "platform.machine",
    "platform.processor",
    "platform.system",
    "builtins.open",
    "torch.get_num_threads",
    "torch.backends.cpu.get_cpu_capability",
    "torch.cuda.is_available",
    "torch.cuda.device_count",
    "torch.cuda.get_device_capability",
    "torch.cuda.get_device_properties",
)


class ContractTests(Asked):
    """`supports`, `probe` and the class attributes."""

    def test_name_layout_and_traits_are_well_formed(self) -> None:
        """The kernel has a name, a layout and traits that others can refer to."""
        for attribute in ("name", "layout_id"):
            value = getattr(self.kernel, attribute, None)
            assert isinstance(value, str), f"{attribute} is {value!r}, not a str"
            assert _NAME.fullmatch(value), f"{attribute} {value!r} is not of the form {_NAME.pattern}"
        assert isinstance(self.kernel.traits, Traits), f"traits is {self.kernel.traits!r}, not a Traits"

    def test_supports_answers_every_question(self) -> None:
        """`supports` gives a verdict on any problem and any platform; it never raises."""
        for platform in (self.platform, *PLATFORMS):
            for problem in self.questions():
                verdict = self._ask(problem, platform)
                assert isinstance(verdict, (Accepted, Rejected)), (
                    f"supports({problem}, {platform}) returns {verdict!r}, neither Accepted nor Rejected"
                )

    def test_supports_gives_the_same_answer_every_time(self) -> None:
        """A verdict does not depend on what was asked before."""
        questions = [(problem, platform) for platform in (self.platform, *PLATFORMS) for problem in self.questions()]
        first = [self._ask(*question) for question in questions]
        backwards = [self._ask(*question) for question in reversed(questions)]
        for question, one, other in zip(questions, first, reversed(backwards), strict=True):
            assert one == other, f"asked twice about {question[0]} on {question[1]}: first {one}, then {other}"

    def test_supports_does_not_look_at_the_machine(self) -> None:
        """Any machine can plan for any platform: no look at processor, devices, environment or files."""
        with ExitStack() as stack:
            watched = {}
            for name in _LOOKS:
                module, function = name.rsplit(".", 1)
                original = getattr(_module(module), function)
                watched[name] = stack.enter_context(mock.patch(name, side_effect=original))
            for platform in (self.platform, *PLATFORMS):
                for problem in self.questions():
                    self._ask(problem, platform)
            called = [name for name, watcher in watched.items() if watcher.called]
        assert not called, f"supports calls {', '.join(called)}"

    def test_supports_imports_nothing_foreign(self) -> None:
        """Asking loads no vendor package."""
        before = set(sys.modules)
        for problem in self.questions():
            self._ask(problem, self.platform)
        own = type(self.kernel).__module__.partition(".")[0]
        loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
        foreign = sorted(
            name for name in loaded if name not in sys.stdlib_module_names and name not in {own, "quantplug"}
        )
        assert not foreign, f"supports imports {', '.join(foreign)}"

    def test_accepting_is_well_formed(self) -> None:
        """An acceptance carries a finite cost, known casts and a byte count."""
        for problem in self.questions():
            verdict = self._ask(problem, self.platform)
            if not isinstance(verdict, Accepted):
                continue
            about = f"for {problem}: {verdict}"
            costs = (verdict.cost.fixed_us, verdict.cost.row_us)
            assert all(math.isfinite(cost) and cost >= 0 for cost in costs), f"cost is not finite and >= 0 {about}"
            assert sum(costs) > 0, f"a call that costs nothing {about}"
            names = [cast.what for cast in verdict.casts]
            assert set(names) <= set(self.known_casts), f"casts other than {', '.join(self.known_casts)} {about}"
            assert len(set(names)) == len(names), f"a cast declared twice {about}"
            dtypes = {cast.dtype for cast in verdict.casts}
            assert dtypes <= {*DTYPES, ACCUMULATOR}, f"a cast to an unknown dtype {about}"
            assert isinstance(verdict.extra_bytes, int) and verdict.extra_bytes >= 0, f"extra_bytes {about}"  # noqa: PT018
            assert not verdict.quantizes_x or problem.activation is not None, f"quantizes x without permission {about}"
            assert all(isinstance(note, str) and note for note in verdict.notes), f"notes are not texts {about}"

    def test_refusing_names_the_offending_value(self) -> None:
        """A refusal has a stable code and a reason that contains the value that does not fit."""
        for platform in (self.platform, *PLATFORMS):
            for problem in self.questions():
                verdict = self._ask(problem, platform)
                if isinstance(verdict, Rejected):
                    self._check_refusal(verdict, problem, platform)

    def test_accepts_something_on_its_platform(self) -> None:
        """A kernel that refuses the whole catalogue is tested by nothing."""
        assert self.accepted(), f"{self.kernel.name} accepts no problem of the catalogue on {self.platform}"

    def test_probe_passes_on_this_machine(self) -> None:
        """What the platform promises is there."""
        refusal = self.kernel.probe(self.platform)
        assert refusal is None, f"probe({self.platform}) refuses: {refusal}"

    def _ask(self, problem: Any, platform: Platform) -> Verdict:
        return self.kernel.supports(problem, platform)

    def _check_refusal(self, verdict: Rejected, problem: Any, platform: Platform) -> None:
        about = f"for {problem} on {platform}: {verdict}"
        assert verdict.code in self.reasons, f"a code other than {', '.join(self.reasons)} {about}"
        assert isinstance(verdict.fix, str), f"fix is not a text {about}"
        values = self.offending(verdict.code, problem, platform)
        assert any(re.search(rf"(?<![\w.]){re.escape(value)}(?![\w])", verdict.reason) for value in values), (
            f"the reason contains none of {', '.join(sorted(values)) or 'the values'} {about}"
        )


def _module(name: str) -> ModuleType:
    return importlib.import_module(name)
