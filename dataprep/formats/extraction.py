"""The text in HTML, Markdown, PDF and EPUB, by libraries behind an extra."""

import io
import logging
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from headrace.schemas.errors import ConfigError, DataError, install_hint
from headrace.schemas.prepare.source_config import Extract, SourceConfig

LIBRARIES: dict[Extract, str] = {
    "html": "trafilatura",
    "markdown": "markdown-it-py",
    "pdf": "pypdf",
    "epub": "lxml",
}


class ExtractionError(Exception):
    """A document in which no text is found, or that cannot be read; says why."""


def library_version(source: SourceConfig) -> str:
    """Return which version of a library extracts a source's text, which decides the text.

    Raises:
        ConfigError: it is not installed.
        DataError: the config wants another one.
    """
    assert source.extract is not None
    library = LIBRARIES[source.extract]
    try:
        found = f"{library} {version(library)}"
    except PackageNotFoundError:
        raise ConfigError(
            f'source "{source.name}": extract = "{source.extract}" needs {library}; '
            f"{install_hint('documents')}"
        ) from None
    if source.extract_version not in (None, found):
        raise DataError(
            f'source "{source.name}": extract_version = "{source.extract_version}", but {found} '
            "is installed; install the other, or remove the key"
        )
    return found


def extract_text(kind: Extract, content: str | bytes) -> str:
    """Return the text of a document.

    Raises:
        ExtractionError: it cannot be read, or has none.
    """
    for name in ("pypdf", "trafilatura"):  # what they say of a document stands in its refusal
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        text = EXTRACTORS[kind](content)
    except Exception as error:  # noqa: BLE001  what a parser makes of a broken document
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ExtractionError(f"{LIBRARIES[kind]} cannot read it: {reason}") from None
    if not text or not text.strip():
        raise ExtractionError(f"{LIBRARIES[kind]} finds no text in it")
    return text


def of_html(content: str | bytes) -> str | None:
    """The main text of a page, without menus, comments and scripts."""
    import trafilatura

    text: str | None = trafilatura.extract(content, include_comments=False, include_tables=True)
    return text


def of_markdown(content: str | bytes) -> str:
    """The text of Markdown: its blocks, parted by empty lines, without marks."""
    from markdown_it import MarkdownIt

    assert isinstance(content, str)
    tokens = MarkdownIt("commonmark").enable("table").parse(content)
    return "\n\n".join(block for block in blocks(tokens) if block)


def blocks(tokens: list[Any]) -> Iterator[str]:
    """The text of each block."""
    for token in tokens:
        if token.type == "inline":
            yield "".join(inline(child) for child in token.children or []).strip()
        elif token.type in ("fence", "code_block"):
            yield token.content.rstrip("\n")


def inline(token: Any) -> str:
    """The text of a part of a line; of an image what stands for it."""
    if token.type in ("softbreak", "hardbreak"):
        return "\n"
    return str(token.content) if token.type in ("text", "code_inline", "image") else ""


def of_pdf(content: str | bytes) -> str:
    """The text of all pages, parted by empty lines."""
    from pypdf import PdfReader

    assert isinstance(content, bytes)
    pages = PdfReader(io.BytesIO(content)).pages
    return "\n\n".join(text for page in pages if (text := page.extract_text().strip()))


def of_epub(content: str | bytes) -> str:
    """The text of all chapters, parted by empty lines."""
    from headrace.dataprep.formats.epub import epub_text

    assert isinstance(content, bytes)
    return epub_text(content)


EXTRACTORS: dict[Extract, Callable[[str | bytes], str | None]] = {
    "html": of_html,
    "markdown": of_markdown,
    "pdf": of_pdf,
    "epub": of_epub,
}
