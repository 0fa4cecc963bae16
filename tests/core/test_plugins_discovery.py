"""
What is found, what counts when it is found twice, and that no order matters.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantplug.errors import PluginError
from quantplug.hooks import hookimpl
from quantplug.names import Architecture
from quantplug.plugins import build_registry, discover

ROOT = Path(__file__).parents[2]
CONSTANT = """
    from quantplug.config import Dialect
    from quantplug.hooks import hookimpl
    from PACKAGE.scheme import Scheme

    quantplug_api = ">=1,<2"

    body = dict.fromkeys(Dialect.__abstractmethods__, print)
    dialect = type("D", (Dialect,), {**body, "name": "NAME", "methods": METHODS})()

    @hookimpl
    def quantplug_schemes():
        return [Scheme]

    @hookimpl
    def quantplug_dialects():
        return [dialect]
"""
"""A plugin that returns the same objects whenever it is asked, so that registries can be compared."""


def constant(name: str, *methods: str) -> str:
    return CONSTANT.replace("NAME", name).replace("METHODS", repr(methods))


def test_a_plugin_is_registered_with_all_its_facts(site):
    site.install("Quantplug.Good", version="1.2.post3")
    [info] = discover([str(site.directory)], environ={}).plugins
    assert info.distribution == "quantplug-good"
    assert info.version == "1.2.post3"
    assert info.entry == "Quantplug.Good"
    assert info.module == "quantplug_good.plugin"
    assert info.api == ">=1,<2"
    assert info.hooks == ("quantplug_schemes",)
    assert info.location == str(site.directory)


def test_an_egg_info_directory_counts_as_well(site):
    info = site.install("quantplug-old", info="{package}.egg-info")
    (info / "METADATA").rename(info / "PKG-INFO")
    assert [p.version for p in discover([str(site.directory)], environ={}).plugins] == ["1.0"]


def test_an_entry_point_may_name_an_attribute(site):
    source = """
        from quantplug.hooks import hookimpl
        from PACKAGE.scheme import Scheme

        quantplug_api = ">=1"

        class Inner:
            @staticmethod
            @hookimpl
            def quantplug_schemes():
                return [Scheme]
    """
    lines = "# ours\n[console_scripts]\nx = y:z\n\n[quantplug.plugins]\n; one\nattr = quantplug_attr.plugin : Inner\n"
    site.install("quantplug-attr", source, entry_points=lines)
    found = discover([str(site.directory)], environ={})
    assert found.failures == ()
    assert set(found.schemes) == {"quantplug-attr"}


def test_a_module_without_a_package_may_be_a_plugin(site):
    site.install("quantplug-single", entry_points="[quantplug.plugins]\ns = quantplug_single_file\n")
    (site.directory / "quantplug_single_file.py").write_text('quantplug_api = ">=1"\n')
    found = discover([str(site.directory)], environ={})
    assert [(p.module, p.hooks) for p in found.plugins] == [("quantplug_single_file", ())]


def test_the_same_plugin_twice_counts_once(site):
    """A second copy of the same version (user and system site-packages) and the same directory again are no news."""
    site.install("quantplug-good")
    other = type(site)(site.directory.parent / "other")
    other.install("quantplug-good")
    link = site.directory.parent / "link"
    link.symlink_to(site.directory)
    found = discover([str(site.directory), str(other.directory), str(link)], environ={})
    assert [p.location for p in found.plugins] == [str(site.directory)]
    assert found.failures == ()


@pytest.mark.parametrize("first", ["1.0", "2.0"])
def test_a_shadowed_version_is_reported_with_both_places(site, first):
    """As for an import the first one on the path counts, newer or not; the other one is not passed over in silence."""
    second = "1.0" if first == "2.0" else "2.0"
    site.install("quantplug-good", version=first)
    other = type(site)(site.directory.parent / "other")
    hidden = other.install("quantplug-good", version=second)
    found = discover([str(site.directory), str(other.directory)], environ={})
    assert [p.version for p in found.plugins] == [first]
    [failure] = found.failures
    assert (failure.distribution, failure.version, failure.stage) == ("quantplug-good", second, "metadata")
    assert failure.error == (
        f"{hidden}: version {second} is hidden by version {first} in "
        f"{site.directory}/quantplug_good-{first}.dist-info; expected one installation on the import path. "
        "Uninstall one of them [QP-PLUG-METADATA]"
    )


def test_of_two_versions_in_one_directory_the_newer_counts(site):
    """An interrupted upgrade leaves the old metadata beside the new; directory order must not decide."""
    site.install("quantplug-good", version="1.10.0")
    (site.directory / "quantplug_good").rename(site.directory / "moved")
    site.install("quantplug-good", version="1.9")
    found = discover([str(site.directory)], environ={})
    assert [p.version for p in found.plugins] == ["1.10.0"]
    assert ["version 1.9 is hidden by version 1.10.0" in f.error for f in found.failures] == [True]


def test_a_leftover_egg_info_of_the_same_version_gives_way(site):
    """An old develop install leaves one beside what pip wrote; the two say different things."""
    site.install("quantplug-good", version="1.0")
    (site.directory / "quantplug_good").rename(site.directory / "moved")
    egg = site.install("quantplug-good", info="{package}-{version}-py3.11.egg-info", metadata="", entry_points="x")
    (egg / "PKG-INFO").write_text("Name: quantplug-good\nVersion: 1.0\n")
    found = discover([str(site.directory)], environ={})
    assert [p.entry for p in found.plugins] == ["quantplug-good"]
    assert [failure.location for failure in found.failures] == [str(site.directory)]
    assert "egg-info: version 1.0 is hidden by version 1.0 in" in found.failures[0].error


def test_what_pip_is_about_to_remove_is_not_there(site):
    site.install("quantplug-gone", info="~uantplug_gone-{version}.dist-info")
    assert discover([str(site.directory)], environ={}).plugins == ()


def test_a_path_entry_that_is_no_directory_is_skipped(site):
    site.install("quantplug-good")
    (site.directory / "file").touch()
    (site.directory / "loop").symlink_to(site.directory / "loop")
    odd = [str(site.directory / name) for name in ("missing", "file", "loop")]
    assert len(discover([*odd, None, site.directory, str(site.directory)], environ={}).plugins) == 1


def test_an_empty_path_entry_is_the_working_directory(site, monkeypatch):
    site.install("quantplug-good")
    monkeypatch.chdir(site.directory)
    assert [p.location for p in discover([""], environ={}).plugins] == [str(site.directory)]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | st.text("\n =[].:#a", max_size=60).map(str.encode))
def test_no_content_of_metadata_files_breaks_discovery(site, content):
    """Whatever bytes a neighbour's files hold, the others are found, and it is either fine or a failure."""
    if not (site.directory / "quantplug_bad").exists():
        site.install("quantplug-good")
        site.install("quantplug-bad")
    info = site.directory / "quantplug_bad-1.0.dist-info"
    (info / "entry_points.txt").write_bytes(b"[quantplug.plugins]\nx = quantplug_bad.plugin\n" + content)
    first = discover([str(site.directory)], environ={})
    (info / "entry_points.txt").write_bytes(b"[quantplug.plugins]\nx = quantplug_bad.plugin\n")
    (info / "METADATA").write_bytes(content + b"\nName: quantplug-bad\nVersion: 1.0\n")
    second = discover([str(site.directory)], environ={})
    for found in (first, second):
        assert "quantplug-good" in {plugin.distribution for plugin in found.plugins}
        assert found.failures or len(found.plugins) == 2


def test_claims_on_one_name_are_a_conflict_that_names_both(site):
    for name in ("quantplug-b", "quantplug-a"):
        site.install(name, constant("shared", "shared-method"))
        (site.directory / name.replace("-", "_") / "scheme.py").write_text(
            (site.directory / name.replace("-", "_") / "scheme.py").read_text().replace(name, "shared")
        )
    site.install("quantplug-c")
    found = discover([str(site.directory)], environ={})
    assert found.failures == ()
    assert [(c.kind, c.name) for c in found.conflicts] == [
        ("dialect", "shared"), ("quant_method", "shared-method"), ("scheme", "shared"),
    ]  # fmt: skip
    assert {c.plugins for c in found.conflicts} == {("quantplug-a", "quantplug-b")}
    assert set(found.schemes) == {"quantplug-c"}
    assert found.dialects == {}
    with pytest.raises(
        PluginError, match=r"scheme 'shared': claimed by quantplug-a and quantplug-b; .*QUANTPLUG_DIS"
    ) as e:
        found.scheme("shared")
    assert e.value.code == "QP-PLUG-CONFLICT"
    one = discover([str(site.directory)], environ={"QUANTPLUG_DISABLE_PLUGINS": "quantplug-b"})
    assert one.conflicts == ()
    assert one.scheme("shared").plugin == "quantplug-a"


def test_two_entry_points_of_one_distribution_can_be_in_conflict(site):
    lines = "[quantplug.plugins]\none = quantplug_two.plugin\ntwo = quantplug_two.plugin\n"
    site.install("quantplug-two", entry_points=lines)
    [conflict] = discover([str(site.directory)], environ={}).conflicts
    assert str(conflict) == "scheme 'quantplug-two' is claimed by quantplug-two (one) and quantplug-two (two)"
    with pytest.raises(PluginError, match="QUANTPLUG_DISABLE_PLUGINS=two "):
        raise conflict.error()


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """Return six directories with one plugin each: sound, broken at several stages, and two in conflict."""
    from installed_site import Site

    sources = {
        "quantplug-ok-1": constant("one", "m1"),
        "quantplug-ok-2": constant("two", "m2"),
        "quantplug-same-1": constant("same", "m3"),
        "quantplug-same-2": constant("same", "m4"),
        "quantplug-import": "quantplug_api = '>=1'\nimport gone",
        "quantplug-api": "quantplug_api = '>=9'",
    }
    places = []
    for name, source in sources.items():
        place = tmp_path_factory.mktemp(name)
        Site(place).install(name, source)
        places.append(str(place))
    yield places
    for name in [
        name for name in sys.modules if name.startswith(("quantplug_ok", "quantplug_same", "quantplug_import"))
    ]:
        del sys.modules[name]


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(6)))
def test_the_order_of_the_path_does_not_matter(crowd, order):
    places = [crowd[index] for index in order]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", places + [entry for entry in sys.path if entry not in places])
        found = discover(places, environ={})
        assert found == discover(crowd, environ={})
    assert list(found.schemes) == sorted(found.schemes)
    assert len(found.plugins) == 4
    assert len(found.failures) == 2
    assert [(c.kind, c.name) for c in found.conflicts] == [
        ("dialect", "same"), ("quant_method", "m3"), ("quant_method", "m4"),
    ]  # fmt: skip


def test_the_order_of_plugins_in_memory_does_not_matter():
    shared = Architecture("llama", ("llama",)), Architecture("other", ("other",))
    plugins = {
        "a": SimpleNamespace(quantplug_architectures=hookimpl(lambda: [shared[0]])),
        "b": SimpleNamespace(quantplug_architectures=hookimpl(lambda: list(shared))),
        "c": SimpleNamespace(quantplug_architectures=hookimpl(lambda: 1 / 0)),
    }
    built = [build_registry(dict(order)) for order in itertools.permutations(plugins.items())]
    assert all(found == built[0] for found in built)
    assert [str(conflict) for conflict in built[0].conflicts] == ["model_type 'llama' is claimed by a and b"]
    assert [provided.item.name for provided in built[0].architectures] == ["other"]
    assert [failure.distribution for failure in built[0].failures] == ["c"]


def test_a_registry_cannot_be_changed():
    found = build_registry({})
    with pytest.raises(AttributeError):
        found.plugins = ()
    with pytest.raises(TypeError):
        found.kernels["mine"] = found.kernels["reference"]
    with pytest.raises(TypeError):
        found.schemes["mine"] = None


def test_a_plugin_in_memory_that_names_another_api_is_refused():
    [failure] = build_registry({"mine": SimpleNamespace(quantplug_api=">=2")}).failures
    assert (failure.distribution, failure.stage) == ("mine", "api")
    assert "this core speaks 1.0" in failure.error


def run(code: str, *path: str) -> str:
    """Run code in a fresh interpreter with more directories on its path; return what it prints."""
    prefix = f"import sys; sys.path[:0] = {list(path)!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", prefix + code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_process_wide_registry_is_built_once_by_whoever_comes_first(site):
    """Eight threads ask at once: the plugin is imported once, and all get the same object."""
    site.install("quantplug-slow", "quantplug_api = '>=1'\nimport time\nprint('imported')\ntime.sleep(0.2)")
    code = """
from concurrent.futures import ThreadPoolExecutor
from quantplug.plugins import registry
with ThreadPoolExecutor(8) as pool:
    answers = list(pool.map(lambda _: registry(), range(8)))
print(len({id(answer) for answer in answers}), [p.distribution for p in answers[0].plugins].count("quantplug-slow"))
"""
    assert run(code, str(site.directory)).split("\n") == ["imported", "1 1"]


def test_a_plugin_that_asks_for_the_registry_while_it_is_built_fails_alone(site):
    site.install("quantplug-eager", "quantplug_api = '>=1'\nfrom quantplug import registry\nregistry()")
    code = """
from quantplug.plugins import registry
print(*[f.error for f in registry().failures if f.distribution == "quantplug-eager"])
"""
    assert run(code, str(site.directory)) == (
        "quantplug.registry(): called by a plugin while plugins are being discovered. "
        "Ask for it where it is used, not while the plugin is imported [QP-PLUG-CALL]"
    )


def ours(folder: str) -> set[str]:
    """Return the names of the distributions below a folder of this repository that are plugins."""
    described = [tomllib.loads(file.read_text())["project"] for file in ROOT.glob(f"{folder}/*/pyproject.toml")]
    return {project["name"] for project in described if "quantplug.plugins" in project.get("entry-points", {})}


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_the_installed_plugins_of_this_project_are_sound():
    """All that `make` installs of this repository loads without a failure or a conflict, and the answer is kept."""
    code = """
from quantplug import registry as r
print(r() is r(), r().failures, r().conflicts, *(info.distribution for info in r().plugins))
"""
    kept, failures, conflicts, *found = run(code).split()
    assert (kept, failures, conflicts) == ("True", "()", "()")
    expected = ours("plugins") | set(filter(is_installed, ours("plugins-gpu")))
    assert "quantplug-gptq" in expected
    assert expected <= set(found)
