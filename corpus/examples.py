"""Records with metadata to examples, rows of fixed length: read from a place on, made by processes, kept in order.

A record's split and what metadata it is given depend on its text and the seed alone, so any number of processes, and
an interrupted run that goes on, make the same rows.
"""
import collections
import hashlib
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import UserError
from corpus import metadata
from corpus.bins import key_of
from corpus.cutter import Cutter
from corpus.tokens import load_tokenizer
from corpus.writer import split_at

BATCH = 1 << 19                 # characters that a process is handed at a time


class Place(NamedTuple):
    """How far shards were read."""
    shard: int = 0              # whole shards
    record: int = 0             # records of the next one
    n_broken: int = 0           # broken lines so far, which are no records


@dataclass
class Shard:
    """Records that are read in one go."""
    label: str
    read: object                # function of on_broken(message) that yields (where, record)


@dataclass
class Example:
    """What a record becomes."""
    split: str
    present: list               # the types that it has, of those asked for
    drawn: list                 # the types that it was given, of all passes
    ids: np.ndarray             # (n, T) rows
    masks: np.ndarray           # (n, T), see rows.py
    n_bytes: int                # of its text
    text: str = ''              # its text and metadata {type: [items]}, where it validates
    items: dict = field(default_factory=dict)


class Reader:
    """Iterate over the records of shards from a place on, as (place after it, where, record)."""

    def __init__(self, shards, place, skip_broken):
        self.shards = shards
        self.place = place
        self.skip_broken = skip_broken
        self.n_broken = place.n_broken

    def on_broken(self, message):
        """Count a line that is no record, or stop."""
        if not self.skip_broken:
            raise UserError(f'{message}; mend it, or leave such lines out with --skip_broken=True')
        self.n_broken += 1
        tqdm.write(f'left out: {message}')

    def __iter__(self):
        for i in range(self.place.shard, len(self.shards)):
            done = self.place.record if i == self.place.shard else 0
            broken_at_start = self.n_broken
            for n, (where, record) in enumerate(self.shards[i].read(self.on_broken), 1):
                if n == done:
                    self.n_broken = broken_at_start     # the place counts those before it already
                if n > done:
                    yield Place(i, n, self.n_broken), where, record


def batches_of(records):
    """Group (place, where, record)s in lists of about BATCH characters."""
    batch = []
    size = 0
    for place, where, record in records:
        batch.append((place, where, record))
        size += 64 + sum(map(size_of, record.values()))
        if size > BATCH:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def size_of(value):
    """Return about how many characters a value of a record holds: of a list, 80 an item."""
    if isinstance(value, str):
        return len(value)
    return 80 * len(value) if hasattr(value, '__len__') else 0


class Maker:
    """Turn records into Examples. k: the knobs of prepare_metadata.py; names: of types; weights {type: float}."""

    def __init__(self, k, names, weights):
        self.k = k
        self.names = names
        self.weights = weights
        tok = load_tokenizer(k.tokenizer, k.end_of_text, 1, k.data_dir)
        self.cutter = Cutter(tok, k.block_size, k.control)

    def example(self, where, record):
        """Return what a record becomes."""
        text, items = metadata.read_record(record, where)
        present = [t for t in self.names if items.get(t)]
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        place = key_of(self.k.seed, 'split', digest) / 2 ** 64
        split = split_at(place, self.k.test_fraction, self.k.test_fraction + self.k.val_fraction)

        # Each pass over a training document draws anew what metadata it is given.
        drawn = []
        rows = []
        for n in range(self.k.passes if split == 'train' else 1):
            types = self.draw(present, np.random.default_rng(key_of(self.k.seed, n, digest)))
            drawn += types
            rows.append(self.cutter.rows(text, items, types))
        ids, masks = (np.concatenate(parts) for parts in zip(*rows))
        example = Example(split, present, drawn, ids, masks, len(text.encode()))
        if split == 'val':
            example.text = text
            example.items = {t: items[t] for t in present}
        return example

    def draw(self, present, rng):
        """Draw the types that a document with these is given; none for some, and for all under the control 'none'."""
        is_given = rng.random() < self.k.metadata_probability
        if not is_given or self.k.control == 'none' or not present:
            return []
        return metadata.draw_types(present, self.weights, rng)

    def examples(self, batch):
        """Return [(place, Example, or the message of a broken record)] of (place, where, record)s."""
        made = []
        for place, where, record in batch:
            try:
                made.append((place, self.example(where, record)))
            except UserError as e:
                message = str(e)
                made.append((place, message if where in message else f'{where}: {message}'))
        return made


def start_worker(*args):
    """Make the Maker of a process."""
    global maker
    maker = Maker(*args)


def work(batch):
    return maker.examples(batch)


def examples_in_order(records, k, names, weights, n_processes):
    """Yield (place, Example or message) of (place, where, record)s in order; few batches are under way at a time."""
    batches = batches_of(records)
    if n_processes == 1:
        single = Maker(k, names, weights)
        for batch in batches:
            yield from single.examples(batch)
        return
    spawn = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(n_processes, spawn, start_worker, (k, names, weights)) as pool:
        waiting = collections.deque()
        while True:
            wanted = 2 * n_processes - len(waiting)
            waiting.extend(pool.submit(work, batch) for batch in itertools.islice(batches, wanted))
            if not waiting:
                return
            yield from waiting.popleft().result()
