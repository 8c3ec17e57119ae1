"""Parts of models between embedding and first layer, and between last norm and head.

Most do nothing there. Read against transformers 5.23.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

LAYER_DROP = {"layerdrop": "layers that are left out at random"}


@dataclass(frozen=True)
class Ends:
    """Description of the parts around the layers, in the order in which they run.

    Paths are relative to the model; None, or a path without a module, stands for nothing.
    """

    projection: str | None = None  # of rows of the embedding, to the layers' width
    positions: str | None = None  # a table with a row for each position, which is added
    by_name: bool = False  # the table takes its positions as `position_ids`
    norm: str | None = None  # of the sum
    output: str | None = None  # projection of what the last norm gives, to the head's width
    dropout: str | None = None  # config key of the probability, before the first layer
    refused: Mapping[str, str] = field(default_factory=dict)  # key that must not be set -> what

    @property
    def first(self) -> list[str]:
        """List the modules of the first stage, beside the embedding."""
        return [path for path in (self.projection, self.positions, self.norm) if path]

    @property
    def last(self) -> list[str]:
        """List the modules of the last stage, beside norm and head."""
        return [self.output] if self.output else []


NO_ENDS = Ends()
# model_type in config.json -> record; most types have none
ENDS: Mapping[str, Ends] = {
    "biogpt": Ends(
        positions="biogpt.embed_positions",
        by_name=True,
        dropout="hidden_dropout_prob",
        refused=LAYER_DROP,
    ),
    "bloom": Ends(norm="transformer.word_embeddings_layernorm"),
    "gpt2": Ends(positions="transformer.wpe", dropout="embd_pdrop"),
    "gpt_bigcode": Ends(positions="transformer.wpe", dropout="embd_pdrop"),
    "gpt_neo": Ends(positions="transformer.wpe", dropout="embed_dropout"),
    "nanochat": Ends(norm="model.norm"),
    "openai-gpt": Ends(positions="transformer.positions_embed", dropout="embd_pdrop"),
    "opt": Ends(
        projection="model.decoder.project_in",
        positions="model.decoder.embed_positions",
        by_name=True,
        output="model.decoder.project_out",
        refused=LAYER_DROP,
    ),
    "xglm": Ends(positions="model.embed_positions", dropout="dropout", refused=LAYER_DROP),
}


def ends_of(model: "nn.Module", model_type: str) -> Ends:
    """Return what a model has around its layers; paths of modules that it lacks are left out."""
    ends = ENDS.get(model_type, NO_ENDS)
    there = {name for name, _ in model.named_modules()}

    def found(path: str | None) -> str | None:
        return path if path in there else None

    return replace(
        ends,
        projection=found(ends.projection),
        positions=found(ends.positions),
        norm=found(ends.norm),
        output=found(ends.output),
    )
