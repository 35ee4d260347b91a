"""Make data/NAME of documents with metadata: fixed-length rows, their masks, and paired rows for evaluation.

    python prepare_metadata.py --source='shards/*.jsonl.gz' --types=url,timestamp,title,html --name=c4meta
    python prepare_metadata.py --source='shards/*.jsonl.gz' --types=... --control=none --name=c4meta_none
    python prepare_metadata.py --annotate --source='pages/*.html.gz' --out=pages.jsonl.gz       only the record format

In: records in BigScience's format (metadata.py), or plain ones with text (or html) and url, title, ...; .jsonl, .gz,
.zst, or a hub id. Out: train, val, test (rows as drawn) and pairs_TYPE_{with,without,other}: pieces of validation
documents with that type, without it, and behind the prefix of another document; all score the same targets. pairs_all,
where there are several types, has all of them that a document has. Documents are split by the hash of their text: the
same under every control. An interrupted run goes on where it saved last; memory is constant.
"""
import collections
import functools
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from tqdm import tqdm

from configurator import UserError, at_least, configure, one_of, require, run
from corpus import metadata
from corpus.bins import finish, intact, key_of, may_write, print_splits, write_json
from corpus.cutter import Cutter
from corpus.documents import chunks_of, file_kind, hub_splits, local_files, records_of
from corpus.rows import RowWriter
from corpus.tokens import load_tokenizer, tokenizer_meta

name = ''                       # data set to make, data/NAME
source = ''                     # file, quoted glob, hub id, or local folder in hub layout
types = ''                      # comma-separated, in the order of the prefix: url, timestamp, title, html, ...
control = ''                    # 'none': rows without metadata; 'samecontext': as with, the prefix hidden padding
metadata_probability = 0.5      # share of the examples that are given metadata
type_weights = ''               # 'url:1,html:2': how likely each is drawn; '' = 1 / frequency in the leading records
passes = 1                      # times that each training document is drawn anew
block_size = 1024               # tokens in a row
tokenizer = 'gpt2'              # gpt2, byte, NAME of train_tokenizer.py, or PATH of a tokenizer.json (or its folder)
end_of_text = '<|endoftext|>'   # its name in a tokenizer.json
max_bytes = 0                   # leading bytes of training text, whole documents; 0 = all
val_fraction = 0.01             # of the documents
test_fraction = 0.01
pair_documents = 1000           # validation documents that each type's paired rows are made of, at most
seed = 42
skip_broken = False             # leave out broken records, count them and go on
annotate = False                # write records with metadata to out, make no data set
data_dir = 'data'
out = ''                        # with --annotate: the .jsonl.gz to write
hub_config = ''                 # configuration of a hub data set, where it has several
num_proc = 0                    # processes that tokenise; 0 = one per core
save_every = 60.0               # seconds between saved states
overwrite = False               # replace a finished data set of this name that another command made

SCRIPT = 'prepare_metadata.py'
LEADING = 1000                  # records that frequencies are counted on
BATCH = 1 << 19                 # characters that a process is handed at a time
DRAWN = ('train', 'val', 'test')
ARMS = ('with', 'without', 'other')


# --- reading: (label, record or page) from a place on ---

def open_shards():
    """Return [(label, function of on_broken that yields (where, record))] of the source."""
    if files := local_files(source):
        return [(path, functools.partial(file_records, path)) for path in files]
    require((not any(c in source for c in '*?[') and not source.startswith(('/', '.')) or os.path.isdir(source),
             f"no file matches {source!r}, expected a file, a quoted glob such as 'shards/*.jsonl.gz' or a hub id"))
    splits = hub_splits(source, hub_config)
    rows = splits['train'] if 'train' in splits else next(iter(splits.values()))
    return [(f'{source} shard {i + 1}', functools.partial(hub_records, rows.shard(rows.n_shards, i), source))
            for i in range(rows.n_shards)]


def file_records(path, on_broken):
    if file_kind(path) in ('.html', '.htm'):
        yield path, dict(html=b''.join(chunks_of(path)).decode('utf-8', 'replace'))
    else:
        yield from ((f'{path}:{line}', record) for line, record in records_of(path, on_broken))


def hub_records(dataset, label, on_broken):
    yield from ((f'{label} row {i}', record) for i, record in enumerate(dataset))


def records(shards, state):
    """Yield (place after it, where, record) from the saved place on; place: (shard, record, broken records so far)."""
    broken = [state['place'][2]]

    def on_broken(message):
        if not skip_broken:
            raise UserError(f'{message}; mend it, or leave such lines out with --skip_broken=True')
        broken[0] += 1
        tqdm.write(f'left out: {message}')

    for i in range(state['place'][0], len(shards)):
        done = state['place'][1] if i == state['place'][0] else 0
        at_start = broken[0]
        for n, (where, record) in enumerate(shards[i][1](on_broken), 1):
            if n == done:
                broken[0] = at_start                                    # those before the place are counted in it
            if n > done:
                yield (i, n, broken[0]), where, record


def batches(found):
    """Group records in lists of about BATCH characters."""
    batch, size = [], 0
    for place, where, record in found:
        batch.append((place, where, record))
        size += 64 + sum(len(v) * (1 if isinstance(v, str) else 80) for v in record.values() if hasattr(v, '__len__'))
        if size > BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --- a document, in a process of its own ---

class Worker:
    """Turn records into rows; o: the knobs and the weights of the types, as attributes."""

    def __init__(self, config, weights, n_threads=1):
        for key, value in config.items():
            setattr(self, key, value)
        self.weights, self.names = weights, listed(config['types'])
        tok = load_tokenizer(self.tokenizer, self.end_of_text, n_threads, self.data_dir)
        self.cutter = Cutter(tok, self.block_size, self.control)

    def document(self, where, record):
        """Return what a record becomes: split, the types it has and was given, rows, and for val text and items."""
        text, items = metadata.read_record(record, where)
        present, digest = [t for t in self.names if items.get(t)], hashlib.blake2b(text.encode(), digest_size=8)
        place = key_of(self.seed, 'split', digest.hexdigest()) / 2 ** 64
        split = 'test' if place < self.test_fraction else 'val' if place < self.test_fraction + self.val_fraction \
            else 'train'
        drawn, rows = [], []
        for p in range(self.passes if split == 'train' else 1):
            rng = np.random.default_rng(key_of(self.seed, p, digest.hexdigest()))
            given = rng.random() < self.metadata_probability and self.control != 'none' and present
            drawn.append(metadata.draw_types(present, self.weights, rng) if given else [])
            rows.append(self.cutter.rows(text, items, drawn[-1]))
        ids, masks = (np.concatenate(parts) for parts in zip(*rows))
        kept = (text, {t: items[t] for t in present}) if split == 'val' else None
        return dict(split=split, present=present, drawn=sum(drawn, []), ids=ids, masks=masks, of_val=kept, where=where,
                    n_bytes=len(text.encode()))

    def batch(self, records):
        """Return [(place, document or the message of a broken record)]."""
        made = []
        for place, where, record in records:
            try:
                made.append((place, self.document(where, record)))
            except UserError as e:
                made.append((place, str(e) if where in str(e) else f'{where}: {e}'))
        return made


def start_worker(*args):
    global worker
    worker = Worker(*args)


def work(records):
    return worker.batch(records)


def in_order(found, config, weights, n):
    """Yield (place, document) of all batches in order, made by n processes; few batches are under way at a time."""
    if n == 1:
        start_worker(config, weights)
        for batch in batches(found):
            yield from work(batch)
        return
    with ProcessPoolExecutor(n, multiprocessing.get_context('spawn'), start_worker, (config, weights)) as pool:
        waiting, source = collections.deque(), batches(found)
        while True:
            waiting.extend(pool.submit(work, batch) for batch in itertools.islice(source, 2 * n - len(waiting)))
            if not waiting:
                return
            yield from waiting.popleft().result()


# --- the data set ---

class Splits:
    """The splits being written; state is what a later process needs to go on."""

    def __init__(self, folder, config, weights, state):
        self.folder, self.state = folder, state
        self.cutter = Worker(config, weights).cutter
        self.meta, self.names, self.writers = tokenizer_meta(self.cutter.tok), listed(types), {}
        self.paired = self.names + ['all'] * (len(self.names) > 1)
        for split in state['splits']:
            self.open(split)

    def open(self, split):
        if split not in self.writers:
            self.writers[split] = RowWriter(self.folder, split, self.meta['dtype'], self.cutter.byte_lengths,
                                            self.state['splits'].get(split))
        return self.writers[split]

    def add(self, document):
        """Write the rows of a document, and its pairs where it validates."""
        split, state = document['split'], self.state
        if split == 'train':
            if max_bytes and state['train_bytes'] >= max_bytes:
                return
            state['train_bytes'] += document['n_bytes']
        state['records'] += 1
        for key in ('present', 'drawn'):
            for t in document[key]:
                state[key][t] = state[key].get(t, 0) + 1
        if len(document['ids']):
            self.open(split).write(document['ids'], document['masks'])
        if document['of_val']:
            text, items = document['of_val']
            for t in [t for t in self.paired if t in items or t == 'all' and items]:
                if state['paired'].get(t, 0) < pair_documents:
                    self.add_pair(t, text, items, self.names if t == 'all' else [t])

    def add_pair(self, t, text, items, chosen):
        """Write the paired rows of a document; the first one of a type has no other prefix and only lends its own."""
        prefix, before = self.cutter.prefix(items, chosen), self.state['prefixes'].get(t)
        if len(prefix):
            self.state['prefixes'][t] = prefix.tolist()
            if before is None:
                return
        other = np.array(before, prefix.dtype) if len(prefix) else None
        made = self.cutter.pair(text, items, chosen, other)
        for arm, (ids, masks) in made.items():
            self.open(f'pairs_{t}_{arm}').write(ids, masks)
        self.state['paired'][t] = self.state['paired'].get(t, 0) + bool(made)

    @property
    def full(self):
        """Say whether nothing more is wanted: train has max_bytes and every type its pairs."""
        return bool(max_bytes) and self.state['train_bytes'] >= max_bytes and all(
            self.state['paired'].get(t, 0) >= pair_documents for t in self.paired)

    def save(self, path):
        self.state['splits'] = {split: writer.state() for split, writer in self.writers.items()}
        write_json(path, self.state)

    def abort(self):
        """Leave nothing behind."""
        for writer in self.writers.values():
            writer.abort()
        if os.path.isdir(self.folder) and set(os.listdir(self.folder)) <= {'resume.json'}:
            shutil.rmtree(self.folder)

    def finish(self, recorded_argv, weights):
        """Check that nothing asked for is missing, give the files their names and write meta.json."""
        state = self.state
        never = [t for t in self.names if not state['present'].get(t)]
        empty = [s for s, share in zip(DRAWN, (1, val_fraction, test_fraction)) if share and s not in self.writers]
        if never or empty:
            self.abort()
        require((not never, f'{", ".join(never)} of types = {types!r} occurs in none of {state["records"]:,} records'
                 f' (they have {", ".join(state["present"]) or "none of the types"}); leave it out, or --annotate'),
                (not empty, f'{" and ".join(empty)} would be empty, {state["records"]:,} documents were read, expected'
                 ' some in each; give more documents, or a larger --val_fraction and --test_fraction'))
        pairs = {t: {arm: f'pairs_{t}_{arm}' for arm in ARMS if f'pairs_{t}_{arm}' in self.writers}
                 for t in self.paired if f'pairs_{t}_with' in self.writers}
        for arms in pairs.values():
            scored = {self.writers[split].scored['text'] for split in arms.values()}
            require((len(scored) == 1, f'the arms of {arms} score {scored} tokens, expected one number'))
        counts = {t: dict(records=state['present'][t], drawn=state['drawn'].get(t, 0)) for t in self.names}
        rows = dict(length=block_size, types=self.names, control=control, metadata_probability=metadata_probability,
                    passes=passes, seed=seed, weights=weights, counts=counts, records=state['records'],
                    broken=state['place'][2] + state['broken'])
        finish(self.folder, SCRIPT, recorded_argv, self.writers, dict(source=source, config=hub_config), **self.meta,
               rows=rows, pairs=pairs)
        for t, c in counts.items():
            print(f'{t}: in {c["records"]:,} of {state["records"]:,} documents, drawn {c["drawn"]:,} times')


def listed(text):
    return [part.strip() for part in text.split(',') if part.strip()]


def weights_of(shards):
    """Return {type: weight}: those of type_weights, else 1 / frequency in the leading records."""
    names = listed(types)
    if type_weights:
        given = dict(part.partition(':')[::2] for part in listed(type_weights))
        try:
            weights = {t: float(w) for t, w in given.items()}
        except ValueError:
            raise UserError(f'type_weights = {type_weights!r}, expected numbers as in url:1,html:2') from None
        require((set(weights) == set(names) and min(weights.values()) > 0,
                 f'type_weights = {type_weights!r}, expected a number above 0 for each of {types}'))
        return weights
    leading, found = itertools.islice((r for _, records in shards for r in records(lambda message: None)), LEADING), {}
    n = 0
    for where, record in leading:
        try:
            present = metadata.read_record(record, where)[1]
        except UserError:
            continue                                                    # the pass that follows says so
        n += 1
        for t in filter(present.get, names):
            found[t] = found.get(t, 0) + 1
    for t in names:
        if t not in found:
            print(f'{t} occurs in none of the leading {n:,} records')
    return {t: n / found.get(t, 1) for t in names}


def write_records(shards):
    """Annotate every record of the source and write the record format, .jsonl.gz, under a temporary name first."""
    n, state = 0, dict(place=[0, 0, 0])
    with gzip.open(f'{out}.tmp', 'wt', encoding='utf-8', compresslevel=6) as f:
        for _, where, record in tqdm(records(shards, state), unit=' records', disable=None):
            try:
                text, items = metadata.read_record(record, where)
            except UserError as e:
                if not skip_broken:
                    raise
                tqdm.write(f'left out: {e}')
                continue
            found = [item for t in metadata.TYPES for item in items.get(t, ())]
            f.write(json.dumps(dict(text=text, metadata=found), ensure_ascii=False) + '\n')
            n += 1
    require((n, f'{source!r} holds no record that can be read'))
    os.replace(f'{out}.tmp', out)
    print(f'{out}: {n:,} records')


def read_state(path, identity):
    """Return the saved state of an interrupted run of the same command, or a fresh one."""
    try:
        with open(path, encoding='utf-8') as f:
            old = json.load(f)
        if old['of'] == identity:
            return old
    except (OSError, ValueError, KeyError):
        pass                                                            # none, or not a whole one: from the start
    return dict(of=identity, place=[0, 0, 0], records=0, broken=0, train_bytes=0, present={}, drawn={}, paired={},
                prefixes={}, splits={})


def main(argv=None):
    config = configure(globals(), argv)
    shares = min(val_fraction, test_fraction)
    require((source != '', "source is empty; give files, --source='shards/*.jsonl.gz', or a hub id"),
            (annotate or name != '', 'name is empty; name the data set, --name=c4meta makes data/c4meta'),
            (not annotate or out.endswith('.jsonl.gz'), f'out = {out!r}, expected a path.jsonl.gz with --annotate'),
            (annotate or listed(types), f'types is empty, expected some of {", ".join(metadata.TYPES)}'),
            *(one_of('types', t, metadata.TYPES) for t in listed(types)),
            one_of('control', control, ('', 'none', 'samecontext')),
            at_least('max_bytes', max_bytes, 0), at_least('num_proc', num_proc, 0), at_least('passes', passes, 1),
            at_least('pair_documents', pair_documents, 0), at_least('block_size', block_size, 2),
            (0 <= metadata_probability <= 1, f'metadata_probability = {metadata_probability}, expected 0 to 1'),
            (shares >= 0 and val_fraction + test_fraction < 1,
             f'val_fraction = {val_fraction}, test_fraction = {test_fraction}, expected both >= 0 and a sum below 1'))
    shards = open_shards()
    if annotate:
        return write_records(shards)
    folder = os.path.join(data_dir, name)
    recorded_argv = may_write(folder, SCRIPT, argv, overwrite)
    if not overwrite and (meta := intact(folder)):
        print('this data set is there already, hashes as recorded')
        return print_splits(folder, meta['splits'])
    weights, path = weights_of(shards), os.path.join(folder, 'resume.json')
    skipped = ('data_dir', 'overwrite', 'save_every', 'num_proc')
    identity = json.loads(json.dumps([[label for label, _ in shards],
                                      sorted((k, v) for k, v in config.items() if k not in skipped)]))
    state = read_state(path, identity)
    if state['records']:
        print(f'going on from {path}: {state["records"]:,} documents done')
    splits, saved = Splits(folder, config, weights, state), time.time()
    bar = tqdm(unit='B', unit_scale=True, desc=name, disable=None)
    for place, document in in_order(records(shards, state), config, weights, num_proc or os.cpu_count() or 1):
        if isinstance(document, str):
            if not skip_broken:
                splits.save(path) if splits.writers else None
                raise UserError(document)
            tqdm.write(f'left out: {document}')
            state['broken'] += 1
        else:
            splits.add(document)
            bar.update(document['n_bytes'])
        state['place'] = place
        if time.time() - saved > save_every:
            splits.save(path)
            saved = time.time()
        if splits.full:
            break
    bar.close()
    try:
        splits.finish(recorded_argv, weights)
    finally:                                                            # made, or not to be made of this source
        if os.path.exists(path):
            os.remove(path)


if __name__ == '__main__':
    run(main)
