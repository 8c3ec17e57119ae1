"""Text from outside, read and parsed within limits, and as it may be shown.

Whatever is wrong with it is one line.
"""

import json
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 1 << 28  # of a file that is parsed as a whole; the largest tokenizers have 40 MB
MOST_YAML_BYTES = 1 << 20  # PyYAML reads 0.2 MB a second
MOST_NESTED = 100  # lists and tables in each other; what follows is recursive
MOST_NODES = 100_000  # of YAML, with what its aliases stand for
LARGEST = 1 << 64
PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {127: "\u2421"}
PICTURES |= dict.fromkeys([*range(128, 160), *range(0xD800, 0xE000)], "\ufffd")
IN_ROWS = {code: picture for code, picture in PICTURES.items() if chr(code) not in "\n\t"}
WRONG_VALUES = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError)


class OutsideTextError(ValueError):
    """The problem of a text, without the name of its file; `line` where it is known, from 1."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(" ".join(problem.split()))
        self.line = line


def read_text(path: Path, limit: int = MOST_BYTES, *, streams: bool = False) -> str:
    """Return a file's text without a byte order mark.

    Args:
        streams: whether pipes are read as well, as a shell's `<(...)` gives them.

    Raises:
        OutsideTextError: no file, too large, or no UTF-8; OSError: it cannot be opened.
    """
    content = read_bytes(path, limit, streams=streams)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise OutsideTextError(f"byte 0x{content[error.start]:02x} is no UTF-8", line) from None


def read_bytes(path: Path, limit: int = MOST_BYTES, *, streams: bool = False) -> bytes:
    """Return the bytes of a file that has no more than `limit`. Raises as `read_text`."""
    with open(os.open(path, os.O_RDONLY | (0 if streams else os.O_NONBLOCK)), "rb") as file:  # noqa: PTH123
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode) and not (streams and stat.S_ISFIFO(mode)):
            raise OutsideTextError("is no file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OutsideTextError(f"has more than {limit} bytes")
    return content


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text says.

    Raises:
        OutsideTextError: it is broken, too deep, or holds what is no text.
    """
    try:
        value = json.loads(text.removeprefix("\ufeff") if isinstance(text, str) else text)
    except json.JSONDecodeError as error:
        raise OutsideTextError(f"not valid JSON ({error})", error.lineno) from None
    except (RecursionError, ValueError) as error:
        raise OutsideTextError(f"not valid JSON ({error})") from None
    check_tree(value)
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Return what a TOML text says. Raises as `parse_json`."""
    try:
        values = tomllib.loads(text)
    except (RecursionError, ValueError) as error:
        raise OutsideTextError(f"not valid TOML: {error}") from None
    check_tree(values, LARGEST)
    return values


def parse_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """Return what a YAML text says, and its nodes, which know their lines.

    Raises:
        OutsideTextError: it is broken or too deep, or its aliases stand for too much.
    """
    try:
        loader = BoundedLoader(text)
        tree = loader.get_single_node()
        if tree is None:
            return None, None
        Expansion().measure(tree)
        value = loader.construct_document(tree)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise OutsideTextError(f"not valid YAML: {error.problem}", line) from None
    except OutsideTextError:
        raise
    except (yaml.YAMLError, RecursionError, *WRONG_VALUES) as error:
        raise OutsideTextError(f"not valid YAML: {error}") from None
    check_tree(value, LARGEST)
    return value, tree


class BoundedLoader(yaml.SafeLoader):
    """PyYAML's safe loader, up to a depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Read one node; its own nodes are read within."""
        self.depth += 1
        if self.depth > MOST_NESTED:
            raise OutsideTextError(f"nested more than {MOST_NESTED} deep")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class Expansion:
    """The number of nodes that a YAML tree has when each alias is what it stands for."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.open: set[int] = set()

    def measure(self, node: yaml.Node) -> int:
        """Return the nodes below and with `node`.

        Raises:
            OutsideTextError: too many, too deep, or it holds itself.
        """
        if id(node) in self.sizes:
            return self.sizes[id(node)]
        line = node.start_mark.line + 1
        if id(node) in self.open:
            raise OutsideTextError("an alias stands for what holds it", line)
        if len(self.open) == MOST_NESTED:
            raise OutsideTextError(f"nested more than {MOST_NESTED} deep", line)
        self.open.add(id(node))
        size = 1 + sum(map(self.measure, children(node)))
        self.open.remove(id(node))
        if size > MOST_NODES:
            raise OutsideTextError(f"its aliases stand for more than {MOST_NODES} values", line)
        self.sizes[id(node)] = size
        return size


def children(node: yaml.Node) -> list[yaml.Node]:
    """Return the nodes directly in a node."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def check_tree(value: object, beyond: int | None = None) -> None:
    """Refuse parsed values that later code cannot take, however they are nested.

    Args:
        beyond: whole numbers from which on they are refused; JSON of tokenizers has some of 10^30.

    Raises:
        OutsideTextError: too deep, a string that is no Unicode text, a number of too many digits.
    """
    waiting: list[tuple[object, int]] = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        if isinstance(part, str) and not part.isascii():
            check_string(part)
        elif beyond is not None and isinstance(part, int) and abs(part) >= beyond:
            raise OutsideTextError("a whole number is beyond 64 bits")
        elif isinstance(part, dict | list):
            if part and depth == MOST_NESTED:
                raise OutsideTextError(f"nested more than {MOST_NESTED} deep")
            inner = [*part, *part.values()] if isinstance(part, dict) else part
            waiting += [(child, depth + 1) for child in inner]


def check_string(text: str) -> None:
    """Refuse half of a surrogate pair. Raises as `check_tree`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise OutsideTextError(f"a string holds half a surrogate pair, {half!r}") from None


def json_type(value: object) -> str:
    """A value's type in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def visible(text: str) -> str:
    """Return a line without control characters, which terminals obey: each as its picture.

    Halves of surrogate pairs, which no file takes, are replaced as well.
    """
    return text.translate(PICTURES)


def visible_lines(text: str) -> str:
    """Return a text of several lines, in which line ends and tabs stay."""
    return text.translate(IN_ROWS)


def shown(name: object, limit: int = 80) -> str:
    """Return a value from elsewhere as it can stand in a line: escaped, and cut."""
    text = ascii(name)
    return text if len(text) <= limit else f"{text[:limit]}..."
