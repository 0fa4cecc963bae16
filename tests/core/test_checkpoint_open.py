"""
Which files are the checkpoint, where links may lead, and noticing that a file changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from quantplug.checkpoint import INDEX_FILE, FileStamp, check_unchanged, open_checkpoint
from quantplug.errors import CheckpointError
from quantplug_testkit.checkpoints import filled, fingerprint, safetensors_bytes, write_checkpoint

TENSORS = {"a.weight": filled("F32", (2, 2)), "b.weight": filled("BF16", (3,))}
OTHER = {"x": filled("U8", (1,))}


def test_the_single_file_is_the_checkpoint_and_others_beside_it_are_not(tmp_path):
    write_checkpoint(tmp_path, TENSORS)
    (tmp_path / "model-copy.safetensors").write_bytes(b"garbage")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.directory == tmp_path
    assert checkpoint.files == ("model.safetensors",)
    assert list(checkpoint.tensors) == ["a.weight", "b.weight"]
    assert checkpoint.warnings == (f"model-copy.safetensors in {tmp_path}: not part of the checkpoint, not read",)


def test_a_lone_file_of_any_name_is_the_checkpoint(tmp_path):
    (tmp_path / "gptq_model-4bit-128g.safetensors").write_bytes(safetensors_bytes(TENSORS))
    assert open_checkpoint(str(tmp_path)).files == ("gptq_model-4bit-128g.safetensors",)


def test_several_files_without_an_index_are_refused(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(safetensors_bytes(TENSORS))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert (caught.value.code, caught.value.where) == ("QP-ST-FILE", str(tmp_path))
    assert caught.value.what == "holds several safetensors files and no index: one.safetensors, two.safetensors"


def test_a_directory_with_pickles_only_is_refused_and_says_so(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"holds no safetensors; .*pickled weights.*QP-ST-FILE"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("name", "what"), [("nowhere", "does not exist"), ("file", "is not a directory")])
def test_what_is_no_directory_is_refused(tmp_path, name, what):
    (tmp_path / "file").write_bytes(safetensors_bytes(TENSORS))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / name)
    assert (caught.value.code, caught.value.what) == ("QP-ST-FILE", what)


def test_a_single_file_beside_an_index_of_others_is_ambiguous(tmp_path):
    """One known reader would take the single file, another the shards."""
    write_checkpoint(tmp_path, TENSORS, shards={"model-1.safetensors": OTHER})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.code == "QP-ST-INDEX"
    assert caught.value.what == f"holds model.safetensors, and {INDEX_FILE} that names model-1.safetensors instead"
    write_checkpoint(tmp_path, shards={"model.safetensors": TENSORS})
    with_warning = open_checkpoint(tmp_path)
    assert with_warning.files == ("model.safetensors",)
    assert with_warning.warnings == (f"model-1.safetensors in {tmp_path}: not part of the checkpoint, not read",)


def test_a_link_out_of_the_directory_is_refused(tmp_path):
    elsewhere = write_checkpoint(tmp_path / "elsewhere", TENSORS)
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "model.safetensors").symlink_to("../elsewhere/model.safetensors")
    before = fingerprint(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    assert fingerprint(tmp_path) == before
    assert (caught.value.code, caught.value.where) == ("QP-ST-PATH", str(directory / "model.safetensors"))
    assert caught.value.what == f"is a symbolic link that leads to {elsewhere / 'model.safetensors'}"
    assert open_checkpoint(elsewhere).files == ("model.safetensors",)


def test_a_linked_folder_of_shards_is_refused_and_a_link_within_is_not(tmp_path):
    write_checkpoint(tmp_path / "elsewhere", TENSORS)
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "parts").symlink_to("../elsewhere")
    (directory / INDEX_FILE).write_text('{"weight_map": {"a.weight": "parts/model.safetensors"}}')
    with pytest.raises(CheckpointError, match="QP-ST-PATH"):
        open_checkpoint(directory)
    (directory / "parts").unlink()
    (directory / INDEX_FILE).unlink()
    (directory / "real").mkdir()
    (directory / "real" / "data.safetensors").write_bytes(safetensors_bytes(TENSORS))
    (directory / "model.safetensors").symlink_to("real/data.safetensors")
    assert open_checkpoint(directory).files == ("model.safetensors",)


def test_the_directory_itself_may_be_a_link(tmp_path):
    write_checkpoint(tmp_path / "real", TENSORS)
    (tmp_path / "link").symlink_to("real")
    assert open_checkpoint(tmp_path / "link").files == ("model.safetensors",)


@pytest.fixture
def cache(tmp_path):
    """Lay out a Hugging Face cache with one snapshot and return (cache, snapshot)."""
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "models--owner--name" / "blobs").mkdir()
    (tmp_path / "hub" / "models--other--name" / "blobs").mkdir(parents=True)
    return tmp_path / "hub", snapshot


def test_a_snapshot_of_the_hugging_face_cache_links_to_its_own_blobs(cache):
    hub, snapshot = cache
    blob = hub / "models--owner--name" / "blobs" / "0123"
    blob.write_bytes(safetensors_bytes(TENSORS))
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    checkpoint = open_checkpoint(snapshot)
    assert list(checkpoint.tensors) == ["a.weight", "b.weight"]
    check_unchanged(checkpoint)


def test_a_blob_may_lie_in_the_shared_store_of_the_cache(cache):
    hub, snapshot = cache
    digest = "ab" + "0" * 62
    shared = hub / "blobs" / "ab" / digest
    shared.parent.mkdir(parents=True)
    shared.write_bytes(safetensors_bytes(TENSORS))
    (hub / "models--owner--name" / "blobs" / "0123").symlink_to(f"../../blobs/ab/{digest}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert list(open_checkpoint(snapshot).tensors) == ["a.weight", "b.weight"]


@pytest.mark.parametrize(
    "target",
    ["models--other--name/blobs/0123", "secret", "blobs/secret", "models--owner--name/secret", "blobs/ab/../../secret"],
)
def test_a_snapshot_may_not_link_anywhere_else_in_the_cache(cache, target):
    hub, snapshot = cache
    for name in ("models--other--name/blobs/0123", "secret", "blobs/secret", "models--owner--name/secret"):
        (hub / name).parent.mkdir(exist_ok=True)
        (hub / name).write_bytes(safetensors_bytes(TENSORS))
    (hub / "blobs" / "ab").mkdir(exist_ok=True)
    (snapshot / "model.safetensors").symlink_to(f"../../../{target}")
    with pytest.raises(CheckpointError, match="QP-ST-PATH"):
        open_checkpoint(snapshot)


def test_stamps_tell_when_a_file_changed_after_its_header_was_read(tmp_path):
    write_checkpoint(tmp_path / "first", TENSORS)
    directory = tmp_path / "first"
    path = directory / "model.safetensors"
    data = path.read_bytes()
    checkpoint = open_checkpoint(directory)
    assert checkpoint.stamps == {"model.safetensors": FileStamp.of(path.stat())}
    check_unchanged(checkpoint)

    def words() -> str:
        with pytest.raises(CheckpointError) as caught:
            check_unchanged(checkpoint)
        assert (caught.value.code, caught.value.where) == ("QP-ST-CHANGED", str(path))
        assert caught.value.fix
        return caught.value.what

    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert words() == "was written to since its header was read"
    path.write_bytes(data[:-1])
    assert words() == f"had {len(data)} bytes and now has {len(data) - 1} since its header was read"
    path.rename(tmp_path / "kept")
    assert words().startswith("can no longer be read: No such file")
    shutil.copy2(tmp_path / "kept", path)
    assert words() == "was replaced by another file since its header was read"
    path.write_bytes(data)
    check_unchanged(open_checkpoint(directory))


def test_reading_headers_needs_neither_torch_nor_safetensors(tmp_path):
    write_checkpoint(tmp_path, TENSORS, config={})
    code = (
        "import sys, quantplug.checkpoint as c, quantplug.config as f; "
        "c.open_checkpoint(sys.argv[1]); f.read_model_config(sys.argv[1]); "
        "print(sorted({'torch', 'safetensors', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
