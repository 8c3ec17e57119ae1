"""Fixtures of layouts of a run."""

import shutil

import pytest
from runs import make_shards
from tiny_families import save_tiny


@pytest.fixture(params=["llama", "gemma3_text", "qwen3_moe"])
def family_training(request, training, tiny_model, tiny_shards, tmp_path):
    """The same training of a family's tiny model, on the same shards."""
    return training_of(request.param, training, tiny_model, tiny_shards, tmp_path)


@pytest.fixture
def wide_training(training, tiny_model, tiny_shards, tmp_path):
    """The same training of a model whose parts are whole blocks of quantized weights."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    return training_of("llama", training, tiny_model, tiny_shards, tmp_path, **sizes)


def training_of(family, training, tiny_model, tiny_shards, tmp_path, **sizes):
    model = save_tiny(family, tmp_path / "model", vocab_size=384, **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, model)
    shards = make_shards(model, tmp_path / "shards")
    text = training.config.read_text().replace(str(tiny_model), str(model))
    training.config.write_text(text.replace(str(tiny_shards), str(shards)))
    return training
