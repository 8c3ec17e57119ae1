"""`[[datasets]]` of qlora-pipe and qlora-pipe-lite as sources and shard directories."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headrace.jobs.migration.imported import Imported

# dataset_type -> type of source, packing
TYPES = {
    "textfile": ("text", "concatenate"),
    "doclist": ("documents", "concatenate"),
    "axolotl": ("axolotl", "none"),
    "pretokenized": ("pretokenized", "none"),
}


@dataclass(frozen=True)
class OldDataset:
    """One entry: its source, and what its shard directory must be like."""

    source: dict[str, Any]
    prepare: dict[str, Any]
    train: dict[str, Any] = field(default_factory=dict)  # keys of our [[datasets]]
    evaluation_only: bool = False

    def goes_with(self, other: "OldDataset") -> bool:
        """Return whether both can share a shard directory: equal but for their sources.

        Evaluation sets have names, and a number of evaluation documents is that of one set.
        """
        alone = self.evaluation_only or "evaluation_documents" in self.prepare
        return not alone and replace(self, source=other.source) == other


@dataclass(frozen=True)
class OldDatasets:
    """Entries of a config, with the settings they share."""

    entries: list[OldDataset]
    prepare: dict[str, Any]  # what holds for every shard directory

    def groups(self) -> dict[str, list[OldDataset]]:
        """Shard directory -> entries that can share it."""
        groups: list[list[OldDataset]] = []
        for entry in self.entries:
            for group in groups:
                if entry.goes_with(group[0]):
                    group.append(entry)
                    break
            else:
                groups.append([entry])
        return {f"shards/{group[0].source['name']}": group for group in groups}

    def prepare_files(self, model: str) -> dict[str, dict[str, Any]]:
        """File name -> values; one for each shard directory."""
        groups = self.groups()
        files = {}
        for shards, group in groups.items():
            name = "prepare.toml" if len(groups) == 1 else f"prepare-{Path(shards).name}.toml"
            values = {"output": shards, "tokenizer": model, **self.prepare, **group[0].prepare}
            files[name] = values | {"sources": [entry.source for entry in group]}
        return files

    def train_tables(self, train: Mapping[str, Any]) -> dict[str, Any]:
        """`[[datasets]]` and `[[evaluation_datasets]]`."""
        groups = self.groups()
        trained = {path: g[0] for path, g in groups.items() if not g[0].evaluation_only}
        weighted = train.get("mixing") == "interleave"
        datasets = []
        for path, entry in trained.items():
            kept = {k: v for k, v in entry.train.items() if k != "weight" or weighted}
            datasets.append({"path": path, **kept})
        tables: dict[str, Any] = {"datasets": datasets}
        split = ("evaluation_fraction", "evaluation_documents")
        evaluated = [p for p, e in trained.items() if any(map(e.prepare.get, split))]
        evaluated += [path for path, g in groups.items() if g[0].evaluation_only]
        if evaluated:
            tables["evaluation_datasets"] = [{"path": path} for path in evaluated]
        return tables


def qlora_datasets(values: Mapping[str, Any], prepare: dict[str, Any], _: Imported) -> OldDatasets:
    """`[[datasets]]` and `[[eval_datasets]]` of qlora-pipe."""
    names = Names()
    entries = [qlora_entry(entry, False, names) for entry in values["datasets"]]
    held_out = values.get("eval_datasets", [])
    entries += [qlora_entry(entry, True, names) for entry in held_out]
    return OldDatasets(entries, prepare)


def qlora_entry(old: Mapping[str, Any], held_out: bool, names: "Names") -> OldDataset:
    """One of them; types and paths that are not known are left for our config to refuse."""
    kind, packing = TYPES.get(str(old.get("dataset_type")), (str(old.get("dataset_type")), "none"))
    path = str(old.get("dataset_path", ""))
    source: dict[str, Any] = {"name": names.take(str(old.get("name") or Path(path).stem))}
    source |= {"type": kind, "path": f"{path}/*.arrow" if kind == "pretokenized" else path}
    prepare: dict[str, Any] = {"sequence_len": old.get("sequence_len"), "packing": packing}
    if packing == "none" and kind == "pretokenized":
        prepare["overlong"] = "drop"
    if "subsample" in old:
        source["sample_fraction"] = old["subsample"]
    size = 0 if held_out else old.get("eval_size", 0)
    if size >= 1:
        prepare["evaluation_documents"] = int(size)
    else:
        prepare["evaluation_fraction"] = float(size)
    if kind == "axolotl":
        prepare.pop("packing")  # the YAML file says
    if held_out:
        source["split"] = "evaluation"
        return OldDataset(source, prepare, evaluation_only=True)
    train = {"weight": float(old["sample_weight"])} if "sample_weight" in old else {}
    repeats = {"repeats": old["num_repeats"]} if "num_repeats" in old else {}
    return OldDataset(source, prepare, train | repeats)


def lite_datasets(
    values: Mapping[str, Any], prepare: dict[str, Any], imported: Imported
) -> OldDatasets:
    """`[[datasets]]` of qlora-pipe-lite, which share one directory."""
    common = prepare.pop("sources", {})
    names = Names()
    entries = []
    many = len(values["datasets"]) > 1
    if values.get("use_control_adapters") and prepare.pop("mix_sources", False):
        imported.leave("mix_datasets", True, "a row has one class, so classes are not mixed in it")
    for old in values["datasets"]:
        path = str(old.get("dataset_path", ""))
        kind = "text" if path.endswith(".txt") else "documents"
        source = {"name": names.take(Path(path).stem), "type": kind, "path": path, **common}
        if values.get("use_control_adapters"):
            source["control_class"] = old.get("control_class", 1)
        limit = old.get("max_tokens")
        if limit is not None and many and prepare.get("mix_sources"):
            reason = "of one of several datasets in common rows; prepare it into a directory of "
            imported.leave("datasets[].max_tokens", limit, reason + "its own")
        elif limit is not None and many:
            source["max_tokens"] = limit
        train = {"max_tokens": limit} if limit is not None and not many else {}
        entries.append(OldDataset(source, {"packing": "concatenate"} | evaluated(prepare), train))
    prepare.pop("evaluation_fraction", None)
    return OldDatasets(entries, prepare)


def evaluated(prepare: Mapping[str, Any]) -> dict[str, Any]:
    """The share that is held out."""
    return {"evaluation_fraction": prepare.get("evaluation_fraction", 0.01)}


class Names:
    """Names of sources, each taken once."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def take(self, wished: str) -> str:
        """The name, with a number where it is taken; `*` and the like become `data`."""
        base = (
            "".join(c if c.isalnum() or c in "-_." else "-" for c in wished).strip("-.") or "data"
        )
        name, number = base, 2
        while name in self.taken:
            name, number = f"{base}-{number}", number + 1
        self.taken.add(name)
        return name
