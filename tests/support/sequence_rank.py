"""One of several ranks that share rows: losses and gradients of models cut, against them whole."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # where `tests` is found

import torch
import torch.distributed as dist
from tiny_families import CPU, config_of, gradients_of, make_batch, save_tiny

from headrace.schemas.train.parallel_dims import ParallelDims
from headrace.trainer.building.model_builder import build_stage
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.layers.rotary_attention import swap_attention
from headrace.trainer.layers.sequence_attention import share_rows
from headrace.trainer.parallel import connect
from headrace.trainer.rendezvous import process_environment
from headrace.trainer.sequence_slice import WHOLE, SequenceSlice
from headrace.trainer.stage.acceleration import attend_by_bounds
from headrace.trainer.stage.micro_batch import MicroBatch

BY_BOUNDS = ("qwen3", "gpt_oss")  # families that attend as on GPUs
OURS = ("qwen3",)  # of them, those whose attention is swapped for ours
FULL, LORA = {"kind": "none"}, {"rank": 4, "dropout": 0.0}
NO_RECORD = {  # family -> what makes it different; latent attention, and sinks
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "head_dim": 8,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 6,
        "router_aux_loss_coef": 0.3,
    },
}


def run(config, part):
    """Return the loss of one slice of rows, those of its tokens, and the gradients."""
    built = build_stage(config, 0, CPU, plan_model(config), part)
    family = built.model_config.model_type
    if family in BY_BOUNDS:
        attend_by_bounds(built.stage)
        built.stage.by_bounds = True
        for layer in built.stage.layers if family in OURS else ():
            swap_attention(layer, built.architecture.family.attention_module)
        share_rows(built.stage.modules(), part)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for item in built.trained:
            item.parameter.add_(torch.randn(item.parameter.shape, generator=generator) * 0.05)
    batch = make_batch()
    micro_batch = MicroBatch(
        document_lengths=batch.document_lengths,
        row_lengths=batch.row_lengths,
        labels=part.share(batch.labels),
        loss_scale=1 / batch.trained_tokens,
        router_scale=1.0,
        seed=0,
    )
    output = built.stage.train()(part.share(batch.ids), micro_batch)
    output.value.backward()
    if built.tied_head is not None:
        built.tied_copy.grad += built.tied_head.grad
    gradients = {name: g for name, g in gradients_of([built]).items() if g is not None}
    return output.value.detach(), output.token_losses, gradients


def compare(config, part):
    """Raise unless the slices give what whole rows do."""
    loss, tokens, gradients = run(config, part)
    expected, expected_tokens, expected_gradients = run(config, WHOLE)
    dist.all_reduce(loss)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(part.join(tokens), expected_tokens, rtol=1e-5, atol=2e-6)
    norm = torch.stack([g.norm() for g in expected_gradients.values()]).norm()
    assert norm > 0
    for name, gradient in expected_gradients.items():
        found = gradients.get(name, torch.zeros_like(gradient))
        dist.all_reduce(found)
        assert (found - gradient).norm() <= 1e-5 * norm, name


def main(folder: Path, families: list[str]) -> None:
    _, _, ranks = process_environment()
    layout = connect(ParallelDims(sequence=ranks))
    torch.set_num_threads(1)
    part = SequenceSlice(layout.coordinates.sequence, ranks, layout.sequence_group)
    for family in families:
        if layout.rank == 0 and not (folder / family).exists():
            save_tiny(family, folder / family, **NO_RECORD.get(family, {}))
        dist.barrier()
        for adapter, again in ((FULL, "none"), (LORA, "full")):
            config = config_of(
                folder / family,
                sequence_parallel=ranks,
                adapter=adapter,
                activation_checkpointing=again,
            )
            compare(config, part)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
