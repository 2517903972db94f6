"""What a model folder says, or lets guess, about prompts: the template, and what ends an answer."""

from pathlib import Path
from typing import Any

from llava_mini_jax import config as configs
from llava_mini_jax.config import Bundle
from llava_mini_jax.data.text.tokenizer_files import chat_template_of
from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import SECTION, read_json
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.ops.rope import Llama3Scaling
from llava_mini_jax.weights.families import family_of
from llava_mini_jax.weights.method_folders import PUBLISHED


def eos_ids(folder: Path, values: dict[str, Any]) -> tuple[int, ...]:
    """Tokens that end an answer: generation_config.json's, else config.json's."""
    path, name = folder / "generation_config.json", "eos_token_id"
    found = read_json(path).get(name) if path.is_file() else None
    if found is None:
        path, found = folder / "config.json", values.get(name)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for number in ids:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
            raise InputError(
                f'{path}: "{name}" is {found!r:.80}, expected a token\'s id or a list of them;'
                " correct it"
            )
    return tuple(dict.fromkeys(ids))


def template_of(llm: LlamaConfig, folder: Path, *, llava: bool) -> tuple[str, str]:
    """The prompts' template of a model, and why, for no config.json says it.

    Recognised are LLaMA-3.1 (its rope scaling) and LLaMA-3 (its theta), as the release tells them
    apart, unless the folder's own chat template is another one; and LLaVA's models of Vicuna. All
    others speak as their tokenizer's chat template does, or, without one, as Vicuna.
    `llava`: the folder is that of a LLaVA, not of a language model alone.
    """
    own = chat_template_of(folder)
    if own is None or "<|start_header_id|>" in own:
        if isinstance(llm.rope.scaling, Llama3Scaling):
            return "llama_3_1", "the language model is a LLaMA-3.1, by its rope scaling"
        if llm.rope.theta == configs.LLAMA_3_1_8B.rope.theta:
            return "llama_3", "the language model is a LLaMA-3, by its rope_theta"
    vicuna = llm.rope == configs.VICUNA_7B.rope and family_of(llm) == "llama"
    if llava and vicuna:
        return "vicuna_v1", "the language model is a Vicuna, by its rope_theta"
    if own is not None:
        return "chat", "an unknown kind of language model; its own chat template"
    if vicuna:
        return "vicuna_v1", "the language model has Vicuna's rope_theta, and no chat template"
    return "vicuna_v1", "a guess: the language model is not known, and has no chat template"


def template_told(bundle: Bundle, folder: Path, *, llava: bool = True) -> str:
    """A line for people: which template the prompts of a folder have, and why."""
    section = read_json(folder / "config.json").get(SECTION)
    own = section.get("prompt") if isinstance(section, dict) else None
    if isinstance(own, dict) and "template" in own:
        why = "its config.json says so"
    elif (method := PUBLISHED.get(bundle.model.compressor.kind)) and method.template:
        why = f"that of {bundle.model.compressor.kind}'s authors"
    else:
        why = template_of(bundle.model.llm, folder, llava=llava)[1]
    return f"template of prompts: {bundle.prompt.template} ({why})"
