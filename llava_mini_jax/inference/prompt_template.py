"""A model's prompt template, with its tokenizer: chosen, checked, and what ends an answer.

config.json, --conv-mode --with_prompt--> Bundle --with_tokenizer--> Bundle, known to write prompts
                                            |
             end_of_turn, stop_text: what ends every answer     written_as: a digest of it all
"""

import hashlib
import json
from dataclasses import replace
from typing import Any

from llava_mini_jax.config import Bundle
from llava_mini_jax.data.text import chat_template
from llava_mini_jax.data.text.conversation import IMAGE_MARK, TEMPLATES, Template, Turn, encode
from llava_mini_jax.data.text.prompt_text import is_own, pieces, render
from llava_mini_jax.data.text.tokenizer import told
from llava_mini_jax.errors import InputError


def template_of(bundle: Bundle) -> Template:
    name = bundle.prompt.template
    if name not in TEMPLATES:
        raise InputError(
            f'the prompt template "{name}" is unknown; give one of {", ".join(TEMPLATES)}'
            " (--conv-mode, load's template, or the model's config.json)"
        )
    return TEMPLATES[name]


def with_prompt(bundle: Bundle, template: str | None, max_length: int | None) -> Bundle:
    """`bundle` with another template and another number of positions, where they are given.

    What a published config.json says of them is a guess of ours, or a training run's setting.
    """
    changes: dict[str, Any] = {}
    if template is not None:
        changes["template"] = template
    if max_length is not None:
        if not 2 <= max_length <= bundle.model.llm.max_positions:
            raise InputError(
                f"max_length is {max_length}; give 2 to {bundle.model.llm.max_positions}, the"
                " positions of the language model"
            )
        changes["max_length"] = max_length
    bundle = replace(bundle, prompt=replace(bundle.prompt, **changes))
    template_of(bundle)
    return bundle


def with_tokenizer(bundle: Bundle, tokenizer: Any) -> Bundle:
    """`bundle` once its template and the tokenizer are known to write prompts together.

    Where the tokenizer's chat template asks for the date, `prompt.date` is today's from now on, if
    it says no other: the same for the whole run, and part of its settings.
    Raises InputError for a chat template that cannot be used.
    """
    template = template_of(bundle)
    if not is_own(template, tokenizer):
        return bundle
    if chat_template.asks_for_date(tokenizer):
        date = bundle.prompt.date or chat_template.today()
        bundle = replace(bundle, prompt=replace(bundle.prompt, date=date))
    render(template, [Turn("user", "a"), Turn("assistant", None)], tokenizer, bundle.prompt.date)
    return bundle


def written_as(bundle: Bundle, tokenizer: Any) -> str:
    """A digest of what template, date and tokenizer make of prompts: others write others."""
    template, date = template_of(bundle), bundle.prompt.date
    own = chat_template.of_tokenizer(tokenizer) if is_own(template, tokenizer) else None
    turns = [Turn("user", f"{IMAGE_MARK}\n a?"), Turn("assistant", "b c"), Turn("user", "d")]
    prompts = [
        render(template, [*turns[:count], Turn("assistant", None)], tokenizer, date)
        for count in (1, 3)
    ]
    parts = json.dumps([own, prompts, tokenizer.backend_tokenizer.to_str()])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def end_of_turn(template: Template, tokenizer: Any) -> int | None:
    """The token that ends every answer of a template; None if it has none of its own.

    A token is an end only if it is the whole end: of a tokenizer without "</s>", the last piece of
    those letters may be ">", which stands in many answers.
    """
    return _ending(template, tokenizer)[0]


def stop_text(template: Template, tokenizer: Any) -> str | None:
    """The text that ends every answer of a template, where no token does."""
    return _ending(template, tokenizer)[1]


def _ending(template: Template, tokenizer: Any) -> tuple[int | None, str | None]:
    """Found as what two different answers have in common at their end: the tokenizer's own chat
    template may end answers differently from ours."""
    last, text = set(), ""
    for answer in ("a", "1"):
        turns = [Turn("user", "a"), Turn("assistant", answer)]
        try:
            encoded = encode(template, turns, tokenizer, double_bos=False)
            (text,) = [part.text for part in pieces(template, turns, tokenizer) if part.answer][-1:]
        except InputError:  # a chat template that ends answers with nothing: no labels, no end
            return None, None
        supervised = encoded.ids[encoded.supervised]
        if not len(supervised):  # of a tokenizer that knows none of these letters
            return None, None
        last.add(int(supervised[-1]))
    ends = {text, text.strip()} - {""}
    if len(last) == 1:
        with told("the tokenizer", "cannot write a token"):
            (token,) = last
            if tokenizer.decode([token], skip_special_tokens=False) in ends:
                return token, None
    return None, (text.strip() or text) or None
