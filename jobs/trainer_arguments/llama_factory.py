"""LLaMA-Factory's arguments (0.9.5)."""

from typing import Any

from headrace.jobs.old_systems.axolotl_unused import ACCELERATION, ATTENTION, DIRECTORY, MEMORY
from headrace.jobs.old_systems.equivalents import (
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
from headrace.jobs.old_systems.quantized import BACKEND, INT8, LLM_INT8_THRESHOLD, TYPE
from headrace.jobs.trainer_arguments.adapter_arguments import DOUBLE
from headrace.jobs.trainer_arguments.transformers_trainer import TRAINING_ROWS
from headrace.schemas.errors import ConfigError

STAGES = ("sft", "pt", "dpo", "kto", "rm")
KIND, LOSS, SFT, BETA = (f"train.objective.{key}" for key in ("kind", "loss", "sft_weight", "beta"))
GAMMA = "train.objective.gamma"
WEIGHTS = {"desirable_weight": "kto_chosen_weight", "undesirable_weight": "kto_rejected_weight"}
PAIR_LOSSES: dict[str, tuple[str, str | None]] = {
    "sigmoid": ("dpo", "sigmoid"),
    "hinge": ("dpo", "hinge"),
    "ipo": ("dpo", "ipo"),
}
PAIR_LOSSES |= {"orpo": ("orpo", None), "simpo": ("simpo", None)}
NEW_TOKENS = ("prepare.added_tokens", "train.model_overrides.new_tokens")
PACKING_KEYS = ("prepare.packing", "prepare.overlong")
BY_STAGE = "by stage"
DATASET_INFO = "found in `dataset_info.json` of `dataset_dir`"


def stage(value: Any, values: Values) -> dict[str, Any]:
    """Convert what is trained, with the loss of pairs and its numbers.

    Raises:
        ConfigError: a stage or loss that is not there.
    """
    if value not in STAGES:
        raise ConfigError(f"stage: {value!r}: only {', '.join(STAGES)} have an equivalent")
    if value == "rm":
        return {KIND: "reward"}
    if value == "kto":
        weights = {
            f"train.objective.{ours}": float(values[theirs])
            for ours, theirs in WEIGHTS.items()
            if theirs in values
        }
        return {KIND: "kto", BETA: float(values.get("pref_beta", 0.1))} | weights
    if value != "dpo":
        return {}
    loss = str(values.get("pref_loss", "sigmoid"))
    if loss not in PAIR_LOSSES:
        raise ConfigError(f"pref_loss: {loss!r}: only {', '.join(PAIR_LOSSES)} have an equivalent")
    kind, ours = PAIR_LOSSES[loss]
    found: dict[str, Any] = {KIND: kind, BETA: float(values.get("pref_beta", 0.1))}
    found |= {LOSS: ours} if ours else {}
    if kind == "simpo":
        found[GAMMA] = float(values.get("simpo_gamma", 0.5))
    if kind == "dpo" and values.get("pref_ftx"):
        found[SFT] = float(values["pref_ftx"])
    return found


def finetuning(value: Any, values: Values) -> dict[str, Any]:
    """Convert what is trained.

    Raises:
        ConfigError: neither LoRA nor all weights.
    """
    if value not in ("lora", "full"):
        raise ConfigError(f"finetuning_type: {value!r}: only lora and full have an equivalent")
    if value == "full":
        return {"train.adapter.kind": "none"}
    if values.get("adapter_name_or_path"):
        return {"train.adapter.kind": "lora"}
    rank = int(values.get("lora_rank", 8))
    return {
        "train.adapter.kind": "dora" if values.get("use_dora") else "lora",
        "train.adapter.rank": rank,
        "train.adapter.alpha": float(values.get("lora_alpha") or 2 * rank),
    }


def targets(value: Any, values: Values) -> dict[str, Any]:
    """Convert names in a list or with commas; `all` is every linear layer."""
    if values.get("finetuning_type", "lora") != "lora" or values.get("adapter_name_or_path"):
        return {}
    names = listed(value)
    return {"train.adapter.target_modules": "all-linear" if names == ["all"] else names}


def listed(value: Any) -> list[str]:
    """Return names of a list, or of a text with commas."""
    parts = value.split(",") if isinstance(value, str) else value or []
    return [str(part).strip() for part in parts if str(part).strip()]


def additional(value: Any, _: Values) -> dict[str, Any]:
    return {"train.adapter.modules_to_save": listed(value)}


def started(value: Any, _: Values) -> dict[str, Any]:
    """Convert the adapter that training starts from; it decides rank, alpha and targets."""
    paths = listed(value)
    if len(paths) > 1:
        raise ConfigError("adapter_name_or_path: several adapters; merge all but the last first")
    return {"train.adapter.path": paths[0]} if paths else {}


def bits(value: Any, values: Values) -> dict[str, Any]:
    """Convert weights that are quantized when they are loaded."""
    if not value:
        return {}
    method = str(values.get("quantization_method", "bnb")).lower()
    if method in ("bnb", "bitsandbytes") and int(value) == 4:
        double = bool(values.get("double_quantization", True))
        return {BACKEND: "bnb", TYPE: values.get("quantization_type", "nf4"), DOUBLE: double}
    if method in ("bnb", "bitsandbytes") and int(value) == 8:
        return dict(zip(INT8, ("bnb", "int8", LLM_INT8_THRESHOLD), strict=True))
    if method == "hqq":
        return {BACKEND: "hqq", "train.quantization.bits": int(value)}
    raise ConfigError(
        f"quantization_method: {method}: of {value} bits is not there; use bnb or hqq"
    )


def recomputation(value: Any, _: Values) -> dict[str, Any]:
    return {"train.activation_checkpointing": "none" if value else "full"}


def packing(value: Any, values: Values) -> dict[str, Any]:
    """Convert packing; documents of a row never see each other here.

    Raises:
        NoEquivalentError: they do there.
    """
    unsaid = value == BY_STAGE and values.get("stage") == "pt"
    on = values.get("neat_packing") or unsaid or value is True
    found = dict(zip(PACKING_KEYS, ("best_fit" if on else "none", "truncate"), strict=True))
    if on and not values.get("neat_packing"):
        raise NoEquivalentError("`best_fit` is written; documents do not see each other", found)
    return found


def muon(value: Any, _: Values) -> dict[str, Any]:
    if not value:
        return {}
    raise NoEquivalentError(
        '"muon" is written; its step may be of another size', {"train.optimizer.type": "muon"}
    )


def new_words(value: Any, values: Values) -> dict[str, Any]:
    """Convert the tokens of both keys, plain and special."""
    names = listed(values.get("add_tokens")) + listed(values.get("add_special_tokens"))
    return dict.fromkeys(NEW_TOKENS, names) if names else {}


def no_rope(value: Any, _: Values) -> dict[str, Any]:
    if not value:
        return {}
    raise ConfigError(
        f"rope_scaling: {value!r}: its factor follows from lengths there; write "
        "`[model_overrides]` into train.toml"
    )


UNUSED = {  # reason -> keys
    "each text is rendered by the tokenizer's own template; write `chat.template` for another": """
        template tool_format default_system""",
    "`sources.sample_fraction` takes a share of each set": "max_samples",
    "rows are read from shards, none are kept in memory": """
        streaming buffer_size data_shared_file_system""",
    "`headrace prepare` writes shards once": """
        overwrite_cache preprocessing_batch_size tokenized_path ignore_pad_token_for_loss""",
    ACCELERATION: "enable_liger_kernel use_unsloth use_unsloth_gc use_v1_kernels use_reentrant_gc",
    ATTENTION: "flash_attn block_diag_attn",
    DIRECTORY: """
        use_fast_tokenizer cache_dir hf_hub_token ms_hub_token om_hub_token model_max_length
        adapter_folder use_kv_cache split_special_tokens init_special_tokens
        new_special_tokens_config resize_vocab""",
    MEMORY: """
        low_cpu_mem_usage offload_folder device_map quantization_device_map upcast_layernorm
        upcast_lmhead_output infer_dtype compute_dtype print_param_status""",
    "trained weights are float32, or `optimizer.type` is `adamw_kahan`": "pure_bf16",
    'write `[quantization] matmul = "fp8"`': """
        fp8 fp8_backend fp8_enable_fsdp_float8_all_gather""",
    "adapters are float32 and of one kind": "pissa_iter pissa_convert create_new_adapter",
    "pictures are not imported": """
        media_dir freeze_vision_tower freeze_multi_modal_projector freeze_language_model
        image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels
        video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate""",
    "`headrace merge`, `convert` and `export-gguf` write models": """
        export_dir export_size export_device export_quantization_bit
        export_quantization_dataset export_quantization_nsamples export_quantization_maxlen
        export_legacy_format export_hub_model_id""",
    "`headrace sample` and `serve` answer": """
        infer_backend vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config
        sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend
        do_sample temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty
        length_penalty skip_special_tokens predict_with_generate eval_num_beams""",
    "the reference is the model before training": """
        ref_model ref_model_adapters ref_model_quantization_bit""",
    "of an objective that is refused": """
        ppo_buffer_size ppo_epochs ppo_score_norm ppo_target
        ppo_whiten_rewards reward_model reward_model_adapters reward_model_quantization_bit
        reward_model_type asft_alpha eaft_alpha oft_rank oft_block_size oft_target module_dropout
        freeze_trainable_layers freeze_trainable_modules freeze_extra_modules
        galore_target galore_rank galore_update_interval galore_scale galore_proj_type
        galore_layerwise apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj
        apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front badam_mode
        badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio
        badam_mask_mode badam_verbose loraplus_lr_embedding""",
    "runs are reported to TensorBoard, wandb and mlflow": """
        use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode
        swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret plot_loss
        include_effective_tokens_per_second compute_accuracy""",
    "rows are always shuffled globally": "disable_shuffling",
    "`headrace train` starts the processes itself": """
        ray_num_workers ray_init_kwargs ray_run_name ray_storage_path resources_per_worker
        placement_strategy master_addr master_port use_mca use_hyper_parallel
        hyper_parallel_args use_kt kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts
        kt_lora_expert_num kt_lora_expert_intermediate_size""",
    "`profile` traces a step": """
        enable_torch_profiler profiler_output_dir profiler_wait_steps profiler_warmup_steps
        profiler_active_steps profiler_repeat profiler_record_shapes profiler_profile_memory
        profiler_with_stack profile_modules""",
}
ANY = ("fa2", "sdpa", "auto", "disabled", True)
REFUSED = {  # reason -> keys
    "GaLore, APOLLO, BAdam and Adam-mini are not among the optimizers": """
        use_galore use_apollo use_badam use_adam_mini""",
    "attention is not shortened": "shift_attn",
    "all layers run": "mixture_of_depths",
    'new blocks are `adapter.kind = "blocks"`': "use_llama_pro",
    "not among the objectives": "use_asft_loss use_eaft_loss pref_bco_weight ld_alpha",
    "answers before the last are trained too": "mask_history",
    "a model of random weights is not trained": "train_from_scratch",
}


LLAMA_FACTORY = OldSystem(
    "LLaMA-Factory",
    (
        same("model_name_or_path", "train.model"),
        none("model_revision", "download it, and give its directory", "main"),
        none(
            "trust_remote_code",
            "no code of a model directory is run unless you set `trust_remote_code = true`",
        ),
        computed("adapter_name_or_path", "train.adapter.path", started),
        computed(
            "stage",
            (KIND, LOSS, SFT, BETA, GAMMA, *(f"train.objective.{key}" for key in WEIGHTS)),
            stage,
            "`sft`, `pt`, `dpo` with its losses, `kto` and `rm`; others are refused",
            default="sft",
        ),
        elsewhere("pref_loss", LOSS),
        elsewhere("pref_beta", BETA),
        elsewhere("pref_ftx", SFT),
        elsewhere("simpo_gamma", GAMMA),
        *(elsewhere(theirs, f"train.objective.{ours}") for ours, theirs in WEIGHTS.items()),
        number("dpo_label_smoothing", "train.objective.label_smoothing"),
        choice("use_dft_loss", KIND, {True: "dft", False: None}),
        computed(
            "finetuning_type",
            tuple(f"train.adapter.{key}" for key in ("kind", "rank", "alpha")),
            finetuning,
            "`full`: `none`; others are refused",
            default="lora",
        ),
        elsewhere("lora_rank", "train.adapter.rank", "default there 8"),
        elsewhere("lora_alpha", "train.adapter.alpha", "default there twice the rank"),
        elsewhere("use_dora", "train.adapter.kind"),
        computed(
            "lora_target",
            "train.adapter.target_modules",
            targets,
            '`all`: `"all-linear"`',
            default="all",
        ),
        computed("additional_target", "train.adapter.modules_to_save", additional),
        number("lora_dropout", "train.adapter.dropout"),
        same("use_rslora", "train.adapter.rslora"),
        choice("pissa_init", "train.adapter.init", {True: "pissa", False: None}),
        number("loraplus_lr_ratio", "train.optimizer.lora_plus_ratio"),
        computed("use_muon", "train.optimizer.type", muon),
        computed(
            "quantization_bit",
            (BACKEND, TYPE, DOUBLE, INT8[2], "train.quantization.bits"),
            bits,
            "by `quantization_method`",
        ),
        elsewhere("quantization_method", BACKEND),
        elsewhere("quantization_type", TYPE),
        elsewhere("double_quantization", DOUBLE),
        number("moe_aux_loss_coef", "train.router_loss"),
        computed("rope_scaling", (), no_rope, "refused: its factor follows from lengths"),
        computed(
            "disable_gradient_checkpointing",
            "train.activation_checkpointing",
            recomputation,
            default=False,
        ),
        *(computed(key, NEW_TOKENS, new_words) for key in ("add_tokens", "add_special_tokens")),
        elsewhere("dataset", "prepare.sources.path", DATASET_INFO),
        elsewhere("eval_dataset", "prepare.sources.split", DATASET_INFO),
        elsewhere("dataset_dir", "prepare.sources.path"),
        same("cutoff_len", "prepare.sequence_len", default=2048),
        computed("packing", PACKING_KEYS, packing, "on for `pt`", default=BY_STAGE),
        elsewhere("neat_packing", PACKING_KEYS, "`best_fit`"),
        elsewhere("train_on_prompt", "prepare.sources.chat.train_on"),
        elsewhere("enable_thinking", "prepare.sources.chat.template_arguments"),
        elsewhere("preserve_thinking", "prepare.sources.chat.template_arguments"),
        elsewhere("mix_strategy", "train.datasets.weight", "`interleave_*`: by weights"),
        elsewhere("interleave_probs", "train.datasets.weight"),
        elsewhere("val_size", "prepare.evaluation_fraction", "above 1 a number of documents"),
        elsewhere("preprocessing_num_workers", "headrace prepare --workers"),
        computed(
            "early_stopping_steps",
            "train.evaluation.patience",
            lambda value, _: {"train.evaluation.patience": int(value)} if value else {},
        ),
        *(
            none(key, reason, *(ANY if reason in (ACCELERATION, ATTENTION) else ()))
            for reason, keys in UNUSED.items()
            for key in keys.split()
        ),
        *(refused(key, reason) for reason, keys in REFUSED.items() for key in keys.split()),
    ),
    {"train.evaluation.after_last_step": False},
    shared=TRAINING_ROWS,
)
