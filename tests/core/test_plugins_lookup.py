"""
Looking up what plugins offer: by name, with an answer or an error that a stranger can act on.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from quantplug.config import Dialect
from quantplug.errors import PluginError
from quantplug.hooks import hookimpl
from quantplug.host import Host
from quantplug.kernel import LinearKernel
from quantplug.names import Architecture
from quantplug.peers import PeerReader
from quantplug.plugins import build_registry
from quantplug.scheme import LinearScheme


def concrete(base: type, **body: object) -> type:
    """Return a subclass whose abstract methods do nothing."""
    return type(base.__name__, (base,), {**dict.fromkeys(base.__abstractmethods__, print), **body})


def kernel(name: str) -> LinearKernel:
    return concrete(LinearKernel, name=name, layout_id="l")()


def dialect(name: str, *methods: str) -> Dialect:
    return concrete(Dialect, name=name, methods=methods)()


def host(name: str) -> Host:
    return concrete(Host, name=name)()


def peer(name: str) -> PeerReader:
    return concrete(PeerReader, name=name, version="1.0")()


def plugin(**hooks: list[object]) -> SimpleNamespace:
    """Return a plugin whose hooks (schemes=..., kernels=...) return these lists."""
    return SimpleNamespace(
        **{f"quantplug_{name}": hookimpl(lambda items=items: items) for name, items in hooks.items()}
    )


SCHEME = concrete(LinearScheme, name="gptq")

TWO = build_registry(
    {
        "plug-a": plugin(
            schemes=[SCHEME],
            kernels=[kernel("cpu.int4"), kernel("both")],
            dialects=[dialect("gptq", "gptq", "gptq-alias"), dialect("mine", "contested")],
            hosts=[host("engine")],
            peers=[peer("other-engine")],
            architectures=[Architecture("llama", ("llama", "mistral")), Architecture("fallback")],
        ),
        "plug-b": plugin(kernels=[kernel("both")], dialects=[dialect("other", "contested")]),
        "plug-c": plugin(kernels=["nonsense"]),
    }
)


def test_what_is_there_comes_with_who_brings_it():
    assert (TWO.scheme("gptq").item, TWO.scheme("gptq").plugin) == (SCHEME, "plug-a")
    assert TWO.kernel("cpu.int4").item.name == "cpu.int4"
    assert TWO.kernel("reference").plugin == "quantplug-core"
    assert TWO.dialect_for("gptq-alias").item.name == "gptq"
    assert TWO.host("engine").item is TWO.host().item
    assert TWO.peers["other-engine"].plugin == "plug-a"
    assert TWO.architecture_for("mistral").item.name == "llama"
    assert TWO.architecture_for("never-heard-of") is None


@pytest.mark.parametrize(
    ("look", "text"),
    [
        (
            lambda r: r.scheme("gtpq"),
            "scheme 'gtpq': no installed plugin provides it; expected one of: gptq (plug-a). "
            "Did you mean 'gptq'? Install a plugin that brings it; note that plug-c (plug-c) failed at call: "
            "quantplug_kernels(): item 0: is of type str; expected an instance of LinearKernel [QP-PLUG-CALL]; "
            "note that kernel 'both' is claimed by plug-a and plug-b; "
            "note that quant_method 'contested' is claimed by plug-a and plug-b [QP-PLUG-MISSING]",
        ),
        (lambda r: r.kernel("marlin"), "expected one of: cpu.int4 (plug-a), reference (quantplug-core). Install"),
        (
            lambda r: r.host("other"),
            "host 'other': no installed plugin provides it; expected one of: engine (plug-a). ",
        ),
        (
            lambda r: r.dialect_for("gptq_v2"),
            "quant_method 'gptq_v2': no installed plugin provides it; expected one of",
        ),
    ],
)
def test_what_is_missing_is_named_with_what_there_is_and_what_went_wrong(look, text):
    with pytest.raises(PluginError) as caught:
        look(TWO)
    assert caught.value.code == "QP-PLUG-MISSING"
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("look", "text"),
    [
        (lambda r: r.kernel("both"), "kernel 'both': claimed by plug-a and plug-b; expected one plugin per name. "),
        (lambda r: r.dialect_for("contested"), "quant_method 'contested': claimed by plug-a and plug-b; "),
    ],
)
def test_what_two_plugins_claim_is_an_error_that_names_both(look, text):
    with pytest.raises(PluginError) as caught:
        look(TWO)
    assert caught.value.code == "QP-PLUG-CONFLICT"
    assert text in str(caught.value)
    assert "QUANTPLUG_DISABLE_PLUGINS=plug-b" in caught.value.fix


def test_a_contested_method_takes_no_dialect_away():
    """Only the method is in dispute; the dialects' other methods have a reader still."""
    assert set(TWO.dialects) == {"gptq", "mine", "other"}


def test_a_method_of_a_contested_dialect_is_in_conflict_too():
    """Its reader is gone with the name, and saying that nobody reads it would hide why."""
    found = build_registry(
        {"plug-a": plugin(dialects=[dialect("same", "m1")]), "plug-b": plugin(dialects=[dialect("same", "m2")])}
    )
    for method in ("m1", "m2"):
        with pytest.raises(PluginError, match=f"quant_method '{method}': claimed by plug-a and plug-b"):
            found.dialect_for(method)


def test_without_a_host_the_error_says_what_to_install():
    with pytest.raises(PluginError) as caught:
        build_registry({}).host()
    assert str(caught.value) == (
        "host: no installed plugin provides any. Install a plugin that brings a host [QP-PLUG-MISSING]"
    )


def test_several_hosts_and_none_named_is_an_error_that_lists_them():
    found = build_registry({"plug-a": plugin(hosts=[host("one"), host("two")])})
    assert found.host("two").item.name == "two"
    with pytest.raises(PluginError) as caught:
        found.host()
    assert str(caught.value) == (
        "host: several are installed: one (plug-a), two (plug-a); expected one, or the name of one. "
        "Say which one is meant, or keep the others out with QUANTPLUG_DISABLE_PLUGINS [QP-PLUG-CONFLICT]"
    )


def test_the_writer_of_a_scheme_is_the_one_dialect_that_says_so():
    writer = concrete(Dialect, name="w", methods=("w",), writes=frozenset({"gptq"}))
    both = plugin(schemes=[SCHEME], dialects=[dialect("silent", "s"), writer()])
    assert build_registry({"plug-a": both}).dialect_writing("gptq").item.name == "w"
    other = plugin(dialects=[concrete(Dialect, name="v", methods=("v",), writes=frozenset({"gptq"}))()])
    with pytest.raises(
        PluginError, match=r"dialect that writes 'gptq': several are installed: v \(plug-b\), w \(plug-a\)"
    ) as e:
        build_registry({"plug-a": both, "plug-b": other}).dialect_writing("gptq")
    assert e.value.code == "QP-PLUG-CONFLICT"


def test_a_scheme_that_nobody_writes_is_an_error_as_is_one_that_is_not_there():
    with pytest.raises(PluginError, match=r"dialect that writes 'gptq': no installed plugin provides it\. Install"):
        build_registry({"plug-a": plugin(schemes=[SCHEME])}).dialect_writing("gptq")
    with pytest.raises(PluginError, match="scheme 'gptq': no installed plugin provides it"):
        build_registry({}).dialect_writing("gptq")


def test_a_contested_host_is_not_simply_missing():
    found = build_registry({"plug-a": plugin(hosts=[host("one")]), "plug-b": plugin(hosts=[host("one")])})
    with pytest.raises(PluginError, match="host 'one': claimed by plug-a and plug-b"):
        found.host()


def test_an_architecture_in_conflict_is_an_error_when_it_is_needed():
    rules = Architecture("llama", ("llama",))
    found = build_registry({"plug-a": plugin(architectures=[rules]), "plug-b": plugin(architectures=[rules])})
    assert found.architectures == ()
    assert found.architecture_for("qwen2") is None
    with pytest.raises(PluginError, match="model_type 'llama': claimed by plug-a and plug-b"):
        found.architecture_for("llama")
