"""
The host: whole checkpoints in Transformers, for the command line and `quantplug.load`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.host import Host

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from quantplug.host import CalibrationBlock, RunningModel
    from quantplug.load import Progress
    from quantplug.plan import Plan
    from quantplug.registry import Registry


class TransformersHost(Host):
    """Runs causal language models in Transformers."""

    name = "transformers"

    def load(
        self, plan: Plan, source: Path, *, progress: Progress | None = None, registry: Registry | None = None
    ) -> RunningModel:
        """
        Load a checkpoint onto the platform of its plan, with the tokenizer that lies beside it.

        Raises:
            HostError: `QP-HOST-VERSION`, `QP-HOST-MODEL` or `QP-HOST-TOKENIZER`.
            QuantplugError: as `from_pretrained` does.
        """
        from quantplug_transformers.versions import require_transformers

        require_transformers()
        from quantplug_transformers.loading import from_pretrained
        from quantplug_transformers.running import TransformersModel, hidden_bars
        from quantplug_transformers.tokenizer import read_tokenizer

        tokenizer = read_tokenizer(source)
        device_map = None if plan.platform.kind == "cpu" else {"": plan.platform.kind}
        with hidden_bars():
            model = from_pretrained(source, plan=plan, device_map=device_map, progress=progress, registry=registry)
        return TransformersModel(model, tokenizer, plan)

    def calibrate(self, source: Path, text: str, *, tokens: int, window: int) -> Iterator[CalibrationBlock]:
        """
        Run a dense checkpoint over a text block by block, in model order, holding one block's statistics at a time.

        Raises:
            ConvertError: `QP-CONV-CALIBRATION` when the text is shorter than a window, or the model cannot be run so.
            HostError: `QP-HOST-VERSION`, `QP-HOST-MODEL` or `QP-HOST-TOKENIZER`.
        """
        from quantplug_transformers.versions import require_transformers

        require_transformers()
        from quantplug_transformers.calibration import calibrate

        return calibrate(source, text, tokens=tokens, window=window)
