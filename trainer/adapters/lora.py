"""LoRA and DoRA: low-rank adapters beside frozen weights, in PEFT's modules and format."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.adapter_config import AdapterConfig
from headrace.trainer.adapters.initial_values import initial_values, principal_part
from headrace.trainer.adapters.method import TuningMethod
from headrace.trainer.adapters.names import (
    PEFT_PREFIX,
    ROWS,
    base_name,
    file_name,
    is_whole,
    lora_layers,
    names_of,
    rows_name,
)
from headrace.trainer.adapters.peft_settings import write_overrides
from headrace.trainer.adapters.starting_adapter import StartingAdapter
from headrace.trainer.adapters.targets import (
    check_targets,
    lora_config,
    targets_by_weight,
)
from headrace.trainer.adapters.token_rows import RowAdapter, add_token_rows, row_adapters
from headrace.trainer.adapters.whole_names import whole_names
from headrace.trainer.adapters.wrapping import add_adapter
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.architecture.model_directory import model_directory
from headrace.trainer.architecture.model_writer import (
    PROCESSOR_FILES,
    copy_files,
    save_tensors,
    write_tokenizer,
)
from headrace.trainer.architecture.weight_names import renamed_at_loading

TENSORS_NAME = "adapter_model.safetensors"


class LoraTuning(TuningMethod):
    """Adapters BA beside frozen weights."""

    prefix = PEFT_PREFIX
    peft: LoraConfig
    magnitudes = False

    def __init__(
        self,
        config: AdapterConfig,
        architecture: Architecture,
        plain: nn.Module,
        model: str,
        seed: int,
    ) -> None:
        super().__init__(config, architecture, plain, model, seed)
        self.start: StartingAdapter | None = None
        self.shared: str | None = None  # frozen embedding that a tied head uses
        if config.path is not None:
            names = whole_names(model_directory(model), architecture)
            self.start = StartingAdapter(Path(config.path), plain, names)
            config = self.config = self.start.resolved(config)
        vision, layers = architecture.vision, architecture.layers
        self.peft = lora_config(config, plain, model, layers, dora=self.magnitudes, vision=vision)
        self.tokens = trained_tokens(config, architecture)
        family = architecture.family
        self.embedding, self.head = f"{family.embedding}.weight", f"{family.head}.weight"
        self.by_weight = targets_by_weight(config, plain, dora=self.magnitudes)

    def install(self, model: nn.Module) -> nn.Module:
        wrapped = add_adapter(model, self.peft, self.by_weight)
        check_targets(self.config, self.plain, wrapped)
        if self.tokens:
            family = self.architecture.family
            paths = [PEFT_PREFIX + path for path in (family.embedding, family.head)]
            add_token_rows(wrapped, paths, self.tokens)
        if self.start is not None:
            tied = rows_name(PEFT_PREFIX, self.architecture.family.head)
            absent = {file_name(tied)} if self.architecture.tied else set()
            self.start.check(wrapped, (self.embedding, self.head), absent)
            names = [name for name in names_of(wrapped) if base_name(name) == self.embedding]
            self.shared = next((n for n in names if not is_whole(n)), None)
        head = wrapped.get_submodule(PEFT_PREFIX + self.architecture.family.head)
        if self.architecture.tied and isinstance(head, LoraLayer) and self.config.takes_over:
            raise ConfigError(
                f'adapter.init = "{self.config.init}": the head is tied to the embedding, and '
                "nothing can be taken out of one alone; leave it out of target_modules"
            )
        return wrapped

    def check_result(self) -> None:
        targets = self.peft.target_modules or ()
        adapted = [
            f"{name}.weight"
            for name, part in self.plain.named_modules()
            if isinstance(part, nn.Linear) and check_target_module_exists(self.peft, name)
        ] + [f"{name}.weight" for name in self.by_weight]
        lost = renamed_at_loading(self.plain, adapted)
        if lost:
            raise ConfigError(
                f"adapter.target_modules = {sorted(targets)}: PEFT would lose the adapter on "
                f"{lost[0].removesuffix('.weight')} and {len(lost) - 1} others when it loads them, "
                "because transformers renames them; leave them out"
            )

    def adapters(self, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
        return chain(lora_layers(modules), row_adapters(modules))

    def taking_over(self, modules: Mapping[str, nn.Module]) -> dict[int, tuple[str, nn.Module]]:
        if not self.config.takes_over:
            return {}
        return {id(layer.get_base_layer()): (name, layer) for name, layer in lora_layers(modules)}

    def initial_values(self, name: str, adapted: nn.Module) -> dict[str, Tensor]:
        if self.start is not None:
            return self._started_values(name, adapted)
        if isinstance(adapted, RowAdapter):
            return adapted.initial_values()
        assert isinstance(adapted, LoraLayer)
        return initial_values(name, adapted, self.config.init, self.seed)

    def started(self, name: str) -> Tensor | None:
        if self.start is None:
            return None
        value = self.start.value(name)
        if value is None and self.architecture.tied and base_name(name) == self.head:
            return None if self.shared is None else self.start.value(self.shared)
        return value

    def _started_values(self, name: str, layer: nn.Module) -> dict[str, Tensor]:
        """Return an adapter's values in the file that training starts from."""
        assert self.start is not None
        if isinstance(layer, RowAdapter) and self.architecture.tied:
            name = f"{PEFT_PREFIX}{self.architecture.family.embedding}.token_adapter"
        parts = [part for part, _ in layer.named_parameters() if part.startswith(("lora_", ROWS))]
        values = {part: self.start.value(f"{name}.{part}") for part in parts}
        return {part: value for part, value in values.items() if value is not None}

    @property
    def compensates(self) -> bool:
        return self.config.takes_over and self.config.init == "loftq"

    def compensating_values(self, name: str, adapted: nn.Module, lost: Tensor) -> dict[str, Tensor]:
        assert isinstance(adapted, LoraLayer)
        return principal_part(name, adapted, lost, self.seed)

    def keeps(self, part: str) -> bool:
        return self.config.takes_over and part.startswith(("lora_A", "lora_B"))

    def write(self, directory: Path, tensors: dict[str, Tensor], width: int, base: Path) -> None:
        """Write one file with its config, as PEFT expects.

        Over a multimodal checkpoint, of which a text model is part, names are those of the whole.
        """
        names = whole_names(base, self.architecture)
        paths = {
            name.partition(".lora_")[0].removeprefix(PEFT_PREFIX)
            for name in tensors
            if ".lora_" in name and ".experts." not in name
        }
        tensors = {names.outward(name): value for name, value in tensors.items()}
        save_tensors(tensors, directory / TENSORS_NAME, {"format": "pt"})
        config = as_plain_lora(self.peft, width)
        config.inference_mode = True
        if self.by_weight:  # PEFT has no dropout on weights that are named; nor is any left to do
            config.lora_dropout = 0.0
        if names.prefixes and config.target_modules:  # in full: other parts have such names too
            config.target_modules = {names.outward(path) for path in paths - set(self.by_weight)}
            config.layers_to_transform = None
            parameters = config.target_parameters or ()
            config.target_parameters = [names.outward(name) for name in parameters] or None
        for key in ("target_modules", "exclude_modules", "target_parameters"):
            if isinstance(getattr(config, key), set):  # whose order is another in each process
                setattr(config, key, sorted(getattr(config, key)))
        if self.tokens:
            config.trainable_token_indices = self._tokens_by_module()
        config.save_pretrained(str(directory))
        if self.architecture.vision is not None:
            copy_files(base, directory, PROCESSOR_FILES)
        write_overrides(directory, self.architecture.overrides)
        write_tokenizer(base, directory, self.architecture.overrides.new_tokens)

    def _tokens_by_module(self) -> dict[str, list[int]]:
        """Return the trained rows as PEFT lists them; a tied head has the embedding's."""
        family = self.architecture.family
        paths = [family.embedding] if self.architecture.tied else [family.embedding, family.head]
        return {path.rpartition(".")[2]: self.tokens for path in paths}


class DoraTuning(LoraTuning):
    """LoRA with the magnitudes of the weights' columns trained apart."""

    magnitudes = True

    def measuring(self, modules: Mapping[str, nn.Module]) -> dict[int, tuple[str, nn.Module]]:
        if self.start is not None:
            return {}
        return {id(layer.get_base_layer()): (name, layer) for name, layer in lora_layers(modules)}


def trained_tokens(config: AdapterConfig, architecture: Architecture) -> list[int]:
    """Return the tokens whose rows are trained: those of the config, or else new ones."""
    embedding = architecture.family.embedding.rpartition(".")[2]
    chosen: Sequence[int] = config.trainable_token_indices
    if not chosen and architecture.growth and embedding not in config.modules_to_save:
        chosen = architecture.growth.tokens
    return sorted(set(chosen))


def as_plain_lora(config: LoraConfig, times: int) -> LoraConfig:
    """The config for adapters that were made several times as wide, at the same scale."""
    factor = math.sqrt(times) if config.use_rslora else times
    wider = copy.deepcopy(config)
    wider.r, wider.lora_alpha = times * config.r, factor * config.lora_alpha
    wider.rank_pattern = {key: times * rank for key, rank in config.rank_pattern.items()}
    wider.alpha_pattern = {key: factor * alpha for key, alpha in config.alpha_pattern.items()}
    return wider
