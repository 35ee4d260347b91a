"""Make data/wiki40b_LANGUAGE from Wiki-40B: article texts as raw UTF-8 one after the other, all splits.

    python prepare_wiki40b.py --tfds_dir=DIR    a folder that TFDS prepared earlier, as tfrecord or array_record
    python prepare_wiki40b.py                   the same in ~/tensorflow_datasets, or let TFDS prepare it (extras)
    python prepare_wiki40b.py --source=hub      the same articles from the Hugging Face hub, streamed
    python prepare_wiki40b.py --source=hub --name=wiki40b_16mb --max_bytes=16384000 --max_eval_bytes=1000000

Order: shard after shard, as TFDS slices the set (tfds.load interleaves shards unless told not to; the hub may order
articles differently: compare the sha256). An interrupted run goes on after the last whole shard. English: 9.3 GB.
"""
import ast
import contextlib
import functools
import glob
import importlib.util
import json
import os
import re
import struct

from tqdm import tqdm

from configurator import UserError, at_least, configure, one_of, require, run
from corpus.bins import BinWriter, finish, intact, may_write, print_splits, sha256_file, write_json
from corpus.documents import hub_splits, hub_texts, text_bytes_of

source = 'tfds'             # tfds: a prepared folder, or download with requirements-tfds.txt; hub: streamed
language = 'en'             # of the 41 that Wiki-40B has
tfds_dir = ''               # folder that contains wiki40b/; '' is $TFDS_DATA_DIR or ~/tensorflow_datasets
hub = 'google/wiki40b'      # hub id, or a local folder in hub layout
max_bytes = 0               # leading bytes of train to keep; 0: all
max_eval_bytes = 0          # leading bytes of val and of test; 0: all, the same for every size of train
check_articles = True       # stop where the number of articles is not what the set's own info, or the paper, says
data_dir = 'data'
name = ''                   # '' is wiki40b_LANGUAGE
overwrite = False           # replace a finished data set of this name that another command made

SPLITS = dict(train='train', validation='val', test='test')
PUBLISHED = dict(en=dict(train=2_926_536, validation=163_597, test=162_274))    # Guo et al. 2020, Wiki-40B


# --- TFRecord and tf.train.Example, without TensorFlow ---

def _crc_entry(byte):
    for _ in range(8):
        byte = byte >> 1 ^ 0x82F63B78 * (byte & 1)      # Castagnoli's polynomial, bits reversed
    return byte


CRC = [_crc_entry(byte) for byte in range(256)]


def masked_crc32c(data):
    """Return TFRecord's masked CRC-32C: byte by byte in Python, so for the 8 bytes of a length only."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def tfrecords(path):
    """Yield the records of a TFRecord file: u64 length, its masked CRC, data, the data's CRC; all little-endian.

    Checked: the CRC of each length and that the file ends with a record. Not checked: the CRC of the data, which costs
    seconds per megabyte in Python; the article counts and the SHA-256 in meta.json stand behind the text.
    """
    with open(path, 'rb') as f:
        while head := f.read(12):
            length, crc = struct.unpack('<QI', head) if len(head) == 12 else (0, -1)
            if crc != masked_crc32c(head[:8]):
                raise UserError(f'{path} is damaged or truncated: no record length at byte {f.tell() - len(head):,};'
                                ' fetch this shard again')
            record = f.read(length)
            if len(record) < length or len(f.read(4)) < 4:
                raise UserError(f'{path} is truncated in its last record; fetch this shard again')
            yield record


def varint(data, i):
    """Return (value, next position) of a protobuf varint."""
    value = shift = 0
    while data[i] > 127:
        value |= (data[i] & 127) << shift
        i, shift = i + 1, shift + 7
    return value | data[i] << shift, i + 1


def fields(data, i, stop):
    """Yield (field number, start, stop) of the length-delimited fields of a protobuf message at data[i:stop]."""
    while i < stop:
        key, i = varint(data, i)
        if key & 7 == 2:
            length, i = varint(data, i)
            yield key >> 3, i, i + length
            i += length
        else:
            i = varint(data, i)[1] if key & 7 == 0 else i + {1: 8, 5: 4}[key & 7]


def example_bytes(record, name):
    """Return the first bytes value of feature `name` of a serialised tf.train.Example.

    Example {features = 1}, Features {feature = 1: map of key = 1, value = 2}, Feature {bytes_list = 1},
    BytesList {value = 1}.
    """
    with contextlib.suppress(IndexError, KeyError):                     # a malformed record leads past its own end
        for _, *features in fields(record, 0, len(record)):
            for _, *entry in fields(record, *features):
                at = {number: place for number, *place in fields(record, *entry)}
                if record[slice(*at[1])] == name:
                    _, *values = next(fields(record, *at[2]))
                    _, start, stop = next(fields(record, *values))
                    return record[start:stop]
    raise UserError(f'a record has no feature {name.decode()!r}: not Wiki-40B, or a damaged shard; fetch it again')


def array_records(path):
    """Yield the records of an array_record file."""
    from array_record.python.array_record_module import ArrayRecordReader
    try:
        reader = ArrayRecordReader(path)
        for start in range(0, n := reader.num_records(), 256):
            yield from reader.read(start, min(start + 256, n))
    except (RuntimeError, ValueError, IndexError) as e:
        raise UserError(f'{path} is damaged or truncated ({e}); fetch this shard again') from None


# --- sources: {split: [(articles of a shard, their number or None)]}, {split: number or None}, identity ---

def tfds_folder():
    """Return the folder of the newest prepared version; prepare one where TensorFlow and Beam are installed."""
    root = os.path.expanduser(tfds_dir or os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets'))
    for attempt in range(2):
        if found := glob.glob(os.path.join(root, 'wiki40b', language, '*', 'dataset_info.json')):
            return os.path.dirname(max(found, key=lambda p: [int(n) for n in re.findall(r'\d+', p.split(os.sep)[-2])]))
        if attempt or any(importlib.util.find_spec(m) is None for m in ('tensorflow', 'apache_beam')):
            raise UserError(f'no prepared wiki40b/{language} in {root}; name the folder that contains wiki40b/ with'
                            ' --tfds_dir, or take --source=hub, or let TFDS prepare it here, which needs TensorFlow and'
                            ' Beam: pip install -r requirements-tfds.txt')
        import tensorflow_datasets as tfds

        # hours, and access to gs://
        tfds.builder(f'wiki40b/{language}', data_dir=root).download_and_prepare()


def tfds_shards(folder):
    """Return shards, article counts and identity of a prepared TFDS folder."""
    with open(os.path.join(folder, 'dataset_info.json'), encoding='utf-8') as f:
        info = json.load(f)
    form, shards, expected = info.get('fileFormat', 'tfrecord'), {}, {}         # older TFDS knew one form only
    if form not in ('tfrecord', 'array_record'):
        raise UserError(f'{folder} is in form {form!r}, expected tfrecord or array_record; or take --source=hub')
    read = tfrecords if form == 'tfrecord' else array_records
    for split in SPLITS:
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), f'*-{split}.{form}-*-of-*')))
        lengths = [int(n) for s in info['splits'] if s['name'] == split for n in s.get('shardLengths', [])]
        n_shards = len(lengths) or (int(paths[0].rpartition('-')[2]) if paths else 1)
        if len(paths) != n_shards:
            raise UserError(f'{folder} holds {len(paths)} shards of {split}, expected {n_shards}; copy it again')
        articles = [functools.partial(tfds_articles, read, path) for path in paths]
        shards[split] = list(zip(articles, lengths or [None] * n_shards))
        expected[split] = sum(lengths) or None
    return shards, expected, dict(source='tfds', config=f'wiki40b/{language}', version=info.get('version', ''),
                                  form=form, sha256=sha256_file(os.path.join(folder, 'dataset_info.json')))


def tfds_articles(read, path):
    for record in read(path):
        yield example_bytes(record, b'text')


def hub_shards():
    """Return shards, article counts and identity of a hub data set."""
    splits = hub_splits(hub, language)
    missing = ', '.join(set(SPLITS) - set(splits))
    require((not missing, f'{hub!r} lacks {missing}, it has {", ".join(splits)}; expected those of google/wiki40b'))
    shards, expected = {}, {}
    for split in SPLITS:
        info = (splits[split].info.splits or {}).get(split)
        expected[split] = info.num_examples if info else None
        articles = functools.partial(hub_articles, splits[split])
        shards[split] = [(functools.partial(articles, i), None) for i in range(splits[split].n_shards)]
    return shards, expected, dict(source=hub, config=language)


def hub_articles(dataset, shard):
    """Yield the articles of one shard as bytes."""
    for text in hub_texts(dataset.shard(dataset.n_shards, shard)):
        yield undo_repr(text) if isinstance(text, str) else text_bytes_of(text, hub)


def undo_repr(text):
    """Return a text as bytes; one that arrives as "b'...'", the repr of bytes, becomes these bytes again."""
    if text[:2] in ("b'", 'b"') and text[-1] == text[1]:
        with contextlib.suppress(SyntaxError, ValueError):              # prose that only looks like it stays as it is
            return ast.literal_eval(text)
    return text_bytes_of(text, hub)


# --- writing ---

def check_count(what, got, expected):
    """Stop, or with --no-check_articles say so, where got articles are not the expected number (None: unknown)."""
    if expected is not None and got != expected:
        message = f'{what} has {got:,} articles, expected {expected:,}'
        if check_articles:
            raise UserError(f'{message}; fetch it again, or accept it with --no-check_articles')
        print(message)


def prepare_split(folder, split, shards, expected, state, save):
    """Append the shards not done yet, save() state {shards, bytes, articles} after each, and return the BinWriter."""
    limit = max_bytes if split == 'train' else max_eval_bytes
    writer = BinWriter(folder, SPLITS[split], resume_bytes=state['bytes'])
    writer.text_bytes, writer.documents = state['bytes'], state['articles']
    full = bool(limit) and writer.n_bytes >= limit
    bar = tqdm(desc=split, total=None if limit else expected, initial=writer.documents, unit=' articles', disable=None)
    try:
        for i, (articles, n_articles) in enumerate(shards):
            if full or i < state['shards']:
                continue
            before = writer.documents
            for article in articles():
                writer.write(article[:limit - writer.n_bytes] if limit else article)
                bar.update()
                if full := bool(limit) and writer.n_bytes >= limit:
                    break
            if not full:
                check_count(f'shard {i + 1} of {len(shards)} of {split}', writer.documents - before, n_articles)
            writer.flush()
            state.update(shards=i + 1, bytes=writer.n_bytes, articles=writer.documents)
            save()
    except (OSError, ValueError) as e:                                  # UserError is one
        raise UserError(f'{e}; {state["shards"]} of {len(shards)} shards of {split} are done and kept,'
                        ' the same command goes on from there') from None
    finally:
        bar.close()
        writer.file.flush()
    published = PUBLISHED.get(language, {}).get(split)
    if not full:
        check_count(f'{split} as a whole', writer.documents, expected or published)
    cut = ', cut by the byte limit' if full else ', as the set itself says' if expected else ''
    print(f'{split}: {writer.documents:,} articles' + (
        ', the published number' if writer.documents == published else f'{cut}; not the published full split, which has'
        f' {published:,}' if published else f'{cut}; no published number to compare with'))
    return writer


def size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def main(argv=None):
    configure(globals(), argv)
    require(one_of('source', source, ('tfds', 'hub')), at_least('max_bytes', max_bytes, 0),
            at_least('max_eval_bytes', max_eval_bytes, 0),
            (language != '', 'language is empty, expected a Wiki-40B language such as --language=en'))
    folder = os.path.join(data_dir, name or f'wiki40b_{language}')
    recorded_argv = may_write(folder, 'prepare_wiki40b.py', argv, overwrite)
    if not overwrite and (meta := intact(folder)):
        print(f'{folder} is there already, hashes as recorded')
        return print_splits(folder, meta['splits'])
    shards, expected, identity = tfds_shards(tfds_folder()) if source == 'tfds' else hub_shards()

    # resume.json holds how far each .tmp is good; another source or limit starts afresh
    resume, fresh = os.path.join(folder, 'resume.json'), dict(
        of=[identity, max_bytes, max_eval_bytes, {split: len(s) for split, s in shards.items()}],
        splits={split: dict(shards=0, bytes=0, articles=0) for split in SPLITS})
    state = fresh
    if os.path.exists(resume):
        with open(resume, encoding='utf-8') as f:
            old = json.load(f)
        good = all(done['bytes'] <= size_of(os.path.join(folder, f'{SPLITS[s]}.bin.tmp'))
                   for s, done in old['splits'].items())
        state = old if good and old['of'] == fresh['of'] else fresh
    save = functools.partial(write_json, resume, state)
    writers = {ours: prepare_split(folder, split, shards[split], expected[split], state['splits'][split], save)
               for split, ours in SPLITS.items()}
    require((writers['train'].n_bytes > 0, f'{source} holds no text in train; check the folder or --hub'))
    finish(folder, 'prepare_wiki40b.py', recorded_argv, writers, identity)
    if os.path.exists(resume):
        os.remove(resume)


if __name__ == '__main__':
    run(main)
