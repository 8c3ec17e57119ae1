"""The rows, options and tokenizers over which Axolotl is asked what it makes of them.

Only `make_fixtures.py` reads this file; the tests read what it wrote.
"""

import json
import random
from typing import Any, NamedTuple

Row = dict[str, Any]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WITH_EOS = (  # trims contents, begins with BOS, ends answers with EOS
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ ' ' + message.content | trim + eos_token }}"
    "{% elif message.role == 'system' %}{{ '<<SYS>>' + message.content + '<</SYS>>\\n' }}"
    "{% else %}{{ '[INST]' + message.content | trim + '[/INST]' }}{% endif %}{% endfor %}"
)
TOOLS = (  # tools, tool calls and their answers, and properties read by name
    "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role }}"
    "{% if message.name %}{{ ' ' + message.name }}{% endif %}{{ '\\n' }}"
    "{% if message.content %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<call>' + call.function.name + ' ' + call.function.arguments | tojson + '</call>' }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
)
THINKING = (  # reasoning before the content of the last answer only
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.reasoning_content and (loop.last or keep_thinking) %}"
    "{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\\n' }}{% endfor %}"
)
TWO_ENDS = (  # EOT after each turn, EOS at the end
    "{% for message in messages %}{{ '<|user|>' if message.role == 'user' else '<|model|>' }}"
    "{{ message.content + '<|eot_id|>' }}{% endfor %}{{ eos_token }}"
)

PIECES = [
    "The mill wheel turns.",
    "water over the weir, stone on grain",
    " leading space",
    "trailing space ",
    "two\nlines",
    "\n\nblank lines around\n",
    "Zürich, naïve café — “quoted” … ½",
    "水車は回る。粉を挽く。",
    "Мельница у реки",  # noqa: RUF001
    "🌊🪨🌾 wheel 👩‍🌾",
    "[1, 2]",
    "]] [[dummy_message",
    "zz sleeping zz",
    "{instruction} and {braces} {}",
    "a </s> inside",
    "<s> first",
    "<|im_end|> and <|im_start|>user",
    "<|eot_id|>",
    "tab\tand\u00a0no-break",
    "e\u0301 combining",
    "12345 67.89 %",
    "def f(x):\n    return x * 2\n",
    ".",
    "x" * 60,
]
OWN_TEXT = ["Answer:", "USER: hi ASSISTANT:", "### Response:", "<START>"]


class Case(NamedTuple):
    """One question to Axolotl: rows under one type and its options."""

    name: str
    type: str | Row
    rows: str
    entry: Row = {}  # noqa: RUF012  never written to
    config: Row = {}  # noqa: RUF012
    rl: str | None = None


def some(rng: random.Random, count: int) -> str:
    return rng.choice([" ", "\n", ""]).join(rng.choice(PIECES) for _ in range(count))


def fill(columns: list[str], seed: str, optional: tuple[str, ...] = ()) -> list[Row]:
    """Rows with every piece somewhere, then odd ones: empty, null and missing fields."""
    rng = random.Random(seed)
    rows: list[Row] = []
    for index in range(18):
        rows.append({name: some(rng, 1 + (index + k) % 3) for k, name in enumerate(columns)})
    last = columns[-1]
    rows.append(dict.fromkeys(columns, ""))
    rows.append(dict.fromkeys(columns, "full") | {last: ""})
    rows.append(dict.fromkeys(columns, "full") | {last: None})
    rows.append(dict.fromkeys(columns, "full") | {last: "ends in</s>"})
    rows.append(dict.fromkeys(columns, "full") | {last: "<s>begins"})
    rows.append(dict.fromkeys(columns, "full") | {last: "ends<|im_end|>"})
    rows.append({name: "long " * (90 if name != last else 3) for name in columns})
    rows.append({name: "long " * (90 if name == last else 3) for name in columns})
    for name in optional:
        rows.append({key: "full" for key in columns if key != name})
        rows.append(dict.fromkeys(columns, "full") | {name: None})
        rows.append(dict.fromkeys(columns, "full") | {name: ""})
    return rows


def conversation(rng: random.Random, keys: tuple[str, str], roles: list[str]) -> list[Row]:
    return [{keys[0]: role, keys[1]: some(rng, 1 + k % 2)} for k, role in enumerate(roles)]


def chats(keys: tuple[str, str], names: tuple[str, str, str], field: str, seed: str) -> list[Row]:
    """Conversations of many shapes; `names` are those of system, user and assistant."""
    rng = random.Random(seed)
    system, user, assistant = names
    shapes = [
        [user, assistant],
        [system, user, assistant],
        [user, assistant, user, assistant],
        [assistant, user, assistant],
        [system, user, assistant, user, assistant, user],
        [user, user, assistant, assistant],
        [user],
        [assistant],
        [system],
    ]
    rows: list[Row] = [{field: conversation(rng, keys, shape)} for shape in shapes * 4]
    for piece in PIECES:
        turns = [{keys[0]: user, keys[1]: some(rng, 1)}, {keys[0]: assistant, keys[1]: piece}]
        rows.append({field: turns})
    for text in ("", " ", "\n", "[", "]", "z", "[[dummy_message]]", "zzdummymessagezz"):
        turns = conversation(rng, keys, [user, assistant, user, assistant])
        turns[1][keys[1]] = text
        rows.append({field: turns})
    empty = conversation(rng, keys, [user, assistant])
    empty[0][keys[1]] = ""
    rows.append({field: empty})
    rows.append({field: [dict.fromkeys(keys, None), *conversation(rng, keys, [user, assistant])]})
    rows.append({field: []})
    rows.append({field: None})
    rows.append({field: conversation(rng, keys, ["stranger", assistant])})
    return rows


def rows_of() -> dict[str, list[Row]]:
    """All row sets by name."""
    rng = random.Random("rows")
    chat = chats(("role", "content"), ("system", "user", "assistant"), "messages", "chat")
    silent = [("assistant", ""), ("user", "Mill?"), ("assistant", "Yes."), ("assistant", "")]
    opening = {"messages": [{"role": role, "content": text} for role, text in silent]}
    plain = [*chat[:27], *chat[-16:-8], opening]
    sets: dict[str, list[Row]] = {
        "alpaca": fill(["instruction", "input", "output"], "alpaca", ("input",)),
        "alpaca_system": fill(
            ["instruction", "input", "system", "output"], "w_system", ("system", "input")
        ),
        "gpteacher": fill(["instruction", "input", "response"], "gpteacher", ("input",)),
        "oasst": fill(["INSTRUCTION", "RESPONSE"], "oasst"),
        "jeopardy": fill(["question", "category", "answer"], "jeopardy"),
        "qa": fill(["question", "answer"], "qa", ("question",)),
        "camel": fill(["message_1", "message_2"], "camel"),
        "orca": fill(["system_prompt", "question", "response"], "orca"),
        "article": fill(["article", "unanswerable_question", "question", "answer"], "article"),
        "context": fill(["context", "question", "answer"], "context"),
        "tldr": fill(["article", "summary"], "tldr"),
        "metharme": fill(["prompt", "generation"], "metharme"),
        "reflection": fill(
            ["instruction", "input", "output", "reflection", "corrected"], "reflection", ("input",)
        ),
        "custom": fill(["sys", "question", "context", "answer"], "custom", ("context", "sys")),
        "text": [
            *({"text": piece} for piece in PIECES),
            {"text": some(rng, 60)},
            {"text": "long " * 700},
            {"text": ""},
            {"text": None},
            {"text": "ends</s>"},
        ],
        "chat": chat,
        "chat_plain": plain,
        "sharegpt": chats(("from", "value"), ("system", "human", "gpt"), "conversations", "share"),
        "guanaco": chats(("role", "text"), ("system", "prompter", "assistant"), "turns", "gu")[:20],
        "own_text": [
            {"messages": [*conversation(rng, ("role", "content"), ["user", "assistant"]), turn]}
            for text in OWN_TEXT
            for turn in [{"role": "assistant", "content": text}]
        ],
    }
    sets["custom"].append({"sys": "s", "question": "no answer column"})
    sets["alpaca"].append({"instruction": "no output column"})
    sets["alpaca"].append({"instruction": None, "input": "null instruction", "output": "yes"})
    sets["alpaca"].append({"instruction": 5, "input": 7, "output": "numbers"})
    sets["alpaca"].append({"instruction": "a number to answer", "output": 42})
    choices = [["one", 'two "quoted"'], [], ["水", "🌊", ""]]
    sets["choice"] = [
        row | {"choices": choices[k % 3]}
        for k, row in enumerate(fill(["question", "explanation"], "choice"))
    ]
    sets["choice"] += [row | {"solution": "solved"} for row in sets["choice"][:3]]
    sets["choice"] += [sets["choice"][1] | {"solution": None}]
    grades = {"refusal": 9, "creativity": 3}
    critiques = {"refusal": {"explanation": "it says: no", "improvements": "ü"}}
    sets["creative"] = [
        row | {"scores": scores, "critiques": critique}
        for row, (scores, critique) in zip(
            fill(["instruction", "answer", "revision"], "creative"),
            [(grades, critiques), ("plain", "text: with colon"), ({}, [])] * 6,
            strict=False,
        )
    ]
    sets["segments"] = [
        {"segments": [{"label": bool((k + j) % 2), "text": some(rng, 1)} for j in range(k % 4 + 1)]}
        for k in range(10)
    ] + [
        {"segments": []},
        {"segments": [{"label": True, "text": ""}]},
        {"segments": [{"label": 1, "text": "<s>yes</s>"}, {"label": 0, "text": "no"}]},
        {"segments": [{"label": None, "text": "null label"}, {"label": True, "text": "x " * 700}]},
    ]
    personas = ["Persona of the miller \n<START>", " plain ", "<START>", ""]
    sets["pygmalion"] = [
        {
            "conversations": [
                {"role": "system", "value": persona},
                *conversation(rng, ("role", "value"), ["human", "bot", "human", "bot"]),
            ]
        }
        for persona in personas
    ] + [
        {"conversations": conversation(rng, ("role", "value"), roles)}
        for roles in (["bot"], ["human", "bot", "bot"], [], ["human"])
    ]
    steps = ["First grind.", "Then sift 🌾", "", "Done"]
    sets["tools"] = tool_rows()
    sets["thinking"] = thinking_rows()
    sets["flags"] = flag_rows(rng)
    sets["detail"] = detail_rows(rng)
    sets["parts"] = part_rows()
    sets["system_column"] = [
        row | {"system": text}
        for row, text in zip(plain, ["Be brief.", "水", "a\nb", "[x]"] * 9, strict=False)
    ]
    sets["json_text"] = [{"messages": json.dumps(row["messages"])} for row in plain[:8]]
    sets["weights"] = [
        {"messages": [turn | {"weight": (k + j) % 2} for j, turn in enumerate(row["messages"])]}
        for k, row in enumerate(plain)
    ]
    sets["preference"] = preference_rows(rng)
    sets["steps"] = [
        {"prompt": some(rng, 1), "completions": steps[: k % 4 + 1], "labels": [True, False] * 2}
        for k in range(6)
    ]
    return sets


def tool_rows() -> list[Row]:
    call = {"type": "function", "function": {"name": "flow", "arguments": '{"gate": 2}'}}
    parsed = {"type": "function", "function": {"name": "flow", "arguments": {"gate": "[3]"}}}
    tool = {"type": "function", "function": {"name": "flow", "parameters": {"type": "object"}}}
    as_text = {"type": "function", "function": {"name": "flow", "parameters": '{"a": 1}'}}
    ask = {"role": "user", "content": "How much water?"}
    answer = {"role": "tool", "name": "flow", "content": "3 m3/s"}
    said = {"role": "assistant", "content": "Three cubic metres."}
    rows: list[Row] = []
    for used in (call, parsed):
        called = {"role": "assistant", "content": "", "tool_calls": [used]}
        silent = {"role": "assistant", "content": None, "tool_calls": [used, used]}
        both = {"role": "assistant", "content": "Let me look.", "tool_calls": [used]}
        for turn in (called, silent, both):
            rows.append({"messages": [ask, turn, answer, said], "tools": [tool]})
            rows.append({"messages": [ask, turn, answer, said, ask, said]})
    rows.append({"messages": [ask, said], "tools": [as_text]})
    rows.append({"messages": [ask, said], "tools": '[{"name": "flow"}]'})
    rows.append({"messages": [ask, said], "tools": []})
    rows.append({"messages": [ask, said], "tools": None})
    broken = {"type": "function", "function": {"name": "flow", "arguments": '{"gate": '}}
    rows.append({"messages": [ask, {"role": "assistant", "content": "", "tool_calls": [broken]}]})
    rows.append({"messages": [ask, said | {"name": "miller"}]})
    return rows


def thinking_rows() -> list[Row]:
    ask = {"role": "user", "content": "Why?"}
    texts = [
        "<think>\nBecause water falls.\n</think>\n\nGravity.",
        "<reasoning>so</reasoning>  Thus.",
        "<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|> b <|end_of_solution|> c",
        "no thought",
        "<think>never closed",
        "before <think>in</think>",
    ]
    rows: list[Row] = [
        {
            "messages": [
                ask,
                {"role": "assistant", "content": text},
                ask,
                {"role": "assistant"} | end,
            ]
        }
        for text in texts
        for end in [{"content": texts[0]}]
    ]
    for thought in ("It falls.", "", "[1]"):
        turn = {"role": "assistant", "content": "Down.", "reasoning_content": thought}
        rows.append({"messages": [ask, turn]})
        rows.append({"messages": [ask, turn, ask, turn]})
        other = {"role": "assistant", "content": "Down.", "thinking": thought}
        rows.append({"messages": [ask, other, ask, other]})
    return rows


def flag_rows(rng: random.Random) -> list[Row]:
    rows: list[Row] = []
    for flags in ([True, False, True, False], [0, 1, 0, 1], [None, True, None, None], [1, 1, 1, 1]):
        turns = conversation(rng, ("role", "content"), ["user", "assistant"] * 2)
        rows.append(
            {"messages": [turn | {"train": flag} for turn, flag in zip(turns, flags, strict=True)]}
        )
    return rows


def detail_rows(rng: random.Random) -> list[Row]:
    text = "The water turns the wheel, and the wheel turns the stone."
    cuts: list[list[Row]] = [
        [{"begin_offset": 0, "end_offset": 8, "train": True}],
        [{"begin_offset": 4, "end_offset": 14, "train": False}],
        [
            {"begin_offset": 0, "end_offset": 13, "train": True},
            {"begin_offset": 14, "end_offset": 24, "train": False},
            {"begin_offset": 25, "end_offset": 57, "train": True},
        ],
        [{"begin_offset": 5, "end_offset": 500, "train": True}],
        [],
    ]
    rows: list[Row] = []
    for cut in cuts:
        user = {"role": "user", "content": some(rng, 1)}
        rows.append({"messages": [user, {"role": "assistant", "content": text, "detail": cut}]})
        rows.append(
            {"messages": [user | {"detail": cut[:1]}, {"role": "assistant", "content": text}]}
        )
        thought = {"role": "assistant", "content": text, "detail": cut, "reasoning_content": "So."}
        rows.append({"messages": [user, thought]})
    return rows


def part_rows() -> list[Row]:
    ask = {"role": "user", "content": "How?"}
    contents: list[list[Row]] = [
        [
            {"type": "text", "text": "Let me think.", "train": False},
            {"text": " Four.", "train": True},
        ],
        [{"value": "weighed", "weight": 0}, {"content": " and kept", "weight": 1}],
        [{"type": "text", "text": "no flags"}, {"type": "text", "text": " at all"}],
        [{"text": "a trailing space ", "train": False}, {"text": "then more 🌾", "train": True}],
        [{"text": "", "train": True}],
    ]
    rows: list[Row] = [
        {"messages": [ask, {"role": "assistant", "content": content}]} for content in contents
    ]
    for content in contents[:3]:
        turn = {"role": "assistant", "content": "Plain.", "reasoning_content": content}
        rows.append({"messages": [ask, turn]})
        rows.append({"messages": [ask, turn | {"content": content}]})
    rows.append(
        {"messages": [ask | {"content": contents[0]}, {"role": "assistant", "content": "x"}]}
    )
    return rows


def preference_rows(rng: random.Random) -> list[Row]:
    rows: list[Row] = []
    for system in ("", "Be kind.", None):
        for _ in range(3):
            ask, good, bad = some(rng, 1), some(rng, 1), some(rng, 2)
            turns = [
                [{"role": "user", "content": ask}, {"role": "assistant", "content": text}]
                for text in (good, bad)
            ]
            rows.append(
                {
                    "system": system,
                    "texts": {
                        "prompt": ask,
                        "input": ask,
                        "question": ask,
                        "instruction": ask,
                        "chosen": good,
                        "rejected": bad,
                        "completion": good,
                        "label": True,
                    },
                    "turns": {
                        "prompt": ask,
                        "chosen": turns[0],
                        "rejected": turns[1],
                        "completion": turns[0],
                        "label": False,
                    },
                    "split": {
                        "messages": turns[0][:1],
                        "chosen": turns[0][1],
                        "rejected": turns[1][1],
                    },
                    "answers": {
                        "prompt": ask,
                        "answers": [
                            {"answer": text, "rank": rank}
                            for rank, text in ((2, good), (0, bad), (1, ask))
                        ],
                    },
                }
            )
    return rows


CUSTOM = {
    "system_prompt": "Fallback system.",
    "field_system": "sys",
    "field_instruction": "question",
    "field_input": "context",
    "field_output": "answer",
    "format": "[Q] {instruction} [C] {input} [A]",
    "no_input_format": "[Q] {instruction} [A]",
    "system_format": "[S] {system}\n",
}
SHAREGPT = {
    "field_messages": "conversations",
    "message_property_mappings": {"role": "from", "content": "value"},
}


def instruct_cases() -> list[Case]:
    """Each type of the instruct family, with its styles."""
    types = {
        "alpaca": "alpaca",
        "alpaca:chat": "alpaca",
        "alpaca:chatml": "alpaca",
        "alpaca:phi": "alpaca",
        "alpaca:instruct": "alpaca",
        "gpteacher": "gpteacher",
        "gpteacher:chat": "gpteacher",
        "oasst": "oasst",
        "oasst:chatml": "oasst",
        "jeopardy": "jeopardy",
        "explainchoice": "choice",
        "explainchoice:chat": "choice",
        "concisechoice": "choice",
        "concisechoice:chat": "choice",
        "summarizetldr": "tldr",
        "summarizetldr:chat": "tldr",
        "reflection": "reflection",
        "reflection:instruct": "reflection",
        "reflection:chat": "reflection",
        "alpaca_chat": "alpaca",
        "alpaca_chat.load_qa": "qa",
        "alpaca_chat.load_concise": "alpaca",
        "alpaca_chat.load_camel_ai": "camel",
        "alpaca_chat.load_no_prompt": "alpaca",
        "alpaca_instruct": "alpaca",
        "alpaca_instruct.load_no_prompt": "alpaca",
        "alpaca_w_system": "alpaca_system",
        "alpaca_w_system.load_instruct": "alpaca_system",
        "alpaca_w_system.load_chat": "alpaca_system",
        "alpaca_w_system.load_open_orca": "orca",
        "alpaca_w_system.load_open_orca_chatml": "orca",
        "orcamini": "orca",
        "context_qa": "article",
        "context_qa.load_v2": "context",
        "context_qa.load_404": "article",
        "creative_acr.load_answer": "creative",
        "creative_acr.load_critique": "creative",
        "creative_acr.load_revise": "creative",
        "metharme": "metharme",
    }
    cases = [Case(name, name, rows) for name, rows in types.items()]
    for name in ("alpaca", "reflection", "metharme", "alpaca_w_system.load_open_orca"):
        trained = {"train_on_inputs": True}
        cases.append(Case(f"{name} train_on_inputs", name, types[name], config=trained))
        cases.append(Case(f"{name} short", name, types[name], config={"sequence_len": 24}))
    cases.append(Case("alpaca_chat chatml", "alpaca_chat", "alpaca", {"conversation": "chatml"}))
    for name, changes in {
        "custom": CUSTOM,
        "custom fields": {"field_instruction": "question", "field_output": "answer"},
        "custom no system": CUSTOM | {"system_prompt": "", "field_system": "absent"},
    }.items():
        cases.append(Case(name, dict(changes), "custom"))
    cases.append(Case("custom bare", {"system_prompt": "Fallback system."}, "alpaca_system"))
    cases.append(Case("custom train_on_inputs", CUSTOM, "custom", config={"train_on_inputs": True}))
    return cases


def other_cases() -> list[Case]:
    """Types with a rule of their own."""
    short = {"sequence_len": 24}
    inputs = {"train_on_inputs": True}
    return [
        Case("completion", "completion", "text"),
        Case("completion short", "completion", "text", config=short),
        Case("completion field", "completion", "qa", {"field": "answer"}),
        Case("input_output", "input_output", "segments"),
        Case("input_output train_on_inputs", "input_output", "segments", config=inputs),
        Case("pygmalion", "pygmalion", "pygmalion"),
        Case("pygmalion short", "pygmalion", "pygmalion", config=short),
        Case("llama2_chat", "llama2_chat", "sharegpt"),
        Case("messages", "messages", "chat", {"chat_template": "chatml"}),
        Case("messages llama3", "messages.chat", "chat_plain", {"chat_template": "llama3"}),
        Case("messages weights", "messages", "weights", {"chat_template": "chatml"}),
        Case(
            "messages train_on_inputs",
            "messages",
            "chat_plain",
            {"chat_template": "chatml"},
            inputs,
        ),
        Case("messages from", "messages", "sharegpt", {"chat_template": "chatml"} | SHAREGPT),
        Case("stepwise", "stepwise_supervised", "steps"),
        Case("stepwise last", "stepwise_supervised", "steps", {"train_on_last_step_only": True}),
        Case("pretrain", "pretrain", "text", config={"sequence_len": 64}),
        Case("pretrain long", "pretrain", "text"),
        Case("pretrain longer", "pretrain", "text", config={"sequence_len": 600}),
    ]


def chat_cases() -> list[Case]:
    """`chat_template` with each of its options."""
    kind = "chat_template"

    def case(name: str, rows: str, config: Row | None = None, **entry: Any) -> Case:
        return Case(f"chat {name}", kind, rows, entry, config or {})

    def jinja(name: str, text: str, rows: str, config: Row | None = None, **entry: Any) -> Case:
        chosen = {"chat_template": "jinja", "chat_template_jinja": text}
        return Case(f"chat {name}", kind, rows, chosen | entry, config or {})

    ends = ("turn", "all", "last", "none")
    eot = {"eot_tokens": ["<|eot_id|>"]}
    return [
        case("default", "chat"),
        jinja("chatml", CHATML, "chat"),
        jinja("with eos", WITH_EOS, "chat"),
        jinja("with eos train_on_inputs", WITH_EOS, "chat", {"train_on_inputs": True}),
        jinja("two ends", TWO_ENDS, "chat_plain"),
        case("own text", "own_text"),
        case("sharegpt", "sharegpt", **SHAREGPT),
        case(
            "guanaco",
            "guanaco",
            field_messages="turns",
            message_property_mappings={"role": "role", "content": "text"},
            roles={"user": ["prompter"], "assistant": ["assistant"]},
        ),
        case(
            "legacy names",
            "sharegpt",
            field_messages="conversations",
            message_field_role="from",
            message_field_content="value",
        ),
        *(case(f"eos {end}", "chat_plain", train_on_eos=end) for end in ends),
        *(jinja(f"eos {end} template", WITH_EOS, "chat_plain", train_on_eos=end) for end in ends),
        *(jinja(f"eot {end}", TWO_ENDS, "chat_plain", eot, train_on_eot=end) for end in ends),
        jinja(
            "eot none eos all", TWO_ENDS, "chat_plain", eot, train_on_eot="none", train_on_eos="all"
        ),
        jinja("eot conflict", TWO_ENDS, "chat_plain", {"eot_tokens": ["</s>"]}, train_on_eot="all"),
        jinja("eot absent", TWO_ENDS, "chat_plain", {"eot_tokens": ["<|eot_id|>", "<nowhere>"]}),
        jinja("eot several tokens", WITH_EOS, "chat_plain", {"eot_tokens": ["[INST]"]}),
        jinja("eot list", TWO_ENDS, "chat_plain", {"eot_tokens": ["<|eot_id|>", "</s>"]}),
        case("roles user", "chat_plain", roles_to_train=["user"]),
        case("roles human", "sharegpt", roles_to_train=["human", "gpt"], **SHAREGPT),
        case("roles none", "chat_plain", roles_to_train=[]),
        case("train_on_inputs", "chat_plain", {"train_on_inputs": True}),
        case("flags", "flags", message_field_training="train"),
        case("flags unused", "flags"),
        case("detail", "detail", message_field_training_detail="detail"),
        jinja("detail thinking", THINKING, "detail", message_field_training_detail="detail"),
        case("parts", "parts"),
        jinja("parts thinking", THINKING, "parts"),
        case("system column", "system_column"),
        case("drop system", "chat_plain", drop_system_message=True),
        case("drop system column", "system_column", drop_system_message=True),
        case("json text", "json_text"),
        jinja("tools", TOOLS, "tools"),
        jinja("tools eos all", TOOLS, "tools", train_on_eos="all"),
        jinja("tools train_on_inputs", TOOLS, "tools", {"train_on_inputs": True}),
        jinja("thinking", THINKING, "thinking"),
        jinja(
            "thinking kept", THINKING, "thinking", {"chat_template_kwargs": {"keep_thinking": True}}
        ),
        jinja("thinking split", THINKING, "thinking", split_thinking=True),
        jinja(
            "thinking field",
            THINKING,
            "thinking",
            message_property_mappings={
                "role": "role",
                "content": "content",
                "reasoning_content": "thinking",
            },
        ),
        *(case(f"named {name}", "chat_plain", chat_template=name) for name in NAMED),
        case("top-level name", "chat_plain", {"chat_template": "llama3"}),
        case("long", "chat_plain", {"sequence_len": 24}),
    ]


NAMED = ["chatml", "llama3", "gemma", "phi_3", "mistral_v1", "qwen_25", "qwen3", "deepseek_v2"]


def preference_cases() -> list[Case]:
    """Chosen and rejected answers, by the kind of training (`rl`) that asks for them."""
    tables = {
        "icr": "texts",
        "intel": "texts",
        "prompt_pairs": "texts",
        "ultra": "turns",
        "argilla_chat": "turns",
    }
    cases = [
        Case(f"dpo {style}.{name}", f"{style}.{name}", f"preference.{rows}", rl="dpo")
        for style in ("chatml", "llama3")
        for name, rows in tables.items()
    ]
    cases += [
        Case(f"dpo {style}", style, "preference.texts", rl="dpo") for style in ("chatml", "llama3")
    ]
    formats = {"prompt_format": "[{system}] {prompt}", "chosen_format": "+{chosen}"}
    return [
        *cases,
        Case("dpo zephyr.nectar", "zephyr.nectar", "preference.answers", rl="dpo"),
        Case("dpo passthrough", "passthrough", "preference.texts", rl="dpo"),
        Case("dpo chat_template", "chat_template.default", "preference.split", rl="dpo"),
        Case(
            "dpo chat_template argilla", "chat_template.argilla_chat", "preference.turns", rl="dpo"
        ),
        Case("dpo custom", formats, "preference.texts", rl="dpo"),
        Case("dpo custom field", {"field_prompt": "question"}, "preference.texts", rl="dpo"),
        Case("orpo argilla", "chat_template.argilla", "preference.turns", rl="orpo"),
        Case("orpo", "orpo.chat_template", "preference.turns"),
        Case("bradley_terry", "bradley_terry.chat_template", "preference.texts"),
    ]


def all_cases() -> list[Case]:
    return [*instruct_cases(), *other_cases(), *chat_cases(), *preference_cases()]
