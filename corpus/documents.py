"""Text to prepare: local files by glob, or a Hugging Face data set, as documents that can be read as often as needed.

Files: anything is text, taken as it is; .jsonl, .parquet: a column of it; each also as .gz, .bz2, .xz, .zst. A hub id,
or a local folder in hub layout, is streamed. A document is (label, read): read() yields its bytes in chunks, so that
one text of any size passes through constant memory. LineCleaner drops lines of it on the way (Li et al. 2021, §3).
"""
import bz2
import functools
import glob
import gzip
import hashlib
import json
import lzma
import os
import re
import shlex
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

from configurator import UserError, require

HUB_FILES = ('.parquet', '.jsonl', '.json', '.csv', '.arrow')        # what `datasets` reads rows from in a local folder
SPLIT_NAMES = dict(train='train', val='val', valid='val', validation='val', dev='val', test='test')
GLOB = re.compile(r'[*?\[]')
FILE_NAME = re.compile(r'[*?\[]|\.(txt|jsonl|json|bin|parquet|gz|zst|xz|bz2)$')     # no id of a data set looks so


class Document(NamedTuple):
    """A text to prepare."""
    label: str              # where it stands, for messages
    read: Callable          # gives its bytes in chunks, anew each time it is called


# --- files ---

def local_files(source):
    """Return the files that a path or glob names, sorted; none for a folder or a hub id."""
    source = os.path.expanduser(source)
    if os.path.isfile(source):
        return [source]
    return sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))


def require_hub(source, expected, pattern=GLOB):
    """Raise UserError where a source that names no file is no hub id or folder either, as it is spelled like a file.

    expected: what the message asks for instead. pattern: occurs in sources that can only be files.
    """
    is_path = pattern.search(source) or source.startswith(('/', '.'))
    if is_path and not os.path.isdir(source):
        raise UserError(f'no file matches {source!r}, expected {expected}')


def file_kind(path):
    """Return the last extension of a path without that of a compressor: '.jsonl' for x.jsonl.zst."""
    stem, extension = os.path.splitext(path.lower())
    if extension in ('.gz', '.bz2', '.xz', '.zst'):
        return os.path.splitext(stem)[1]
    return extension


def chunks_of(path, size=1 << 20):
    """Yield the bytes of a file, decompressed by its extension, in constant memory; UserError where it is damaged."""
    openers = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}
    _, extension = os.path.splitext(path.lower())
    opener = openers.get(extension, open)
    try:
        with opener(path, 'rb') as f:
            if extension == '.zst':
                yield from unzstd(f)
                return
            while chunk := f.read(size):
                yield chunk
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as e:
        raise UserError(f'{path} cannot be read to its end ({e or type(e).__name__}); fetch the file again') from None


def unzstd(f):
    """Decompress all frames of a zstd file; the library's own reader takes a truncated file for a whole one."""
    import zstandard

    def new_frame():
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    frame = new_frame()
    is_empty = True
    try:
        while raw := f.read(1 << 15):
            while raw:
                if frame.eof:
                    frame = new_frame()
                if text := frame.decompress(raw):
                    yield text
                raw = frame.unused_data
                is_empty = False
    except zstandard.ZstdError as e:
        raise OSError(str(e)) from None
    if not is_empty and not frame.eof:
        raise EOFError('truncated zstd frame')


def lines_of(chunks):
    """Yield the lines of chunks of bytes, without their ends; the last one may have none."""
    parts = []
    for chunk in chunks:
        first, *others = chunk.split(b'\n')
        parts.append(first)
        if others:
            yield b''.join(parts)
            yield from others[:-1]
            parts = [others[-1]]
    yield b''.join(parts)


def records_of(path, on_broken=None):
    """Yield (line number, object) of a jsonl file, compressed or not; blank lines are skipped.

    on_broken takes the message of a line that is no record, which is then left out.
    """
    for number, line in enumerate(lines_of(chunks_of(path)), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f'it holds a {type(record).__name__}')
        except ValueError as e:
            message = f'{path}:{number} is not JSON ({e}); jsonl has one {{"text": ...}} a line'
            if on_broken is None:
                raise UserError(message) from None
            on_broken(message)
            continue
        yield number, record


def text_bytes_of(text, where):
    """Return a text field as UTF-8; lone surrogates, which JSON can hold and UTF-8 cannot, become '?'."""
    if text is None:
        return b''
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise UserError(f'{where} holds a {type(text).__name__} for a text; name the right column with --text_field')
    return text.encode('utf-8', 'replace')


# --- Hugging Face data sets ---

def hub_splits(source, config=''):
    """Return {split: streaming dataset} of a Hugging Face data set or of a local folder in hub layout."""
    if os.path.isdir(source) and not has_hub_files(source):
        raise UserError(f'folder {source!r} holds no data files in hub layout ({", ".join(HUB_FILES)});'
                        f' for text files write a glob: --source={shlex.quote(os.path.join(source, "**", "*.txt"))}')
    import datasets
    try:
        return datasets.load_dataset(source, config or None, streaming=True)
    except (OSError, ValueError, RuntimeError) as e:
        reason = ' '.join(str(e).split())[:300]
        raise UserError(f'{source!r} is neither a file here nor a data set that can be opened ({type(e).__name__}:'
                        f' {reason}); check the path, the id, --hub_config and the network') from None


def has_hub_files(folder):
    """Say whether a folder, or one below it, holds a file that `datasets` can read rows from."""
    for _, _, names in os.walk(folder):
        if any(file_kind(name).endswith(HUB_FILES) for name in names):
            return True
    return False


def hub_rows(dataset, columns, cure='name one with --text_field'):
    """Yield tuples of the named columns of one streaming split, in order, as they hold them."""
    if dataset.column_names and set(columns) <= set(dataset.column_names):
        dataset = dataset.select_columns(columns)                       # parquet then reads no other column
    import datasets
    try:
        for table in dataset.with_format('arrow').iter(batch_size=256):
            missing = [c for c in columns if c not in table.column_names]
            require((not missing, f'the data set has no column {str(missing)[1:-1]}, it has'
                     f' {", ".join(table.column_names)}; {cure}'))
            yield from zip(*(table[c].to_pylist() for c in columns))
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as e:
        raise UserError(f'reading the data set failed ({type(e).__name__}: {" ".join(str(e).split())[:300]});'
                        ' check the network and run the same command again') from None


def hub_texts(dataset, field='text'):
    """Yield the texts of one streaming split, in order, as the column holds them (str, bytes or None)."""
    for text, in hub_rows(dataset, [field]):
        yield text


# --- documents ---

def open_source(source, text_field='text', hub_config='', keep_empty=False):
    """Return {split: function that gives its Documents anew}; files are one split, train.

    keep_empty: an empty text of a record or row is a document too, as rows of a joined text are.
    """
    source = os.path.expanduser(source)
    if files := local_files(source):
        return dict(train=functools.partial(file_documents, files, text_field, keep_empty))
    require_hub(source, "a file, a quoted glob such as 'texts/**/*.txt', or the id of a hub data set", FILE_NAME)

    # A data set without a split of a known name has its first one as train.
    splits = hub_splits(source, hub_config)
    theirs = {SPLIT_NAMES[name]: name for name in splits if name in SPLIT_NAMES}
    if not theirs:
        theirs = {'train': next(iter(splits))}
    return {split: functools.partial(hub_documents, splits[name], f'{source} {name}', text_field, keep_empty)
            for split, name in theirs.items()}


def file_documents(paths, text_field='text', keep_empty=False):
    """Yield the documents of files: a text file is one, a line of jsonl or a row of parquet is one."""
    for path in paths:
        kind = file_kind(path)
        if kind in ('.jsonl', '.ndjson'):
            for line, record in records_of(path):
                if text_field not in record:
                    raise UserError(f'{path}:{line} has no key {text_field!r}, it has {", ".join(record)[:200]};'
                                    ' name one with --text_field')
                yield from in_memory(record[text_field], f'{path}:{line}', keep_empty)
        elif kind == '.parquet':
            for number, text in enumerate(parquet_texts(path, text_field)):
                yield from in_memory(text, f'{path} row {number}', keep_empty)
        elif next(chunks_of(path), b''):
            yield Document(path, functools.partial(chunks_of, path))


def parquet_texts(path, text_field):
    """Yield the texts of one column of a parquet file."""
    import pyarrow
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path) as f:
            require((text_field in f.schema_arrow.names, f'{path} has no column {text_field!r}, it has'
                     f' {", ".join(f.schema_arrow.names)}; name one with --text_field'))
            for batch in f.iter_batches(256, columns=[text_field]):
                yield from batch[text_field].to_pylist()
    except (OSError, pyarrow.ArrowException) as e:
        raise UserError(f'{path} cannot be read to its end ({e}); fetch the file again') from None


def hub_documents(dataset, label, text_field='text', keep_empty=False):
    """Yield the documents of one streaming split, a row each."""
    for number, text in enumerate(hub_texts(dataset, text_field)):
        yield from in_memory(text, f'{label} row {number}', keep_empty)


def in_memory(text, label, keep_empty=False):
    """Yield a text as a document; an empty one is none, unless empty ones are kept."""
    data = text_bytes_of(text, label)
    if data or keep_empty:
        yield Document(label, lambda: iter((data,)))


def joined(documents, separator):
    """Yield the documents that a function gives as one, with the separator (bytes) between them."""
    def read():
        for i, document in enumerate(documents()):
            if i > 0:
                yield separator
            yield from document.read()

    if any(read()):                                             # at least one byte
        yield Document('the joined rows', read)


# --- parts of a document ---

def part_of(read, start, stop):
    """Yield bytes [start, stop) of a document (stop may be inf)."""
    position = 0
    for chunk in read():
        if position >= stop:
            return
        if position + len(chunk) > start:
            yield chunk[max(0, start - position):min(len(chunk), stop - position)]
        position += len(chunk)


def size_of(read, enough=float('inf')):
    """Count the bytes of a document, up to enough of them."""
    return sum(len(chunk) for chunk in part_of(read, 0, enough))


def before_character(read, position):
    """Return the last place at or before position where a UTF-8 character starts."""
    if size_of(read, position + 1) <= position:                 # the end of the document is a good place
        return position
    tail = b''.join(part_of(read, max(0, position - 3), position + 1))
    for back, byte in enumerate(reversed(tail)):
        if byte & 0xC0 != 0x80:
            return position - back
    return position


def leading(documents, n_bytes, separator, whole_characters):
    """Yield those of the documents that a function gives which fill the leading n_bytes of the joined text.

    The last one is cut, before a character where whole_characters are asked for; separator (bytes): between two.
    """
    left = n_bytes
    for label, read in documents():
        size = size_of(read, left)
        stop = before_character(read, size) if whole_characters else size
        if stop > 0:
            yield Document(label, functools.partial(part_of, read, 0, stop))
        left -= size + len(separator)
        if left <= 0:
            return


# --- cleaning ---

TAG = re.compile(rb'</?[A-Za-z][^<>\n]*>')
PUNCTUATION = bytes(b for b in range(128) if not chr(b).isalnum())      # white space too; other bytes are letters
BITS = 1 << 31                  # of the Bloom filter, 256 MiB
MAX_LINE = 1 << 20              # bytes; what is longer is taken as several lines


class LineCleaner:
    """Drop near-duplicate lines and lines with HTML tags, of one document after another, in constant memory.

    A line's key is its length without punctuation and white space, and its first and last four words. Keys seen are
    kept in a Bloom filter, 4 bits each: after 100 million different lines one new line in 1,000 is taken for an old
    one. counts says how many lines came in and why some did not go out.
    """

    def __init__(self):
        self.seen = bytearray(BITS // 8)
        self.counts = dict(lines=0, duplicate_lines=0, html_lines=0)

    def __call__(self, chunks):
        """Yield a document's bytes without the lines to drop; empty lines are layout and stay."""
        rest = b''
        for chunk in chunks:
            *lines, rest = (rest + chunk).split(b'\n')
            yield self.clean([line + b'\n' for line in lines])
            if len(rest) > MAX_LINE:
                yield self.clean([rest])
                rest = b''
        yield self.clean([rest])

    def clean(self, lines):
        """Return the lines that stay, joined."""
        good = []
        for line in lines:
            text = line.strip()
            if not text:
                good.append(line)
                continue
            self.counts['lines'] += 1
            if TAG.search(line):
                self.counts['html_lines'] += 1
            elif not self.is_new(text):
                self.counts['duplicate_lines'] += 1
            else:
                good.append(line)
        return b''.join(good)

    def is_new(self, line):
        """Say whether a line's key was not seen before, and remember it."""
        words = line.split()
        key = b'%d %s' % (len(line.translate(None, PUNCTUATION)), b' '.join(words[:4] + words[-4:]))
        digest = hashlib.blake2b(key, digest_size=16).digest()
        places = [place % BITS for place in struct.unpack('<4I', digest)]
        known = all(self.seen[place >> 3] >> (place & 7) & 1 for place in places)
        for place in places:
            self.seen[place >> 3] |= 1 << (place & 7)
        return not known
