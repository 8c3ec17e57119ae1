"""Names and layouts of weights in files, against those of transformers' modules.

transformers keeps a table of renamings and of conversions (experts that are stored one by one and
held as one tensor, for example). This is the only file that touches it; read against transformers
5.23, `core_model_loading.py` and `conversion_mapping.py`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from headrace.trainer.families.score import is_scored

# where multimodal checkpoints keep their language model -> where it lies on its own
TEXT_PREFIXES = (
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"^language_model\.model\."), "model."),
    (re.compile(r"^language_model\."), ""),
)

# what checkpoints hold beside a model's weights: frequencies and masks that are computed now,
# layers that predict further tokens
EXTRAS = re.compile(
    r"rotary_emb\.(original_)?inv_freq$|\.(attn|attention|self_attention)\.(masked_)?bias$"
    r"|(^|\.)(mtp|nextn)\w*\.|^rope_freqs\.weight$|rope_factors_(long|short)\.weight$"
)
FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass
class Source:
    """The stored tensors that a parameter is made of."""

    names: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)  # of each name, in the converter's terms
    converter: Any = None  # None: the one stored tensor is the parameter


class CheckpointNames:
    """Map from each parameter of a model to the stored tensors to read for it.

    Args:
        model: on the meta device, without adapters.
        stored: the names in the files.
    """

    def __init__(self, model: nn.Module, stored: Iterable[str]) -> None:
        self.model = model
        self.sources: dict[str, Source] = defaultdict(Source)
        self.unread: list[str] = []  # stored tensors that no parameter is made of
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {
            pattern: converter
            for converter in self._converters
            for pattern in converter.source_patterns
        }
        known = model.state_dict()
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = self._target(name, known)
            if target is None:
                self.unread.append(name)
                continue
            source = self.sources[target]
            source.names.append(name)
            source.patterns.append(pattern or name)
            source.converter = by_pattern[pattern] if pattern is not None else None

    def _target(self, name: str, known: dict[str, Tensor]) -> tuple[str | None, str | None]:
        """The parameter that a stored tensor belongs to, and the converter's pattern for it."""
        for candidate in (name, *text_names(name)):
            target, pattern = rename_source_key(
                candidate, self._renamings, self._converters, self.model.base_model_prefix, known
            )
            if target in known:
                return target, pattern
            if candidate in known:
                return candidate, None
        return None, None

    def unexpected(self) -> list[str]:
        """List the stored tensors that nothing is made of, less those that are known to be beside a
        model of this kind: what transformers passes over, and other parts of multimodal models.
        """
        read = [name for source in self.sources.values() for name in source.names]
        is_part = any(text_names(name) for name in read)  # of a multimodal checkpoint
        return [
            name
            for name in self.unread
            if (text_names(name) or not is_part) and not is_known_extra(self.model, name)
        ]

    def __contains__(self, parameter: str) -> bool:
        return parameter in self.sources

    def stored(self, parameter: str) -> list[str]:
        """List the stored tensors to read for a parameter, in order."""
        return self.sources[parameter].names

    def is_as_stored(self, parameter: str) -> bool:
        """Return whether a parameter is a stored tensor as it is."""
        return self.sources[parameter].converter is None

    def of_some(self, parameter: str, count: int, start: int, stop: int) -> list[str]:
        """List the stored tensors of some experts, in order; of all where they lie together.

        Args:
            count: of all experts.
        """
        source = self.sources[parameter]
        by_pattern: dict[str, list[str]] = defaultdict(list)
        for name, pattern in zip(source.names, source.patterns, strict=True):
            by_pattern[pattern].append(name)
        if source.converter is None or any(len(of) != count for of in by_pattern.values()):
            return source.names
        chosen = {name for names in by_pattern.values() for name in names[start:stop]}
        return [name for name in source.names if name in chosen]

    def convert(self, parameter: str, tensors: dict[str, Tensor]) -> Tensor:
        """The parameter's value, or that of some experts, from stored tensors in their order."""
        source = self.sources[parameter]
        if source.converter is None:
            (tensor,) = tensors.values()
            return tensor
        converter = deepcopy(source.converter)
        for name, pattern in zip(source.names, source.patterns, strict=True):
            if name in tensors:
                converter.add_tensor(parameter, name, pattern, tensors.pop(name))
        tensors.clear()
        made = converter.convert(parameter, model=self.model, config=self.model.config)
        value = made[parameter]
        return value[0] if isinstance(value, list) else value


def renamed_at_loading(model: Any, names: Iterable[str]) -> list[str]:
    """Return those of a model's own names that transformers' renaming of checkpoints would change.

    PEFT passes an adapter's names through it, and leaves out what then has no place. Names that
    only lose a prefix are found again.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    renamed = {name: rename_source_key(name, renamings, [])[0] for name in names}
    return [name for name, new in renamed.items() if not name.endswith(new)]


def text_names(name: str) -> list[str]:
    """Names that a tensor of a multimodal checkpoint may have in the language model alone."""
    return [new + pattern.sub("", name) for pattern, new in TEXT_PREFIXES if pattern.match(name)]


def kept_in_float32(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Return what tells, by its name, whether transformers loads a tensor in float32 although the
    model is loaded in `dtype` (`_keep_in_fp32_modules`).
    """
    patterns = list(model._get_dtype_plan(dtype))
    if not patterns:
        return lambda name: False
    found, *_ = build_glob_alternation(patterns)
    return lambda name: found.search(name) is not None


def may_be_absent(model: Any, name: str) -> bool:
    """Return whether transformers loads checkpoints that lack a tensor without a word."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def as_stored(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters under the names and in the layout that checkpoints of this model have.

    Args:
        tensors: whole layers; a conversion may take several parameters or give several tensors.
    """
    converted: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return converted


def is_known_extra(model: Any, name: str) -> bool:
    """Return whether checkpoints of a model hold a tensor that it does not call for."""
    patterns = [EXTRAS, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    if any(re.search(pattern, own) for pattern in patterns for own in (name, *text_names(name))):
        return True
    if is_scored(model) and name.rpartition(".")[0] in ("lm_head", "embed_out", "output"):
        return True
    config, layer = model.config.get_text_config(), LAYER.search(name)
    further = max(getattr(config, key, None) or 0 for key in FURTHER_LAYERS)
    count = getattr(config, "num_hidden_layers", 0)
    return layer is not None and count <= int(layer[1]) < count + further
