"""The tuning methods of `[adapter]`, one record each, with all that the rules of a config ask.

What a method does to a model is its class of the same name in `headrace.trainer.adapters`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TuningRecord:
    """One kind of adapter, or of training without.

    Attributes:
        description: for the config reference.
        unused: keys of `[adapter]` that would be passed over.
        trains_base: trains the model's own weights, and writes a whole model.
        trains_all: all of these, unless the config names some.
        has_products: adapters are products BA beside frozen weights, in PEFT's format.
        restarts: adapters can be added to their weights and start anew.
        takes_over: adapters can start from a part of the frozen weights, taken out of these.
        adapts_parameters: adapters can be put on fused weights, `target_parameters`.
        has_parts: works on weights that are cut among processes.
        by_class: tokens are treated by the class of their document; adapters are held in float32.
    """

    description: str
    unused: tuple[str, ...] = ()
    trains_base: bool = False
    trains_all: bool = False
    has_products: bool = False
    restarts: bool = False
    takes_over: bool = False
    adapts_parameters: bool = False
    has_parts: bool = False
    by_class: bool = False


TUNING_METHODS = {
    "lora": TuningRecord(
        "low-rank adapters over frozen weights.",
        has_products=True,
        restarts=True,
        takes_over=True,
        adapts_parameters=True,
        has_parts=True,
    ),
    "dora": TuningRecord("these with magnitudes apart.", has_products=True, has_parts=True),
    "control": TuningRecord(
        "directions along which layers are stretched, or shrunk for rows of class -1.",
        unused=("modules_to_save", "target_parameters"),
        by_class=True,
    ),
    "blocks": TuningRecord(
        "new decoder layers between the frozen ones.",
        unused=("modules_to_save", "target_parameters", "layers"),
        trains_base=True,
    ),
    "none": TuningRecord(
        "train the weights themselves.",
        unused=("modules_to_save", "target_parameters"),
        trains_base=True,
        trains_all=True,
        has_parts=True,
    ),
}
DESCRIPTION = " ".join(f'`"{kind}"`: {it.description}' for kind, it in TUNING_METHODS.items())
