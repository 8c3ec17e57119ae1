"""The numbers of a model's own image processor, and pictures of rows by them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.schemas.errors import DataError
from headrace.schemas.vision.processor import read_processor
from headrace.trainer.vision.arrangement import ARRANGEMENTS, Numbers
from headrace.trainer.vision.families import VisionFamily
from headrace.trainer.vision.inputs import VisionInputs
from headrace.trainer.vision.pictures import Normalization, Picture, pictures_of
from headrace.trainer.vision.positions import picture_groups, three_axes
from headrace.trainer.vision.tile import Tile

SIZES = ("patch_size", "merge_size", "temporal_patch_size")
VALUES = ("rescale_factor", "image_mean", "image_std")


@dataclass(frozen=True)
class Processor:
    """Rules by which the loader makes inputs of the pictures of rows.

    Attributes:
        placeholder: id of the tokens that pictures fill.
    """

    family: VisionFamily
    numbers: Numbers
    normalization: Normalization
    placeholder: int

    def decode(self, tiles: Sequence[Tile], what: str) -> list[Picture]:
        """Return the pictures of a row."""
        return pictures_of(tiles, self.normalization, what)

    def inputs(
        self,
        ids: NDArray[np.int32],
        document_lengths: Sequence[Sequence[int]],
        pictures: Sequence[Sequence[Picture]],
    ) -> VisionInputs:
        """Return the pictures of a micro-batch as its stages are given them.

        Args:
            ids: [b, s].
            pictures: [b] of each sequence, in the order of their tokens.

        Raises:
            DataError: placeholders and pictures do not match.
        """
        is_picture = ids == self.placeholder
        found = [picture for row in pictures for picture in row]
        filled, there = sum(picture.tokens for picture in found), int(is_picture.sum())
        if filled != there:
            raise DataError(
                f"rows hold {there} placeholders (token {self.placeholder}), and their pictures "
                f"fill {filled}; prepare the directory again"
            )
        positions = groups = None
        rows = list(zip(is_picture, document_lengths, strict=True))
        if self.family.three_axes:
            axes = [
                three_axes(mask, lengths, map(self._grid, of_row))
                for (mask, lengths), of_row in zip(rows, pictures, strict=True)
            ]
            positions = torch.from_numpy(np.stack(axes, axis=1))
        if self.family.two_way:
            groups = torch.from_numpy(np.stack([picture_groups(*row) for row in rows]))
        return VisionInputs(
            positions,
            groups,
            self.arguments(found),
            torch.from_numpy(np.flatnonzero(is_picture)) if found else None,
        )

    def arguments(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """Return what the tower is called with; nothing without pictures."""
        arrange = ARRANGEMENTS[self.family.arrangement]
        made = arrange(pictures, self.numbers) if pictures else {}
        return {name: torch.from_numpy(value) for name, value in made.items()}

    def _grid(self, picture: Picture) -> tuple[int, int]:
        """Return a picture's tokens down and across."""
        _, height, width = picture.tiles[0].shape
        side = self.numbers.patch * self.numbers.merge
        return height // side, width // side


def open_processor(directory: Path, family: VisionFamily, whole: Any) -> Processor:
    """Return what a model directory's own processor files say.

    Args:
        whole: transformers' config of the model.

    Raises:
        ConfigError: there are none, or they ask for what is not done.
    """
    numbers: dict[str, Any] = read_processor(directory).settings
    return Processor(
        family=family,
        numbers=Numbers(*(int(numbers.get(name, 1)) for name in SIZES)),
        normalization=Normalization(*(numbers[name] for name in VALUES)),
        placeholder=whole.image_token_id,
    )
