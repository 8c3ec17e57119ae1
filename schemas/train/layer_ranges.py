"""Layer lists as people write them: `0:15,20`."""

from headrace.schemas.errors import ConfigError


def parse_layers(text: str) -> list[int]:
    """`"0:2,5"` -> [0, 1, 2, 5]: single layers and ranges whose ends both count, in order.

    Raises:
        ValueError: not such a list.
    """
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition(":")
        if not first.isdecimal() or not (last or first).isdecimal() or part.strip().endswith(":"):
            raise ValueError(f'"{text}" is no list of layers; write for example "0:15,20"')
        if int(last or first) < int(first):
            raise ValueError(f'"{text}": the range {part.strip()} ends before it starts')
        layers |= set(range(int(first), int(last or first) + 1))
    return sorted(layers)


def recomputed_layers(setting: str | int, layers: int) -> frozenset[int]:
    """Return the layers that `activation_checkpointing` selects.

    Raises:
        ConfigError: layers that the model does not have.
    """
    if setting == "none":
        return frozenset()
    if setting in ("full", "selective", "attention"):
        return frozenset(range(layers))
    if isinstance(setting, int):
        return frozenset(range(setting - 1, layers, setting))
    chosen = parse_layers(setting)
    if chosen[-1] >= layers:
        raise ConfigError(
            f'activation_checkpointing = "{setting}": the model has layers 0 to {layers - 1}'
        )
    return frozenset(chosen)
