"""Documents with metadata to rows (see rows.py): a prefix, text with markup in its line, padding.

A document is cut into pieces, each behind the document's prefix, the last one padded. Text and markup never share a
token: rendered strings are tokenised piece by piece. Paired rows hold the same text with and without its metadata and
score the same tokens of it.
"""
import functools
from dataclasses import dataclass

import numpy as np

from configurator import require
from corpus.bins import NEWLINE
from corpus.metadata import CLOSE, prefix_of, segments_of
from corpus.rows import MARKUP, PAD, PREFIX, TEXT


@dataclass
class Stretch:
    """Consecutive tokens of a document: ids, kinds as in a mask, and where they start and end in the text's bytes."""

    ids: np.ndarray                     # (n,), as all four
    kinds: np.ndarray
    start: np.ndarray
    end: np.ndarray

    @property
    def is_text(self):
        return self.kinds == TEXT

    def part(self, first, last):
        return Stretch(self.ids[first:last], self.kinds[first:last], self.start[first:last], self.end[first:last])

    def shared_with(self, other):
        """Say of each token, (n,), whether it is text and a token of the other's text stands at the same bytes."""
        bytes_of_each = self.start << 32 | self.end
        bytes_of_other = other.start << 32 | other.end
        return self.is_text & np.isin(bytes_of_each, bytes_of_other[other.is_text])


@dataclass
class PairedPiece:
    """A piece of a document with its metadata in the line, the same text without, and what both score."""

    marked: Stretch
    plain: Stretch
    marked_scored: np.ndarray           # (n,) booleans, for each token of marked
    plain_scored: np.ndarray

    def marked_mask(self):
        mask = np.where(self.marked_scored, TEXT, PREFIX)
        return np.where(self.marked.kinds == MARKUP, MARKUP, mask)

    def plain_mask(self):
        return np.where(self.plain_scored, TEXT, PREFIX)


class Cutter:
    """Turn documents into rows of `length` tokens; tok: a tokenizer of tokens.py, None for bytes."""

    def __init__(self, tok, length, control=''):
        self.tok = tok
        self.length = length
        self.control = control
        self.byte_lengths = None
        self.pad = NEWLINE
        if tok is not None:
            self.byte_lengths = tok.byte_lengths
            self.pad = tok.end
        self.markup_ids = functools.lru_cache(1 << 16)(self.encode_one)     # tags come again and again
        self.close = self.encode_one(CLOSE)
        require((length // 2 > len(self.close), f'block_size = {length} is too short for a prefix and text, expected'
                 f' more than {2 * len(self.close) + 1}; half of a row may be prefix, with its mark {CLOSE!r}'))

    def encode(self, texts):
        """Return the ids of each text."""
        if self.tok is None:
            return [np.frombuffer(t.encode(), np.uint8) for t in texts]
        return self.tok.encode(texts)

    def encode_one(self, text):
        return self.encode([text])[0]

    def prefix(self, items, types):
        """Return the ids of a prefix, at most half a row: a longer one is cut before its closing mark."""
        text = prefix_of(items, types)
        if not text:
            return self.close[:0]
        ids = self.encode_one(text)
        longest = self.length // 2
        if len(ids) <= longest:
            return ids
        return np.concatenate((ids[:longest - len(self.close)], self.close))

    def body(self, text, items, types, lead):
        """Return ids and kinds (n,) of a text with its in-line markup; lead: a space before it."""
        segments = segments_of(text, items, types)
        if lead:
            segments = after_a_space(segments)

        # All of the text is encoded in one call, which is faster; markup comes from what is remembered.
        ids_of_texts = iter(self.encode([string for string, is_markup in segments if not is_markup]))
        ids = []
        kinds = []
        for string, is_markup in segments:
            if is_markup:
                some = self.markup_ids(string)
                kind = MARKUP
            else:
                some = next(ids_of_texts)
                kind = TEXT
            ids.append(some)
            kinds.append(np.full(len(some), kind))
        return np.concatenate(ids), np.concatenate(kinds)

    def stretch(self, ids, kinds, lead):
        """Return tokens with their places in the bytes of the text; markup is empty, lead bytes come before byte 0."""
        n_bytes = 1
        if self.tok is not None:
            n_bytes = self.byte_lengths[ids]
        size = np.where(kinds == TEXT, n_bytes, 0)
        end = np.cumsum(size) - lead
        return Stretch(ids, kinds, end - size, end)

    # --- rows of one document ---

    def rows(self, text, items, types):
        """Return the rows of a document with the metadata of these types: ids, mask, two (n, T) arrays.

        With control 'samecontext' they are cut as with metadata, and what is not text becomes padding on the left.
        A piece without text is left out.
        """
        prefix = self.prefix(items, types)
        ids, kinds = self.body(text, items, types, lead=len(prefix) > 0)

        # Rows as long as what the prefix leaves.
        room = self.length - len(prefix)
        ids = fold(ids.astype(np.uint32), room, self.pad)
        kinds = fold(kinds, room, PAD)
        with_text = (kinds == TEXT).any(1)
        ids = ids[with_text]
        kinds = kinds[with_text]

        # The prefix stands before each of them.
        prefixes = np.tile(prefix.astype(np.uint32), (len(ids), 1))
        ids = np.concatenate((prefixes, ids), 1)
        kinds = np.concatenate((np.full(prefixes.shape, PREFIX), kinds), 1)
        if self.control == 'samecontext':
            return self.text_alone(ids, kinds)
        return ids, kinds

    def text_alone(self, ids, kinds):
        """Replace prefix and markup by as much padding on the left; the text keeps its order and ends where it did."""
        # Text first, for each row alone, and then turned to the right by the number of tokens that go.
        order = np.argsort(kinds != TEXT, 1, kind='stable')
        n_left = ((kinds == PREFIX) | (kinds == MARKUP)).sum(1)
        column = (np.arange(self.length) - n_left[:, None]) % self.length
        order = np.take_along_axis(order, column, 1)

        ids = np.take_along_axis(ids, order, 1)
        kinds = np.take_along_axis(kinds, order, 1)
        not_text = kinds != TEXT
        ids[not_text] = self.pad
        kinds[not_text] = PAD
        return ids, kinds

    # --- paired rows ---

    def pair(self, text, items, types, other=None):
        """Return {'with', 'without'[, 'other']: (ids, mask)} of a document, rows that score the same targets.

        other: another document's prefix (ids), a third arm in place of the own one. Each piece scores the tokens that
        stand at the same bytes of the text with and without metadata, but for the first of a row.
        """
        # The text in two ways: behind a prefix and with markup, and alone.
        prefix = self.prefix(items, types)
        lead = len(prefix) > 0
        marked = self.stretch(*self.body(text, items, types, lead), int(lead))
        plain_ids = self.encode_one(text)
        plain = self.stretch(plain_ids, np.full(len(plain_ids), TEXT), 0)

        # Each arm is a list of rows; both prefixes must leave room for a piece.
        arms = {'with': [], 'without': []}
        prefixes = {'with': prefix}
        if other is not None:
            arms['other'] = []
            prefixes['other'] = other
        room = self.length - max(len(ids) for ids in prefixes.values())

        for first in range(0, len(marked.ids), room):
            piece = self.paired_piece(marked.part(first, first + room), plain)
            if piece is None:
                continue
            for arm, before in prefixes.items():
                ids = np.concatenate((before, piece.marked.ids))
                mask = np.concatenate((np.full(len(before), PREFIX), piece.marked_mask()))
                arms[arm].append(self.filled_up(ids, mask))
            arms['without'].append(self.filled_up(piece.plain.ids, piece.plain_mask()))
        return {arm: stacked(rows) for arm, rows in arms.items() if rows}

    def paired_piece(self, marked, plain):
        """Return a piece and its match in the whole plain text as a PairedPiece; None where they share no target."""
        of_text = np.flatnonzero(marked.is_text)
        if len(of_text) < 2:
            return None

        # The plain tokens that lie within the bytes of the piece, at most a row of them.
        low = np.searchsorted(plain.start, marked.start[of_text[0]])
        high = np.searchsorted(plain.end, marked.end[of_text[-1]], 'right')
        match = plain.part(low, min(high, low + self.length))

        # The first token of a row has seen less of the text on one side than on the other: score from the second on.
        second = min(low + 1, len(plain.start) - 1)
        first_scored = max(marked.start[of_text[1]], plain.start[second])
        marked_scored = marked.shared_with(match) & (marked.start >= first_scored)
        plain_scored = match.shared_with(marked) & (match.start >= first_scored)
        if not marked_scored.any():
            return None
        require((np.array_equal(marked.ids[marked_scored], match.ids[plain_scored]), 'a tokenizer with several tokens'
                 ' for the same bytes cannot make paired rows; use byte or gpt2'))
        return PairedPiece(marked, match, marked_scored, plain_scored)

    def filled_up(self, ids, mask):
        """Return ids and mask of one row, two (T,) arrays, padded on the right."""
        return fold(ids.astype(np.uint32), self.length, self.pad)[0], fold(mask, self.length, PAD)[0]


def after_a_space(segments):
    """Put a space before a text with markup, [(string, is markup)]: into its first string, or before its markup."""
    string, is_markup = segments[0]
    if is_markup:
        return [(' ', False), *segments]
    return [(' ' + string, False), *segments[1:]]


def fold(values, room, fill):
    """Cut an array into rows of room, (n, room), the last one filled up."""
    n_rows = -(-len(values) // room)
    missing = np.full(n_rows * room - len(values), fill, values.dtype)
    return np.concatenate((values, missing)).reshape(n_rows, room)


def stacked(rows):
    """Turn [(ids, mask)] of single rows into ids and mask, two (n, T) arrays."""
    ids, masks = zip(*rows)
    return np.stack(ids), np.stack(masks)
