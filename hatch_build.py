"""What the package's page on PyPI shows: the README with links that work there, and where the project lives."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)")


def absolute(text: str, repository: str) -> str:
    """Markdown whose relative links lead into the repository.

    Without a repository, links become their text and images are left out.
    """

    def link(match: re.Match[str]) -> str:
        image, words, path = match.groups()
        if not repository:
            return "" if image else words
        return f"{image}[{words}]({repository}/{'raw' if image else 'blob'}/HEAD/{path})"

    return RELATIVE.sub(link, text)


class PublishedMetadata(MetadataHookInterface):
    """Write `readme` and `urls`, from README.md and the address in pyproject.toml."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in both."""
        repository = self.config["repository"].rstrip("/")
        text = absolute((Path(self.root) / "README.md").read_text(encoding="utf-8"), repository)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        pages = {"Documentation": "docs/index.md", "Changelog": "CHANGELOG.md"}
        urls = {"Repository": repository, "Issues": f"{repository}/issues"}
        urls |= {name: f"{repository}/blob/HEAD/{page}" for name, page in pages.items()}
        metadata["urls"] = urls if repository else {}
