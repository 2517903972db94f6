"""What a compressor reads of images: `Reads` declares it, the tower hands it over as `Seen`.

    compressors' declaration --Reads--> clip.look --Seen--> compressors' apply

The selected patches are always there. Everything else is None unless it is declared, and then the
tower does not compute it.

Dimensions: I images, P patches, S = P + 1 with the class token first, E width, N heads of the
tower, H = E / N, T ids of the question.
"""

import dataclasses

from flax import struct

from llava_mini_jax.params import Leaf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reads:
    """What is read beside the selected patches."""

    # Patches of further levels, numbered as Hugging Face's hidden_states: 0 is the embedding.
    levels: tuple[int, ...] = ()
    heads_of: int | None = None  # the layer whose class token's query and whose keys are read
    class_token: bool = False  # the class token of the selected level
    question: bool = False  # the question's ids: then no follow-up can use the tokens again

    @property
    def class_position(self) -> bool:
        """Whether the tower must have a class token."""
        return self.class_token or self.heads_of is not None


PATCHES = Reads()


@struct.dataclass
class Seen:
    patches_IPE: Leaf  # of the selected level, without the class token
    levels: tuple[Leaf, ...] = ()  # [I, P, E] each, in the order that was asked for
    class_IE: Leaf = None
    query_INH: Leaf = None  # float32, with bias and not scaled: the class token's
    keys_ISNH: Leaf = None  # float32, with bias
    question_IT: Leaf = None  # int32, in the compressor's own vocabulary; -1 where padded
