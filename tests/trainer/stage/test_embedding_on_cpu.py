"""An embedding that is to stay in host memory stays there, and gives the same rows."""

import pytest
import torch
from tiny_families import CPU, build, config_of, gradients_of, make_batch, run_stages, save_tiny

from headrace.schemas.errors import ConfigError

LORA = {"kind": "lora", "rank": 2, "init": "olora"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedding")
    return {name: save_tiny(name, folder / name) for name in ("llama", "gemma3_text", "mistral")}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_an_embedding_on_the_cpu_stays_there_when_the_stage_is_moved(models, family):
    """qlora-pipe-lite's `embedding_on_cpu` had no effect: the pipeline moved all its modules to the
    device as it was built, the embedding among them.
    """
    built = build(config_of(models[family], 2, LORA, embedding_on_cpu=True))
    stage, ids = built[0].stage, make_batch().ids
    rows = stage.embedding.module(ids)
    stage.to("meta")  # as DeepSpeed moves it to the device
    assert stage.device.type == "meta"
    assert stage.embedding.device == CPU
    assert torch.equal(stage.embedding.module(ids), rows)
    assert all(not tensor.is_meta for tensor in stage.embedding.module.buffers())
    assert stage.embedding.embed(ids, torch.zeros_like(ids), None, stage.device).is_meta


def test_the_embedding_is_moved_with_its_stage_unless_it_is_to_stay(models):
    stage = build(config_of(models["llama"], 2, LORA))[0].stage
    stage.to("meta")
    assert stage.embedding.device.type == "meta"


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_losses_and_gradients_are_the_same_to_the_bit(models, family):
    found = []
    for wish in (False, True):
        built = build(config_of(models[family], 2, LORA, embedding_on_cpu=wish))
        found.append((run_stages(built, make_batch())[0], gradients_of(built)))
    (expected_loss, expected), (loss, gradients) = found
    assert loss == expected_loss
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


def test_what_would_be_trained_or_save_nothing_is_refused(models):
    adapter = {"kind": "lora", "rank": 2, "target_modules": ["q_proj", "embed_tokens"]}
    with pytest.raises(ConfigError, match="embedding_on_cpu: the embedding is trained"):
        build(config_of(models["mistral"], 1, adapter, embedding_on_cpu=True))
    with pytest.raises(ConfigError, match="the head uses the same weights"):
        build(config_of(models["llama"], 1, LORA, embedding_on_cpu=True))
    with pytest.raises(ValueError, match=r'adapter.kind = "none" writes the weights themselves'):
        config_of(models["llama"], 1, {"kind": "none"}, embedding_on_cpu=True)
    settings = {"quantization": {"backend": "bnb", "embedding": True}, "embedding_on_cpu": True}
    with pytest.raises(ValueError, match="two ways to save the same memory"):
        config_of(models["llama"], 2, LORA, **settings)
