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
is predicted from the start id on, and {split}.mask.bin hides the padding from the loss (corpus/rows.py).
"""
import functools
import hashlib
import itertools
import math
import os
import re
import types

from configurator import UserError, at_least, configure, require

# -----------------------------------------------------------------------------
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
clean_lines = False             # drop near-duplicate lines and lines with HTML tags, and report how many
end_of_text = '<|endoftext|>'   # its name in a tokenizer.json
rows = 0                        # tokens in a row that one document has for itself; 0: documents are packed
truncate = False                # with rows: a document is its first row, what is beyond is left out
seed = 0                        # another seed cuts other documents
num_proc = 0                    # threads that tokenise; 0: one per core. Any number gives the same bytes
overwrite = False               # replace a finished data set of this name that another command made
# -----------------------------------------------------------------------------

config = configure(globals())

from tqdm import tqdm

from corpus.bins import finish, may_write
from corpus.documents import (
    Document,
    LineCleaner,
    before_character,
    joined,
    leading,
    local_files,
    open_source,
    part_of,
    size_of,
)
from corpus.rows import DocumentRowWriter
from corpus.tokens import load_tokenizer, tokenizer_meta
from corpus.writer import PackedWriter, TokenQueue, fractions_fit, hash_of, split_at, thresholds

SCRIPT = 'prepare_text.py'
OWN = 'own split'               # what meta.json says of a split that the source brings


def check_knobs(k):
    require((k.name != '', 'name is empty; name the data set, --name=mine makes data/mine'),
            (k.source != '', "source is empty; give files, --source='texts/*.txt', or the id of a hub data set"),
            at_least('max_bytes', k.max_bytes, 0), at_least('num_proc', k.num_proc, 0),
            (k.rows == 0 or k.rows >= 2, f'rows = {k.rows}, expected at least 2 tokens in a row, or 0 for packed'
             ' documents'),
            (k.rows > 0 or not k.truncate, 'truncate cuts a document to its first row; set --rows=512, or leave it'
             ' out'),
            (not (k.rows and k.join_rows), 'join_rows makes one text of all, rows keeps documents apart; leave one'
             ' out'),
            fractions_fit(k.val_fraction, k.test_fraction))


# --- where the documents of each split come from ---

def unescaped(text):
    r"""Return a separator as bytes; \n, \t and \r in it are what they stand for."""
    return re.sub(r'\\([ntr])', lambda m: dict(n='\n', t='\t', r='\r')[m[1]], text).encode()


def read_source(where, separator, k):
    """Return {split: function that gives its documents anew}, with join_rows one document each."""
    splits = open_source(where, k.text_field, k.hub_config, keep_empty=k.join_rows)
    if not k.join_rows:
        return splits
    return {split: functools.partial(joined, documents, separator) for split, documents in splits.items()}


def given_splits(separator, k):
    """Return ({split: function that gives its documents}, {val or test: where it is from}) of what need not be cut."""
    given = read_source(k.source, separator, k)
    require(('train' in given, f'{k.source!r} has no split train, only {", ".join(given)}; expected one to train on'))
    origin = {}
    for split, where in (('val', k.val_source), ('test', k.test_source)):
        if where:
            clash = set(map(os.path.realpath, local_files(k.source))) & set(map(os.path.realpath, local_files(where)))
            require((not clash, f'{split}_source and source share {", ".join(sorted(clash)[:3])}, expected other text;'
                     f' leave {split}_source out to have documents of the source set aside'))
            theirs = read_source(where, separator, k)
            first = next(iter(theirs.values()))
            given[split] = theirs.get(split, first)
        if split in given:
            origin[split] = where or OWN
    return given, origin


def cut_by_hash(documents, test_below, val_below, seed):
    """Yield (split, Document); val_below 0: all train, and none is hashed."""
    for document in documents:
        place = 0
        if val_below:
            place = hash_of(document.read(), seed)
        yield split_at(place, test_below, val_below), document


def cut_tail(document, val_share, test_share):
    """Yield (split, Document) of one document: its head trains, contiguous tails of whole characters do not."""
    label, read = document
    size = size_of(read)
    n_val = math.ceil(size * val_share)
    n_test = math.ceil(size * test_share)
    val_at = before_character(read, max(0, size - n_val - n_test))
    test_at = before_character(read, max(0, size - n_test))
    for split, start, stop in (('train', 0, val_at), ('val', val_at, test_at), ('test', test_at, size)):
        if stop > start:
            yield split, Document(f'{label} from byte {start:,}', functools.partial(part_of, read, start, stop))


# --- writing ---

class Splits:
    """The splits being written: documents go in, writers appear as they are needed."""

    def __init__(self, folder, tok, separator, k):
        self.folder = folder
        self.existed = os.path.isdir(folder)
        self.tok = tok
        self.separator = separator
        if tok is not None:
            self.separator = [tok.end]
        self.dtype = tokenizer_meta(tok)['dtype']
        self.rows = k.rows
        self.truncate = k.truncate
        self.cleaner = LineCleaner() if k.clean_lines else None
        self.bar = tqdm(unit='B', unit_scale=True, desc=k.name, disable=None)
        self.queue = TokenQueue(tok, self.bar.update)
        self.writers = {}

    def add(self, split, label, chunks):
        """Append one document, bytes in chunks, to a split."""
        if split not in self.writers:
            self.writers[split] = self.new_writer(split)
        if self.cleaner:
            chunks = self.cleaner(chunks)
        self.queue.add(self.writers[split], chunks, label)

    def new_writer(self, split):
        """Return the writer of a split: of packed documents, or of rows that each document has for itself."""
        if self.rows:
            return DocumentRowWriter(self.folder, split, self.dtype, self.tok, self.rows, self.truncate)
        return PackedWriter(self.folder, split, self.dtype, self.tok, self.separator)

    def finish_text(self):
        """Write what waits."""
        self.queue.flush()
        self.bar.close()

    def is_empty(self, split):
        return split not in self.writers or not self.writers[split].n_bytes

    def abort(self):
        """Leave nothing behind."""
        self.bar.close()
        for writer in self.writers.values():
            writer.abort()
        if not self.existed and os.path.isdir(self.folder) and not os.listdir(self.folder):
            os.rmdir(self.folder)


def write_given(splits, given, seed):
    """Write val and test where they are given; return the hashes of their documents."""
    hashes = set()
    for split in ('val', 'test'):
        if split in given:
            for label, read in given[split]():
                splits.add(split, label, read())
                hashes.add(hash_of(read(), seed))
    return hashes


def write_cut(splits, documents, held_out, keep_repeated, seed):
    """Write (split, Document)s of the source; return how many stand in held_out too, and the SHA-256 of what is used.

    held_out: hashes of given val and test documents, which do not train, unless keep_repeated.
    """
    n_repeated = 0
    digest = hashlib.sha256()
    for split, (label, read) in documents:
        if held_out and hash_of(read(), seed) in held_out:
            n_repeated += 1
            if not keep_repeated:
                continue
        splits.add(split, label, hashed(read(), digest))
    return n_repeated, digest.hexdigest()


def hashed(chunks, digest):
    """Yield chunks, each of which the digest has seen."""
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def say_what_was_done(origin, n_repeated, keep_repeated, cleaned):
    """Print where val and test are from, what of train stands in them, and what cleaning dropped (counts or {})."""
    for split, where in origin.items():
        print(f'{split}: {where}')
    if n_repeated:
        fate = 'left out of train'
        if keep_repeated:
            fate = 'kept, as these are the own splits of the set'
        print(f'{n_repeated:,} documents of train stand in val or test too: {fate}')
    if cleaned:
        print(f'cleaned {cleaned["lines"]:,} lines: {cleaned["duplicate_lines"]:,} near-duplicates and'
              f' {cleaned["html_lines"]:,} with HTML tags dropped')


if __name__ == '__main__':
    knobs = types.SimpleNamespace(**config)
    check_knobs(knobs)
    folder = os.path.join(data_dir, name)
    recorded_argv = may_write(folder, SCRIPT, None, overwrite)
    tok = load_tokenizer(tokenizer, end_of_text, num_proc, data_dir)
    separator = unescaped(document_separator)

    # The documents of the source, and of the splits that need not be cut from it.
    given, origin = given_splits(separator, knobs)
    documents = given['train']
    if max_bytes:
        documents = functools.partial(leading, given['train'], max_bytes, separator, tok is not None)
    first_two = list(itertools.islice(documents(), 2))
    require((first_two, f'source {source!r} holds no text, expected at least one byte of it; nothing was written'))

    # What is cut from the source: documents by their hash, or the tail where there is only one.
    val_share = 0
    test_share = 0
    if 'val' not in given:
        val_share = val_fraction
    if val_share and 'test' not in given:
        test_share = test_fraction
    is_single = len(first_two) == 1
    how = f'documents of the source by hash, seed {seed}'
    if is_single:
        how = 'tail of the only document'
    if val_share:
        origin['val'] = how
    if test_share:
        origin['test'] = how
    if is_single and val_share:
        cut = cut_tail(first_two[0], val_share, test_share)
    else:
        test_below, val_below = thresholds(documents(), val_share, test_share, seed)
        cut = cut_by_hash(documents(), test_below, val_below, seed)

    splits = Splits(folder, tok, separator, knobs)
    try:
        # Write the text. A set that brings its own splits keeps what it repeats; else val and test do not train.
        keep_repeated = OWN in origin.values()
        held_out = write_given(splits, given, seed)
        n_repeated, sha256 = write_cut(splits, cut, held_out, keep_repeated, seed)
        splits.finish_text()

        # Few documents make no test split, but nothing else may be empty.
        if test_share and 'test' not in splits.writers:
            del origin['test']
        for split in ('train', *origin):
            if splits.is_empty(split):
                raise UserError(f'{split} would be empty ({origin.get(split, source)}; {n_repeated:,} documents of the'
                                ' source stand in val or test too), expected some text; give more documents, a larger'
                                ' --val_fraction, or other text for --val_source')

        # Say what was done, give the files their names, and write meta.json last.
        cleaned = splits.cleaner.counts if splits.cleaner else {}
        say_what_was_done(origin, n_repeated, keep_repeated, cleaned)
        about_source = dict(source=source, config=hub_config, sha256=sha256, splits=origin, cleaned=cleaned,
                            repeated_documents=n_repeated)
        about_rows = {}
        if rows:
            about_rows['rows'] = dict(length=rows, control='', truncate=truncate)
        writers = {split: splits.writers[split] for split in ('train', *origin)}
        finish(folder, SCRIPT, recorded_argv, writers, about_source, **tokenizer_meta(tok), **about_rows)
    except BaseException:
        splits.abort()
        raise
