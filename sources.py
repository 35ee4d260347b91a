"""Documents of a source: local files of several kinds, or a data set of the hub, read anew as often as asked.

A document is (label, read): read() yields its bytes in chunks. Files: anything is text, taken as it is, one document;
.jsonl, .parquet: a document a row, column text_field; each also as .gz, .bz2, .xz, .zst.
"""
import functools
import os
import re

from bins import chunks_of, file_kind, hub_splits, hub_texts, local_files, records_of, text_bytes_of
from configurator import UserError, require

SPLIT_NAMES = dict(train='train', val='val', valid='val', validation='val', dev='val', test='test')


def open_source(source, hub_config='', text_field='text', separator=None):
    """Return {split: function that gives its documents anew}; files are one split, train.

    separator (bytes): the rows are parts of one text, joined by it, not documents.
    """
    source, keep_empty = os.path.expanduser(source), separator is not None
    if files := local_files(source):
        found = dict(train=functools.partial(file_documents, files, text_field, keep_empty))
    else:
        if re.search(r'[*?\[]|\.(txt|jsonl|json|bin|parquet|gz|zst|xz|bz2)$', source) or source.startswith(('/', '.')):
            require((os.path.isdir(source), f'no file matches {source!r}, expected a file, a quoted glob such as'
                     " 'texts/**/*.txt', or the id of a hub data set"))
        splits = hub_splits(source, hub_config)
        names = {SPLIT_NAMES[s]: s for s in splits if s in SPLIT_NAMES} or {'train': next(iter(splits))}
        found = {ours: functools.partial(hub_documents, splits[name], f'{source} {name}', text_field, keep_empty)
                 for ours, name in names.items()}
    return {split: functools.partial(joined, make, separator) for split, make in found.items()} if keep_empty else found


def file_documents(paths, text_field, keep_empty):
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


def in_memory(text, label, keep_empty):
    """Yield a text as a document; an empty one is none, an empty row of a joined text is."""
    if (data := text_bytes_of(text, label)) or keep_empty:
        yield label, lambda: iter((data,))


def hub_documents(dataset, label, text_field, keep_empty):
    for number, text in enumerate(hub_texts(dataset, text_field)):
        yield from in_memory(text, f'{label} row {number}', keep_empty)


def joined(documents, separator):
    """Yield the documents of a source as one, with the separator between them."""
    def read():
        for i, (_, parts) in enumerate(documents()):
            yield separator if i else b''
            yield from parts()
    if next(filter(None, read()), b''):
        yield 'the joined rows', read
