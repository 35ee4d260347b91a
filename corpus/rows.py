"""Row data: fixed-length rows of ids with a mask beside them, for documents that may not be packed together.

{split}.bin holds rows of T ids, {split}.mask.bin a byte for each: 0 padding, 1 text, 2 prefix (seen, never scored; in
paired sets also the text that only one side can score), 3 in-line markup. A row predicts its own tokens, the first from
the start id. Padding to the left of the text (control = 'samecontext') is hidden from attention. {split}.index.bin
says where documents start. How documents with metadata are cut into rows stands in cutter.py.
"""
import os
from dataclasses import dataclass, fields, replace

import numpy as np

from configurator import UserError, require
from corpus.bins import (
    NEWLINE,
    Bin,
    BinWriter,
    bytes_of,
    how_to_make,
    map_file,
    pieces_of,
    plain_name,
    sha256_file,
)

PAD, TEXT, PREFIX, MARKUP = range(4)
KIND_NAMES = {'text': TEXT, 'markup': MARKUP}           # as meta.json counts them
LOSSES = {'text': (TEXT,), 'text+markup': (TEXT, MARKUP)}


# --- reading ---

@dataclass(eq=False)
class Rows(Bin):
    """Fixed-length rows as a Bin: the same surface, but only text (and markup, if asked) is scored."""

    mask: np.ndarray = None             # (n_tokens,) of PAD, TEXT, PREFIX, MARKUP
    row_length: int = 0
    padded: bool = False                # padding stands to the left of the text, and is hidden from attention
    kinds: tuple = LOSSES['text']       # the values of the mask that are scored
    n_targets: int = 0                  # tokens of these kinds; text_bytes are theirs
    entry: dict = None                  # what meta.json says of the split

    def scoring(self, loss_on):
        """Return these rows, a whole split, with what loss_on names scored, bytes and targets counted accordingly."""
        kinds = LOSSES[loss_on]
        names = [name for name, kind in KIND_NAMES.items() if kind in kinds]
        return replace(self, kinds=kinds, n_targets=sum(self.entry['scored'][name] for name in names),
                       text_bytes=sum(self.entry['scored_bytes'][name] for name in names))

    def head(self, n_tokens):
        """Return the leading rows that hold n_tokens (0: all), padding and prefixes included."""
        if n_tokens <= 0 or n_tokens >= self.n_tokens:
            return self
        n = max(n_tokens // self.row_length, 1) * self.row_length
        tokens = self.tokens[:n]
        mask = self.mask[:n]

        # How much of them is scored stands nowhere: count.
        n_targets = 0
        text_bytes = 0
        for some_ids, some_mask in zip(pieces_of(tokens), pieces_of(mask)):
            scored = some_ids[np.isin(some_mask, self.kinds)]
            n_targets += len(scored)
            text_bytes += bytes_of(scored, self.byte_lengths)
        return replace(self, tokens=tokens, mask=mask, sha256=f'{self.sha256}:{n}', n_targets=n_targets,
                       text_bytes=text_bytes)

    def count_words(self):
        return 0                                        # not counted: rows hold prefixes and padding too

    def rows_at(self, starts, length):
        """Return ids and mask (B, length) of rows; a negative start is a row of padding."""
        starts = np.asarray(starts)
        begins_a_row = length == self.row_length and not (starts[starts >= 0] % length).any()
        require((begins_a_row, f'data set {self.name!r} has rows of {self.row_length} tokens, asked for {length} at'
                 f' other places; set --block_size={self.row_length}, and no order = random, stride or minimal'
                 ' context'))
        place = np.maximum(starts, 0)[:, None] + np.arange(length)
        mask = np.where(starts[:, None] >= 0, self.mask[place], PAD)
        return self.tokens[place].astype(np.int64), mask

    def gather(self, starts, length):
        """Return inputs and targets, two (B, length) int64 arrays; -1: a target not scored, an input not to be seen."""
        ids, mask = self.rows_at(starts, length)
        first = np.full((len(ids), 1), self.start_id)
        x = np.concatenate((first, ids[:, :-1]), 1)
        if self.padded:
            # The start id stands right before the first token, and everything before it is hidden.
            left = np.argmax(mask > PAD, 1)
            x[np.arange(length) < left[:, None]] = -1
        y = np.where(np.isin(mask, self.kinds), ids, -1)
        return x, y

    def n_scored(self, starts, length):
        """Count the targets that gather would score."""
        _, mask = self.rows_at(starts, length)
        return int(np.isin(mask, self.kinds).sum())


def open_rows(data, meta, folder, verify=False):
    """Return the Rows of an opened Bin whose meta.json names a mask, scoring text; check the mask as open_bin does."""
    entry = meta['splits'][data.split]
    again = how_to_make(meta)
    path = os.path.join(folder, plain_name(entry['mask'], folder))
    size = 0
    if os.path.exists(path):
        size = os.path.getsize(path)
    if size != data.n_tokens or not os.path.exists(path):
        raise UserError(f'{path} has {size} bytes, expected one for each of {data.n_tokens} tokens; {again}')
    if verify and sha256_file(path) != entry['mask_sha256']:
        raise UserError(f'{path} does not have the SHA-256 of meta.json ({entry["mask_sha256"]}); {again}')
    of_bin = {f.name: getattr(data, f.name) for f in fields(data)}
    of_bin['sha256'] = f'{data.sha256}:{entry["mask_sha256"]}'
    rows = Rows(**of_bin, mask=map_file(path, np.uint8), row_length=meta['rows']['length'],
                padded=meta['rows']['control'] == 'samecontext', entry=entry)
    return rows.scoring('text')


# --- writing ---

class RowWriter:
    """Write the rows of one split and their mask, as bins.BinWriter does; state resumes what an earlier one left."""

    def __init__(self, folder, split, dtype, byte_lengths=None, state=None):
        if state is None:
            nothing = dict(text=0, markup=0)
            state = dict(n_bytes=0, n_mask=0, documents=0, text_bytes=0, scored=nothing, scored_bytes=nothing)
        self.ids = BinWriter(folder, split, dtype, state['n_bytes'], state['documents'])
        self.ids.documents = state['documents']
        self.masks = BinWriter(folder, f'{split}.mask', 'uint8', state['n_mask'])
        self.byte_lengths = byte_lengths
        self.scored = dict(state['scored'])
        self.scored_bytes = dict(state['scored_bytes'])

    def state(self):
        """Push everything to disk and return what resumes from here."""
        self.ids.flush()
        self.masks.flush()
        return dict(n_bytes=self.ids.n_bytes, n_mask=self.masks.n_bytes, documents=self.ids.documents,
                    text_bytes=self.scored_bytes['text'], scored=self.scored, scored_bytes=self.scored_bytes)

    def write(self, ids, mask, begins=True):
        """Append rows of one document: ids and mask, two (n, T) arrays; begins: they are its first."""
        if begins:
            self.ids.begin_document()
        self.ids.write(ids.ravel(), text_bytes=0, documents=0)
        self.masks.write(mask.astype(np.uint8).tobytes(), documents=0)
        for name, kind in KIND_NAMES.items():
            of_kind = ids[mask == kind]
            self.scored[name] += len(of_kind)
            self.scored_bytes[name] += bytes_of(of_kind, self.byte_lengths)

    def commit(self):
        """Give both files their final names and return the split's entry for meta.json."""
        self.ids.text_bytes = self.scored_bytes['text']
        entry = self.ids.commit()
        mask = self.masks.commit()
        return dict(entry, mask=mask['file'], mask_sha256=mask['sha256'], scored=self.scored,
                    scored_bytes=self.scored_bytes)

    def abort(self):
        """Leave no file behind."""
        self.ids.abort()
        self.masks.abort()


class DocumentRowWriter(RowWriter):
    """Take documents as bins.BinWriter does and write each as rows of its own; tok: of tokens.py, None for bytes.

    The last row of a document is padded on the right; truncate leaves out all rows but the first. Less than a row is
    held back, until the document goes on or ends.
    """

    def __init__(self, folder, split, dtype, tok, length, truncate=False):
        byte_lengths = None
        pad = NEWLINE
        if tok is not None:
            byte_lengths = tok.byte_lengths
            pad = tok.end
        super().__init__(folder, split, dtype, byte_lengths)
        self.pad = pad
        self.length = length
        self.truncate = truncate
        self.waiting = np.zeros(0, np.uint32)                   # the held back ids
        self.begins = False                                     # no row of this document is written yet
        self.words = 0

    @property
    def n_bytes(self):
        return self.ids.n_bytes + len(self.waiting)             # more than none as soon as there is a token

    def begin_document(self):
        self._end_document()
        self.begins = True

    def write(self, tokens, text_bytes=None, documents=0):
        """Append a part of the document that begin_document opened; text_bytes is counted by what is written."""
        if isinstance(tokens, bytes):
            tokens = np.frombuffer(tokens, np.uint8)
        ids = np.concatenate((self.waiting, np.asarray(tokens).astype(np.uint32)))
        n_whole = len(ids) // self.length * self.length
        self._put(ids[:n_whole].reshape(-1, self.length), self.length)
        self.waiting = ids[n_whole:]

    def _put(self, rows, n_text):
        """Write rows (n, T), of which the first n_text columns are text."""
        if self.truncate and not self.begins:
            return
        if self.truncate:
            rows = rows[:1]
        if len(rows) == 0:
            return
        mask = np.where(np.arange(self.length) < n_text, TEXT, PAD)
        super().write(rows, np.tile(mask, (len(rows), 1)), self.begins)
        self.begins = False

    def _end_document(self):
        """Fill up the last row of the document and write it."""
        n_text = len(self.waiting)
        if n_text == 0:
            return
        row = np.pad(self.waiting, (0, self.length - n_text), constant_values=self.pad)
        self._put(row[None], n_text)
        self.waiting = self.waiting[:0]

    def commit(self):
        self._end_document()
        return super().commit()
