"""`engine = "axolotl"`: an installed Axolotl tokenizes, for types that Headrace does not know.

Read against axolotl 0.19.0. It brings torch and transformers, so that it is imported when a source
asks for it, and by name: nothing else in dataprep needs either.
"""

import importlib
import logging
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from headrace.dataprep.axolotl.strategy import Built, Plan, Row, RowError, as_mask
from headrace.dataprep.text.sample import Sample
from headrace.dataprep.text.tokens import TokenizerSpec
from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.fingerprint import canonical_json
from headrace.schemas.prepare.axolotl_config import AxolotlConfig, CustomType

INSTALL = (
    "pip install '.[axolotl]' in a clone of Headrace, then pip install --no-deps axolotl==0.19.0"
)
STRATEGIES = "axolotl.prompt_strategies"
OURS = {"rl", "rows", "row_ranges", "shards", "shards_idx", "weight", "date", "options"}
TOP_LEVEL = {"train_on_inputs", "eot_tokens", "chat_template_kwargs", "default_system_message"}
APART = ("bradley_terry", "stepwise_supervised")  # which it loads in a way of their own
IGNORED = -100


class EngineStrategy:
    """One entry of Axolotl's `datasets:`, read by Axolotl.

    Raises:
        ConfigError: Axolotl or something that it needs is not installed, or it has no such type.
    """

    located = False

    def __init__(self, options: AxolotlConfig, spec: TokenizerSpec, sequence_len: int) -> None:
        if options.rl is not None:
            raise ConfigError('engine = "axolotl" gives no pairs; remove it')
        wrappers = load_module("axolotl.utils.data.wrappers")
        settings = load_module("axolotl.utils.dict").DictDefault
        self.dataset = load_module("datasets").Dataset
        load_module("datasets").disable_progress_bars()
        logging.getLogger("axolotl").setLevel(logging.ERROR)
        check_type(options.type, wrappers.DATASET_HANDLERS)
        tokenizer = load_module("transformers").PreTrainedTokenizerFast(
            tokenizer_file=spec.file, **dict(spec.token_texts)
        )
        tokenizer.chat_template = dict(spec.chat_templates).get("default")
        given = options.model_dump(exclude_none=True, exclude=OURS)
        top = settings(
            {"sequence_len": sequence_len, "dataset_keep_in_memory": True}
            | {key: value for key, value in given.items() if key in TOP_LEVEL}
        )
        entry = settings(
            {"path": "rows"}
            | {key: value for key, value in given.items() if key not in TOP_LEVEL}
            | options.options
        )
        kind = entry.type if isinstance(entry.type, str) else None
        base, _, style = (kind or "").partition(":")
        self.wrap = partial(
            wrappers.get_dataset_wrapper,
            entry,
            tokenizer,
            top,
            base or None,
            dataset_prompt_style=style or None,
        )
        self.strategy = load_strategy(kind, tokenizer, top, entry)

    def plan(self, row: Row) -> Plan:
        """Axolotl's samples of one row."""
        try:
            found = self.ask(dict(row))
        except Exception as error:  # noqa: BLE001  a strategy may raise anything at a row
            raise RowError("refused by Axolotl", f"{type(error).__name__}: {error}") from None
        samples = [to_sample(ids, labels) for ids, labels in found if ids]
        return Plan([], lambda _: Built(samples), canonical_json(row))

    def ask(self, row: dict[str, Any]) -> list[tuple[list[int], list[int] | None]]:
        """Ids and labels that Axolotl makes of one row."""
        if self.strategy is None:
            found, _ = self.wrap(self.dataset.from_list([row]))
            return [(one["input_ids"], one.get("labels")) for one in found]
        if not self.strategy.supports_batched:
            result = self.strategy.tokenize_prompt(row)
            return [(result["input_ids"], result.get("labels"))]
        batch = self.strategy.tokenize_prompt({name: [value] for name, value in row.items()})
        ids = batch.get("input_ids", [])
        return list(zip(ids, batch.get("labels") or [None] * len(ids), strict=True))


def load_strategy(kind: str | None, tokenizer: Any, top: Any, entry: Any) -> Any:
    """Axolotl's strategy for single rows, or None where it only reads whole sets."""
    if kind is None or kind.startswith(APART):
        return None
    load = load_module(STRATEGIES).load
    try:
        found = load(kind, tokenizer, top, entry)
    except Exception as error:  # noqa: BLE001  a strategy may raise anything at its options
        raise ConfigError(f'engine = "axolotl": type "{kind}" cannot be used ({error})') from None
    return found if hasattr(found, "tokenize_prompt") else None


def to_sample(ids: list[int], labels: list[int] | None) -> Sample:
    """Axolotl's ids and labels; labels that are no ids have no place in shards."""
    tokens = np.array(ids, dtype=np.int32)
    if labels is None:
        return Sample(tokens)
    found = np.array(labels)
    trained = found != IGNORED
    if len(found) != len(tokens) or (found[trained] != tokens[trained]).any():
        raise RowError("labels are no ids", "shards only say which tokens are trained")
    return Sample(tokens, as_mask(trained))


def load_module(name: str) -> Any:
    """A module of Axolotl or of what it needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f'engine = "axolotl": {error}; run {INSTALL}') from None


def check_type(kind: str | CustomType, handlers: dict[str, Any]) -> None:
    """Only Axolotl's own types: it would import a module of any other dotted name."""
    if isinstance(kind, CustomType) or kind.partition(":")[0] in handlers:
        return
    module = kind.split(".load")[0]
    if not all(part.isidentifier() for part in module.split(".")) or not exists(module):
        raise ConfigError(f'engine = "axolotl": Axolotl has no type "{kind}"; correct it')


def exists(module: str) -> bool:
    """Return whether Axolotl has a strategy module of that name."""
    try:
        return find_spec(f"{STRATEGIES}.{module}") is not None
    except ModuleNotFoundError:
        return False
    except Exception as error:  # noqa: BLE001  a package on the way is imported, and may fail
        raise DataError(f"{STRATEGIES}.{module} cannot be imported ({error})") from None
