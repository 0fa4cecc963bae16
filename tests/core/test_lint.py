"""What a look at a checkpoint finds, all of it at once."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from toy_checkpoints import toy_checkpoint, toy_registry, toy_tensors, write_checkpoint

from quantplug.errors import CODES, CheckpointError, PlanError, PluginError
from quantplug.findings import SEVERITIES, LintReport
from quantplug.hooks import hookimpl
from quantplug.lint import lint
from quantplug.peers import PeerReader

if TYPE_CHECKING:
    from pathlib import Path

TOY = {"quant_method": "toy"}
UP = "model.layers.0.mlp.up_proj"


def look(directory: Path, **arguments: object) -> LintReport:
    registry = arguments.pop("registry", None) or toy_registry()
    report = lint(directory, registry=registry, **arguments)  # type: ignore[arg-type]
    assert all(finding.code in CODES for finding in report.findings)
    order = [SEVERITIES.index(finding.severity) for finding in report.findings]
    assert order == sorted(order), "the worst first"
    return report


def found(report: LintReport) -> list[tuple[str, str]]:
    return [(finding.code, finding.severity) for finding in report.findings]


def changed(directory: Path, section: dict[str, object] | None = None, **tensors: torch.Tensor | None) -> Path:
    """Write a toy checkpoint with some tensors replaced (`up__scale`: of the first layer's up_proj) or taken out."""
    stored = toy_tensors()
    for key, tensor in tensors.items():
        name = (
            f"model.layers.0.{'mlp' if key.startswith(('up', 'down')) else 'self_attn'}.{key.replace('__', '_proj.')}"
        )
        if tensor is None:
            del stored[name]
        else:
            stored[name] = tensor
    return write_checkpoint(directory, stored, {**TOY, **(section or {})})


def test_a_good_checkpoint_gives_nothing_to_say(tmp_path: Path) -> None:
    report = look(toy_checkpoint(tmp_path, keep=("layers.1.mlp",)))
    assert report.findings == ()
    assert (report.worst, report.dialect, report.modules, report.scales, report.codes) == (None, "toy", 13, 6, 0)
    body = json.loads(json.dumps(report.to_json()))
    assert (body["findings"], body["worst"], body["source"]) == ([], None, str(tmp_path))


def test_an_entry_that_matches_nothing_comes_with_the_nearest_names(tmp_path: Path) -> None:
    [finding] = look(changed(tmp_path, {"keep": ["layers.0.mlp.upproj"]})).findings
    assert (finding.code, finding.severity) == ("QP-LINT-UNUSED", "warning")
    assert finding.where == "config.json: quantization_config.keep[0]"
    assert finding.what == "'layers.0.mlp.upproj' matches no module"
    assert UP in finding.fix


def test_a_long_list_of_entries_without_a_match_ends_with_a_count(tmp_path: Path) -> None:
    report = look(changed(tmp_path, {"keep": [f"other.{number}.x" for number in range(25)]}))
    assert len(report.findings) == 21
    assert report.findings[-1].what == "5 more entries match no module"


def test_an_entry_that_is_read_otherwise_than_it_looks_is_pointed_out(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, toy_tensors(("layers.1.mlp",)), {**TOY, "keep": ["model.layers.1.mlp."]})
    [finding] = look(directory).findings
    assert (finding.code, finding.severity, finding.count) == ("QP-LINT-READING", "warning", 2)
    assert "read as the parent path" in finding.what


def test_layers_that_contradict_the_default_are_one_error(tmp_path: Path) -> None:
    [finding] = look(write_checkpoint(tmp_path, toy_tensors(("layers.0.mlp",)), TOY)).findings
    assert (finding.code, finding.severity, finding.count) == ("QP-SKIP-EVIDENCE", "error", 2)
    assert finding.what == "the default says quantized, but 2 layer(s) are stored dense"
    assert finding.names == ("model.layers.0.mlp.down_proj", UP)


def test_an_entry_that_matches_too_much_is_told_from_one_that_is_plainly_wrong(tmp_path: Path) -> None:
    dense = toy_tensors(("layers.0.mlp",))
    [finding] = look(write_checkpoint(tmp_path / "much", dense, {**TOY, "keep": ["mlp"]})).findings
    assert finding.what == "'mlp' says whole, but 2 layer(s) are stored quantized"
    assert finding.fix == "It is right about 2 other layer(s), so it matches too much; name those only."
    [finding] = look(write_checkpoint(tmp_path / "wrong", toy_tensors(), {**TOY, "keep": ["layers.0.mlp"]})).findings
    assert finding.fix == "Say in the configuration that they are quantized."


def test_everything_is_found_at_once_and_an_error_does_not_hide_the_rest(tmp_path: Path) -> None:
    directory = changed(
        tmp_path,
        {"keep": ["nowhere"]},
        up__scale=None,
        down__codes=torch.ones(3, dtype=torch.int8),
        q__scale=torch.full((32, 1), float("nan")),
        k__weight=torch.ones(16, 32),
    )
    report = look(directory)
    assert sorted(found(report)) == [
        ("QP-LINT-UNUSED", "warning"),
        ("QP-SKIP-AMBIGUOUS", "error"),
        ("QP-ST-MISSING", "error"),
        ("QP-ST-SCALE", "error"),
        ("QP-ST-SHAPE", "error"),
    ]
    assert (report.worst, report.count("error"), report.count("note")) == ("error", 4, 0)


def test_a_tensor_that_nobody_claims_is_found(tmp_path: Path) -> None:
    report = look(changed(tmp_path, up__zeros=torch.ones(48)))
    assert found(report) == [("QP-ST-EXTRA", "error")]


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ("{", "QP-CFG-JSON"),
        ('{"quantization_config": {"quant_method": "never-heard-of"}}', "QP-CFG-METHOD"),
        ('{"quantization_config": {"quant_method": "toy", "keep": 3}}', "QP-CFG-FIELD"),
        ('{"quantization_config": {"quant_method": "toy", "limit": 1000}}', "QP-CFG-FIELD"),
        ('{"quantization_config": {"quant_method": "toy", "keep": ["re:(a+)+$"]}}', "QP-SKIP-PATTERN"),
        (None, "QP-CFG-FILE"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_a_finding(tmp_path: Path, config: str | None, code: str) -> None:
    directory = toy_checkpoint(tmp_path)
    (directory / "config.json").unlink()
    if config is not None:
        (directory / "config.json").write_text(config)
    report = look(directory)
    assert code in [finding.code for finding in report.findings]
    assert report.worst == "error"


def test_a_broken_file_and_a_broken_configuration_are_both_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert found(look(tmp_path)) == [("QP-ST-HEADER", "error"), ("QP-CFG-FIELD", "error")]


def test_what_is_no_checkpoint_at_all_is_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        look(tmp_path / "nowhere")
    assert raised.value.code == "QP-ST-FILE"
    with pytest.raises(PlanError, match="'int4' is not an activation dtype"):
        look(toy_checkpoint(tmp_path), dtype="int4")


def test_an_odd_dtype_in_the_configuration_is_a_finding_and_the_rest_is_looked_at(tmp_path: Path) -> None:
    directory = toy_checkpoint(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "int4"}))
    report = look(directory)
    assert found(report) == [("QP-PLAN-POLICY", "error")]
    assert report.scales == 8


def test_what_reading_brought_up_is_noted(tmp_path: Path) -> None:
    directory = toy_checkpoint(tmp_path)
    (directory / "other.safetensors").write_bytes(b"")
    [finding] = look(directory).findings
    assert (finding.code, finding.severity) == ("QP-LINT-NOTE", "note")
    assert "other.safetensors" in finding.what


def scales(value: float, rows: int = 48) -> torch.Tensor:
    result = torch.full((48, 1), 0.01)
    result[:rows] = value
    return result


@pytest.mark.parametrize(
    ("tensor", "code", "severity", "text"),
    [
        (
            scales(float("nan"), 1),
            "QP-ST-SCALE",
            "error",
            "1 of 48 scale(s) (the first is number 0) are NaN or infinite",
        ),
        (
            scales(float("-inf"), 2),
            "QP-ST-SCALE",
            "error",
            "2 of 48 scale(s) (the first is number 0) are NaN or infinite",
        ),
        (
            scales(0.0, 3),
            "QP-LINT-ZERO",
            "note",
            "3 of 48 scale(s) (the first is number 0) are 0: so is what they scale",
        ),
        (scales(0.0), "QP-LINT-ZERO", "error", "48 of 48 scale(s) (the first is number 0) are 0: the layer computes"),
        (
            scales(1e-39, 5),
            "QP-LINT-TINY",
            "warning",
            "5 of 48 scale(s) (the first is number 0) are subnormal in float32",
        ),
        (scales(600.0), "QP-LINT-HUGE", "warning", "makes weights of up to 7.68e+04, beyond what float16 holds"),
        (scales(3e37), "QP-LINT-HUGE", "error", "makes weights of up to 3.84e+39, beyond what bfloat16 holds"),
    ],
)
def test_every_kind_of_bad_scale_is_found(
    tmp_path: Path, tensor: torch.Tensor, code: str, severity: str, text: str
) -> None:
    [finding] = look(changed(tmp_path, up__scale=tensor)).findings
    assert (finding.code, finding.severity, finding.where) == (code, severity, f"{UP}.scale")
    assert text in finding.what


@pytest.mark.parametrize("tensor", [scales(-0.01, 7), scales(500.0), scales(1.2e-38)])
def test_signed_integers_may_have_negative_scales_and_large_and_small_ones_within_bounds(
    tmp_path: Path, tensor: torch.Tensor
) -> None:
    assert look(changed(tmp_path, up__scale=tensor)).findings == ()


def test_the_activation_dtype_sets_the_bound(tmp_path: Path) -> None:
    directory = changed(tmp_path, up__scale=scales(600.0))
    assert found(look(directory, dtype="float16")) == [("QP-LINT-HUGE", "error")]
    assert found(look(directory, dtype="float32")) == [("QP-LINT-HUGE", "warning")]


def test_one_fault_in_many_tensors_is_one_finding(tmp_path: Path) -> None:
    stored = {name: torch.zeros_like(t) if name.endswith(".scale") else t for name, t in toy_tensors().items()}
    [finding] = look(write_checkpoint(tmp_path, stored, TOY)).findings
    assert (finding.count, len(finding.names)) == (8, 5)
    assert finding.what.endswith("(and 7 more tensors)")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_scales_of_the_cache_are_looked_at(tmp_path: Path, value: float) -> None:
    stored = {**toy_tensors(), "model.layers.0.self_attn.k_proj.k_scale": torch.tensor(value)}
    [finding] = look(write_checkpoint(tmp_path, stored, TOY)).findings
    assert (finding.code, finding.where) == ("QP-ST-SCALE", "model.layers.0.self_attn.k_proj.k_scale")


def attention(dense: str) -> dict[str, torch.Tensor]:
    """A toy checkpoint with a v_proj, one projection of layer 0 left dense."""
    stored = toy_tensors((dense,))
    for layer in (0, 1):
        for part in ("codes", "scale"):
            key = f"model.layers.{layer}.self_attn.k_proj.{part}"
            if key in stored:
                stored[key.replace("k_proj", "v_proj")] = stored[key].clone()
    return stored


def test_shards_that_engines_fuse_and_that_are_stored_in_different_ways_are_found(tmp_path: Path) -> None:
    stored = attention("layers.0.self_attn.q_proj")
    report = look(write_checkpoint(tmp_path, stored, {**TOY, "keep": ["layers.0.self_attn.q_proj"]}))
    [finding] = report.findings
    assert (finding.code, finding.severity) == ("QP-LINT-SHARDS", "warning")
    assert finding.where == "model.layers.0.self_attn.qkv_proj"
    assert finding.what == (
        "its shards are stored in different ways (k_proj: toy limit 127; q_proj: dense; v_proj: toy limit 127)"
    )
    assert look(write_checkpoint(tmp_path / "b", attention("nothing"), TOY)).findings == ()


class Engine(PeerReader):
    name = "engine"
    version = "1.0"

    def __init__(self, answers: dict[str, object], *, fuses: bool = False, knows: str = "toy") -> None:
        self.answers, self.fuses, self.knows = answers, fuses, knows  # type: ignore[misc]
        self.asked: list[tuple[str, str]] = []

    def reading(self, method, section):  # type: ignore[no-untyped-def]
        assert section["quant_method"] == "toy"
        return self.answer if method == self.knows else None

    def answer(self, path: str, class_name: str) -> object:
        self.asked.append((path, class_name))
        answer = self.answers.get(path, self.answers.get("*", "quantized"))
        if isinstance(answer, Exception):
            raise answer
        return answer


def with_engine(engine: Engine) -> object:
    return toy_registry(other=SimpleNamespace(quantplug_peers=hookimpl(lambda: [engine])))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("dense", "engine 1.0 would leave whole 1 layer(s) that are stored quantized"),
        ("error", "engine 1.0 would refuse, because its shards differ, 1 layer(s) that are stored quantized"),
    ],
)
def test_a_layer_that_another_engine_takes_otherwise_is_found(tmp_path: Path, answer: str, words: str) -> None:
    report = look(toy_checkpoint(tmp_path), registry=with_engine(Engine({UP: answer})))
    [finding] = report.findings
    assert (finding.code, finding.severity, finding.names) == ("QP-LINT-PEER", "warning", (UP,))
    assert finding.what == words
    assert report.peers == (("engine", "1.0"),)


def test_a_dense_layer_that_another_engine_would_quantize_is_found_by_its_entry(tmp_path: Path) -> None:
    directory = toy_checkpoint(tmp_path, keep=("layers.1.mlp",))
    [finding] = look(directory, registry=with_engine(Engine({}))).findings
    assert finding.what == "engine 1.0 would take for quantized 2 layer(s) that are stored dense"
    assert finding.where == "config.json: quantization_config.keep[0]"
    assert look(directory, registry=with_engine(Engine({})), peers=False).findings == ()


def test_an_engine_that_knows_nothing_certain_is_not_compared(tmp_path: Path) -> None:
    directory = toy_checkpoint(tmp_path)
    report = look(directory, registry=with_engine(Engine({}, knows="other")))
    assert (report.findings, report.peers) == ((), ())
    assert look(directory, registry=with_engine(Engine({"*": None}))).findings == ()


def test_an_engine_that_fuses_is_asked_for_the_fused_layer_and_never_for_the_head(tmp_path: Path) -> None:
    stored = {**attention("nothing"), "lm_head.weight": torch.ones(40, 32)}
    directory = write_checkpoint(tmp_path, stored, {**TOY, "keep": ["lm_head"]})
    engine = Engine({}, fuses=True)
    look(directory, registry=with_engine(engine))
    paths = {path for path, class_name in engine.asked if class_name == "Linear"}
    assert "model.layers.0.self_attn.qkv_proj" in paths
    assert not any(path.endswith(("q_proj", "k_proj", "v_proj")) and "qkv" not in path for path in paths)
    assert "lm_head" not in paths
    assert UP in paths
    [finding] = look(directory, registry=with_engine(Engine({"*": "dense"}, fuses=True))).findings
    assert finding.count == 6, "one for each fused layer, not one for each shard"


def test_a_reader_that_fails_is_its_makers_fault(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="peer engine of other: failed to read the configuration: ValueError: no"):
        look(toy_checkpoint(tmp_path), registry=with_engine(Engine({"*": ValueError("no")})))


def test_a_dense_checkpoint_is_looked_over_too(tmp_path: Path) -> None:
    stored = {"model.layers.0.mlp.up_proj.weight": torch.ones(8, 8)}
    report = look(write_checkpoint(tmp_path, stored), registry=with_engine(Engine({})))
    assert (report.findings, report.dialect, report.modules) == ((), "", 1)


def test_progress_counts_the_bytes_that_are_read(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    look(toy_checkpoint(tmp_path), progress=lambda *what: told.append(what))
    assert told[-1] == ("lint", told[-1][2], told[-1][2])
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
