"""
Fixtures of the Transformers adapter's tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from tiny_models import config_of, gptq_registry, quantize, write_dense

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from quantplug.registry import Registry


@pytest.fixture(autouse=True, scope="session")
def quiet() -> Iterator[None]:
    """Keep Transformers' progress bars out of the output."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Run tiny products on one thread: waking a second one takes longer than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def registry() -> Registry:
    """The GPTQ format, and the reference kernel only."""
    return gptq_registry()


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Llama whose head is tied to the embedding."""
    return write_dense(tmp_path_factory.mktemp("dense"), config_of("llama", tie_word_embeddings=True))


@pytest.fixture(scope="session")
def checkpoint(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in GPTQ form; tests that change files copy it."""
    return quantize(dense, tmp_path_factory.mktemp("gptq") / "checkpoint")


@pytest.fixture(scope="session")
def with_head(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a quantized head of its own, although config.json still says that it is tied."""
    return quantize(dense, tmp_path_factory.mktemp("head") / "checkpoint", head=True)


@pytest.fixture
def ids() -> torch.Tensor:
    """A few tokens."""
    return torch.tensor([[5, 9, 11, 40, 3]])
