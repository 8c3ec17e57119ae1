"""The embedding of the first stage, and what the model does to its rows."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from headrace.schemas.fingerprint import derive_seed
from headrace.trainer.model.architecture import Architecture
from headrace.trainer.model.device import to_device
from headrace.trainer.model.embedding_noise import embedding_noise
from headrace.trainer.model.micro_batch import MicroBatch


class StageEmbedding:
    """Token ids in, hidden states out.

    Args:
        module: the model's own, adapted or not.
        seeded: set the random state, for dropout that is the same in any layout.

    Attributes:
        noise_alpha: of NEFTune's noise, if any.
    """

    def __init__(
        self, module: nn.Module, architecture: Architecture, dtype: torch.dtype, *, seeded: bool
    ) -> None:
        self.module = module
        family = architecture.family
        self.multiplier = architecture.setting(family.embedding_multiplier)
        self.dropout = architecture.setting(family.embedding_dropout) or 0.0
        self.dtype = dtype
        self.seeded = seeded
        self.noise_alpha: float | None = None

    @property
    def device(self) -> torch.device:
        """Where rows are looked up, and ids are best kept."""
        return next(self.module.parameters(), torch.empty(0)).device

    def embed(self, ids: Tensor, micro_batch: MicroBatch | None, device: torch.device) -> Tensor:
        """[b, s] ids to [b, s, hidden size] on a device, whichever the embedding itself is on.

        Args:
            micro_batch: in training, where chance goes by it; None outside of it.
        """
        if micro_batch is not None and self.seeded:
            torch.manual_seed(derive_seed(micro_batch.seed, "embedding"))
        hidden: Tensor = self.module(ids.to(self.device)).to(self.dtype)
        if hidden.device != device:
            hidden = to_device(hidden, device)
        if micro_batch is not None and self.noise_alpha is not None:
            lengths, seed = micro_batch.row_lengths, derive_seed(micro_batch.seed, "noise")
            hidden = hidden + embedding_noise(hidden, lengths, self.noise_alpha, seed)
        if self.multiplier is not None:
            hidden = hidden * self.multiplier
        if self.dropout:
            hidden = functional.dropout(hidden, self.dropout, training=micro_batch is not None)
        return hidden
