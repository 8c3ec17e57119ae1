"""The directories of a blend: read, found to fit together, and identified."""

from dataclasses import dataclass
from pathlib import Path

from headrace.dataprep.work.workspace import CONFIG_NAME
from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.outside_text import OutsideTextError, parse_json, read_text
from headrace.schemas.prepare.images_config import ImagesConfig
from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.shards.manifest_file import read_manifest
from headrace.schemas.shards.shard_format import TRAIN

ROW_GROUP_TOKENS = 1 << 20  # where a directory does not say
REPARTITION_VERSION = 1  # raise it when the same call would give other rows


@dataclass(frozen=True)
class Blend:
    """A request to blend directories.

    Without `seed` the order is a new one; without `weights` all rows are taken.
    """

    directories: tuple[Path, ...]
    output: Path
    shards: int
    seed: int | None = None
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Inputs:
    """The directories, read and found to fit together; `settings` is their `prepare.json`."""

    directories: tuple[Path, ...]
    manifests: tuple[Manifest, ...]
    settings: tuple[dict[str, object], ...]

    @property
    def first(self) -> Manifest:
        """The manifest whose tokenizer, length and kind all share."""
        return self.manifests[0]


def read_inputs(blend: Blend) -> Inputs:
    """Read the directories' manifests and settings, and see that they fit together."""
    if len({path.resolve() for path in blend.directories}) < len(blend.directories):
        raise ConfigError("a directory is named twice; name each once, and give it a weight")
    manifests = tuple(read_manifest(directory) for directory in blend.directories)
    for directory, manifest in zip(blend.directories, manifests, strict=True):
        if manifest.columns is not None:
            raise DataError(
                f"{directory}: only indexed, so its rows have no order by key that could be "
                'cut and blended; prepare it as a source with type = "pretokenized"'
            )
    for directory, manifest in zip(blend.directories[1:], manifests[1:], strict=True):
        first, other = describe(manifests[0]), describe(manifest)
        if manifest.tokenizer.equals(manifests[0].tokenizer):
            other["tokenizer"] = first["tokenizer"]
        for name, value in first.items():
            if other[name] != value:
                raise DataError(
                    f"{directory}: {name} {other[name]}, but {blend.directories[0]} has {value}; "
                    "prepare both alike"
                )
    for directory, manifest in zip(blend.directories, manifests, strict=True):
        if not manifest.split(TRAIN) or not sum(s.rows for s in manifest.split(TRAIN)):
            raise DataError(f"{directory}: no train rows; leave it out")
    return Inputs(blend.directories, manifests, tuple(map(read_settings, blend.directories)))


def describe(manifest: Manifest) -> dict[str, object]:
    """Return the properties that directories must share to be blended."""
    return {
        "kind": manifest.kind,
        "sequence_len": manifest.sequence_len,
        "tokenizer": manifest.tokenizer.fingerprint[:12],
        "special tokens": manifest.tokenizer.special_tokens,
        "images": None if manifest.images is None else manifest.images.fingerprint[:12],
    }


def read_settings(directory: Path) -> dict[str, object]:
    """The `prepare.json` of a directory; empty where something else wrote the shards."""
    path = directory / CONFIG_NAME
    if not path.is_file():
        return {}
    try:
        settings = parse_json(read_text(path))
    except OutsideTextError as error:
        raise DataError(f"{path}: {error}; prepare the directory again") from None
    return settings if isinstance(settings, dict) else {}


def own_config(settings: dict[str, object]) -> dict[str, object]:
    """The config of `prepare` in its settings; empty in those of other commands."""
    config = settings.get("config")
    return config if isinstance(config, dict) else {}


def row_group_tokens(inputs: Inputs) -> int:
    """Tokens in a row group, as the first directory was prepared."""
    tokens = own_config(inputs.settings[0]).get("row_group_tokens", ROW_GROUP_TOKENS)
    assert isinstance(tokens, int)
    return tokens


def picture_group_bytes(inputs: Inputs) -> int:
    """Bytes of pictures in a row group, as the first directory was prepared."""
    images = own_config(inputs.settings[0]).get("images")
    default = ImagesConfig.model_fields["row_group_bytes"].default
    found = images.get("row_group_bytes", default) if isinstance(images, dict) else default
    assert isinstance(found, int)
    return found


def keeps_order(inputs: Inputs, seed: int) -> bool:
    """Return whether the rows lie in this seed's order already."""
    return len(inputs.manifests) == 1 and seed == inputs.first.seed


def new_settings(blend: Blend, inputs: Inputs, seed: int) -> dict[str, object]:
    """The new `prepare.json`: that of `prepare` itself where only the number of shards changes."""
    (first, *_) = inputs.settings
    if keeps_order(inputs, seed) and own_config(first):
        return first | {"config": own_config(first) | {"shards": blend.shards}}
    return {
        "version": REPARTITION_VERSION,
        "repartition": {"shards": blend.shards, "seed": seed, "weights": blend.weights},
        "directories": list(inputs.settings),
    }


def inputs_fingerprint(inputs: Inputs, same_order: bool) -> str:
    """SHA-256 over the directories' contents; that of the documents where rows stay as they are."""
    if same_order:
        return inputs.first.inputs_fingerprint
    return fingerprint([manifest.model_dump(mode="json") for manifest in inputs.manifests])


def source_names(inputs: Inputs) -> tuple[str, ...]:
    """The names of all sources, each once, in the order of the directories."""
    names = (source.name for manifest in inputs.manifests for source in manifest.sources)
    return tuple(dict.fromkeys(names))
