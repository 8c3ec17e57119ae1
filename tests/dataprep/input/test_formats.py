"""However the documents are stored, the same documents come out."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.dataprep.input.streams import split_range

DOCUMENTS = [
    f"document {number}: the mill\nwheel é {'turns ' * (number % 9)}" for number in range(120)
]
WIDE = {"sequence_len": 1 << 15, "evaluation_fraction": 0.0}


def compress_zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": compress_zstd}
JSONL = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in DOCUMENTS).encode()
CONTENTS = {
    "lines.jsonl": JSONL,
    "dos.jsonl": b"\xef\xbb\xbf" + JSONL.replace(b"\n", b"\r\n\r\n"),
    "no_last_newline.jsonl": JSONL.rstrip(b"\n"),
    "lines.json": JSONL,
    "list.json": b" \n" + json.dumps([{"text": text} for text in DOCUMENTS], indent=1).encode(),
}


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", CONTENTS)
def test_json_in_every_form(name, ending, corpus, make_config, run, documents_of):
    Path(name + ending).write_bytes(COMPRESS[ending](CONTENTS[name]))
    source = {"name": "a", "type": "documents", "path": name + ending}
    manifest = run(make_config(sources=[source], **WIDE))
    assert documents_of("out") == sorted(DOCUMENTS)
    assert manifest.sources[0].documents == len(DOCUMENTS)


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("separator", ["\n\n", "<|end|>", "é"])
def test_text_with_a_separator(separator, ending, corpus, make_config, run, documents_of):
    documents = [text.replace("é", "e") for text in DOCUMENTS]
    content = (separator.join(documents) + separator).encode()
    Path("a.txt" + ending).write_bytes(COMPRESS[ending](content))
    source = {"name": "a", "type": "text", "path": "a.txt*", "document_separator": separator}
    run(make_config(sources=[source], **WIDE))
    assert documents_of("out") == sorted(documents)


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_text_file_is_one_document(ending, corpus, make_config, run, documents_of):
    for number, text in enumerate(DOCUMENTS):
        Path(f"{number}.md{ending}").write_bytes(COMPRESS[ending](text.encode()))
    run(make_config(sources=[{"name": "a", "type": "text", "path": ["*.md*", "1.md*"]}], **WIDE))
    assert documents_of("out") == sorted(DOCUMENTS)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_with_any_kind_of_string(kind, corpus, make_config, run, documents_of):
    table = pa.table({"id": range(len(DOCUMENTS)), "body": pa.array(DOCUMENTS).cast(kind)})
    pq.write_table(table, "a.parquet", row_group_size=7)
    source = {"name": "a", "type": "documents", "path": "a.parquet", "text_field": "body"}
    run(make_config(sources=[source], **WIDE))
    assert documents_of("out") == sorted(DOCUMENTS)


@given(
    content=st.text(alphabet="ab", max_size=14).map(str.encode),
    separator=st.sampled_from([b"a", b"aa", b"aba", b"abab"]),
)
def test_byte_ranges_give_the_records_of_the_whole_file(content, separator, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "ranges.txt"
    path.write_bytes(content)
    whole = content.split(separator)
    expected = whole if whole[-1] else whole[:-1]
    for cut in range(1, len(content)):
        ranges = [(0, cut), (cut, None)]
        parts = [split_range(str(path), separator, start, end, 100) for start, end in ranges]
        assert [record for part in parts for _, record in part] == expected
