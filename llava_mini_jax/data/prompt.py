"""How conversations become ids, as data: a template, a length, and the release's habits."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """How conversations become ids: the template, and the release's habits as switches."""

    template: str  # a name of TEMPLATES in data/text/conversation.py, such as "vicuna_v1"
    max_length: int  # positions; longer inputs are refused, or cut off if you ask for that
    padding_side: str  # "right" or "left": where the language model's sequence is padded
    fuse_answers: bool  # earlier answers take part in pre-fusion (release, inference)
    fuse_id_zero: bool  # token id 0 takes part in pre-fusion (the release leaves it out)
    double_bos: bool  # prompts start with two bos ids (release, inference)
    blank_image: bool  # a row without an image is fused with a blank one (release, training)
    date: str = ""  # for chat templates, such as "2024-07-26"; "": the day the run started
