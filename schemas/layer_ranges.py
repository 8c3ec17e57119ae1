"""Layer lists as people write them: `0:15,20`."""


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
