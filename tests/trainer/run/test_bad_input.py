"""Each mistake, and the one line that it gives before a process group or a GPU is touched."""

import json
import re
import shutil
import sys

import pytest
from runs import complete, make_shards

from headrace.schemas.errors import DataError, HeadraceError
from headrace.schemas.shards.manifest_file import read_manifest, write_manifest
from headrace.schemas.toml_config import load_config
from headrace.schemas.train.run_state import RUN_CONFIG_NAME
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.architecture.families import supported_families
from headrace.trainer.checkpoint.resume_record import check_run_directory, resume_record
from headrace.trainer.preflight import check, check_positions, override_positions
from headrace.trainer.stored.settings import READ

FAMILIES = supported_families()


@pytest.fixture
def world(tiny_model, tiny_shards, tmp_path):
    """Copies that a case may damage."""
    return {
        "model": shutil.copytree(tiny_model, tmp_path / "model"),
        "shards": shutil.copytree(tiny_shards, tmp_path / "shards"),
        "path": tmp_path,
    }


def message_of(world, *sets, processes=1, resume=False):
    """The error of starting a run, with the temporary folder cut out."""
    config = world["path"] / "train.toml"
    config.write_text(
        f"""
        model = "{world["model"]}"
        output_dir = "{world["path"]}/run"
        [[datasets]]
        path = "{world["shards"]}"
        [[evaluation_datasets]]
        path = "{world["shards"]}"
        [optimizer]
        lr = 1e-3
        """
    )
    with pytest.raises(HeadraceError) as caught:
        settings = load_config(TrainConfig, config, sets)
        inputs = check(settings, processes)
        check_run_directory(settings, inputs, resume)
    text = str(caught.value)
    assert "\n" not in text
    return re.sub(re.escape(str(world["path"])), "DIR", text)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_manifest(directory, **changes):
    write_manifest(directory, read_manifest(directory).model_copy(update=changes))


def no_model(world):
    shutil.rmtree(world["model"])


def no_config(world):
    (world["model"] / "config.json").unlink()


def broken_config(world):
    (world["model"] / "config.json").write_text("{")


def other_family(world):
    edit_json(world["model"] / "config.json", model_type="t5", is_encoder_decoder=True)


def few_positions(world):
    edit_json(world["model"] / "config.json", model_type="gpt2", n_positions=8)


def quantized(world):
    edit_json(world["model"] / "config.json", quantization_config={"quant_method": "aqlm"})


def no_weights(world):
    (world["model"] / "model.safetensors").unlink()


def half_a_file(world):
    with (world["model"] / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)


def no_tokenizer(world):
    (world["model"] / "tokenizer.json").unlink()


def other_tokenizer(world):
    edit_json(world["model"] / "tokenizer.json", normalizer={"type": "NFC"})


def small_vocabulary(world):
    edit_json(world["model"] / "config.json", vocab_size=100)


def no_manifest(world):
    (world["shards"] / "manifest.json").unlink()


def edited_manifest(world):
    path = world["shards"] / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


def newer_manifest(world):
    edit_json(world["shards"] / "manifest.json", format_version=2)


def not_a_manifest(world):
    (world["shards"] / "manifest.json").write_text("[]")


def torn_manifest(world):
    path = world["shards"] / "manifest.json"
    path.write_text("{")


def no_train_rows(world):
    manifest = read_manifest(world["shards"])
    edit_manifest(world["shards"], shards=manifest.split("evaluation"))


def no_evaluation_rows(world):
    manifest = read_manifest(world["shards"])
    edit_manifest(world["shards"], shards=manifest.split("train"))


def run_is_there(world):
    (world["path"] / "run").mkdir()
    (world["path"] / "run" / "train.json").write_text("{}")


CASES = [
    (no_model, "DIR/model: no such directory; set `model` to a Hugging Face model directory"),
    (no_config, "DIR/model/config.json: not found; `model` must be a Hugging Face model directory"),
    (
        broken_config,
        "DIR/model/config.json: not valid JSON (Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1))",
    ),
    (
        other_family,
        f'DIR/model: model_type "t5" is not supported: it has an encoder; supported: {FAMILIES}',
    ),
    (
        few_positions,
        "DIR/model: documents may have 64 tokens, but n_positions = 8 in config.json (positions "
        "that it has); prepare shorter rows",
    ),
    (
        quantized,
        "DIR/model: its weights are quantized already, by aqlm, which is not read; "
        f"use the model that it was made of (read are {', '.join(READ)})",
    ),
    (
        no_weights,
        "DIR/model: no model.safetensors and no model.safetensors.index.json; is this a model "
        "directory?",
    ),
    (
        half_a_file,
        "DIR/model/model.safetensors: cannot be read (100000 bytes, its header calls for 285776); "
        "fetch the model again",
    ),
    (
        no_tokenizer,
        "DIR/model/tokenizer.json: not found; the model directory must hold the tokenizer of the "
        "shards",
    ),
    (
        other_tokenizer,
        "DIR/shards: made with another tokenizer than DIR/model/tokenizer.json; prepare the shards "
        "with this model's",
    ),
    (small_vocabulary, "DIR/shards: ids up to 383, but the model has 100 embeddings"),
    (
        no_manifest,
        "DIR/shards/manifest.json: not found; run `headrace prepare` to the end, or correct the "
        "path",
    ),
    (
        edited_manifest,
        "DIR/shards/manifest.json: edited or damaged (its checksum differs); prepare the directory "
        "again",
    ),
    (
        newer_manifest,
        "DIR/shards/manifest.json: format version 2, this release reads 1",
    ),
    (
        not_a_manifest,
        'DIR/shards/manifest.json: not a shard manifest (no "format": "headrace-shards")',
    ),
    (
        torn_manifest,
        "DIR/shards/manifest.json: not valid JSON (Expecting property name enclosed in double "
        "quotes: line 1 column 2 (char 1)); prepare the directory again",
    ),
    (no_train_rows, "DIR/shards: the train split has no rows; prepare more text"),
    (
        no_evaluation_rows,
        "DIR/shards: no evaluation rows; prepare with a larger evaluation_fraction, or leave it "
        "out of evaluation_datasets",
    ),
    (
        run_is_there,
        "DIR/run: holds a run already; add --resume to continue it, or choose another output_dir",
    ),
]


@pytest.mark.parametrize(
    ("damage", "message"), CASES, ids=lambda case: getattr(case, "__name__", "")
)
def test_what_is_wrong_on_disk_is_named_with_its_remedy(world, damage, message):
    damage(world)
    assert message_of(world) == message


@pytest.mark.parametrize(
    ("sets", "processes", "message"),
    [
        (
            ["pipeline_stages=2"],
            3,
            "pipeline_stages = 2 does not divide the 3 processes; launch a multiple of 2",
        ),
        (
            ["pipeline_stages=9"],
            9,
            "pipeline_stages = 9, but DIR/model has 5 layers; use at most 5",
        ),
        (
            ["pipeline_stages=3", "schedule=interleaved", "gradient_accumulation_steps=3"],
            3,
            "pipeline_stages = 3 of 2 chunks, but DIR/model has 5 layers; use at most 2",
        ),
        (
            ["pipeline_stages=2", "schedule=interleaved", "gradient_accumulation_steps=3"],
            2,
            'DIR/train.toml: schedule = "interleaved": gradient_accumulation_steps = 3 is not a '
            "multiple of pipeline_stages = 2; use 4",
        ),
        (
            [
                *("pipeline_stages=2", "schedule=interleaved", "gradient_accumulation_steps=2"),
                *("objective.kind=dpo", "rejected_sampling={}"),
            ],
            2,
            'DIR/train.toml: schedule = "interleaved" does not go with [rejected_sampling], whose '
            'answers go once through each stage; set "1f1b"',
        ),
        (
            ["schedule=interleaved"],
            1,
            'DIR/train.toml: schedule = "interleaved" needs pipeline_stages = 2 or more; a single '
            "stage waits for nobody",
        ),
        (
            ["stage_chunks=3"],
            1,
            'DIR/train.toml: stage_chunks = 3 has no meaning with schedule = "1f1b"; set '
            'schedule = "interleaved" or drop it',
        ),
        (
            [
                *("pipeline_stages=2", "schedule=interleaved", "gradient_accumulation_steps=2"),
                "partition=[3, 2]",
            ],
            2,
            "DIR/train.toml: partition has 2 entries, but there are 4 chunks, 2 of each of 2 "
            "stages",
        ),
        (
            ["epochs=1", "max_steps=5"],
            1,
            "DIR/train.toml: epochs = 1 and max_steps = 5 exclude each other; keep one",
        ),
        (
            ["scheduler.min_lr=1.0"],
            1,
            "DIR/train.toml: scheduler.min_lr = 1.0 is above optimizer.lr = 0.001; lower it",
        ),
        (
            ["mixing_stop=all_exhausted"],
            1,
            'DIR/train.toml: mixing_stop = "all_exhausted" has no meaning with mixing = '
            '"concatenate"; set mixing = "interleave" or drop it',
        ),
        (
            ["mixing_unit=tokens"],
            1,
            'DIR/train.toml: mixing_unit = "tokens" has no meaning with mixing = "concatenate"; '
            'set mixing = "interleave" or drop it',
        ),
        (
            ["datasets.0.max_tokens=9"],
            1,
            "datasets.0.max_tokens = 9 is less than one row of DIR/shards, about 64 "
            "tokens; raise it",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_named(world, sets, processes, message):
    assert message_of(world, *sets, processes=processes) == message


def test_a_tokenizer_in_other_bytes_is_the_same_one(world):
    path = world["model"] / "tokenizer.json"
    values = dict(reversed(json.loads(path.read_text()).items()))
    values["model"]["merges"] = [" ".join(pair) for pair in values["model"]["merges"]]
    path.write_text(json.dumps(values | {"padding": None}, indent=7))
    no_train_rows(world)  # what is looked at later
    assert message_of(world) == "DIR/shards: the train split has no rows; prepare more text"

    manifest = read_manifest(world["shards"])
    earlier = manifest.tokenizer.model_copy(update={"content_fingerprint": None})
    write_manifest(world["shards"], manifest.model_copy(update={"tokenizer": earlier}))
    assert "made with another tokenizer" in message_of(world)


def test_datasets_of_different_row_lengths_do_not_mix(world, tiny_model):
    other = make_shards(tiny_model, world["path"] / "other", sequence_len=128)
    sets = [f'datasets=[{{path="{world["shards"]}"}}, {{path="{other}"}}]']
    expected = (
        "datasets differ in sequence_len (64, 128); prepare them with the same one, or pack rows: "
        'loader.pack = "best_fit"'
    )
    assert message_of(world, *sets) == expected


@pytest.mark.parametrize(
    ("first", "second", "sets", "message"),
    [
        (
            "weight=2",
            "weight=0.5",
            [],
            "DIR/train.toml: the weights of the datasets differ (2.0, 0.5), but mixing = "
            '"concatenate" takes all rows; set mixing = "interleave" or drop them',
        ),
        (
            "weight=1",
            "weight=1e-6",
            ["mixing=interleave"],
            "datasets.1.weight = 1e-06 asks for less than one row in 65,536; raise it",
        ),
        (
            "weight=1",
            "weight=0",
            ["mixing=interleave"],
            "--set datasets=[...]: datasets.1.weight = 0: must be greater than 0",
        ),
    ],
)
def test_weights_that_cannot_be_had_are_named(world, first, second, sets, message):
    path = f'path="{world["shards"]}"'
    datasets = f"datasets=[{{{path}, {first}}}, {{{path}, {second}}}]"
    assert (
        message_of(world, datasets, *sets).replace(
            datasets.replace(str(world["path"]), "DIR"), "datasets=[...]"
        )
        == message
    )


def test_an_empty_dataset_cannot_be_interleaved(world, tiny_shards):
    no_train_rows(world)
    sets = [f'datasets=[{{path="{tiny_shards}"}}, {{path="{world["shards"]}"}}]']
    message = "DIR/shards: the train split has no rows; prepare more text"
    assert message_of(world, *sets, "mixing=interleave") == message


def test_resuming_without_a_run_does_not_start_one(world):
    assert message_of(world, resume=True) == (
        "DIR/run/train.json: not found, so there is no run to resume; leave --resume out to start "
        "one"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.lr=2e-3", "optimizer.lr was 0.001 and is 0.002"),
        ("seed=1", "seed was 0 and is 1"),
        ("adapter.rank=3", "adapter.rank was 16 and is 3"),
        ("loader.pack=best_fit", "loader.pack was 'none' and is 'best_fit'"),
    ],
)
def test_resuming_with_another_meaning_names_the_setting(world, change, message):
    (world["path"] / "run").mkdir()
    assert message_of(world, "pipeline_stages=2")  # writes the config
    write_record(world)
    assert message_of(world, change, resume=True) == (
        f"DIR/run/train.json: {message}; resume with the old value, or start a new run in another "
        "output_dir"
    )


def write_record(world):
    settings = load_config(TrainConfig, world["path"] / "train.toml", [])
    record = resume_record(settings, check(settings, 1))
    (world["path"] / "run" / RUN_CONFIG_NAME).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mixing=interleave", "mixing was 'concatenate' and is 'interleave'"),
        ("datasets.0.weight=2", "datasets.0.weight was 1.0 and is 2.0"),
        ("datasets.0.repeats=2", "datasets.0.repeats was 1 and is 2"),
        ("datasets.0.max_tokens=999", "datasets.0.max_tokens was None and is 999"),
    ],
)
def test_resuming_with_other_data_says_how_to_go_on_with_it(world, change, message):
    (world["path"] / "run").mkdir()
    config = world["path"] / "train.toml"
    assert message_of(world, "pipeline_stages=2")  # writes the config
    write_record(world)
    assert message_of(world, change, resume=True) == (
        f"DIR/run/train.json: {message}; resume with the old value, add --data-changed=continue to "
        "go on with other data, or start a new run in another output_dir"
    )
    settings = load_config(TrainConfig, config, [change])
    check_run_directory(settings, check(settings, 1), resume=True, data_may_change=True)


def test_resuming_with_another_global_batch_is_allowed(world):
    (world["path"] / "run").mkdir()
    config = world["path"] / "train.toml"
    assert message_of(world, "pipeline_stages=2")  # writes the config
    write_record(world)
    settings = load_config(TrainConfig, config, ["gradient_accumulation_steps=3"])
    check_run_directory(settings, check(settings, 1), resume=True)


def test_resuming_on_other_weights_is_refused(world):
    (world["path"] / "run").mkdir()
    assert message_of(world, "pipeline_stages=2")  # writes the config
    settings = load_config(TrainConfig, world["path"] / "train.toml", [])
    record = resume_record(settings, check(settings, 1))
    (world["path"] / "run" / RUN_CONFIG_NAME).write_text(json.dumps(record))
    with (world["model"] / "model.safetensors").open("r+b") as file:
        file.seek(-2000, 2)
        file.write(bytes(2000))
    assert re.fullmatch(
        "DIR/run/train.json: fingerprint of the model's weights was '[0-9a-f]+' and is "
        "'[0-9a-f]+'; resume with the old value, or start a new run in another output_dir",
        message_of(world, resume=True),
    )


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1.0}, {"num_hidden_layers": 4}])
def test_resuming_on_another_config_of_the_model_is_refused(world, change):
    (world["path"] / "run").mkdir()
    assert message_of(world, "pipeline_stages=2")  # writes the config
    write_record(world)
    edit_json(world["model"] / "config.json", **change)
    assert message_of(world, resume=True).startswith(
        "DIR/run/train.json: fingerprint of the model's config.json was "
    )


def test_rows_beyond_the_positions_of_a_rotary_model_are_trained_on_with_a_warning(world, caplog):
    assert message_of(world, "pipeline_stages=2")  # writes the config
    edit_json(world["model"] / "config.json", max_position_embeddings=32)
    settings = load_config(TrainConfig, world["path"] / "train.toml", [])
    with caplog.at_level("INFO", "headrace"):
        check(settings, 1)
    assert "sequence_len 64 is above the model's max_position_embeddings 32" in caplog.text
    assert 'rope_type = "yarn"' in caplog.text


def test_rows_beyond_positions_that_are_looked_up_are_refused():
    few = {"model_type": "gptj", "rotary_dim": 4, "max_position_embeddings": 32}
    check_positions("shards", 32, few)
    with pytest.raises(DataError, match=r"shards: sequence_len 33 is above .* 32; prepare shorter"):
        check_positions("shards", 33, few)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "pytorch_model.bin",
            'is a pickle, which is read only with weights = "pickled"',
        ),
        ("model-00001-of-00002.safetensors", "fetch model.safetensors.index.json as well"),
    ],
)
def test_weights_in_another_form_are_named_with_the_way_to_convert_them(world, file, message):
    (world["model"] / "model.safetensors").rename(world["model"] / file)
    assert message in message_of(world)


def test_a_model_that_has_moved_is_known_by_its_files(world):
    (world["path"] / "run").mkdir()
    assert message_of(world, "pipeline_stages=2")  # writes the config
    write_record(world)
    moved = world["model"].rename(world["path"] / "moved")
    edit_json(moved / "config.json", transformers_version="4.0", use_cache=False)
    settings = load_config(TrainConfig, world["path"] / "train.toml", [f"model={moved}"])
    check_run_directory(settings, check(settings, 1), resume=True)
    edit_json(moved / "config.json", rms_norm_eps=1.0)
    assert message_of(world, f"model={moved}", resume=True).startswith(
        "DIR/run/train.json: model was 'DIR/model' and is 'DIR/moved'; "
    )


@pytest.mark.parametrize("content", [b"", b'{"seed": 0', b"[]", b"\xff\xfe", b"null"])
def test_a_damaged_record_of_a_run_is_named_with_its_remedy(world, content):
    (world["path"] / "run").mkdir()
    (world["path"] / "run" / RUN_CONFIG_NAME).write_bytes(content)
    assert re.fullmatch(
        r"DIR/run/train.json: cannot be read \(.*\); restore it from a copy, or start a new run in "
        "another output_dir",
        message_of(world, resume=True),
    )


def test_a_model_that_is_neither_here_nor_on_the_hub_is_named(world, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = message_of(world, "model=nobody/no-such-model")
    assert message.startswith(
        "nobody/no-such-model: no such directory, and it cannot be fetched from the hub ("
    )


def test_a_run_of_a_release_without_a_setting_goes_on_with_its_default(world):
    (world["path"] / "run").mkdir()
    assert message_of(world, "pipeline_stages=2")  # writes the config
    settings = load_config(TrainConfig, world["path"] / "train.toml", [])
    inputs = check(settings, 1)
    record = resume_record(settings, inputs)
    old = {key: value for key, value in record.items() if "mixing" not in key}
    old = {key: value for key, value in old.items() if not key.startswith(("datasets", "finger"))}
    old["fingerprint of the data"] = record["fingerprint of the data"]
    old["datasets"] = [{"path": str(world["shards"])}]
    (world["path"] / "run" / RUN_CONFIG_NAME).write_text(json.dumps(old))
    check_run_directory(settings, inputs, resume=True)
    assert message_of(world, "mixing=interleave", resume=True).startswith(
        "DIR/run/train.json: mixing was None and is 'interleave'; "
    )


def run_command(world, *arguments):
    command = [sys.executable, "-m", "headrace.jobs.cli", "train", *arguments]
    return complete(command)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda model: (model / "model.safetensors").unlink(),
            "error: DIR/model: no model.safetensors and no model.safetensors.index.json; is this a "
            "model directory?",
        ),
        (
            lambda model: (model / "model.safetensors").write_bytes(b"\x10" * 200),
            "error: DIR/model/model.safetensors: cannot be read (",
        ),
        (
            lambda model: edit_json(model / "config.json", intermediate_size=96),
            "error: DIR/model/model.safetensors: model.layers.0.mlp.gate_proj.weight has shape "
            "[88, 32], config.json says [96, 32]",
        ),
    ],
    ids=["no weights", "broken weights", "other shape"],
)
def test_bad_weights_end_the_command_with_one_line(world, damage, message):
    assert message_of(world, "pipeline_stages=9")  # writes the config
    damage(world["model"])
    done = run_command(world, str(world["path"] / "train.toml"), "--gpus", "1")
    assert done.returncode == 1
    lines = done.stderr.replace(str(world["path"]), "DIR").splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(message)


@pytest.mark.slow
@pytest.mark.parametrize("names", [["no_such_layer"]])
def test_target_modules_that_cannot_be_adapted_are_named(world, names):
    assert message_of(world, "pipeline_stages=9")  # writes the config
    arguments = ["--gpus", "1", "--set", f"adapter.target_modules={json.dumps(names)}"]
    done = run_command(world, str(world["path"] / "train.toml"), *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: adapter.target_modules")
    assert names[0] in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "positions"),
    [
        ({}, None),
        ({"max_position_embeddings": 48}, 48),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 64),
        (
            {
                "max_position_embeddings": 48,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            },
            64,
        ),
    ],
)
def test_rows_may_be_as_long_as_the_positions_that_the_config_gives(overrides, positions):
    config = TrainConfig.model_validate(
        {
            "model": "model",
            "output_dir": "run",
            "model_overrides": overrides,
            "optimizer": {"lr": 1.0},
            "datasets": [{"path": "shards"}],
        }
    )
    found = override_positions(config, {"max_position_embeddings": 32})
    assert found.get("max_position_embeddings") == positions
