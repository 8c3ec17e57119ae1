"""Arguments of the calls that scripts for TRL and Unsloth (2026.10) make beside the trainer's.

`LoraConfig(r=8)` is the key `LoraConfig.r`; both of Unsloth's `from_pretrained` are
`FastLanguageModel`, and any other is `from_pretrained`.
"""

from headrace.jobs.old_systems.axolotl_unused import ATTENTION, MEMORY
from headrace.jobs.old_systems.equivalents import (
    Equivalent,
    choice,
    computed,
    elsewhere,
    none,
    refused,
    same,
)
from headrace.jobs.old_systems.quantized import BACKEND, INT8, TYPE, int8
from headrace.jobs.trainer_arguments.adapter_arguments import (
    DOUBLE,
    FOUR_BITS,
    STORAGE,
    call_adapter_rows,
    dtype,
    four_bits,
    quantization_rows,
)
from headrace.jobs.trainer_arguments.transformers_trainer import recomputed

RECOMPUTED = ("train.activation_checkpointing", "train.activation_offload")
NO_CODE = "no code of a model directory is run"
TOKEN = "set HF_TOKEN in the environment"
REVISION = "download it, and give its directory"


def full(value: bool, _: object) -> dict[str, object]:
    return {"train.adapter.kind": "none"} if value else {}


CALL_ROWS: tuple[Equivalent, ...] = (
    elsewhere("load_dataset.path", "prepare.sources.path"),
    elsewhere("load_dataset.name", "prepare.sources.path"),
    elsewhere("load_dataset.data_files", "prepare.sources.path"),
    elsewhere("load_dataset.split", "prepare.sources.path"),
    none("load_dataset.streaming", "rows are read from shards, none are kept in memory"),
    none("load_dataset.token", TOKEN),
    *call_adapter_rows("LoraConfig"),
    same("LoraConfig.rank_pattern", "train.adapter.rank_pattern"),
    same("LoraConfig.alpha_pattern", "train.adapter.alpha_pattern"),
    same("LoraConfig.exclude_modules", "train.adapter.exclude_modules"),
    same("LoraConfig.trainable_token_indices", "train.adapter.trainable_token_indices"),
    none("LoraConfig.task_type", "language models alone are trained", "CAUSAL_LM"),
    none("LoraConfig.inference_mode", "training is not inference"),
    none("LoraConfig.fan_in_fan_out", "known from the model's own layers"),
    *quantization_rows("BitsAndBytesConfig."),
    elsewhere("BitsAndBytesConfig.bnb_4bit_quant_type", TYPE),
    elsewhere("BitsAndBytesConfig.bnb_4bit_use_double_quant", DOUBLE),
    elsewhere("BitsAndBytesConfig.bnb_4bit_quant_storage", STORAGE),
    none("BitsAndBytesConfig.bnb_4bit_compute_dtype", "the run's `dtype`", "bfloat16"),
    same("from_pretrained.model", "train.model"),
    dtype("from_pretrained.dtype"),
    dtype("from_pretrained.torch_dtype"),
    *quantization_rows("from_pretrained."),
    none("from_pretrained.device_map", MEMORY, "auto"),
    none("from_pretrained.attn_implementation", ATTENTION, "flash_attention_2", "sdpa", "eager"),
    none("from_pretrained.trust_remote_code", NO_CODE),
    none("from_pretrained.use_cache", "answers alone need a cache"),
    none("from_pretrained.low_cpu_mem_usage", MEMORY, True),
    none("from_pretrained.revision", REVISION, "main"),
    none("from_pretrained.token", TOKEN),
    same("FastLanguageModel.model_name", "train.model"),
    same("FastLanguageModel.max_seq_length", "prepare.sequence_len"),
    dtype("FastLanguageModel.dtype"),
    computed("FastLanguageModel.load_in_4bit", FOUR_BITS, four_bits(double=True), "on there"),
    computed("FastLanguageModel.load_in_8bit", INT8, int8),
    none("FastLanguageModel.load_in_16bit", "weights that are not quantized are bfloat16", True),
    choice("FastLanguageModel.load_in_fp8", BACKEND, {True: "fp8", False: None}),
    computed("FastLanguageModel.full_finetuning", "train.adapter.kind", full),
    computed("FastLanguageModel.use_gradient_checkpointing", RECOMPUTED, recomputed),
    refused("FastLanguageModel.rope_scaling", "write `[model_overrides]` into train.toml"),
    refused("FastLanguageModel.qat_scheme", "training for fewer bits is not there"),
    none("FastLanguageModel.token", TOKEN),
    none("FastLanguageModel.device_map", MEMORY),
    none("FastLanguageModel.trust_remote_code", NO_CODE),
    none("FastLanguageModel.fast_inference", "`headrace sample` and `serve` answer"),
    none("FastLanguageModel.gpu_memory_utilization", MEMORY),
    none("FastLanguageModel.max_lora_rank", MEMORY),
    none("FastLanguageModel.random_state", "`seed` decides"),
    none("FastLanguageModel.fix_tokenizer", "the tokenizer is taken as it is", True),
    none("FastLanguageModel.use_exact_model_name", "the name is taken as it is", True),
    none("FastLanguageModel.revision", REVISION),
    none("FastLanguageModel.offload_embedding", "write `embedding_on_cpu = true`"),
    none("FastLanguageModel.unsloth_tiled_mlp", MEMORY),
    none("FastLanguageModel.text_only", "the language model alone is trained", True),
    *call_adapter_rows("get_peft_model"),
    computed("get_peft_model.use_gradient_checkpointing", RECOMPUTED, recomputed),
    same("get_peft_model.random_state", "train.seed"),
    elsewhere("get_peft_model.max_seq_length", "prepare.sequence_len"),
    none("get_peft_model.temporary_location", MEMORY),
    refused("get_peft_model.loftq_config", "LoftQ's start is not among `adapter.init`"),
    refused("get_peft_model.qat_scheme", "training for fewer bits is not there"),
    refused("get_peft_model.finetune_last_n_layers", "write `adapter.layers`"),
    refused(
        "embedding_learning_rate",
        "each weight has one learning rate, but for `optimizer.lora_plus_ratio`",
    ),
)
