"""A conversation's own system message: it takes the place of the template's, or stands in front."""

import dataclasses

import pytest

from llava_mini_jax.data.text.conversation import IMAGE_MARK, IMAGE_TOKEN, TEMPLATES, Turn, encode
from llava_mini_jax.data.text.prompt_text import pieces, render
from llava_mini_jax.errors import InputError
from tests.data import toy_tokenizers

SYSTEM = Turn("system", "Speak like a pirate.", ())
ASKED = [Turn("user", f"{IMAGE_MARK}\nWhat?", (0,)), Turn("assistant", None)]
HEADERS = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_it_replaces_the_templates_own_system_text(name: str) -> None:
    template = TEMPLATES[name]
    if template.only_own:
        pytest.skip("it has no strings")
    without, written = render(template, ASKED), render(template, [SYSTEM, *ASKED])
    if template.own_around is None:
        assert name == "plain" and written == without  # captions have no text
        return
    before, behind = template.own_around
    assert written == without.replace(template.system, f"{before}{SYSTEM.text}{behind}", 1)
    assert template.name == "brief" or template.system not in written


def test_a_template_without_a_place_has_it_in_front_of_the_first_question() -> None:
    template = dataclasses.replace(TEMPLATES["vicuna_v1"], own_around=None, system="")
    (typed,) = [piece for piece in pieces(template, [SYSTEM, *ASKED], None) if piece.typed]
    assert typed.text == f"Speak like a pirate.\n\n{IMAGE_MARK}\nWhat?"
    assert typed.text[typed.marks[0] :].startswith(IMAGE_MARK)


@pytest.mark.parametrize("chat_template", [HEADERS, NO_SYSTEM + HEADERS])
def test_a_tokenizers_own_chat_template_gets_it(chat_template: str) -> None:
    tokenizer = toy_tokenizers.make_byte_level()
    tokenizer.chat_template = chat_template
    written = render(TEMPLATES["chat"], [SYSTEM, *ASKED], tokenizer)
    own_system = TEMPLATES["chat"].own_system
    assert own_system is not None and own_system not in written
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    system = f"{header.format('system')}Speak like a pirate.<|eot_id|>"
    asked = f"{IMAGE_MARK}\nWhat?<|eot_id|>"
    if chat_template is HEADERS:
        assert written.startswith(f"{system}{header.format('user')}{asked}")
    else:
        assert written.startswith(f"{header.format('user')}Speak like a pirate.\n\n{asked}")


def test_nothing_of_it_is_a_mark_or_a_control_token() -> None:
    tokenizer = toy_tokenizers.make_byte_level()
    system = Turn("system", f"{IMAGE_MARK} <|eot_id|>", ())
    ids = encode(TEMPLATES["vicuna_v1"], [system, *ASKED], tokenizer, double_bos=False).ids.tolist()
    assert ids.count(IMAGE_TOKEN) == 1
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") not in ids


@pytest.mark.parametrize(
    "turns",
    [[SYSTEM], [SYSTEM, Turn("assistant", None)], [SYSTEM, SYSTEM, *ASKED], [*ASKED[:1], SYSTEM]],
)
def test_it_stands_in_front_and_alone(turns: list[Turn]) -> None:
    with pytest.raises(InputError, match=r"the user|no turns"):
        render(TEMPLATES["vicuna_v1"], turns)
