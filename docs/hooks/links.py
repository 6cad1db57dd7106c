"""Make links that leave docs/ work on the site, where only docs/ is published.

The home page is README.md. Pages beside docs/ (SECURITY.md, benchmarks/, ...) and every file that a
page links to are published under source/; a link to a folder becomes its text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("benchmarks/README.md", "benchmarks/aot.md"),
)
_LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the home page, the pages beside docs/, and the files that pages link to."""
    files.append(File.generated(config, "index.md", content=_read("README.md")))
    for name in PAGES:
        files.append(File.generated(config, f"source/{name}", content=_read(name)))
    for page in list(files.documentation_pages()):
        for match in _LINK.finditer(page.content_string):
            name = _repository_path(page.src_uri, match["target"])
            site = _site_path(name)
            if site.startswith("source/") and site not in files.src_uris and _is_file(name):
                files.append(File.generated(config, site, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point every relative link to the place on the site where its file is published."""
    here = posixpath.dirname(page.file.src_uri)

    def replace(match: re.Match[str]) -> str:
        name = _repository_path(page.file.src_uri, match["target"])
        if (ROOT / name).is_dir():
            return match["text"].strip("[]")
        target = posixpath.relpath(_site_path(name), here or ".")
        return f"{match['text']}({target}{match['anchor'] or ''})"

    return _LINK.sub(replace, markdown)


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _is_file(name: str) -> bool:
    return not name.startswith("../") and (ROOT / name).is_file()


def _repository_path(page: str, target: str) -> str:
    """The path in the repository of a link on a page; both are known by their places on the site.

    >>> _repository_path("plan.md", "../benchmarks/aot.md")
    'benchmarks/aot.md'
    >>> _repository_path("source/SECURITY.md", "docs/chat.md")
    'docs/chat.md'
    """
    if page == "index.md":
        source = "README.md"
    elif page.startswith("source/"):
        source = page.removeprefix("source/")
    else:
        source = f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _site_path(name: str) -> str:
    """The place on the site of a file of the repository.

    >>> _site_path("docs/chat.md"), _site_path("README.md"), _site_path("Dockerfile")
    ('chat.md', 'index.md', 'source/Dockerfile')
    """
    if name == "README.md":
        return "index.md"
    return name.removeprefix("docs/") if name.startswith("docs/") else f"source/{name}"
