"""Bytes that a session's programs hold beside weights and KV cache, from shapes alone.

    encode vision    a chunk's pixels | a layer of the tower             | features
    prefuse images   features | patches | a layer of pre-fusion          | keys and values
    prefuse text     keys and values | a layer of pre-fusion on the text
    prefill          a layer of the language model: a block's scores against the whole cache

A layer takes the larger one of attention (scores and their softmax in float32) and MLP.
"""

import dataclasses
import math

from llava_mini_jax import params as param_tree
from llava_mini_jax.data.batches.examples import power_of_two
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import LlavaMiniConfig

FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes of the arrays of session_programs.py's programs."""

    cfg: LlavaMiniConfig
    parts: int
    chunk: int
    text: int

    @property
    def positions(self) -> int:
        """S: of an image in pre-fusion."""
        cfg = self.cfg
        tokens = cfg.tokens_per_image(self.parts)
        beside = cfg.fuse_compressed and cfg.compressor.kind != "none"
        return cfg.patches_per_image(self.parts) + (tokens if beside else 0)

    def pixels(self) -> int:
        return self.chunk * self.parts * 3 * self.cfg.vision.image_size**2

    def features(self, chunk: int | None = None) -> int:
        vision = self.cfg.vision
        width = vision.width * self.cfg.dtype.itemsize
        return (chunk or self.chunk) * self.parts * vision.grid**2 * width

    def memory(self, chunk: int | None = None) -> int:
        """Of pre-fusion's keys and values."""
        llm, layers = self.cfg.llm, self.cfg.prefusion_layers
        width = 2 * layers * llm.kv_heads * llm.head_width * self.cfg.dtype.itemsize
        return (chunk or self.chunk) * self.positions * width

    def phases(self, slots: int, block: int, pictures: bool) -> dict[str, dict[str, int]]:
        found = {}
        if pictures:
            found["encode vision"] = self._encode_vision()
            found["prefuse images"] = self._prefuse_images()
        if pictures and self.cfg.prefusion_layers:
            found["prefuse text"] = self._prefuse_text()
        found["prefill"] = self._prefill(slots, max(16, power_of_two(block)))
        return found

    def largest_weight(self) -> int:
        shapes = param_tree.paths(llava_mini.unrolled(llava_mini.spec(self.cfg)))
        sizes = [
            math.prod(s.shape) for path, s in shapes.items() if not path.endswith("embed_tokens")
        ]
        return max(sizes) * self.cfg.dtype.itemsize

    def _encode_vision(self) -> dict[str, int]:
        v = self.cfg.vision
        parts, size = self.chunk * self.parts, v.grid**2 + 1
        return {
            "pixels": self.pixels(),
            "features": self.features(),
            "a layer of the tower": self._layer(
                parts, size, size, v.heads, v.heads, v.width // v.heads, v.width, v.mlp_width, 1
            ),
        }

    def _prefuse_images(self) -> dict[str, int]:
        llm, patches = self.cfg.llm, self.cfg.patches_per_image(self.parts)
        images = self.chunk * patches * llm.width * self.cfg.dtype.itemsize
        found = {"features": self.features(), "patches": images}
        if self.cfg.prefusion_layers:
            S = self.positions
            found["keys and values"] = self.memory()
            layer = self._llama(self.chunk, S, S)
            # Its own keys and values are among those that are kept.
            found["a layer of pre-fusion"] = layer - self.memory() // self.cfg.prefusion_layers
        return found

    def _prefuse_text(self) -> dict[str, int]:
        keys = self.positions + self.text
        return {
            "keys and values": self.memory(),
            "a layer of pre-fusion": self._llama(self.chunk, self.text, keys),
        }

    def _prefill(self, slots: int, block: int) -> dict[str, int]:
        llm = self.cfg.llm
        return {
            "a layer of the language model": self._llama(1, block, slots),
            "logits": 2 * llm.vocab_size * FLOAT32,
        }

    def _llama(self, batch: int, queries: int, keys: int) -> int:
        m = self.cfg.llm
        return self._layer(
            batch, queries, keys, m.heads, m.kv_heads, m.head_width, m.width, m.mlp_width, 2
        )

    def _layer(
        self,
        batch: int,
        queries: int,
        keys: int,
        heads: int,
        kv_heads: int,
        head_width: int,
        width: int,
        mlp_width: int,
        gates: int,
    ) -> int:
        """The larger one of attention and MLP, and what goes through the layer."""
        size = self.cfg.dtype.itemsize
        scores = batch * heads * queries * keys
        # Scores and their softmax in float32; a copy in the products' dtype if that is another.
        softmax = scores * (2 * FLOAT32 + (0 if size == FLOAT32 else size))
        keys_values = 2 * batch * keys * kv_heads * head_width * size
        mlp = (1 + gates) * batch * queries * mlp_width * size
        through = 2 * batch * queries * max(width, heads * head_width) * size
        return max(softmax + keys_values, mlp) + through
