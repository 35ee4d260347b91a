"""Token files: data/NAME/{train,val,test}.bin, raw little-endian ids without a header, and data/NAME/meta.json.

For byte data the .bin is the text itself, so cmp and sha256sum apply. meta.json holds format, dtype, vocab_size,
start_id, tokenizer {name, sha256}, source, splits {file, tokens, text_bytes, documents, sha256} and made_by {script,
argv}; of a split where known also words and index, a file of uint64: where each document's first token stands. Batches
are a pure function of (seed, epoch, batch): nothing about a position has to be saved, and the number of processes does
not change what a global batch holds.
"""
import hashlib
import json
import os
import shlex
import sys

import numpy as np

from configurator import UserError

FORMAT = 'nanomdl-bins-1'
DTYPES = {'uint8': 1, 'uint16': 2, 'uint32': 4}
NEWLINE = 10                                    # start id of byte data: what stands before the first byte


# --- writing ---

def sha256_file(path, limit=-1):
    """Return the hex SHA-256 of a file, or of its first limit bytes."""
    return _hash_into(hashlib.sha256(), path, limit).hexdigest()


def _hash_into(sha, path, limit):
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20 if limit < 0 else min(1 << 20, limit)):
            sha.update(chunk)
            limit -= len(chunk) if limit >= 0 else 0
    return sha


class BinWriter:
    """Write one split under a temporary name; commit() makes it appear, without it nothing looks finished.

    resume_bytes > 0 continues a temporary file that holds at least that many good bytes, resume_documents its index.
    """

    def __init__(self, folder, split, dtype='uint8', resume_bytes=0, resume_documents=0):
        os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(folder, f'{split}.bin')
        self.split, self.dtype = split, np.dtype(dtype).newbyteorder('<')
        self.tmp = self.path + '.tmp'
        self.text_bytes = self.documents = self.words = 0              # words: counted by who writes ids, see words_in
        if resume_bytes:
            if not os.path.exists(self.tmp) or os.path.getsize(self.tmp) < resume_bytes:
                raise UserError(f'{self.tmp} is shorter than the saved state says ({resume_bytes} bytes);'
                                ' delete it and start again')
            os.truncate(self.tmp, resume_bytes)
        self.sha = _hash_into(hashlib.sha256(), self.tmp, resume_bytes) if resume_bytes else hashlib.sha256()
        self.n_bytes = resume_bytes
        self.file, self.index = open(self.tmp, 'ab' if resume_bytes else 'wb'), None
        if resume_documents:
            self.index = open(self.path.removesuffix('.bin') + '.index.bin.tmp', 'ab')
            self.index.truncate(8 * resume_documents)

    def write(self, tokens, text_bytes=None, documents=1):
        """Append bytes (byte data) or an array of ids; text_bytes is the length of the text they stand for."""
        is_text = isinstance(tokens, (bytes, bytearray, memoryview))
        if text_bytes is None and self.dtype.itemsize > 1:
            raise TypeError('ids of more than one byte need text_bytes')
        ids = np.zeros(0) if is_text else np.asarray(tokens)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) <= np.iinfo(self.dtype).max:
            raise UserError(f'{self.path}: ids {ids.min()} to {ids.max()} do not fit {self.dtype.name};'
                            ' use a wider dtype')
        raw = bytes(tokens) if is_text else ids.astype(self.dtype).tobytes()
        self.file.write(raw)
        self.sha.update(raw)
        self.n_bytes += len(raw)
        self.text_bytes += len(raw) if text_bytes is None else text_bytes
        self.documents += documents

    def begin_document(self):
        """Count a document and note in {split}.index.bin that its first token comes next; for all or for none."""
        self.index = self.index or open(self.path.removesuffix('.bin') + '.index.bin.tmp', 'wb')
        self.index.write(self.tokens.to_bytes(8, 'little'))
        self.documents += 1

    @property
    def tokens(self):
        return self.n_bytes // self.dtype.itemsize

    def flush(self):
        """Push everything to disk, so that n_bytes and documents may be recorded as a place to resume from."""
        for file in filter(None, (self.file, self.index)):
            file.flush()
            os.fsync(file.fileno())

    def commit(self):
        """Give the file its final name and return its entry for meta.json."""
        self.flush()
        self.file.close()
        os.replace(self.tmp, self.path)
        more = dict(words=self.words) if self.words else {}
        if self.index:
            self.index.close()
            os.replace(self.index.name, self.index.name.removesuffix('.tmp'))
            more['index'] = os.path.basename(self.index.name.removesuffix('.tmp'))
        entry = dict(file=os.path.basename(self.path), tokens=self.tokens, text_bytes=self.text_bytes,
                     documents=self.documents, sha256=self.sha.hexdigest())
        return dict(entry, **more)

    def abort(self):
        for file in filter(None, (self.file, self.index)):
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
    write_json(os.path.join(folder, 'meta.json'), dict(
        format=FORMAT, dtype=dtype, vocab_size=vocab_size, start_id=start_id,
        tokenizer=tokenizer or dict(name='byte', sha256=''), source=source, splits=splits,
        made_by=dict(script=script, argv=list(argv)), **more))


# --- reading ---

def dataset_folder(data_dir, dataset):
    """data/NAME, or NAME itself where that is a folder with a meta.json."""
    return dataset if os.path.exists(os.path.join(dataset, 'meta.json')) else os.path.join(data_dir, dataset)


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
    found = meta.get('format') if isinstance(meta, dict) else None
    if found != FORMAT:
        raise UserError(f'{path} has format {found!r}, this version reads {FORMAT!r};'
                        ' prepare the data set again')
    return meta


def file_in(folder, name):
    """Return the path of a file that meta.json names: one in the data set's own folder, else UserError."""
    plain = isinstance(name, str) and name not in ('', '.', '..') and '\0' not in name
    if not plain or os.path.basename(name) != name:
        raise UserError(f'{os.path.join(folder, "meta.json")} names the file {name!r}, expected a name without a'
                        ' folder; no prepare script wrote that: delete the data set by hand or choose another --name')
    return os.path.join(folder, name)


class Bin:
    """One split of a data set as a memory map: tokens (n_tokens,), read-only, with what meta.json says of it."""

    row_length, padded = 0, False               # of rows.Rows alone

    def __init__(self, tokens, vocab_size=256, start_id=NEWLINE, text_bytes=None, sha256='', name='', split='',
                 tokenizer='byte', words=0, byte_lengths=None):
        self.tokens, self.n_tokens, self.vocab_size, self.start_id = tokens, len(tokens), vocab_size, start_id
        self.text_bytes = len(tokens) if text_bytes is None else text_bytes
        self.sha256, self.name, self.split, self.tokenizer = sha256, name, split, tokenizer
        self.words, self.byte_lengths, self.index = words, byte_lengths, ''     # 0, None, '': not known

    def head(self, n_tokens):
        """Return the leading n_tokens (0: all) as a Bin: text bytes counted by id, words a share of the whole."""
        if n_tokens <= 0 or n_tokens >= self.n_tokens:
            return self
        if self.byte_lengths is None:
            text_bytes = round(self.text_bytes * n_tokens / self.n_tokens)
        else:
            text_bytes = sum(int(self.byte_lengths[self.tokens[i:min(i + (1 << 20), n_tokens)]].sum(dtype=np.int64))
                             for i in range(0, n_tokens, 1 << 20))
        part = Bin(self.tokens[:n_tokens], self.vocab_size, self.start_id, text_bytes, f'{self.sha256}:{n_tokens}',
                   self.name, self.split, self.tokenizer, round(self.words * n_tokens / self.n_tokens),
                   self.byte_lengths)
        part.index = self.index
        return part

    def count_words(self):
        """Count the words of the text: of bytes here and now, of ids as it was counted when they were made, or 0."""
        return words_in(self.tokens) if self.tokenizer == 'byte' else self.words

    def gather(self, starts, length):
        """Return inputs and targets, two (B, length) int64 arrays; row i scores tokens [starts[i], starts[i] + length).

        The input of a target is the token before it, the start id for the first of all. A negative start is a padding
        row; targets past the end are -1 and count nowhere.
        """
        rows = np.full((len(starts), length + 1), -1, np.int64)
        for row, start in zip(rows, starts):
            if start >= 0:
                chunk = self.tokens[max(start - 1, 0):start + length]
                row[int(start == 0):int(start == 0) + len(chunk)] = chunk
                if start == 0:
                    row[0] = self.start_id
        x, y = rows[:, :-1].copy(), rows[:, 1:]
        x[x < 0] = self.start_id
        return x, y

    def n_scored(self, starts, length):
        """Count the targets that gather would score."""
        starts = np.asarray(starts)
        return int(np.clip(self.n_tokens - starts[starts >= 0], 0, length).sum())


def words_in(text):
    """Count runs of anything but ASCII white space in an array of bytes, in constant memory."""
    n, before, white = 0, True, np.isin(np.arange(256), list(b' \t\n\r\v\f'))
    for i in range(0, len(text), 1 << 20):
        gap = white[text[i:i + (1 << 20)]]
        n += int((~gap[1:] & gap[:-1]).sum()) + int(before and not gap[0])
        before = gap[-1]
    return n


def open_bin(data_dir, dataset, split, verify=False):
    """Map one split and check it against meta.json: size always, ids at both ends, the hash where verify is set."""
    meta, folder = read_meta(data_dir, dataset), dataset_folder(data_dir, dataset)
    again = f'regenerate it: python {meta["made_by"]["script"]} {shlex.join(meta["made_by"]["argv"])}'.rstrip()
    if split not in meta['splits']:
        raise UserError(f'data set {dataset!r} has no split {split!r}, it has {", ".join(meta["splits"])}; {again}')
    entry = meta['splits'][split]
    path = file_in(folder, entry['file'])
    if meta['dtype'] not in DTYPES:
        raise UserError(f'{dataset}: dtype {meta["dtype"]!r} in meta.json, expected one of {", ".join(DTYPES)};'
                        f' {again}')
    if not os.path.exists(path):
        raise UserError(f'{path} is missing; {again}')
    size, expected = os.path.getsize(path), entry['tokens'] * DTYPES[meta['dtype']]
    if size != expected:
        raise UserError(f'{path} has {size} bytes, meta.json says {entry["tokens"]} tokens of {meta["dtype"]}'
                        f' = {expected} bytes; {again}')
    tokens = np.memmap(path, np.dtype(meta['dtype']).newbyteorder('<'), 'r') if size else np.zeros(0, meta['dtype'])
    worst = max((int(end.max()) for end in (tokens[:4096], tokens[-4096:]) if len(end)), default=0)
    if worst >= meta['vocab_size']:
        raise UserError(f'{path} holds token id {worst}, the vocabulary has {meta["vocab_size"]}; {again}')
    if verify and sha256_file(path) != entry['sha256']:
        raise UserError(f'{path} does not have the SHA-256 of meta.json ({entry["sha256"]}); {again}')
    table = file_in(folder, meta['tokenizer'].get('token_bytes') or 'none')
    lengths = np.fromfile(table, '<u2') if os.path.exists(table) else None
    found = Bin(tokens, meta['vocab_size'], meta['start_id'], entry['text_bytes'], entry['sha256'], dataset, split,
                meta['tokenizer']['name'], entry.get('words', 0), lengths)
    found.index = file_in(folder, entry['index']) if 'index' in entry else ''
    import rows
    return rows.Rows.of(found, meta['rows'], entry, folder, again, verify) if 'mask' in entry else found


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
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), 'little')


def permute(i, n, key):
    """Return the images of i (array in [0, n)) under a keyed permutation of range(n), in constant memory.

    Four Feistel rounds on the smallest even-width binary domain that holds n, walked until the value falls below n
    (Black & Rogaway 2002), so an epoch over 10^7 blocks needs no table.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    low, shift = _U64((1 << half) - 1), _U64(half)
    x = np.asarray(i).astype(_U64)
    todo = np.ones(x.shape, bool)
    while todo.any():
        left, right = x[todo] >> shift, x[todo] & low
        for r in range(4):
            left, right = right, left ^ (mix64(right + _U64(key_of(key, r))) & low)
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
        return (draws % _U64(max(1, n_tokens - block_size + 1))).astype(np.int64)
    n = n_blocks(n_tokens, block_size)
    starts = np.full(batch_size, -1, np.int64)
    inside = i < n
    starts[inside] = (i[inside] if order == 'sequential' else permute(i[inside], n, key_of(seed, epoch))) * block_size
    return starts


# --- preparing a data set (prepare_*.py): documents in, finished splits out ---

def may_write(folder, script, argv, overwrite):
    """Return argv without --overwrite, as meta.json records it; refuse a data set that another command made.

    With overwrite, refuse an older meta.json that names files elsewhere: finish would delete them.
    """
    path = os.path.join(folder, 'meta.json')
    argv = sys.argv[1:] if argv is None else argv
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
    files = [(file_in(folder, entry['file']), entry['sha256']) for entry in meta['splits'].values()]
    return meta if all(os.path.exists(path) and sha256_file(path) == sha for path, sha in files) else None


def finish(folder, script, argv, writers, source, extras=None, **meta):
    """Give all splits {name: BinWriter} their final names, write extras {file: bytes} and meta.json; print the splits.

    An older meta.json goes first: until the new one stands the folder is no data set, whatever it holds.
    """
    path = os.path.join(folder, 'meta.json')
    old = old_files(folder)
    if os.path.exists(path):
        os.remove(path)
    splits = {split: writer.commit() for split, writer in writers.items()}
    for stale in old - files_of(splits):
        if os.path.isfile(file_in(folder, stale)):
            os.remove(file_in(folder, stale))
    for file, content in (extras or {}).items():
        with open(os.path.join(folder, file), 'wb') as f:
            f.write(content)
    write_meta(folder, script, argv, splits, source, **meta)
    print_splits(folder, splits)


def old_files(folder):
    """Return the names of the files of the data set in a folder; none where there is none or nobody can read it."""
    try:
        names = files_of(read_meta('', folder)['splits'])
    except UserError:
        return set()
    for name in names:
        file_in(folder, name)
    return names


def files_of(splits):
    """Return the names of all files of splits, as meta.json lists them."""
    return {entry[kind] for entry in splits.values() for kind in ('file', 'index', 'mask') if kind in entry}


def print_splits(folder, splits):
    for entry in splits.values():
        print(f'{os.path.join(folder, entry["file"])}: {entry["tokens"]:,} tokens, {entry["text_bytes"]:,} bytes of'
              f' text, {entry["documents"]:,} documents, sha256 {entry["sha256"]}')
