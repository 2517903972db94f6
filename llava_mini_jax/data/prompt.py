"""How conversations become ids, as data: a template, a length, and the release's habits."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """How conversations become ids: the template, and the release's habits as named switches."""

    template: str  # a name of data/text/conversation.py's TEMPLATES
    max_length: int  # positions of the language model; longer inputs are refused (or cut, if asked)
    padding_side: str  # "right" or "left": where the language model's sequence is padded
    fuse_answers: (
        bool  # earlier answers of a conversation take part in pre-fusion (release, inference)
    )
    fuse_id_zero: bool  # token id 0 takes part in pre-fusion (the release leaves it out)
    double_bos: bool  # prompts start with two bos ids (release, inference)
    blank_image: bool  # a row without image is fused with a blank one (release, training)
    date: str = (
        ""  # what a chat template that asks is told ("2024-07-26"); "": the day the run began
    )
