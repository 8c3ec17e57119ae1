"""On the real model, over two stages: held-out loss falls, and what is saved has the same loss."""

import pytest
import torch
from evaluation_losses import evaluation_loss
from runs import STDLIB, make_shards, read_metrics, source

from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.quantized.formats import format_of

pytestmark = pytest.mark.exhaustive

CONFIG = """
model = "{model}"
output_dir = "unused"
max_steps = 6
gradient_accumulation_steps = 4
pipeline_stages = 2
threads = 1
datasets = [{{ path = "{shards}" }}]
evaluation_datasets = [{{ path = "{shards}", max_rows = 9 }}]
optimizer = {{ lr = 1e-3 }}
"""
MODES = {
    "lora": {},
    "dora": {"adapter__kind": "dora"},
    "pissa": {"adapter__init": "pissa", "optimizer__lr": 3e-4},
    "blocks": {"adapter__kind": "blocks", "adapter__blocks": 3},
    "qlora": {"quantization__backend": "bnb", "quantization__double_quantization": True},
    "hqq": {"quantization__backend": "hqq"},
    "full": {
        "adapter__kind": "none",
        "optimizer__lr": 3e-5,
        "checkpoint__save_dtype": "float32",  # bfloat16 rounds away most of so small a change
    },
}


@pytest.fixture(scope="module")
def shards(real_model, tmp_path_factory):
    output = tmp_path_factory.mktemp("real-modes") / "shards"
    texts = [source("json", STDLIB / "json" / "*.py"), source("small", STDLIB / "[a-c]*t.py")]
    return make_shards(real_model, output, sequence_len=128, sources=texts)


def put_quantized(model, settings):
    """Give a model the numbers that its quantized weights stand for, one library call each."""
    keys = {k.partition("__")[2]: v for k, v in settings.items() if k.startswith("quantization__")}
    if not keys:
        return
    config = QuantizationConfig(**keys)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            held = format_of(config).make(
                layer.weight.data, f"{name}.weight", config, torch.float32
            )
            layer.weight.data = held.dequantize(torch.float32)


@pytest.mark.parametrize("name", MODES)
def test_held_out_loss_falls_and_the_result_reloads(training, real_model, shards, name):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    training.config.write_text(CONFIG.format(model=real_model, shards=shards))
    run = training.run("run", 2, **MODES[name])
    losses = [line["loss"] for line in read_metrics(run) if line["kind"] == "evaluation"]
    assert losses[-1] < losses[0] - 0.01
    if (run / "adapter").is_dir():
        base = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
        put_quantized(base, MODES[name])
        model, tolerance = PeftModel.from_pretrained(base, run / "adapter").eval(), 1e-3
    else:
        model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
        tolerance = 2e-2 if name == "blocks" else 1e-3  # the first is stored in bfloat16
    assert evaluation_loss(model, shards) == pytest.approx(losses[-1], abs=tolerance)
