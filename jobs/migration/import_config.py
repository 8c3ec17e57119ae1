"""`headrace import-config`: an old config into prepare.toml and train.toml."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.jobs.migration.imported import Imported, apply, entry_rows, flatten, nest, translate
from headrace.jobs.migration.old_datasets import OldDatasets, lite_datasets, qlora_datasets
from headrace.jobs.migration.python_script import read_script
from headrace.jobs.migration.trainer_data import factory_sources, trl_sources
from headrace.jobs.old_systems.axolotl import AXOLOTL
from headrace.jobs.old_systems.command_lines import JLLM_PROGRAMS, find_programs
from headrace.jobs.old_systems.equivalents import OldSystem
from headrace.jobs.old_systems.fsdp_qlora import FSDP_QLORA
from headrace.jobs.old_systems.jllm import JLLM
from headrace.jobs.old_systems.qlora_pipe import QLORA_PIPE
from headrace.jobs.old_systems.qlora_pipe_lite import QLORA_PIPE_LITE
from headrace.jobs.old_systems.quantized import DYNAMIC
from headrace.jobs.trainer_arguments.llama_factory import LLAMA_FACTORY, listed
from headrace.jobs.trainer_arguments.trl import TRL, trainer_of
from headrace.schemas.errors import ConfigError
from headrace.schemas.outside_text import (
    MOST_YAML_BYTES,
    OutsideTextError,
    parse_toml,
    parse_yaml,
    read_text,
)
from headrace.schemas.publish import write_atomic
from headrace.schemas.toml_config import MOST_CONFIG_BYTES

SYSTEMS = (QLORA_PIPE, QLORA_PIPE_LITE, AXOLOTL, JLLM, FSDP_QLORA, LLAMA_FACTORY, TRL)
MODEL_KEYS = {"base_model", "model_name_or_path"}
YAML_SUFFIXES = (".yaml", ".yml")
FOLDERS_ABOVE = 4  # a config's own folder and the ones above it
JLLM_SHARDS = "their Parquet needs a manifest: run `headrace index` on it first"


def import_config(old: Path, directory: Path) -> list[str]:
    """Write the configs that an old one becomes.

    Returns:
        What to tell: files written, then a line for each setting that was left out.

    Raises:
        ConfigError: not an old config that is known, or one that our configs would refuse.
    """
    imported = read_old(old)
    imported.check()
    texts = imported.files()
    for name in texts:
        if (directory / name).exists():
            raise ConfigError(f"{directory / name}: exists already; choose another --output")
    write_together(directory, texts)
    return [*(f"{directory / name}: written" for name in texts), *imported.report()]


def write_together(directory: Path, texts: Mapping[str, str]) -> None:
    """Write all files, or none, so that a failed import can be run again."""
    directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    try:
        for name, text in texts.items():
            write_atomic(directory / name, text)
            written.append(directory / name)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def read_old(path: Path) -> Imported:
    """Read an old config and convert it, by the kind of file it is.

    Raises:
        ConfigError: not a config of a system that is known.
    """
    suffix = path.suffix.lower()
    try:
        text = read_text(path, MOST_YAML_BYTES if suffix in YAML_SUFFIXES else MOST_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if suffix == ".toml":
        return from_toml(read_toml(text, path), path)
    if suffix in YAML_SUFFIXES:
        return from_yaml(read_yaml(text, path), path)
    if suffix == ".py":
        return from_script(text, path)
    return from_commands(text, path)


def read_toml(text: str, path: Path) -> dict[str, Any]:
    try:
        return parse_toml(text)
    except OutsideTextError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_yaml(text: str, path: Path) -> dict[str, Any]:
    try:
        values, _ = parse_yaml(text)
    except OutsideTextError as error:
        line = f":{error.line}" if error.line else ""
        raise ConfigError(f"{path}{line}: {error}") from None
    if not isinstance(values, dict) or not values.keys() & MODEL_KEYS:
        raise ConfigError(
            f"{path}: neither base_model (Axolotl) nor model_name_or_path (LLaMA-Factory, TRL)"
        )
    return {str(key): value for key, value in values.items() if value is not None}


def from_yaml(values: Mapping[str, Any], path: Path) -> Imported:
    """Convert a YAML file of Axolotl, LLaMA-Factory or TRL, told apart by their keys."""
    if "base_model" in values:
        return from_axolotl(values, path)
    own = LLAMA_FACTORY.own_keys() - TRL.own_keys()
    if values.keys() & own:
        return from_llama_factory(values, path)
    return from_trl(values, path, Imported())


def from_script(text: str, path: Path) -> Imported:
    """Convert a Python script for TRL or Unsloth, whose calls are read and not run."""
    imported = Imported()
    return from_trl(read_script(text, path, imported), path, imported)


def from_trl(values: Mapping[str, Any], path: Path, imported: Imported) -> Imported:
    """Convert TRL's arguments; the data becomes one shard directory."""
    new = apply(TRL, values, imported)
    imported.train = nest(new, "train")
    if "model" not in imported.train:
        raise ConfigError(f"{path}: no name of a model is written in it; add one")
    sources = trl_sources(values, trainer_of(values), imported)
    fraction = values.get("test_split_size")
    held = {"evaluation_fraction": float(fraction)} if fraction else {}
    add_prepared(imported, path, new, sources, held)
    return imported


def from_llama_factory(values: Mapping[str, Any], path: Path) -> Imported:
    """Convert LLaMA-Factory's config; with weights each dataset gets a directory of its own."""
    imported = Imported()
    new = apply(LLAMA_FACTORY, values, imported)
    imported.train = nest(new, "train")
    sources = factory_sources(values, path)
    size = float(values.get("val_size") or 0)
    key = "evaluation_documents" if size >= 1 else "evaluation_fraction"
    held = {key: int(size) if size >= 1 else size} if size else {}
    if str(values.get("mix_strategy", "concat")) == "concat":
        add_prepared(imported, path, new, list(sources.values()), held)
        return imported
    weights = [float(part) for part in listed(values.get("interleave_probs"))]
    trained = [name for name, source in sources.items() if source.get("split") != "evaluation"]
    if weights and len(weights) != len(trained):
        raise ConfigError(f"interleave_probs: {len(weights)} for {len(trained)} datasets")
    for name, source in sources.items():
        add_prepared(imported, path, new, [source], held, name)
    for place, weight in enumerate(weights):
        imported.train["datasets"][place]["weight"] = weight
    imported.train["mixing"] = "interleave"
    return imported


def add_prepared(
    imported: Imported,
    path: Path,
    new: Mapping[str, Any],
    sources: list[dict[str, Any]],
    held: Mapping[str, Any],
    name: str | None = None,
) -> None:
    """Add a prepare.toml for these sources, and the shard directory that it makes.

    Args:
        new: our keys, those of `prepare` among them.
        held: how much of it is for evaluation.
        name: of the directory, where there are several.
    """
    shards = f"shards/{name or path.stem}"
    file = f"prepare-{name}.toml" if name else "prepare.toml"
    imported.prepare[file] = {
        "output": shards,
        "tokenizer": imported.train["model"],
        **nest(new, "prepare"),
        "evaluation_fraction": 0.0,
        **held,
        "sources": sources,
    }
    splits = {source.get("split", "auto") for source in sources}
    if splits != {"evaluation"}:
        imported.train.setdefault("datasets", []).append({"path": shards})
    if held or "evaluation" in splits:
        imported.train.setdefault("evaluation_datasets", []).append({"path": shards})
    else:
        drop_evaluation(imported)


def from_toml(values: Mapping[str, Any], path: Path) -> Imported:
    """qlora-pipe, which says `model`, or qlora-pipe-lite, which says `model_dir`."""
    values = dict(values) | {
        table: [with_found_path(entry, path) for entry in values.get(table, [])]
        for table in ("datasets", "eval_datasets")
        if table in values
    }
    if "model_dir" in values:
        return assemble(QLORA_PIPE_LITE, values, lite_datasets)
    if "model" in values and any("dataset_path" in entry for entry in values.get("datasets", [])):
        return assemble(QLORA_PIPE, values, qlora_datasets)
    raise ConfigError(
        f"{path}: neither `model` (qlora-pipe) nor `model_dir` (qlora-pipe-lite) beside "
        "`[[datasets]]` with a `dataset_path`"
    )


def with_found_path(entry: Mapping[str, Any], config: Path) -> dict[str, Any]:
    """Return a dataset whose files are looked for here, then in the folders above the config.

    The old systems look from where they are started, which is often the top of a repository.
    """
    given = str(entry.get("dataset_path", ""))
    if not given or Path(given).is_absolute() or any(Path().glob(given)):
        return dict(entry)
    above = config.resolve().parents[:FOLDERS_ABOVE]
    found = next((folder / given for folder in above if any(folder.glob(given))), None)
    return {**entry, "dataset_path": str(found)} if found else dict(entry)


def assemble(system: OldSystem, values: Mapping[str, Any], build: Any) -> Imported:
    """A config with `[[datasets]]`."""
    imported = Imported()
    tables = ("datasets", "eval_datasets")
    rest = {key: value for key, value in values.items() if key not in tables}
    plain = flatten(rest, whole={DYNAMIC})
    new = apply(system, plain, imported)
    for table in tables:
        rows = entry_rows(system, table)
        for number, entry in enumerate(values.get(table, [])):
            for key, value in entry.items():
                if key in rows:
                    translate(rows[key], value, entry, imported, f"{number}: ")
                else:
                    imported.leave(f"{table}[{number}].{key}", value, "not a key that is known")
    imported.train = nest(new, "train")
    datasets: OldDatasets = build(values, nest(new, "prepare"), imported)
    imported.prepare = datasets.prepare_files(imported.train["model"])
    imported.train |= datasets.train_tables(imported.train)
    return imported


def from_axolotl(values: Mapping[str, Any], path: Path) -> Imported:
    """The YAML file stays the source of the data; `prepare` reads it."""
    imported = Imported()
    new = apply(AXOLOTL, values, imported)
    imported.train = nest(new, "train")
    shards = str(values.get("dataset_prepared_path") or f"shards/{path.stem}")
    seen = bool(values.get("val_set_size") or values.get("test_datasets"))
    imported.prepare["prepare.toml"] = {
        "output": shards,
        "tokenizer": str(values.get("tokenizer_config") or values["base_model"]),
        "sources": [{"name": path.stem, "type": "axolotl", "path": str(path)}],
    }
    add_shards(imported, shards, seen)
    return imported


def add_shards(imported: Imported, shards: str, evaluated: bool) -> None:
    """Train on a shard directory, and evaluate on it where it has an evaluation split."""
    imported.train["datasets"] = [{"path": shards}]
    if evaluated:
        imported.train["evaluation_datasets"] = [{"path": shards}]
    else:
        drop_evaluation(imported)


def drop_evaluation(imported: Imported) -> None:
    """Drop the settings that need an evaluation loss, where there are no evaluation sets."""
    imported.train.get("evaluation", {}).pop("patience", None)
    imported.train.get("checkpoint", {}).pop("keep_best", None)


def from_commands(text: str, path: Path) -> Imported:
    """A shell script, or a file with nothing but a command, of jllm or fsdp_qlora.

    Raises:
        ConfigError: no command of theirs is in it.
    """
    programs, counts = find_programs(text, path)
    if not programs:
        raise ConfigError(
            f"{path}: give a .toml of qlora-pipe, a .yaml of Axolotl, LLaMA-Factory or TRL, a .py "
            "for TRL or Unsloth, or a file with the command lines of jllm or fsdp_qlora"
        )
    notes = Imported()
    known = {name: known_flags(flags, notes) for name, flags in programs.items()}
    is_fsdp = "train.py" in known
    imported = from_fsdp_qlora(known["train.py"]) if is_fsdp else from_jllm(known)
    for name, count in counts.items():
        if count > 1:
            notes.leave(name, f"{count} commands", "the last one is taken; give each its own file")
    imported.left_out += notes.left_out
    return imported


def known_flags(flags: Mapping[str, Any], notes: Imported) -> dict[str, Any]:
    """Return the flags whose values stand in the script; note those that a shell would fill in."""
    found = {}
    for flag, value in flags.items():
        if isinstance(value, str) and "$" in value:
            notes.leave(flag, value, "its value is not in the script; write it into the new config")
        else:
            found[flag] = value
    return found


def from_jllm(programs: Mapping[str, Mapping[str, Any]]) -> Imported:
    """raw2ids becomes prepare.toml, train_pipe train.toml."""
    imported = Imported()
    old: dict[str, Any] = dict(programs.get("train_pipe", {}))
    for name in JLLM_PROGRAMS[:-1]:
        old |= {f"{name} {flag}": value for flag, value in programs.get(name, {}).items()}
    new = apply(JLLM, old, imported)
    raw = programs.get("raw2ids")
    shards = f"shards/{Path(str(old.get('raw2ids -i', 'data'))).stem}"
    if raw is not None:
        prepare = nest(new, "prepare")
        shards = str(raw.get("-o") or shards)
        prepare = {"output": shards, "tokenizer": "open_llama_13b"} | prepare
        prepare.setdefault("packing", "none")
        prepare["sources"] = [jllm_source(raw)]
        imported.prepare["prepare.toml"] = prepare
    if "train_pipe" not in programs:
        raise ConfigError("no train_pipe in the command lines, so there is no model to train")
    imported.train = nest(new, "train")
    imported.train.setdefault("model", "baichuan-inc/Baichuan-13B-Chat")
    imported.train.setdefault("output_dir", str(old.get("--checkpoint") or "runs/imported"))
    path = str(old.get("--train_data") or shards)
    if raw is None:
        imported.leave("--train_data", path, JLLM_SHARDS)
    else:
        path = shards
    add_shards(imported, path, evaluated=False)
    if old.get("--eval_data"):
        imported.train["evaluation_datasets"] = [{"path": str(old["--eval_data"])}]
        imported.leave("--eval_data", old["--eval_data"], JLLM_SHARDS)
    return imported


def jllm_source(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Chat, or documents as its own pretraining mode tells them apart."""
    path = str(raw.get("-i", "data.txt"))
    source: dict[str, Any] = {"name": Path(path).stem or "data", "path": path}
    if raw.get("-t", "ft") == "ft":
        return source | {"type": "chat"}
    if Path(path).suffix in (".json", ".jsonl"):
        return source | {"type": "documents"}
    return source | {"type": "text", "document_separator": "\n\n"}


def from_fsdp_qlora(flags: Mapping[str, Any]) -> Imported:
    """Its data sets are built in, so there is only a train.toml."""
    imported = Imported()
    imported.train = nest(apply(FSDP_QLORA, flags, imported), "train")
    add_shards(imported, f"shards/{flags.get('--dataset', 'alpaca_sample')}", evaluated=False)
    return imported
