"""Rules that the keys of a training config must satisfy together."""

from typing import TYPE_CHECKING

from headrace.schemas.train.layer_ranges import parse_layers
from headrace.schemas.train.objectives import kinds_of
from headrace.schemas.train.optimizers import OPTIMIZERS
from headrace.schemas.train.tuning_methods import TUNING_METHODS

if TYPE_CHECKING:
    from headrace.schemas.train.train_config import TrainConfig


def check_rules(config: "TrainConfig") -> None:
    """Raises ValueError, with the keys and the remedy, for the first rule that is broken."""
    check_steps_and_rate(config)
    check_schedule(config)
    check_sequence(config)
    check_slices(config)
    check_tensor(config)
    check_quantization(config)
    check_float16(config)
    check_trained_matmul(config)
    check_mixing(config)
    check_packing(config)
    check_new_tokens(config)
    check_checkpointing(config)
    check_tiles(config)
    check_offload(config)
    check_weight_shard(config)
    check_adapters_only(config)
    check_objective(config)
    check_evaluation(config)
    check_vision(config)


def check_steps_and_rate(config: "TrainConfig") -> None:
    """One length of the run, and a rate that suits the optimizer."""
    if config.epochs is not None and config.max_steps is not None:
        raise ValueError(
            f"epochs = {config.epochs} and max_steps = {config.max_steps} exclude each other; "
            "keep one"
        )
    if config.scheduler.min_lr > config.optimizer.lr:
        raise ValueError(
            f"scheduler.min_lr = {config.scheduler.min_lr} is above "
            f"optimizer.lr = {config.optimizer.lr}; lower it"
        )
    optimizer = f'optimizer.type = "{config.optimizer.type}"'
    if config.optimizer.record.averages and config.scheduler.type != "constant":
        raise ValueError(
            f'scheduler.type = "{config.scheduler.type}": {optimizer} takes the place of a falling '
            'learning rate; set "constant"'
        )
    if not config.optimizer.record.droppable and config.checkpoint.weights_only:
        raise ValueError(
            f"checkpoint.weights_only = true: the weights of {optimizer} are averages, which its "
            "states are needed for; drop one"
        )


def check_float16(config: "TrainConfig") -> None:
    """Weights in float16 lose small updates, so they are frozen."""
    if config.dtype == "float16" and config.adapter.record.trains_base:
        raise ValueError(
            f'dtype = "float16" with adapter.kind = "{config.adapter.kind}": only adapters are '
            'trained beside weights in float16; use "lora", or dtype = "bfloat16" or "float32"'
        )
    if config.dtype == "float16" and config.optimizer.record.keeps_dtype:
        raise ValueError(
            f'dtype = "float16": optimizer.type = "{config.optimizer.type}" holds trained weights '
            "in `dtype`, and float16 loses small updates; use another optimizer"
        )


def check_schedule(config: "TrainConfig") -> None:
    """Chunks must go round more than one stage, in rounds of whole micro-batches."""
    if config.schedule == "1f1b":
        if "stage_chunks" in config.model_fields_set:
            raise ValueError(
                f'stage_chunks = {config.stage_chunks} has no meaning with schedule = "1f1b"; '
                'set schedule = "interleaved" or drop it'
            )
        return
    stages, micro_batches = config.pipeline_stages, config.gradient_accumulation_steps
    if stages == 1:
        raise ValueError(
            'schedule = "interleaved" needs pipeline_stages = 2 or more; '
            "a single stage waits for nobody"
        )
    missing = -micro_batches % stages
    if missing:
        raise ValueError(
            f'schedule = "interleaved": gradient_accumulation_steps = {micro_batches} is not a '
            f"multiple of pipeline_stages = {stages}; use {micro_batches + missing}"
        )
    if isinstance(config.partition, list) and len(config.partition) != config.parts:
        raise ValueError(
            f"partition has {len(config.partition)} entries, but there are {config.parts} chunks, "
            f"{config.stage_chunks} of each of {stages} stages"
        )


def check_sequence(config: "TrainConfig") -> None:
    """Refuse what goes through a stage with whole rows."""
    if config.sequence_parallel > 1 and config.rejected_sampling is not None:
        raise ValueError(
            f"sequence_parallel = {config.sequence_parallel} does not go with "
            "[rejected_sampling], whose answers are generated token by token, so that there is "
            "nothing to cut; use more pipeline_stages or replicas"
        )


def check_slices(config: "TrainConfig") -> None:
    """Refuse what needs whole rows in a stage at once, or another order of passes."""
    slices = f"sequence_slices = {config.sequence_slices} does not go with"
    if config.sequence_slices == 1:
        return
    if config.schedule != "1f1b":
        raise ValueError(
            f'{slices} schedule = "{config.schedule}", whose passes have another order; set '
            '"1f1b", or use one of both'
        )
    record = config.objective.record
    if record.columns != "rows" or record.scores or record.has_reference:
        raise ValueError(
            f'{slices} objective.kind = "{config.objective.kind}", which compares whole answers '
            "before the first gradient; set sequence_slices = 1 and use more micro-batches"
        )


def check_tensor(config: "TrainConfig") -> None:
    """Refuse what needs whole weights at one process."""
    if config.tensor_parallel == 1:
        return
    kind, objective = config.adapter.kind, config.objective.kind
    entrywise = ", ".join(name for name, record in OPTIMIZERS.items() if record.shardable)
    refusals = [
        (config.rejected_sampling is not None, "[rejected_sampling]", "drop it"),
        (config.tiles > 1, "tiles", "drop it"),
        (
            not config.adapter.record.has_parts,
            f'adapter.kind = "{kind}"',
            f"use kind = {kinds_with_parts()}",
        ),
        (config.adapter.takes_over, f'adapter.init = "{config.adapter.init}"', 'use "kaiming"'),
        (
            bool(config.adapter.trainable_token_indices or config.model_overrides.new_tokens),
            "trained rows of single tokens",
            'use modules_to_save = ["embed_tokens", "lm_head"]',
        ),
        (config.objective.has_reference, f'objective.kind = "{objective}"', "use another"),
        (config.objective.record.scores, f'objective.kind = "{objective}"', "use another"),
        (bool(config.relora.every_steps), "relora.every_steps", "drop it"),
        (bool(config.regularization.product_decay), "regularization.product_decay", "drop it"),
        (
            bool(config.regularization.max_product_norm),
            "regularization.max_product_norm",
            "drop it",
        ),
        (config.trained_matmul == "fp8", 'trained_matmul = "fp8"', "drop it"),
        (config.checkpoint.node_local, "checkpoint.node_local", "drop it"),
        (
            not config.optimizer.record.shardable,
            f'optimizer.type = "{config.optimizer.type}"',
            f"use one that steps each entry by itself: {entrywise}",
        ),
    ]
    for is_wrong, key, remedy in refusals:
        if is_wrong:
            raise ValueError(
                f"tensor_parallel = {config.tensor_parallel} does not go with {key}, which needs "
                f"whole weights; {remedy}, or use more pipeline_stages"
            )


def kinds_with_parts() -> str:
    """List the kinds of adapters that go with parts of weights, for messages."""
    return " or ".join(f'"{kind}"' for kind, it in TUNING_METHODS.items() if it.has_parts)


def check_quantization(config: "TrainConfig") -> None:
    """There must be frozen weights; what adapters took from them is in no cache."""
    adapter = config.adapter
    if config.quantization is None:
        if adapter.takes_over and adapter.init == "loftq":
            raise ValueError(
                'adapter.init = "loftq" takes over what weights lose when they are quantized, and '
                'there is no [quantization]; add one, or use init = "kaiming"'
            )
        return
    limited = adapter.target_modules != "all-linear" or adapter.layers is not None
    if adapter.record.trains_all and not limited:
        raise ValueError(
            f'[quantization] holds frozen weights, and adapter.kind = "{adapter.kind}" trains '
            'them all; use kind = "lora", or limit target_modules or layers'
        )
    if config.relora.every_steps:
        raise ValueError(
            "relora.every_steps adds to the frozen weights, which [quantization] holds "
            "quantized; drop one"
        )
    if config.objective.has_reference and adapter.record.trains_base:
        raise ValueError(
            f'[quantization] goes with objective.kind = "{config.objective.kind}" only under '
            f'adapters, and adapter.kind = "{adapter.kind}"; use kind = "lora"'
        )
    if config.quantization.cache is not None and adapter.takes_over:
        raise ValueError(
            f'quantization.cache does not go with adapter.init = "{adapter.init}", which '
            "needs the weights before they are quantized; drop one"
        )


def check_trained_matmul(config: "TrainConfig") -> None:
    """Refuse 8-bit products of trained weights where no linear layer of the model is trained."""
    if config.trained_matmul == "fp8" and not config.adapter.record.trains_base:
        raise ValueError(
            f'trained_matmul = "fp8" multiplies trained weights, and adapter.kind = '
            f'"{config.adapter.kind}" freezes the model\'s; use [quantization] backend = "fp8"'
        )


def check_mixing(config: "TrainConfig") -> None:
    """Concatenation takes every row, so nothing may ask it for other shares."""
    if config.mixing == "interleave":
        return
    weights = [dataset.weight for dataset in config.datasets]
    if len(set(weights)) > 1:
        raise ValueError(
            f"the weights of the datasets differ ({', '.join(map(str, weights))}), but "
            'mixing = "concatenate" takes all rows; set mixing = "interleave" or drop them'
        )
    for key in ("mixing_unit", "mixing_stop"):
        if key in config.model_fields_set:
            raise ValueError(
                f'{key} = "{getattr(config, key)}" has no meaning with mixing = "concatenate"; '
                'set mixing = "interleave" or drop it'
            )


def check_checkpointing(config: "TrainConfig") -> None:
    """Only recomputed layers have inputs to offload."""
    setting = config.activation_checkpointing
    if isinstance(setting, str) and setting not in ("none", "full", "selective", "attention"):
        parse_layers(setting)
    if config.activation_offload and setting == "none":
        raise ValueError(
            "activation_offload moves the inputs of recomputed layers; "
            'set activation_checkpointing = "full" or drop it'
        )


def check_tiles(config: "TrainConfig") -> None:
    """Refuse what else decides over the memory of MLPs."""
    if config.tiles == 1:
        return
    again = config.activation_checkpointing
    refusals = [
        (again == "selective", 'activation_checkpointing = "selective"', 'set "full" or "none"'),
        (
            config.moved_weights[1] != "none" and again not in ("full", "attention"),
            '{} = "{}"'.format(*config.moved_weights),
            'set activation_checkpointing = "full"',
        ),
        (config.tensor_parallel > 1, f"tensor_parallel = {config.tensor_parallel}", "drop one"),
    ]
    for is_wrong, key, remedy in refusals:
        if is_wrong:
            raise ValueError(f"tiles = {config.tiles} does not go with {key}; {remedy}")


def check_offload(config: "TrainConfig") -> None:
    """Refuse offloading of weights that training changes."""
    kind, trains_base = config.adapter.kind, config.adapter.record.trains_base
    key, wish = config.moved_weights
    if wish != "none" and trains_base:
        raise ValueError(
            f'{key} = "{wish}" holds frozen weights under adapters, '
            f'and adapter.kind = "{kind}" trains and writes the weights themselves; use '
            'kind = "lora", or drop it and use more pipeline_stages'
        )
    if wish != "none" and config.relora.every_steps:
        raise ValueError(
            f'{key} = "{wish}" leaves weights as they are, and '
            "relora.every_steps adds to them; drop one"
        )
    if config.embedding_on_cpu and trains_base:
        raise ValueError(
            "embedding_on_cpu holds a frozen embedding under adapters, and adapter.kind = "
            f'"{kind}" writes the weights themselves; use kind = "lora" or drop it'
        )
    if (
        config.embedding_on_cpu
        and config.quantization is not None
        and config.quantization.embedding
    ):
        raise ValueError(
            "embedding_on_cpu and quantization.embedding are two ways to save the same memory; "
            "drop one"
        )


def check_weight_shard(config: "TrainConfig") -> None:
    """Refuse what asks for gathered weights at other times than the other processes."""
    if config.weight_shard == "none":
        return
    refusals = [
        (config.weight_offload != "none", f'weight_offload = "{config.weight_offload}"'),
        (config.rejected_sampling is not None, "[rejected_sampling]"),
        (bool(config.evaluation.prompts), "evaluation.prompts"),
        (bool(config.evaluation.prompt_rows), "evaluation.prompt_rows"),
    ]
    for is_wrong, what in refusals:
        if is_wrong:
            raise ValueError(
                f'weight_shard = "{config.weight_shard}" does not go with {what}; drop one'
            )


def check_adapters_only(config: "TrainConfig") -> None:
    """Refuse options about the product BA where no adapter has one."""
    asked = {
        "regularization.product_decay": config.regularization.product_decay,
        "regularization.max_product_norm": config.regularization.max_product_norm,
        "relora.every_steps": config.relora.every_steps,
    }
    record = config.adapter.record
    for key, value in asked.items():
        suits = record.restarts if key == "relora.every_steps" else record.has_products
        if value and not suits:
            raise ValueError(
                f'{key} = {value} has no meaning with adapter.kind = "{config.adapter.kind}"; '
                "drop it"
            )
    if config.relora.every_steps and config.objective.has_reference:
        raise ValueError(
            f'relora.every_steps does not go with objective.kind = "{config.objective.kind}", '
            "which compares with the weights as they were"
        )
    for key in asked:
        if asked[key] and config.adapter.target_parameters:
            raise ValueError(f"{key} does not go with adapter.target_parameters; drop one")
    if config.relora.every_steps and config.adapter.init != "kaiming":
        raise ValueError(
            f'relora.every_steps needs adapter.init = "kaiming", not "{config.adapter.init}"'
        )
    if config.relora.every_steps and not config.optimizer.record.prunable:
        fitting = ", ".join(name for name, record in OPTIMIZERS.items() if record.prunable)
        raise ValueError(
            f'relora.every_steps: optimizer.type = "{config.optimizer.type}" has states that '
            f"cannot be pruned; choose one of {fitting}"
        )
    if config.relora.every_steps and config.optimizer.shard:
        raise ValueError(
            "relora.every_steps prunes the smallest moments of whole weights, which "
            "optimizer.shard shares out; drop one"
        )
    if asked["regularization.product_decay"] and config.optimizer.record.keeps_dtype:
        raise ValueError(
            'regularization.product_decay needs float32 adapters; set optimizer.type = "adamw"'
        )


def check_new_tokens(config: "TrainConfig") -> None:
    """Refuse new tokens whose rows nothing would train."""
    adapter = config.adapter
    trained = adapter.record.has_products or adapter.record.trains_all
    if config.model_overrides.new_tokens and not trained:
        raise ValueError(
            f'model_overrides.new_tokens: adapter.kind = "{adapter.kind}" trains no rows of the '
            'embedding; use kind = "lora" or "none"'
        )


def check_packing(config: "TrainConfig") -> None:
    """Refuse options about packing without packing."""
    if config.loader.pack == "none":
        for key in ("tokens_per_row", "look_ahead", "overlong"):
            if key in config.loader.model_fields_set:
                raise ValueError(
                    f"loader.{key} = {getattr(config.loader, key)!r} has no meaning with "
                    'loader.pack = "none"; set loader.pack = "best_fit" or drop it'
                )
    elif config.loader.on_corrupt == "quarantine" and config.max_steps is None:
        raise ValueError(
            'with loader.pack = "best_fit" and loader.on_corrupt = "quarantine" the number of '
            "steps cannot be known ahead; set max_steps in place of epochs"
        )


def check_objective(config: "TrainConfig") -> None:
    """Refuse objectives that do not go with the trained weights or the data."""
    kind, adapter = config.objective.kind, config.adapter
    if adapter.record.by_class and config.optimizer.record.keeps_dtype:
        raise ValueError(
            f'adapter.kind = "{adapter.kind}" is held in float32, which optimizer.type = '
            f'"{config.optimizer.type}" is not; choose another optimizer.type'
        )
    if not config.objective.of_pairs and config.rejected_sampling is not None:
        raise ValueError(
            f'[rejected_sampling] has no meaning with objective.kind = "{kind}", which has '
            f"no pairs; set kind = {kinds_of('pairs')}, or drop it"
        )
    check_teacher(config)
    if config.objective.record.columns == "rows":
        return
    check_rejected_sampling(config)
    check_baseline(config)
    check_scores(config)
    if adapter.record.by_class:
        raise ValueError(
            f'objective.kind = "{kind}" does not go with adapter.kind = "{adapter.kind}", whose '
            "classes are for whole documents; use another adapter.kind"
        )
    if config.objective.has_reference and adapter.takes_over:
        raise ValueError(
            f'objective.kind = "{kind}" compares with the frozen weights, of which '
            f'adapter.init = "{adapter.init}" takes a part away; use another adapter.init'
        )
    if config.loader.pack != "none" and config.loader.overlong != "error":
        raise ValueError(
            f'objective.kind = "{kind}" cannot cut or drop rows in packing; set '
            'loader.overlong = "error", and overlong = "truncate" or "drop" in preparing'
        )


def check_teacher(config: "TrainConfig") -> None:
    """Refuse layouts in which a teacher of another width cannot go along."""
    if config.objective.teacher is None:
        return
    whole = {
        "sequence_parallel": config.sequence_parallel,
        "sequence_slices": config.sequence_slices,
        "tensor_parallel": config.tensor_parallel,
    }
    for key, value in whole.items():
        if value > 1:
            raise ValueError(
                f"{key} = {value}: objective.teacher goes through the stages with whole rows and "
                "weights; use more pipeline_stages or replicas"
            )
    if config.schedule != "1f1b":
        raise ValueError(
            f'schedule = "{config.schedule}": objective.teacher goes once through each stage; set '
            '"1f1b"'
        )
    if config.vision is not None:
        raise ValueError("[vision]: objective.teacher reads texts alone; drop one")


def check_scores(config: "TrainConfig") -> None:
    """Refuse what wants logits, or rows in one piece, of a model that gives one number."""
    objective, record = config.objective, config.adapter.record
    if not objective.record.scores:
        return
    asked = f'objective.kind = "{objective.kind}"'
    if not (record.has_products or record.trains_all):
        raise ValueError(
            f'adapter.kind = "{config.adapter.kind}": {asked} trains a head of its own; use '
            '"lora", "dora" or "none"'
        )
    if record.trains_all and config.adapter.layers is not None:
        raise ValueError(
            f'adapter.layers = "{config.adapter.layers}": {asked} trains a head behind all layers; '
            'drop it, or use kind = "lora"'
        )
    if config.rejected_sampling is not None:
        raise ValueError(f"[rejected_sampling]: {asked} generates nothing; drop the table")
    if config.sequence_parallel > 1:
        raise ValueError(
            f"sequence_parallel = {config.sequence_parallel}: {asked} needs the last token of "
            "every answer on one rank; use more pipeline_stages or replicas"
        )


def check_baseline(config: "TrainConfig") -> None:
    """Answers to other prompts of a micro-batch need others, each in a sequence of its own."""
    objective = config.objective
    if not objective.has_baseline:
        return
    asked = f'objective.kind = "{objective.kind}" with loss = "{objective.loss}"'
    if config.micro_batch_size < 2:
        raise ValueError(
            f"micro_batch_size = {config.micro_batch_size}: {asked} compares with answers to the "
            "other prompts of a micro-batch; set 2 or more"
        )
    if config.loader.pack != "none":
        raise ValueError(
            f'loader.pack = "{config.loader.pack}": {asked} puts prompts before answers to other '
            'ones, whose lengths are not known in packing; set "none"'
        )


def check_rejected_sampling(config: "TrainConfig") -> None:
    """Answers go once through each stage."""
    if config.rejected_sampling is not None and config.schedule != "1f1b":
        raise ValueError(
            f'schedule = "{config.schedule}" does not go with [rejected_sampling], whose answers '
            'go once through each stage; set "1f1b"'
        )


def check_evaluation(config: "TrainConfig") -> None:
    """Refuse options that need an evaluation loss where there is none, and names given twice."""
    for key, wished in (
        ("evaluation.patience", config.evaluation.patience),
        ("checkpoint.keep_best", config.checkpoint.keep_best),
    ):
        if wished and not config.evaluation_datasets:
            raise ValueError(
                f"{key} needs an evaluation loss; add [[evaluation_datasets]] or remove it"
            )
    check_prompts(config)
    names = config.evaluation_names()
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f'two evaluation datasets are named "{name}"; give each its own `name`'
            )


def check_vision(config: "TrainConfig") -> None:
    """Refuse what does not go with pictures, and keys of pictures without `[vision]`."""
    adapter = config.adapter
    if config.vision is None:
        for key, value in (("vision_stages", config.vision_stages), ("vision", adapter.vision)):
            if value:
                name = key if key == "vision_stages" else f"adapter.{key}"
                raise ValueError(f"{name} = {value} needs the table [vision]; add it, or drop this")
        return
    if adapter.vision and not adapter.record.has_products:
        raise ValueError(
            f'adapter.vision is of adapters, and adapter.kind = "{adapter.kind}"; set vision.train'
        )
    if config.vision.train and not adapter.record.trains_all:
        raise ValueError(
            f'vision.train trains the tower itself, and adapter.kind = "{adapter.kind}" freezes '
            "it; set adapter.vision = true"
        )
    if config.vision_stages >= config.pipeline_stages:
        raise ValueError(
            f"vision_stages = {config.vision_stages} leaves no stage for the decoder layers; raise "
            "pipeline_stages"
        )
    for key, found, remedy in not_with_pictures(config):
        if found:
            raise ValueError(f"[vision] does not go with {key}; {remedy}")


def not_with_pictures(config: "TrainConfig") -> list[tuple[str, bool, str]]:
    """Return what has no place for pictures: the key, whether it is asked for, and a remedy."""
    adapter, loader = config.adapter, config.loader
    return [
        ("sequence_parallel", config.sequence_parallel > 1, "use more pipeline_stages"),
        ("tensor_parallel", config.tensor_parallel > 1, "use more pipeline_stages"),
        ("sequence_slices", config.sequence_slices > 1, "use more micro-batches"),
        ("tiles", config.tiles > 1, 'use activation_checkpointing = "full" without it'),
        ("half_layers", config.half_layers, "use whole layers"),
        (
            'schedule = "interleaved"',
            config.schedule == "interleaved",
            'set "1f1b"',
        ),
        (
            f'adapter.kind = "{adapter.kind}"',
            adapter.record.by_class
            or (adapter.record.trains_base and not adapter.record.trains_all),
            'use "lora", "dora" or "none"',
        ),
        ("adapter.path", adapter.path is not None, "start a new adapter"),
        (
            "[rejected_sampling]",
            config.rejected_sampling is not None,
            "prompts to sample from hold no pictures",
        ),
        (
            f'objective.kind = "{config.objective.kind}"',
            config.objective.record.scores,
            "a score of pictures is not trained",
        ),
        ("relora.every_steps", bool(config.relora.every_steps), "drop one"),
        (
            "[model_overrides]",
            config.model_overrides != type(config.model_overrides)(),
            "change config.json",
        ),
        (
            'loader.overlong = "truncate"',
            loader.pack != "none" and loader.overlong == "truncate",
            'set "error" or "drop"',
        ),
    ]


def check_prompts(config: "TrainConfig") -> None:
    """Refuse prompts where nothing can be generated."""
    evaluation, objective = config.evaluation, config.objective
    for key in ("max_new_tokens", "temperature"):
        if key in evaluation.model_fields_set and not evaluation.asks:
            raise ValueError(
                f"evaluation.{key} has no meaning without evaluation.prompts or prompt_rows; "
                "drop it"
            )
    if not evaluation.asks:
        return
    if evaluation.prompt_rows and not config.evaluation_datasets:
        raise ValueError(
            "evaluation.prompt_rows needs [[evaluation_datasets]], whose rows it takes"
        )
    refusals = [
        (objective.record.scores, f'objective.kind = "{objective.kind}"', "which writes no text"),
        (config.schedule != "1f1b", f'schedule = "{config.schedule}"', 'use "1f1b"'),
        (config.sequence_parallel > 1, "sequence_parallel", "which cuts rows"),
        (config.sequence_slices > 1, "sequence_slices", "which cuts rows"),
        (config.tensor_parallel > 1, "tensor_parallel", "which cuts weights"),
        (config.vision is not None, "[vision]", "whose pictures a prompt cannot hold"),
        (config.adapter.record.by_class, f'adapter.kind = "{config.adapter.kind}"', "by class"),
    ]
    for is_wrong, key, reason in refusals:
        if is_wrong:
            raise ValueError(f"evaluation.prompts do not go with {key}, {reason}; drop one")
