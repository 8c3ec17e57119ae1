"""Limits of the length of documents and rows, beyond which a family fails, or is something else."""

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.schemas.errors import ConfigError


@dataclass(frozen=True)
class Limit:
    """Description of what a family limits.

    Attributes:
        key: of config.json, the most tokens.
        default: its value where config.json has none.
        why: what it is.
        of_rows: counted are the tokens of a packed row, not of a document.
        only_if: key without which there is no limit.
    """

    key: str
    default: int
    why: str
    of_rows: bool = False
    only_if: str | None = None


TABLE = "positions that it has"
LOOKED_UP = Limit("n_positions", 1024, TABLE)
LIMITS: Mapping[str, Limit] = {
    "codegen": Limit("n_positions", 2048, TABLE),
    "gpt2": LOOKED_UP,
    "gpt_bigcode": LOOKED_UP,
    "gpt_neo": Limit("max_position_embeddings", 2048, "size of its masks", of_rows=True),
    "gptj": Limit("n_positions", 2048, TABLE),
    "mpt": Limit("max_seq_len", 2048, "tokens that its biases are made for"),
    "openai-gpt": Limit("n_positions", 512, TABLE),
}


def check_lengths(path: str, model: Mapping[str, object], document: int, row: int) -> None:
    """Check the most tokens of a document, and of a row, against what a model takes.

    Args:
        path: of the model, for messages.
        model: config.json of the language model.

    Raises:
        ConfigError: naming the limit.
    """
    limit = LIMITS.get(str(model.get("model_type")))
    if limit is None or (limit.only_if is not None and not model.get(limit.only_if)):
        return
    most = model.get(limit.key, limit.default)
    tokens = row if limit.of_rows else document
    if isinstance(most, int) and tokens > most:
        remedy = "set loader.tokens_per_row, or prepare" if limit.of_rows else "prepare"
        raise ConfigError(
            f"{path}: {'rows' if limit.of_rows else 'documents'} may have {tokens} tokens, but "
            f"{limit.key} = {most} in config.json ({limit.why}); {remedy} shorter rows"
        )
