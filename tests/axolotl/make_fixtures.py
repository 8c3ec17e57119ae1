"""Ask Axolotl itself what it makes of every case, and write its answers beside this file.

Run by hand (`make axolotl-fixtures`): it builds an environment of its own (1.7 GB, a minute), since
no Axolotl release resolves beside the versions that Headrace uses. The small tokenizers are trained
here, so that nothing is fetched.

    python tests/axolotl/make_fixtures.py [ENVIRONMENT]
"""

import gzip
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases

AXOLOTL = "0.19.0"
REQUIREMENTS = (
    "torch==2.13.0 transformers==5.23.0 datasets==5.2.0 pyarrow==26.0.1 accelerate colorama addict "
    "trl==1.16.0 peft==0.21.2 numba pillow posthog==6.7.11 termcolor"
).split()
OFFLINE = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "RAYON_NUM_THREADS": "1",  # the order of equally frequent merges must not depend on threads
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
HERE = Path(__file__).parent
TEMPLATES = HERE.parents[1] / "dataprep" / "axolotl" / "chat_templates.json"
SPECIAL = [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|user|>",
    "<|model|>",
]
ROLES = {  # bos, eos, pad and chat template of each tokenizer
    "bos": ("<s>", "</s>", "<pad>", cases.CHATML),
    "chatml": (None, "<|im_end|>", "<pad>", cases.CHATML),
    "llama": ("<s>", "</s>", "<pad>", cases.WITH_EOS),
}
FOR_LLAMA = {"alpaca", "completion", "metharme", "input_output", "pygmalion", "llama2_chat"} | {
    "chat default",
    "chat chatml",
    "chat two ends",
    "chat parts",
    "chat detail",
    "messages",
}


def main() -> None:
    environment = Path(
        sys.argv[1] if len(sys.argv) > 1 else tempfile.gettempdir() + "/axolotl-venv"
    )
    python = environment / "bin" / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *REQUIREMENTS], check=True)
        subprocess.run([*pip, "--no-deps", f"axolotl=={AXOLOTL}"], check=True)
    command = [str(python), str(Path(__file__).resolve()), "--inside"]
    subprocess.run(command, check=True, env=os.environ | OFFLINE)


def inside() -> None:
    """The part that runs in Axolotl's environment."""
    import datasets
    from axolotl.utils.chat_templates.base import _CHAT_TEMPLATES
    from transformers import PreTrainedTokenizerFast

    logging.disable(logging.ERROR)
    datasets.disable_progress_bars()
    rows = cases.rows_of()
    files = {name: tokenizer_files(name, rows) for name in ROLES}
    lines: list[dict[str, Any]] = [{"versions": versions(), "tokenizers": files, "rows": rows}]
    for name, content in files.items():
        with tempfile.TemporaryDirectory() as folder:
            for file, text in content.items():
                Path(folder, file).write_text(text, encoding="utf-8")
            for case in cases.all_cases():
                if name != "llama" or case.name in FOR_LLAMA:
                    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
                    lines.append(answer(case, name, tokenizer, rows))
    write_lines(HERE / "golden.jsonl.gz", lines)
    templates = {name: _CHAT_TEMPLATES[name] for name in sorted(_CHAT_TEMPLATES)}
    header = {"origin": f"axolotl {AXOLOTL}, utils/chat_templates/templates, Apache-2.0"}
    TEMPLATES.write_text(json.dumps(header | templates, indent=0, ensure_ascii=False) + "\n")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("axolotl", "transformers", "tokenizers", "trl")}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """JSON lines, compressed without a time of day: equal answers give equal bytes."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9, mtime=0) as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    path.write_bytes(packed.getvalue())


def tokenizer_files(name: str, rows: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """A small tokenizer trained on the rows: byte-level BPE, or BPE over `▁` as Llama 2 has it."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    text = sorted(set(texts(rows))) + [cases.CHATML, cases.WITH_EOS] * 4
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    if name == "llama":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # to train on words
        tokens = special + [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=1200, special_tokens=tokens, limit_alphabet=120, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(text, trainer)
    bos, eos, pad, template = ROLES[name]
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
    }
    if name == "llama":  # as in Llama's, no words, and bytes are no special tokens
        raw = json.loads(tokenizer.to_str())
        raw["pre_tokenizer"] = None
        raw["added_tokens"] = [
            token for token in raw["added_tokens"] if token["content"] in SPECIAL
        ]
        return {
            "tokenizer.json": json.dumps(raw, ensure_ascii=False),
            "tokenizer_config.json": json.dumps(config),
        }
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)}


def texts(value: object) -> Iterator[str]:
    """Every string in the rows."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for part in value.values() for text in texts(part))
    elif isinstance(value, list):
        yield from (text for part in value for text in texts(part))


def answer(
    case: cases.Case, tokenizer_name: str, tokenizer: Any, all_rows: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """One line of fixtures: the case, and for each row samples, texts, or the error's name."""
    line: dict[str, Any] = case._asdict() | {"tokenizer": tokenizer_name}
    try:
        ask = preference(case, tokenizer) if case.rl else strategy(case, tokenizer)
    except Exception as error:  # noqa: BLE001  which mistakes are refused is part of the answer
        return line | {"fails": type(error).__name__}
    name, _, part = case.rows.partition(".")
    rows = [row[part] | {"system": row["system"]} if part else row for row in all_rows[name]]
    return line | {"answers": [ask_one(ask, json.loads(json.dumps(row))) for row in rows]}


def ask_one(ask: Callable[[dict[str, Any]], Any], row: dict[str, Any]) -> Any:
    try:
        return ask(row)
    except Exception as error:  # noqa: BLE001
        return {"error": type(error).__name__}


def settings(case: cases.Case) -> tuple[Any, Any]:
    """Top-level config, and the dataset entry as Axolotl's own validation leaves it."""
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.datasets import SFTDataset, StepwiseSupervisedDataset

    top = {"sequence_len": 512, "train_on_inputs": False, "pretraining_dataset": [{}]} | case.config
    entry = {"path": "rows", "type": case.type} | case.entry
    if "train_on_last_step_only" not in entry:
        entry = SFTDataset(**entry).model_dump(exclude_none=True)
    else:
        assert StepwiseSupervisedDataset.model_fields["train_on_last_step_only"]
    return DictDefault(top), DictDefault(entry)


def strategy(case: cases.Case, tokenizer: Any) -> Callable[[dict[str, Any]], Any]:
    """Axolotl's strategy for the case, as a function of one row."""
    import axolotl.utils.data.wrappers as wrappers
    from axolotl.core.chat.messages import ChatFormattedChats
    from axolotl.prompt_tokenizers import DatasetWrappingStrategy
    from datasets import Dataset

    top, entry = settings(case)
    if case.config.get("chat_template"):  # as axolotl.loaders.tokenizer.load_tokenizer does
        tokenizer.chat_template = wrappers_template(top, tokenizer)
    found: list[Any] = []
    keep = lambda found_one, *_, **__: found.append(found_one)  # noqa: E731
    wrappers.wrap_dataset_for_tokenized_prompt = keep
    wrappers.TokenizedPromptDataset = keep
    wrappers._handle_loaded_strategy = lambda one, *_: (found.append(one), None)
    kind = case.type if isinstance(case.type, str) else None
    base, _, style = (kind or "").partition(":")
    empty = Dataset.from_dict({"labels": [[0]]} if kind == "stepwise_supervised" else {"x": ["x"]})
    wrappers.get_dataset_wrapper(entry, tokenizer, top, base or None, empty, style or None)
    (one,) = found
    if isinstance(one, DatasetWrappingStrategy):
        return lambda row: samples(
            ChatFormattedChats(formatter=one.formatter, **one.message_transform(row)).tokenized(
                tokenizer
            )
        )
    if kind == "completion":
        return lambda row: samples(one.tokenize_prompt({name: [row[name]] for name in row}))
    return lambda row: samples(one.tokenize_prompt(batch(row)))


def wrappers_template(top: Any, tokenizer: Any) -> str:
    from axolotl.utils.chat_templates import get_chat_template_from_config

    return get_chat_template_from_config(cfg=top, tokenizer=tokenizer)


def batch(row: dict[str, Any]) -> dict[str, Any]:
    """Messages written as a string are taken for a batch, so they are asked as one."""
    if isinstance(row.get("messages"), str):
        return {name: [value] for name, value in row.items()}
    return row


def samples(result: Any) -> Any:
    """Ids, and which of them are trained, of each sample in Axolotl's result."""
    if "chosen_ids" in result:
        return {"chosen": list(result["chosen_ids"]), "rejected": list(result["rejected_ids"])}
    if "rejected_ids" in result:
        rejected = one_sample(result["rejected_ids"], result["rejected_labels"], None)
        return {"pair": [one_sample(result["input_ids"], result["labels"], None), rejected]}
    ids, labels = result.get("input_ids", []), result.get("labels")
    masks = result.get("attention_mask")
    if ids and isinstance(ids[0], list):
        labels = labels or [None] * len(ids)
        return [one_sample(*parts, None) for parts in zip(ids, labels, strict=True)]
    return [one_sample(ids, labels, masks)]


def one_sample(ids: list[int], labels: list[int] | None, mask: list[int] | None) -> dict[str, Any]:
    while mask and not mask[-1]:  # padding at the end is no part of a sample
        ids, labels, mask = ids[:-1], labels and labels[:-1], mask[:-1]
    if labels is None:
        return {"ids": list(ids)}
    pairs = list(zip(ids, labels, strict=False))
    if any(label not in (-100, token) for token, label in pairs):
        return {"ids": list(ids), "labels": list(labels)}
    assert len(ids) == len(labels), (len(ids), len(labels))
    return {"ids": list(ids), "trained": "".join(str(int(label != -100)) for label in labels)}


def preference(case: cases.Case, tokenizer: Any) -> Callable[[dict[str, Any]], Any]:
    """Axolotl's transform to prompt, chosen and rejected text."""
    import inspect

    from axolotl.prompt_strategies.dpo import load as load_dpo
    from axolotl.prompt_strategies.orpo import load as load_orpo
    from axolotl.utils.dict import DictDefault

    load = load_orpo if case.rl == "orpo" else load_dpo
    top = DictDefault({"datasets": [{"type": case.type} | case.entry]} | case.config)
    kind = case.type if isinstance(case.type, str) else "user_defined.default"
    transform = load(kind, top, dataset_idx=0)
    transform = transform[0] if isinstance(transform, tuple) else transform
    options = (
        {"tokenizer": tokenizer} if "tokenizer" in inspect.signature(transform).parameters else {}
    )

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        result = transform(row, **options)
        return as_trained(tokenizer, [result[name] for name in ("prompt", "chosen", "rejected")])

    return ask


def as_trained(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """A pair as Axolotl's DPO trainer tokenizes it: TRL's `tokenize_fn`, and never BOS twice."""
    from axolotl.utils.data.utils import remove_double_bos_token
    from trl.trainer.dpo_trainer import common_prefix_length

    prompt, *answers = texts
    eos = tokenizer.eos_token
    whole = [prompt + text + ("" if text.endswith(eos) else eos) for text in answers]
    ids = []
    for text in (prompt, *whole):
        encoded = {"input_ids": tokenizer(text=text)["input_ids"]}
        ids.append(remove_double_bos_token(encoded, tokenizer.bos_token_id)["input_ids"])
    shared = min(common_prefix_length(ids[0], side) for side in ids[1:])
    pair = [{"ids": side, "trained": "0" * shared + "1" * (len(side) - shared)} for side in ids[1:]]
    return {"text": texts, "pair": pair}


if __name__ == "__main__":
    inside() if sys.argv[1:] == ["--inside"] else main()
