"""Prints the section of CHANGELOG.md for a version tag: `python .github/release_notes.py v0.2.0`.

Exits with 1 and one line if the tag is not that of imagegen.__version__, or if the changelog has no such section.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def notes(tag: str, root: Path = ROOT) -> str:
    """Return the text below the version's heading. Raises ValueError if tag, version and changelog disagree."""
    source = (root / "imagegen" / "__init__.py").read_text(encoding="utf-8")
    version = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)[0]
    if tag != f"v{version}":
        raise ValueError(f"the tag {tag} is not v{version}, the version of imagegen/__init__.py")
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        if heading.strip() == version:
            return text.strip() + "\n"
    raise ValueError(f"CHANGELOG.md has no section {version}")


def main() -> None:
    try:
        print(notes(sys.argv[1]), end="")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
