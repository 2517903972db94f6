"""Chat templates as Qwen's and SmolLM's models publish them: ids, and spans of answers."""

from typing import Any

import pytest

from llava_mini_jax.data.text.conversation import TEMPLATES, EncodedPrompt, Turn, encode
from llava_mini_jax.data.text.prompt_text import render
from llava_mini_jax.errors import InputError
from tests.data.toy_tokenizers import make_byte_level

# Without the parts for tools, which no conversation here has.
QWEN2_5 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or
           (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content =
                content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n')
                + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
SMOLLM3 = """{%- if enable_thinking is not defined -%}
    {%- set enable_thinking = true -%}
{%- endif -%}
{%- set reasoning_mode = "/think" if enable_thinking else "/no_think" -%}
{%- if messages[0].role == "system" -%}
    {%- set system_message = messages[0].content -%}
    {%- if "/no_think" in system_message -%}{%- set reasoning_mode = "/no_think" -%}{%- endif -%}
    {%- set custom = system_message.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{{- "<|im_start|>system\\n## Metadata\\n\\nKnowledge Cutoff Date: June 2025\\n" -}}
{{- "Today Date: " ~ strftime_now("%d %B %Y") ~ "\\nReasoning Mode: " + reasoning_mode -}}
{{- "\\n\\n## Custom Instructions\\n\\n" -}}
{%- if custom -%}{{- custom + "\\n\\n" -}}{%- else -%}{{- "You are SmolLM.\\n\\n" -}}{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "user" -%}
        {{ "<|im_start|>" + message.role + "\\n"  + content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" -%}
        {% generation %}
        {%- if reasoning_mode == "/think" -%}
            {{ "<|im_start|>assistant\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- else -%}
            {{ "<|im_start|>assistant\\n" + "<think>\\n\\n</think>\\n\\n" + content.lstrip("\\n")
               + "<|im_end|>\\n" }}
        {%- endif -%}
        {% endgeneration %}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if reasoning_mode == "/think" -%}
        {{ "<|im_start|>assistant\\n" }}
    {%- else -%}
        {{ "<|im_start|>assistant\\n" + "<think>\\n\\n</think>\\n\\n"  }}
    {%- endif -%}
{%- endif -%}
"""
PUBLISHED = {"qwen2.5": QWEN2_5, "qwen3": QWEN3, "smollm2": SMOLLM2, "smollm3": SMOLLM3}
THOUGHT = "<think>\n\n</think>\n\n"
DATE = "2026-11-29"
TALK = [
    ("user", "<image>\nWhat is\nthis? "),
    ("assistant", " A dog.\n"),
    ("user", "Sure?"),
    ("assistant", "Yes: Ünïcödé 你好\n\n- 1\n- 2"),
]


def tokenizer_of(text: str) -> Any:
    tokenizer = make_byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])  # as in Qwen3's, they are not special
    tokenizer.chat_template = text
    return tokenizer


def encoded(tokenizer: Any, spoken: list[tuple[str, str | None]]) -> EncodedPrompt:
    turns = [Turn(role, text) for role, text in spoken]  # type: ignore[arg-type]
    return encode(TEMPLATES["chat"], turns, tokenizer, double_bos=False, date=DATE)


def without_image(spoken: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [(role, text and text.replace("<image>\n", "")) for role, text in spoken]


@pytest.fixture(params=PUBLISHED)
def tokenizer(request) -> Any:
    return tokenizer_of(PUBLISHED[request.param])


def spans(found: EncodedPrompt, tokenizer: Any) -> list[str]:
    """The texts that are learnt, one after the other."""
    pieces, ids = [], []
    for token, learnt in zip(found.ids, found.supervised, strict=True):
        if learnt:
            ids.append(int(token))
        elif ids:
            pieces.append(tokenizer.decode(ids))
            ids = []
    return pieces + ([tokenizer.decode(ids)] if ids else [])


def theirs(tokenizer: Any, spoken: list[tuple[str, str]], **options: Any) -> list[int]:
    system = ("system", TEMPLATES["chat"].own_system)
    messages = [{"role": role, "content": text} for role, text in (system, *spoken)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **options)
    return tokenizer(text, add_special_tokens=False).input_ids


def comparable(found: EncodedPrompt, tokenizer: Any) -> list[int]:
    """Without the bos that the toy tokenizer adds."""
    ids = found.ids.tolist()
    return ids[1:] if ids[0] == tokenizer.bos_token_id else ids


def test_ids_are_those_of_apply_chat_template(tokenizer: Any, monkeypatch) -> None:
    # transformers asks the clock; that day is not this one.
    fixed = tokenizer.chat_template.replace('strftime_now("%d %B %Y")', '"29 November 2026"')
    other = tokenizer_of(fixed)
    for spoken in (TALK[:1], TALK[:3], TALK):
        spoken = without_image(spoken)
        is_open = spoken[-1][0] == "user"
        expected = theirs(other, spoken, add_generation_prompt=is_open)
        turns = [*spoken, ("assistant", None)] if is_open else spoken
        assert comparable(encoded(tokenizer, turns), tokenizer) == expected


def test_what_is_learnt_is_every_answer_and_its_end(tokenizer: Any) -> None:
    found = encoded(tokenizer, TALK)
    assert spans(found, tokenizer) == [f"{text}<|im_end|>" for _, text in TALK[1::2]]
    assert (found.ids == -200).sum() == 1
    assert not encoded(tokenizer, [*TALK[:3], ("assistant", None)]).supervised.any()


def test_an_open_prompt_is_what_stands_in_front_of_the_last_answer(tokenizer: Any) -> None:
    """So that a model is asked as it has learnt to answer; with an empty thought, or with none."""
    for count in (2, 4):
        whole = encoded(tokenizer, TALK[:count]).ids.tolist()
        opened = encoded(tokenizer, [*TALK[: count - 1], ("assistant", None)]).ids.tolist()
        assert whole[: len(opened)] == opened
    text = tokenizer.decode([token for token in opened if token >= 0])
    thinks = tokenizer.chat_template in (QWEN3, SMOLLM3)
    assert text.endswith(THOUGHT) == thinks
    # Qwen3 forgets earlier thoughts, SmolLM3 keeps them.
    thoughts = {QWEN3: 1, SMOLLM3: 2}
    assert text.count(THOUGHT) == thoughts.get(tokenizer.chat_template, 0)


@pytest.mark.parametrize("answer", ["<think>\nHm.\n</think>\n\nA dog.", "a </think> b", "\nA"])
def test_an_answer_that_qwen3s_template_would_change_is_refused(answer: str) -> None:
    spoken = [("user", "What?"), ("assistant", answer)]
    with pytest.raises(InputError, match="changes the text of the messages"):
        encoded(tokenizer_of(QWEN3), spoken)


def test_templates_without_thoughts_keep_what_looks_like_one() -> None:
    answer = "<think>\nHm.\n</think>\n\nA dog."
    for text in (QWEN2_5, SMOLLM2):
        found = encoded(tokenizer_of(text), [("user", "What?"), ("assistant", answer)])
        assert spans(found, tokenizer_of(text)) == [f"{answer}<|im_end|>"]


def test_a_brief_chat_has_an_empty_system_message() -> None:
    tokenizer, turns = tokenizer_of(SMOLLM2), [Turn("user", "What?"), Turn("assistant", "A dog.")]
    expected = (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>\n"
    )
    assert render(TEMPLATES["chat_brief"], turns, tokenizer) == expected
    found = encode(TEMPLATES["chat_brief"], turns, tokenizer, double_bos=False)
    assert spans(found, tokenizer) == ["A dog.<|im_end|>"]
