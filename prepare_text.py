r"""Make data/NAME from your own text: files, or a Hugging Face data set; bytes, or the ids of a byte-level BPE.

    python prepare_text.py --name=mine --source='texts/*.txt'                     a text file is one document, unchanged
    python prepare_text.py --name=mine --source=posts.jsonl.zst --tokenizer=gpt2  a jsonl line is one document
    python prepare_text.py --name=wiki1mb --source=FILE --max_bytes=1000000 --val_source=OTHER    the leading bytes
    python prepare_text.py --name=fineweb --source=HuggingFaceFW/fineweb-edu --hub_config=sample-10BT --max_bytes=1e9
    python prepare_text.py --name=mine8k --source='texts/*.txt' --tokenizer=mine8k     one of train_tokenizer.py
    python prepare_text.py --name=stories --source=stories.jsonl --rows=512          one document a row, padded, masked

Files: anything is text, taken as it is; .jsonl, .parquet: column text_field; each also as .gz, .bz2, .xz, .zst.
Validation and test: val_source and test_source; else the splits the hub set brings; else documents of the source chosen
by the hash of their content, so that a text that occurs twice never stands on both sides. A single document gives up
its tail, or nothing where val_source is given. Memory is constant, but for a hash per validation and test document.
Packed, documents follow each other, the last row of a split is short and scored like the others; {split}.index.bin
says where each begins. With rows, none shares a row: a longer one goes on in the next (or is cut, --truncate), each row
is predicted from the start id on, and {split}.mask.bin hides the padding from the loss (rows.py).
"""
import functools
import hashlib
import itertools
import math
import os
import re

from tqdm import tqdm

from configurator import UserError, at_least, configure, require, run
from corpus import clean
from corpus.bins import BinWriter, finish, may_write
from corpus.documents import local_files, open_source
from corpus.rows import DocumentRowWriter
from corpus.tokens import load_tokenizer, pieces_of, tokenizer_meta

name = ''                       # data set to make, data/NAME
source = ''                     # file, glob (quoted; ** descends), hub id, or local folder in hub layout
tokenizer = 'byte'              # byte, gpt2, NAME of train_tokenizer.py, or PATH of a tokenizer.json (or its folder)
data_dir = 'data'
hub_config = ''                 # configuration of a hub data set, where it has several
text_field = 'text'             # column of a hub data set, key of a jsonl object
val_source = ''                 # like source; '' takes the source's own split, or cuts one
test_source = ''
val_fraction = 0.01             # of the documents (bytes of a single document); 0: none
test_fraction = 0.01            # cut only where val is cut too
max_bytes = 0                   # leading bytes of the source to use; 0: all. val_source and test_source are taken whole
document_separator = r'\n\n\n'  # between documents at byte level, where BPE has end-of-text; between joined rows
join_rows = False               # the rows of a source are parts of one text, not documents: WikiText on the hub
clean_lines = False             # drop near-duplicate lines and lines with HTML tags (clean.py) and report how many
end_of_text = '<|endoftext|>'   # its name in a tokenizer.json
rows = 0                        # tokens in a row that one document has for itself; 0: documents are packed
truncate = False                # with rows: a document is its first row, what is beyond is left out
seed = 0                        # another seed cuts other documents
num_proc = 0                    # threads that tokenise; 0: one per core. Any number gives the same bytes
overwrite = False               # replace a finished data set of this name that another command made

SCRIPT = 'prepare_text.py'
FEW = 1000                      # documents up to which a cut is exact by rank; beyond, the fraction of a hash's range
BATCH = 1 << 20                 # characters handed to the tokenizer's threads together


# --- documents: (label, read), see sources.py ---

def read_source(where):
    """Return {split: function that gives its documents anew}, with join_rows one document each."""
    splits = open_source(where, text_field, hub_config, keep_empty=join_rows)
    return {split: functools.partial(joined, make) for split, make in splits.items()} if join_rows else splits


def joined(documents):
    """Yield the documents of a source as one, with the separator between them."""
    def read():
        for i, (_, parts) in enumerate(documents()):
            yield separator_bytes() if i else b''
            yield from parts()
    if next(filter(None, read()), b''):
        yield 'the joined rows', read


def part(read, start, stop):
    """Yield bytes [start, stop) of a document (stop may be inf)."""
    position = 0
    for chunk in read():
        if position >= stop:
            return
        if position + len(chunk) > start:
            yield chunk[max(0, start - position):min(len(chunk), stop - position)]
        position += len(chunk)


def size_of(read, enough=math.inf):
    """Count the bytes of a document, up to enough of them."""
    return sum(map(len, part(read, 0, enough)))


def before_character(read, position):
    """Return the last place at or before position where a UTF-8 character starts."""
    tail = b''.join(part(read, max(0, position - 3), position + 1))
    back = next((i for i, byte in enumerate(reversed(tail)) if byte & 0xC0 != 0x80), 0)
    return position - back if size_of(read, position + 1) > position else position


def leading(documents, n_bytes, separator, whole_characters):
    """Yield the documents that fill the leading n_bytes of the joined text; the last one is cut."""
    left = n_bytes
    for label, read in documents:
        size = size_of(read, left)
        stop = before_character(read, size) if whole_characters else size
        if stop > 0:
            yield label, functools.partial(part, read, 0, stop)
        left -= size + len(separator)
        if left <= 0:
            return


def hash_of(read):
    """Return 64 bits of a document's content, keyed by the seed."""
    digest = hashlib.blake2b(digest_size=8, key=str(seed).encode())
    for chunk in read():
        digest.update(chunk)
    return int.from_bytes(digest.digest(), 'big')


# --- splits being written ---

def separator_bytes():
    return re.sub(r'\\([ntr])', lambda m: dict(n='\n', t='\t', r='\r')[m[1]], document_separator).encode()


class Splits:
    """Documents go in, BinWriters fill; at byte level with the separator between documents, in BPE with end-of-text."""

    def __init__(self, folder, tok):
        self.folder, self.tok, self.writers, self.waiting, self.n_waiting = folder, tok, {}, [], 0
        self.existed, self.separator = os.path.isdir(folder), separator_bytes()
        self.meta = tokenizer_meta(tok)
        self.bar = tqdm(unit='B', unit_scale=True, desc=name, disable=None)
        self.cleaner = clean.LineCleaner() if clean_lines else None

    def add(self, split, label, chunks):
        """Append one document to a split."""
        if split not in self.writers:
            self.writers[split] = DocumentRowWriter(
                self.folder, split, self.meta['dtype'], self.tok, rows, truncate) if rows else BinWriter(
                self.folder, split, self.meta['dtype'])
        writer = self.writers[split]
        chunks = filter(None, self.cleaner(chunks) if self.cleaner else chunks)
        if self.tok is None:
            for i, chunk in enumerate(chunks):
                if i == 0:                                              # a document of which nothing is left is none
                    writer.write(self.separator if writer.n_bytes and not rows else b'', documents=0)
                    writer.begin_document()
                writer.write(chunk, documents=0)
                self.bar.update(len(chunk))
            return
        for i, piece in enumerate(pieces_of(chunks, label)):
            self.waiting.append((writer, piece, i == 0))
            self.n_waiting += len(piece) + 64                           # a document of no length costs something too
            if self.n_waiting > BATCH:
                self.flush()

    def flush(self):
        """Tokenise what waits and write it, in order."""
        waiting, self.waiting, self.n_waiting = self.waiting, [], 0
        for (writer, piece, begins), ids in zip(waiting, self.tok.encode([w[1] for w in waiting]) if waiting else []):
            if begins:                                  # ahead of the first document stands the start id
                writer.write([self.tok.end] if writer.n_bytes and not rows else [], text_bytes=0, documents=0)
                writer.begin_document()
            raw = piece.encode()
            writer.write(ids, text_bytes=len(raw), documents=0)
            writer.words += len(raw.split())                            # pieces end where words do
            self.bar.update(len(raw))

    def finish_text(self):
        self.flush()
        self.bar.close()

    def abort(self):
        """Leave nothing behind."""
        self.bar.close()
        for writer in self.writers.values():
            writer.abort()
        if not self.existed and os.path.isdir(self.folder) and not os.listdir(self.folder):
            os.rmdir(self.folder)


def thresholds(documents, val_share, test_share):
    """Return (test below, val below) on document hashes: exact by rank for up to FEW documents, else by range."""
    if not val_share:
        return 0, 0
    hashes = [hash_of(read) for _, read in itertools.islice(documents, FEW + 1)]
    if len(hashes) > FEW:
        return int(test_share * 2 ** 64), int((test_share + val_share) * 2 ** 64)
    ranked = sorted(set(hashes)) + [2 ** 64]
    n_val, n = math.ceil(val_share * (len(ranked) - 1)), len(ranked) - 1
    n_test = max(0, min(math.ceil(test_share * n), n - n_val - 1))
    return ranked[n_test], ranked[n_test + n_val]


def tail_cut(label, read, val_share, test_share):
    """Yield (split, label, read) of one document: its head trains, contiguous tails of whole characters do not."""
    size = size_of(read)
    n_val, n_test = math.ceil(size * val_share), math.ceil(size * test_share)
    ends = [before_character(read, max(0, end)) for end in (size - n_val - n_test, size - n_test)] + [size]
    for split, start, stop in zip(('train', 'val', 'test'), [0] + ends, ends):
        if stop > start:
            yield split, f'{label} from byte {start:,}', functools.partial(part, read, start, stop)


def main(argv=None):
    configure(globals(), argv)
    require((name != '', 'name is empty; name the data set, --name=mine makes data/mine'),
            (source != '', "source is empty; give files, --source='texts/*.txt', or the id of a hub data set"),
            at_least('max_bytes', max_bytes, 0), at_least('num_proc', num_proc, 0),
            (rows == 0 or rows >= 2, f'rows = {rows}, expected at least 2 tokens in a row, or 0 for packed documents'),
            (rows > 0 or not truncate, 'truncate cuts a document to its first row; set --rows=512, or leave it out'),
            (not (rows and join_rows), 'join_rows makes one text of all, rows keeps documents apart; leave one out'),
            (min(val_fraction, test_fraction) >= 0 and val_fraction + test_fraction < 1,
             f'val_fraction = {val_fraction}, test_fraction = {test_fraction}, expected both >= 0 and a sum below 1'))
    folder = os.path.join(data_dir, name)
    recorded_argv = may_write(folder, SCRIPT, argv, overwrite)
    tok, given, how = load_tokenizer(tokenizer, end_of_text, num_proc, data_dir), read_source(source), {}
    require(('train' in given, f'{source!r} has no split train, only {", ".join(given)}; expected one to train on'))
    for split, where in (('val', val_source), ('test', test_source)):
        if where:
            clash = set(map(os.path.realpath, local_files(source))) & set(map(os.path.realpath, local_files(where)))
            require((not clash, f'{split}_source and source share {", ".join(sorted(clash)[:3])}, expected other text;'
                     f' leave {split}_source out to have documents of the source set aside'))
            other = read_source(where)
            given[split] = other.get(split) or next(iter(other.values()))
        if split in given:
            how[split] = where or 'own split'
    documents = given['train']
    if max_bytes:
        documents = lambda: leading(given['train'](), max_bytes, separator_bytes(), tok is not None)        # noqa: E731
    first_two = list(itertools.islice(documents(), 2))
    require((first_two, f'source {source!r} holds no text, expected at least one byte of it; nothing was written'))
    val_share = 0 if 'val' in given else val_fraction
    test_share = test_fraction if val_share and 'test' not in given else 0
    for split, share in (('val', val_share), ('test', test_share)):
        if share:
            single = len(first_two) == 1
            how[split] = 'tail of the only document' if single else f'documents of the source by hash, seed {seed}'

    if len(first_two) == 1 and val_share:
        routed = tail_cut(*first_two[0], val_share, test_share)
    else:
        routed = by_hash(documents, thresholds(documents(), val_share, test_share))
    out = Splits(folder, tok)
    try:
        held_out, own, n_repeated, digest = set(), [s for s in how if how[s] == 'own split'], 0, hashlib.sha256()
        for split in [s for s in ('val', 'test') if s in given]:
            for label, read in given[split]():
                out.add(split, label, read())
                held_out.add(hash_of(read))
        for split, label, read in routed:
            if held_out and hash_of(read) in held_out:
                n_repeated += 1
                if not own:
                    continue
            out.add(split, label, hashed(read(), digest))
        out.finish_text()
        if test_share and 'test' not in out.writers:
            how.pop('test')                                             # too few documents for three splits
        for split in ('train', *how):
            if not out.writers.get(split) or not out.writers[split].n_bytes:
                raise UserError(f'{split} would be empty ({how.get(split, source)}; {n_repeated:,} documents of the'
                                ' source stand in val or test too), expected some text; give more documents, a larger'
                                ' --val_fraction, or other text for --val_source')
        for split, where in how.items():
            print(f'{split}: {where}')
        if n_repeated:
            print(f'{n_repeated:,} documents of train stand in val or test too: '
                  + ('kept, as these are the own splits of the set' if own else 'left out of train'))
        if out.cleaner:
            how_many = out.cleaner.counts
            print(f'cleaned {how_many["lines"]:,} lines: {how_many["duplicate_lines"]:,} near-duplicates and'
                  f' {how_many["html_lines"]:,} with HTML tags dropped')
        origin = dict(source=source, config=hub_config, sha256=digest.hexdigest(), splits=how,
                      cleaned=out.cleaner.counts if out.cleaner else {}, repeated_documents=n_repeated)
        more = dict(rows=dict(length=rows, control='', truncate=truncate)) if rows else {}
        finish(folder, SCRIPT, recorded_argv, {s: out.writers[s] for s in ('train', *how)}, origin, **out.meta,
               **more)
    except BaseException:
        out.abort()
        raise


def by_hash(documents, limits):
    for label, read in documents():
        h = hash_of(read) if limits[1] else 0
        yield 'test' if h < limits[0] else 'val' if h < limits[1] else 'train', label, read


def hashed(chunks, digest):
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


if __name__ == '__main__':
    run(main)
