"""Tokens and labels: the supervised tokens are the answer and its end, the rest is what a server would send."""

import copy

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qlora.data.formats import Chat, Completion, Judged, Pair, Text
from qlora.data.preparation import prepare, render_rows
from qlora.data.rendering import IGNORED, Renderer, render
from qlora.data.splits import all_rows
from qlora.data.templates import resolve_chat_template
from qlora.errors import UserError

TOKENIZERS = ["chatml_tokenizer", "llama3_tokenizer"]
texts = st.text(alphabet=st.sampled_from(list("abcxyz  \n\n\t.,:é漢🙂{}\"'<|>")), max_size=30)
PROPERTY = settings(max_examples=60, deadline=None)


def chat(*contents: str) -> Chat:
    roles = ("user", "assistant") * len(contents)
    return Chat(tuple({"role": role, "content": text} for role, text in zip(roles, contents, strict=False)))


def supervised_text(row, tokenizer) -> str:
    return tokenizer.decode([label for label in row.labels if label != IGNORED])


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return request.getfixturevalue(request.param)


END_OF_TURN = {"chatml_tokenizer": "<|im_end|>", "llama3_tokenizer": "<|eot_id|>"}


class TestProperties:
    """For any text: fixtures are requested by name, as hypothesis runs a test many times."""

    @pytest.mark.parametrize("name", TOKENIZERS)
    def test_chat(self, request, name):
        tokenizer, end = request.getfixturevalue(name), END_OF_TURN[name]

        @PROPERTY
        @given(texts, texts, texts, texts)
        def check(question, first, followup, answer):
            example = chat(question, first, followup, answer)
            row = render(example, tokenizer, max_length=10_000)
            prompt = tokenizer.apply_chat_template(
                list(example.messages[:-1]), add_generation_prompt=True, return_dict=True
            )["input_ids"]
            assert row.input_ids[: row.prompt_length] == prompt
            assert row.labels[: row.prompt_length] == [IGNORED] * row.prompt_length
            assert row.labels[row.prompt_length :] == row.input_ids[row.prompt_length :]
            assert supervised_text(row, tokenizer) == answer + end
            assert row.answer_text == answer
            assert not row.truncated and len(row.labels) == len(row.input_ids)

        check()

    @pytest.mark.parametrize("name", TOKENIZERS)
    def test_prompt_and_completion(self, request, name):
        tokenizer = request.getfixturevalue(name)

        @PROPERTY
        @given(texts, texts)
        def check(prompt, completion):
            row = render(Completion(prompt, completion), tokenizer, max_length=10_000)
            assert row.input_ids[: row.prompt_length] == tokenizer(prompt)["input_ids"]
            assert supervised_text(row, tokenizer) == completion + tokenizer.eos_token
            assert row.answer_text == completion

        check()

    def test_prompt_and_completion_where_words_carry_a_leading_space(self, spaced_tokenizer):
        @PROPERTY
        @given(texts, texts)
        def check(prompt, completion):
            assume(prompt and completion)
            row = render(Completion(prompt, completion), spaced_tokenizer, max_length=10_000)
            assert row.input_ids[: row.prompt_length] == spaced_tokenizer(prompt)["input_ids"]
            # No space appears at the seam: the whole row reads as the two texts written one after the other.
            assert spaced_tokenizer.decode(row.input_ids, skip_special_tokens=True) == prompt + completion

        check()

    @pytest.mark.parametrize("name", TOKENIZERS)
    def test_truncation_keeps_the_left_end(self, request, name):
        tokenizer = request.getfixturevalue(name)

        @PROPERTY
        @given(texts, texts, st.integers(1, 60))
        def check(question, answer, max_length):
            whole = render(chat(question, answer), tokenizer, max_length=10_000)
            cut = render(chat(question, answer), tokenizer, max_length=max_length)
            assert cut.input_ids == whole.input_ids[:max_length]
            assert cut.labels == whole.labels[:max_length]
            assert cut.truncated == (len(whole.input_ids) > max_length)
            assert cut.prompt_length == min(whole.prompt_length, max_length)
            assert cut.answer_text == answer

        check()


def test_eos_is_supervised_although_it_is_the_pad_token(chatml_tokenizer):
    row = render(chat("q", "yes"), chatml_tokenizer, max_length=99)
    assert chatml_tokenizer.pad_token_id == chatml_tokenizer.eos_token_id == row.labels[-1]


def test_text_after_the_end_of_turn_is_dropped(chatml_tokenizer):
    example = chat("q", "yes")
    full = chatml_tokenizer.apply_chat_template(list(example.messages), tokenize=False)
    row = render(example, chatml_tokenizer, max_length=99)
    assert full.endswith("<|im_end|>\n")
    assert chatml_tokenizer.decode(row.input_ids) == full[:-1]


def learned_answers(rows, example, tokenizer) -> list[str]:
    """The answers that some row teaches as a server would have the model give them: behind the same prompt tokens."""
    found, accounted = [], [0] * len(rows)
    for index, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(
            list(example.messages[:index]), add_generation_prompt=True, return_dict=True
        )["input_ids"]
        alone = render(Chat(example.messages[: index + 1]), tokenizer, max_length=10_000)
        for number, row in enumerate(rows):
            length = len(alone.input_ids)
            learned = [label != IGNORED for label in row.labels[len(prompt) : length]]
            if row.input_ids[:length] == alone.input_ids and all(learned):
                found.append(tokenizer.decode(row.labels[len(prompt) : length]))
                accounted[number] += len(learned)
    # Nothing else is learned, and nothing twice.
    assert accounted == [sum(label != IGNORED for label in row.labels) for row in rows]
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_answer_is_learned_behind_what_a_server_sends(request, name):
    tokenizer, end = request.getfixturevalue(name), END_OF_TURN[name]
    renderer = Renderer(tokenizer, "assistant", 10_000, resolve_chat_template(tokenizer, None))

    @PROPERTY
    @given(st.lists(texts, min_size=2, max_size=8).filter(lambda contents: len(contents) % 2 == 0))
    def check(contents):
        example = chat(*contents)
        rows = renderer.render(example)
        assert learned_answers(rows, example, tokenizer) == [answer + end for answer in contents[1::2]]
        assert rows[-1] == render(example, tokenizer, max_length=10_000, loss_on="assistant")
        assert rows[-1].answer_text == contents[-1]

    check()


def test_answers_of_one_conversation_are_one_row(chatml_tokenizer):
    renderer = Renderer(chatml_tokenizer, "assistant", 10_000, resolve_chat_template(chatml_tokenizer, None))
    (row,) = renderer.render(chat("one?", "1.", "two?", "2.", "three?", "3."))
    end = chatml_tokenizer.decode(row.input_ids[-1:])
    assert supervised_text(row, chatml_tokenizer) == f"1.{end}2.{end}3.{end}"
    assert (
        row.input_ids
        == render(chat("one?", "1.", "two?", "2.", "three?", "3."), chatml_tokenizer, max_length=99).input_ids
    )


def test_history_that_a_server_tokenizes_otherwise_gets_rows_of_its_own(llama3_tokenizer):
    """Line feeds before an answer are one token in a prompt that ends there, and two where the answer follows."""
    renderer = Renderer(llama3_tokenizer, "assistant", 10_000, resolve_chat_template(llama3_tokenizer, None))
    example = chat("one?", "1.", "two?", "2.")
    rows = renderer.render(example)
    assert len(rows) == 2
    assert learned_answers(rows, example, llama3_tokenizer) == ["1.<|eot_id|>", "2.<|eot_id|>"]


THINKING = """
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == "assistant" and not loop.last and "</think>" in content %}
{%- set content = content.split("</think>")[-1].lstrip() %}
{%- endif %}
{{- "<|im_start|>" + message.role + "\\n" + content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""


def test_a_template_that_drops_earlier_thinking_gets_a_row_for_each_thought(chatml_tokenizer):
    """As Qwen3's: the model sees earlier answers without what it thought, and gives the next one with it."""
    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.chat_template = THINKING
    example = chat("q1", "<think>hm</think>a1", "q2", "a2", "q3", "<think>so</think>a3")
    rows = Renderer(tokenizer, "assistant", 10_000, THINKING).render(example)
    assert [supervised_text(row, tokenizer) for row in rows] == [
        "<think>hm</think>a1<|im_end|>",
        "a2<|im_end|><think>so</think>a3<|im_end|>",
    ]
    assert learned_answers(rows, example, tokenizer) == [
        "<think>hm</think>a1<|im_end|>", "a2<|im_end|>", "<think>so</think>a3<|im_end|>"
    ]  # fmt: skip


def test_earlier_answers_of_a_row_that_is_cut_stay(chatml_tokenizer):
    whole = render(chat("one?", "1.", "two?", "2."), chatml_tokenizer, max_length=99, loss_on="assistant")
    renderer = Renderer(
        chatml_tokenizer, "assistant", whole.prompt_length, resolve_chat_template(chatml_tokenizer, None)
    )
    (row,) = renderer.render(chat("one?", "1.", "two?", "2."))
    assert row.truncated and row.prompt_length == len(row.input_ids) == whole.prompt_length
    assert supervised_text(row, chatml_tokenizer).startswith("1.") and "2." not in supervised_text(
        row, chatml_tokenizer
    )


def test_a_pair_is_the_better_row_with_the_other_answer_behind_its_prompt(tokenizer):
    better, worse = chat("What is it?", "a lamp"), chat("What is it?", "two old lamps")
    row = render(Pair(better, worse), tokenizer, max_length=200)
    alone, other = (render(example, tokenizer, max_length=200) for example in (better, worse))
    assert (row.input_ids, row.labels, row.answer_text) == (alone.input_ids, alone.labels, "a lamp")
    assert row.input_ids[: row.prompt_length] + row.rejected_ids == other.input_ids
    assert row.tokens == len(alone.input_ids) + len(other.input_ids)
    assert not row.truncated and row.good is None and alone.rejected_ids is None
    cut = render(Pair(better, worse), tokenizer, max_length=len(alone.input_ids))
    assert (
        cut.truncated
        and cut.input_ids == alone.input_ids
        and len(cut.rejected_ids) == sum(label != IGNORED for label in cut.labels)
    )


def test_pairs_that_are_cut_where_they_differ_are_counted(jsonl_source, chatml_tokenizer, data_settings):
    source = jsonl_source([{"prompt": "q", "chosen": "same words " * 9 + "a", "rejected": "same words " * 9 + "b"}])
    with pytest.raises(UserError, match="both answers are the same"):
        prepare(all_rows(source), chatml_tokenizer, data_settings(max_length=8), split_name="train")


def test_a_judged_answer_keeps_its_judgement(tokenizer):
    row = render(Judged(chat("q", "a"), False), tokenizer, max_length=100)
    assert row.good is False and row.input_ids == render(chat("q", "a"), tokenizer, max_length=100).input_ids


def test_loss_on_all(tokenizer):
    row = render(chat("q", "a"), tokenizer, loss_on="all", max_length=99)
    assert row.labels == row.input_ids
    assert 0 < row.prompt_length < len(row.input_ids)


def test_plain_text_is_learned_whole(tokenizer):
    row = render(Text("The quick fox"), tokenizer, max_length=99)
    assert row.labels == row.input_ids == [*tokenizer("The quick fox")["input_ids"], tokenizer.eos_token_id]
    assert row.answer_text is None


def test_no_second_bos_or_eos_where_the_text_has_its_own(llama3_tokenizer):
    bos, eos = llama3_tokenizer.bos_token, llama3_tokenizer.eos_token
    plain = render(Completion("q", "a"), llama3_tokenizer, max_length=99)
    assert render(Completion(bos + "q", "a" + eos), llama3_tokenizer, max_length=99) == plain
    assert render(Text(f"{bos}t{eos}\n"), llama3_tokenizer, max_length=99).input_ids == (
        render(Text("t"), llama3_tokenizer, max_length=99).input_ids
    )


def test_one_bos_in_chats(llama3_tokenizer):
    row = render(chat("q", "a"), llama3_tokenizer, max_length=99)
    assert row.input_ids.count(llama3_tokenizer.bos_token_id) == 1 and row.input_ids[0] == llama3_tokenizer.bos_token_id


def test_eos_is_taught_where_the_template_ends_with_no_special_token(llama3_tokenizer):
    template = resolve_chat_template(llama3_tokenizer, "chatml")  # its markers are ordinary text to this tokenizer
    row = render(chat("q", "a"), llama3_tokenizer, max_length=99, chat_template=template)
    assert supervised_text(row, llama3_tokenizer) == "a<|im_end|>" + llama3_tokenizer.eos_token


def test_both_ends_are_taught_where_a_template_closes_turn_and_text(llama3_tokenizer):
    template = "{% for m in messages %}{{ m.role + ':' + m.content + '<|eot_id|>\\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% else %}{{ eos_token }}{% endif %}"
    )
    row = render(chat("q", "a"), llama3_tokenizer, max_length=99, chat_template=template)
    assert supervised_text(row, llama3_tokenizer) == "a<|eot_id|>\n<|end_of_text|>"
    assert row.answer_text == "a"


def test_text_that_the_template_puts_before_the_answer_is_learned(chatml_tokenizer):
    """As Qwen3, which renders an empty thought into an answer without one."""
    template = chatml_tokenizer.chat_template.replace(
        "message['content']",
        "('<think></think>' if loop.last and message['role'] == 'assistant' else '') + message['content']",
    )
    row = render(chat("q", "a"), chatml_tokenizer, max_length=99, chat_template=template)
    assert row.answer_text == "<think></think>a"


def test_a_generation_prompt_that_the_answer_does_not_begin_with_is_refused(chatml_tokenizer):
    """As DeepSeek-R1, whose generation prompt opens a thought that rendered answers do not have."""
    template = chatml_tokenizer.chat_template.replace(
        "assistant\\n' }}\n{%- endif", "assistant\\n<think>' }}\n{%- endif"
    )
    assert template != chatml_tokenizer.chat_template
    with pytest.raises(UserError, match="another prompt than in serving"):
        render(chat("q", "a"), chatml_tokenizer, max_length=99, chat_template=template)


def test_a_conversation_that_the_template_refuses(chatml_tokenizer):
    template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match="refuses this conversation: System role not supported"):
        render(chat("q", "a"), chatml_tokenizer, max_length=99, chat_template=template)


def test_a_template_that_loses_the_answer(chatml_tokenizer):
    """As templates of vision models, which look for text inside a list of parts."""
    template = chatml_tokenizer.chat_template.replace("message['content']", "message['content'][0]['text']")
    with pytest.raises(UserError, match="leaves the answer out"):
        render(
            chat("q", "a"), chatml_tokenizer, max_length=99, chat_template=template.replace(" + message", " ~ message")
        )


def test_prepare_counts_and_locates(jsonl_source, chatml_tokenizer, data_settings):
    source = jsonl_source([{"prompt": "p", "completion": "c" * length} for length in (1, 2, 40)])
    reported = []
    prepared = prepare(
        all_rows(source.model_copy(update={"weight": 2})),
        chatml_tokenizer,
        data_settings(max_length=10),
        split_name="train",
        progress=lambda done, total: reported.append((done, total)),
    )
    assert (prepared.statistics.rows_read, prepared.statistics.rows, prepared.statistics.truncated) == (6, 6, 2)
    assert prepared.statistics.tokens == sum(len(row.input_ids) for row in prepared.rows)
    assert prepared.statistics.supervised_tokens == sum(
        label != IGNORED for row in prepared.rows for label in row.labels
    )
    assert prepared.rows.where(5).endswith("train.jsonl:3")
    assert prepared.chat_template is None
    assert reported[-1] == (3, 3)


def test_overlong_rows_are_dropped_when_asked(jsonl_source, chatml_tokenizer, data_settings):
    source = jsonl_source([{"prompt": "p", "completion": "c" * length} for length in (1, 40)])
    prepared = prepare(
        all_rows(source), chatml_tokenizer, data_settings(max_length=10, overlong="drop"), split_name="train"
    )
    assert (len(prepared.rows), prepared.statistics.dropped, prepared.statistics.truncated) == (1, 1, 0)
    with pytest.raises(UserError, match="all 2 rows of the train split are longer than 1 tokens"):
        prepare(all_rows(source), chatml_tokenizer, data_settings(max_length=1, overlong="drop"), split_name="train")


def test_rows_without_a_supervised_token_are_counted_and_shown(jsonl_source, chatml_tokenizer, data_settings):
    source = jsonl_source([{"prompt": "word " * 50, "completion": "c"}] * 7 + [{"prompt": "p", "completion": "c"}])
    with pytest.raises(UserError) as caught:
        prepare(all_rows(source), chatml_tokenizer, data_settings(max_length=20), split_name="train")
    message = str(caught.value)
    assert "train.jsonl:1: no token carries loss: the prompt alone fills max_length (20 tokens); it ends …'" in message
    assert "2 more: 7 of 8 rows" in message
    kept = render_rows(all_rows(source), chatml_tokenizer, data_settings(max_length=20), split_name="train")
    assert len(kept.rows) == 8


def test_the_first_token_of_a_row_is_never_supervised(chatml_tokenizer):
    row = render(Text(""), chatml_tokenizer, max_length=9)
    assert row.labels == [chatml_tokenizer.eos_token_id] and row.supervised_tokens == 0


def test_data_that_need_a_template_without_one(jsonl_source, spaced_tokenizer, data_settings):
    source = jsonl_source([{"question": "q", "answer": "a"}])
    with pytest.raises(UserError, match="this model's tokenizer has no chat template"):
        prepare(all_rows(source), spaced_tokenizer, data_settings(), split_name="train")
    prepared = prepare(all_rows(source), spaced_tokenizer, data_settings(chat_template="mistral"), split_name="train")
    assert prepared.chat_template == resolve_chat_template(spaced_tokenizer, "mistral")
    assert supervised_text(prepared.rows[0], spaced_tokenizer).strip() == "a</s>"


def test_rows_that_cannot_be_rendered_are_located(jsonl_source, chatml_tokenizer, data_settings, tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text("{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}{{ eos_token }}")
    source = jsonl_source([{"question": question, "answer": "a"} for question in ("good", "bad")])
    with pytest.raises(UserError, match=r"train\.jsonl:2: the chat template refuses this conversation: no"):
        prepare(all_rows(source), chatml_tokenizer, data_settings(chat_template=str(template)), split_name="train")
