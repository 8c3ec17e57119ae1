"""New tokens a second: answers of one stage against transformers' `generate`, same prompts, greedy.

On a GPU a Llama of 1B with random weights and LoRA in bfloat16, on a core a small one in float32.
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from built_stages import build_stage
from peft import get_peft_model
from report import print_table
from transformers import AutoModelForCausalLM, LlamaConfig

from headrace.schemas.train.objective_config import RejectedSamplingConfig
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.pipeline.answers import Prompt
from headrace.trainer.pipeline.generation import Generator
from headrace.trainer.pipeline.links import PipelineLinks

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = (32, 256, 128) if GPU else (4, 32, 16)
BATCH_SIZES = (8, 32) if GPU else (1, 4)
MODEL = LlamaConfig(
    hidden_size=2048 if GPU else 256,
    intermediate_size=8192 if GPU else 1024,
    num_hidden_layers=16 if GPU else 4,
    num_attention_heads=32 if GPU else 8,
    num_key_value_heads=8 if GPU else 4,
    vocab_size=32000,
    tie_word_embeddings=True,
)


def build(folder: Path) -> BuiltStage:
    """The whole model as one stage."""
    MODEL.save_pretrained(folder)
    settings = {
        "model": str(folder),
        "output_dir": "unused",
        "weights": "random",
        "optimizer": {"lr": 1e-4},
        "datasets": [{"path": "unused"}],
    }
    return build_stage(TrainConfig.model_validate(settings), 0, DEVICE)


def rate(run: Any) -> float:
    """New tokens a second, the second time."""
    run()
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if GPU:
        torch.cuda.synchronize()
    return PROMPTS * NEW_TOKENS / (time.perf_counter() - start)


def ours(built: BuiltStage, prompts: list[Prompt], batch_size: int) -> float:
    settings = RejectedSamplingConfig(temperature=0.0, batch_size=batch_size)
    layout: Any = SimpleNamespace(stage=0, stages=1, rank=0, device=DEVICE)
    links, width = PipelineLinks(layout), MODEL.hidden_size
    generator = Generator(built.stage, links, DEVICE, width, settings, frozenset())
    return rate(partial(generator.generate, prompts))


def theirs(built: BuiltStage, prompts: list[Prompt]) -> float:
    dtype = built.stage.compute_dtype
    with DEVICE:
        model: Any = AutoModelForCausalLM.from_config(MODEL, dtype=dtype)
    model = get_peft_model(model, built.method.peft).to(DEVICE).eval()
    ids = torch.tensor([prompt.ids for prompt in prompts], device=DEVICE)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(ids)
    return rate(partial(model.generate, ids, attention_mask=mask, pad_token_id=0, **settings))


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, MODEL.vocab_size, (PROMPTS, PROMPT_TOKENS), generator=generator)
    prompts = [Prompt(row, NEW_TOKENS, seed) for seed, row in enumerate(ids.tolist())]
    with tempfile.TemporaryDirectory() as folder:
        built = build(Path(folder))
        reference = theirs(built, prompts)
        rows = [[f"transformers, {PROMPTS} together", f"{reference:,.0f}", "1.00"]]
        for size in BATCH_SIZES:
            found = ours(built, prompts, size)
            rows.append([f"batch_size = {size}", f"{found:,.0f}", f"{found / reference:.2f}"])
    shape = f"{PROMPTS} prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new ones"
    print_table(f"{shape}, {DEVICE.type}", ["", "tokens/s", "ratio"], rows)


if __name__ == "__main__":
    main()
