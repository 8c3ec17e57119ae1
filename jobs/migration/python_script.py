"""Calls of a Python script for TRL or Unsloth, read and never run."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headrace.jobs.migration.imported import Imported
from headrace.schemas.errors import ConfigError

NAMES = ("SFT", "DPO", "ORPO", "CPO", "KTO", "Reward", "GRPO")
TRAINERS = {f"{name}Trainer": name.lower() for name in NAMES}
CONFIGS = tuple(f"{name}Config" for name in NAMES)
ARGUMENTS = ("TrainingArguments", "UnslothTrainingArguments")
PREFIXED = ("LoraConfig", "BitsAndBytesConfig", "get_peft_model", "load_dataset")
UNSLOTH_MODELS = ("FastLanguageModel", "FastModel", "FastVisionModel")
POSITIONAL = {"load_dataset": ("path", "name"), "from_pretrained": ("model",)}
# of the trainers and their like: objects that other calls make
OBJECTS = {
    *("model", "ref_model", "args", "peft_config", "tokenizer", "processing_class", "callbacks"),
    *("train_dataset", "eval_dataset", "data_collator", "compute_metrics", "formatting_func"),
    *("quantization_config", "accelerator", "processor"),
}
TRAINING_ARGUMENTS = {"learning_rate": 5e-5, "gradient_checkpointing": False}  # not as TRL's
SWITCHES = {"is_bfloat16_supported": True, "is_bf16_supported": True}
OWN_ROWS = "rows are made by the script's own code; write the source of your files in prepare.toml"
NOT_WRITTEN = "its value is not written in the script; write it into the new config"


class Unknown(Exception):  # noqa: N818 (no error: a value that only a run of the script would give)
    """A value that is not written in the script."""


def read_script(text: str, path: Path, imported: Imported) -> dict[str, Any]:
    """Return the arguments of a script's calls, by the key of TRL's table.

    Names that are set once, to what is written there, are put in; other values are reported.

    Raises:
        ConfigError: no Python, or no call of a trainer in it.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a Python script: {error}") from None
    names = constants(tree)
    values: dict[str, Any] = {}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        for key, node in arguments_of(call):
            try:
                values[key] = value_of(node, names)
            except Unknown:
                imported.leave(key, ast.unparse(node), NOT_WRITTEN)
        values |= trainer_of(call)
        note_own_code(call, imported)
    if "trainer" not in values:
        known = ", ".join(sorted(TRAINERS))
        raise ConfigError(f"{path}: no trainer of TRL is called; known are {known}")
    return values


def note_own_code(call: ast.Call, imported: Imported) -> None:
    """Report what a script does to rows or arguments by code of its own."""
    _, name = name_of(call)
    words = {keyword.arg: keyword.value for keyword in call.keywords}
    if name == "map" and isinstance(call.func, ast.Attribute):
        imported.leave("map", ast.unparse(call)[:60], OWN_ROWS)
    if name in TRAINERS and not isinstance(
        words.get("formatting_func"), (ast.Constant, type(None))
    ):
        imported.leave("formatting_func", ast.unparse(words["formatting_func"]), OWN_ROWS)
    if None in words and (name in CONFIGS or name in ARGUMENTS or name in PREFIXED):
        imported.leave(f"{name}(**...)", ast.unparse(words[None]), NOT_WRITTEN)


def trainer_of(call: ast.Call) -> dict[str, Any]:
    """Return which trainer is called, and defaults that its arguments' class has of its own."""
    *_, name = name_of(call)
    if name in TRAINERS:
        return {"trainer": TRAINERS[name]}
    if name in ARGUMENTS:
        given = {keyword.arg for keyword in call.keywords}
        return {key: value for key, value in TRAINING_ARGUMENTS.items() if key not in given}
    return {}


def name_of(call: ast.Call) -> tuple[str, str]:
    """Return the last two parts of the name that is called."""
    function = call.func
    if isinstance(function, ast.Attribute):
        owner = function.value
        return (owner.id if isinstance(owner, ast.Name) else "", function.attr)
    return ("", function.id if isinstance(function, ast.Name) else "")


def arguments_of(call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    """Yield the key and the expression of each argument of a call that matters."""
    owner, name = name_of(call)
    if name == "from_pretrained" and owner in UNSLOTH_MODELS:
        prefix = "FastLanguageModel."
    elif name == "from_pretrained" and owner.startswith("AutoModel"):
        prefix = "from_pretrained."
    elif name in PREFIXED:
        prefix = f"{name}."
    elif name in CONFIGS or name in ARGUMENTS or name in TRAINERS:
        prefix = ""
    else:
        return
    places = POSITIONAL.get(name, ()) if prefix != "FastLanguageModel." else ("model_name",)
    for key, node in zip(places, call.args, strict=False):
        yield prefix + key, node
    if prefix == "" and name in TRAINERS:
        yield from model_name(call)
    for keyword in call.keywords:
        if keyword.arg is not None and keyword.arg not in OBJECTS:
            yield prefix + keyword.arg, keyword.value


def model_name(call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    """Yield the trainer's model where it is a name, not an object."""
    given = [*call.args[:1], *(word.value for word in call.keywords if word.arg == "model")]
    for node in given:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield "model_name_or_path", node


def constants(tree: ast.AST) -> dict[str, ast.expr]:
    """Return the names that the script sets exactly once, with what they are set to."""
    found: dict[str, ast.expr] = {}
    twice: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            twice |= {name} & found.keys()
            found[name] = node.value
    return {name: value for name, value in found.items() if name not in twice}


def value_of(node: ast.expr, names: dict[str, ast.expr], depth: int = 8) -> Any:
    """Return the value of an expression that is written out.

    Raises:
        Unknown: it is computed.
    """
    if isinstance(node, ast.Name) and node.id in names and depth:
        return value_of(names[node.id], names, depth - 1)
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch":
        return node.attr
    if isinstance(node, ast.Call) and name_of(node)[1] in SWITCHES:
        return SWITCHES[name_of(node)[1]]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not value_of(node.operand, names, depth)
    if isinstance(node, (ast.List, ast.Tuple)):
        return [value_of(part, names, depth) for part in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [value_of(key, names, depth) for key in node.keys if key is not None]
        return dict(zip(keys, (value_of(part, names, depth) for part in node.values), strict=True))
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise Unknown from None
