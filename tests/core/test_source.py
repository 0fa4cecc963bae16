"""
What a user types: a directory is taken as it is, a repository id goes to huggingface_hub, anything else is refused.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from quantplug.errors import CheckpointError
from quantplug.source import ALLOWED_FILES, resolve_source


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Replace the download: `answer` is a directory or what is raised, `calls` are its arguments."""
    state = SimpleNamespace(answer=tmp_path / "snapshot", calls=[])

    def snapshot_download(repo: str, **options: object) -> str:
        state.calls.append((repo, options))
        if isinstance(state.answer, Exception):
            raise state.answer
        return str(state.answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return state


def test_a_directory_is_taken_as_it_is_and_imports_nothing(tmp_path):
    assert resolve_source(tmp_path) == tmp_path
    assert resolve_source(str(tmp_path)) == tmp_path
    code = (
        "import sys; from quantplug.source import resolve_source; resolve_source(sys.argv[1]); "
        "print('huggingface_hub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "Qwen/Qwen2.5-0.5B", "a_b/c.d-e_f", "1/2", "a/" + "b" * 96])
def test_a_repository_is_downloaded_without_code_and_pickles(hub, name):
    assert resolve_source(name) == hub.answer
    assert hub.calls == [(name, {"allow_patterns": list(ALLOWED_FILES)})]


def test_a_directory_of_that_name_comes_first(hub):
    Path("owner/name").mkdir(parents=True)
    assert resolve_source("owner/name") == Path("owner/name")
    assert hub.calls == []


def test_no_pattern_lets_code_or_pickles_through():
    from fnmatch import fnmatch

    refused = (
        "modeling.py",
        "pytorch_model.bin",
        "model.pt",
        "a.pkl",
        "a.so",
        "setup.sh",
        "a.gguf",
        "a.pth",
        "x.ipynb",
    )
    assert not [name for name in refused for pattern in ALLOWED_FILES if fnmatch(name, pattern)]
    wanted = ("config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "merges.txt", "chat_template.jinja")
    assert all(any(fnmatch(name, pattern) for pattern in ALLOWED_FILES) for name in wanted)


@pytest.mark.parametrize(
    "text",
    ["./here", "../x", "/no/such/place", "a/b/c", "a//b", "-a/b", "a/b-", "a/.b", "a/b.", "a--b/c", "a..b", "a b",
     "a.git", "~/models", "https://host/a", "C:\\models", "a/" + "b" * 97, "owner/"],
)  # fmt: skip
def test_what_is_neither_is_refused_without_asking_anybody(hub, text):
    with pytest.raises(CheckpointError) as caught:
        resolve_source(text)
    assert hub.calls == []
    assert (caught.value.code, caught.value.where) == ("QP-ST-FILE", text)
    assert caught.value.what == "does not exist, and is no repository id either"
    assert "OWNER/NAME" in caught.value.expected
    assert caught.value.fix


def test_a_path_object_is_never_a_repository(hub):
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_source(Path("owner/name"))
    assert hub.calls == []


@pytest.mark.parametrize("text", ["", "  ", "a\0b", "a\nb"])
def test_what_cannot_be_printed_is_refused_and_shown_escaped(hub, text):
    with pytest.raises(CheckpointError) as caught:
        resolve_source(text)
    assert caught.value.where == repr(text)
    assert str(caught.value).isprintable()


def test_a_file_is_refused_with_its_directory_as_the_way_out(hub, tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError) as caught:
        resolve_source(file)
    assert (caught.value.what, caught.value.fix) == ("is a file", f"Pass the directory it lies in: {tmp_path}.")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is no directory"):
        resolve_source(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="is no directory"):
        resolve_source("link")


def test_a_name_too_long_for_the_system_is_refused(hub):
    with pytest.raises(CheckpointError, match=r"File name too long|does not exist"):
        resolve_source("x" * 5000)


def http_error(kind):
    """Return one of huggingface_hub's HTTP errors, made by hand: their constructors want a response."""
    error = kind.__new__(kind)
    Exception.__init__(error, "404 Not Found\nfor url x")
    return error


@pytest.mark.parametrize(
    ("answer", "what", "fix"),
    [
        (http_error(errors.GatedRepoError), "needs its owners' permission", "log in"),
        (http_error(errors.RepositoryNotFoundError), "neither a directory nor a repository", "Check the spelling"),
        (errors.LocalEntryNotFoundError("offline"), "not in the local cache", "unset HF_HUB_OFFLINE"),
        (errors.OfflineModeIsEnabled("offline"), "cannot be downloaded (OfflineModeIsEnabled", "Try again later"),
        (OSError(28, "No space left on device"), "No space left on device", "pass the directory"),
        (errors.HFValidationError("bad id"), "cannot be downloaded (HFValidationError: bad id)", "Try again later"),
        (http_error(errors.HfHubHTTPError), "(HfHubHTTPError: 404 Not Found for url x)", "Try again later"),
        (http_error(errors.HfHubHTTPError.__bases__[0]), "404 Not Found for url x", "Try again later"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_failed_download_says_what_to_do_and_the_next_one_works(hub, answer, what, fix):
    good, hub.answer = hub.answer, answer
    with pytest.raises(CheckpointError) as caught:
        resolve_source("owner/name")
    assert (caught.value.code, caught.value.where) == ("QP-ST-FILE", "owner/name")
    assert what in caught.value.what
    assert fix in caught.value.fix
    hub.answer = good
    assert resolve_source("owner/name") == good


def test_offline_means_no_connection_and_a_clear_error(tmp_path):
    """A process of its own: huggingface_hub reads the environment once."""
    code = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("a connection was tried")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from quantplug.source import resolve_source
from quantplug.errors import CheckpointError
try:
    resolve_source("owner/name")
except CheckpointError as error:
    print(error.code, error.what)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert done.stdout.startswith("QP-ST-FILE is no directory, is not in the local cache")
