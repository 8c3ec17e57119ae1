"""Text out of HTML, Markdown, PDF and EPUB, and which versions of libraries took it out."""

import io
import json
import zipfile
from pathlib import Path

import pytest

from headrace.dataprep.formats import extraction
from headrace.dataprep.formats.extraction import ExtractionError, extract_text
from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.prepare.prepare_config import PrepareConfig

PROSE = "The miller turns the wheel, and the water of the race grinds the grain to flour. " * 4
HTML = (
    "<html><head><title>Mill</title><script>var no = 1;</script></head>"
    "<body><nav>Home | About</nav>"
    f"<article><h1>The mill</h1><p>{PROSE}</p><p>It <b>turns</b> &amp; stops.</p></article>"
    "<footer>Imprint</footer></body></html>"
)
MARKDOWN = """# The *mill*

It [turns](http://a.b) and
`stops`, ![a wheel](w.png).

- first
- second

```python
x = 1  # *kept*
```

| a | b |
| - | - |
| 1 | 2 |
"""
WIDE = {"sequence_len": 1 << 12, "evaluation_fraction": 0.0, "packing": "none"}


def pdf(*pages):
    """A PDF file with a line of text on each page."""
    kids = " ".join(f"{3 + 2 * n} 0 R" for n in range(len(pages)))
    font = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
    ]
    for number, text in enumerate(pages):
        drawing = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {4 + 2 * number} 0 R "
            f"/Resources << /Font << /F1 {font} >> >> >>",
            f"<< /Length {len(drawing)} >>\nstream\n{drawing}\nendstream",
        ]
    content, places = "%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(content))
        content += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    size = len(objects) + 1
    end = f"trailer << /Size {size} /Root 1 0 R >>\nstartxref\n{len(content)}\n%%EOF"
    return f"{content}xref\n0 {size}\n0000000000 65535 f \n{table}{end}".encode()


CHAPTERS = {
    "second": b"<html><body><p>It ground.</p><pre>a\n  b</pre></body></html>",
    "first": "<html><head><title>No</title></head><body><h1>The M\u00fchle</h1>"
    "<script>no()</script><p>It <i>turned</i>,<br/>and <!-- no -->stopped.</p>"
    "<ul><li>one</li><li>two</li></ul>"
    "</body></html>".encode(),
    "notes": b"<p>never</p>",
}
PACKAGE = """<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0">
<manifest><item id="b" href="the%20second.xhtml"/><item id="a" href="../first.xhtml"/>
<item id="n" href="notes.xhtml"/></manifest>
<spine><itemref idref="a"/><itemref idref="n" linear="no"/><itemref idref="b"/></spine></package>"""
CONTAINER = """<?xml version="1.0"?><container><rootfiles>
<rootfile full-path="OEBPS/text/book.opf"/></rootfiles></container>"""


def epub(**changes: bytes) -> bytes:
    """A book of two chapters, whose files lie in another order than its spine has them."""
    names = {"second": "OEBPS/text/the second.xhtml", "first": "OEBPS/first.xhtml"}
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("META-INF/container.xml", CONTAINER)
        archive.writestr("OEBPS/text/book.opf", PACKAGE)
        for name, content in (CHAPTERS | changes).items():
            archive.writestr(names.get(name, f"OEBPS/text/{name}.xhtml"), content)
    return data.getvalue()


def test_chapters_of_a_book_follow_each_other_in_reading_order():
    expected = ["The M\u00fchle", "It turned, and stopped.", "one", "two", "It ground.", "a\n  b"]
    assert extract_text("epub", epub()).split("\n\n") == expected


def test_a_book_that_unpacks_to_far_more_than_its_size_is_refused():
    with pytest.raises(ExtractionError, match="unpacks to more than 100 times its size"):
        extract_text("epub", epub(first=b" " * 5_000_000))


def test_entities_of_a_book_are_not_looked_up(tmp_path):
    (tmp_path / "secret").write_text("secret words")
    declared = f'<!DOCTYPE c [<!ENTITY x SYSTEM "file://{tmp_path}/secret">]>'
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(
            "META-INF/container.xml", f"{declared}<c>&x;<rootfile full-path='&x;'/></c>"
        )
    with pytest.raises(ExtractionError) as error:
        extract_text("epub", data.getvalue())
    assert "secret words" not in str(error.value)


def test_the_main_text_of_a_page_is_taken_out():
    text = extract_text("html", HTML)
    assert PROSE.strip() in text
    assert "It turns & stops." in text
    assert not {"Home", "Imprint", "var"} & {*text.split()}


def test_markdown_loses_its_marks_and_no_text():
    blocks = extract_text("markdown", MARKDOWN).split("\n\n")
    assert blocks[:2] == ["The mill", "It turns and\nstops, a wheel."]
    assert blocks[2:] == ["first", "second", "x = 1  # *kept*", "a", "b", "1", "2"]


def test_pages_of_a_pdf_follow_each_other():
    assert extract_text("pdf", pdf("water wheel", "mill race")) == "water wheel\n\nmill race"


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("html", "<html></html>"),
        ("markdown", "---"),
        ("pdf", b"%PDF-1.4 broken"),
        ("pdf", pdf("")),
        ("epub", b"PK"),
        ("epub", epub(first=b"", second=b"")),
    ],
)
def test_a_document_without_text_is_refused(kind, content):
    with pytest.raises(ExtractionError, match=r"cannot read it|finds no text in it"):
        extract_text(kind, content)


def test_files_and_fields_are_extracted_and_the_version_kept(
    corpus, make_config, run, documents_of, snapshot
):
    Path("a.html").write_text(HTML)
    Path("b.pdf").write_bytes(pdf("water wheel"))
    Path("bad.pdf").write_bytes(b"no pdf")
    Path("c.jsonl").write_text(json.dumps({"text": MARKDOWN}) + "\n")
    sources = [
        {"name": "pages", "type": "text", "path": "a.html", "extract": "html"},
        {"name": "papers", "type": "text", "path": "*.pdf", "extract": "pdf"},
        {"name": "notes", "type": "documents", "path": "c.jsonl", "extract": "markdown"},
    ]
    changes = {"sources": sources, "max_reject_fraction": 0.5, **WIDE}
    run(make_config(**changes))
    found = documents_of("out")
    assert sorted(found) == sorted(
        [extract_text("html", HTML), "water wheel", extract_text("markdown", MARKDOWN)]
    )
    reject = json.loads(Path("out/rejects/rejects.jsonl").read_text())
    assert (reject["file"], reject["reason"]) == ("bad.pdf", "no text")
    run(make_config("two", **changes), workers=2)
    assert snapshot("two") == snapshot("out")
    settings = json.loads(Path("out/prepare.json").read_text())["config"]["sources"]
    assert settings[1]["extract_version"].startswith("pypdf ")
    sources[1]["extract_version"] = "pypdf 0.1"
    with pytest.raises(DataError, match=r'^source "papers": extract_version = "pypdf 0\.1", but'):
        run(make_config("other", **changes))


def test_a_missing_library_is_named_with_the_line_that_installs_it(
    corpus, make_config, run, monkeypatch
):
    monkeypatch.setitem(extraction.LIBRARIES, "html", "no-such-library")
    source = {"name": "a", "type": "text", "path": "corpus/000.txt", "extract": "html"}
    with pytest.raises(
        ConfigError, match=r"needs no-such-library; .*pip install '\.\[documents\]'"
    ):
        run(make_config(sources=[source]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"type": "documents", "extract": "pdf"}, 'extract = "pdf" is for whole files'),
        ({"type": "chat", "extract": "html"}, 'extract is for type = "text" or "documents"'),
    ],
)
def test_what_is_no_text_is_not_extracted(source, message):
    values = {"name": "a", "path": "a", **source}
    with pytest.raises(ValueError, match=message):
        PrepareConfig.model_validate({"output": "o", "tokenizer": "t", "sources": [values]})
