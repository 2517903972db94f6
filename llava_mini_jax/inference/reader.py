"""How prompts are read into their slots: which of them go together, and how much at a time.

    in slots --short ones together------------------> read_fresh -.
             --a long one, block by block-----------> read_block -+--> calls with first tokens
             --where images leave the cache---------> read_piece -+
             --whole, where later layers choose-----> read_chosen '
                                                      (reading.py)

The sizes follow from a prompt alone.
"""

import numpy as np

from llava_mini_jax.inference import blocks, places, reading
from llava_mini_jax.inference.lane import Call
from llava_mini_jax.inference.work import Work
from llava_mini_jax.models import cache
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig


class Reader:
    """`works` is shared with the lanes (lanes.py), which add to it."""

    def __init__(self, params: LlavaMini, cfg: LlavaMiniConfig, works: list[Work]):
        self._params, self._cfg, self.works = params, cfg, works
        self._in_pieces = cfg.declared.keeps is not None and not cache.chooses(cfg)

    def read(self) -> list[Call]:
        """Reads some short prompts, or one block of a long one; the calls that tell first tokens.

        There is at least one to read.
        """
        first = self.works[0]
        group, calls = [first], []
        if self._cfg.declared.keeps is None and self._is_short(first):
            size = self._fresh_size(first)
            others = [w for w in self.works[1:] if self._is_short(w) and w.lane is first.lane]
            group += [w for w in others if self._fresh_size(w) == size][: blocks.FRESH_ROWS[-1] - 1]
        if cache.chooses(self._cfg):
            calls = self._read_chosen(first)
        elif self._in_pieces:
            calls = self._read_piece(first)
        elif first.read:
            calls = self._read_block(first)
        else:
            calls = self._read_fresh(group)
        for work in group:
            if work.read == len(work.marks):
                self.works.remove(work)
                work.lane.decoding[work.slot] = work
        # A long prompt goes behind the short ones once it had its turn.
        if self.works and self.works[0] is first:
            self.works.append(self.works.pop(0))
        return calls

    def _is_short(self, work: Work) -> bool:
        return work.read == 0 and len(work.marks) <= blocks.fresh_sizes(work.lane.size.length)[-1]

    def _fresh_size(self, work: Work) -> int:
        return next(s for s in blocks.fresh_sizes(work.lane.size.length) if s >= len(work.marks))

    def _read_fresh(self, group: list[Work]) -> list[Call]:
        lane = group[0].lane
        most = blocks.fresh_sizes(lane.size.length)[-1]
        counts = [min(most, len(work.marks)) for work in group]
        size = next(s for s in blocks.fresh_sizes(lane.size.length) if s >= max(counts))
        rows = next(r for r in blocks.FRESH_ROWS if r >= len(group))
        filled = [*zip(group, counts, strict=True)]
        filled += filled[:1] * (rows - len(group))
        x = [blocks.embeddings(work, 0, count, size) for work, count in filled]
        sampling, told_B = lane.settings()
        lane.state, told = reading.read_fresh(
            self._params,
            lane.state,
            tuple(x),
            np.array([count for _, count in filled], np.int32),
            np.array([work.slot for work, _ in filled], np.int32),
            np.array([count == len(work.marks) for work, count in filled]),
            sampling,
            told_B,
            self._cfg,
        )
        for work, count in zip(group, counts, strict=True):
            work.read = count
        rows_told = [(n, w) for n, w in enumerate(group) if w.read == len(w.marks)]
        return [Call(told, rows_told, lane, False)] if rows_told else []

    def _read_block(self, work: Work) -> list[Call]:
        lane, left = work.lane, len(work.marks) - work.read
        size = blocks.block_size(left, lane.size.length)
        end = work.read + min(left, size)
        # The block ends within the slot; what it reads a second time for that stays what it is.
        first = min(work.read, lane.size.length - size)
        sampling, told_B = lane.settings()
        final = end == len(work.marks)
        lane.state, told = reading.read_block(
            self._params,
            lane.state,
            blocks.embeddings(work, first, end - first, size),
            np.int32(first),
            np.int32(end - first),
            np.int32(work.slot),
            np.bool_(final),
            sampling,
            told_B,
            self._cfg,
        )
        work.read = end
        return [Call(told, [(0, work)], lane, False)] if final else []

    def _read_piece(self, work: Work) -> list[Call]:
        """An image of which little stays, or a block of the text in front of the next one."""
        lane, begin = work.lane, work.read
        piece = next((piece for piece in work.pieces if piece.end > begin), None)
        if piece is not None and piece.first == begin:
            end, kept = piece.end, piece.kept
            size = blocks.piece_size(end - begin)
        else:
            stop = len(work.marks) if piece is None else piece.first
            size = blocks.block_size(stop - begin, lane.size.length)
            end = min(stop, begin + size)
            kept = end - begin
        numbers = begin, places.place(work.pieces, begin), end - begin, kept
        sampling, told_B = lane.settings()
        final = end == len(work.marks)
        lane.state, told = reading.read_piece(
            self._params,
            lane.state,
            blocks.embeddings(work, begin, end - begin, size),
            reading.Piece(*map(np.int32, numbers)),
            np.int32(work.slot),
            np.bool_(final),
            sampling,
            told_B,
            self._cfg,
        )
        work.read = end
        return [Call(told, [(0, work)], lane, False)] if final else []

    def _read_chosen(self, work: Work) -> list[Call]:
        """All of a prompt: what stays of its images depends on its last token."""
        lane, count, cfg = work.lane, len(work.marks), self._cfg
        is_visual_S, tokens = work.marks < 0, cfg.tokens_per_image(1)
        shown = bool(is_visual_S.any())
        size, stay = blocks.chosen_size(count, shown, lane.size.length, cfg)
        place_S = np.full(size, -1, np.int32)
        place_S[:count][is_visual_S] = np.arange(is_visual_S.sum()) % tokens
        sampling, told_B = lane.settings()
        lane.state, told = reading.read_chosen(
            self._params,
            lane.state,
            blocks.embeddings(work, 0, count, size),
            place_S,
            np.int32(count),
            np.int32(work.slot),
            sampling,
            told_B,
            cfg,
            stay,
        )
        work.read = count
        return [Call(told, [(0, work)], lane, False)]
