"""Answers of a vision-language model to a prompt with pictures, which it sees as in training."""

from collections.abc import Sequence
from pathlib import Path

import torch

from headrace.trainer.export.sample import Sampler, Sampling
from headrace.trainer.vision.families import vision_family
from headrace.trainer.vision.processor import open_processor
from headrace.trainer.vision.tile import Tile


class PictureSampler(Sampler):
    """A model with its vision tower, and an adapter that can be left out.

    Raises:
        ConfigError, DataError: as `Sampler`, or a model without a vision family that is known.
    """

    def __init__(self, model: Path, adapter: Path | None) -> None:
        super().__init__(model, adapter, pictures=True)
        config = self.network.config
        tower = getattr(config, "vision_config", None)
        kind = getattr(tower, "model_type", None)
        self.family = vision_family(str(model), config.model_type, kind)
        self.processor = open_processor(model, self.family, config)

    def answer_pictures(
        self, text: str, tiles: Sequence[Tile], sampling: Sampling, *, adapter: bool = True
    ) -> str:
        """Generate the answer to a prompt, without the prompt.

        Args:
            text: with the placeholders of all pictures.
            tiles: of these, in order.
            adapter: with the adapter, if there is one.
        """
        ids = torch.tensor([self.encode(text)])
        arguments = self.processor.arguments(self.processor.decode(tiles, "--image"))
        if self.family.marks is not None:
            arguments[self.family.marks] = (ids == self.processor.placeholder).long()
        moved = {name: value.to(self.device) for name, value in arguments.items()}
        padding = self.tokenizer.pad_token_id
        padding = self.tokenizer.eos_token_id if padding is None else padding
        output = self._generate(ids, torch.ones_like(ids), sampling, padding, adapter, **moved)
        answer: str = self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        return answer
