"""Routers of mixtures of experts, found by what transformers records of them."""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Router:
    """Module that computes the logits by which tokens choose experts, as transformers names it."""

    module_type: type[nn.Module]
    output_index: int  # of the logits in the module's output


def find_router(model: Any) -> Router | None:
    """The router modules, if the model has experts."""
    for part in (model, *model.children()):
        recorder = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits")
        if recorder is not None and hasattr(recorder, "target_class"):
            return Router(recorder.target_class, recorder.index)
    return None
