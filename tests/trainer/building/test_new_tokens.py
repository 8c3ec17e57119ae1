"""New tokens: embedding and head grow, are trained, and are saved as PEFT and transformers read."""

import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from saved_parts import saved_adapter, saved_model, step
from tiny_families import (
    VOCABULARY,
    build,
    config_of,
    gradients_of,
    make_batch,
    reference_loss,
    run_stages,
    save_tiny,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.shards.manifest import TokenizerRecord
from headrace.schemas.shards.tokenizer_content import (
    content_fingerprint,
    is_tokenizer,
    with_tokens,
)
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.export.merge import merge
from headrace.trainer.export.sample import Sampler

NEW = [f"<new{number}>" for number in range(8)]
IDS = list(range(VOCABULARY, VOCABULARY + len(NEW)))
FAMILIES = {"llama": True, "mistral": False, "gemma3_text": True}  # whether the head is tied
pytestmark = pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|tied|resized).*")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    words = {f"word{number}": number for number in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "word0")))
    for family, tied in FAMILIES.items():
        save_tiny(family, folder / family, tie_word_embeddings=tied)
        tokenizer.save_pretrained(folder / family)
    return folder


def batch_with_new_tokens():
    batch = make_batch()
    ids = batch.ids.clone()
    ids[:, ::4] = VOCABULARY + ids[:, ::4] % len(NEW)
    labels = torch.where(batch.labels >= 0, ids.roll(-1, dims=1), batch.labels)
    return replace(batch, ids=ids, labels=labels)


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def grown_by_transformers(directory):
    """The model with rows for the new tokens, each the mean of those there are."""
    model = load(directory)
    mean = {id(m): m.weight.detach().mean(dim=0) for m in ends(model)}
    means = [mean[id(module)] for module in ends(model)]
    model.resize_token_embeddings(VOCABULARY + len(NEW), mean_resizing=False)
    with torch.no_grad():
        for module, value in zip(ends(model), means, strict=True):
            module.weight[VOCABULARY:] = value
    return model


def ends(model):
    return model.get_input_embeddings(), model.get_output_embeddings()


def settings(**adapter):
    return {"adapter": adapter, "model_overrides": {"new_tokens": NEW}}


def loss_of(model):
    return reference_loss(model, batch_with_new_tokens())[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_new_tokens_are_trained_as_peft_trains_them_in_any_number_of_stages(models, family):
    tied, batch = FAMILIES[family], batch_with_new_tokens()
    indices = {"embed_tokens": IDS} | ({} if tied else {"lm_head": IDS})
    config = LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        trainable_token_indices=indices,
    )
    reference = get_peft_model(grown_by_transformers(models / family), config)
    theirs = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    for stages in (1, 2):
        built = build(config_of(models / family, stages, **settings(rank=4)))
        if stages == 1:
            fresh = run_stages(build(config_of(models / family, 1, **settings(rank=4))), batch)[0]
            with torch.no_grad():
                assert fresh == pytest.approx(
                    loss_of(grown_by_transformers(models / family)).item()
                )
        step(built)
        if tied and stages == 2:
            with torch.no_grad():
                built[1].tied_copy.copy_(built[0].tied_copy)
        values = {item.name: item.parameter for part in built for item in part.trained}
        assert values.keys() == theirs.keys()
        with torch.no_grad():
            for name, parameter in theirs.items():
                parameter.copy_(values[name])
                parameter.grad = None
        expected = loss_of(reference)
        expected.backward()
        loss, _, _ = run_stages(built, batch)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        for name, gradient in gradients_of(built).items():
            torch.testing.assert_close(gradient, theirs[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("llama", {"rank": 4}),
        ("mistral", {"rank": 4}),
        ("mistral", {"kind": "dora", "rank": 4, "trainable_token_indices": [5, *IDS]}),
        ("mistral", {"rank": 4, "modules_to_save": ["embed_tokens", "lm_head"]}),
    ],
)
def test_what_is_saved_loads_in_peft_merges_and_is_started_from(models, tmp_path, family, adapter):
    directory, batch = models / family, batch_with_new_tokens()
    built = build(config_of(directory, 2, **settings(**adapter)))
    step(built)
    loss, _, _ = run_stages(built, batch)
    saved = saved_adapter(built, tmp_path / "adapter")
    base = load(directory)
    base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(saved)), mean_resizing=False)
    assert loss_of(PeftModel.from_pretrained(base, saved)).item() == pytest.approx(loss, rel=1e-5)
    merge(directory, saved, tmp_path / "merged")
    merged, tokenizer = (
        load(tmp_path / "merged"),
        AutoTokenizer.from_pretrained(tmp_path / "merged"),
    )
    assert merged.config.tie_word_embeddings == FAMILIES[family]
    assert tokenizer(NEW[3])["input_ids"] == [IDS[3]]
    assert loss_of(merged).item() == pytest.approx(loss, rel=1e-5)
    sampler = Sampler(directory, saved)
    assert loss_of(sampler.network.float()).item() == pytest.approx(loss, rel=1e-5)
    again = build(config_of(directory, 1, **settings(path=str(saved))))
    assert run_stages(again, batch)[0] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_model_that_is_trained_whole_grows(models, tmp_path, family):
    built = build(config_of(models / family, 2, **settings(kind="none")))
    step(built)
    loss, _, _ = run_stages(built, batch_with_new_tokens())
    saved = saved_model(built, models / family, tmp_path / "saved")
    assert loss_of(load(saved)).item() == pytest.approx(loss, rel=1e-5)
    assert AutoTokenizer.from_pretrained(saved)(NEW[0])["input_ids"] == [IDS[0]]


def test_rows_are_trained_beside_a_quantized_embedding(models):
    quantization = {"backend": "bnb", "embedding": True, "double_quantization": False}
    losses = [
        run_stages(
            build(config_of(models / "mistral", n, quantization=quantization, **settings(rank=4))),
            batch_with_new_tokens(),
        )[0]
        for n in (1, 2)
    ]
    assert losses[0] == losses[1]


def test_shards_must_be_made_with_the_new_tokens(models):
    path = models / "llama" / "tokenizer.json"
    content, ids = with_tokens(path.read_bytes(), NEW)
    assert ids == IDS
    record = TokenizerRecord(
        fingerprint="0",
        content_fingerprint=content_fingerprint(content, path),
        vocabulary_size=VOCABULARY + len(NEW),
        special_tokens={},
    )
    assert is_tokenizer(record, path, NEW)
    assert not is_tokenizer(record, path, NEW[:-1])
    assert not is_tokenizer(record, path)


@pytest.mark.parametrize(
    ("adapter", "overrides", "message"),
    [
        ({}, {"new_tokens": ["word5"]}, '"word5" is a token of'),
        ({}, {"new_tokens": ["a", "a"]}, '"a" is there twice'),
        ({"kind": "control"}, {"new_tokens": ["a"]}, 'adapter.kind = "control" trains no rows'),
        ({"target_modules": ["embed_tokens"]}, {"new_tokens": ["a"]}, "nothing else trains"),
        ({"trainable_token_indices": [97]}, {}, "97, but base_model.model.model.embed_tokens has"),
    ],
)
def test_tokens_that_cannot_be_new_are_refused(models, adapter, overrides, message):
    with pytest.raises((ConfigError, DataError, ValueError), match=re.escape(message)):
        plan_model(config_of(models / "mistral", 1, adapter, model_overrides=overrides))
