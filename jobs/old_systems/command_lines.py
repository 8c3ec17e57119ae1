"""Programs and their flags, out of a shell script; rows for those beside the trainers."""

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.jobs.old_systems.equivalents import elsewhere, none
from headrace.schemas.errors import ConfigError

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=([^$`]*)$")
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}|\$(\w+)")
JLLM_PROGRAMS = ("raw2ids", "shuffle_datasets", "repartition", "train_pipe")


def find_programs(text: str, path: Path) -> tuple[dict[str, dict[str, Any]], Counter[str]]:
    """Return the flags of each program in a shell script, the last time that it is called.

    Values of variables that the script itself sets are put in.

    Returns:
        Program -> flags, and how often each is called.

    Raises:
        ConfigError: quotes that do not end.
    """
    programs: dict[str, dict[str, Any]] = {}
    counts: Counter[str] = Counter()
    variables: dict[str, str] = {}
    try:
        for line in text.replace("\\\n", " ").splitlines():
            words = [expand(word, variables) for word in shlex.split(line, comments=True)]
            variables |= assignments(words)
            for place, word in enumerate(words):
                name = word.rsplit("/", 1)[-1].removeprefix("jllm.").removesuffix(".py")
                name = name.rsplit(".", 1)[-1]
                if name in JLLM_PROGRAMS and ("jllm" in line or name == "train_pipe"):
                    programs[name] = parse_flags(words[place + 1 :])
                    counts[name] += 1
                    break
                if word.endswith("train.py") and "--train_type" in line:
                    programs["train.py"] = parse_flags(words[place + 1 :])
                    counts["train.py"] += 1
                    break
    except ValueError as error:
        raise ConfigError(f"{path}: not a shell script: {error}") from None
    return programs, counts


def assignments(words: Sequence[str]) -> dict[str, str]:
    """Return the variables that a command line sets: `NAME=value`, maybe after `export`."""
    found = {}
    for word in words[1:] if words[:1] == ["export"] else words:
        match = ASSIGNMENT.match(word)
        if match is None:
            break
        found[match[1]] = match[2]
    return found


def expand(word: str, variables: Mapping[str, str]) -> str:
    """Return a word with the variables that are known, and defaults as in `${NAME:-4}`, put in."""

    def value(match: re.Match[str]) -> str:
        return variables.get(match[1] or match[3], match[2] or match[0])

    return VARIABLE.sub(value, word)


def parse_flags(words: list[str]) -> dict[str, Any]:
    """`--flag value`, `--flag=value` and bare flags; numbers as numbers."""
    flags: dict[str, Any] = {}
    waiting: str | None = None
    for word in words:
        if word in ("&&", ";", "|", "&", ">", "2>&1"):
            break
        if is_flag(word):
            name, equals, value = word.partition("=")
            flags[name] = plain(value) if equals else True
            waiting = None if equals else name
        elif waiting is not None:
            flags[waiting] = plain(word)
            waiting = None
        else:
            flags.setdefault("(argument)", word)
    return flags


def is_flag(word: str) -> bool:
    """Return whether a word is a flag and not a negative number."""
    return word.startswith("-") and len(word) > 1 and isinstance(plain(word), str)


def plain(word: str) -> Any:
    """A word as the number or truth value that it spells."""
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


# --- programs beside the trainers: merging, converting, exporting, sampling ---

FROM_CONFIG = "known from the model's config.json"
NO_GPU = "the CPU, unless `--device` names a GPU"
RUN = "the run directory; its config is in it"

QLORA_PIPE_TOOLS = (
    elsewhere("merge_lora.py", "headrace merge", "base model, adapter and output are options"),
    elsewhere("merge_lora.py --no-gpu", "headrace merge --device", NO_GPU),
    elsewhere("convert_ds_checkpoint_to_lora.py --input", "headrace convert", RUN),
    elsewhere("convert_ds_checkpoint_to_lora.py --output", "headrace convert --output"),
    elsewhere(
        "convert_dpo_dataset_to_chat_format.py",
        "prepare.sources.type",
        "`preference` reads pairs as they are",
    ),
    elsewhere("test_sampling.py", "headrace sample"),
)
QLORA_PIPE_LITE_TOOLS = (
    elsewhere("merge_lora.py --input", "headrace merge --model"),
    elsewhere("merge_lora.py --adapter", "headrace merge --adapter"),
    elsewhere("merge_lora.py --output", "headrace merge --output"),
    elsewhere("merge_lora.py --scale", "headrace merge --scale"),
    elsewhere("merge_lora.py --no-gpu", "headrace merge --device", NO_GPU),
    elsewhere("convert_ds_checkpoint.py --input", "headrace convert", RUN),
    none("convert_ds_checkpoint.py --config", RUN),
    elsewhere("convert_ds_checkpoint.py --output", "headrace convert --output"),
    elsewhere("control_adapter_to_lora.py --base", "headrace control-to-lora --model"),
    elsewhere("control_adapter_to_lora.py --adapter", "headrace control-to-lora --adapter"),
    elsewhere("control_adapter_to_lora.py --output", "headrace control-to-lora --output"),
    elsewhere("control_adapter_to_lora.py --inverse", "headrace control-to-lora --inverse"),
    none("control_adapter_to_lora.py --cohere", FROM_CONFIG),
    none("control_adapter_to_lora.py --mixtral", "not the same there, so it is refused"),
    none("control_adapter_to_lora.py --no-gpu", "runs on the CPU"),
    elsewhere("lora_to_gguf.py --input", "headrace export-gguf --adapter"),
    elsewhere("lora_to_gguf.py --output", "headrace export-gguf --output"),
    none("lora_to_gguf.py --arch", FROM_CONFIG),
    elsewhere("lora_to_gguf.py --outtype", "headrace export-gguf --type"),
    elsewhere("analyze_control_adapters.py --adapter", "headrace control-report"),
    none("analyze_control_adapters.py --no-gpu", "runs on the CPU, on `rank` x `rank` matrices"),
)
JLLM_TOOLS = (
    elsewhere("shuffle_datasets -d", "headrace repartition", "`prepare` shuffles already"),
    elsewhere("shuffle_datasets -o", "headrace repartition --out"),
    elsewhere("shuffle_datasets -n", "headrace repartition --shards"),
    elsewhere("shuffle_datasets --cores", "headrace repartition --workers"),
    none("shuffle_datasets --mem_rate", "memory is bounded whatever the size"),
    elsewhere("shuffle_datasets --seed", "headrace repartition --seed"),
    elsewhere("shuffle_partition", "headrace repartition"),
    elsewhere("repartition -d", "headrace repartition"),
    elsewhere("repartition -n", "headrace repartition --shards"),
    none("cat_index", "a model is written with its index, from all machines"),
    none("cat2hf", "a model is written under the hub's names"),
    elsewhere("batch_infer", "headrace sample --input"),
    none("server", "vLLM and llama.cpp serve the result: see [serving](serving.md)"),
)
FSDP_QLORA_TOOLS = (
    elsewhere(
        "block_expansion.py", "train.adapter.blocks", "new blocks are made when training starts"
    ),
)
