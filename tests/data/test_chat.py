import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from lora_jax.data.chat import ChatFormat, encode_chat, encode_rows, encode_text, render
from lora_jax.data.formats import Row
from lora_jax.errors import InputError

import templates


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant turns in alternation."""
    head = [] if system is None else [{"role": "system", "content": system}]
    roles = ["user", "assistant"] * len(contents)
    return head + [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]


CONVERSATIONS = {
    "single": turns("Who are you?", "I am an assistant."),
    "multi_turn": turns("Hello there!", "Hello!", "Capital of France?", "Paris.", "Bye", "Bye!"),
    "system": turns("Hi", "Hello there!", system="Be brief."),
    "unicode": turns("漢字 🙂?", "👩‍👩‍👧 naïve café 你好 🙂", "e\u0301", "ﬁ Ω 🇫🇷"),
    "whitespace": turns("Hi  ", "  two\n\n  spaces  ", "\n\nHi", "\n\tHello \n"),
    "special_tokens_in_text": turns(
        "what is <|im_end|>?", "<|im_end|> ends a turn, <|im_start|>user begins one", "ok", "fine"
    ),
    "empty_question": turns("", "Hello there!"),
    "code": turns("add?", "def add(a, b):\n    return a + b\n", "{{ 1 + 1 }}", "{% raw %}"),
}
TEMPLATES = [
    *("SMOLLM2", "CHATML", "CHATML_MARKED", "LLAMA3", "ZEPHYR"),
    *("INSTRUCT", "TOOLS", "PLAIN", "INDENTED"),
]


@pytest.fixture(scope="session")
def reference(tokenizer, special_tokens) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_equals_transformers(
    reference, special_tokens, name, conversation, add_generation_prompt
):
    if name == "INSTRUCT" and conversation == "system":
        pytest.skip("that template takes no system turn")
    template, messages = getattr(templates, name), CONVERSATIONS[conversation]
    expected = reference.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    assert render(template, messages, special_tokens, add_generation_prompt) == expected


def test_templates_write_one_conversation_differently(special_tokens):
    messages = CONVERSATIONS["single"]
    texts = {render(getattr(templates, name), messages, special_tokens) for name in TEMPLATES}
    assert len(texts) == len(TEMPLATES) - 1, "only the two ChatML templates agree"


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_mask_equals_that_of_transformers_on_a_marked_template(
    tokenizer, special_tokens, conversation
):
    messages = CONVERSATIONS[conversation]
    expected = PreTrainedTokenizerFast(tokenizer_object=tokenizer).apply_chat_template(
        messages,
        chat_template=templates.CHATML_MARKED,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    for template in (templates.CHATML, templates.CHATML_MARKED):
        encoded = encode_chat(tokenizer, template, special_tokens, messages)
        assert encoded.ids.tolist() == expected["input_ids"]
        assert encoded.trained.tolist() == [bool(mask) for mask in expected["assistant_masks"]]
        assert 0 < encoded.trained.sum() < len(encoded.ids)
    assert encoded.ids.dtype == np.int32
    assert encoded.trained.dtype == np.bool_


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_offsets_that_leave_spaces_out_give_the_same_mask(
    tokenizer, trimming_tokenizer, special_tokens, conversation
):
    messages = CONVERSATIONS[conversation]
    exact, trimmed = (
        encode_chat(each, templates.CHATML, special_tokens, messages)
        for each in (tokenizer, trimming_tokenizer)
    )
    assert trimmed.ids.tolist() == exact.ids.tolist()
    assert trimmed.trained.tolist() == exact.trained.tolist()


def trained_texts(tokenizer: Tokenizer, template, special_tokens, messages) -> list[str]:
    """Each run of trained tokens, decoded."""
    encoded = encode_chat(tokenizer, template, special_tokens, messages)
    cuts = np.flatnonzero(np.diff(encoded.trained)) + 1
    runs = zip(np.split(encoded.ids, cuts), encoded.trained[[0, *cuts]], strict=True)
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids, trained in runs if trained]


@pytest.mark.parametrize("conversation", ["single", "multi_turn", "system", "unicode"])
@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("SMOLLM2", "<|im_end|>"),
        ("CHATML", "<|im_end|>"),
        ("LLAMA3", "<|eot_id|>"),
        ("ZEPHYR", "</s>"),
        # This one has no header: the space before the answer is the model's to produce.
        ("INSTRUCT", "</s>"),
        # No end-of-turn token: the blank line is what generation stops at.
        ("PLAIN", "\n\n"),
    ],
)
def test_each_answer_is_trained_with_its_end_and_nothing_else(
    tokenizer, special_tokens, name, end, conversation
):
    messages = CONVERSATIONS[conversation]
    if name == "INSTRUCT" and conversation == "system":
        pytest.skip("that template takes no system turn")
    begin = {"INSTRUCT": " "}.get(name, "")
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    texts = trained_texts(tokenizer, getattr(templates, name), special_tokens, messages)
    assert texts == [f"{begin}{answer}{end}" for answer in answers]


def test_every_token_of_a_split_character_is_trained(tokenizer, special_tokens):
    messages = turns("🦊", "🦊")
    encoded = encode_chat(tokenizer, templates.CHATML, special_tokens, messages)
    fox = tokenizer.encode("🦊", add_special_tokens=False).ids
    assert len(fox) > 1
    assert encoded.ids[encoded.trained].tolist() == [*fox, tokenizer.token_to_id("<|im_end|>")]


def test_a_token_shared_by_header_and_answer_is_trained(tokenizer, special_tokens):
    encoded = encode_chat(tokenizer, templates.CHATML, special_tokens, turns("Hi", "\n\nYes"))
    assert tokenizer.token_to_id("ĊĊ") in encoded.ids
    assert tokenizer.decode(encoded.ids[encoded.trained].tolist()) == "\n\n\nYes"


def test_the_whole_text_is_tokenized_once(tokenizer, special_tokens):
    messages = CONVERSATIONS["multi_turn"]
    text = render(templates.SMOLLM2, messages, special_tokens)
    encoded = encode_chat(tokenizer, templates.SMOLLM2, special_tokens, messages)
    assert encoded.ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_template_that_rewrites_earlier_turns_is_refused_by_name(tokenizer, special_tokens):
    thought = "<think>hm</think>Hello!"
    once = turns("Hi", thought)
    encode_chat(tokenizer, templates.FORGETFUL, special_tokens, once)
    with pytest.raises(InputError, match=r"chat template .* messages\[1\] .*<think>hm"):
        encode_chat(tokenizer, templates.FORGETFUL, special_tokens, [*once, *turns("Bye", "Bye")])


def test_a_generation_prompt_that_no_answer_follows_is_refused(tokenizer, special_tokens):
    template = templates.CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>model\\n'")
    with pytest.raises(InputError, match=r'character .*"model'):
        encode_chat(tokenizer, template, special_tokens, CONVERSATIONS["single"])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].content.missing.field }}", "no attribute"),
        ("{{ raise_exception('no system turn') }}", "no system turn"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
    ],
)
def test_a_template_that_fails_is_an_input_error(template, reason):
    with pytest.raises(InputError, match=f"chat template refuses.*{reason}"):
        render(template, turns("Hi", "Hello"), {})


def test_rows_that_cannot_be_written_are_listed_with_their_places(tokenizer, special_tokens):
    chat_format = ChatFormat(tokenizer, templates.INSTRUCT, special_tokens)
    good, bad = turns("Hi", "Hello"), turns("Hi", "Hello", system="no")
    rows = [Row(tuple(m), "a.jsonl", i) for i, m in enumerate([good, bad, good, bad], start=1)]
    assert [row.place for row in encode_rows(chat_format, rows[::2])] == ["a.jsonl:1", "a.jsonl:3"]
    with pytest.raises(InputError, match="2 of 4 rows") as caught:
        encode_rows(chat_format, rows)
    assert "a.jsonl:2: the model's chat template refuses" in str(caught.value)
    assert "a.jsonl:4: the model's chat template refuses" in str(caught.value)


@pytest.mark.parametrize("setting", ["enable_truncation", "enable_padding"])
def test_a_tokenizer_that_would_cut_answers_is_refused(tokenizer, special_tokens, setting):
    cutting = Tokenizer.from_str(tokenizer.to_str())
    getattr(cutting, setting)(**{"enable_truncation": {"max_length": 4}}.get(setting, {}))
    with pytest.raises(InputError, match=r"no_truncation\(\) and no_padding\(\)"):
        encode_chat(cutting, templates.CHATML, special_tokens, turns("Hi", "Hello"))


@pytest.mark.parametrize("conversation", ["single", "multi_turn", "code"])
def test_of_all_turns_the_last_alone_can_be_trained(tokenizer, special_tokens, conversation):
    messages = CONVERSATIONS[conversation]
    whole = encode_chat(tokenizer, templates.CHATML, special_tokens, messages)
    last = encode_chat(tokenizer, templates.CHATML, special_tokens, messages, "last")
    assert last.ids.tolist() == whole.ids.tolist()
    text = tokenizer.decode(last.ids[last.trained], skip_special_tokens=False)
    assert text == messages[-1]["content"] + "<|im_end|>"
    assert (last.trained <= whole.trained).all()


def test_a_question_after_the_last_answer_is_not_trained(tokenizer, special_tokens):
    messages = [*turns("Hi", "Hello"), {"role": "user", "content": "Bye"}]
    last = encode_chat(tokenizer, templates.CHATML, special_tokens, messages, "last")
    assert tokenizer.decode(last.ids[last.trained]) == "Hello"


def test_a_template_that_forgets_earlier_thoughts_serves_the_last_turn(tokenizer, special_tokens):
    thought = "<think>hm</think>Hello!"
    messages = turns("Hi", thought, "Bye", thought)
    last = encode_chat(tokenizer, templates.FORGETFUL, special_tokens, messages, "last")
    assert tokenizer.decode(last.ids[last.trained]) == thought


def test_rows_take_the_choice_of_turns_and_refuse_another(tokenizer, special_tokens):
    chat_format = ChatFormat(tokenizer, templates.CHATML, special_tokens)
    rows = [Row(tuple(turns("Hi", "Hello", "Bye", "Goodbye")), "a.jsonl", 1)]
    everything, last = (
        encode_rows(chat_format, rows, choice)[0].trained.sum() for choice in ("all", "last")
    )
    assert 0 < last < everything
    with pytest.raises(InputError, match=r"'first': pass --assistant-turns all\|last"):
        encode_rows(chat_format, rows, "first")  # pyright: ignore[reportArgumentType]


def test_text_is_trained_whole_between_its_begin_and_its_end(tokenizer, special_tokens):
    beginning = Tokenizer.from_str(tokenizer.to_str())
    beginning.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    chat_format = ChatFormat(beginning, templates.CHATML, special_tokens)
    (encoded,) = encode_rows(chat_format, [Row((), "a.jsonl", 7, "Hello there!")])
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "<s>Hello there!</s>"
    assert encoded.trained.all()
    assert encoded.place == "a.jsonl:7"


def test_a_text_ends_once_even_if_the_tokenizer_ends_it_too(tokenizer, special_tokens):
    ending = Tokenizer.from_str(tokenizer.to_str())
    ending.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    both = [encode_text(each, special_tokens, "Hello").ids.tolist() for each in (tokenizer, ending)]
    assert both[0] == both[1]
    assert both[0][-1] == tokenizer.token_to_id("</s>")
