"""Bytes that a session's programs hold beside weights and KV cache, from shapes alone.

    encode vision    a chunk's pixels | a layer of the tower             | features
    prefuse images   features | patches | a layer of pre-fusion          | keys and values
    prefuse text     keys and values | a layer of pre-fusion on the text
    first block      a layer of the language model: the prompt's beginning against itself
    later blocks     the same: a block's scores against the whole slot

A layer takes the larger one of attention (scores and their softmax in float32) and MLP.
"""

import dataclasses
from collections.abc import Sequence

from llava_mini_jax.cost.device_memory import FLOAT32
from llava_mini_jax.cost.network import Layer, layer, prefused, weights
from llava_mini_jax.models.llava_mini import LlavaMiniConfig


@dataclasses.dataclass(frozen=True)
class SessionMemory:
    """Bytes of the arrays of the engine's programs for one request at a time."""

    cfg: LlavaMiniConfig
    parts: int
    chunk: int
    text: int

    @property
    def positions(self) -> int:
        """S: of an image in pre-fusion."""
        return prefused(self.cfg, self.parts)[0]

    def pixels(self) -> int:
        return self.chunk * self.parts * 3 * self.cfg.vision.image_size**2

    def tokens(self, images: int) -> int:
        """Visual tokens of the language model."""
        numbers = images * self.cfg.positions_per_image(self.parts) * self.cfg.llm.width
        return numbers * self.cfg.dtype.itemsize

    def texts(self) -> int:
        """The text before and after pre-fusion, and the float32 sum over frames."""
        return self.text * self.cfg.llm.width * (2 * self.cfg.dtype.itemsize + FLOAT32)

    def features(self) -> int:
        patches = self.chunk * self.cfg.patches_per_image(self.parts)
        return patches * self.cfg.vision.width * self.cfg.dtype.itemsize

    def memory(self) -> int:
        """Of pre-fusion's keys and values."""
        numbers = layer(self.cfg.llm).keys_values(self.chunk * self.positions)
        return self.cfg.prefusion_layers * numbers * self.cfg.dtype.itemsize

    def largest_weight(self) -> int:
        sizes = weights(self.cfg).items()
        largest = max(size for path, size in sizes if not path.endswith("embed_tokens"))
        return largest * self.cfg.dtype.itemsize

    def phases(
        self, slots: int, blocks: Sequence[int], pictures: bool, cast: bool
    ) -> dict[str, dict[str, int]]:
        """Bytes of each program by what holds them; the prompt is read in `blocks`, the first of
        them where nothing is in the slot.

        `cast`: one weight at a time is held in the products' dtype beside its own.
        """
        cfg, llm, S = self.cfg, layer(self.cfg.llm), self.cfg.vision.positions
        tower = self._layer(layer(cfg.vision), self.chunk * self.parts, S, S)
        found = {}
        if pictures:
            sizes = {"pixels": self.pixels(), "features": self.features()}
            found["encode vision"] = sizes | {"a layer of the tower": tower}
            found["prefuse images"] = self._prefuse_images()
        if pictures and cfg.prefusion_layers:
            fusion = self._layer(llm, self.chunk, self.text, self.positions + self.text)
            sizes = {"keys and values": self.memory()}
            found["prefuse text"] = sizes | {"a layer of pre-fusion": fusion}
        logits = 2 * cfg.llm.vocab_size * FLOAT32
        reads = {"first block": (blocks[:1], blocks[0]), "later blocks": (blocks[1:], slots)}
        for name, (sizes, keys) in reads.items():
            if sizes:
                read = self._layer(llm, 1, max(sizes), keys)
                found[name] = {"a layer of the language model": read, "logits": logits}
        copy = {"a weight in the products' dtype": self.largest_weight()} if cast else {}
        return {name: terms | copy for name, terms in found.items()}

    def _prefuse_images(self) -> dict[str, int]:
        cfg, S = self.cfg, self.positions
        patches = self.chunk * cfg.patches_per_image(self.parts)
        embedded = patches * cfg.llm.width * cfg.dtype.itemsize
        found = {"features": self.features(), "patches": embedded}
        if cfg.declared.choice is not None:
            made = self.chunk * cfg.declared.choice.made * cfg.llm.width
            found["tokens of all counts"] = made * cfg.dtype.itemsize
        if cfg.prefusion_layers:
            whole = self._layer(layer(cfg.llm), self.chunk, S, S)
            found["keys and values"] = self.memory()
            # Its own keys and values are among those that are kept.
            found["a layer of pre-fusion"] = whole - self.memory() // cfg.prefusion_layers
        return found

    def _layer(self, layer: Layer, batch: int, queries: int, keys: int) -> int:
        """The larger one of attention and MLP, and what goes through the layer."""
        size = self.cfg.dtype.itemsize
        # Scores and their softmax in float32; a copy in the products' dtype if that is another.
        softmax = 2 * FLOAT32 + (0 if size == FLOAT32 else size)
        scores = batch * layer.scores(queries, keys) * softmax
        through = 2 * max(layer.width, layer.heads * layer.head_width)
        attention = scores + layer.keys_values(batch * keys) * size
        mlp = layer.mlp(batch * queries) * size
        return max(attention, mlp) + batch * queries * through * size
