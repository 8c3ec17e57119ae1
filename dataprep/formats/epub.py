"""The text of EPUB books: chapters in reading order, read by lxml out of the archive.

Format: https://www.w3.org/TR/epub-33/ (a ZIP archive; META-INF/container.xml names the package
document, whose spine lists the chapters in order).
"""

import io
import posixpath
import zipfile
from collections.abc import Iterator
from urllib.parse import unquote

from lxml import etree, html

CONTAINER = "META-INF/container.xml"
PARSER = etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False)
MOST_TIMES = 100  # that an archive may unpack to its own size
BLOCKS = {
    *("address", "article", "aside", "blockquote", "body", "dd", "div", "dl", "dt", "figcaption"),
    *("figure", "footer", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav"),
    *("ol", "p", "pre", "section", "table", "td", "th", "tr", "ul"),
}
UNREAD = {"head", "script", "style", "svg", "math", "audio", "video"}


class Book:
    """An archive of which no more is unpacked than a bound on its size allows.

    Raises:
        ValueError: no archive, or one that unpacks to too much.
    """

    def __init__(self, content: bytes) -> None:
        try:
            self.archive = zipfile.ZipFile(io.BytesIO(content))
        except zipfile.BadZipFile as error:
            raise ValueError(f"no ZIP archive ({error})") from None
        self.left = MOST_TIMES * len(content)

    def read(self, name: str) -> bytes:
        """Return one file."""
        try:
            entry = self.archive.getinfo(name)
        except KeyError:
            raise ValueError(f"no {name} in the archive") from None
        with self.archive.open(entry) as file:
            data = file.read(self.left + 1)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"unpacks to more than {MOST_TIMES} times its size")
        return data

    def chapters(self) -> Iterator[str]:
        """Yield the names of the files of chapters, in reading order."""
        container = parse(self.read(CONTAINER))
        packages = [node.get("full-path") for node in named(container, "rootfile")]
        if not packages or packages[0] is None:
            raise ValueError(f"{CONTAINER} names no package document")
        package, folder = parse(self.read(packages[0])), posixpath.dirname(packages[0])
        files = {node.get("id"): node.get("href") for node in named(package, "item")}
        for node in named(package, "itemref"):
            href = files.get(node.get("idref"))
            if href and node.get("linear") != "no":
                yield posixpath.normpath(posixpath.join(folder, unquote(href)))


def parse(data: bytes) -> etree._Element:
    """Return the root of an XML document; entities are not looked up."""
    return etree.fromstring(data, PARSER)


def named(root: etree._Element, name: str) -> list[etree._Element]:
    """Return all elements of a name, in any namespace."""
    return list(root.iter(f"{{*}}{name}"))


def epub_text(content: bytes) -> str:
    """Return the text of a book, its blocks parted by empty lines.

    Raises:
        ValueError: no EPUB book, or one that unpacks to too much.
    """
    book = Book(content)
    texts = [chapter_text(book.read(name)) for name in book.chapters()]
    return "\n\n".join(filter(None, texts))


def chapter_text(data: bytes) -> str:
    """Return the text of one chapter."""
    if not data.strip():
        return ""
    root = html.fromstring(data, parser=html.HTMLParser(encoding="utf-8"))
    texts = (text.strip("\n") if kept else " ".join(text.split()) for kept, text in blocks(root))
    return "\n\n".join(filter(None, texts))


def blocks(root: html.HtmlElement) -> Iterator[tuple[bool, str]]:
    """Yield the text of each block, between two elements that begin or end one.

    Before it stands whether its white space is to be kept.
    """
    parts: list[str] = []
    kept = 0
    for event, node in etree.iterwalk(root, events=("start", "end", "comment", "pi")):
        unread = not isinstance(node.tag, str) or node.tag in UNREAD
        if event == "start" and unread:
            node.clear(keep_tail=True)
        if node.tag in BLOCKS:
            yield kept > 0, "".join(parts)
            parts = []
        if node.tag == "pre":
            kept += 1 if event == "start" else -1
        if node.tag == "br" and event == "start":
            parts.append("\n")
        if event == "start" and not unread and node.text:
            parts.append(node.text)
        if event != "start" and node.tail:
            parts.append(node.tail)
    yield kept > 0, "".join(parts)
