"""Measurement of what a vision tower and its projector keep for the backward pass.

As with decoder layers nothing is put into a formula: the tower runs over pictures, and what
autograd keeps is added up. Its sizes hang on values, as pictures' grids, so that it cannot run on
tensors without memory: large ones are real here, but never written.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from headrace.schemas.train.model_config import ModelConfig
from headrace.trainer.architecture.model_directory import model_directory
from headrace.trainer.building.held_values import trained_dtype
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.planning.memory_model import TowerActivations
from headrace.trainer.vision.arrangement import ANY_SIZE, Numbers
from headrace.trainer.vision.pictures import Picture
from headrace.trainer.vision.processor import open_processor
from headrace.trainer.vision.tower import VisionTower

PICTURE_SHARE = 0.5  # tokens of pictures among those of rows, as in the cut of a model
SIDE = 8  # merged patches along a side, where pictures may be of any size
LARGE = 4096  # as no table is that indices or bounds are made of


def tower_activations(
    plan: Plan,
    config: ModelConfig,
    dtype: torch.dtype,
    sequence_len: int,
    tower: VisionTower,
    *,
    autocast: bool,
) -> TowerActivations:
    """Count what a tower keeps of one micro-batch, half of whose tokens are pictures'.

    Args:
        tower: without memory, which is filled.
    """
    tower.again = False
    fill_unwritten(tower, dtype, trained_dtype(config.optimizer, dtype))
    tokens = config.places * sequence_len * PICTURE_SHARE
    with torch.autocast("cpu", dtype, enabled=autocast):
        counted = [kept_by_tower(tower, arguments_of(plan, config, n)) for n in (1, 2, 3)]
    kept, given, features = zip(*counted, strict=True)
    pictures = tokens / (features[1] - features[0])
    return TowerActivations(continued(kept, pictures), continued(given, pictures))


def continued(values: Sequence[float], place: float) -> float:
    """Return the value at a place, of a square function by its values at 1, 2 and 3.

    Most towers keep in proportion to pictures, and Pixtral's a mask over all of them.
    """
    first, second = values[1] - values[0], values[2] - 2 * values[1] + values[0]
    return values[0] + (place - 1) * first + (place - 1) * (place - 2) / 2 * second


def arguments_of(plan: Plan, config: ModelConfig, count: int) -> dict[str, Tensor]:
    """Return what the tower is called with for some equal pictures."""
    architecture = plan.architecture
    family, whole = architecture.vision, architecture.whole
    assert family is not None
    processor = open_processor(model_directory(config.model, config.weights), family, whole)
    picture = picture_for(whole, processor.numbers, any_size=family.arrangement in ANY_SIZE)
    return processor.arguments([picture] * count)


def picture_for(whole: Any, numbers: Numbers, *, any_size: bool) -> Picture:
    """Return a picture of the size that a model's tiles have."""
    side = SIDE * numbers.patch * numbers.merge
    if not any_size:
        size = whole.vision_config.image_size
        side = size if isinstance(size, int) else size[0]
    height, width = getattr(whole, "image_grid_pinpoints", [[side, side]])[0]
    split = (height // side) * (width // side)
    tile = np.ones((3, side, side), np.float32)
    return Picture([tile] * (1 if split == 1 else split + 1), 0, width, height)


def kept_by_tower(
    tower: VisionTower, arguments: dict[str, Tensor], large: int = LARGE
) -> tuple[float, float, int]:
    """Return the bytes that autograd keeps, those of the arguments, and the number of features.

    Args:
        large: numbers of a tensor that is not written.
    """
    saved = HeldTensors()
    with Unwritten(large), saved_tensors_hooks(saved.hold, lambda held: held.tensor):
        features = tower.features(arguments, torch.empty(0))
    weights = [p for part in tower.modules.values() for p in part.parameters()]
    given = sum(tensor.nbytes for tensor in arguments.values())
    return float(saved.bytes_beside(weights)), float(given), len(features.values)


def fill_unwritten(tower: VisionTower, dtype: torch.dtype, trained: torch.dtype) -> None:
    """Give a tower's weights memory that nothing is written to, and their types."""
    for part in [module for top in tower.modules.values() for module in top.modules()]:
        for name, empty in part._parameters.items():
            if empty is not None:
                kind = trained if empty.requires_grad else dtype
                value = torch.empty(empty.shape, dtype=kind)
                part._parameters[name] = nn.Parameter(value, requires_grad=empty.requires_grad)


class Held:
    """A tensor that autograd has saved; gone when autograd lets go of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class HeldTensors:
    """The tensors that autograd still holds of all that it has saved."""

    def __init__(self) -> None:
        self._held: weakref.WeakSet[Held] = weakref.WeakSet()

    def hold(self, tensor: Tensor) -> Held:
        """Return the saved tensor in what tells when it is let go."""
        held = Held(tensor)
        self._held.add(held)
        return held

    def bytes_beside(self, weights: list[nn.Parameter]) -> int:
        """Return the bytes of all but the weights, each storage once."""
        storages = {
            held.tensor.untyped_storage().data_ptr(): held.tensor.untyped_storage().nbytes()
            for held in self._held
        }
        own = {weight.untyped_storage().data_ptr() for weight in weights}
        return sum(size for place, size in storages.items() if place not in own)


class Unwritten(TorchDispatchMode):
    """Operations whose large results are left unwritten, and so take neither time nor memory.

    Read against torch 2.11 to 2.13.
    """

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large = large

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not makes_tensors_alone(func):
            return func(*args, **kwargs)
        given = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
        if not any(tensor.is_floating_point() and tensor.numel() >= self.large for tensor in given):
            return func(*args, **kwargs)
        shapes = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        made = func(*shapes[0], **shapes[1])
        if not all(tensor.is_floating_point() for tensor in tree_leaves(made)):
            return func(*args, **kwargs)
        return tree_map_only(Tensor, unwritten, made)


SHARING = {torch.ops.aten._unsafe_view.default, torch.ops.aten.lift_fresh.default}
BY_VALUE = {torch.ops.aten.index.Tensor}  # whose shape may hang on values


def makes_tensors_alone(func: Any) -> bool:
    """Return whether an operation gives new tensors, of shapes that are known."""
    returns = func._schema.returns
    if func.is_view or func._schema.is_mutable or func in SHARING | BY_VALUE:
        return False
    return all(isinstance(found.type, torch.TensorType) for found in returns)


def unwritten(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape, whose memory is not touched."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
