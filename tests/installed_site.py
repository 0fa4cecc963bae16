"""
Distributions installed for a test, as pip would leave them.
"""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

SCHEME = """
    from quantplug.scheme import LinearScheme

    methods = {name: lambda *args: None for name in LinearScheme.__abstractmethods__}
    Scheme = type("Scheme", (LinearScheme,), {**methods, "name": "NAME", "describe": lambda self: "NAME works"})
"""

GOOD = """
    from quantplug.hooks import hookimpl

    quantplug_api = ">=1,<2"

    @hookimpl
    def quantplug_schemes():
        from PACKAGE.scheme import Scheme

        return [Scheme]
"""


class Site:
    """A directory on the import path into which a test installs distributions as pip would leave them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def install(
        self,
        name: str,
        source: str | None = GOOD,
        *,
        version: str = "1.0",
        entry_points: str | bytes | None = None,
        metadata: str | None = None,
        info: str = "{package}-{version}.dist-info",
    ) -> Path:
        """
        Install one distribution and return its metadata directory.

        Args:
            name: its name; the package is spelled with underscores, the entry point is the name itself.
            source: text of plugin.py (PACKAGE stands for the package), None for none; scheme.py is always there.
            version: its version.
            entry_points: content of entry_points.txt, None for one ordinary line.
            metadata: content of METADATA, None for an ordinary one, "" for no such file.
            info: name of the metadata directory.

        """
        package = re.sub(r"[-_.]+", "_", name).lower()
        directory = self.directory / package
        directory.mkdir(parents=True)
        (directory / "__init__.py").touch()
        (directory / "scheme.py").write_text(dedent(SCHEME).replace("NAME", package.replace("_", "-")))
        if source is not None:
            (directory / "plugin.py").write_text(dedent(source).replace("PACKAGE", package))
        found = self.directory / info.format(package=package, version=version)
        found.mkdir()
        if entry_points is None:
            entry_points = f"[quantplug.plugins]\n{name} = {package}.plugin\n"
        if isinstance(entry_points, str):
            entry_points = entry_points.encode()
        (found / "entry_points.txt").write_bytes(entry_points)
        if metadata is None:
            metadata = f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n\nText.\n"
        if metadata:
            (found / "METADATA").write_text(metadata)
        return found
