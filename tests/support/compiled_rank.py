"""One of two ranks that share rows: a compiled layer, forward and backward, against it as it is."""

import torch
import torch.distributed as dist
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from headrace.schemas.train.parallel_dims import ParallelDims
from headrace.trainer.layers import document_attention
from headrace.trainer.layers.attention_mask import attention_masks
from headrace.trainer.layers.device import position_ids
from headrace.trainer.layers.layer_functions import (
    run_layer,
    run_layer_checkpointed,
)
from headrace.trainer.layers.selective_checkpoint import run_layer_selectively
from headrace.trainer.layers.sequence_attention import share_rows
from headrace.trainer.parallel import connect
from headrace.trainer.sequence_slice import SequenceSlice

LENGTHS = [[9, 7]]
CPU = torch.device("cpu")
MASKS = {
    "sdpa": attention_masks(LENGTHS, [None], CPU)[None],
    document_attention.NAME: document_attention.visible_tokens(LENGTHS, [None], CPU)[None],
}


def layer_of(attention, part):
    """A decoder layer and its rotary embedding, with rows shared."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    layer = LlamaDecoderLayer(config, 0)
    share_rows(layer.modules(), part)
    return layer, LlamaRotaryEmbedding(config)


def results(function, attention, part):
    """Output, gradient of the input, and gradients of the weights."""
    layer, rotary = layer_of(attention, part)
    hidden = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(1))
    mine = part.share(hidden).clone().requires_grad_()
    positions = part.share(position_ids(LENGTHS))
    table = rotary(mine, positions)
    arguments = {"position_ids": positions, "position_embeddings": table}
    output = function(layer, mine, arguments | {"attention_mask": MASKS[attention]})
    output.square().sum().backward()
    return [output.detach(), mine.grad, *(weight.grad for weight in layer.parameters())]


def main():
    layout = connect(ParallelDims(sequence=2))
    torch.set_num_threads(1)
    part = SequenceSlice(layout.coordinates.sequence, 2, layout.sequence_group)
    for function in (run_layer, run_layer_checkpointed, run_layer_selectively):
        for attention in MASKS:
            torch._dynamo.reset()
            whole = torch.compile(function, dynamic=False, backend="aot_eager", fullgraph=True)
            pairs = zip(
                results(whole, attention, part), results(function, attention, part), strict=True
            )
            for found, expected in pairs:
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
