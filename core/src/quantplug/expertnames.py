"""
Finding experts among stored names: every name is parsed once, and looked up by what it says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quantplug.expertrules import Ending, ExpertFiles, ExpertRules
    from quantplug.header import TensorHeader


class ExpertName(NamedTuple):
    """
    What a module path says about an expert's projection.

    Attributes:
        container: path of the module that holds the experts.
        expert: its number.
        projection: last component, as stored ("gate_proj", "w1").
    """

    container: str
    expert: int
    projection: str


def parse_expert(path: str, containers: tuple[str, ...]) -> ExpertName | None:
    """
    Read `<container>.<number>.<projection>`; None for any other path.

    Args:
        path: a module path.
        containers: dotted suffixes that a container has.
    """
    rest, _, projection = path.rpartition(".")
    container, _, number = rest.rpartition(".")
    if not (number.isascii() and number.isdecimal()) or (number[0] == "0" and number != "0") or len(number) > 9:
        return None
    return ExpertName(container, int(number), projection) if is_container(container, containers) else None


def is_container(path: str, containers: tuple[str, ...]) -> bool:
    """Whether the last components of a path are one of these dotted suffixes."""
    return path.endswith(containers) and any(f".{path}".endswith(f".{suffix}") for suffix in containers)


class ExpertIndex:
    """
    The experts of a checkpoint by container.

    Args:
        paths: module paths that have tensors.
        rules: how the family spells experts.
    """

    def __init__(self, paths: Iterable[str], rules: ExpertRules) -> None:
        self._rules = rules
        self._containers: dict[str, str] = {}
        self._spelled: dict[str, dict[str, int]] = {}
        self.stacked: dict[str, None] = {}
        """Containers that store tensors of their own."""
        for path in paths:
            name = parse_expert(path, rules.containers)
            if name is not None:
                self._containers[path] = name.container
                counts = self._spelled.setdefault(name.container, {})
                counts[name.projection] = counts.get(name.projection, 0) + 1
            elif is_container(path, rules.containers):
                self.stacked[path] = None

    @property
    def containers(self) -> tuple[str, ...]:
        """Containers whose experts are stored one by one."""
        return tuple(self._spelled)

    def container_of(self, path: str) -> str | None:
        """Return the container of a stored projection of an expert, None for any other path."""
        return self._containers.get(path)

    def files_of(self, container: str) -> ExpertFiles | None:
        """
        Return the spelling of a container's experts: the one that most of their projections are named by.

        Another one's names are then missing here and left over there, which is an error about both.
        """
        counts = self._spelled.get(container, {})
        per_expert = [files for files in self._rules.files if not files.stacked]
        known = {id(files): sum(counts.get(name, 0) for name in files.projections) for files in per_expert}
        best = max(per_expert, key=lambda files: known[id(files)], default=None)
        return best if best is not None and known[id(best)] else None


def stacked_files(suffixes: Iterable[str], rules: ExpertRules) -> ExpertFiles | None:
    """
    Return the stacked spelling that a container's own tensors follow; None when no declared one explains all of them.

    Args:
        suffixes: names of its tensors ("gate_up_proj_blocks").
        rules: how the family spells experts.
    """
    names = frozenset(suffixes)
    candidates = (files for files in rules.files if files.stacked)
    return next((files for files in candidates if names and names <= files.stacked_names.keys()), None)


def one_expert(header: TensorHeader, ending: Ending) -> TensorHeader:
    """Return the header of a stacked tensor with the shape that one expert's share has in its format."""
    if ending.common:
        return header
    shape = header.shape[1:]
    if ending.transposed and len(shape) > 1:
        shape = (*shape[:-2], shape[-1], shape[-2])
    if ending.flattened and len(shape) > 1:
        shape = (*shape[:-2], shape[-2] * shape[-1])
    return replace(header, shape=shape)
