"""Make data/NAME of documents with metadata: fixed-length rows, their masks, and paired rows for evaluation.

    python prepare_metadata.py --source='shards/*.jsonl.gz' --types=url,timestamp,title,html --name=c4meta
    python prepare_metadata.py --source='shards/*.jsonl.gz' --types=... --control=none --name=c4meta_none
    python prepare_metadata.py --annotate --source='pages/*.html.gz' --out=pages.jsonl.gz       only the record format

In: records in BigScience's format (corpus/metadata.py), or plain ones with text (or html) and url, title, ...; .jsonl,
.gz, .zst, or a hub id. Out: train, val, test (rows as drawn) and pairs_TYPE_{with,without,other}: pieces of validation
documents with that type, without it, and behind the prefix of another document; all score the same targets. pairs_all,
where there are several types, has all of them that a document has. Documents are split by the hash of their text: the
same under every control. An interrupted run goes on where it saved last; memory is constant.
"""
import functools
import gzip
import itertools
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace

from configurator import UserError, at_least, configure, names_in, one_of, require

# -----------------------------------------------------------------------------
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
# -----------------------------------------------------------------------------

config = configure(globals())

import numpy as np
from tqdm import tqdm

from corpus import metadata
from corpus.bins import finish, may_write
from corpus.documents import chunks_of, file_kind, hub_splits, local_files, records_of, require_hub
from corpus.examples import Maker, Place, Reader, Shard, examples_in_order
from corpus.rows import RowWriter
from corpus.tokens import tokenizer_meta
from corpus.writer import ResumeFile, fractions_fit, print_finished

SCRIPT = 'prepare_metadata.py'
LEADING = 1000                  # records that frequencies are counted on
ARMS = ('with', 'without', 'other')


def check_knobs(k):
    names = names_in(k.types)
    require((k.source != '', "source is empty; give files, --source='shards/*.jsonl.gz', or a hub id"),
            (k.annotate or k.name != '', 'name is empty; name the data set, --name=c4meta makes data/c4meta'),
            (not k.annotate or k.out.endswith('.jsonl.gz'), f'out = {k.out!r}, expected a path.jsonl.gz with'
             ' --annotate'),
            (k.annotate or names, f'types is empty, expected some of {", ".join(metadata.TYPES)}'),
            *(one_of('types', t, metadata.TYPES) for t in names),
            one_of('control', k.control, ('', 'none', 'samecontext')),
            at_least('max_bytes', k.max_bytes, 0), at_least('num_proc', k.num_proc, 0),
            at_least('passes', k.passes, 1), at_least('pair_documents', k.pair_documents, 0),
            at_least('block_size', k.block_size, 2),
            (0 <= k.metadata_probability <= 1, f'metadata_probability = {k.metadata_probability}, expected 0 to 1'),
            fractions_fit(k.val_fraction, k.test_fraction))


# --- reading ---

def open_shards(source, hub_config):
    """Return the Shards of the source."""
    if files := local_files(source):
        return [Shard(path, functools.partial(file_records, path)) for path in files]
    require_hub(source, "a file, a quoted glob such as 'shards/*.jsonl.gz' or a hub id")
    splits = hub_splits(source, hub_config)
    rows = splits['train'] if 'train' in splits else next(iter(splits.values()))
    return [Shard(f'{source} shard {i + 1}', functools.partial(hub_records, rows.shard(rows.n_shards, i), source))
            for i in range(rows.n_shards)]


def file_records(path, on_broken):
    """Yield (where, record) of a file: a page is one record."""
    if file_kind(path) in ('.html', '.htm'):
        yield path, dict(html=b''.join(chunks_of(path)).decode('utf-8', 'replace'))
        return
    for line, record in records_of(path, on_broken):
        yield f'{path}:{line}', record


def hub_records(rows, label, on_broken):
    """Yield (where, record) of one shard of a hub data set; none of its rows is broken."""
    for i, record in enumerate(rows):
        yield f'{label} row {i}', record


def write_records(shards, skip_broken, out):
    """Annotate every record and write the record format, .jsonl.gz, under a temporary name first; return how many."""
    n = 0
    reader = Reader(shards, Place(), skip_broken)
    with gzip.open(f'{out}.tmp', 'wt', encoding='utf-8', compresslevel=6) as f:
        for _, where, record in tqdm(reader, unit=' records', disable=None):
            try:
                text, items = metadata.read_record(record, where)
            except UserError as e:
                if not skip_broken:
                    raise
                tqdm.write(f'left out: {e}')
                continue
            listed = [item for t in metadata.TYPES for item in items.get(t, ())]
            f.write(json.dumps(dict(text=text, metadata=listed), ensure_ascii=False) + '\n')
            n += 1
    if n:
        os.replace(f'{out}.tmp', out)
    return n


# --- how likely each type is drawn ---

def given_weights(type_weights, types):
    """Return {type: weight} of the knob."""
    pairs = dict(part.partition(':')[::2] for part in names_in(type_weights))
    try:
        weights = {t: float(weight) for t, weight in pairs.items()}
    except ValueError:
        raise UserError(f'type_weights = {type_weights!r}, expected numbers as in url:1,html:2') from None
    require((set(weights) == set(names_in(types)) and min(weights.values()) > 0,
             f'type_weights = {type_weights!r}, expected a number above 0 for each of {types}'))
    return weights


def counted_weights(shards, names):
    """Return {type: 1 / frequency in the leading records}; records that cannot be read are left to the later pass."""
    def ignore(message):
        pass

    records = itertools.chain.from_iterable(shard.read(ignore) for shard in shards)
    n_records = 0
    counts = dict.fromkeys(names, 0)
    for where, record in itertools.islice(records, LEADING):
        try:
            _, items = metadata.read_record(record, where)
        except UserError:
            continue
        n_records += 1
        for t in names:
            if items.get(t):
                counts[t] += 1
    for t in names:
        if not counts[t]:
            print(f'{t} occurs in none of the leading {n_records:,} records')
    return {t: n_records / max(counts[t], 1) for t in names}


# --- the data set ---

@dataclass
class State:
    """How far the data set is, as resume.json has it; counts are of documents."""
    place: Place = Place()
    records: int = 0
    broken: int = 0                                     # records that could not be read; lines are counted by place
    train_bytes: int = 0
    present: dict = field(default_factory=dict)         # type: documents that have it
    drawn: dict = field(default_factory=dict)           # type: times that it was given
    paired: dict = field(default_factory=dict)          # type, or all: documents with paired rows
    prefixes: dict = field(default_factory=dict)        # type, or all: ids of the last prefix seen
    splits: dict = field(default_factory=dict)          # split: state of its RowWriter

    def __post_init__(self):
        self.place = Place(*self.place)                 # of JSON it comes as a list


class Splits:
    """The splits being written, and the counts that go on with them. max_bytes, pair_documents: as the knobs."""

    def __init__(self, folder, cutter, names, state, max_bytes, pair_documents):
        self.folder = folder
        self.cutter = cutter
        self.names = names
        self.state = state
        self.max_bytes = max_bytes
        self.pair_documents = pair_documents
        self.meta = tokenizer_meta(cutter.tok)
        self.paired = list(names)
        if len(names) > 1:
            self.paired.append('all')
        self.writers = {}
        for split in state.splits:
            self.open(split)

    def open(self, split):
        """Return the writer of a split, which goes on where the state says."""
        if split not in self.writers:
            self.writers[split] = RowWriter(self.folder, split, self.meta['dtype'], self.cutter.byte_lengths,
                                            self.state.splits.get(split))
        return self.writers[split]

    @property
    def train_is_full(self):
        return 0 < self.max_bytes <= self.state.train_bytes

    @property
    def is_full(self):
        """Say whether nothing more is wanted: train has max_bytes and every type its pairs."""
        return self.train_is_full and all(self.state.paired.get(t, 0) >= self.pair_documents for t in self.paired)

    def add(self, example):
        """Write the rows of an Example, and its pairs where it validates."""
        if example.split == 'train':
            if self.train_is_full:
                return
            self.state.train_bytes += example.n_bytes
        self.state.records += 1
        for counts, types in ((self.state.present, example.present), (self.state.drawn, example.drawn)):
            for t in types:
                counts[t] = counts.get(t, 0) + 1
        if len(example.ids):
            self.open(example.split).write(example.ids, example.masks)
        if example.items:
            self.add_pairs(example)

    def add_pairs(self, example):
        """Write paired rows of each type that the example has, and of all, while more are wanted."""
        for t in self.paired:
            has_it = t in example.items or t == 'all'
            if has_it and self.state.paired.get(t, 0) < self.pair_documents:
                self.add_pair(t, example, self.names if t == 'all' else [t])

    def add_pair(self, t, example, types):
        """Write the paired rows of an example; the first one of a type has no other prefix and only lends its own."""
        prefix = self.cutter.prefix(example.items, types)
        before = self.state.prefixes.get(t)
        other = None
        if len(prefix):
            self.state.prefixes[t] = prefix.tolist()
            if before is None:
                return
            other = np.array(before, prefix.dtype)
        made = self.cutter.pair(example.text, example.items, types, other)
        for arm, (ids, masks) in made.items():
            self.open(f'pairs_{t}_{arm}').write(ids, masks)
        self.state.paired[t] = self.state.paired.get(t, 0)
        if made:
            self.state.paired[t] += 1

    def save(self, resume):
        """Write how far everything is to a ResumeFile."""
        self.state.splits = {split: writer.state() for split, writer in self.writers.items()}
        resume.save(asdict(self.state))

    def abort(self):
        """Leave nothing behind."""
        for writer in self.writers.values():
            writer.abort()
        if os.path.isdir(self.folder) and set(os.listdir(self.folder)) <= {'resume.json'}:
            shutil.rmtree(self.folder)

    def check(self, wanted, types):
        """Raise UserError where a type occurs nowhere or a wanted split is empty; then nothing is left."""
        present = self.state.present
        never = [t for t in self.names if not present.get(t)]
        empty = [split for split in wanted if split not in self.writers]
        if never or empty:
            self.abort()
        require((not never, f'{", ".join(never)} of types = {types!r} occurs in none of {self.state.records:,} records'
                 f' (they have {", ".join(present) or "none of the types"}); leave it out, or --annotate'),
                (not empty, f'{" and ".join(empty)} would be empty, {self.state.records:,} documents were read,'
                 ' expected some in each; give more documents, or a larger --val_fraction and --test_fraction'))

    def pairs(self):
        """Return {type: {arm: split}} of the paired rows; all arms of a type score the same number of tokens."""
        pairs = {}
        for t in self.paired:
            if f'pairs_{t}_with' in self.writers:
                pairs[t] = {arm: f'pairs_{t}_{arm}' for arm in ARMS if f'pairs_{t}_{arm}' in self.writers}
        for arms in pairs.values():
            scored = {self.writers[split].scored['text'] for split in arms.values()}
            require((len(scored) == 1, f'the arms of {arms} score {scored} tokens, expected one number'))
        return pairs

    def counts(self):
        """Return {type: its documents, and how often it was drawn}."""
        return {t: dict(records=self.state.present[t], drawn=self.state.drawn.get(t, 0)) for t in self.names}


def write_examples(examples, splits, resume, skip_broken, bar):
    """Write (place, Example or message)s until nothing more is wanted; save when it is due, and before an error."""
    for place, example in examples:
        if not isinstance(example, str):
            splits.add(example)
            bar.update(example.n_bytes)
        elif skip_broken:
            tqdm.write(f'left out: {example}')
            splits.state.broken += 1
        else:
            if splits.writers:
                splits.save(resume)
            raise UserError(example)
        splits.state.place = place
        if resume.is_due:
            splits.save(resume)
        if splits.is_full:
            return


if __name__ == '__main__':
    knobs = SimpleNamespace(**config)
    check_knobs(knobs)
    names = names_in(types)
    shards = open_shards(source, hub_config)

    # With --annotate there are records to write, and no data set.
    if annotate:
        n = write_records(shards, skip_broken, out)
        require((n, f'{source!r} holds no record that can be read'))
        print(f'{out}: {n:,} records')
        sys.exit()

    folder = os.path.join(data_dir, name)
    recorded_argv = may_write(folder, SCRIPT, None, overwrite)
    if not overwrite and print_finished([folder], 'this data set is there already, hashes as recorded'):
        sys.exit()

    # Go on where an interrupted run of the same command was.
    weights = given_weights(type_weights, types) if type_weights else counted_weights(shards, names)
    without_effect = ('data_dir', 'overwrite', 'save_every', 'num_proc')
    decisive = sorted((knob, value) for knob, value in config.items() if knob not in without_effect)
    resume = ResumeFile(folder, [[shard.label for shard in shards], decisive], save_every)
    state = State(**(resume.read() or {}))
    if state.records:
        print(f'going on from {resume.path}: {state.records:,} documents done')

    # Records become examples in processes of their own, and are written here in order.
    cutter = Maker(knobs, names, weights).cutter
    splits = Splits(folder, cutter, names, state, max_bytes, pair_documents)
    reader = Reader(shards, state.place, skip_broken)
    examples = examples_in_order(reader, knobs, names, weights, num_proc or os.cpu_count() or 1)
    with tqdm(unit='B', unit_scale=True, desc=name, disable=None) as bar:
        write_examples(examples, splits, resume, skip_broken, bar)

    # The data set is made now, or cannot be made of this source.
    try:
        wanted = [split for split, share in (('train', 1), ('val', val_fraction), ('test', test_fraction)) if share]
        splits.check(wanted, types)
        about_rows = dict(length=block_size, types=names, control=control, metadata_probability=metadata_probability,
                          passes=passes, seed=seed, weights=weights, counts=splits.counts(), records=state.records,
                          broken=state.place.n_broken + state.broken)
        finish(folder, SCRIPT, recorded_argv, splits.writers, dict(source=source, config=hub_config), **splits.meta,
               rows=about_rows, pairs=splits.pairs())
    finally:
        resume.remove()
    for t, count in splits.counts().items():
        print(f'{t}: in {count["records"]:,} of {state.records:,} documents, drawn {count["drawn"]:,} times')
