"""The tables of benchmarks/gpu on made-up figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.gpu.__main__ import wanted
from benchmarks.gpu.choice import WAYS, choose
from benchmarks.gpu.measuring import Point
from benchmarks.gpu.report import BEGIN, END, Report, markdown, put, read
from benchmarks.gpu.table import Names, above, best, compact, everyone, host, labels, legend, progress, repeats, summary

NAMES = Names(("marlin.wna16", "marlin.wna16.dense", "humming.w16"), ("humming", "torch int4"), ("bf16 F.linear",))


def point(rows: int = 1, chosen: str = "marlin.wna16", best_way: str = "marlin.wna16", **us: float) -> Point:
    spelled = {"marlin": "marlin.wna16", "dense": "marlin.wna16.dense", "bf16": "bf16 F.linear"}
    times = {spelled.get(name, name): value for name, value in us.items()}
    taken = {way: best_way if way == WAYS[-1] else chosen for way in WAYS}
    return Point("linear", "int4 g128", "4096 x 4096", rows, 2.5, times, chosen=taken)


def test_the_reference_is_no_peer():
    some = [point(marlin=5.0, humming=10.0, bf16=4.0)]
    assert compact(some, NAMES)[2] == "| int4 g128 | 4096 x 4096 | 5.0 m (0.50, 0.8x) |"
    assert best(some[0], NAMES.peers).name == "humming"


def test_a_summary_counts_what_is_above_the_limit():
    some = [point(1, marlin=5.0, humming=10.0, bf16=20.0), point(16, marlin=8.0, dense=16.0, humming=4.0, bf16=8.0)]
    _, _, line = summary(some, NAMES)
    each = "| 1.000, worst 2.00 (4096 x 4096, M = 16), 1 of 2 above 1.05 "
    assert line == f"| int4 g128 | 2 {each * (len(WAYS) + 1)}| 2.000 | 0.395 |"


def test_ways_to_choose_are_told_apart():
    some = [point(2048, best_way="marlin.wna16.dense", marlin=20.0, dense=10.0, humming=10.0)]
    _, _, line = summary(some, NAMES)
    assert "2.000, worst 2.00" in line
    assert "1.000, worst 1.00" in line
    assert above(some, NAMES, WAYS[-1])[2:] == []
    assert len(above(some, NAMES, "tuned")[2:]) == 1


def test_the_worst_point_above_the_limit_comes_first():
    some = [
        point(1, marlin=11.0, humming=10.0),
        point(16, marlin=30.0, humming=10.0),
        point(64, marlin=10.0, humming=10),
    ]
    assert above(some, NAMES, WAYS[-1])[2:] == [
        "| int4 g128 | 4096 x 4096 | 16 | marlin.wna16 | 30.0 | marlin.wna16 | 30.0 | humming | 10.0 | 3.00 |",
        "| int4 g128 | 4096 x 4096 | 1 | marlin.wna16 | 11.0 | marlin.wna16 | 11.0 | humming | 10.0 | 1.10 |",
    ]


def test_who_did_not_run_leaves_a_dash():
    some = [point(1, marlin=5.0), point(16, chosen="", best_way="", humming=10.0)]
    assert compact(some, NAMES)[2] == "| int4 g128 | 4096 x 4096 | 5.0 m (-, -x) | - (-, -x) |"
    assert summary(some, NAMES)[2] == f"| int4 g128 | 2 {'| - ' * (len(WAYS) + 2)}| 0.500 |"
    assert above(some, NAMES, WAYS[-1])[2:] == []
    assert progress(some[1], NAMES) == "int4 g128, 4096 x 4096, M = 16: peer humming 10.0, roof 2.5, ratio -"


def test_everyone_has_a_line_and_the_roof_has_one():
    assert everyone([point(1, marlin=5.0, humming=10.0), point(16, marlin=6.0)])[2:] == [
        "| int4 g128, 4096 x 4096 | roof | 2.5 | 2.5 |",
        "| int4 g128, 4096 x 4096 | marlin.wna16 | 5.0 | 6.0 |",
        "| int4 g128, 4096 x 4096 | humming | 10.0 | - |",
    ]


def test_what_a_call_costs_the_host_is_told_by_contender_and_format():
    some = [point(1), point(16), point(64)]
    some[0].host_us = {"marlin.wna16": 14.26, "bf16 F.linear": 4.0}
    some[1].host_us = {"marlin.wna16": 15.0}
    assert host(some, NAMES) == [
        "| contender | int4 g128 |",
        "|---|---|",
        "| marlin.wna16 | 14.3 / 15.0 |",
        "| bf16 F.linear | 4.0 / - |",
    ]


def test_what_repeats_differ_by_is_the_range_of_rounds_over_their_median():
    some = [point(1), point(16)]
    assert repeats(some) == ""
    some[0].rounds = {"marlin.wna16": [9.9, 10.0, 10.1], "humming": [20.0, 20.0, 20.2]}
    some[1].rounds = {"marlin.wna16": [9.0, 10.0, 11.0], "humming": [20.0, 20.0, 20.2]}
    assert "are 2.0 % of it apart (median of 3 figures; for 95 % of them at most 20.0 %)" in repeats(some)


def test_who_is_wanted_may_be_spelled_in_any_case():
    assert wanted("DeepGEMM", ["marlin*", "deep*"])
    assert wanted("fp8 channel w8a8", ["FP8*"])
    assert not wanted("DeepGEMM", ["gemm*"])


def test_labels_are_unlike():
    assert labels(["marlin.moe", "marlin.wna16", "marlin.wna16.dense", "humming.w16"]) == {
        "marlin.moe": "m", "marlin.wna16": "m2", "marlin.wna16.dense": "md", "humming.w16": "h",
    }  # fmt: skip
    assert legend([point(marlin=5.0, dense=1.0)], NAMES) == "md `marlin.wna16.dense`"


@pytest.mark.parametrize("kinds", [("linear",), ("linear", "experts")])
def test_a_report_reads_what_it_wrote(tmp_path, kinds):
    points = [Point("linear", "int4 g128", "4096 x 4096", 1, 2.5, {"marlin.wna16": 5.0, "humming": 10.0})]
    if "experts" in kinds:
        points.append(Point("experts", "int4 g128", "Mixtral 8x7B", 1, 57.0, {"marlin.moe": 80.0}))
    points[0].rounds, points[0].host_us = {"marlin.wna16": [4.9, 5.0, 5.1]}, {"marlin.wna16": 14.0}
    points[0].refused = {"triton.wna16": "RuntimeError: out of memory"}
    names = {"linear": NAMES, "experts": Names(("marlin.moe",), (), ())}
    report = Report(
        "One GPU.", "cuda:9.0", {kind: names[kind] for kind in kinds}, points, ["humming, fp8: not installed"]
    )
    report.write(tmp_path / "run.json")
    assert read(tmp_path / "run.json") == report
    lines = markdown(read(tmp_path / "run.json"), whole=False)
    assert lines[0].startswith("One GPU. Each figure is a median of rounds, whose lowest and highest are 4.0 % of it")
    assert "Microseconds of the host until a call is enqueued, without a graph: 4096 x 4096, M = 1." in lines
    assert ("### Experts" in lines) == ("experts" in kinds)
    assert lines[-2:] == [
        "- humming, fp8: not installed",
        "- triton.wna16: RuntimeError: out of memory (int4 g128, 4096 x 4096, M = 1)",
    ]


def test_a_plan_is_asked_in_each_way():
    """By claims the precise FP8 product serves many rows; times made up put it, or a fast one, first at all."""
    us = {"marlin.wna16": 5.0, "cublas.w8a8": 4.0, "cublas.w8a8.fast": 3.0}
    points = [Point("linear", "fp8 channel w8a8", "4096 x 4096", rows, 2.5, dict(us)) for rows in (1, 2048)]
    choose(points, "cuda:9.0")
    assert points[1].chosen["estimated"] == points[1].chosen["estimated, two layouts"] == "cublas.w8a8"
    assert points[0].chosen["estimated, two layouts"].startswith("marlin.")
    assert {point.chosen["tuned"] for point in points} == {"cublas.w8a8"}
    assert {point.chosen[WAYS[-1]] for point in points} == {"cublas.w8a8.fast"}
    kept = {"kind", "format", "layer", "rows", "roof_us", "us", "rounds", "host_us", "refused"}
    assert points[0].to_json().keys() == kept


def test_tables_take_the_place_of_those_between_the_marks():
    assert put(f"prose\n{BEGIN}\nold\n{END}\nmore\n", ["new", ""]) == f"prose\n{BEGIN}\nnew\n\n{END}\nmore\n"
    with pytest.raises(ValueError, match="lacks <!-- end of figures -->"):
        put(BEGIN, ["new"])


def test_readme_has_both_marks():
    text = (Path(__file__).parents[2] / "benchmarks" / "gpu" / "README.md").read_text()
    assert put(text, ["new"]).count("\nnew\n") == 1
