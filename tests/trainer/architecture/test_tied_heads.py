"""A head in the files that config.json calls tied, as some merges leave it (transformers#45127)."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import build, config_of, make_batch, reference_loss, run_stages, save_tiny
from transformers import AutoModelForCausalLM

from headrace.trainer.architecture.read_architecture import read_architecture


@pytest.mark.parametrize(("change", "tied"), [(0.0, True), (0.5, False)])
def test_a_head_of_its_own_counts_as_in_transformers(tmp_path, change, tied):
    directory = save_tiny("llama", tmp_path / "model", tie_word_embeddings=True)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding + change * torch.randn_like(embedding)
    save_file(tensors, file, metadata={"format": "pt"})
    assert read_architecture(directory).tied == tied
    batch = make_batch()
    loss, *_ = run_stages(build(config_of(directory, 2)), batch)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert loss == pytest.approx(reference_loss(model, batch)[0].item(), rel=1e-5)
