"""The tuning methods by `adapter.kind`."""

from headrace.schemas.train.adapter_config import AdapterConfig
from headrace.trainer.adapters.blocks import BlockTuning
from headrace.trainer.adapters.control import ControlTuning
from headrace.trainer.adapters.full import FullTuning
from headrace.trainer.adapters.lora import DoraTuning, LoraTuning
from headrace.trainer.adapters.method import TuningMethod

METHODS: dict[str, type[TuningMethod]] = {
    "lora": LoraTuning,
    "dora": DoraTuning,
    "control": ControlTuning,
    "blocks": BlockTuning,
    "none": FullTuning,
}


def method_of(config: AdapterConfig) -> type[TuningMethod]:
    """Return the class of the method that a config names."""
    return METHODS[config.kind]
