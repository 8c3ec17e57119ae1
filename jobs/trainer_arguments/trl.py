"""TRL's arguments (1.16), of YAML files and of the trainers' configs in scripts."""

from typing import Any

from headrace.jobs.old_systems.axolotl_unused import ATTENTION, DIRECTORY, PACKING
from headrace.jobs.old_systems.axolotl_values import offload, targets
from headrace.jobs.old_systems.equivalents import (
    Equivalent,
    NoEquivalentError,
    OldSystem,
    Values,
    choice,
    computed,
    elsewhere,
    none,
    number,
    refused,
    same,
)
from headrace.jobs.old_systems.quantized import TYPE
from headrace.jobs.trainer_arguments.adapter_arguments import (
    DOUBLE,
    STORAGE,
    dtype,
    quantization_rows,
    shared_adapter_rows,
    when,
)
from headrace.jobs.trainer_arguments.transformers_trainer import TRAINING_ROWS
from headrace.jobs.trainer_arguments.trl_calls import CALL_ROWS
from headrace.schemas.errors import ConfigError

LOSSES = ("sigmoid", "hinge", "ipo", "apo_zero")
OBJECTIVE, LOSS, SFT = (f"train.objective.{key}" for key in ("kind", "loss", "sft_weight"))
PACKED = {
    "bfd": ("best_fit", "truncate"),
    "bfd_split": ("best_fit", "split"),
    "bfd-requeue": ("best_fit", "split"),
    "wrapped": ("concatenate", None),
}
PACKING_KEYS = ("prepare.packing", "prepare.overlong")
RATES = {"sft": 2e-5, "dpo": 1e-6, "orpo": 1e-6, "cpo": 1e-6, "kto": 1e-6, "reward": 1e-4}
BY_KEYS = "by the keys"
PAIRS_ONLY = ("beta", "precompute_ref_log_probs", "ld_alpha", "f_divergence_type", "loss_weights")
DATA = "a set of the hub is `hf:NAME:CONFIG:SPLIT`"
PEFTS_CHOICE = (
    "PEFT adapts q_proj and v_proj of most types of models where no modules are named, which is "
    "written; other types have others"
)
QV = ["q_proj", "v_proj"]
# call, or nothing for arguments of `trl` itself -> our key: their name, their default
ADAPTERS: dict[str, dict[str, tuple[str, Any]]] = {
    "": {
        "rank": ("lora_r", 16),
        "alpha": ("lora_alpha", 32.0),
        "dropout": ("lora_dropout", 0.05),
        "target_modules": ("lora_target_modules", QV),
    },
    "LoraConfig": {
        "rank": ("r", 8),
        "alpha": ("lora_alpha", 8.0),
        "target_modules": ("target_modules", QV),
    },
    "get_peft_model": {
        "rank": ("r", 16),
        "alpha": ("lora_alpha", 16.0),
        "target_modules": ("target_modules", "all-linear"),
    },
}
ADAPTER_KEYS = tuple(
    f"train.adapter.{key}" for key in ("kind", "rank", "alpha", "dropout", "target_modules")
)


def trainer_of(values: Values) -> str:
    """Return `sft` or the objective of pairs: as a script says, or by the keys."""
    if "trainer" in values:
        return str(values["trainer"])
    loss = values.get("loss_type")
    pairs = any(key in values for key in PAIRS_ONLY) or isinstance(loss, list) or loss in LOSSES
    return "dpo" if pairs else "sft"


def objective(value: Any, values: Values) -> dict[str, Any]:
    """Convert the trainer of a script, or the one whose keys are given.

    Raises:
        ConfigError: one that trains something else.
    """
    name = trainer_of(values) if value == BY_KEYS else value
    if name not in RATES:
        raise ConfigError(f"{name}: of the trainers only {', '.join(RATES)} have an equivalent")
    return {} if name == "sft" else {OBJECTIVE: name}


def losses(value: Any, values: Values) -> dict[str, Any]:
    """Convert the loss of tokens, or a pair's with the chosen answer's beside it.

    Raises:
        ConfigError: another, which would train something else at the same rate.
    """
    names = [value] if isinstance(value, str) else list(value)
    if trainer_of(values) == "sft" and names in (["nll"], ["chunked_nll"], ["dft"]):
        return {OBJECTIVE: "dft"} if names == ["dft"] else {}
    if trainer_of(values) == "cpo" and names == ["simpo"]:
        return {OBJECTIVE: "simpo"}
    if trainer_of(values) == "kto" and names in (["kto"], ["apo_zero_unpaired"]):
        return {OBJECTIVE: "kto"} | ({LOSS: "apo_zero"} if names[0] != "kto" else {})
    weights = values.get("loss_weights") or [1.0] * len(names)
    by_name = dict(zip(names, map(float, weights), strict=True))
    pairs = [name for name in by_name if name in LOSSES]
    known = len(pairs) == 1 and by_name[pairs[0]] == 1 and not by_name.keys() - {*pairs, "sft"}
    if not known or trainer_of(values) == "sft":
        raise ConfigError(
            f"loss_type: {value!r}: any of {', '.join(LOSSES)} with weight 1 is there, alone or "
            "beside `sft`; another would train something else at the same rate"
        )
    found = {OBJECTIVE: trainer_of(values), LOSS: pairs[0]}
    return found | ({SFT: by_name["sft"]} if "sft" in by_name else {})


def rate(value: Any, values: Values) -> dict[str, Any]:
    """Convert the learning rate, whose default is each trainer's own."""
    used = RATES.get(trainer_of(values), 0) if value == "by trainer" else value
    return {"train.optimizer.lr": float(used)}


def packing(value: Any, values: Values) -> dict[str, Any]:
    """Convert the switch with its strategy; rows that are not packed are cut at their end."""
    name = str(values.get("packing_strategy") or "bfd")
    ours = PACKED[name] if value else ("none", "truncate")
    return {key: word for key, word in zip(PACKING_KEYS, ours, strict=True) if word}


def adapter_kind(value: Any, values: Values) -> dict[str, Any]:
    """Convert whether adapters are trained, which scripts say by a call, with what is not given.

    Raises:
        NoEquivalentError: their places are left to PEFT, which chooses by the type of the model.
    """
    calls = [call for call in ADAPTERS if call and any(k.startswith(f"{call}.") for k in values)]
    if not value and not calls:
        return {"train.adapter.kind": "none"}
    prefix, defaults = (f"{calls[-1]}.", ADAPTERS[calls[-1]]) if calls else ("", ADAPTERS[""])
    twice = values.get(f"{prefix}use_dora")
    found = {"train.adapter.kind": "dora" if twice else "lora"} | {
        f"train.adapter.{ours}": default
        for ours, (theirs, default) in defaults.items()
        if values.get(prefix + theirs) is None
    }
    if "train.adapter.target_modules" in found and not calls[-1:] == ["get_peft_model"]:
        raise NoEquivalentError(PEFTS_CHOICE, found)
    return found


DATA_ROWS: tuple[Equivalent, ...] = (
    elsewhere("dataset_name", "prepare.sources.path", DATA),
    elsewhere("dataset_config", "prepare.sources.path", DATA),
    elsewhere("dataset_train_split", "prepare.sources.path", DATA),
    elsewhere("dataset_test_split", "prepare.sources.split", DATA),
    elsewhere("datasets", "prepare.sources.path", DATA),
    elsewhere("test_split_size", "prepare.evaluation_fraction"),
    elsewhere("dataset_text_field", "prepare.sources.text_field"),
    none("dataset_streaming", "rows are read from shards, none are kept in memory"),
    none("streaming", "rows are read from shards, none are kept in memory"),
    none("ignore_bias_buffers", "buffers are read and written as they are"),
    same("max_length", "prepare.sequence_len", default=1024),
    same("max_seq_length", "prepare.sequence_len"),
    none("max_prompt_length", "lengths of prompts are not limited by themselves"),
    choice("truncation_mode", PACKING_KEYS[1], {"keep_start": None}),
    computed("packing", PACKING_KEYS, packing, "by `packing_strategy`", default=False),
    elsewhere("packing_strategy", PACKING_KEYS),
    none("eval_packing", PACKING),
    none("padding_free", PACKING, True),
    none("pad_to_multiple_of", PACKING, "auto"),
    none("shuffle_dataset", "rows are always shuffled globally", True),
    elsewhere("dataset_num_proc", "headrace prepare --workers"),
    none("dataset_batch_size", "`prepare` works by blocks"),
    none("dataset_kwargs", "`prepare` has keys for what it knows"),
    elsewhere("chat_template_path", "prepare.sources.chat.template"),
    elsewhere("eos_token", "prepare.sources.chat.end_of_turn"),
    none("pad_token", "padding is not in the shards"),
    none("completion_only_loss", "of a question and its answer the answer is trained", True),
    none("assistant_only_loss", "answers alone are trained; more by `chat.train_on`", True),
)
OBJECTIVE_ROWS: tuple[Equivalent, ...] = (
    computed("trainer", OBJECTIVE, objective, "of scripts", BY_KEYS),
    computed("loss_type", (OBJECTIVE, LOSS, SFT), losses, "others are refused"),
    elsewhere("loss_weights", SFT),
    number("beta", "train.objective.beta"),
    number("desirable_weight", "train.objective.desirable_weight"),
    number("undesirable_weight", "train.objective.undesirable_weight"),
    number("center_rewards_coefficient", "train.objective.center"),
    number("simpo_gamma", "train.objective.gamma"),
    number("cpo_alpha", "train.objective.sft_weight"),
    number("rpo_alpha", "train.objective.sft_weight"),
    number("label_smoothing", "train.objective.label_smoothing"),
    refused("ld_alpha", "tokens of longer answers have the same weight"),
    refused("use_weighting", "pairs have the same weight"),
    refused("sync_ref_model", "the reference stays the model before training"),
    none("ref_model_mixup_alpha", "of `sync_ref_model`", 0.6),
    none("ref_model_sync_steps", "of `sync_ref_model`", 512),
    none("f_divergence_type", "the reverse one", "reverse_kl"),
    none("f_alpha_divergence_coef", "of another divergence", 0.5),
    none("discopop_tau", "of a loss that is refused", 0.05),
    none("disable_dropout", "adapters have the dropout of `adapter.dropout`", True),
    none("precompute_ref_log_probs", "the reference runs beside each micro-batch"),
    none("precompute_ref_batch_size", "the reference runs beside each micro-batch"),
    number("router_aux_loss_coef", "train.router_loss"),
)
MODEL_ROWS: tuple[Equivalent, ...] = (
    same("model_name_or_path", "train.model"),
    none("model_revision", "download it, and give its directory", "main"),
    none(
        "trust_remote_code",
        "no code of a model directory is run unless you set `trust_remote_code = true`",
    ),
    none("attn_implementation", ATTENTION, "flash_attention_2", "sdpa", "eager"),
    dtype("dtype"),
    dtype("torch_dtype"),
    none("model_init_kwargs", DIRECTORY),
    none("lora_task_type", "language models alone are trained", "CAUSAL_LM"),
    computed("use_peft", ADAPTER_KEYS, adapter_kind, "in scripts a call", default=False),
    *when(
        "use_peft",
        same("lora_r", "train.adapter.rank"),
        *(row for row in shared_adapter_rows("") if row.old != "use_dora"),
        computed("lora_target_modules", "train.adapter.target_modules", targets),
        same("lora_target_parameters", "train.adapter.target_parameters"),
        same("lora_modules_to_save", "train.adapter.modules_to_save"),
    ),
    elsewhere("use_dora", "train.adapter.kind"),
    *quantization_rows(""),
    elsewhere("bnb_4bit_quant_type", TYPE),
    elsewhere("use_bnb_nested_quant", DOUBLE),
    elsewhere("bnb_4bit_quant_storage", STORAGE),
    computed("activation_offloading", "train.activation_offload", offload),
)

TRL = OldSystem(
    "TRL and Unsloth",
    (
        computed(
            "learning_rate",
            "train.optimizer.lr",
            rate,
            "SFT 2e-5, rewards 1e-4, others 1e-6",
            "by trainer",
        ),
        *MODEL_ROWS,
        *OBJECTIVE_ROWS,
        *DATA_ROWS,
        *CALL_ROWS,
    ),
    {
        "train.activation_checkpointing": "full",
        "train.evaluation.after_last_step": False,
    },
    "layers are computed again in the backward pass",
    shared=TRAINING_ROWS,
)
