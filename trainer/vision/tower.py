"""The vision tower and its projector on a stage: pictures in, rows of the embedding out."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headrace.trainer import devices
from headrace.trainer.vision.families import VisionFamily
from headrace.trainer.vision.features import Features
from headrace.trainer.vision.inputs import GRID


class VisionTower:
    """Tower and projector of a model, run by transformers' own `get_image_features`.

    Args:
        body: the module of the model that has them, with weights elsewhere that are not used.
        modules: these of its modules, by their names in the whole model.
        again: run it a second time in the backward pass in place of keeping its activations.
    """

    def __init__(
        self, body: Any, modules: Mapping[str, nn.Module], family: VisionFamily, *, again: bool
    ) -> None:
        self.body = body
        self.modules = dict(modules)
        self.family = family
        self.again = again
        self.by_bounds = False

    def accelerate(self, *, compiles: bool) -> None:
        """Attend by bounds where the family's tower is given them, in compiled layers if asked."""
        if not self.family.bounded:
            return
        from headrace.trainer.vision import tower_attention

        tower = self.body.visual
        if tower_attention.takes(tower):
            tower_attention.attend_by_bounds(tower)
            self.by_bounds = True
        if compiles and self.by_bounds:
            tower_attention.compile_layers(tower)

    def features(
        self, arguments: Mapping[str, Tensor], places: Tensor, seed: int | None = None
    ) -> Features:
        """Run tower and projector over the pictures of a micro-batch.

        Args:
            seed: of dropout, which is then the same in a second run.
        """
        run = partial(self._run, self._with_bounds(arguments), seed)
        if self.again and torch.is_grad_enabled():
            values, *stacked = checkpoint(run, use_reentrant=False, preserve_rng_state=False)
        else:
            values, *stacked = run()
        return Features(values, stacked, places)

    def _with_bounds(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Add what is made of the grid on the host, else the tower waits for the device for it."""
        made = dict(arguments)
        if GRID not in made:
            return made
        device = made["pixel_values"].device
        if self.by_bounds:
            from headrace.trainer.vision.tower_attention import bounds_of

            for name, value in bounds_of(made[GRID], self.body.visual).items():
                made[f"image_{name}"] = moved(value, device) if isinstance(value, Tensor) else value
        else:
            made[GRID] = made[GRID].to(device)
        return made

    def _run(self, arguments: dict[str, Any], seed: int | None) -> tuple[Tensor, ...]:
        if seed is not None:
            torch.manual_seed(seed)
        made = self.body.get_image_features(**arguments, return_dict=True)
        stacked = getattr(made, "deepstack_features", None) or ()
        return (joined(made.pooler_output), *map(joined, stacked))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device that the host does not wait for."""
    return devices.pin(tensor).to(device, non_blocking=True)


def joined(features: Any) -> Tensor:
    """Return features of all pictures, [n, hidden size], of those of each, or of equal tiles."""
    whole: Tensor = torch.cat(list(features)) if isinstance(features, list | tuple) else features
    return whole.flatten(0, -2)
