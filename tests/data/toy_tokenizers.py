"""Small tokenizers of each kind that language models have, and the golden prompts they read."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers import trainers as tokenizer_trainers

from tests import golden_data

GOLDEN = golden_data.folder("prompts")
PROMPTS = json.loads((GOLDEN / "prompts.json").read_text())
LABELS = json.loads((GOLDEN / "label_masks_toy_tokenizer.json").read_text())
LLAMA_SPECIALS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def as_fast(backend: Tokenizer, **tokens):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def add_bos(backend: Tokenizer, bos: str) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def add_specials(backend: Tokenizer, names) -> None:
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])


def make_toy():
    """The tokenizer of the golden files: one token for each character."""
    specials = LABELS["toy_tokenizer"]["special_ids"]
    vocab = {chr(code): 1000 + code for code in range(9, 300)} | specials
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<|pad|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    add_specials(backend, specials)
    add_bos(backend, "<|begin_of_text|>")
    return as_fast(backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def make_metaspace():
    """Like Vicuna's: spaces are part of the following token, other characters fall to bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    bytes_and_specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    backend.train_from_iterator(
        training_lines(),
        tokenizer_trainers.BpeTrainer(
            vocab_size=600, special_tokens=bytes_and_specials, show_progress=False
        ),
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    add_specials(backend, LLAMA_SPECIALS)
    add_bos(backend, "<s>")
    return as_fast(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_byte_level():
    """Like Llama 3's: bytes, with its splitting into words."""
    backend = Tokenizer(models.BPE())
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        training_lines(),
        tokenizer_trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=[*LLAMA_SPECIALS, "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
            ),
        ]
    )
    return as_fast(backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def training_lines() -> list[str]:
    """Always ours: tests of behaviour know what these tokenizers make of their texts."""
    own = json.loads((golden_data.OWN / "prompts" / "prompts.json").read_text())["prompts"]
    prompts = [text for by_name in own.values() for text in by_name.values()]
    return [text.replace("<|eot_id|>", "\n").replace("</s>", "\n") for text in prompts]
