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


# Without any of these, some versions of Transformers return a tokenizer that knows no words at all.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "*.spm")
_EXPECTED = "tokenizer.json and tokenizer_config.json beside the weights"
_FIX = "Copy them from the model's own repository."


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """
    Return the tokenizer that lies beside the weights.

    Raises:
        HostError: `QP-HOST-TOKENIZER` when there is none, or Transformers cannot read it.
    """
    if not any(file for pattern in _VOCABULARIES for file in directory.glob(pattern)):
        raise HostError("QP-HOST-TOKENIZER", str(directory), "holds no tokenizer", expected=_EXPECTED, fix=_FIX)
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        raise HostError(
            "QP-HOST-TOKENIZER",
            str(directory),
            f"Transformers {transformers.__version__} cannot read its tokenizer "
            f"({type(error).__name__}: {str(error)[:500]})",
            expected=_EXPECTED,
            fix=_FIX,
        ) from error
    return tokenizer
