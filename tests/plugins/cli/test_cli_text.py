"""How the command line folds many layers into few words."""

from __future__ import annotations

import pytest

from quantplug.kernel import Accepted, Cast, Cost, Rejected
from quantplug.plan import Candidate, Choice, Decision
from quantplug_cli.grouping import braces, fold, ranges
from quantplug_cli.text import choices, size, told, verdict


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        (["lm_head"], "lm_head"),
        (["model.layers.3.mlp.up_proj"], "model.layers.3.mlp.up_proj"),
        ([f"layers.{n}.mlp.{m}_proj" for n in range(30) for m in ("gate", "up")], "layers.0-29.mlp.{gate,up}_proj"),
        ([f"model.layers.{n}.mlp.up_proj" for n in (0, 1, 2, 7)], "model.layers.0-2,7.mlp.up_proj"),
        (["m.norm", *(f"m.layers.{n}.input_layernorm" for n in range(4))], "m.norm, m.layers.0-3.input_layernorm"),
        ([f"m.{n}.e.{k}.w" for n in range(2) for k in range(2)], "m.*.e.*.w"),
        (["a.x", "b.y", "c.z", "d.w"], "a.x, b.y and 2 more"),
    ],
)  # fmt: skip
def test_paths_fold_into_ranges_and_braces(paths: list[str], text: str) -> None:
    assert fold(paths) == text


def test_ranges_and_braces_lose_nothing() -> None:
    assert ranges([5, 3, 4, 9, 9]) == "3-5,9"
    assert braces(["q_proj", "k_proj", "o_proj"]) == "{q,k,o}_proj"
    assert braces(["fc1", "fc2"]) == "{fc1,fc2}"
    assert braces(["gate_proj", "proj"]) == "{gate_proj,proj}"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (116_000_000, "116 MB"), (2.5e9, "2.5 GB"), (3e13, "30.0 TB")],
)
def test_sizes_are_in_powers_of_a_thousand(count: float, text: str) -> None:
    assert size(count) == text


def test_verdicts_say_cost_casts_and_notes_or_the_reason_and_the_fix() -> None:
    accepted = Accepted(Cost(10.0, 2.0), (Cast("scales", "bfloat16"),), notes=("x is permuted",))
    assert verdict(accepted) == (
        "accepts, about 12 us at M = 1 and 1,034 us at M = 512; rounds scales to bfloat16; x is permuted"
    )
    assert verdict(Rejected("shape", "in_features 40", "pad K")) == "refused (shape): in_features 40; pad K"


def test_the_refusal_of_what_the_core_derived_from_a_kernel_is_not_told() -> None:
    yes, no = Accepted(Cost(1, 1)), Rejected("platform", "runs on cuda")
    answers = {
        "a": yes,
        "a.dense": no,
        "b": no,
        "b.dense": yes,
        "cpu.dense": no,
        "cpu.dense.dense": no,
        "reference": no,
    }
    decision = Decision((Choice("a", "l"),), tuple(Candidate(name, "p", said) for name, said in answers.items()))
    assert [c.kernel for c in told(decision)] == ["a", "b", "b.dense", "cpu.dense", "reference"]


def test_several_kernels_are_shown_with_their_rows() -> None:
    decision = Decision((Choice("a", "l", 0, 15), Choice("b", "l", 16, 63), Choice("c", "l", 64)), ())
    assert choices(decision) == "a (M <= 15), b (M = 16 … 63), c (M >= 64)"
    assert choices(Decision((Choice("a", "l"),), ())) == "a"


def test_a_kernel_that_quantizes_x_says_so() -> None:
    accepted = Accepted(Cost(1, 1), quantizes_x=True)
    candidates = (Candidate("a", "plugin-a", accepted), Candidate("b", "plugin-b", Accepted(Cost(1, 1))))
    assert choices(Decision((Choice("a", "l"),), candidates)) == "a (quantizes x)"
    assert choices(Decision((Choice("b", "l"),), candidates)) == "b"
    both = (Choice("b", "l", 0, 15), Choice("a", "l", 16))
    assert choices(Decision(both, candidates)) == "b (M <= 15), a (M >= 16, quantizes x)"
    assert "quantizes x as the file permits" in verdict(accepted)
