"""One old key or flag and what stands for it here: the table behind importer and docs page."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from headrace.schemas.errors import ConfigError

Values = Mapping[str, Any]
Converter = Callable[[Any, Values], dict[str, Any]]
KEEP_ALL = 1_000_000


class NoEquivalentError(Exception):
    """A value that has no equivalent, though others of its key have; the text says why.

    Attributes:
        instead: what is written all the same, which the text speaks of.
    """

    def __init__(self, reason: str, instead: Mapping[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.instead = dict(instead or {})


@dataclass(frozen=True)
class Equivalent:
    """One old key.

    Attributes:
        old: the key as the old system writes it; tables with dots, lists of tables with `[]`.
        new: our keys, as `train.optimizer.lr` or `prepare.sources.path`, or `headrace` commands.
        note: how they differ; where `new` is empty, why there is none.
        convert: the old value, beside all old values, to values of `new`. None: nothing is written,
            because the key is read elsewhere or is about a command.
        default: the old system's, where it differs from ours; None: as ours, or the same effect.
        neutral: values that ask for nothing, so that nothing is said about them.
    """

    old: str
    new: tuple[str, ...] = ()
    note: str = ""
    convert: Converter | None = None
    default: Any = None
    neutral: tuple[Any, ...] = (False, None, "")


@dataclass(frozen=True)
class OldSystem:
    """One system.

    Attributes:
        title: heading of its table.
        fixed: what the old system does always, as values of our keys.
        rows: every key of its own.
        shared: keys that it has from a library; its own rows of the same name count.
    """

    title: str
    rows: tuple[Equivalent, ...]
    fixed: Mapping[str, Any]
    fixed_note: str = ""
    shared: tuple[Equivalent, ...] = ()

    def own_keys(self) -> set[str]:
        """Return the keys that are not a library's."""
        return {row.old for row in self.rows}

    def by_key(self) -> dict[str, Equivalent]:
        """Return the row of each key."""
        return {row.old: row for row in (*self.shared, *self.rows)}


def same(old: str, new: str, note: str = "", default: Any = None) -> Equivalent:
    """The same value under our name."""
    return Equivalent(old, (new,), note, lambda value, _: {new: value}, default)


def number(old: str, new: str, note: str = "", default: Any = None) -> Equivalent:
    """The same number under our name, where ours has a fraction."""
    return Equivalent(old, (new,), note, lambda value, _: {new: float(value)}, default)


def choice(
    old: str, new: str, words: Mapping[Any, Any], note: str = "", default: Any = None
) -> Equivalent:
    """A word under our name; None leaves our key alone."""

    def convert(value: Any, _: Values) -> dict[str, Any]:
        if value not in words:
            raise NoEquivalentError(f"only {', '.join(map(str, words))} have an equivalent")
        return {} if words[value] is None else {new: words[value]}

    shown = ", ".join(f"`{o}`: `{n}`" for o, n in words.items() if n is not None and n != o)
    text = ". ".join(part for part in (shown, note) if part)
    return Equivalent(old, (new,), text, convert, default)


def exact_choice(
    old: str,
    new: str,
    words: Mapping[str, str],
    near: Mapping[str, tuple[str, str]] | None = None,
    default: str | None = None,
) -> Equivalent:
    """A word under our name, where our default would train something else at the same rate.

    Words that are in neither table end the import in a ConfigError.

    Args:
        near: words whose equivalent differs, with how; written, and reported.
    """
    near = near or {}

    def convert(value: Any, _: Values) -> dict[str, Any]:
        if value in near:
            ours, difference = near[value]
            raise NoEquivalentError(f'"{ours}" is written: {difference}', {new: ours})
        if value not in words:
            known = ", ".join([*words, *near])
            raise ConfigError(
                f"{old}: {value!r}: there is none here, and any other would train something else "
                f"at the same rate; choose one of {known}"
            )
        return {new: words[value]}

    parts = [", ".join(f"`{o}`: `{n}`" for o, n in words.items() if n != o)]
    parts += [f"`{o}`: `{n}`, {difference}" for o, (n, difference) in near.items()]
    text = "; ".join([*filter(None, parts), "others are refused"])
    return Equivalent(old, (new,), text, convert, default)


def computed(
    old: str,
    new: str | Iterable[str],
    convert: Converter,
    note: str = "",
    default: Any = None,
) -> Equivalent:
    """Values of our keys worked out from the old one."""
    return Equivalent(old, (new,) if isinstance(new, str) else tuple(new), note, convert, default)


def elsewhere(old: str, new: str | Iterable[str], note: str = "") -> Equivalent:
    """A key that the sources are built from, or something that is given on the command line."""
    return Equivalent(old, (new,) if isinstance(new, str) else tuple(new), note)


def none(old: str, reason: str, *neutral: Any) -> Equivalent:
    """No equivalent, and why."""
    return Equivalent(old, note=reason, neutral=(False, None, "", *neutral))


def refused(old: str, reason: str) -> Equivalent:
    """Give a row to a key that would train something else if it were passed over.

    Its import ends in a ConfigError.
    """

    def convert(value: Any, _: Values) -> dict[str, Any]:
        if value:
            raise ConfigError(f"{old}: {value!r}: {reason}; remove the key to train without it")
        return {}

    return Equivalent(old, note=f"refused: {reason}", convert=convert)


# --- conversions that several old systems share ---


def warmup(epochs: str) -> Converter:
    """Steps, or below 1 a share of one epoch, which ours counts of all steps.

    Args:
        epochs: the old key of the number of epochs.
    """

    def convert(value: float, values: Values) -> dict[str, Any]:
        if value >= 1 or not value:
            return {"train.scheduler.warmup_steps": int(value)}
        return {"train.scheduler.warmup_fraction": value / max(1, values.get(epochs, 1))}

    return convert


def keep(value: int, _: Values) -> dict[str, Any]:
    """Convert a number of checkpoints to keep; -1 is all."""
    return {"train.checkpoint.keep_last": value if value > 0 else KEEP_ALL}


def if_positive(new: str) -> Converter:
    """A number; 0 and less ask for nothing."""

    def convert(value: int, _: Values) -> dict[str, Any]:
        return {new: value} if value > 0 else {}

    return convert


def share_of_epoch(new: str) -> Converter:
    """Return a converter of "so many times an epoch" to a fraction of an epoch; 0 is never."""

    def convert(value: float, _: Values) -> dict[str, Any]:
        return {new: 1 / value} if value > 0 else {}

    return convert


def activation_checkpointing(value: Any, _: Values) -> dict[str, Any]:
    """A switch, or the word for inputs in host memory."""
    if value in ("cpu", "unsloth", "offload"):
        return {"train.activation_checkpointing": "full", "train.activation_offload": True}
    return {"train.activation_checkpointing": "full" if value else "none"}
