"""The steps of `headrace init`: look, estimate, plan, write."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from headrace.dataprep.text.chat_template import read_templates
from headrace.dataprep.text.tokenizer import CONFIG_NAMES
from headrace.dataprep.text.tokenizer import read_json as read_tokenizer_json
from headrace.jobs.first_run.look import Abilities, Found, look
from headrace.jobs.first_run.machine import Fit, Machine, this_machine
from headrace.jobs.first_run.write import prepare_toml, train_toml
from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.json_text import read_json
from headrace.schemas.outside_text import visible
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.publish import write_atomic, writing
from headrace.schemas.toml_config import load_config
from headrace.schemas.train.train_config import TrainConfig
from headrace.schemas.vision.families import FAMILIES, OTHER_TYPES
from headrace.trainer.quiet import quiet_libraries

PREPARE, TRAIN = "prepare.toml", "train.toml"
GPU_ROW, CPU_ROW = 2048, 512
EVALUATION_SHARES = 0.01, 0.1  # of the documents, so that there are about
EVALUATION_DOCUMENTS = 32
GPU_EVALUATION_ROWS, CPU_EVALUATION_ROWS = 256, 8
LORA_RATE, DPO_RATE = 2e-4, 5e-6
SMALL_WIDTH, SMALL_LORA_RATE = 1024, 1e-3  # models below a billion weights bear larger steps


@dataclass(frozen=True)
class Wanted:
    """Arguments of `headrace init`."""

    model: Path
    data: tuple[Path, ...]
    folder: Path  # where the configs are written, and what they make
    force: bool = False
    sequence_len: int | None = None
    program: str = "headrace"  # how this command was called, for those that come next


class Sizes(Protocol):
    """Estimated sizes of what `headrace prepare` will make."""

    @property
    def documents(self) -> float: ...
    @property
    def rows(self) -> float: ...
    @property
    def tokens(self) -> float: ...


@dataclass(frozen=True)
class Forecasts:
    """Estimates that the configs rest on: sizes of the data, and keys with which a run fits."""

    sizes: Callable[[PrepareConfig], Sizes]
    fit: Callable[[dict[str, Any], int, Machine], Fit]


def init(
    wanted: Wanted, console: Console, forecasts: Forecasts, machine: Machine | None = None
) -> None:
    """Look at data, model and machine, and write prepare.toml and train.toml for them.

    Raises:
        ConfigError: the model is not supported, or a config is there already.
        DataError: nothing in the data can be trained on.
    """
    check_folder(wanted)
    quiet_libraries()
    machine = machine or this_machine()
    config = model_settings(wanted.model)
    sees = config.get("model_type") in {*FAMILIES, *OTHER_TYPES}
    found = look(wanted.data, Abilities(has_chat_template(wanted.model), sees))
    usable = [item for item in found if not item.kind.problem]
    tell(found, machine, console)
    if not usable:
        raise DataError("nothing there can be trained on; the lines above say why")
    kinds = {item.kind.type == "preference" for item in usable}
    if len(kinds) > 1:
        raise DataError("pairs and other rows cannot be trained together; name one of the two")
    sequence_len = wanted.sequence_len or row_length(config, machine)
    shards, run = wanted.folder / "shards", wanted.folder / "run"
    rows = GPU_EVALUATION_ROWS if machine.gpus else CPU_EVALUATION_ROWS
    pairs = kinds == {True}
    rate = DPO_RATE if pairs else lora_rate(config)
    values = train_values(wanted.model, run, shards, rows, rate) | objective(pairs=pairs)
    if any(item.kind.pictures for item in usable):
        values["vision"] = {}
    fitting = forecasts.fit(values, sequence_len, machine)
    wanted.folder.mkdir(parents=True, exist_ok=True)
    prepare_path, train_path = wanted.folder / PREPARE, wanted.folder / TRAIN
    least, most = EVALUATION_SHARES
    write(prepare_path, prepare_toml(wanted.model, shards, usable, sequence_len, least))
    sizes = forecasts.sizes(load_config(PrepareConfig, prepare_path))
    share = min(most, max(least, EVALUATION_DOCUMENTS / max(1.0, sizes.documents)))
    text = prepare_toml(wanted.model, shards, usable, sequence_len, round(share, 3))
    write(prepare_path, text)
    write(train_path, train_toml(values, fitting, machine, sizes.rows, sequence_len))
    load_config(TrainConfig, train_path)
    chats = any(item.kind.type == "chat" for item in usable)
    tell_size(machine, fitting, sizes, console)
    tell_next(wanted, machine, console, chats=chats)


def check_folder(wanted: Wanted) -> None:
    """Refuse to write over configs that are there."""
    there = [name for name in (PREPARE, TRAIN) if (wanted.folder / name).exists()]
    if there and not wanted.force:
        raise ConfigError(
            f"{wanted.folder / there[0]}: is there already; give another --output, or --force"
        )


def model_settings(model: Path) -> dict[str, Any]:
    """Return a model's config.json.

    Raises:
        ConfigError: the folder holds no model with a tokenizer.
    """
    for name in ("config.json", "tokenizer.json"):
        if not (model / name).is_file():
            raise ConfigError(f"{model}: no {name}; name the folder of a Hugging Face model")
    config: dict[str, Any] = read_json(model / "config.json")
    return config


def has_chat_template(model: Path) -> bool:
    """Return whether a model's tokenizer brings a chat template."""
    return bool(read_templates(model, read_tokenizer_json(model / CONFIG_NAMES[0])))


def row_length(config: dict[str, Any], machine: Machine) -> int:
    """Return tokens of a row: as much as is usual, within the model's positions."""
    settings = config.get("text_config") or config
    positions = settings.get("max_position_embeddings")
    wanted = GPU_ROW if machine.gpus else CPU_ROW
    return min(wanted, positions) if isinstance(positions, int) and positions > 0 else wanted


def lora_rate(config: dict[str, Any]) -> float:
    """Return the learning rate of an adapter for a model of this width."""
    width = (config.get("text_config") or config).get("hidden_size")
    return SMALL_LORA_RATE if isinstance(width, int) and width < SMALL_WIDTH else LORA_RATE


def train_values(
    model: Path, run: Path, shards: Path, evaluation_rows: int, rate: float
) -> dict[str, Any]:
    """Return the keys of train.toml that do not depend on the machine."""
    return {
        "model": str(model),
        "output_dir": str(run),
        "datasets": [{"path": str(shards)}],
        "evaluation_datasets": [{"path": str(shards), "max_rows": evaluation_rows}],
        "adapter": {"kind": "lora", "rank": 16},
        "optimizer": {"lr": rate},
        "scheduler": {"type": "cosine", "warmup_fraction": 0.05},
        "evaluation": {"every_epochs": 0.25},
    }


def objective(*, pairs: bool) -> dict[str, Any]:
    """Return the key of what is minimized, where rows ask for another than the usual one."""
    return {"objective": {"kind": "dpo"}} if pairs else {}


def write(path: Path, text: str) -> None:
    """Write a config."""
    with writing(path, "give another --output"):
        write_atomic(path, text)


def tell(found: Sequence[Found], machine: Machine, console: Console) -> None:
    """Say what was seen."""
    for item in found:
        size = f"{len(item.files):,} file(s), {item.size / 2**20:,.1f} MiB"
        problem = item.kind.problem
        what = f"left out: {visible(problem)}" if problem else visible(item.kind.seen)
        console.print(f"{visible(str(item.root))}: {size}: {what}", soft_wrap=True)
    console.print(f"machine: {machine.describe()}")


def tell_size(machine: Machine, fitting: Fit, sizes: Sizes, console: Console) -> None:
    """Say how much there is to train on, and how it fits."""
    console.print(f"about {sizes.tokens:,.0f} tokens in {sizes.rows:,.0f} rows")
    if fitting.peak is None:
        return
    percent = fitting.peak / machine.memory
    console.print(
        f"the fullest GPU will hold about {fitting.peak / 2**30:.1f} GiB, {percent:.0%}"
        + ("" if fitting.fits else ": it does not fit; use more GPUs or a smaller model")
    )


def tell_next(wanted: Wanted, machine: Machine, console: Console, *, chats: bool) -> None:
    """Say what was written, and the commands that come next.

    Args:
        chats: there are some among the rows, so the result is asked by its chat template.
    """
    folder, program = wanted.folder, wanted.program
    prompt = '"a question" --chat' if chats else '"a beginning"'
    adapter = folder / "run" / "adapter"
    lines = [
        f"{folder / PREPARE} and {folder / TRAIN}: written. Next:\n",
        f"  {program} prepare {folder / PREPARE}",
        f"  {program} train {folder / TRAIN} --gpus {max(1, machine.gpus)}",
        "\nand then\n",
        f"  {program} sample {wanted.model} --adapter {adapter} {prompt}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True)
