"""Checks of a run before a process group or a GPU is touched. Imports no torch."""

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.shards.shard_format import EVALUATION
from headrace.schemas.shards.tokenizer_content import is_tokenizer
from headrace.schemas.train.objective_config import ObjectiveConfig
from headrace.schemas.train.objectives import kinds_of
from headrace.schemas.train.parallel_dims import ParallelDims
from headrace.schemas.train.quantization_config import check_installed
from headrace.schemas.train.train_config import TrainConfig
from headrace.schemas.vision.processor import differing, read_processor
from headrace.trainer.architecture.config_limits import read_model_config
from headrace.trainer.architecture.families import FAMILIES, check_family, text_settings
from headrace.trainer.architecture.model_directory import model_directory
from headrace.trainer.architecture.stop_tokens import stop_tokens
from headrace.trainer.architecture.weight_index import weights_fingerprint
from headrace.trainer.families.limits import check_lengths
from headrace.trainer.order.data_plan import plan_data
from headrace.trainer.order.datasets import RANDOM, Inputs
from headrace.trainer.shards.decoded_pairs import SIDES
from headrace.trainer.shards.storage import manifest_of
from headrace.trainer.stored.settings import check_readable
from headrace.trainer.vision.families import vision_family

logger = logging.getLogger(__name__)

REPORTING_LIBRARIES = {"mlflow": "mlflow-skinny>=3.1", "wandb": "wandb>=0.19"}
# of configs whose positions are rotary and computed, not looked up in a table of some length
ROTARY_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base")
DIVIDED = {  # keys of configs: what ranks that share weights each have a part of
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key heads",
    "vocab_size": "tokens of the vocabulary",
}
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
NOT_OF_MODEL = {"_commit_hash", "_name_or_path", "transformers_version", "use_cache"}


def check(config: TrainConfig, processes: int) -> Inputs:
    """Check model, shards and layout against each other.

    Raises:
        ConfigError, DataError: one line that says what to do.
    """
    dims = config.dims(processes)
    check_weight_shard(config, dims)
    check_optimizer(config)
    check_reporting(config)
    directory = model_directory(config.model, config.weights)
    model = read_model_config(directory)
    text = check_model_files(config, directory, model)
    if config.quantization is not None:
        check_installed(config.quantization.backend)
    train, evaluation = check_datasets(config, directory, text)
    sequence_tokens = find_place_tokens(config, train + evaluation)
    check_sequence(config, text, sequence_tokens)
    check_tensor(config, text)
    longest = max(manifest.sequence_len for manifest in train + evaluation)
    check_lengths(config.model, text, longest, sequence_tokens)
    plan = plan_data(config, train)
    check_evaluation_rows(config, evaluation)
    batch = config.micro_batch_size * config.gradient_accumulation_steps * dims.replicas
    return Inputs(
        train=train,
        evaluation=evaluation,
        sequence_tokens=sequence_tokens,
        plan=plan,
        rows_per_epoch=plan.rows_in(1),
        dims=dims,
        global_batch_rows=batch,
        weights_fingerprint=(
            RANDOM if config.weights == "random" else weights_fingerprint(directory)
        ),
        model_config_fingerprint=model_config_fingerprint(model),
        sides=SIDES if config.objective.of_pairs else 1,
        data_fingerprint=fingerprint([manifest.identity() for manifest in train]),
    )


def check_model_files(
    config: TrainConfig, directory: Path, model: Mapping[str, Any]
) -> dict[str, Any]:
    """Check a model's config.json, and return what it says of the language model."""
    check_family(config.model, model)
    if config.vision is not None:
        check_vision(config, directory, model)
    check_readable(config.model, model)
    text = text_settings(model)
    text = {**text, **override_positions(config, text)}
    check_model(config, text)
    return text


def check_datasets(
    config: TrainConfig, directory: Path, text: dict[str, Any]
) -> tuple[list[Manifest], list[Manifest]]:
    """Check shard directories, and return the manifests of those to train and to evaluate on."""
    train, evaluation = (
        [manifest_of(dataset.path, config.loader) for dataset in datasets]
        for datasets in (config.datasets, config.evaluation_datasets)
    )
    paths = [d.path for d in config.datasets] + [d.path for d in config.evaluation_datasets]
    for path, manifest in zip(paths, train + evaluation, strict=True):
        tokens = config.model_overrides.new_tokens
        check_kind(path, manifest, config.objective)
        check_teacher(config, path, manifest, text)
        check_shards(path, manifest, directory, text, config.weights == "random", tokens)
        check_pictures(config, path, manifest, directory)
    if config.rejected_sampling is not None:
        stop_tokens(config.rejected_sampling, directory, train)
    return train, evaluation


def check_evaluation_rows(config: TrainConfig, manifests: Sequence[Manifest]) -> None:
    """Check that the datasets to evaluate on have rows for it."""
    for dataset, manifest in zip(config.evaluation_datasets, manifests, strict=True):
        if not any(shard.rows for shard in manifest.split(EVALUATION)):
            raise DataError(
                f"{dataset.path}: no evaluation rows; prepare with a larger evaluation_fraction, "
                "or leave it out of evaluation_datasets"
            )


def override_positions(config: TrainConfig, model: Mapping[str, object]) -> dict[str, object]:
    """Return how many positions the model has by the config, if it says so."""
    key, scaling = "max_position_embeddings", config.model_overrides.rope_scaling
    given, own = config.model_overrides.max_position_embeddings, model.get(key)
    if scaling is not None and scaling.factor is not None and isinstance(own, int):
        original = scaling.original_max_position_embeddings or own
        return {key: max(given or own, int(scaling.factor * original))}
    return {} if given is None else {key: given}


def check_optimizer(config: TrainConfig) -> None:
    """Check that the optimizer's library is installed."""
    record = config.optimizer.record
    if record.requirement and find_spec(record.library) is None:
        raise ConfigError(
            f'optimizer.type = "{config.optimizer.type}" needs {record.library}; '
            f"run: pip install '{record.requirement}'"
        )


def check_reporting(config: TrainConfig) -> None:
    """Check that the libraries of the services that get the curves are installed."""
    for name in config.reporting.to:
        if find_spec(name) is None:
            raise ConfigError(
                f"reporting.to names {name}; run: pip install '{REPORTING_LIBRARIES[name]}'"
            )


def find_place_tokens(config: TrainConfig, manifests: list[Manifest]) -> int:
    """Tokens of a place. Unpacked rows have a place each, so all datasets must agree on it."""
    lengths = {manifest.sequence_len for manifest in manifests}
    longest = max(lengths)
    if config.loader.pack == "none":
        if len(lengths) > 1:
            raise DataError(
                f"datasets differ in sequence_len ({', '.join(map(str, sorted(lengths)))}); "
                'prepare them with the same one, or pack rows: loader.pack = "best_fit"'
            )
        return longest
    tokens = config.loader.tokens_per_row or longest
    if longest > tokens and config.loader.overlong == "error":
        raise ConfigError(
            f"loader.tokens_per_row = {tokens}, but rows may have up to {longest} tokens; "
            'raise it, or set loader.overlong to "truncate" or "drop"'
        )
    return tokens


def model_config_fingerprint(values: Mapping[str, object]) -> str:
    """Return the identity of a config.json, whatever its layout and whoever wrote it."""
    return fingerprint({key: value for key, value in values.items() if key not in NOT_OF_MODEL})


def check_model(config: TrainConfig, model: Mapping[str, object]) -> None:
    """There must be a layer for each stage, or chunk of one."""
    layers = next((model[key] for key in LAYER_KEYS if key in model), None)
    if isinstance(layers, int) and config.parts - config.vision_stages > layers:
        chunks = config.parts // config.pipeline_stages
        of_chunks = f" of {chunks} chunks" if chunks > 1 else ""
        raise ConfigError(
            f"pipeline_stages = {config.pipeline_stages}{of_chunks}, but {config.model} has "
            f"{layers} layers; use at most {layers // chunks + config.vision_stages}"
        )


def check_sequence(config: TrainConfig, model: Mapping[str, object], tokens: int) -> None:
    """Rows and attention heads must be divisible among the ranks that share them.

    Args:
        tokens: of a row.
    """
    ranks, heads = config.sequence_parallel, model.get("num_attention_heads")
    check_divides("sequence_slices", config.sequence_slices, tokens)
    check_divides("sequence_parallel", ranks, tokens)
    both = ranks * config.sequence_slices
    check_divides("sequence_parallel * sequence_slices", both, tokens)
    if isinstance(heads, int) and heads % ranks:
        raise ConfigError(
            f"sequence_parallel = {ranks} does not divide the {heads} attention heads of "
            f"{config.model}; use a divisor of them"
        )


def check_divides(key: str, parts: int, tokens: int) -> None:
    """Refuse rows that cannot be cut into so many equal parts.

    Raises:
        ConfigError: with the lengths that can.
    """
    if tokens % parts:
        raise ConfigError(
            f"{key} = {parts} does not divide rows of {tokens} tokens; set "
            f'loader.pack = "best_fit" and loader.tokens_per_row = {tokens + -tokens % parts}, '
            "or prepare with another sequence_len"
        )


def check_tensor(config: TrainConfig, model: Mapping[str, object]) -> None:
    """Attention heads, key heads and the vocabulary must be divisible among ranks that share them.

    Raises:
        ConfigError: naming what is not.
    """
    ranks = config.tensor_parallel
    for key, what in DIVIDED.items():
        count = model.get(key)
        if isinstance(count, int) and count % ranks:
            raise ConfigError(
                f"tensor_parallel = {ranks} does not divide the {count} {what} of {config.model}; "
                "use a divisor of them, or more pipeline_stages"
            )


def check_shards(
    path: str,
    manifest: Manifest,
    model: Path,
    model_config: Mapping[str, object],
    random: bool,
    tokens: Sequence[str] = (),
) -> None:
    """Shards must come from the model's tokenizer and fit its positions and vocabulary.

    Args:
        random: the weights are made up, so that a tokenizer may be missing.
        tokens: that the model's tokenizer and its embedding get.
    """
    tokenizer = model / "tokenizer.json"
    if not tokenizer.is_file() and not random:
        raise ConfigError(
            f"{tokenizer}: not found; the model directory must hold the tokenizer of the shards"
        )
    if tokenizer.is_file() and not is_tokenizer(manifest.tokenizer, tokenizer, tokens):
        tokens_too = f" and added_tokens = {list(tokens)}" if tokens else ""
        raise DataError(
            f"{path}: made with another tokenizer than {tokenizer}; "
            f"prepare the shards with this model's{tokens_too}"
        )
    vocabulary = model_config.get("vocab_size")
    grows = bool(tokens)  # the tokenizer's ids are then those of the embedding
    if (
        isinstance(vocabulary, int)
        and manifest.tokenizer.vocabulary_size > vocabulary
        and not grows
    ):
        raise DataError(
            f"{path}: ids up to {manifest.tokenizer.vocabulary_size - 1}, "
            f"but the model has {vocabulary} embeddings"
        )
    check_positions(path, manifest.sequence_len, model_config)


def check_vision(config: TrainConfig, directory: Path, model: Mapping[str, object]) -> None:
    """Check that a model is of a known vision family, with its processor's files.

    Raises:
        ConfigError: it is not, or numbers of its processor cannot be followed.
    """
    tower = model.get("vision_config")
    kind = tower.get("model_type") if isinstance(tower, Mapping) else None
    vision_family(config.model, str(model.get("model_type")), kind)
    read_processor(directory)


def check_pictures(config: TrainConfig, path: str, manifest: Manifest, directory: Path) -> None:
    """Refuse pictures that the model would not see, or see otherwise than they were prepared.

    Raises:
        DataError: saying what to do.
    """
    if manifest.images is None:
        return
    if config.vision is None:
        raise DataError(
            f"{path}: its rows hold pictures ({manifest.images.family}); add the table [vision] to "
            "train on them"
        )
    for problem in differing(manifest.images, read_processor(directory)):
        raise DataError(
            f"{path}: its pictures were prepared with {problem}; prepare them with this model"
        )


def check_teacher(
    config: TrainConfig, path: str, manifest: Manifest, model: Mapping[str, object]
) -> None:
    """Check that a teacher, if there is one, reads the shards' ids as the model does.

    Raises:
        ConfigError: naming what differs.
    """
    if config.objective.teacher is None:
        return
    directory = model_directory(config.objective.teacher, "stored")
    teacher = text_settings(read_model_config(directory))
    sizes = [settings.get("vocab_size") for settings in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"objective.teacher: {directory} has a vocabulary of {sizes[1]}, {config.model} of "
            f"{sizes[0]}; the distributions of a token must be over the same ids"
        )
    tokens = config.model_overrides.new_tokens
    if tokens:
        raise ConfigError(f"model_overrides.new_tokens = {list(tokens)}: the teacher has none")
    tokenizer = directory / "tokenizer.json"
    if tokenizer.is_file() and not is_tokenizer(manifest.tokenizer, tokenizer, ()):
        raise ConfigError(f"{path}: made with another tokenizer than the teacher's, {tokenizer}")
    layers = teacher.get("num_hidden_layers")
    if isinstance(layers, int) and layers < config.parts:
        raise ConfigError(
            f"objective.teacher: {directory} has {layers} layers for {config.parts} stages; use at "
            f"most pipeline_stages = {layers}"
        )


def check_kind(path: str, manifest: Manifest, objective: ObjectiveConfig) -> None:
    """Check that rows have the columns of the objective; of pairs all may train chosen answers.

    Raises:
        DataError: they have not, or hold answers that are not to be learned.
    """
    columns, kind = objective.record.columns, manifest.kind
    if columns == "pairs" and kind != "preference":
        raise DataError(
            f"{path}: holds no pairs, which the objective compares; prepare it with "
            '`type = "preference"`, or use another objective.kind'
        )
    if columns == "unpaired" and kind != "unpaired":
        raise DataError(
            f"{path}: holds no answers with labels, which the objective needs; prepare it with "
            '`type = "unpaired"`, or use another objective.kind'
        )
    if columns == "rows" and kind == "unpaired":
        raise DataError(
            f"{path}: holds good and bad answers, and objective.kind = "
            f'"{objective.kind}" would learn both; set kind = {kinds_of("unpaired")}, or prepare '
            "the good ones alone"
        )


def check_weight_shard(config: TrainConfig, dims: ParallelDims) -> None:
    """Check that several processes would hold the weights that are to be shared out.

    Raises:
        ConfigError: each weight is at one process alone.
    """
    if config.weight_shard != "none" and dims.replicas * dims.sequence == 1:
        raise ConfigError(
            f'weight_shard = "{config.weight_shard}" shares weights out among processes that would '
            f"hold the same ones, and of {dims.world} none does; start more, for replicas, or drop "
            "it"
        )


def check_positions(path: str, length: int, model_config: Mapping[str, object]) -> None:
    """Check rows against the positions that a model was trained on.

    Rotary positions go on beyond them, if not well; learned ones do not.

    Raises:
        DataError: there is no position for a row's last tokens.
    """
    positions = model_config.get("max_position_embeddings")
    if not isinstance(positions, int) or length <= positions:
        return
    seen = f"{path}: sequence_len {length} is above the model's max_position_embeddings {positions}"
    family = FAMILIES.get(str(model_config.get("model_type")))
    known = family is not None and family.rotary is not None
    if not known and not any(key in model_config for key in ROTARY_KEYS):
        raise DataError(f"{seen}; prepare shorter rows")
    logger.info(
        "warning: %s; the model has not seen such positions. For long context set "
        'model_overrides.rope_scaling (as { rope_type = "yarn", factor = 4.0 }), or prepare '
        "shorter rows",
        seen,
    )
