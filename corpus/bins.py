"""Token files: data/NAME/{train,val,test}.bin, raw little-endian ids without a header, and data/NAME/meta.json.

For byte data the .bin is the text itself, so cmp and sha256sum apply. meta.json holds format, dtype, vocab_size,
start_id, tokenizer {name, sha256}, source, splits {file, tokens, text_bytes, documents, sha256} and made_by {script,
argv}; of a split where known also words and index, a file of uint64: where each document's first token stands. Batches
are a pure function of (seed, epoch, batch): nothing about a position has to be saved, and the number of processes does
not change what a global batch holds.
"""
import hashlib
import json
import math
import os
import shlex
import sys
from dataclasses import dataclass, replace

import numpy as np

from configurator import UserError

FORMAT = 'nanomdl-bins-1'
DTYPES = {'uint8': 1, 'uint16': 2, 'uint32': 4}
NEWLINE = 10                                    # start id of byte data: what stands before the first byte


# --- writing ---

def sha256_file(path, limit=-1):
    """Return the hex SHA-256 of a file, or of its first limit bytes."""
    return _hash_of(path, limit).hexdigest()


def _hash_of(path, limit=-1):
    """Return the hash object of a file's first limit bytes (-1: all), to which more bytes can be added."""
    sha = hashlib.sha256()
    left = limit
    if limit < 0:
        left = math.inf
    with open(path, 'rb') as f:
        while chunk := f.read(min(1 << 20, left)):
            sha.update(chunk)
            left -= len(chunk)
    return sha


class BinWriter:
    """Write one split under a temporary name; commit() makes it appear, without it nothing looks finished.

    resume_bytes > 0 continues a temporary file that holds at least that many good bytes, resume_documents its index.
    """

    def __init__(self, folder, split, dtype='uint8', resume_bytes=0, resume_documents=0):
        os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(folder, f'{split}.bin')
        self.index_path = os.path.join(folder, f'{split}.index.bin')
        self.split = split
        self.dtype = np.dtype(dtype).newbyteorder('<')
        self.tmp = self.path + '.tmp'
        self.text_bytes = 0
        self.documents = 0
        self.words = 0                                  # counted by who writes ids, see words_in
        self.n_bytes = resume_bytes
        if resume_bytes:
            self._cut_back(resume_bytes)
            self.sha = _hash_of(self.tmp, resume_bytes)
            self.file = open(self.tmp, 'ab')
        else:
            self.sha = hashlib.sha256()
            self.file = open(self.tmp, 'wb')
        self.index = None
        if resume_documents:
            self.index = open(self.index_path + '.tmp', 'ab')
            self.index.truncate(8 * resume_documents)

    def _cut_back(self, n_bytes):
        """Leave of the temporary file what was there when its state was saved."""
        if not os.path.exists(self.tmp) or os.path.getsize(self.tmp) < n_bytes:
            raise UserError(f'{self.tmp} is shorter than the saved state says ({n_bytes} bytes);'
                            ' delete it and start again')
        os.truncate(self.tmp, n_bytes)

    def write(self, tokens, text_bytes=None, documents=1):
        """Append bytes (byte data) or an array of ids; text_bytes is the length of the text they stand for."""
        if text_bytes is None and self.dtype.itemsize > 1:
            raise TypeError('ids of more than one byte need text_bytes')
        if isinstance(tokens, (bytes, bytearray, memoryview)):
            raw = bytes(tokens)
        else:
            raw = self._raw(np.asarray(tokens))
        self.file.write(raw)
        self.sha.update(raw)
        self.n_bytes += len(raw)
        if text_bytes is None:
            text_bytes = len(raw)
        self.text_bytes += text_bytes
        self.documents += documents

    def _raw(self, ids):
        """Return ids as they stand in the file; refuse those that would wrap around."""
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) <= np.iinfo(self.dtype).max:
            raise UserError(f'{self.path}: ids {ids.min()} to {ids.max()} do not fit {self.dtype.name};'
                            ' use a wider dtype')
        return ids.astype(self.dtype).tobytes()

    def begin_document(self):
        """Count a document and note in {split}.index.bin that its first token comes next; for all or for none."""
        if self.index is None:
            self.index = open(self.index_path + '.tmp', 'wb')
        self.index.write(self.tokens.to_bytes(8, 'little'))
        self.documents += 1

    @property
    def tokens(self):
        return self.n_bytes // self.dtype.itemsize

    def _files(self):
        return [file for file in (self.file, self.index) if file]

    def flush(self):
        """Push everything to disk, so that n_bytes and documents may be recorded as a place to resume from."""
        for file in self._files():
            file.flush()
            os.fsync(file.fileno())

    def commit(self):
        """Give the file its final name and return its entry for meta.json."""
        self.flush()
        self.file.close()
        os.replace(self.tmp, self.path)
        entry = dict(file=os.path.basename(self.path), tokens=self.tokens, text_bytes=self.text_bytes,
                     documents=self.documents, sha256=self.sha.hexdigest())
        if self.words:
            entry['words'] = self.words
        if self.index:
            self.index.close()
            os.replace(self.index.name, self.index_path)
            entry['index'] = os.path.basename(self.index_path)
        return entry

    def abort(self):
        """Leave no file behind."""
        for file in self._files():
            file.close()
            if os.path.exists(file.name):
                os.remove(file.name)


def write_json(path, value):
    """Write JSON under a temporary name and rename, so that a reader never sees half a file."""
    tmp = f'{path}.{os.getpid()}.tmp'
    with open(tmp, 'w', encoding='utf-8') as f:
        json.dump(value, f, indent=1)
        f.write('\n')
    os.replace(tmp, path)


def write_meta(folder, script, argv, splits, source, dtype='uint8', vocab_size=256, start_id=NEWLINE, tokenizer=None,
               **more):
    """Write meta.json, last of all: a folder without it is not a data set."""
    made_by = dict(script=script, argv=list(argv))
    meta = dict(format=FORMAT, dtype=dtype, vocab_size=vocab_size, start_id=start_id,
                tokenizer=tokenizer or dict(name='byte', sha256=''), source=source, splits=splits, made_by=made_by)
    write_json(os.path.join(folder, 'meta.json'), dict(meta, **more))


# --- reading ---

def dataset_folder(data_dir, dataset):
    """data/NAME, or NAME itself where that is a folder with a meta.json."""
    if os.path.exists(os.path.join(dataset, 'meta.json')):
        return dataset
    return os.path.join(data_dir, dataset)


def read_meta(data_dir, dataset):
    """Return the parsed meta.json of a data set, checked for its format."""
    path = os.path.join(dataset_folder(data_dir, dataset), 'meta.json')
    if not os.path.exists(path):
        raise UserError(f'no data set {dataset!r} ({path} is missing); make it with python prepare_'
                        f'{dataset.split("_")[0]}.py or python prepare_text.py --name={dataset} --source=FILES')
    try:
        with open(path, encoding='utf-8') as f:
            meta = json.load(f)
    except ValueError as e:
        raise UserError(f'{path} is not valid JSON ({e}); prepare the data set again') from None
    found = None
    if isinstance(meta, dict):
        found = meta.get('format')
    if found != FORMAT:
        raise UserError(f'{path} has format {found!r}, this version reads {FORMAT!r};'
                        ' prepare the data set again')
    return meta


class Data:
    """What trainers and scorers ask of data: Bin (below), rows.Rows, mixture.Mixture and objectives.Objective.

    n_tokens; n_targets, those that are scored; text_bytes that the targets stand for; vocab_size, start_id, tokenizer;
    name, split, sha256: which data. row_length: of fixed rows, 0 where rows may begin anywhere. padded: rows may begin
    with inputs of -1, hidden from attention. n_balanced: the most tokens that head can be asked for.
    """

    row_length = 0
    padded = False

    @property
    def bytes_per_target(self):
        """Return the bytes of text that a scored target stands for, on average."""
        return self.text_bytes / max(self.n_targets, 1)

    def head(self, n_tokens):
        """Return the leading n_tokens, of the same kind; 0 is all."""
        raise NotImplementedError

    def gather(self, starts, length):
        """Return inputs and targets of rows, two (B, length) int64 arrays; a target of -1 is not scored."""
        raise NotImplementedError

    def n_scored(self, starts, length):
        """Count the targets that gather would score."""
        raise NotImplementedError

    def n_batches(self, batch_size, block_size, seed):
        """Return the number of batches in an epoch."""
        return n_blocks(n_blocks(self.n_tokens, block_size), batch_size)

    def starts(self, order, seed, epoch, batch, number, batch_size, block_size):
        """Return the (batch_size,) start positions of a batch of an epoch; number, of the run's batch, is not used."""
        return batch_starts(order, seed, epoch, batch, batch_size, self.n_tokens, block_size)

    def rows_by_source(self, n_rows, seed):
        """Count the first n_rows rows of a run by source, {name: rows}; of a mixture alone, else {}."""
        return {}


@dataclass(eq=False)
class Bin(Data):
    """One split of a data set as a memory map: tokens (n_tokens,), read-only, with what meta.json says of it."""

    tokens: np.ndarray
    vocab_size: int = 256
    start_id: int = NEWLINE
    text_bytes: int = None              # None: a byte for each token
    sha256: str = ''
    name: str = ''
    split: str = ''
    tokenizer: str = 'byte'
    words: int = 0                      # 0: not known
    byte_lengths: np.ndarray = None     # (V,), the bytes that an id stands for; None: not known
    index: str = ''                     # a file that says where documents start; '': not known

    def __post_init__(self):
        if self.text_bytes is None:
            self.text_bytes = len(self.tokens)

    @property
    def n_tokens(self):
        return len(self.tokens)

    @property
    def n_balanced(self):
        return len(self.tokens)

    @property
    def n_targets(self):
        return len(self.tokens)

    def head(self, n_tokens):
        """Return the leading n_tokens (0: all) as a Bin: text bytes counted by id, words a share of the whole."""
        if n_tokens <= 0 or n_tokens >= self.n_tokens:
            return self
        leading = self.tokens[:n_tokens]
        if self.byte_lengths is None:
            text_bytes = round(self.text_bytes * n_tokens / self.n_tokens)
        else:
            text_bytes = sum(bytes_of(piece, self.byte_lengths) for piece in pieces_of(leading))
        return replace(self, tokens=leading, text_bytes=text_bytes, sha256=f'{self.sha256}:{n_tokens}',
                       words=round(self.words * n_tokens / self.n_tokens))

    def count_words(self):
        """Count the words of the text: of bytes here and now, of ids as it was counted when they were made, or 0."""
        if self.tokenizer == 'byte':
            return words_in(self.tokens)
        return self.words

    def gather(self, starts, length):
        """Return inputs and targets, two (B, length) int64 arrays; row i scores tokens [starts[i], starts[i] + length).

        The input of a target is the token before it, the start id for the first of all. A negative start is a padding
        row; targets past the end are -1 and count nowhere.
        """
        # A row of length + 1: the token before the first target, then the targets.
        rows = np.full((len(starts), length + 1), -1, np.int64)
        for row, start in zip(rows, starts):
            if start < 0:
                continue
            if start == 0:
                first = self.tokens[:length]
                row[0] = self.start_id
                row[1:1 + len(first)] = first
            else:
                chunk = self.tokens[start - 1:start + length]
                row[:len(chunk)] = chunk

        # What is no token has the start id as its input, and no target.
        x = rows[:, :-1].copy()
        x[x < 0] = self.start_id
        return x, rows[:, 1:]

    def n_scored(self, starts, length):
        """Count the targets that gather would score."""
        starts = np.asarray(starts)
        left = self.n_tokens - starts[starts >= 0]
        return int(np.clip(left, 0, length).sum())


def pieces_of(array, size=1 << 20):
    """Yield an array in pieces, so that a memory map is never in memory as a whole."""
    for i in range(0, len(array), size):
        yield array[i:i + size]


def bytes_of(ids, byte_lengths=None):
    """Return how many bytes of text ids stand for; byte_lengths (V,) as in Bin."""
    if byte_lengths is None:
        return len(ids)
    return int(byte_lengths[ids].sum(dtype=np.int64))


def words_in(text):
    """Count runs of anything but ASCII white space in an array of bytes, in constant memory."""
    n_words = 0
    white = np.isin(np.arange(256), list(b' \t\n\r\v\f'))
    after_gap = True
    for piece in pieces_of(text):
        # A word begins where a gap ends; the first of a piece also looks at the piece before.
        gap = white[piece]
        n_words += int((~gap[1:] & gap[:-1]).sum())
        if after_gap and not gap[0]:
            n_words += 1
        after_gap = gap[-1]
    return n_words


def plain_name(name, folder):
    """Return the name of a file that the meta.json of a folder gives; refuse one that points out of the folder."""
    plain = isinstance(name, str) and name not in ('', '.', '..') and not {'\0', '\\'} & set(name)
    if not plain or os.path.basename(name) != name:
        raise UserError(f'{os.path.join(folder, "meta.json")} names the file {name!r}, expected a name without a'
                        ' folder; no prepare script wrote that: delete the data set by hand or choose another --name')
    return name


def how_to_make(meta):
    """Return the command that makes a data set again, as the end of a message."""
    made_by = meta['made_by']
    return f'regenerate it: python {made_by["script"]} {shlex.join(made_by["argv"])}'.rstrip()


def open_bin(data_dir, dataset, split, verify=False):
    """Map one split as plain tokens, whatever their mask: see data.open_split, which is what scripts use.

    Checked against meta.json: size always, ids at both ends, the hash where verify is set.
    """
    meta = read_meta(data_dir, dataset)
    folder = dataset_folder(data_dir, dataset)
    again = how_to_make(meta)
    if split not in meta['splits']:
        raise UserError(f'data set {dataset!r} has no split {split!r}, it has {", ".join(meta["splits"])}; {again}')
    entry = meta['splits'][split]
    path = os.path.join(folder, plain_name(entry['file'], folder))

    # The file has the size that its entry says.
    if meta['dtype'] not in DTYPES:
        raise UserError(f'{dataset}: dtype {meta["dtype"]!r} in meta.json, expected one of {", ".join(DTYPES)};'
                        f' {again}')
    if not os.path.exists(path):
        raise UserError(f'{path} is missing; {again}')
    size = os.path.getsize(path)
    expected = entry['tokens'] * DTYPES[meta['dtype']]
    if size != expected:
        raise UserError(f'{path} has {size} bytes, meta.json says {entry["tokens"]} tokens of {meta["dtype"]}'
                        f' = {expected} bytes; {again}')

    # Its ids are below the vocabulary's size; looking at both ends finds a wrong dtype or tokenizer.
    tokens = map_file(path, np.dtype(meta['dtype']).newbyteorder('<'))
    worst = max((int(end.max()) for end in (tokens[:4096], tokens[-4096:]) if len(end)), default=0)
    if worst >= meta['vocab_size']:
        raise UserError(f'{path} holds token id {worst}, the vocabulary has {meta["vocab_size"]}; {again}')
    if verify and sha256_file(path) != entry['sha256']:
        raise UserError(f'{path} does not have the SHA-256 of meta.json ({entry["sha256"]}); {again}')

    index = ''
    if 'index' in entry:
        index = os.path.join(folder, plain_name(entry['index'], folder))
    return Bin(tokens, vocab_size=meta['vocab_size'], start_id=meta['start_id'], text_bytes=entry['text_bytes'],
               sha256=entry['sha256'], name=dataset, split=split, tokenizer=meta['tokenizer']['name'],
               words=entry.get('words', 0), byte_lengths=read_byte_lengths(meta, folder), index=index)


def map_file(path, dtype):
    """Map a file read-only as an array; an empty file, which cannot be mapped, is an empty array."""
    if os.path.getsize(path) == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, 'r')


def read_byte_lengths(meta, folder):
    """Return the bytes that each id stands for, (V,) uint16, or None where the data set has no such table."""
    name = meta['tokenizer'].get('token_bytes')
    if not name:
        return None
    path = os.path.join(folder, plain_name(name, folder))
    if not os.path.exists(path):
        return None
    return np.fromfile(path, '<u2')


def split_names(data_dir, dataset):
    return list(read_meta(data_dir, dataset)['splits'])


# --- which rows a batch holds ---

_U64 = np.uint64


def mix64(x):
    """SplitMix64's finaliser on a uint64 array: a bijection of 64-bit words (Steele et al. 2014)."""
    x = np.asarray(x, _U64)
    with np.errstate(over='ignore'):
        x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def key_of(*numbers):
    """Hash integers into one 64-bit key, the same on every machine and Python."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little')


def permute(i, n, key):
    """Return the images of i (array in [0, n)) under a keyed permutation of range(n), in constant memory.

    Four Feistel rounds on the smallest even-width binary domain that holds n, walked until the value falls below n
    (Black & Rogaway 2002), so an epoch over 10^7 blocks needs no table.
    """
    n_bits = max(n - 1, 1).bit_length()
    half = max(1, (n_bits + 1) // 2)
    low = _U64((1 << half) - 1)
    shift = _U64(half)
    x = np.asarray(i).astype(_U64)
    todo = np.ones(x.shape, bool)
    while todo.any():
        left = x[todo] >> shift
        right = x[todo] & low
        for r in range(4):
            mixed = mix64(right + _U64(key_of(key, r))) & low
            left, right = right, left ^ mixed           # a Feistel round: the halves change places
        x[todo] = left << shift | right
        todo = x >= n
    return x.astype(np.int64)


def n_blocks(n_tokens, block_size):
    """Blocks that hold n_tokens; the last may be short."""
    return -(-n_tokens // block_size)


def batch_starts(order, seed, epoch, batch, batch_size, n_tokens, block_size):
    """Return the (batch_size,) start positions of one global batch; -1 marks padding rows of an epoch's last batch.

    order: 'sequential' (each token once, in order), 'permuted' (each block once an epoch), 'random' (with replacement).
    """
    i = np.arange(batch * batch_size, (batch + 1) * batch_size, dtype=np.int64)
    if order == 'random':
        with np.errstate(over='ignore'):
            draws = mix64(i.astype(_U64) + _U64(key_of(seed, epoch)))
        n_places = max(1, n_tokens - block_size + 1)
        return (draws % _U64(n_places)).astype(np.int64)

    # The i-th block of the epoch; past the last one come padding rows.
    n = n_blocks(n_tokens, block_size)
    inside = i < n
    blocks = i[inside]
    if order == 'permuted':
        blocks = permute(blocks, n, key_of(seed, epoch))
    starts = np.full(batch_size, -1, np.int64)
    starts[inside] = blocks * block_size
    return starts


# --- preparing a data set (prepare_*.py): documents in, finished splits out ---

def may_write(folder, script, argv, overwrite):
    """Return argv without --overwrite, as meta.json records it; refuse a data set that another command made.

    With overwrite, refuse an older meta.json that names files elsewhere: finish would delete them.
    """
    path = os.path.join(folder, 'meta.json')
    if argv is None:
        argv = sys.argv[1:]
    argv = [a for a in argv if not a.replace('-', '_').startswith('__overwrite')]
    if overwrite:
        old_files(folder)
    if os.path.exists(path) and not overwrite:
        made_by = read_meta('', folder)['made_by']
        if made_by != dict(script=script, argv=argv):
            theirs = f'{made_by["script"]} {shlex.join(made_by["argv"])}'
            raise UserError(f'{folder} holds the data set of "{theirs}"; give this one another --name (or --data_dir),'
                            f' or replace it with --overwrite (now: {script} {shlex.join(argv)})')
    return argv


def intact(folder):
    """Return meta.json where the folder holds a finished data set whose files have the recorded hashes, else None."""
    if not os.path.exists(os.path.join(folder, 'meta.json')):
        return None
    meta = read_meta('', folder)
    for entry in meta['splits'].values():
        path = os.path.join(folder, plain_name(entry['file'], folder))
        if not os.path.exists(path) or sha256_file(path) != entry['sha256']:
            return None
    return meta


def finish(folder, script, argv, writers, source, extras=None, **meta):
    """Give all splits {name: BinWriter} their final names, write extras {file: bytes} and meta.json; print the splits.

    An older meta.json goes first: until the new one stands the folder is no data set, whatever it holds.
    """
    path = os.path.join(folder, 'meta.json')
    older = set()
    if os.path.exists(path):
        older = old_files(folder)
        os.remove(path)
    splits = {split: writer.commit() for split, writer in writers.items()}
    for stale in older - files_of(splits, folder):
        os.remove(os.path.join(folder, stale))
    for file, content in (extras or {}).items():
        with open(os.path.join(folder, file), 'wb') as f:
            f.write(content)
    write_meta(folder, script, argv, splits, source, **meta)
    print_splits(folder, splits)


def old_files(folder):
    """Return the names of the files of the data set in a folder; none where there is none or nobody can read it."""
    try:
        splits = read_meta('', folder)['splits']
    except UserError:
        return set()
    return files_of(splits, folder)


def files_of(splits, folder):
    """Return the names of all files of splits, as the meta.json of a folder lists them."""
    names = set()
    for entry in splits.values():
        for kind in ('file', 'index', 'mask'):
            if kind in entry:
                names.add(plain_name(entry[kind], folder))
    return names


def print_splits(folder, splits):
    for entry in splits.values():
        print(f'{os.path.join(folder, entry["file"])}: {entry["tokens"]:,} tokens, {entry["text_bytes"]:,} bytes of'
              f' text, {entry["documents"]:,} documents, sha256 {entry["sha256"]}')
