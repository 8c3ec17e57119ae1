"""An adapter of a multimodal checkpoint's text part works over the checkpoint and merges."""

import json
import warnings

import pytest
import torch
import transformers
from peft import PeftModel
from saved_parts import step
from tiny_families import COMMON, build, config_of, make_batch, reference_loss, run_forward

from headrace.trainer.export.export import adapter_tensors
from headrace.trainer.export.merge import merge


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """A tiny checkpoint whose vision part has projections of the same names."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = {"sliding_window": 5, "head_dim": 8, "query_pre_attn_scalar": 8}
    config = transformers.Gemma3Config(
        text_config={**COMMON, **text, "model_type": "gemma3_text"},
        vision_config=vision,
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("gemma3") / "model"
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("settings", [{}, {"layers": "1:3"}])
def test_peft_finds_the_places_of_an_adapter_in_the_whole_model(gemma3, tmp_path, settings):
    built, batch = build(config_of(gemma3, 2, {"rank": 4, **settings})), make_batch()
    step(built)
    with torch.no_grad():
        expected = run_forward(built, batch)[-1].value.item()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    tensors = {k: v for part in built for k, v in adapter_tensors(part, torch.float32).items()}
    built[0].method.write(adapter, tensors, 1, gemma3)
    whole = transformers.AutoModelForImageTextToText.from_pretrained(gemma3, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of lost adapters
        model = PeftModel.from_pretrained(whole, adapter).eval()
    assert reference_loss(model, batch)[0].item() == pytest.approx(expected, rel=1e-5)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(gemma3)
    merge(gemma3, adapter, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    assert reference_loss(merged.eval(), batch)[0].item() == pytest.approx(expected, rel=1e-5)
