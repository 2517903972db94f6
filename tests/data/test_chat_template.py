"""Chat templates: what transformers makes of them, in pieces, on one day, and never without end."""

import datetime
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llava_mini_jax.data.text import chat_template
from llava_mini_jax.data.text.conversation import TEMPLATES, Turn, encode
from llava_mini_jax.data.text.guarded import GUARDED
from llava_mini_jax.data.text.prompt_text import render
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.answer import AnswerText
from llava_mini_jax.inference.prompt_template import end_of_turn, stop_text
from tests.data.toy_tokenizers import make_byte_level

HEADER = "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
# The published one of LLaMA-3, and of LLaMA-3.1 the part that says the day.
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content ="
    " '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_3_1 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = (
    "{%- set ns = namespace(first=true) -%}{%- for m in messages -%}"
    "{%- if m.role == 'nobody' %}{% continue %}{% endif -%}"
    "{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ eos_token ~ '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|eot_id|>{% endgeneration %}{% else %}" + HEADER + "{{ m.content }}<|eot_id|>{% endif %}"
    "{% endfor %}{{ {'é': [1, none]} | tojson }}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + LLAMA_3
)
IN_PARTS = (
    "{% for m in messages %}{{ m.role | upper + ': ' }}{% for c in m.content |"
    " selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QUESTIONS = (
    "What is this?",
    "  padded  ",
    "two\nlines",
    "",
    "Ünïcödé 你好 🎂",
    "for i in range(3):\n    print(f'{i:>3} <b>')",
    "3.14 {{ 1 }} {% raw %}",
    "\\n\\",
)


def tokenizer_of(text: str, **tokens: str) -> Any:
    tokenizer = make_byte_level()
    tokenizer.chat_template = text
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return tokenizer


def theirs(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    found = tokenizer.apply_chat_template(messages, tokenize=True, **options)
    return found if isinstance(found, list) else found["input_ids"]


@pytest.mark.parametrize("text", [LLAMA_3, LLAMA_3_1, CHATML, GENERATION, NO_SYSTEM, IN_PARTS])
@pytest.mark.parametrize("more", [[], [("assistant", "It is a dog."), ("user", "Sure?")]])
def test_ids_are_those_of_apply_chat_template(text: str, more: list[tuple[str, str]]) -> None:
    tokenizer, template = tokenizer_of(text), TEMPLATES["chat"]
    for question in QUESTIONS:
        spoken = [("user", question), *more]
        system = [] if text == NO_SYSTEM else [("system", template.own_system)]
        messages: list[dict[str, Any]] = [{"role": r, "content": x} for r, x in [*system, *spoken]]
        if text == IN_PARTS:
            for message in messages:
                message["content"] = [{"type": "text", "text": message["content"]}]
        expected = theirs(tokenizer, messages, add_generation_prompt=True)
        turns = [*(Turn(r, x) for r, x in spoken), Turn("assistant", None)]  # type: ignore[arg-type]
        found = encode(template, turns, tokenizer, double_bos=False)
        bos = [] if expected[:1] == [0] else [0]  # the file's, where the template writes none
        assert found.ids.tolist() == bos + expected


@pytest.mark.parametrize("text", [LLAMA_3, LLAMA_3_1, CHATML, GENERATION, NO_SYSTEM, IN_PARTS])
def test_labels_are_the_answers_and_their_ends(text: str) -> None:
    tokenizer = tokenizer_of(text)
    for answer in (*QUESTIONS[:3], "é 🎂 <b>x</b>", "1"):
        turns = [Turn("user", "<image>\nq"), Turn("assistant", answer)] * 2
        encoded = encode(TEMPLATES["chat"], turns, tokenizer, double_bos=False)
        learnt = tokenizer.decode(encoded.ids[encoded.supervised])
        kept = answer.strip() if text in (LLAMA_3, LLAMA_3_1, NO_SYSTEM) else answer
        # What stands between an answer and its end has to be generated too.
        end = " <|eot_id|>" if text == IN_PARTS else "<|eot_id|>"
        before = " " if text == IN_PARTS else ""  # one token with the answer's first word
        assert learnt == (before + kept + end) * 2 or learnt == (kept + end) * 2
    assert end_of_turn(TEMPLATES["chat"], tokenizer) == tokenizer.convert_tokens_to_ids(
        "<|eot_id|>"
    )
    assert stop_text(TEMPLATES["chat"], tokenizer) is None


def test_an_end_in_letters_is_a_stop_text() -> None:
    text = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>\n{% endfor %}"
    tokenizer = tokenizer_of(text + "{% if add_generation_prompt %}[assistant] {% endif %}")
    template = TEMPLATES["chat"]
    assert end_of_turn(template, tokenizer) is None and stop_text(template, tokenizer) == "<|end|>"
    turns = [Turn("user", "q"), Turn("assistant", "a <|en")]
    encoded = encode(template, turns, tokenizer, double_bos=False)
    learnt = encoded.ids[encoded.supervised].tolist()
    assert tokenizer.decode(learnt).strip() == "a <|en<|end|>"
    answer = AnswerText(tokenizer, [], ["<|end|>"], 100, "length")
    assert "".join(answer.push([token]) for token in learnt) == "a <|en" and answer.finish == "stop"


def test_chat_needs_a_chat_template() -> None:
    with pytest.raises(InputError, match="the tokenizer has none: give another template"):
        render(TEMPLATES["chat"], [Turn("user", "a"), Turn("assistant", None)], make_byte_level())


def test_the_day_is_one_for_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, turns = tokenizer_of(LLAMA_3_1), [Turn("user", "a"), Turn("assistant", None)]

    class Later(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2031, 5, 6)

    began = datetime.date.fromisoformat(chat_template.today())
    monkeypatch.setattr(datetime, "date", Later)
    for name in ("chat", "llama_3_1"):
        assert f"Today Date: {began:%d %b %Y}\n" in render(TEMPLATES[name], turns, tokenizer)
        dated = render(TEMPLATES[name], turns, tokenizer, "2024-07-26")
        assert "Today Date: 26 Jul 2024\n" in dated


HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "writes": "{% for a in range(99999) %}{% for b in range(99999) %}xxxx{% endfor %}{% endfor %}",
    "doubles": "{% set n = namespace(s='x') %}{% for a in range(60) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "repeats": "{{ 'x' * 10000000000 }}",
    "fills up": "{{ '%09999999999d' % 1 }}",
    "centres": "{{ 'a' | center(9999999999) }}",
    "multiplies": "{% set n = namespace(v=3) %}{% for a in range(99) %}"
    "{% set n.v = n.v * n.v %}{% endfor %}",
    "sorts": "{% for a in range(99999) %}{{ (range(99999) | list | sort)[0] }}{% endfor %}",
    "calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "nests": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "looks around": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "runs a command": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "reads a file": "{% include '/etc/passwd' %}",
    "only when asked much": LLAMA_3 + "{% if 'much' in messages[-1].content %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_templates_end_in_a_sentence(kind: str) -> None:
    tokenizer, began = tokenizer_of(HOSTILE[kind]), time.monotonic()
    with pytest.raises(InputError) as caught:
        render(TEMPLATES["chat"], [Turn("user", "much"), Turn("assistant", None)], tokenizer)
    assert "\n" not in str(caught.value) and "chat template" in str(caught.value)
    assert time.monotonic() - began < 60, "a limit for hangs; idle machines take a second"
    expected = render(TEMPLATES["llama_3_1"], [Turn("user", "a")], tokenizer_of(LLAMA_3))
    assert expected.endswith("a<|eot_id|>"), "the next one is read as if nothing had been"


def test_a_child_that_was_killed_is_replaced() -> None:
    tokenizer = tokenizer_of(LLAMA_3)
    render(TEMPLATES["chat"], [Turn("user", "before")], tokenizer)
    assert GUARDED._process is not None
    os.kill(GUARDED._process.pid, signal.SIGKILL)
    GUARDED._process.wait()
    with pytest.raises(InputError):
        render(TEMPLATES["chat"], [Turn("user", "now")], tokenizer)
    assert "after" in render(TEMPLATES["chat"], [Turn("user", "after")], tokenizer)


def test_threads_get_their_own_answers() -> None:
    tokenizer = tokenizer_of(LLAMA_3)

    def one(number: int) -> bool:
        return f"{number}<|eot_id|>" in render(
            TEMPLATES["chat"], [Turn("user", f"number {number}")], tokenizer
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(200)))
