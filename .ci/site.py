"""Read a built site as a browser would without a network: site.py FOLDER.

Every link inside leads to a page and a place on it; scripts, styles, fonts and images are the site's own; mathematics
is marked as such; and the names of the package that pages show in code link to the reference.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyromosaic

FETCHED = {"script": "src", "img": "src", "link": "href", "source": "src", "iframe": "src"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
RAW = re.compile(r"\$\$|\\(?:frac|mathrm|sum|log|mid|sigma|theta|begin)\b")
NAMES = set(pyromosaic._HOME)


class Page(HTMLParser):
    """What a page names, links to and fetches."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.places, self.links, self.fetched = {"", "top"}, [], []
        self.raw, self.unlinked, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        """Note places, links and what is fetched."""
        attributes = dict(attributes)
        self.places |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        if tag in FETCHED and attributes.get(FETCHED[tag]) and attributes.get("rel") not in ("canonical", "index"):
            self.fetched.append(attributes[FETCHED[tag]])
        if tag not in VOID:
            self.open.append((tag, attributes.get("class") or ""))

    def handle_endtag(self, tag):
        """Close it and what was left open inside."""
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        """Look for LaTeX and names outside of links."""
        tags = {tag for tag, _ in self.open}
        if "article" not in tags:
            return
        shown = not tags & {"pre", "code", "script", "style"} and not any("math" in kind for _, kind in self.open)
        if shown and RAW.search(data):
            self.raw.append(data.strip())
        if "code" in tags and data in NAMES and not tags & {"a", "pre", "dt", "h1", "h2", "h3", "h4"}:
            self.unlinked.append(data)


def main(folder: Path) -> int:
    """Print what is wrong; the number of faults."""
    pages = {
        path: Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html") if "_static" not in path.parts
    }
    faults = []
    for path, page in pages.items():
        where = path.relative_to(folder)
        faults += [f"{where}: LaTeX as text: {text[:60]!r}" for text in page.raw]
        if where.parts[0] not in ("generated", "_modules") and where.name != "changelog.html":
            faults += [f"{where}: {name} in code is no link" for name in page.unlinked]
        for address in [*page.links, *page.fetched]:
            parts = urlsplit(address)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                faults += [f"{where}: fetches {address}"] * (address in page.fetched)
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                faults.append(f"{where}: {address} leads nowhere")
            elif where.parts[0] == "_modules":
                continue  # pages of source lead to the page of an object, but name its place by another home
            elif target in pages and unquote(parts.fragment) not in pages[target].places:
                faults.append(f"{where}: no such place: {address}")
    styles = [path for path in folder.rglob("*.css") if re.search(r"url\(['\"]?(https?:|//)", path.read_text())]
    faults += [f"{path.relative_to(folder)} fetches from another site" for path in styles]
    print(*sorted(set(faults)), sep="\n")
    print(f"{len(pages)} pages, {sum(len(page.links) for page in pages.values())} links, {len(set(faults))} faults")
    return len(faults)


if __name__ == "__main__":
    sys.exit(bool(main(Path(sys.argv[1]).resolve())))
