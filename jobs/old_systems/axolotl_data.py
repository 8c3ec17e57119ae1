"""Axolotl's keys of data: `prepare` reads them of the YAML file itself."""

from headrace.jobs.old_systems.axolotl_values import new_tokens
from headrace.jobs.old_systems.equivalents import computed, elsewhere, none
from headrace.schemas.prepare.axolotl_yaml import FOR_EVERY_ENTRY

READ = "read from the YAML file itself: `type` axolotl, `path` the file"
DATA_KEYS = ("datasets", "test_datasets", "pretraining_dataset", *FOR_EVERY_ENTRY)

ENTRY_KEYS = (
    "path",
    "name",
    "split",
    "train_on_split",
    "ds_type",
    "data_files",
    "revision",
    "trust_remote_code",
    "shards",
    "shards_idx",
    "preprocess_shards",
    "weight",
    "type",
    "field",
    "text_column",
    "conversation",
    "field_messages",
    "message_property_mappings",
    "message_field_role",
    "message_field_content",
    "message_field_training",
    "message_field_training_detail",
    "roles",
    "roles_to_train",
    "train_on_eos",
    "train_on_eot",
    "chat_template",
    "chat_template_jinja",
    "drop_system_message",
    "split_thinking",
    "field_thinking",
    "template_thinking_key",
    "field_tools",
    "field_chosen",
    "field_rejected",
)
CUSTOM_TYPE_KEYS = (
    "system_prompt",
    "system_format",
    "field_system",
    "field_instruction",
    "field_input",
    "field_output",
    "format",
    "no_input_format",
    "field_prompt",
    "field_chosen",
    "field_rejected",
    "field_completion",
    "field_label",
    "prompt_format",
    "completion_format",
    "chosen_format",
    "rejected_format",
)
STEPWISE_KEYS = ("step_separator", "max_completion_length", "train_on_last_step_only")

AXOLOTL_DATA = (
    *(elsewhere(key, "prepare.sources.axolotl", READ) for key in DATA_KEYS),
    *(elsewhere(f"datasets[].{key}", "prepare.sources.axolotl", READ) for key in ENTRY_KEYS),
    *(
        elsewhere(f"datasets[].type.{key}", "prepare.sources.axolotl.type", READ)
        for key in CUSTOM_TYPE_KEYS
    ),
    *(none(f"datasets[].{key}", "rewards of steps are not trained") for key in STEPWISE_KEYS),
    none("added_tokens_overrides", "rename the tokens in tokenizer.json itself"),
    elsewhere("sequence_len", "prepare.sequence_len", READ),
    elsewhere("sample_packing", "prepare.packing", READ),
    elsewhere("excess_length_strategy", "prepare.overlong", READ),
    elsewhere("val_set_size", "prepare.evaluation_fraction", READ),
    elsewhere("special_tokens", "prepare.special_tokens", READ),
    computed(
        "tokens",
        ("prepare.added_tokens", "train.model_overrides.new_tokens"),
        new_tokens,
        f"the first is {READ}; their rows are trained",
    ),
    elsewhere("dataset_exact_deduplication", "prepare.deduplicate.exact", READ),
    elsewhere("dataset_prepared_path", "prepare.output"),
    elsewhere("dataset_processes", "headrace prepare --workers"),
    elsewhere("dataset_num_proc", "headrace prepare --workers"),
)
