"""The head of a model that gives one number of a text, as transformers names it."""

from torch import nn

SCORE = "score"
WEIGHT = f"{SCORE}.weight"


def is_scored(model: nn.Module) -> bool:
    """Return whether a model's head gives one number, without a bias."""
    head = getattr(model, SCORE, None)
    return isinstance(head, nn.Linear) and head.out_features == 1 and head.bias is None
