"""Every token of every input is in exactly one row, or dropped under a name that says why."""

import json
import tempfile
from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from headrace.dataprep.prepare import prepare
from headrace.dataprep.shards.verify import verify
from headrace.schemas.errors import DataError
from headrace.schemas.prepare.prepare_config import PrepareConfig

EOS = 1
WORDS = ("water", "mill", "axle", "race 12", "水車", "e\u0301", "\u200d", "<s>", "\n\n", "x" * 30)
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=14).map(" ".join)
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
POLICIES = [  # packing, and what becomes of documents that are too long
    {"packing": "concatenate", "drop_tails": False},
    {"packing": "concatenate", "drop_tails": True},
    *(
        {"packing": packing, "overlong": overlong}
        for packing in ("best_fit", "none")
        for overlong in ("split", "truncate", "drop")
    ),
]
PAIR_POLICIES = [{"packing": "none", "overlong": overlong} for overlong in ("truncate", "drop")]


@st.composite
def corpora(draw):
    """Documents of each source by its type, all of one kind, some repeated; and a config."""
    kinds = draw(st.sets(st.sampled_from(["text", "documents", "chat", "pretokenized"])))
    types = sorted(kinds) or ["preference"]
    ids = st.lists(st.integers(2, 300), min_size=1, max_size=40)
    document = {
        "chat": st.tuples(TEXTS, TEXTS),
        "pretokenized": ids,
        "preference": st.tuples(st.sampled_from(["a?", "b?"]), TEXTS, TEXTS).filter(
            lambda texts: texts[1] != texts[2]
        ),
    }
    corpus = {
        name: draw(st.lists(document.get(name, TEXTS), min_size=1, max_size=12)) for name in types
    }
    changes = draw(st.sampled_from(PAIR_POLICIES if types == ["preference"] else POLICIES))
    return corpus, changes | {
        "sequence_len": draw(st.sampled_from([12, 25, 64])),
        "evaluation_fraction": draw(st.sampled_from([0.0, 0.3])),
        "block_bytes": draw(st.sampled_from([1024, 1 << 20])),
        "shards": draw(st.integers(1, 3)),
        "filters": draw(st.sampled_from([{}, {"min_tokens": 7}])),
        "deduplicate": {"exact": draw(st.booleans())},
    }


def write_source(folder, name, documents):
    """The files of one source, and its table in the config."""
    if name == "text":
        for number, text in enumerate(documents):
            (folder / f"{number:02d}.txt").write_text(text)
        return {"name": name, "type": name, "path": f"{folder}/*.txt"}
    rows = {
        "documents": lambda text: {"text": text},
        "chat": lambda turns: {
            "messages": [
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant"), turns, strict=True)
            ]
        },
        "pretokenized": lambda ids: {"input_ids": ids},
        "preference": lambda texts: dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)),
    }[name]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(rows(document)) + "\n" for document in documents))
    source = {"name": name, "type": name, "path": str(path)}
    if name == "chat":
        (folder / "template.jinja").write_text(TEMPLATE)
        source["chat"] = {"template": f"{folder}/template.jinja"}
    return source


@pytest.fixture(scope="module")
def encode(tokenizer_folder):
    """Tokens of a text, with `<...>` as text or as special tokens, straight from `tokenizers`."""
    tokenizers = {}
    for parse in (False, True):
        tokenizers[parse] = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
        tokenizers[parse].encode_special_tokens = not parse
    return lambda text, parse=False: tokenizers[parse].encode(text, add_special_tokens=False)


def tokens_of(name, document, encode):
    """The ids that a document must have, on each side where it is a pair."""
    match name:
        case "text" | "documents":
            return ((*encode(document).ids, EOS),)
        case "chat":
            text = "".join(
                f"{role}: {content}</s>"
                for role, content in zip(("user", "assistant"), document, strict=True)
            )
            return (tuple(encode(text, parse=True).ids),)
        case "pretokenized":
            return (tuple(document),)
    prompt, *answers = document
    return tuple((*encode(prompt + answer).ids, EOS) for answer in answers)


def first_answer(name, document, encode):
    """The first token to train on: of a conversation, the first that holds some of the answer."""
    if name != "chat":
        return 0
    before = f"user: {document[0]}</s>assistant: "
    tokens = encode(f"{before}{document[1]}</s>", parse=True)
    return sum(end <= len(before) for _, end in tokens.offsets)


def expected(corpus, config, encode):
    """What must be kept, as pieces that no row may divide further, and dropped, by name.

    Concatenated documents are divided where rows end, so their pieces are tokens.
    """
    kept, dropped, seen = Counter(), Counter(), set()
    row = config.sequence_len
    for name, documents in corpus.items():
        for document in documents:
            sides = tokens_of(name, document, encode)
            size = sum(map(len, sides))
            if size < (config.filters.min_tokens or 0):
                dropped["filter min_tokens"] += size
            elif config.deduplicate.exact and normal(name, document) in seen:
                dropped["exact duplicate"] += size
            elif config.packing == "concatenate":
                kept.update((token,) for token in sides[0])
            elif max(map(len, sides)) > row and (
                config.overlong == "drop"
                or (config.overlong == "truncate" and first_answer(name, document, encode) >= row)
            ):
                dropped["overlong document dropped"] += size
            elif config.overlong == "split":
                (ids,) = sides
                kept.update((ids[at : at + row],) for at in range(0, len(ids), row))
            else:
                kept[tuple(ids[:row] for ids in sides)] += 1
                dropped["overlong document truncated"] += sum(max(0, len(i) - row) for i in sides)
            if size >= (config.filters.min_tokens or 0):
                seen.add(normal(name, document))
    return kept, +dropped


def normal(name, document):
    """What two documents have in common that are duplicates: texts of all sources may be."""
    if isinstance(document, str):
        return " ".join(document.split())
    return name, *(" ".join(part.split()) if isinstance(part, str) else part for part in document)


def found_pieces(folder, config):
    """The pieces in all rows of both splits: documents, or tokens where they are concatenated."""
    pieces = Counter()
    for path in folder.glob("*.parquet"):
        for row in pq.read_table(path).to_pylist():
            ids = tuple(row["input_ids"])
            assert 0 < len(ids) <= config.sequence_len
            if config.packing == "concatenate":
                pieces.update((token,) for token in ids)
            elif "rejected_input_ids" in row:
                pieces[ids, tuple(row["rejected_input_ids"])] += 1
            else:
                ends = pairwise(accumulate(row["document_lengths"], initial=0))
                pieces.update((ids[start:end],) for start, end in ends)
    return pieces


@settings(deadline=None, max_examples=15, phases=[Phase.generate])
@given(case=corpora())
def test_every_token_is_in_one_row_or_dropped_by_name(case, tokenizer_folder, encode):
    corpus, changes = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [write_source(folder, name, documents) for name, documents in corpus.items()]
        places = {"output": f"{folder}/out", "tokenizer": str(tokenizer_folder)}
        config = PrepareConfig.model_validate(places | {"sources": sources} | changes)
        kept, dropped = expected(corpus, config, encode)
        try:
            manifest = prepare(config, 1)
        except DataError as error:  # there is nothing to train on
            assert "is left" in str(error) or "the evaluation split took" in str(error)
            return
        found = found_pieces(folder / "out", config)
        assert verify(folder / "out") == []
    ledger, sources = manifest.ledger, manifest.sources
    assert [source.documents for source in sources] == [*map(len, corpus.values())]
    assert sum(source.tokens for source in sources) == sum(ledger.tokens_out.values())
    tails = ledger.tokens_dropped.pop("tail of a block dropped", 0)
    assert bool(tails) <= config.drop_tails
    assert ledger.tokens_dropped == dropped
    assert found <= kept
    assert (kept - found).total() == tails
    every = [tokens_of(n, document, encode) for n in corpus for document in corpus[n]]
    assert ledger.tokens_in == sum(len(ids) for sides in every for ids in sides)
