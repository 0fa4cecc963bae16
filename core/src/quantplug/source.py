"""
From what a user types, a directory or a Hugging Face repository id, to a directory.
"""

from __future__ import annotations

import re
from pathlib import Path

from quantplug.errors import CheckpointError

# Weights, configuration and tokenizer; never code, never pickles.
ALLOWED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm")
"""The files of a repository that are downloaded."""

_NAME = r"(?!.*(?:--|\.\.))[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"{_NAME}(?:/{_NAME})?")


def resolve_source(path_or_repo: str | Path) -> Path:
    """
    Return the directory of a checkpoint; a repository id is downloaded, or found in the local cache.

    A directory that exists is always taken as such. Otherwise `NAME` or `OWNER/NAME` is a repository, fetched by
    huggingface_hub with its own cache, token and environment: with `HF_HUB_OFFLINE=1` only the cache is looked at.

    Raises:
        CheckpointError: `QP-ST-FILE` when it is neither, or the download fails.
    """
    path = Path(path_or_repo)
    text = str(path_or_repo)
    if not text.isprintable() or not text.strip():
        raise CheckpointError("QP-ST-FILE", repr(text), "is empty or not printable", expected="a directory")
    try:
        if path.is_dir():
            return path
        exists = path.exists() or path.is_symlink()
    except OSError as error:
        raise CheckpointError("QP-ST-FILE", text[:200], f"cannot be looked at: {error.strerror or error}") from error
    if exists:
        raise CheckpointError(
            "QP-ST-FILE",
            text,
            "is a file" if path.is_file() else "is no directory",
            expected="the directory of a checkpoint",
            fix=f"Pass the directory it lies in: {path.parent}." if path.is_file() else "",
        )
    if isinstance(path_or_repo, Path) or _REPO_ID.fullmatch(text) is None or text.endswith(".git"):
        raise CheckpointError(
            "QP-ST-FILE",
            text,
            "does not exist, and is no repository id either",
            expected="a directory, or NAME or OWNER/NAME of a Hugging Face repository",
            fix="Check the spelling.",
        )
    return _download(text)


def _download(repo: str) -> Path:
    # Takes a tenth of a second; planning from a directory does without.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    # Its bases are the errors of the HTTP library, which is another one in each major version of huggingface_hub.
    http_errors = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    failures: tuple[type[Exception], ...] = (*http_errors, OSError, HFValidationError)
    try:
        return Path(snapshot_download(repo, allow_patterns=list(ALLOWED_FILES)))
    except GatedRepoError as error:
        what = "is a repository that needs its owners' permission"
        raise _failed(repo, what, "Ask its owners for access and log in (hf auth login).") from error
    except RepositoryNotFoundError as error:
        what = "is neither a directory nor a repository that can be seen"
        fix = "Check the spelling; a private repository needs a login (hf auth login)."
        raise _failed(repo, what, fix) from error
    except LocalEntryNotFoundError as error:
        what = "is no directory, is not in the local cache, and cannot be downloaded now"
        fix = "Check the path and the network, or unset HF_HUB_OFFLINE if it is set."
        raise _failed(repo, what, fix) from error
    except failures as error:
        what = f"cannot be downloaded ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise _failed(repo, what, "Try again later, or download it by other means and pass the directory.") from error


def _failed(repo: str, what: str, fix: str) -> CheckpointError:
    return CheckpointError("QP-ST-FILE", repo, what, expected="a directory or a repository id", fix=fix)
