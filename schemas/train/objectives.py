"""The objectives of `[objective]`, one record each, with all that other code asks of one.

A record names its class in text, so that a config is read without torch. To add an objective on
rows or pairs, add a record here and its class, in a file of `headrace.trainer.objectives`.
"""

from dataclasses import dataclass
from typing import Literal

FOLDER = "headrace.trainer.objectives"
Columns = Literal["rows", "pairs", "unpaired"]


@dataclass(frozen=True)
class ObjectiveRecord:
    """One objective.

    Attributes:
        description: for the config reference.
        factory: its class, as `module:name`.
        columns: what it reads of a shard: rows of tokens, pairs of answers to one prompt, or
            single answers with a label.
        settings: keys of `[objective]` that mean something beside it.
        gamma: a value to name where the config lacks the gamma that it needs.
        losses: values of `loss` that it knows; the first is the default.
        baselines: those of them that compare with answers to other prompts.
        scores: its model's head gives one number in place of logits.
        has_teacher: learns from another model, which the config names.
        has_reference: compares with the model as it was before training.
        sft_weight: weight of the chosen answers' cross-entropy, if the config names none.
    """

    description: str
    factory: str
    columns: Columns = "rows"
    settings: tuple[str, ...] = ()
    gamma: float | None = None
    losses: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    scores: bool = False
    has_teacher: bool = False
    has_reference: bool = False
    sft_weight: float = 0.0


def _adjusted(description: str, name: str) -> ObjectiveRecord:
    factory = f"{FOLDER}.focal:{name}"
    return ObjectiveRecord(description, factory, settings=("gamma",), gamma=2.0)


OBJECTIVES = {
    "cross_entropy": ObjectiveRecord("-log p.", f"{FOLDER}.objective:CrossEntropy"),
    "focal": _adjusted("-(1 - p)^gamma log p.", "Focal"),
    "focal_star": _adjusted("cross-entropy of gamma times the logits, over gamma.", "FocalStar"),
    "inverse_focal": _adjusted("-(1 + p)^gamma log p.", "InverseFocal"),
    "exponentiated": _adjusted("(-log p)^gamma / gamma.", "Exponentiated"),
    "dft": ObjectiveRecord("-p log p, with no gradient through the first p.", f"{FOLDER}.dft:Dft"),
    "distill": ObjectiveRecord(
        "divergence from the distribution of a teacher.",
        f"{FOLDER}.distill:Distill",
        settings=("teacher", "teacher_weight", "divergence", "temperature"),
        has_teacher=True,
    ),
    "dpo": ObjectiveRecord(
        "rewards against the model before training.",
        f"{FOLDER}.dpo:Dpo",
        columns="pairs",
        settings=("loss", "beta", "label_smoothing", "sft_weight"),
        losses=("sigmoid", "hinge", "ipo", "apo_zero"),
        has_reference=True,
    ),
    "kto": ObjectiveRecord(
        "the reward of a good answer above, or of a bad one below, the mean of answers to other "
        "prompts.",
        f"{FOLDER}.kto:Kto",
        columns="unpaired",
        settings=("loss", "beta", "desirable_weight", "undesirable_weight"),
        losses=("sigmoid", "apo_zero"),
        baselines=("sigmoid",),
        has_reference=True,
    ),
    "orpo": ObjectiveRecord(
        "odds ratio of mean tokens.",
        f"{FOLDER}.orpo:Orpo",
        columns="pairs",
        settings=("beta", "sft_weight"),
        sft_weight=1.0,
    ),
    "cpo": ObjectiveRecord(
        "rewards by themselves.",
        f"{FOLDER}.cpo:Cpo",
        columns="pairs",
        settings=("loss", "beta", "label_smoothing", "sft_weight"),
        losses=("sigmoid", "hinge", "ipo"),
        sft_weight=1.0,
    ),
    "reward": ObjectiveRecord(
        "a reward model: a head of one number, that of the chosen answer above the rejected one's.",
        f"{FOLDER}.reward:Reward",
        columns="pairs",
        settings=("center",),
        scores=True,
    ),
    "simpo": ObjectiveRecord(
        "rewards by mean token, gamma apart.",
        f"{FOLDER}.simpo:SimPo",
        columns="pairs",
        settings=("gamma", "beta", "label_smoothing", "sft_weight"),
        gamma=0.5,
    ),
}


def described(columns: Columns) -> str:
    """Return the objectives that read these columns, for the config reference."""
    return " ".join(
        f'`"{kind}"`: {record.description}'
        for kind, record in OBJECTIVES.items()
        if record.columns == columns
    )


def kinds_of(columns: Columns) -> str:
    """Return the objectives that read these columns, for messages."""
    names = [f'"{kind}"' for kind, record in OBJECTIVES.items() if record.columns == columns]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
