"""Control adapters as ordinary LoRA, where one can be: over the layers that write what changes.

With B = Q diag(exp(S) - 1) and A = Q^T W, W + BA stretches what a linear layer W puts out. That is
the whole adapter where attention and MLP read the same hidden states and are added up (parallel
blocks), their last layers have no bias, and nothing lies between these and the sum. Elsewhere the
MLP reads what attention has already changed, and only the MLP's part can be folded.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from headrace.schemas.errors import ConfigError
from headrace.schemas.progress import Progress, silent
from headrace.schemas.train.model_config import ModelConfig
from headrace.trainer.adapters.names import PEFT_PREFIX
from headrace.trainer.architecture.half_layer import Span
from headrace.trainer.architecture.model_writer import save_tensors
from headrace.trainer.building.filled_stage import fill_stage
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.building.partition import StageCut
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.export.control_file import LayerControl, read_control
from headrace.trainer.export.output import check_new, new_output
from headrace.trainer.stage.micro_batch import MicroBatch
from headrace.trainer.stage.stage import Stage

EXACT = 1e-4  # relative error up to which float32 is to blame
SAMPLE_TOKENS = 64


def control_to_lora(
    model: Path,
    adapter: Path,
    output: Path,
    *,
    inverse: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> float:
    """Write a control adapter as a LoRA adapter in PEFT's format.

    Args:
        inverse: the adapter of class -1 instead of that of class 1.
        force: write it even where it is not the same.

    Returns:
        Over all layers, the largest difference of what a layer gives with the LoRA from what it
        gives with the control adapter, relative to what that changes; on random tokens.

    Raises:
        ConfigError: it is not the same, layers cannot be folded, or the output exists.
    """
    check_new(output)
    controls = {control.layer: control for control in read_control(adapter)}
    config = plain_config(model)
    plan = plan_model(config)
    layers = plan.architecture.layers
    if max(controls) >= layers:
        raise ConfigError(f"{adapter}: has layer {max(controls)}, but {model} only {layers}")
    targets, worst = writing_layers(plan), 0.0
    tensors: dict[str, Tensor] = {}
    hidden = random_ids(plan)
    for index in progress(range(layers), [1] * layers, "folding layers", "layers"):
        stage = layer_alone(config, plan, index)
        hidden, error, folded = fold(stage, hidden, targets, controls.get(index), inverse)
        worst = max(worst, error)
        prefix = f"{PEFT_PREFIX}{stage.layer_names[0]}."
        tensors |= {prefix + name: value for name, value in folded.items()}
    if worst > EXACT and not force:
        raise ConfigError(
            f"{adapter}: as a LoRA it would miss {worst:.1%} of what a layer's adapter changes, "
            f"because {plan.architecture.config.model_type} is not made of parallel blocks without "
            "biases; add --force to write it all the same"
        )
    rank = next(iter(controls.values())).directions.shape[1]
    write_lora(output, tensors, rank, targets, sorted(controls), str(model))
    return worst


def layer_alone(config: ModelConfig, plan: Plan, index: int) -> Stage:
    """Return one layer as a stage, so that one is in memory at a time; without the last norm."""
    layers = plan.architecture.layers
    cut = StageCut(index, layers, Span.whole(range(index, index + 1)))
    spec, _ = fill_stage(config, plan, cut, torch.device("cpu"))
    return Stage(replace(spec, names=replace(spec.names, norm=None)))


def plain_config(model: Path) -> ModelConfig:
    """Return the config that trains the whole model in float32 with plain modules."""
    return ModelConfig.model_validate(
        {
            "model": str(model),
            "dtype": "float32",
            "kernels": "torch",
            "adapter": {"kind": "none"},
            "optimizer": {"lr": 1.0},
        }
    )


def writing_layers(plan: Plan) -> tuple[str, ...]:
    """Paths, in a decoder layer, of the linear layers to fold into."""
    family = plan.architecture.family
    key = family.side_by_side
    if key is not None and not getattr(plan.architecture.config, key):
        return family.outputs[-1:]
    return family.outputs


def random_ids(plan: Plan) -> Tensor:
    """[1, tokens]."""
    generator = torch.Generator().manual_seed(0)
    size = plan.architecture.config.vocab_size
    return torch.randint(size, (1, SAMPLE_TOKENS), generator=generator)


@torch.no_grad()
def fold(
    stage: Stage,
    inputs: Tensor,
    targets: tuple[str, ...],
    control: LayerControl | None,
    inverse: bool,
) -> tuple[Tensor, float, dict[str, Tensor]]:
    """One layer's LoRA matrices by name below it, and their relative error.

    Returns:
        What the layer gives without an adapter, the error, and the matrices.
    """
    stage.eval()
    batch = MicroBatch([[SAMPLE_TOKENS]], [SAMPLE_TOKENS], None, 1.0, 1.0, seed=0)
    before = inputs
    if stage.embedding is not None:
        positions = torch.arange(inputs.shape[1], device=stage.device).unsqueeze(0)
        before = stage.embedding.embed(inputs, positions, None, stage.device)
    plain, _ = stage.run(inputs, batch)
    if control is None:
        return plain, 0.0, {}
    directions = control.directions.float()
    factors = torch.expm1(-control.log_stretches if inverse else control.log_stretches).float()
    change = ((plain - before) @ directions * factors) @ directions.T
    tensors, layer = {}, stage.layers[0]
    with ExitStack() as hooks:
        for target in targets:
            linear = linear_at(layer, target)
            down, up = directions.T @ linear.weight.float(), directions * factors
            tensors[f"{target}.lora_A.weight"] = down.contiguous()
            tensors[f"{target}.lora_B.weight"] = up.contiguous()
            hooks.enter_context(added(linear, down, up))
        folded, _ = stage.run(inputs, batch)
    size = torch.linalg.vector_norm(change)
    missed = torch.linalg.vector_norm(folded - plain - change)
    return plain, float(missed / size) if size > 0 else 0.0, tensors


def linear_at(layer: nn.Module, path: str) -> nn.Linear:
    """The linear layer of a decoder layer.

    Raises:
        ConfigError: there is none of that name.
    """
    try:
        found = layer.get_submodule(path)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Linear):
        raise ConfigError(
            f"a decoder layer ({type(layer).__name__}) has no linear layer {path}, so its control "
            "adapter has no form as a LoRA"
        )
    return found


@contextmanager
def added(linear: nn.Linear, down: Tensor, up: Tensor) -> Iterator[None]:
    """Let a linear layer give what it would with a LoRA."""

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output + (inputs[0] @ down.T) @ up.T

    handle = linear.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def write_lora(
    output: Path,
    tensors: Mapping[str, Tensor],
    rank: int,
    targets: tuple[str, ...],
    layers: list[int],
    model: str,
) -> None:
    """A directory as PEFT reads it, published whole."""
    with new_output(output) as temporary:
        temporary.mkdir()
        save_tensors(dict(tensors), temporary / "adapter_model.safetensors", {"format": "pt"})
        LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=[target.rsplit(".", 1)[-1] for target in targets],
            layers_to_transform=layers,
            task_type="CAUSAL_LM",
            base_model_name_or_path=model,
            inference_mode=True,
        ).save_pretrained(str(temporary))
