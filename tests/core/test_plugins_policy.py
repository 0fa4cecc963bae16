"""
The environment's allow list, deny list and strictness.
"""

from __future__ import annotations

import sys

import pytest

from quantplug.errors import PluginError
from quantplug.plugins import discover

BROKEN = "quantplug_api = '>=1'\nimport gone_for_good"


@pytest.fixture
def three(site):
    """Return a site with three sound plugins whose entry points are named a, b and c."""
    for letter in "abc":
        site.install(f"plug-{letter}", entry_points=f"[quantplug.plugins]\n{letter} = plug_{letter}.plugin\n")
    return site


def names(site, **environ: str) -> list[str]:
    return [p.distribution for p in discover([str(site.directory)], environ=environ).plugins]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "abc"),
        ({"QUANTPLUG_PLUGINS": "a"}, "a"),
        ({"QUANTPLUG_PLUGINS": " plug_B , c,"}, "bc"),
        ({"QUANTPLUG_PLUGINS": ""}, ""),
        ({"QUANTPLUG_PLUGINS": " , "}, ""),
        ({"QUANTPLUG_DISABLE_PLUGINS": "b,Plug.C"}, "a"),
        ({"QUANTPLUG_DISABLE_PLUGINS": "not-installed"}, "abc"),
        ({"QUANTPLUG_PLUGINS": "a,b", "QUANTPLUG_DISABLE_PLUGINS": "b"}, "a"),
        ({"QUANTPLUG_STRICT": "1"}, "abc"),
    ],
)
def test_the_lists_say_who_comes_in(three, environ, expected):
    assert names(three, **environ) == [f"plug-{letter}" for letter in expected]


def test_what_is_kept_out_is_not_imported_and_is_listed_with_the_reason(three):
    found = discover([str(three.directory)], environ={"QUANTPLUG_PLUGINS": "a,b", "QUANTPLUG_DISABLE_PLUGINS": "b"})
    assert "plug_b" not in sys.modules
    assert "plug_c" not in sys.modules
    assert [str(disabled) for disabled in found.disabled] == [
        "plug-b (b) is kept out by QUANTPLUG_DISABLE_PLUGINS",
        "plug-c (c) is kept out by QUANTPLUG_PLUGINS",
    ]
    with pytest.raises(PluginError, match=r"note that plug-b \(b\) is kept out by QUANTPLUG_DISABLE_PLUGINS"):
        found.scheme("plug-b")


def test_an_allow_list_with_what_is_not_installed_is_an_error(three):
    three.install("plug-broken", metadata="")
    with pytest.raises(PluginError) as caught:
        names(three, QUANTPLUG_PLUGINS="a,d,plug-e")
    assert caught.value.code == "QP-PLUG-ALLOW"
    assert str(caught.value).startswith(
        "QUANTPLUG_PLUGINS: names d, plug-e, which is not installed; "
        "expected entry points or distributions: a (plug-a), b (plug-b), c (plug-c). "
        "Install it, or take it off the list; note that plug-broken 1.0 failed at metadata: "
    )
    assert names(three) == ["plug-a", "plug-b", "plug-c"]


def test_an_allow_list_says_so_when_nothing_is_installed(site):
    with pytest.raises(PluginError, match="expected entry points or distributions: there are none"):
        names(site, QUANTPLUG_PLUGINS="a")


def test_an_allowed_plugin_that_is_broken_is_a_failure_not_a_missing_one(three):
    three.install("plug-broken", BROKEN)
    found = discover([str(three.directory)], environ={"QUANTPLUG_PLUGINS": "plug-broken"})
    assert [failure.distribution for failure in found.failures] == ["plug-broken"]
    three.install("plug-nameless", metadata="")
    found = discover([str(three.directory)], environ={"QUANTPLUG_PLUGINS": "plug-nameless"})
    assert [failure.distribution for failure in found.failures] == ["plug-nameless"]


@pytest.mark.parametrize("environ", [{"QUANTPLUG_PLUGINS": "a"}, {"QUANTPLUG_DISABLE_PLUGINS": "plug-broken"}])
def test_failures_of_what_is_kept_out_are_not_reported(three, environ):
    three.install("plug-broken", metadata="")
    found = discover([str(three.directory)], environ={**environ, "QUANTPLUG_STRICT": "1"})
    assert found.failures == ()


@pytest.mark.parametrize("variable", ["QUANTPLUG_PLUGINS", "QUANTPLUG_DISABLE_PLUGINS"])
def test_an_entry_point_of_two_distributions_must_be_named_by_distribution(three, variable):
    three.install("plug-other", entry_points="[quantplug.plugins]\na = plug_other.plugin\n")
    with pytest.raises(PluginError) as caught:
        names(three, **{variable: "a"})
    assert caught.value.code == "QP-PLUG-CONFLICT"
    assert str(caught.value) == (
        f"{variable}: names a, an entry point of plug-a and plug-other; "
        "expected the name of one distribution [QP-PLUG-CONFLICT]"
    )
    assert names(three, QUANTPLUG_PLUGINS="plug-other") == ["plug-other"]


def test_a_distributions_name_comes_before_an_entry_points(three):
    three.install("plug-other", entry_points="[quantplug.plugins]\nplug-a = plug_other.plugin\n")
    assert names(three, QUANTPLUG_PLUGINS="plug-a") == ["plug-a"]


@pytest.mark.parametrize("value", ["1", "yes"])
def test_strictness_turns_failures_into_one_error_that_tells_all(three, value):
    three.install("plug-broken", BROKEN)
    three.install("plug-nameless", metadata="")
    with pytest.raises(PluginError) as caught:
        names(three, QUANTPLUG_STRICT=value)
    assert caught.value.code == "QP-PLUG-STRICT"
    assert "plug-broken 1.0 (plug-broken) failed at import: ModuleNotFoundError: " in str(caught.value)
    assert "plug-nameless 1.0 failed at metadata: " in str(caught.value)
    assert "QUANTPLUG_DISABLE_PLUGINS" in caught.value.fix
    assert names(three) == ["plug-a", "plug-b", "plug-c"]


@pytest.mark.parametrize("value", ["", "0"])
def test_strictness_is_off_unless_asked_for(three, value):
    three.install("plug-broken", BROKEN)
    assert len(names(three, QUANTPLUG_STRICT=value)) == 3


def test_the_process_environment_is_what_counts_by_default(three, monkeypatch):
    monkeypatch.setenv("QUANTPLUG_PLUGINS", "b")
    assert [p.distribution for p in discover([str(three.directory)]).plugins] == ["plug-b"]
