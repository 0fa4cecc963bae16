"""
Readers that dialects share: from the lists and mappings of a configuration to typed entries and ordered rules.

Each is named for how the lists of a family of formats are meant, not for who writes them; a dialect picks one. What no
reading makes sense of is refused here, with the place it stands at, so that an empty text never covers a whole model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Never

from quantplug.errors import ConfigError
from quantplug.patterns import MAX_NAME, compile_glob, vet
from quantplug.readings import ROOTS
from quantplug.skip import Entry, EntryKind, Rule, SchemeRef

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantplug.jsonio import Json
    from quantplug.skip import RegexMode

_GLOB = frozenset("*?[")
_EXPRESSION = frozenset("\\^$()|{}+")
"""Characters that neither paths nor globs have."""
_ORDINARY = re.compile(r"[\w-]+(?:\.[\w-]+)*", re.ASCII).fullmatch
_ENTRY = "a module path, a glob or re:EXPRESSION"


def path_entries(texts: object, origin: str) -> tuple[Entry, ...]:
    """
    Read a list of layers to leave alone, each text typed by its looks.

    This is how most formats' lists are used (`modules_to_not_convert`, `ignored_layers`, `exclude`): writers put full
    paths, parts of paths, parents, globs and expressions into one list, and readers differ in which they know.
    `re:` and texts with characters of expressions are expressions from the start of the path; `*`, `?` or `[` make a
    glob; a trailing dot means the path and all below it; anything else is a run of whole components. Whatever is named
    so, what lies below it is covered, too: `model.layers.*.self_attn` is about the projections in there, as in
    Transformers 5.23, which applies these lists up to any dot of a path. Spaces around a text and one leading dot are
    dropped.

    Args:
        texts: a JSON list of texts, or None for none.
        origin: where the list stands.

    Raises:
        ConfigError: `QP-CFG-FIELD` when it is not a list of texts; `QP-SKIP-PATTERN` for a text that is empty, covers
            everything, is malformed, or could run without bound.

    """
    return tuple(_path_entry(text, where) for text, where in _texts(texts, origin))


def suffix_entries(texts: object, origin: str) -> tuple[Entry, ...]:
    """
    Read a list of full paths or their last components, class names, and `re:` expressions from the start of the path.

    This is how resolved lists are meant (`ignore`, `targets`): an entry names a layer, never the layers below it, and
    `*` has no meaning. A capitalised word without dots (`Linear`) is a class name.

    Raises:
        ConfigError: as `path_entries`.

    """
    return tuple(_suffix_entry(text, where) for text, where in _texts(texts, origin))


def glob_entries(texts: object, origin: str) -> tuple[Entry, ...]:
    """
    Read a list of globs over whole paths and of plain paths, which cover what lies below them.

    This is how `exclude_modules` lists are meant; `re:` has no meaning in them.

    Raises:
        ConfigError: as `path_entries`.

    """
    return tuple(
        _glob_entry(text, where, EntryKind.GLOB) if _GLOB.intersection(text) else _literal_entry(text, where)
        for text, where in _texts(texts, origin)
    )


def exact_or_regex_entries(texts: object, origin: str, mode: RegexMode) -> tuple[Entry, ...]:
    """
    Read names of single layers and expressions over names, without a prefix: exact names first, then the others.

    This is how the keys of per-layer mappings are meant: a layer's own name wins over any expression, and the first
    expression that matches wins over later ones. A text with a character that expressions use is an expression.

    Args:
        texts: a JSON list of texts, or None.
        origin: where it stands.
        mode: how the format's own reader applies expressions.

    Raises:
        ConfigError: as `path_entries`.

    """
    special = _GLOB | _EXPRESSION
    entries = [
        _regex_entry(text, text, where, mode) if special.intersection(text)
        else Entry(text, EntryKind.EXACT, _plain(text, where), where)
        for text, where in _texts(texts, origin)
    ]  # fmt: skip
    return tuple(sorted(entries, key=lambda entry: entry.kind is EntryKind.REGEX))


def described_entries(mapping: object, origin: str, whole: frozenset[str]) -> tuple[Entry, ...]:
    """
    Read a description of every tensor by name; modules whose weight has a value in `whole` are left alone.

    Raises:
        ConfigError: `QP-CFG-FIELD` when it is not an object of texts.

    """
    entries = []
    for key, value in _object(mapping, origin).items():
        if not isinstance(value, str):
            _wrong_field(f"{origin}[{key!r}]", value, "a text")
        if value in whole and key.endswith(".weight"):
            entries.append(Entry(key, EntryKind.EXACT, key.removesuffix(".weight"), origin))
    return tuple(entries)


def only_rules(texts: object, use: SchemeRef, origin: str) -> tuple[Rule, ...]:
    """
    Read a list, perhaps nested, of the only layers that are quantized; the default scheme is then None.

    Texts are typed as in `path_entries`. Whether an empty list means all layers or none is for the dialect to say.

    Raises:
        ConfigError: as `path_entries`.

    """
    return tuple(Rule(_path_entry(text, where), use) for text, where in _texts(texts, origin, nested=True))


def rules_from_dynamic(mapping: object, base: SchemeRef, origin: str) -> tuple[Rule, ...]:
    """
    Read ordered overrides by expression: `-:EXPRESSION` leaves alone, `+:EXPRESSION` or bare changes parameters.

    Expressions apply from the start of the path, with an open end (`re.match`); the first that matches decides.

    Args:
        mapping: expression -> parameters, in the order of the file, or None.
        base: what an override starts from.
        origin: where the mapping stands.

    Raises:
        ConfigError: `QP-CFG-FIELD` when a value is not an object of plain values; `QP-SKIP-PATTERN`.

    """
    rules = []
    for number, (key, value) in enumerate(_object(mapping, origin).items()):
        where = f"{origin}[{number}]"
        entry = _regex_entry(key, key.removeprefix("-:" if key.startswith("-:") else "+:"), where, "match")
        rules.append(Rule(entry, None if key.startswith("-:") else merge_params(base, value, where)))
    return tuple(rules)


def merge_params(base: SchemeRef, changes: object, origin: str) -> SchemeRef:
    """
    Return a scheme reference with some parameters changed.

    Raises:
        ConfigError: `QP-CFG-FIELD` when `changes` is not an object of plain JSON values.

    """
    params: dict[str, Json] = dict(base.params)
    for key, value in _object(changes, origin).items():
        if not (value is None or isinstance(value, (bool, int, float, str))):
            _wrong_field(f"{origin}.{key}", value, "a number, a text, true, false or null")
        params[key] = value
    return SchemeRef(base.name, tuple(sorted(params.items())))


def _path_entry(text: str, where: str) -> Entry:
    if len(text) <= MAX_NAME and _ORDINARY(text):
        return Entry(text, EntryKind.COMPONENT, text, where)  # nearly every entry of a long list
    bare = text.strip()
    if bare.startswith("re:"):
        return _regex_entry(text, bare.removeprefix("re:"), where, "match")
    if _EXPRESSION.intersection(bare) or bare.startswith(".*"):
        return _regex_entry(text, bare, where, "match")
    if _GLOB.intersection(bare):
        return _glob_entry(text, where, EntryKind.GLOB_PARENT)
    return _literal_entry(text, where)


def _suffix_entry(text: str, where: str) -> Entry:
    bare = text.strip()
    if bare.startswith("re:"):
        return _regex_entry(text, bare.removeprefix("re:"), where, "match")
    kind = EntryKind.CLASS if bare[:1].isupper() and bare.isidentifier() else EntryKind.SUFFIX
    return Entry(text, kind, _plain(text, where), where)


def _regex_entry(text: str, pattern: str, where: str, mode: RegexMode) -> Entry:
    if not pattern.strip():
        _refuse(where, f"{text!r} is an expression without text, which would cover every module", "an expression")
    vet(pattern, where, mode)
    return Entry(text, EntryKind.REGEX, pattern, where, mode)


def _glob_entry(text: str, where: str, kind: EntryKind) -> Entry:
    pattern = _plain(text, where)
    if not pattern.strip("*?."):
        _refuse(where, f"{text!r} would cover every module", "a glob with some literal text")
    compile_glob(pattern, where)
    return Entry(text, kind, pattern, where)


def _literal_entry(text: str, where: str) -> Entry:
    bare = _plain(text, where)
    pattern = bare.removeprefix(".").removesuffix(".")
    if not pattern:
        _refuse(where, f"{text!r} would cover every module", _ENTRY)
    if "" in pattern.split("."):
        _refuse(where, f"{text!r} has dots with nothing between them", _ENTRY)
    # A path that starts at the root of the model is anchored there; any other may stand below wrappers.
    rooted = bare.endswith(".") and pattern.partition(".")[0] in ROOTS
    return Entry(text, EntryKind.PARENT if rooted else EntryKind.COMPONENT, pattern, where)


def _plain(text: str, where: str) -> str:
    bare = text.strip()
    if not bare:
        _refuse(where, "an empty text, which would cover every module", _ENTRY)
    if len(bare) > MAX_NAME:
        _refuse(where, f"a text of {len(bare):,} characters ({bare[:40]!r}…)", f"at most {MAX_NAME}")
    if not bare.isprintable() or " " in bare:
        _refuse(where, f"{text!r} has spaces or control characters", _ENTRY)
    return bare


def _texts(texts: object, origin: str, *, nested: bool = False) -> Iterator[tuple[str, str]]:
    if texts is None:
        return
    if not isinstance(texts, (list, tuple)):
        _wrong_field(origin, texts, "a list of texts")
    for number, text in enumerate(texts):
        where = f"{origin}[{number}]"
        if isinstance(text, str):
            yield text, where
        elif nested and isinstance(text, list):
            yield from _texts(text, where, nested=True)
        else:
            _wrong_field(where, text, "a text")


def _object(value: object, origin: str) -> Mapping[str, Json]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        _wrong_field(origin, value, "an object")
    return value


def _wrong_field(where: str, value: object, expected: str) -> Never:
    raise ConfigError(
        "QP-CFG-FIELD", where, f"is of type {type(value).__name__} ({repr(value)[:60]})", expected=expected
    )


def _refuse(where: str, what: str, expected: str) -> Never:
    raise ConfigError("QP-SKIP-PATTERN", where, what, expected=expected, fix="Correct the entry, or take it out.")
