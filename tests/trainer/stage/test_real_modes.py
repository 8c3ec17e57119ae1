"""On the real model, over two stages: held-out loss falls, and what is saved has the same loss."""

import re

import pytest
import torch
from evaluation_losses import evaluation_loss
from runs import STDLIB, make_shards, read_metrics, source

from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.export.merge import merge
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


FRUITS = "apple pear plum cherry lemon fig grape melon".split()


def test_a_model_grown_by_eight_tokens_answers_with_them_when_merged(
    training, real_model, tmp_path
):
    """By transformers, and as an adapter by PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    codes = [f"<|code{number}|>" for number in range(len(FRUITS))]
    lines = [f"The code of {fruit} is {code}." for fruit, code in zip(FRUITS, codes, strict=True)]
    (tmp_path / "codes.txt").write_text("\n".join(lines * 24))
    text = source("codes", tmp_path / "codes.txt") | {"document_separator": "\n"}
    whole = {"sequence_len": 64, "evaluation_fraction": 0.0, "added_tokens": codes}
    shards = make_shards(real_model, tmp_path / "shards", sources=[text], **whole)
    config = CONFIG.format(model=real_model, shards=shards)
    training.config.write_text(re.sub("evaluation_datasets.*\n", "", config))
    steps = {"max_steps": 40, "micro_batch_size": 2, "gradient_accumulation_steps": 1}
    settings = {"optimizer__lr": 2e-3, "model_overrides__new_tokens": codes}
    run = training.run("run", 2, **steps, **settings)
    merge(real_model, run / "adapter", tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    base = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    adapted = PeftModel.from_pretrained(base, run / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "merged"))
    prompts = [tokenizer(f"The code of {fruit} is", return_tensors="pt") for fruit in FRUITS]
    for model in (merged.eval(), adapted.eval()):
        answers = [
            model.generate(**prompt, max_new_tokens=3, do_sample=False) for prompt in prompts
        ]
        found = [tokenizer.decode(answer[0]) for answer in answers]
        assert [text[: len(line)] for text, line in zip(found, lines, strict=True)] == lines
