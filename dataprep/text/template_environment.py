"""The sandbox that chat templates are compiled and rendered in, and the marks that they leave."""

import datetime
import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from headrace.dataprep.text.rendering import Rendering, Span
from headrace.schemas.errors import DataError

LARGEST = 1 << 24  # characters of a text that an operator makes
LARGEST_NUMBER = 1 << 14  # bits
LARGEST_WIDTH = 10_000  # of a padded text
RESERVED = "\ufdd0\ufdd1\ufdd2\ufdd3"  # noncharacters: Unicode keeps them for internal use
MARK = re.compile("\ufdd0|\ufdd1|\ufdd2(/|\\d*)\ufdd3")
END_OF_ITEM = "\ufdd2/\ufdd3"
NUMBER_OF_TURN = "headrace_turn"  # the variable that holds a function from messages to marks
OF_LOOPS = frozenset(("first", "last", "index", "index0", "length", "previtem", "nextitem"))
WIDTH = re.compile(r"\d{5,}|\*")


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox with the names that templates expect, less what is random or endless."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, date: datetime.datetime | None, name: str) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, jinja2.ext.loopcontrols],
            optimized=False,  # nothing of a template is worked out while it is compiled
            finalize=finalize,
        )

        def strftime_now(format: str) -> str:  # noqa: A002  as templates may call it
            if date is None:
                raise DataError(
                    f"{name}: asks for today's date, so tokens would change from day to day; "
                    'set date = "YYYY-MM-DD" in [sources.chat]'
                )
            return date.strftime(format)

        del self.globals["lipsum"], self.filters["random"]
        self.filters["tojson"] = to_json
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = strftime_now

    def compile_marked(self, text: str) -> jinja2.Template:
        """A template that marks in its output which message it looks at."""
        tree = self.parse(text)
        tree = LoopMarks().visit(tree)
        jinja2.nodes.Node.set_environment(tree, self)
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Refuse at once what is only found out later by the sandbox, or never."""
        raise SecurityError(
            f"access to attribute {attribute!r} of a {type(obj).__name__} is not allowed"
        )

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute; those of loops are looked up at once, which are most of them."""
        if type(obj) is LoopContext and attribute in OF_LOOPS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call(
        self, context: jinja2.runtime.Context, called: Any, /, *args: Any, **named: Any
    ) -> Any:
        """A call within the sandbox, with arguments of any name; of our own marks without asking
        it."""
        if type(called) is TurnMarks:
            return called(*args)
        return super().call(context, called, *args, **named)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Sums, repetition, powers and formatted texts up to a size that memory can hold."""
        texts = operator == "+" and type(left) is str and type(right) is str  # nearly all there are
        if texts and len(left) + len(right) <= LARGEST:
            return left + right
        if not fits(operator, left, right):
            raise SecurityError(f"a result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def fits(operator: str, left: Any, right: Any) -> bool:
    """Return whether the result of an operator is of a size to be borne."""
    if isinstance(left, str) and operator == "%":
        return WIDTH.search(left) is None
    if isinstance(left, int) and isinstance(right, int):
        bits, more = left.bit_length(), right.bit_length()
        size = {"**": bits * abs(right) if operator == "**" else 0, "*": bits + more}
        return size.get(operator, 0) <= LARGEST_NUMBER
    if operator == "*":
        text, count = (left, right) if isinstance(right, int) else (right, left)
        return not (hasattr(text, "__len__") and isinstance(count, int)) or (
            len(text) * count <= LARGEST
        )
    both = hasattr(left, "__len__") and hasattr(right, "__len__")
    return operator != "+" or not both or len(left) + len(right) <= LARGEST


@jinja2.pass_context
def finalize(context: jinja2.runtime.Context, value: Any) -> Any:
    """A value on its way into the output, as it is: that it depends on the context keeps Jinja
    from working out constants while it compiles, outside of all limits."""
    return value


class Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`, kept as a pair of reserved characters."""

    tags = {"generation"}  # noqa: RUF012  as the base class has it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The block as a call of `mark` with its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Any) -> str:
        """The body between its marks."""
        return f"\ufdd0{caller()}\ufdd1"


class LoopMarks(NodeTransformer):
    """Puts marks around each turn of a loop, so that the output tells which message it is of.

    Loops whose output is captured (in macros, `{% set %}` blocks and filters) stay as they are: the
    template may look at it.
    """

    def __init__(self) -> None:
        self.marked: list[bool] = []

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:  # noqa: N802
        """A loop with a mark where a turn begins and one where it ends."""
        named = isinstance(node.target, jinja2.nodes.Name)
        self.marked.append(named)
        body = [part for child in node.body for part in as_list(self.visit(child))]
        self.marked.pop()
        node.else_ = [part for child in node.else_ for part in as_list(self.visit(child))]
        node.body = [begin_of_item(node), *body, end_of_item()] if named else body
        return node

    def visit_Continue(self, node: jinja2.nodes.Continue) -> list[jinja2.nodes.Node]:  # noqa: N802
        """The end of a turn of the loop."""
        return [end_of_item(), node] if self.marked and self.marked[-1] else [node]

    def visit_Break(self, node: jinja2.nodes.Break) -> list[jinja2.nodes.Node]:  # noqa: N802
        """The end of a turn of the loop."""
        return [end_of_item(), node] if self.marked and self.marked[-1] else [node]

    def visit_CallBlock(self, node: jinja2.nodes.CallBlock) -> jinja2.nodes.Node:  # noqa: N802
        """A generation block is written as it stands; what other calls do is not known."""
        call = node.call.node
        if isinstance(call, jinja2.nodes.ExtensionAttribute):
            self.generic_visit(node)
        return node

    def keep(self, node: jinja2.nodes.Node) -> jinja2.nodes.Node:
        """A part whose output is captured."""
        return node

    visit_AssignBlock = visit_FilterBlock = visit_Macro = keep  # noqa: N815


def as_list(found: Any) -> list[jinja2.nodes.Node]:
    """Return what a visit gave, as statements."""
    return found if isinstance(found, list) else [] if found is None else [found]


def begin_of_item(loop: jinja2.nodes.For) -> jinja2.nodes.Node:
    """The mark of a loop's item, or of what the item is the index of."""
    name = loop.target.name if isinstance(loop.target, jinja2.nodes.Name) else ""
    assigned = {
        target.name
        for child in loop.body
        for target in child.find_all(jinja2.nodes.Name)
        if target.ctx == "store"
    }
    lists = {
        part.node.name
        for child in loop.body
        for part in child.find_all(jinja2.nodes.Getitem)
        if isinstance(part.node, jinja2.nodes.Name)
        and isinstance(part.arg, jinja2.nodes.Name)
        and part.arg.name == name
        and part.node.name not in assigned | {name}
    }
    item = jinja2.nodes.Name(name, "load")
    found: list[jinja2.nodes.Expr] = [
        jinja2.nodes.Getitem(jinja2.nodes.Name(of, "load"), item, "load") for of in sorted(lists)
    ]
    function = jinja2.nodes.Name(NUMBER_OF_TURN, "load")
    call = jinja2.nodes.Call(function, [item, *found], [], None, None)
    return jinja2.nodes.Output([call]).set_lineno(loop.lineno)


def end_of_item() -> jinja2.nodes.Node:
    """The mark of an item's end."""
    return jinja2.nodes.Output([jinja2.nodes.TemplateData(END_OF_ITEM)])


def read_marks(text: str, messages: int) -> Rendering:
    """Take the marks out of a rendering, and say where they were."""
    pieces: list[str] = []
    generated: list[Span] = []
    turns: list[list[Span]] = [[] for _ in range(messages)]
    owners: list[int | None] = [None]
    position = read = start = 0
    for mark in [*MARK.finditer(text), None]:
        piece = text[read:] if mark is None else text[read : mark.start()]
        if piece and owners[-1] is not None:
            extend(turns[owners[-1]], position, position + len(piece))
        pieces.append(piece)
        position += len(piece)
        if mark is None:
            break
        read = mark.end()
        if mark[0] == "\ufdd0":
            start = position
        elif mark[0] == "\ufdd1":
            generated.append((start, position))
        elif mark[1] == "/":
            owners.pop()
            assert owners, "a mark ends no item"
        else:
            owners.append(int(mark[1]) if mark[1] else owners[-1])
    return Rendering("".join(pieces), generated, turns)


def extend(spans: list[Span], start: int, end: int) -> None:
    """Add characters to some spans, to the last of them where they follow it."""
    if spans and spans[-1][1] == start:
        start = spans.pop()[0]
    spans.append((start, end))


class TurnMarks:
    """A function from what a loop looks at to its mark: the number of a message, if it is one."""

    def __init__(self, messages: Sequence[object]) -> None:
        self.numbers = {id(message): index for index, message in enumerate(messages)}

    def __call__(self, *items: object) -> str:
        for item in items:
            if id(item) in self.numbers:
                return f"\ufdd2{self.numbers[id(item)]}\ufdd3"
        return "\ufdd2\ufdd3"


def holds_marks(value: object) -> bool:
    """Return whether a value has characters of marks in one of its texts.

    Python writes them as escapes, and looks through a conversation in a tenth of the time.
    """
    return "\\ufdd" in repr(value) and finds_marks(value)


def finds_marks(value: object) -> bool:
    """Return the same, found text by text."""
    if isinstance(value, str):
        return not value.isascii() and any(character in value for character in RESERVED)
    if isinstance(value, dict):
        return any(map(finds_marks, value)) or any(map(finds_marks, value.values()))
    return isinstance(value, list) and any(map(finds_marks, value))


def raise_exception(message: str) -> None:
    """Let a template refuse a conversation."""
    raise jinja2.TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escapes of HTML."""
    if isinstance(indent, int) and indent > LARGEST_WIDTH:
        raise SecurityError(f"an indent of {indent} is too large")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
