"""Parts of models as they are saved: adapters and whole models, of stages in this process."""

from pathlib import Path

import torch
from built_stages import build_stage

from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.export.export import (
    adapter_tensors,
    file_count,
    finish_model,
    model_parts,
    save_model_part,
)


def step(built):
    """Move every trained parameter, so that all of them matter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in built:
            for item in part.trained:
                if item.owned:
                    noise = torch.randn(item.parameter.shape, generator=generator)
                    item.parameter.add_(0.3 * noise)
    if built[0].tied_copy is not None and len(built) > 1:
        with torch.no_grad():
            built[-1].tied_copy.copy_(built[0].tied_copy)


def saved_adapter(built, directory):
    method = built[0].method
    directory.mkdir()
    tensors = {}
    for part in built:
        tensors |= adapter_tensors(part, torch.float32)
    method.write(directory, tensors, built[0].history.width, Path(method.model))
    return directory


def saved_model(built, base, directory, dtype=torch.float32):
    directory.mkdir()
    counts = [file_count(model_parts(part, dtype)) for part in built]
    files = [
        save_model_part(part, base, directory, sum(counts[:stage]), sum(counts), dtype)
        for stage, part in enumerate(built)
    ]
    finish_model(directory, files, base, built[0], dtype)
    return directory


def adapter_of(model, directory, std=0.1, **settings):
    """An adapter with random values, as training would save it."""
    config = TrainConfig.model_validate(
        {
            "model": str(model),
            "output_dir": "unused",
            "datasets": [{"path": "unused"}],
            "adapter": {"rank": 4, "target_modules": ["q_proj"], **settings},
            "optimizer": {"lr": 1e-3},
        }
    )
    built = build_stage(config, 0, torch.device("cpu"))
    torch.manual_seed(0)
    for item in built.trained:
        torch.nn.init.normal_(item.parameter, std=std)
    return saved_adapter([built], directory)
