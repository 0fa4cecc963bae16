"""
The tokenizer of a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import transformers

from quantplug.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """
    Return the tokenizer that lies beside the weights.

    Raises:
        HostError: `QP-HOST-TOKENIZER` when there is none, or Transformers cannot read it.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        raise HostError(
            "QP-HOST-TOKENIZER",
            str(directory),
            f"Transformers {transformers.__version__} finds no tokenizer it can read "
            f"({type(error).__name__}: {str(error)[:500]})",
            expected="tokenizer.json and tokenizer_config.json beside the weights",
            fix="Copy them from the model's own repository.",
        ) from error
    return tokenizer
