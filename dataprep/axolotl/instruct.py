"""The instruction family: a prompt that is masked, an answer that is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from headrace.dataprep.axolotl.prompts import InstructType, Style, placeholders
from headrace.dataprep.axolotl.strategy import (
    Built,
    Plan,
    Row,
    RowError,
    TokenRules,
    as_text,
    column,
    one_sample,
    text_of,
)
from headrace.dataprep.text.tokens import Located
from headrace.schemas.outside_text import json_type


@dataclass(frozen=True)
class Instruct:
    """Prompt and answer, tokenized apart: the answer ends with EOS and alone is trained."""

    rules: TokenRules
    kind: InstructType
    style: Style
    located: bool = False

    def plan(self, row: Row) -> Plan:
        """Prompt and answer of one row."""
        row = derive(row, self.kind.derive)
        shape = self.kind.output
        if self.kind.fallback and not {*placeholders(shape)} <= row.keys():
            shape = self.kind.fallback
        answer = fill(shape, row)
        if self.kind.ends > 1 and answer is None:
            raise RowError("not a string", f'field "{shape.strip("{}")}" is null')
        text = as_text(answer, shape.strip("{}"))
        return plan_answer(self.rules, self.prompt(row), text, self.kind.ends)

    def prompt(self, row: Row) -> str:
        """Return the text before the answer."""
        extra = self.extra(row)
        instruction = fill(self.kind.instruction, row)
        if self.kind.system_column:
            system = column(row, self.kind.system_column)
        else:
            system = self.kind.system_text(bool(extra))
        shape = self.style.turn if extra else self.style.bare
        head = self.style.system.format(system=system) if system else ""
        return head + shape.format(system=system, instruction=instruction, input=extra)

    def extra(self, row: Row) -> Any:
        """The input, empty where there is none; most types do without the column."""
        if not self.kind.input:
            return ""
        if self.kind.input == "input":
            return row.get("input", "")
        return column(row, self.kind.input)


@dataclass(frozen=True)
class UserDefined:
    """A `type:` that is a table of columns and formats."""

    rules: TokenRules
    options: Mapping[str, str]
    located: bool = False

    def plan(self, row: Row) -> Plan:
        """Prompt and answer of one row."""
        options = self.options
        instruction = column(row, options["field_instruction"])
        extra = row.get(options["field_input"], "")
        output = options["field_output"]
        answer = text_of(row, output) if output in row else ""
        system = row.get(options["field_system"], options["system_prompt"])
        head = options["system_format"].format(system=system) if system else ""
        shape = options["format"] if extra else options["no_input_format"]
        prompt = head + shape.format(instruction=instruction, input=extra)
        return plan_answer(self.rules, prompt, answer)


USER_DEFINED = {
    "system_prompt": "",
    "system_format": "{system}",
    "field_system": "system",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "format": "{instruction} {input} ",
    "no_input_format": "{instruction} ",
}


@dataclass(frozen=True)
class Reflection:
    """Thought, reflection and corrected answer, tokenized as one text with the prompt."""

    rules: TokenRules
    texts: Mapping[str, str]  # turn, bare, labels
    located: bool = False

    def plan(self, row: Row) -> Plan:
        """The whole text, and the prompt that begins it."""
        extra = row.get("input", "")
        shape = self.texts["turn"] if extra else self.texts["bare"]
        prompt = shape.format(instruction=column(row, "instruction"), input=extra)
        labels = {name: column(row, name) for name in ("output", "reflection", "corrected")}
        text = prompt + (self.texts["labels"].format(**labels) if all(labels.values()) else "")

        def build(found: list[Located]) -> Built:
            limit = self.rules.sequence_len
            whole, cut = self.rules.own(found[0].ids, limit)
            eos = self.rules.need_eos()
            if whole[-1] != eos and len(whole) < limit:
                whole.append(eos)
            masked = (
                0 if self.rules.train_on_inputs else len(self.rules.own(found[1].ids, limit)[0])
            )
            return one_sample(whole, np.arange(len(whole)) >= masked, cut)

        return Plan([text, prompt], build)


def plan_answer(rules: TokenRules, prompt: str, answer: str, ends: int = 1) -> Plan:
    """A prompt and its answer, each cut to `sequence_len`; an empty text has no tokens at all.

    The answer gets as many EOS as are missing to `ends`, and loses the BOS that it begins with.
    """

    def build(found: list[Located]) -> Built:
        bare = ends > 1  # tokenized even if empty
        before, cut = rules.own(found[0].ids, rules.sequence_len) if prompt or bare else ([], 0)
        after, cut_after = (
            rules.own(found[1].ids, rules.sequence_len) if answer or bare else ([], 0)
        )
        if after:
            eos = rules.need_eos()
            missing = ends - (after[-1] == eos)
            after += [eos] * max(0, min(missing, rules.sequence_len - len(after)))
            after = after[1:] if after[0] == rules.bos else after
        trained = np.arange(len(before) + len(after)) >= len(before)
        return one_sample(
            before + after, None if rules.train_on_inputs else trained, cut + cut_after
        )

    return Plan([prompt, answer], build)


def fill(shape: str, row: Row) -> Any:
    """A column's value as it is, or several columns, which must be strings, joined to a text."""
    names = placeholders(shape)
    if shape == "".join(f"{{{name}}}" for name in names[:1]):
        return column(row, names[0])
    for name in names:
        if not isinstance(column(row, name), str):
            raise RowError("not a string", f'field "{name}" is {json_type(row[name])}')
    return shape.format_map(row)


def derive(row: Row, what: str) -> Row:
    """A row with the texts that are made of several columns or of lists."""
    if what == "choices":
        choices = column(row, "choices")
        if not isinstance(choices, list):
            raise RowError("not a list", f'field "choices" is {json_type(choices)}')
        listed = "\n".join(f'- "{choice}"' for choice in choices)
        solution = (
            row["solution"] if row.get("solution") is not None else column(row, "explanation")
        )
        return {**row, "choices": listed, "solution": solution}
    if what == "evaluation":
        parts = (column(row, "scores"), column(row, "critiques"))
        written = (yaml.safe_dump(part, default_flow_style=False) for part in parts)
        return {**row, "evaluation": "".join(written)}
    return row
