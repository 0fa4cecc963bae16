"""The light side of the plugin: what is imported when, what is registered, which versions are taken."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from quantplug.errors import HostError
from quantplug.plugins import build_registry
from quantplug_transformers import plugin, versions


def test_plugin_and_host_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, quantplug_transformers.plugin as p; hosts = p.quantplug_hosts(); "
        "print(hosts[0].name, *sorted({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["transformers"]


def test_plugin_brings_one_host() -> None:
    registry = build_registry({"quantplug-transformers": plugin})
    assert registry.failures == ()
    assert registry.host().item.name == "transformers"


def test_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import quantplug_transformers

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        quantplug_transformers.nonsense  # noqa: B018


@pytest.mark.parametrize("found", ["", "4.57.6", "6.0.0", "nonsense"])
def test_other_versions_of_transformers_are_refused_before_they_are_imported(found, monkeypatch) -> None:
    def version(name: str) -> str:
        if not found:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(versions, "version", version)
    with pytest.raises(HostError) as caught:
        versions.require_transformers()
    assert caught.value.code == "QP-HOST-VERSION"
    assert (f"version {found} is installed" if found else "is not installed") in str(caught.value)
    assert 'pip install "transformers>=5.0,<6"' in caught.value.fix


@pytest.mark.parametrize("found", ["5.0.0", "5.13.0", "5.23.0", "5.99.1.dev0"])
def test_versions_of_the_fifth_major_are_taken(found, monkeypatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: found)
    versions.require_transformers()


def test_a_device_map_needs_accelerate_and_nothing_else_does(checkpoint, registry, monkeypatch) -> None:
    from quantplug_transformers import from_pretrained

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", version)
    with pytest.raises(HostError, match="accelerate: is not installed") as caught:
        from_pretrained(checkpoint, device_map="cpu", registry=registry)
    assert caught.value.code == "QP-HOST-VERSION"
    assert "quantplug-transformers[device-map]" in caught.value.fix
    from_pretrained(checkpoint, registry=registry)


def test_examples_of_the_readme_run(checkpoint, ids, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    readme = Path(__file__).parents[3] / "plugins" / "transformers" / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        known = {"input_ids": ids, "path": str(checkpoint)}
        exec(block.replace('"path/or/repository"', "path").replace("=100", "=5"), known)
        assert type(known["model"]).__name__ == "LlamaForCausalLM"
    assert (tmp_path / "copy" / "model.safetensors").is_file()


def test_registering_twice_changes_nothing_and_a_taken_name_is_an_error(monkeypatch) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from quantplug_transformers import quantizer, register

    register()
    register()
    assert AUTO_QUANTIZER_MAPPING["quantplug"] is quantizer.QuantplugQuantizer
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "quantplug", dict)
    with pytest.raises(HostError, match=r"already is builtins\.dict") as caught:
        register()
    assert caught.value.code == "QP-HOST-VERSION"
