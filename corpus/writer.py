"""What all prepare scripts share: splits by hash, documents into token files, and going on where a run was interrupted.

A data set is written under temporary names (bins.BinWriter) while resume.json in its folder says how far each of them
is good; bins.finish gives them their names. Until then the folder is no data set.
"""
import hashlib
import itertools
import json
import math
import os
import time
from dataclasses import dataclass

from corpus.bins import BinWriter, intact, print_splits, write_json
from corpus.tokens import pieces_of

FEW = 1000                      # documents up to which a cut is exact by rank; beyond, the fraction of a hash's range
BATCH = 1 << 20                 # characters handed to the tokenizer's threads together
PER_PIECE = 64                  # characters that a piece counts for beside its own: an empty one costs something too
EMPTY = dict(n_bytes=0, text_bytes=0, documents=0, words=0)


# --- which split a document is of ---

def fractions_fit(val_fraction, test_fraction):
    """Rule for require: val and test leave something to train on."""
    fits = min(val_fraction, test_fraction) >= 0 and val_fraction + test_fraction < 1
    return fits, (f'val_fraction = {val_fraction}, test_fraction = {test_fraction}, expected both >= 0 and a sum below'
                  ' 1')


def hash_of(chunks, seed):
    """Return 64 bits of a document's content (bytes in chunks), keyed by the seed."""
    digest = hashlib.blake2b(digest_size=8, key=str(seed).encode())
    for chunk in chunks:
        digest.update(chunk)
    return int.from_bytes(digest.digest(), 'big')


def thresholds(documents, val_share, test_share, seed):
    """Return (test_below, val_below) for split_at on document hashes: exact by rank for few documents, else by range.

    documents: iterable of (label, read). By rank no more than FEW of them are read.
    """
    if not val_share:
        return 0, 0
    hashes = [hash_of(read(), seed) for _, read in itertools.islice(documents, FEW + 1)]
    if len(hashes) > FEW:
        return int(test_share * 2 ** 64), int((test_share + val_share) * 2 ** 64)

    # Of n different documents one at least validates, and one at least trains, before any tests.
    ranked = sorted(set(hashes))
    n = len(ranked)
    n_val = math.ceil(val_share * n)
    n_test = max(0, min(math.ceil(test_share * n), n - n_val - 1))
    ranked.append(2 ** 64)
    return ranked[n_test], ranked[n_test + n_val]


def split_at(place, test_below, val_below):
    """Return the split of a document whose hash is place: test first, then val, the rest trains."""
    if place < test_below:
        return 'test'
    if place < val_below:
        return 'val'
    return 'train'


# --- resuming ---

def print_finished(folders, message):
    """Print the splits of data sets that are all there, hashes as recorded, behind a message; say whether they are."""
    metas = [intact(folder) for folder in folders]
    if not all(metas):
        return False
    print(message)
    for folder, meta in zip(folders, metas):
        print_splits(folder, meta['splits'])
    return True


class ResumeFile:
    """resume.json of a data set being made: what a later process of the same command goes on from.

    identity: all that decides what the data set holds; a file of another identity is not gone on from. every: seconds
    after which a state is due to be saved again.
    """

    def __init__(self, folder, identity, every=0.0):
        self.path = os.path.join(folder, 'resume.json')
        self.identity = json.loads(json.dumps(identity))                # as it will be read back
        self.every = every
        self.saved_at = time.time()

    def read(self):
        """Return the saved state, None where there is none of this identity or not a whole one."""
        try:
            with open(self.path, encoding='utf-8') as f:
                state = json.load(f)
        except (OSError, ValueError):
            return None
        if not isinstance(state, dict) or state.pop('of', None) != self.identity:
            return None
        return state

    @property
    def is_due(self):
        return time.time() - self.saved_at > self.every

    def save(self, state):
        """Write a state, a dict for JSON; what it speaks of is on disk already."""
        write_json(self.path, dict(of=self.identity, **state))
        self.saved_at = time.time()

    def remove(self):
        """Remove the file: the data set is made, or not to be made of this source."""
        if os.path.exists(self.path):
            os.remove(self.path)


def is_written(folder, split, n_bytes):
    """Say whether the temporary file of a split holds at least the bytes that a state speaks of."""
    path = os.path.join(folder, f'{split}.bin.tmp')
    return os.path.exists(path) and os.path.getsize(path) >= n_bytes


# --- documents into token files ---

class PackedWriter(BinWriter):
    """Write one split of documents that follow each other, a separator (bytes or ids) between two; may be resumed.

    tok: of tokens.py, None for bytes. limit: tokens after which nothing more is written, 0 for none. leader: another
    writer; once it is full this one takes no more documents. state: what resumes an earlier writer.
    """

    def __init__(self, folder, split, dtype, tok=None, separator=b'', limit=0, leader=None, state=EMPTY):
        super().__init__(folder, split, dtype, state['n_bytes'], state['documents'])
        self.text_bytes = state['text_bytes']
        self.documents = state['documents']
        self.words = state['words']
        self.tok = tok
        self.separator = separator
        self.limit = limit
        self.leader = leader or self
        self.is_open = False                    # whether what is written belongs to a document that is wanted

    def state(self):
        """Push everything to disk and return what resumes from here."""
        self.flush()
        return dict(n_bytes=self.n_bytes, text_bytes=self.text_bytes, documents=self.documents, words=self.words)

    @property
    def is_full(self):
        return 0 < self.leader.limit <= self.leader.tokens

    def begin_document(self):
        """Begin a document, unless no more are wanted: the separator where it is not the first, a note in the index."""
        if self.n_bytes and not self.is_full:
            self.put(self.separator, text_bytes=None if self.tok is None else 0)
        self.is_open = not self.is_full
        if self.is_open:
            super().begin_document()

    def write(self, tokens, text_bytes=None, documents=0):
        """Append a part of the document that begin_document opened: bytes, or ids that stand for text_bytes."""
        if self.is_open:
            self.put(tokens, text_bytes)

    def count_words(self, n_words):
        """Count words of the document that begin_document opened."""
        if self.is_open:
            self.words += n_words

    def put(self, tokens, text_bytes):
        """Append tokens as far as the limit leaves room for them."""
        if self.limit and len(tokens) > self.limit - self.tokens:
            tokens = tokens[:self.limit - self.tokens]
            text_bytes = None if self.tok is None else int(self.tok.byte_lengths[tokens].sum())
        super().write(tokens, text_bytes=text_bytes, documents=0)


@dataclass
class Piece:
    """A part of a document that waits for the tokenizer."""
    writer: object
    text: str
    begins: bool                # whether it is the first part
    n_bytes: int                # of the text as UTF-8
    n_words: int                # to be counted with it


class TokenQueue:
    """Documents on their way to writers of any kind: bytes pass at once, text waits until there is a batch of it.

    tok: of tokens.py, None for bytes. on_written is called with the number of bytes of text whenever some were written.
    A writer has begin_document and write, as PackedWriter and rows.DocumentRowWriter.
    """

    def __init__(self, tok, on_written=lambda n_bytes: None):
        self.tok = tok
        self.on_written = on_written
        self.waiting = []
        self.n_waiting = 0

    def add(self, writer, chunks, label, n_words=None):
        """Append one document, bytes in chunks, to a writer; a document of no bytes is none.

        n_words: its words, where they are known; else they are counted, of text that waits.
        """
        chunks = filter(None, chunks)
        if self.tok is None:
            for i, chunk in enumerate(chunks):
                if i == 0:
                    writer.begin_document()
                writer.write(chunk, documents=0)
                self.on_written(len(chunk))
            return
        for i, text in enumerate(pieces_of(chunks, label)):
            raw = text.encode()
            if n_words is None:
                words_here = len(raw.split())                           # pieces end where words do
            else:
                words_here = n_words if i == 0 else 0
            self.waiting.append(Piece(writer, text, i == 0, len(raw), words_here))
            self.n_waiting += len(text) + PER_PIECE
            if self.n_waiting > BATCH:
                self.flush()

    def flush(self):
        """Tokenise what waits and write it, in order."""
        waiting = self.waiting
        self.waiting = []
        self.n_waiting = 0
        if not waiting:
            return
        for piece, ids in zip(waiting, self.tok.encode([piece.text for piece in waiting])):
            if piece.begins:
                piece.writer.begin_document()
            piece.writer.write(ids, text_bytes=piece.n_bytes, documents=0)
            if isinstance(piece.writer, PackedWriter):                  # rows do not count theirs
                piece.writer.count_words(piece.n_words)
            self.on_written(piece.n_bytes)
