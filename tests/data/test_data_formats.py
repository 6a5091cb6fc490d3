"""Rows of every format become the same normal forms, and a row that does not fit is named with its columns."""

import pytest

from qlora.data.formats import Chat, Completion, Examples, Judged, Pair, Text, detect_format, to_example
from qlora.data.index import read_index
from qlora.data.splits import all_rows
from qlora.errors import UserError

QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}

WORSE = {"role": "assistant", "content": "b"}
PAIR = Pair(Chat((QUESTION, ANSWER)), Chat((QUESTION, WORSE)))

FITTING = [
    ({"messages": [QUESTION, ANSWER]}, "messages", Chat((QUESTION, ANSWER))),
    ({"prompt": "q", "completion": "a"}, "prompt_completion", Completion("q", "a")),
    ({"prompt": [QUESTION], "completion": [ANSWER]}, "prompt_completion", Chat((QUESTION, ANSWER))),
    ({"instruction": "q", "input": "", "output": "a"}, "instruction", Chat((QUESTION, ANSWER))),
    ({"instruction": "q", "output": "a", "text": "q a"}, "instruction", Chat((QUESTION, ANSWER))),
    ({"question": "q", "answer": "a"}, "instruction", Chat((QUESTION, ANSWER))),
    ({"text": "t"}, "text", Text("t")),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "conversations",
        Chat((QUESTION, ANSWER)),
    ),
    (
        {"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        "conversations",
        Chat(({"role": "system", "content": "s"}, QUESTION, ANSWER)),
    ),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "preference",
        Pair(Completion("q", "a"), Completion("q", "b")),
    ),
    ({"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [WORSE]}, "preference", PAIR),
    ({"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, WORSE]}, "preference", PAIR),
    ({"question": "q", "system": "", "chosen": "a", "rejected": "b"}, "preference", PAIR),
    (
        {"question": "q", "system": "s", "chosen": "a", "rejected": "b"},
        "preference",
        Pair(*(Chat(({"role": "system", "content": "s"}, QUESTION, answer)) for answer in (ANSWER, WORSE))),
    ),
    ({"prompt": "q", "completion": "a", "label": False}, "kto", Judged(Completion("q", "a"), False)),
    ({"prompt": [QUESTION], "completion": [ANSWER], "label": True}, "kto", Judged(Chat((QUESTION, ANSWER)), True)),
    ({"prompt": "q", "completion": "a", "label": "news"}, "prompt_completion", Completion("q", "a")),
    ({"messages": [QUESTION, ANSWER], "chosen": [], "rejected": []}, "messages", Chat((QUESTION, ANSWER))),
]


@pytest.mark.parametrize("row, format, example", FITTING)
def test_detection_and_normal_form(row, format, example):
    assert detect_format(row) == format
    assert to_example(row, format) == example


def test_the_input_follows_the_instruction():
    example = to_example({"instruction": "Translate", "input": "chat", "output": "cat"}, "instruction")
    assert example.messages[0]["content"] == "Translate\n\nchat"


def test_keys_that_a_columnar_file_filled_with_null_are_left_out():
    padded = [{**QUESTION, "tool_calls": None}, {**ANSWER, "tool_calls": None}]
    assert to_example({"messages": padded}, "messages") == Chat((QUESTION, ANSWER))


def test_tools_reach_the_example():
    tool = {"type": "function", "function": {"name": "f"}}
    assert to_example({"messages": [QUESTION, ANSWER], "tools": [tool]}, "messages").tools == (tool,)


@pytest.mark.parametrize(
    "row, format, message",
    [
        ({"prompt": "q"}, "prompt_completion", "needs the columns `prompt`, `completion`; this row has `prompt`"),
        ({"prompt": "q", "completion": None}, "prompt_completion", "`completion` must hold text, not nothing"),
        ({"prompt": [QUESTION], "completion": "a"}, "prompt_completion", "a list of one assistant message"),
        ({"instruction": "q", "output": 3}, "instruction", "`output` must hold text, not int '3'"),
        ({"messages": "[]"}, "messages", "must be a list of messages, not str"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "preference", "`chosen` must hold text, not int"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "preference", "are the same"),
        ({"chosen": [QUESTION, ANSWER], "rejected": [ANSWER, WORSE]}, "preference", "differ before their last message"),
        ({"chosen": "a", "rejected": "b"}, "preference", "`chosen` must be a list of messages, not str"),
        ({"prompt": [QUESTION], "chosen": "a", "rejected": "b"}, "preference", "`chosen` that is a list of one"),
        ({"prompt": "q", "completion": "a", "label": 2}, "kto", "`label` must be true or false, not int '2'"),
        ({"messages": []}, "messages", "must be a list of messages, not an empty list"),
        ({"messages": [QUESTION]}, "messages", "the last message is from `user`: there is no answer to learn"),
        ({"messages": [ANSWER]}, "messages", "no message before the answer"),
        ({"messages": [{"from": "human", "value": "q"}]}, "messages", "message 0 .* a `role` and a `content`"),
        ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, "messages", "message 1 .* must be text"),
        ({"conversations": "q"}, "conversations", "must be a list of turns, not str"),
        ({"conversations": [{"from": "human"}]}, "conversations", "turn 0 .* texts `from` and `value`"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "conversations", "turn 0 .* is from 'bot'"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "conversations", "there is no answer to learn"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "conversations", "must be JSON with a `name`"),
        ({"messages": [QUESTION, ANSWER], "tools": "[{"}, "messages", "`tools` is not valid JSON"),
    ],
)
def test_a_row_that_does_not_fit(row, format, message):
    with pytest.raises(UserError, match=f"rows:7: .*{message}"):
        to_example(row, format, "rows:7")


def test_unknown_columns_are_listed_with_what_would_fit(jsonl_source):
    with pytest.raises(UserError, match=r"train\.jsonl:1: the columns `body`, `head` fit no known format") as caught:
        read_index(jsonl_source([{"body": "", "head": ""}]))
    assert "`question`, `answer` (instruction)" in str(caught.value)


def test_all_bad_rows_are_counted(jsonl_source):
    rows = [{"text": "ok"}, *({"text": number} for number in range(9))]
    with pytest.raises(UserError, match="4 more: 9 of 10 rows"):
        read_index(jsonl_source(rows))


def test_function_calls_and_their_results_in_turns():
    turns = [
        ("human", "q"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "2"),
        ("gpt", "a"),
    ]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": '[{"name": "f"}]'}
    example = to_example(row, "conversations")
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert example.messages == (
        QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "2"}, ANSWER
    )  # fmt: skip
    assert example.tools == ({"name": "f"},)


def test_columns_of_other_names(jsonl_source):
    rows = [{"problem": "q", "solution": "a", "answer": "not this"}] * 2
    source = jsonl_source(rows, columns={"question": "problem", "answer": "solution"})
    examples = Examples(source)
    assert [(read.example, examples.where(read.file, read.place)) for read in examples] == [
        (Chat((QUESTION, ANSWER)), f"{source.path}:{line}") for line in (1, 2)
    ]
    with pytest.raises(UserError, match="there is no column `proof`; the rows have `problem`, `solution`, `answer`"):
        read_index(jsonl_source(rows, columns={"question": "problem", "answer": "proof"}))
    with pytest.raises(UserError, match="no format has a column `q`"):
        read_index(jsonl_source(rows, columns={"q": "problem"}))


def test_weights_repeat_rows_and_choose_a_share_that_stays(jsonl_source):
    rows = [{"text": str(number)} for number in range(40)]

    def texts(given, **fields):
        source = jsonl_source(given, **fields)
        read = [read.example.text for read in Examples(source)]
        return [read[number] for _, numbers in all_rows(source).parts for number in numbers]

    every = texts(rows)
    assert texts(rows, weight=2) == every * 2
    quarter = texts(rows, weight=0.25)
    assert len(quarter) == 10 and quarter == sorted(quarter, key=every.index)
    assert texts(rows, weight=1.25) == every + quarter
    assert sorted(texts(rows[::-1], weight=0.25)) == sorted(quarter), "whatever the order"
    assert len(set(quarter) & set(texts(rows[:36], weight=0.25))) >= 7, "and nearly so when rows come or go"
