"""Tries an unknown architecture out: a tiny model of it, cut in two, against transformers' own."""

import copy
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from headrace.trainer.architecture.architecture import Architecture, architecture_of
from headrace.trainer.architecture.families import refuse
from headrace.trainer.stage.micro_batch import MicroBatch
from headrace.trainer.stage.stage import Stage, StageNames

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of a token's loss, in float32
DOCUMENTS = [5, 11, 8]
SMALL = {
    "vocab_size": 97,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "head_dim": 16,
    "hidden_size": 64,
    "n_embd": 64,
    "n_head": 4,
    "n_inner": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def check_against_transformers(architecture: Architecture, path: str) -> None:
    """Compare the losses of every token of packed documents with each document's alone.

    Raises:
        ConfigError: they differ, or the model cannot be run this way at all.
    """
    model_type = architecture.config.model_type
    try:
        small = shrink(architecture.config)
        tiny = architecture_of(small, path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                small, attn_implementation=tiny.attention
            ).eval()
            documents = [torch.randint(3, small.vocab_size, (1, n)) for n in DOCUMENTS]
        with torch.no_grad():
            expected = torch.cat([_alone(model, ids) for ids in documents])
            found = _packed(model, tiny, torch.cat(documents, dim=1))
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        reason = f"a tiny one cannot be run in stages ({str(error).splitlines()[0]})"
        raise refuse(path, model_type, reason) from None
    difference = (found - expected).abs().max().item()
    if not difference <= TOLERANCE:
        reason = f"a tiny one cut into stages differs from transformers by {difference:.1e} a token"
        raise refuse(path, model_type, reason)
    logger.info('%s: model_type "%s" has no record; a tiny one passed its trial', path, model_type)


def shrink(config: Any) -> Any:
    """A config of the same kind that is cheap to run: narrow, and with few layers."""
    values = copy.deepcopy(config.to_dict())
    layers = values["num_hidden_layers"]
    kinds = values.get("layer_types")
    kept = list(range(min(layers, 4)))
    if kinds:  # the first of each kind, and two more
        kept = sorted({kinds.index(kind) for kind in kinds} | {0, 1})
    for key, value in values.items():
        if isinstance(value, list) and len(value) == layers:
            values[key] = [value[index] for index in kept]
    values |= {key: value for key, value in SMALL.items() if values.get(key) is not None}
    values["num_hidden_layers"] = len(kept)
    if values.get("num_key_value_heads") is not None:
        fewer = config.num_key_value_heads < config.num_attention_heads
        values["num_key_value_heads"] = 2 if fewer else 4
    return type(config)(**values)


def _alone(model: Any, ids: Tensor) -> Tensor:
    """Losses of one document's tokens by transformers itself; the last has none."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    losses = functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    return functional.pad(losses, (0, 1))


def _packed(model: Any, architecture: Architecture, ids: Tensor) -> Tensor:
    """Losses of all documents' tokens in one row, through two stages."""
    layers = architecture.config.num_hidden_layers
    labels = ids.roll(-1, dims=1)
    labels[0, torch.tensor(DOCUMENTS).cumsum(0) - 1] = -100
    batch = MicroBatch(
        document_lengths=[DOCUMENTS],
        row_lengths=[sum(DOCUMENTS)],
        labels=labels,
        loss_scale=1.0,
        router_scale=1.0,
        seed=0,
    )
    cuts = [range(layers // 2), range(layers // 2, layers)] if layers > 1 else [range(1)]
    hidden = ids
    for number, part in enumerate(cuts):
        first, last = number == 0, number == len(cuts) - 1
        output = _stage(model, architecture, part, first, last)(hidden, batch)
        hidden = output.value
    assert output.token_losses is not None
    return output.token_losses[0]


def _stage(model: Any, architecture: Architecture, layers: range, first: bool, last: bool) -> Stage:
    family = architecture.family
    names = StageNames(
        embedding=family.embedding if first else None,
        layers=[f"{family.layers}.{index}" for index in layers],
        norm=family.norm if last else None,
        head=family.head if last else None,
    )
    used = [names.embedding, *names.layers, names.norm, names.head]
    return Stage(
        {name: model.get_submodule(name) for name in used if name},
        names=names,
        layers=layers,
        rotary=model.get_submodule(family.rotary) if family.rotary else None,
        architecture=architecture,
        router_loss=None,
        compute_dtype=torch.float32,
        autocast=False,
        recompute=frozenset(),
        offload=None,
        seeded=False,
    ).eval()
