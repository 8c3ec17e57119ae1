"""One of two ranks that share frozen weights out: bits and memory, against weights held whole."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # where `tests` is found

import torch
import torch.distributed as dist
from tiny_families import CPU, config_of, gradients_of, make_batch, run_forward, save_tiny

from headrace.schemas.train.parallel_dims import ParallelDims
from headrace.trainer.building.model_builder import build_stage
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.layers.weight_offload import PLACES
from headrace.trainer.parallel import connect
from headrace.trainer.planning.run_plan import plan_run
from headrace.trainer.rendezvous import process_environment

LORA = {"kind": "lora", "rank": 2, "init": "olora"}  # starts with gradients everywhere
PLAIN_LORA = {"kind": "lora", "rank": 2}
NF4 = {"backend": "bnb", "double_quantization": True}
HQQ = {"backend": "hqq", "group_size": 8}
INT8 = {"backend": "bnb", "type": "int8"}
FULL = {"activation_checkpointing": "full"}
FEW = [("llama", "layers", {"adapter": LORA, "quantization": NF4, **FULL})]
ALL = [
    *FEW,
    ("llama", "layers", {"adapter": PLAIN_LORA, "quantization": INT8}),
    ("llama", "layers", {"adapter": LORA}),
    ("llama", "mlp", {"adapter": LORA, **FULL}),
    ("llama", "layers", {"adapter": PLAIN_LORA, "quantization": HQQ, "tiles": 2, **FULL}),
    ("llama", "layers", {"adapter": {"kind": "dora", "rank": 2}}),
    ("mixtral", "experts", {"adapter": PLAIN_LORA}),
    ("gemma2", "layers", {"adapter": LORA, "activation_checkpointing": 2}),
]


def outcome(built):
    """Losses and gradients of two micro-batches, both forward before either goes back."""
    batch = make_batch()
    outputs = [run_forward([built], batch, seed)[-1] for seed in (1, 2)]
    for output in outputs:
        output.value.backward()
    return [output.value.item() for output in outputs], gradients_of([built])


def compare(model, wish, settings, group):
    """Raise unless shared weights give the bits of whole ones, and a rank holds its part."""
    plain = config_of(model, 1, **settings)
    shared = config_of(model, 1, weight_shard=wish, **settings)
    expected_losses, expected = outcome(build_stage(plain, 0, CPU, plan_model(plain)))
    built = build_stage(shared, 0, CPU, plan_model(shared), copies_group=group)
    losses, gradients = outcome(built)
    assert losses == expected_losses
    assert gradients.keys() == expected.keys() and any(g.any() for g in expected.values())
    assert all(torch.equal(gradients[name], value) for name, value in expected.items())
    offload = built.stage.weight_offload
    held, places = offload.source.held, offload.places
    whole = 2 * sum(part.nbytes for part in held.values())
    assert sum(place.nbytes for place in places) == PLACES * 2 * max(
        p.nbytes for p in held.values()
    )
    check_plan(plain, shared, whole * (1 / 2 - PLACES / len(held)))


def check_plan(plain, shared, saved):
    """Raise unless `headrace plan` counts what is saved; its weights are in bfloat16."""
    memory = [
        plan_run(config, plan_model(config), 2, 24).stages[0].memory for config in (plain, shared)
    ]
    planned = memory[0].weights - memory[1].weights
    assert 0.4 * saved <= planned <= 1.1 * saved or saved <= 0, (planned, saved)


def main():
    layout = connect(ParallelDims(replicas=process_environment()[2]))
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    cases = ALL if sys.argv[2] == "all" else FEW
    for family in dict.fromkeys(family for family, *_ in cases):
        if layout.rank == 0:
            save_tiny(family, folder / family)
    dist.barrier()
    for family, wish, settings in cases:
        compare(folder / family, wish, settings, layout.copies_group)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
