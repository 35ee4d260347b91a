"""Row data: fixed-length rows of ids with a mask beside them, for documents that may not be packed together.

{split}.bin holds rows of T ids, {split}.mask.bin a byte for each: 0 padding, 1 text, 2 prefix (seen, never scored; in
paired sets also the text that only one side can score), 3 in-line markup. A row predicts its own tokens, the first from
the start id. A document is cut into pieces, each behind the document's prefix, the last one padded. Padding to the left
of the text (control = 'samecontext') is hidden from attention. {split}.index.bin says where documents start.
Text and markup never share a token: rendered strings are tokenised piece by piece.
"""
import functools
import os

import numpy as np

from bins import Bin, BinWriter, file_in, sha256_file
from configurator import require
from metadata import CLOSE, prefix_of, segments_of

PAD, TEXT, PREFIX, MARKUP = range(4)
LOSSES = {'text': (TEXT,), 'text+markup': (TEXT, MARKUP)}


# --- reading ---

class Rows(Bin):
    """Fixed-length rows as a Bin: the same surface, but only text (and markup, if asked) is scored."""

    @classmethod
    def of(cls, data, meta, entry, folder, again, verify=False):
        """Return the Rows of a checked Bin; meta: what meta.json says of rows, entry: of this split."""
        mask_path = file_in(folder, entry['mask'])
        size = os.path.getsize(mask_path) if os.path.exists(mask_path) else -1
        require((size == data.n_tokens, f'{mask_path} has {max(size, 0)} bytes, expected one for each of'
                 f' {data.n_tokens} tokens; {again}'),
                (size != data.n_tokens or not verify or sha256_file(mask_path) == entry['mask_sha256'],
                 f'{mask_path} does not have the SHA-256 of meta.json ({entry["mask_sha256"]}); {again}'))
        self = cls.__new__(cls)
        vars(self).update(vars(data), row_length=meta['length'], padded=meta['control'] == 'samecontext', entry=entry,
                          sha256=f'{data.sha256}:{entry["mask_sha256"]}',
                          mask=np.memmap(mask_path, np.uint8, 'r') if size else np.zeros(0, np.uint8))
        return self.scoring('text')

    def scoring(self, loss_on):
        """Return these rows with what loss_on names scored, bytes and targets counted accordingly."""
        part = Rows.__new__(Rows)
        vars(part).update(vars(self), kinds=LOSSES[loss_on])
        names = [name for name, kind in dict(text=TEXT, markup=MARKUP).items() if kind in part.kinds]
        part.n_targets = sum(self.entry['scored'][name] for name in names)
        part.text_bytes = sum(self.entry['scored_bytes'][name] for name in names)
        return part

    def head(self, n_tokens):
        """Return the leading rows that hold n_tokens (0: all), padding and prefixes included."""
        if n_tokens <= 0 or n_tokens >= self.n_tokens:
            return self
        n = max(n_tokens // self.row_length, 1) * self.row_length
        part = Rows.__new__(Rows)
        vars(part).update(vars(self), tokens=self.tokens[:n], mask=self.mask[:n], n_tokens=n,
                          sha256=f'{self.sha256}:{n}', n_targets=0, text_bytes=0)
        for i in range(0, n, 1 << 20):
            ids = part.tokens[i:i + (1 << 20)][np.isin(part.mask[i:i + (1 << 20)], self.kinds)]
            part.n_targets += len(ids)
            part.text_bytes += len(ids) if self.byte_lengths is None else int(self.byte_lengths[ids].sum(
                dtype=np.int64))
        return part

    def count_words(self):
        return 0                                        # not counted: rows hold prefixes and padding too

    def rows_at(self, starts, length):
        """Return ids and mask (B, length) of rows; a negative start is a row of padding."""
        starts = np.asarray(starts)
        require((length == self.row_length and not (starts[starts >= 0] % length).any(),
                 f'data set {self.name!r} has rows of {self.row_length} tokens, asked for {length} at other places;'
                 f' set --block_size={self.row_length}, and no order = random, stride or minimal context'))
        place = np.maximum(starts, 0)[:, None] + np.arange(length)
        mask = np.where(starts[:, None] >= 0, self.mask[place], PAD)
        return self.tokens[place].astype(np.int64), mask

    def gather(self, starts, length):
        """Return inputs and targets, two (B, length) int64 arrays; -1: a target not scored, an input not to be seen."""
        ids, mask = self.rows_at(starts, length)
        x = np.concatenate((np.full((len(ids), 1), self.start_id), ids[:, :-1]), 1)
        if self.padded:
            left = np.argmax(mask > PAD, 1)             # the start id stands right before the first token
            x[np.arange(length) < left[:, None]] = -1
        return x, np.where(np.isin(mask, self.kinds), ids, -1)

    def n_scored(self, starts, length):
        """Count the targets that gather would score."""
        return int(np.isin(self.rows_at(starts, length)[1], self.kinds).sum())


# --- writing ---

class RowWriter:
    """Write the rows of one split and their mask, as bins.BinWriter does; state resumes what an earlier one left."""

    def __init__(self, folder, split, dtype, byte_lengths=None, state=None):
        state = state or dict(n_bytes=0, n_mask=0, documents=0, text_bytes=0, scored=dict(text=0, markup=0),
                              scored_bytes=dict(text=0, markup=0))
        self.ids = BinWriter(folder, split, dtype, state['n_bytes'], state['documents'])
        self.masks = BinWriter(folder, f'{split}.mask', 'uint8', state['n_mask'])
        self.ids.documents, self.byte_lengths = state['documents'], byte_lengths
        self.scored, self.scored_bytes = dict(state['scored']), dict(state['scored_bytes'])

    def state(self):
        """Push everything to disk and return what resumes from here."""
        self.ids.flush()
        self.masks.flush()
        return dict(n_bytes=self.ids.n_bytes, n_mask=self.masks.n_bytes, documents=self.ids.documents,
                    text_bytes=self.scored_bytes['text'], scored=self.scored, scored_bytes=self.scored_bytes)

    def write(self, ids, mask, begins=True):
        """Append rows (n, T) of one document."""
        if begins:
            self.ids.begin_document()
        self.ids.write(ids.ravel(), text_bytes=0, documents=0)
        self.masks.write(mask.astype(np.uint8).tobytes(), documents=0)
        for name, kind in dict(text=TEXT, markup=MARKUP).items():
            of_kind = ids[mask == kind]
            self.scored[name] += len(of_kind)
            self.scored_bytes[name] += len(of_kind) if self.byte_lengths is None else int(
                self.byte_lengths[of_kind].sum())

    def commit(self):
        self.ids.text_bytes = self.scored_bytes['text']
        entry, mask = self.ids.commit(), self.masks.commit()
        return dict(entry, mask=mask['file'], mask_sha256=mask['sha256'], scored=self.scored,
                    scored_bytes=self.scored_bytes)

    def abort(self):
        self.ids.abort()
        self.masks.abort()


class DocumentRowWriter(RowWriter):
    """Take documents as bins.BinWriter does and write each as rows of its own; tok: of tokens.py, None for bytes.

    The last row of a document is padded on the right; truncate leaves out all rows but the first. One row is held back.
    """

    def __init__(self, folder, split, dtype, tok, length, truncate=False):
        super().__init__(folder, split, dtype, None if tok is None else tok.byte_lengths)
        self.pad, self.length, self.truncate = 10 if tok is None else tok.end, length, truncate
        self.waiting, self.begins, self.words = np.zeros(0, np.uint32), False, 0

    @property
    def n_bytes(self):
        return self.ids.n_bytes + len(self.waiting)             # more than none as soon as there is a token

    def begin_document(self):
        self._pad()
        self.begins = True

    def write(self, tokens, text_bytes=None, documents=0):
        """Append a part of the document that begin_document opened; text_bytes is counted by what is written."""
        ids = np.frombuffer(tokens, np.uint8) if isinstance(tokens, bytes) else np.asarray(tokens)
        self.waiting = np.concatenate((self.waiting, ids.astype(np.uint32)))
        n = len(self.waiting) // self.length * self.length
        self._put(self.waiting[:n].reshape(-1, self.length), self.length)
        self.waiting = self.waiting[n:]

    def _put(self, ids, n_text):
        """Write rows, of which the first n_text columns are text."""
        kept = ids[:int(self.begins)] if self.truncate else ids
        if len(kept):
            mask = np.where(np.arange(self.length) < n_text, TEXT, PAD)
            super().write(kept, np.tile(mask, (len(kept), 1)), self.begins)
            self.begins = False

    def _pad(self):
        """Fill up the last row of the document and write it."""
        if n := len(self.waiting):
            self._put(np.pad(self.waiting, (0, self.length - n), constant_values=self.pad)[None], n)
            self.waiting = self.waiting[:0]

    def commit(self):
        self._pad()
        return super().commit()


# --- documents to rows ---

class Cutter:
    """Turn documents into rows of `length` tokens; tok: a tokenizer of tokens.py, None for bytes."""

    def __init__(self, tok, length, control=''):
        self.tok, self.length, self.control = tok, length, control
        self.byte_lengths = None if tok is None else tok.byte_lengths
        self.pad = 10 if tok is None else tok.end
        self.markup = functools.lru_cache(1 << 16)(lambda text: self.encode([text])[0])     # tags come again and again
        self.close = self.encode([CLOSE])[0]
        require((length // 2 > len(self.close), f'block_size = {length} is too short for a prefix and text, expected'
                 f' more than {2 * len(self.close) + 1}; half of a row may be prefix, with its mark {CLOSE!r}'))

    def encode(self, texts):
        if self.tok is None:
            return [np.frombuffer(t.encode(), np.uint8) for t in texts]
        return self.tok.encode(texts)

    def prefix(self, items, types):
        """Return the ids of a prefix, at most half a row: a longer one is cut before its closing mark."""
        text = prefix_of(items, types)
        if not text:
            return self.close[:0]
        ids, most = self.encode([text])[0], self.length // 2
        return ids if len(ids) <= most else np.concatenate((ids[:most - len(self.close)], self.close))

    def body(self, text, items, types, lead):
        """Return ids and kinds of a text with its in-line markup; lead: a space before it."""
        segments = segments_of(text, items, types)
        if lead:
            first = segments[0]
            segments[:1] = [(' ', False), first] if first[1] else [(' ' + first[0], False)]
        texts = iter(self.encode([s for s, is_markup in segments if not is_markup]))
        parts = [self.markup(s) if is_markup else next(texts) for s, is_markup in segments]
        kinds = [np.full(len(p), MARKUP if is_markup else TEXT) for p, (_, is_markup) in zip(parts, segments)]
        return np.concatenate(parts), np.concatenate(kinds)

    def fold(self, values, room, fill):
        """Cut an array into rows of room, the last one filled up."""
        n = -(-len(values) // room)
        return np.concatenate((values, np.full(n * room - len(values), fill, values.dtype))).reshape(n, room)

    def rows(self, text, items, types):
        """Return the rows of a document with the metadata of these types: ids, mask, two (n, T) arrays.

        With control 'samecontext' they are cut as with metadata, and what is not text becomes padding on the left.
        A piece without text is left out.
        """
        prefix = self.prefix(items, types)
        ids, kinds = self.body(text, items, types, len(prefix) > 0)
        room = self.length - len(prefix)
        ids, kinds = self.fold(ids.astype(np.uint32), room, self.pad), self.fold(kinds, room, PAD)
        kept = (kinds == TEXT).any(1)
        ids, kinds = ids[kept], kinds[kept]
        ids = np.concatenate((np.tile(prefix.astype(np.uint32), (len(ids), 1)), ids), 1)
        kinds = np.concatenate((np.full((len(kinds), len(prefix)), PREFIX), kinds), 1)
        if self.control == 'samecontext':
            order = np.argsort((kinds != TEXT) + 0, 1, kind='stable')   # text first, for each row alone
            n_left = ((kinds == PREFIX) | (kinds == MARKUP)).sum(1)[:, None]
            order = np.take_along_axis(order, (np.arange(self.length) - n_left) % self.length, 1)
            ids, kinds = np.take_along_axis(ids, order, 1), np.take_along_axis(kinds, order, 1)
            ids[kinds != TEXT], kinds[kinds != TEXT] = self.pad, PAD
        return ids, kinds

    def spans(self, ids, kinds, lead):
        """Return where tokens start and end in the bytes of the text, as (start, end); markup is empty."""
        size = np.where(kinds == TEXT, 1 if self.tok is None else self.byte_lengths[ids], 0)
        end = np.cumsum(size) - lead
        return end - size, end

    def pair(self, text, items, types, other=None):
        """Return {'with', 'without'[, 'other']: (ids, mask)} of a document, rows that score the same targets.

        other: another document's prefix (ids), a third arm in place of the own one. Each piece scores the tokens that
        stand at the same bytes of the text with and without metadata, but for the first of a row.
        """
        prefix = self.prefix(items, types)
        ids, kinds = self.body(text, items, types, len(prefix) > 0)
        start, end = self.spans(ids, kinds, int(len(prefix) > 0))
        plain, = self.encode([text])
        plain_start, plain_end = self.spans(plain, np.full(len(plain), TEXT), 0)
        room = self.length - max(len(prefix), 0 if other is None else len(other))
        found = {arm: ([], []) for arm in ('with', 'without') + (('other',) if other is not None else ())}
        for i in range(0, len(ids), room):
            piece, is_text = slice(i, i + room), np.flatnonzero(kinds[i:i + room] == TEXT) + i
            if len(is_text) < 2:
                continue
            low = np.searchsorted(plain_start, start[is_text[0]])
            high = min(np.searchsorted(plain_end, end[is_text[-1]], 'right'), low + self.length)
            first = max(start[is_text[1]], plain_start[min(low + 1, len(plain) - 1)])
            scored = kinds[piece] == TEXT, np.ones(max(high - low, 0), bool)
            codes = (start[piece] << 32 | end[piece]), (plain_start[low:high] << 32 | plain_end[low:high])
            scored = [s & (at >= first) & np.isin(c, other_c[other_s]) for s, at, c, other_c, other_s in zip(
                scored, (start[piece], plain_start[low:high]), codes, codes[::-1], scored[::-1])]
            if not scored[0].any():
                continue
            targets = ids[piece][scored[0]], plain[low:high][scored[1]]
            require((np.array_equal(*targets), 'a tokenizer with several tokens for the same bytes cannot make paired'
                     ' rows; use byte or gpt2'))
            seen = np.where(kinds[piece] == MARKUP, MARKUP, np.where(scored[0], TEXT, PREFIX))
            for arm, before in (('with', prefix), ('other', other)):
                if arm in found:
                    self.put(found[arm], np.concatenate((before, ids[piece])),
                             np.concatenate((np.full(len(before), PREFIX), seen)))
            self.put(found['without'], plain[low:high], np.where(scored[1], TEXT, PREFIX))
        return {arm: (np.stack(rows), np.stack(masks)) for arm, (rows, masks) in found.items() if rows}

    def put(self, lists, ids, mask):
        """Append a row and its mask, padded on the right."""
        for values, one, fill in zip(lists, (ids.astype(np.uint32), mask), (self.pad, PAD)):
            values.append(self.fold(one, self.length, fill)[0])
