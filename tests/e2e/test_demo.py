"""The demo on the real model, and what its table claims."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_demo_runs_and_its_four_bit_model_stays_within_1_2_times_the_perplexity(tmp_path: Path) -> None:
    """Everything from nothing: dense checkpoint, conversion, plan, run, comparison; then once more from the cache."""
    command = [sys.executable, str(ROOT / "examples" / "demo" / "demo.py")]
    environment = {**os.environ, "QUANTPLUG_DEMO_CACHE": str(tmp_path / "cache"), "COLUMNS": "110"}
    first = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    for text in (
        "gptq 4-bit group 64 asym",
        "cpu.int4",
        "tokens/s",
        "perplexity on evaluation.txt",
        "dequantized 4-bit",
    ):
        assert text in first.stdout
    measured = json.loads((tmp_path / "cache" / "result.json").read_text())
    four_bit, dense = measured["4-bit"], measured["BF16"]
    assert four_bit["perplexity"] <= 1.2 * dense["perplexity"]
    assert four_bit["disk_bytes"] < 0.6 * dense["disk_bytes"]
    files = sorted(file.name for file in (tmp_path / "cache").iterdir())
    assert files == ["result.json", "smollm2-135m-bf16", "smollm2-135m-gptq-4bit-g64"]
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 0
    assert "convert" not in again.stdout
