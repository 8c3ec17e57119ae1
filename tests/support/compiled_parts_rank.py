"""One of two ranks that share weights: a compiled layer, both ways, against it as it is."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # where `tests` is found

import torch
import torch.distributed as dist
from tiny_families import CPU, config_of, save_tiny

from headrace.schemas.train.parallel_dims import ParallelDims
from headrace.trainer.architecture.half_layer import Span
from headrace.trainer.building.filled_stage import fill_stage
from headrace.trainer.building.partition import StageCut
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.layers.attention_mask import attention_masks
from headrace.trainer.layers.device import position_ids
from headrace.trainer.layers.layer_functions import run_layer, run_layer_checkpointed
from headrace.trainer.layers.lora_layers import swap_adapters
from headrace.trainer.layers.selective_checkpoint import run_layer_selectively
from headrace.trainer.parallel import connect
from headrace.trainer.stage.stage import Stage
from headrace.trainer.tensor_parallel.cut_stage import connect_ranks
from headrace.trainer.tensor_parallel.shard import TensorShard

LENGTHS = [[9, 7]]


def stage_of(config, shard, *, may_join):
    """A whole model with our adapters, as on a GPU, whose B is not zero."""
    cut = StageCut(0, 1, Span.whole(range(4)))
    spec, filled = fill_stage(config, plan_model(config), cut, CPU, shard=shard)
    for layer in spec.layer_modules:
        assert swap_adapters(layer, may_join=may_join)
    connect_ranks(spec.modules, spec.cuts)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for item in filled.trained:
            item.parameter.add_(item.part(torch.randn(item.shape, generator=generator)), alpha=0.1)
    return Stage(spec)


def results(function, stage):
    """Output, gradient of the input, and gradients of the adapters."""
    hidden = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    positions = position_ids(LENGTHS)
    mask = attention_masks(LENGTHS, [None], CPU)[None]
    arguments = stage.arguments_of_layer(0, mask, positions, stage.rotary(hidden, positions))
    torch.manual_seed(2)
    output = function(stage.layers[0], hidden, arguments)
    output.square().sum().backward()
    gradients = [weight.grad for weight in stage.layers[0].parameters() if weight.requires_grad]
    stage.zero_grad()
    return [output.detach(), hidden.grad, *gradients]


def main(folder):
    layout = connect(ParallelDims(tensor=2))
    torch.set_num_threads(1)
    shard = TensorShard(layout.coordinates.tensor, 2, layout.tensor_group)
    if layout.rank == 0:
        save_tiny("llama", folder / "llama", vocab_size=96)
    dist.barrier()
    config = config_of(folder / "llama", tensor_parallel=2, adapter={"rank": 4, "dropout": 0.0})
    for function in (run_layer, run_layer_checkpointed, run_layer_selectively):
        torch._dynamo.reset()
        stage = stage_of(config, shard, may_join=function is run_layer)  # as `accelerate` does
        whole = torch.compile(function, dynamic=False, backend="aot_eager", fullgraph=True)
        for found, expected in zip(results(whole, stage), results(function, stage), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
