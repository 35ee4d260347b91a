"""Text to prepare: local files by glob, or a Hugging Face data set, as documents that can be read as often as needed.

Files: anything is text, taken as it is; .jsonl, .parquet: a column of it; each also as .gz, .bz2, .xz, .zst. A hub id,
or a local folder in hub layout, is streamed. A document is (label, read): read() yields its bytes in chunks, so that
one text of any size passes through constant memory.
"""
import bz2
import functools
import glob
import gzip
import itertools
import json
import lzma
import os
import re
import shlex
import zlib

from configurator import UserError, require

HUB_FILES = ('.parquet', '.jsonl', '.json', '.csv', '.arrow')        # what `datasets` reads rows from in a local folder
SPLIT_NAMES = dict(train='train', val='val', valid='val', validation='val', dev='val', test='test')


# --- files and rows ---


def local_files(source):
    """Return the files that a path or glob names, sorted; none for a folder or a hub id."""
    source = os.path.expanduser(source)
    if os.path.isfile(source):
        return [source]
    return sorted(p for p in glob.glob(source, recursive=True) if os.path.isfile(p))


def file_kind(path):
    """Return the last extension of a path without that of a compressor: '.jsonl' for x.jsonl.zst."""
    stem, extension = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if extension in ('.gz', '.bz2', '.xz', '.zst') else extension


def chunks_of(path, size=1 << 20):
    """Yield the bytes of a file, decompressed by its extension, in constant memory; UserError where it is damaged."""
    opener = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}.get(os.path.splitext(path.lower())[1], open)
    try:
        with opener(path, 'rb') as f:
            if path.lower().endswith('.zst'):
                yield from _unzstd(f)
            else:
                while chunk := f.read(size):
                    yield chunk
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as e:
        raise UserError(f'{path} cannot be read to its end ({e or type(e).__name__}); fetch the file again') from None


def _unzstd(f):
    """Decompress all frames of a zstd file; the library's own reader takes a truncated file for a whole one."""
    import zstandard
    frame = lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()             # noqa: E731
    current, fed = frame(), False
    try:
        while raw := f.read(1 << 15):
            while raw:
                if current.eof:
                    current = frame()
                if out := current.decompress(raw):
                    yield out
                raw, fed = current.unused_data, True
    except zstandard.ZstdError as e:
        raise OSError(str(e)) from None
    if fed and not current.eof:
        raise EOFError('truncated zstd frame')


def records_of(path, on_broken=None):
    """Yield (line number, object) of a jsonl file, compressed or not; blank lines are skipped.

    on_broken takes the message of a line that is no record, which is then left out.
    """
    rest, number = b'', 0
    for chunk in itertools.chain(chunks_of(path), (b'\n',)):
        *lines, last = chunk.split(b'\n')
        if not lines:
            rest += last
            continue
        lines[0], rest = rest + lines[0], last
        for line in lines:
            number += 1
            if line.strip():
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
    if text is None or isinstance(text, bytes):
        return text or b''
    if not isinstance(text, str):
        raise UserError(f'{where} holds a {type(text).__name__} for a text; name the right column with --text_field')
    return text.encode('utf-8', 'replace')


def hub_splits(source, config=''):
    """Return {split: streaming dataset} of a Hugging Face data set or of a local folder in hub layout."""
    names = (name for _, _, found in os.walk(source) for name in found)
    if os.path.isdir(source) and not any(file_kind(name).endswith(HUB_FILES) for name in names):
        raise UserError(f'folder {source!r} holds no data files in hub layout ({", ".join(HUB_FILES)});'
                        f' for text files write a glob: --source={shlex.quote(os.path.join(source, "**", "*.txt"))}')
    import datasets
    try:
        return datasets.load_dataset(source, config or None, streaming=True)
    except (OSError, ValueError, RuntimeError) as e:
        reason = ' '.join(str(e).split())[:300]
        raise UserError(f'{source!r} is neither a file here nor a data set that can be opened ({type(e).__name__}:'
                        f' {reason}); check the path, the id, --hub_config and the network') from None


def hub_rows(dataset, columns, cure='name one with --text_field'):
    """Yield tuples of the named columns of one streaming split, in order, as they hold them."""
    if dataset.column_names and not set(columns) - set(dataset.column_names):
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
    return (text for text, in hub_rows(dataset, [field]))


# --- documents: (label, read), where read() yields the document's bytes in chunks, as often as it is called ---

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
            yield path, functools.partial(chunks_of, path)


def parquet_texts(path, text_field):
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


def in_memory(text, label, keep_empty=False):
    """Yield a text as a document; an empty one is none, unless empty ones are kept (rows of a joined text)."""
    if (data := text_bytes_of(text, label)) or keep_empty:
        yield label, lambda: iter((data,))


def hub_documents(dataset, label, text_field='text', keep_empty=False):
    for number, text in enumerate(hub_texts(dataset, text_field)):
        yield from in_memory(text, f'{label} row {number}', keep_empty)


def open_source(source, text_field='text', hub_config='', keep_empty=False):
    """Return {split: function that gives its documents anew}; files are one split, train."""
    source = os.path.expanduser(source)
    if files := local_files(source):
        return dict(train=functools.partial(file_documents, files, text_field, keep_empty))
    if re.search(r'[*?\[]|\.(txt|jsonl|json|bin|parquet|gz|zst|xz|bz2)$', source) or source.startswith(('/', '.')):
        require((os.path.isdir(source), f'no file matches {source!r}, expected a file, a quoted glob such as'
                 " 'texts/**/*.txt', or the id of a hub data set"))
    splits = hub_splits(source, hub_config)
    found = {SPLIT_NAMES[s]: s for s in splits if s in SPLIT_NAMES} or {'train': next(iter(splits))}
    return {ours: functools.partial(hub_documents, splits[name], f'{source} {name}', text_field, keep_empty)
            for ours, name in found.items()}
