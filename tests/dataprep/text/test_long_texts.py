"""Long texts get the ids of the whole text, piece by piece."""

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from headrace.dataprep.text.long_texts import encode_long

HERE = Path(__file__).read_text() * 4
TEXTS = {
    "code": HERE,
    "words": " ".join(f"wheel{n} stone, grain's" for n in range(2000)),
    "digits": "".join(str(n) for n in range(9000)),
    "one letter": "a" * 20_000,
    "spaces": "a" + " " * 15_000 + "b" + "\n" * 8_000,
    "scripts": "日本語 русский 👩‍👩‍👧 e\u0301 " * 900,
    "noise": "".join(random.Random(0).choices("ab \n1é日.'", k=20_000)),
    "short": "a b",
}


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator([HERE], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folder):
    return {
        "bytes": Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")),
        "unigram": unigram(),
    }


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "unigram"])
def test_pieces_give_the_tokens_of_the_whole(kind, name, tokenizers):
    right = tokenizers[kind].encode(TEXTS[name], add_special_tokens=False)
    tokens = encode_long(tokenizers[kind], TEXTS[name], 3000, 700)
    assert tokens.ids.tolist() == right.ids
    assert np.stack([tokens.starts, tokens.ends], 1).tolist() == [list(o) for o in right.offsets]


def test_the_library_never_has_more_than_a_piece_of_a_long_text(tokenizers):
    lengths = []

    class Watched:
        def encode(self, text, **options):
            lengths.append(len(text))
            return tokenizers["bytes"].encode(text, **options)

    encode_long(Watched(), TEXTS["code"], 3000, 700)
    assert len(lengths) > 2 and max(lengths) <= 3700
