"""
The hook of a framework that can run a whole model: what the CLI and `quantplug.load` need of it, and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch

    from quantplug.load import Progress
    from quantplug.plan import Plan
    from quantplug.registry import Registry


class RunningModel(ABC):
    """A loaded model that generates text."""

    @property
    @abstractmethod
    def model(self) -> Any:
        """The framework's own model object."""

    @property
    @abstractmethod
    def plan(self) -> Plan:
        """The plan it was loaded by."""

    @abstractmethod
    def stream(self, prompt: str, *, max_new_tokens: int, chat: bool = True) -> Iterator[str]:
        """
        Generate greedily and yield the text piece by piece, one piece per token (possibly empty).

        Args:
            prompt: the user's words; put through the chat template if `chat` is set and the model has one.
            max_new_tokens: upper bound; generation also stops at the model's end token.
            chat: whether the chat template is applied.
        """

    @abstractmethod
    def perplexity(self, text: str, *, window: int = 512) -> float:
        """
        Return exp of the mean negative log-likelihood per token of `text`.

        The tokens are cut into consecutive windows of `window`; each is scored on its own, its first token not at all.
        """


class CalibrationBlock(ABC):
    """The linear layers of one decoder block, with what a calibration text sends through them."""

    @property
    @abstractmethod
    def hessians(self) -> Mapping[str, torch.Tensor]:
        """Checkpoint path of each linear layer in the block -> float32 `[K, K]`, the sum of x^T x over the text."""

    @abstractmethod
    def replace(self, path: str, values: torch.Tensor) -> None:
        """Put quantized values `[N, K]` in the place of a layer's dense weight, so that later blocks see them."""


class Host(ABC):
    """A framework through which a checkpoint runs; a plugin's `quantplug_hosts` returns instances."""

    name: ClassVar[str]
    """Unique among installed plugins: "transformers"."""

    @abstractmethod
    def load(
        self, plan: Plan, source: Path, *, progress: Progress | None = None, registry: Registry | None = None
    ) -> RunningModel:
        """
        Load a checkpoint and return it ready to run.

        Args:
            plan: made for it, on the machine at hand.
            source: its directory.
            progress: told how far loading is.
            registry: the plugins the plan was made with; None takes the installed ones.
        """

    @abstractmethod
    def calibrate(self, source: Path, text: str, *, tokens: int, window: int) -> Iterator[CalibrationBlock]:
        """
        Run a dense checkpoint over a text block by block, in model order, holding one block's statistics at a time.

        Args:
            source: directory of the dense checkpoint.
            text: at least `window` tokens long.
            tokens: how many tokens of it to use at most.
            window: sequence length in tokens.
        """
