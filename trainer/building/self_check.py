"""Tries an unknown architecture out: a tiny checkpoint of it, in stages, against transformers' own.

The checkpoint is saved and loaded by both sides, so that what its files hold counts; its weights,
norms, biases and buffers are as large as trained ones, so that soft-caps and multipliers count.
"""

import copy
import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from headrace.schemas.errors import ConfigError, HeadraceError
from headrace.schemas.train.model_config import ModelConfig
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.architecture.families import FAMILIES, refuse
from headrace.trainer.architecture.half_layer import Span
from headrace.trainer.architecture.model_directory import model_directory
from headrace.trainer.architecture.model_files import SINGLE_NAME
from headrace.trainer.architecture.model_writer import save_tensors
from headrace.trainer.architecture.overrides import overridden
from headrace.trainer.architecture.read_architecture import architecture_of, read_architecture
from headrace.trainer.architecture.weight_names import as_stored
from headrace.trainer.building.assembly import check_parts
from headrace.trainer.building.filled_stage import fill_stage
from headrace.trainer.building.make_plan import make_plan
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.building.parameter_slots import TrainedParameter, stored_buffers
from headrace.trainer.building.partition import StageCut, stacks_beside_tower
from headrace.trainer.building.tiny_config import shrink
from headrace.trainer.families.remote_code import run_code_of
from headrace.trainer.families.state_kernels import without_kernels_on_cpus
from headrace.trainer.stage.micro_batch import MicroBatch
from headrace.trainer.stage.sequence_check import find_mixing, find_unsliced, find_untiled
from headrace.trainer.stage.spec import StageSpec
from headrace.trainer.stage.stage import Stage
from headrace.trainer.stage.tensor_check import VOCABULARY as TRIAL_VOCABULARY
from headrace.trainer.stage.tensor_check import TinyPart, find_difference
from headrace.trainer.tensor_parallel.cut_stage import connect_ranks, refused
from headrace.trainer.tensor_parallel.shard import WHOLE_WEIGHTS, TensorShard

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5  # of losses and gradients, relative, in float32
# A norm of what is nearly zero, as at a delta net's first tokens, makes float32's rounding larger
# than that in some models (transformers itself is then off from float64 by 4e-5). What is wrong is
# wrong for any weights.
DRAWS = 3  # of random weights: losses must agree with all that are tried, gradients with one
DOCUMENTS = [5, 11, 8]
FOLDER = re.compile(r"\S*headrace-trial-\w+(/\S+)?:? ?")  # which is gone when one reads of it
CPU = torch.device("cpu")
WIDE = 3.0  # logits of trained models reach 10 to 30
SPREAD = 0.3  # of norms, biases and buffers
FAILURES = (
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    KeyError,
    IndexError,
    StrictDataclassError,  # of a config that transformers does not take
)


def check_against_transformers(architecture: Architecture, path: str) -> float:
    """Compare losses and gradients of packed documents with those of each document alone, in full
    fine-tuning and with adapters.

    Returns:
        The largest relative difference.

    Raises:
        ConfigError: they differ, or the model cannot be run this way at all.
    """
    model_type, largest = architecture.config.model_type, 0.0
    for kind in ("none", "lora"):
        try:
            losses, gradients = best_of_draws(architecture, kind)
        except (*FAILURES, HeadraceError) as error:
            text = FOLDER.sub("", str(error)).splitlines()[0] if str(error) else ""
            reason = f"a tiny one cannot be run in stages ({type(error).__name__}: {text})"
            raise refuse(path, model_type, reason) from None
        for what, difference in (("losses", losses), ("gradients", gradients)):
            if not difference <= TOLERANCE:
                reason = (
                    f"its forward pass does more between its parts than the pipeline does; of a "
                    f"tiny one in stages {what} are off from transformers' by {difference:.1e}"
                )
                raise refuse(path, model_type, reason)
        largest = max(largest, losses, gradients)
    logger.info('%s: model_type "%s" has no record; a tiny one passed its trial', path, model_type)
    return largest


def best_of_draws(architecture: Architecture, kind: str) -> tuple[float, float]:
    """Return the differences for the first random weights whose gradients agree, or the least.

    Losses that differ with any weights are returned at once.
    """
    found: list[tuple[float, float]] = []
    for draw in range(DRAWS):
        losses, gradients = try_out(architecture, kind, draw)
        found.append((losses, gradients))
        if losses > TOLERANCE or gradients <= TOLERANCE:
            return losses, gradients
    return min(found, key=max)


def try_out(architecture: Architecture, kind: str, draw: int = 0) -> tuple[float, float]:
    """The largest relative differences of losses and gradients from transformers' (and PEFT's)."""
    with tempfile.TemporaryDirectory(prefix="headrace-trial-") as folder:
        save_tiny(architecture, Path(folder), draw)
        config = trial_config(folder, kind)
        tiny = read_architecture(Path(folder))
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=tiny.attention
        ).eval()
        theirs = without_kernels_on_cpus(theirs)
        return compare(config, make_plan(config, tiny), theirs)


def trial_config(model: str, kind: str, weights: str = "stored") -> ModelConfig:
    """Return the config of a trial.

    Args:
        kind: of what is trained.
    """
    return ModelConfig.model_validate(
        {
            "model": model,
            "weights": weights,
            "adapter": {"kind": kind},
            "router_loss": 0.0,
            "dtype": "float32",
            "optimizer": {"lr": 1.0},
        }
    )


def save_tiny(architecture: Architecture, folder: Path, draw: int = 0) -> None:
    """Write a tiny checkpoint of the same architecture, all of it random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw)
        model = AutoModelForCausalLM.from_config(
            shrink(architecture.config),
            attn_implementation=architecture.attention,
            dtype=torch.float32,
        )
        randomize(model)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    values = {name: weight.detach() for name, weight in model.named_parameters()}
    values |= {slot.name: slot.value for slot in stored_buffers({"": model})}
    stored = as_stored(model, values)  # transformers' own would write on the first rank alone
    stored = {name: value.contiguous() for name, value in stored.items()}
    save_tensors(stored, folder / SINGLE_NAME, metadata={"format": "pt"})


@torch.no_grad()
def randomize(model: Any) -> None:
    """Give all weights and persistent buffers random values as large as trained ones."""
    head = model.get_output_embeddings().weight
    for parameter in model.parameters():
        if parameter.ndim > 1:
            scale = WIDE if parameter is head else 1
            parameter.normal_(std=max(1, parameter.shape[-1]) ** -0.5 * scale)
        else:
            parameter.add_(torch.randn_like(parameter) * SPREAD)
    for slot in stored_buffers({"": model}):
        if slot.value.is_floating_point():
            slot.value.add_(torch.randn_like(slot.value) * SPREAD)


def compare(config: ModelConfig, plan: Plan, theirs: Any) -> tuple[float, float]:
    """Return what `try_out` does, of a checkpoint that transformers has loaded."""
    stages = build_tiny(config, plan)
    trained = [item for stage in stages for item in stage.trained]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        ids = torch.randint(3, plan.architecture.config.vocab_size, (1, sum(DOCUMENTS)))
        if plan.method.peft is not None:
            theirs = get_peft_model(theirs, copy.deepcopy(plan.method.peft)).eval()
            put_adapters(trained, theirs)
    expected, count = alone(theirs, ids)
    (expected.sum() / count).backward()
    found = packed([stage.module for stage in stages], ids, count)
    own: dict[str, Tensor] = {}
    heads = [stage.tied_head for stage in stages if stage.tied_head is not None]
    for name, parameter in [(t.name, t.parameter) for t in trained] + [
        (f"{plan.architecture.family.embedding}.weight", head) for head in heads
    ]:
        if parameter.grad is not None:
            own[name] = own.get(name, torch.zeros(())) + parameter.grad
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    difference = (found - expected.detach()).abs().max() / expected.detach().abs().max()
    return difference.item(), gradient_difference(own, gradients)


@dataclass(frozen=True)
class TinyStage:
    """A stage with what is trained in it."""

    module: Stage
    trained: list[TrainedParameter]
    tied_head: nn.Parameter | None


def build_tiny(config: ModelConfig, plan: Plan) -> list[TinyStage]:
    """Two stages, or one where there is a single layer, loaded from the checkpoint."""
    layers = plan.architecture.layers
    cuts = [range(layers // 2), range(layers // 2, layers)] if layers > 1 else [range(1)]
    stages = []
    for number, part in enumerate(cuts):
        spec, filled = fill_stage(config, plan, StageCut(number, len(cuts), Span.whole(part)), CPU)
        stages.append(TinyStage(Stage(spec).eval(), filled.trained, filled.tied_head))
    return stages


@torch.no_grad()
def put_adapters(trained: list[TrainedParameter], theirs: nn.Module) -> None:
    """Give both sides the same adapters, none of them zero."""
    parameters = dict(theirs.named_parameters())
    for item in trained:
        item.parameter.add_(0.1 * torch.randn(item.parameter.shape))
        parameters[item.name].copy_(item.parameter)


def alone(model: Any, ids: Tensor) -> tuple[Tensor, int]:
    """Losses of all tokens by transformers itself, each document alone, and how many there are; a
    document's last token has none.
    """
    losses = []
    for document in ids.split(DOCUMENTS, dim=1):
        logits = model(input_ids=document, use_cache=False).logits[0, :-1].float()
        values = functional.cross_entropy(logits, document[0, 1:], reduction="none")
        losses.append(functional.pad(values, (0, 1)))
    return torch.cat(losses), sum(DOCUMENTS) - len(DOCUMENTS)


def packed(stages: list[Stage], ids: Tensor, count: int) -> Tensor:
    """Losses of all tokens in one row, forward and backward through the stages."""
    labels = ids.roll(-1, dims=1)
    labels[0, torch.tensor(DOCUMENTS).cumsum(0) - 1] = -100
    batch = MicroBatch([DOCUMENTS], [sum(DOCUMENTS)], labels, 1 / count, 1.0, seed=0)
    inputs, outputs = [ids], []
    for stage in stages:
        outputs.append(stage(inputs[-1], batch))
        inputs.append(outputs[-1].value.detach().requires_grad_())
    outputs[-1].value.backward()
    for output, following in zip(reversed(outputs[:-1]), reversed(inputs[1:-1]), strict=True):
        output.value.backward(following.grad)
    assert outputs[-1].token_losses is not None
    losses: Tensor = outputs[-1].token_losses[0]
    return losses


def gradient_difference(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference of a part's gradient, relative to the gradient of the whole."""
    whole = torch.stack([value.norm() for value in theirs.values()]).norm()
    nothing = torch.zeros(())
    differences = [
        (own.get(name, nothing) - theirs.get(name, nothing)).norm() / whole
        for name in own.keys() | theirs.keys()
    ]
    return torch.stack(differences).max().item()


def check_rows_can_be_cut(config: ModelConfig, architecture: Architecture) -> None:
    """Refuse models of which a rank cannot hold a part of each row.

    Raises:
        ConfigError: with the reason.
    """
    setting = f"sequence_parallel = {config.sequence_parallel}"
    check_tiny(setting, "use more pipeline_stages in its place", architecture, find_mixing)


def check_rows_can_be_sliced(config: ModelConfig, architecture: Architecture) -> None:
    """Refuse models through which rows cannot go in slices.

    Raises:
        ConfigError: with the reason.
    """
    setting = f"sequence_slices = {config.sequence_slices}"
    remedy = "use a larger gradient_accumulation_steps in its place"
    check_tiny(setting, remedy, architecture, find_unsliced)


def check_mlps_can_be_tiled(config: ModelConfig, architecture: Architecture) -> None:
    """Refuse models whose MLPs cannot go over parts of the tokens.

    Raises:
        ConfigError: with the reason.
    """
    remedy = 'use activation_checkpointing = "full" without it'
    check_tiny(f"tiles = {config.tiles}", remedy, architecture, find_untiled)


def check_tiny(
    setting: str, remedy: str, architecture: Architecture, find: Callable[[StageSpec], str | None]
) -> None:
    """Refuse models in which parts of rows are not what they are in whole ones.

    Args:
        find: what is wrong with a tiny model of the kind.

    Raises:
        ConfigError: with the reason.
    """
    try:
        problem = find(tiny_spec(architecture))
    except (*FAILURES, HeadraceError) as error:
        text = FOLDER.sub("", str(error)).splitlines()[0] if str(error) else ""
        problem = f"a tiny one cannot be run in part ({type(error).__name__}: {text})"
    if problem is not None:
        raise ConfigError(
            f'{setting} does not go with model_type "{architecture.config.model_type}": '
            f"{problem}; {remedy}"
        )


def check_weights_can_be_cut(architecture: Architecture) -> None:
    """Refuse models of which a rank cannot hold a part of each weight.

    Raises:
        ConfigError: with the reason.
    """
    model_type = architecture.config.model_type
    if architecture.uses_chance:
        raise refused(model_type, "the model's own dropout would differ from that of whole weights")
    try:
        difference = find_difference(partial(tiny_part, architecture))
    except ConfigError:
        raise
    except FAILURES as error:
        text = FOLDER.sub("", str(error)).splitlines()[0] if str(error) else ""
        reason = f"a tiny one cannot be run in parts ({type(error).__name__}: {text})"
        raise refused(model_type, reason) from None
    if not difference <= TOLERANCE:
        reason = f"losses or gradients of a tiny one in parts are off by {difference:.1e}"
        raise refused(model_type, reason)


def tiny_part(architecture: Architecture, shard: TensorShard) -> TinyPart:
    """Return a tiny model of the same kind, with a rank's part of its random weights."""
    spec = tiny_spec(architecture, shard, vocab_size=TRIAL_VOCABULARY)
    connect_ranks(spec.modules, spec.cuts)
    return TinyPart(Stage(spec).eval(), spec.cuts)


def tiny_spec(
    architecture: Architecture, shard: TensorShard = WHOLE_WEIGHTS, **changes: int
) -> StageSpec:
    """Fill a tiny model of the same kind with random weights.

    Args:
        changes: of its config.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-trial-") as folder:
        config = trial_config(folder, "none", weights="random")
        shrunk = shrink(architecture.config)
        shrunk.update(changes)
        shrunk.save_pretrained(folder)
        tiny = architecture_of(shrunk, folder)
        layers = Span.whole(range(tiny.layers))
        plan = make_plan(config, tiny)
        spec, _ = fill_stage(config, plan, StageCut(0, 1, layers), CPU, shard=shard)
    return spec


def plan_model(config: ModelConfig) -> Plan:
    """Lay out the model that a config names; one whose type has no record is tried out first.

    Raises:
        ConfigError: an architecture that is not supported, adapters that match nothing.
    """
    directory = model_directory(config.model, config.weights)
    if config.trust_remote_code:
        run_code_of(directory)
    architecture = read_architecture(directory, vision=config.vision is not None)
    if architecture.vision is None and architecture.config.model_type not in FAMILIES:
        check_against_transformers(architecture, str(directory))
    architecture = overridden(architecture, config.model_overrides, str(directory))
    if config.sequence_parallel > 1:
        check_rows_can_be_cut(config, architecture)
    if config.sequence_slices > 1:
        check_rows_can_be_sliced(config, architecture)
    if config.tiles > 1:
        check_mlps_can_be_tiled(config, architecture)
    if config.tensor_parallel > 1:
        check_weights_can_be_cut(architecture)
    plan = make_plan(config, architecture)
    plan.method.check_result()
    if config.objective.teacher is not None:
        plan = replace(plan, teacher=plan_model(config.of_teacher()))
    if config.tensor_parallel > 1:
        check_parts(config, plan)
    return plan if stacks_beside_tower(config, plan.size) else with_stacked_stream(plan)


def with_stacked_stream(plan: Plan) -> Plan:
    """Return the plan with the features of each of the first layers sent on to their stages."""
    architecture = plan.architecture
    stream = replace(architecture.stream, stacked=architecture.stacked_layers)
    return replace(plan, architecture=replace(architecture, stream=stream))
