"""A model with a head of one number, as reward models have it, in place of its language model's.

It is transformers' own model for the classification of sequences with one label, so that what is
saved loads as that; read against transformers 5.23, `modeling_layers.py`.
"""

import copy
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import AutoModelForSequenceClassification

from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.architecture.families import refuse
from headrace.trainer.architecture.read_architecture import lay_out
from headrace.trainer.families.score import SCORE, is_scored


def with_score(base: Architecture, path: str) -> Architecture:
    """Return the architecture of a model with a head of one number.

    Raises:
        ConfigError: transformers has none, or one whose parts lie elsewhere.
    """
    known: Any = AutoModelForSequenceClassification._model_mapping  # private; 5.14 to 5.23
    model_type = base.config.model_type
    if type(base.config) not in known:
        raise refuse(path, model_type, "transformers has no model of it that gives a score")
    if base.vision is not None:
        raise refuse(path, model_type, "a score of pictures is not trained; drop [vision]")
    config = copy.deepcopy(base.config)
    config.num_labels, config.tie_word_embeddings = 1, False
    family = replace(base.family, head=SCORE)
    architecture = replace(base, config=config, family=family, scored=True)
    model = lay_out(architecture)
    missing = [part for part in family.parts(config.num_hidden_layers) if not has(model, part)]
    if missing or not is_scored(model):
        reason = f"its model that gives a score has no {', '.join(missing[:1]) or 'plain head'}"
        raise refuse(path, model_type, reason)
    return architecture


def has(model: nn.Module, path: str) -> bool:
    """Return whether a model has a part at a path."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
