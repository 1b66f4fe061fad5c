"""Keeps out of the wheel and the sdist what git does not track: notes, keys and runs that lie in the tree."""

import re
import subprocess
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class TrackedFiles(BuildHookInterface):
    """Excludes untracked files, ignored ones included; a tree without git, such as an sdist's, is whole."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if not self._git("ls-files", "pyproject.toml"):  # no git, or another project's
            return
        # A wheel that is installed for editing holds a path alone.
        untracked = (self._git("ls-files", "--others", "--directory", "-z") or "").split("\0")
        patterns = ["/" + re.sub(r"([*?\[\]\\ !#])", r"\\\1", name) for name in untracked if name]
        self.build_config.target_config["exclude"] = patterns

    def _git(self, *arguments: str) -> str:
        try:
            return subprocess.run(
                ["git", *arguments], cwd=self.root, capture_output=True, text=True, check=True
            ).stdout
        except (OSError, subprocess.CalledProcessError):
            return ""
