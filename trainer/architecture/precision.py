"""The types of weights and of the computation."""

import torch

from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer import devices


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The type of frozen weights and of the computation."""
    if config.dtype == "auto":
        return torch.bfloat16 if devices.is_accelerator(device) else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def trained_dtype(config: TrainConfig, dtype: torch.dtype) -> torch.dtype:
    """The type of trained weights, given that of the computation."""
    return dtype if config.optimizer.record.keeps_dtype else torch.float32
