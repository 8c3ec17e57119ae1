"""The embedding of the first stage, and what the model does to its rows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from headrace.schemas.fingerprint import derive_seed
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.layers.device import to_device
from headrace.trainer.stage.input_parts import InputParts
from headrace.trainer.stage.micro_batch import MicroBatch
from headrace.trainer.tensor_parallel.shard import WHOLE_WEIGHTS, TensorShard
from headrace.trainer.vision.features import Features


class StageEmbedding:
    """Token ids in, hidden states out.

    Args:
        module: the model's own, adapted or not.
        parts: what follows it before the first layer.
        seeded: set the random state, for dropout that is the same in any layout.
        noise_alpha: of NEFTune's noise, if any.
        shard: the part of the tokens whose rows are held here.
    """

    def __init__(
        self,
        module: nn.Module,
        parts: InputParts,
        architecture: Architecture,
        dtype: torch.dtype,
        *,
        seeded: bool,
        noise_alpha: float | None = None,
        shard: TensorShard = WHOLE_WEIGHTS,
    ) -> None:
        self.module = module
        self.parts = parts
        family = architecture.family
        self.multiplier = architecture.embedding_scale
        self.dropout = architecture.setting(family.embedding_dropout) or 0.0
        self.dtype = dtype
        self.seeded = seeded
        self.noise_alpha = noise_alpha
        self.shard = shard
        self.tokens = architecture.config.vocab_size // shard.ranks  # whose rows are held

    @property
    def device(self) -> torch.device:
        """Return the device on which rows are looked up, and ids are best kept."""
        return next(self.module.parameters(), torch.empty(0)).device

    def embed(
        self,
        ids: Tensor,
        positions: Tensor,
        micro_batch: MicroBatch | None,
        device: torch.device,
        features: Features | None = None,
    ) -> Tensor:
        """[b, s] ids to [b, s, hidden size] on a device, whichever the embedding itself is on.

        Args:
            positions: [b, s] in documents.
            micro_batch: in training, where chance goes by it; None outside of it.
            features: of pictures, which take the place of their tokens' rows.
        """
        if micro_batch is not None and self.seeded:
            torch.manual_seed(derive_seed(micro_batch.seed, "embedding"))
        hidden = self._rows(ids.to(self.device), device)
        if micro_batch is not None and self.noise_alpha is not None:
            lengths, seed = micro_batch.row_lengths, derive_seed(micro_batch.seed, "noise")
            hidden = hidden + embedding_noise(hidden, lengths, self.noise_alpha, seed)
        if self.multiplier is not None:
            hidden = hidden * self.multiplier
        if features is not None:
            hidden = features.insert(hidden)
        hidden = self.parts.run(hidden, positions).to(self.dtype)
        if self.dropout:
            hidden = functional.dropout(hidden, self.dropout, training=micro_batch is not None)
        return hidden

    def _rows(self, ids: Tensor, device: torch.device) -> Tensor:
        """Look rows up, on whichever rank they are."""
        if self.shard.is_whole:
            hidden: Tensor = self.module(ids).to(self.dtype)
            return hidden if hidden.device == device else to_device(hidden, device)
        number = ids - self.shard.rank * self.tokens
        here = (number >= 0) & (number < self.tokens)
        hidden = self.module(number.where(here, 0)).to(self.dtype)
        hidden = hidden.masked_fill(~here.unsqueeze(-1), 0)
        return self.shard.total(hidden if hidden.device == device else to_device(hidden, device))


def embedding_noise(hidden: Tensor, lengths: Sequence[int], alpha: float, seed: int) -> Tensor:
    """Noise of at most alpha / sqrt(n d) for each entry of a row of n tokens.

    Args:
        hidden: [b, s, d], whose shape, type and device the noise takes.
        lengths: [b] tokens of each row, padding left out.
        seed: of this micro-batch, so that every layout draws the same.
    """
    generator = torch.Generator(hidden.device).manual_seed(seed)
    unit = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    unit.uniform_(-1, 1, generator=generator)
    tokens = to_device(torch.tensor(lengths, dtype=torch.float32).clamp(min=1), hidden.device)
    largest = alpha * torch.rsqrt(tokens * hidden.shape[-1])
    return (unit * largest[:, None, None]).to(hidden.dtype)
