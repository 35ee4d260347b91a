"""Mixtures of data sets: 'pubmed:0.5,uspto:0.5' as one thing with the surface of bins.Bin, and no state to save.

Rows come in super-blocks of 1,000 with a fixed number of rows per source (largest remainders of the weights), ordered
by a permutation keyed (seed, super-block). So the source of a row, and which block of that source it is, follow from
the row's number alone: shares are exact after every 1,000 rows, the row at which a source runs out is known before the
first step, and neither resuming nor the number of processes changes what a batch holds. Rows are whole blocks: equal
steps are equal tokens, whatever the mix.
"""
import functools
import hashlib

import numpy as np

from configurator import UserError, require
from corpus.bins import key_of, open_bin, permute, read_meta, split_names

SUPER_BLOCK = 1000              # rows


def parse_mix(text):
    """Return {data set: share of the rows} of 'a:3,b:1' (no number means 1); shares sum to 1."""
    weights = {}
    for part in filter(None, (p.strip() for p in text.split(','))):
        name, colon, number = part.partition(':')
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            raise UserError(f'data_mix = {text!r}: {number!r} is not a weight, expected pubmed:0.5,uspto:0.5') from None
        require((0 <= weight < float('inf'), f'data_mix = {text!r}: the weight of {name} is {weight:g}, expected >= 0'),
                (name not in weights, f'data_mix = {text!r} names {name} twice'))
        weights[name] = weight
    total = sum(weights.values())
    require((total > 0, f'data_mix = {text!r}: all weights are 0, expected one above, as in pubmed:0.5,uspto:0.5'))
    return {name: weight / total for name, weight in weights.items() if weight}


def row_counts(shares):
    """Divide a super-block among shares (S,) by largest remainders; ties go to the earlier one."""
    exact = np.asarray(shares) * SUPER_BLOCK
    counts = np.floor(exact + 1e-9).astype(np.int64)
    counts[np.argsort(counts - exact, kind='stable')[:SUPER_BLOCK - counts.sum()]] += 1
    return tuple(counts.tolist())


@functools.lru_cache(maxsize=8)
def super_block(counts, seed, number):
    """Return source and rank among the rows of that source, two arrays, of the 1,000 rows of a super-block."""
    slot = permute(np.arange(SUPER_BLOCK), SUPER_BLOCK, key_of(seed, 'mixture', number))
    source, rank = np.searchsorted(np.cumsum(counts), slot, 'right'), np.empty(SUPER_BLOCK, np.int64)
    for k, n in enumerate(counts):
        rank[source == k] = np.arange(n)
    return source, rank


def draw(counts, rows, seed):
    """Return source and index within the source, two arrays, of row numbers counted from the start of the run."""
    block, slot = np.divmod(np.asarray(rows, np.int64), SUPER_BLOCK)
    source, index = np.empty_like(block), np.empty_like(block)
    for b in np.unique(block).tolist():
        of_block, rank = super_block(counts, seed, b)
        mine = block == b
        source[mine] = of_block[slot[mine]]
        index[mine] = b * np.array(counts)[source[mine]] + rank[slot[mine]]
    return source, index


def exhausted_at(counts, blocks, seed):
    """Return the number of the first row for which some source has no block left that was not drawn before."""
    rows = []
    for k, (n, count) in enumerate(zip(blocks, counts)):
        source, rank = super_block(counts, seed, n // count)
        rows.append(n // count * SUPER_BLOCK + int(np.flatnonzero((source == k) & (rank == n % count))[0]))
    return min(rows)


class Mixture:
    """Blocks of several sources (bins.Bin) drawn by shares; positions are those of the sources laid end to end."""

    row_length, padded = 0, False

    def __init__(self, sources, shares, block_size, stop_when='never'):
        self.sources, self.shares, self.block_size, self.stop_when = sources, shares, block_size, stop_when
        self.counts = row_counts(shares)
        self.blocks = tuple(s.n_tokens // block_size for s in sources)                  # whole ones
        self.offsets = np.cumsum([0, *(n * block_size for n in self.blocks)])
        self.n_tokens = int(self.offsets[-1])
        self.n_balanced = int(min(n * block_size / share for n, share in zip(self.blocks, shares)))
        first = sources[0]
        self.vocab_size, self.start_id, self.tokenizer, self.split = (first.vocab_size, first.start_id, first.tokenizer,
                                                                      first.split)
        self.text_bytes = sum(s.head(n * block_size).text_bytes for s, n in zip(sources, self.blocks) if n)
        self.name = ','.join(s.name for s in sources)
        identity = [(s.sha256, n) for s, n in zip(sources, self.counts)]
        self.sha256 = hashlib.sha256(repr(identity).encode()).hexdigest()
        short = [s.name for s, n in zip(sources, self.blocks) if not n]
        require((not short, f'{", ".join(short)} ({self.split}) hold less than one block of {block_size} tokens;'
                 ' give them more text or use a smaller --block_size'),
                (min(self.counts) > 0, f'a share of {min(shares):.2g} is less than one row in {SUPER_BLOCK:,};'
                 ' give it a larger weight'))

    def head(self, n_tokens):
        """Return the mixture of the leading blocks of each source, about n_tokens in all (0: all), by their shares.

        At most n_balanced: what the source that is the shortest for its share allows.
        """
        if n_tokens <= 0 or n_tokens >= self.n_tokens:
            return self
        n_blocks = min(n_tokens, self.n_balanced) / self.block_size
        parts = [max(round(n_blocks * share), 1) * self.block_size for share in self.shares]
        return Mixture([s.head(n) for s, n in zip(self.sources, parts)], self.shares, self.block_size, self.stop_when)

    def rows_by_source(self, n_rows, seed):
        """Count how many of the first n_rows rows of a run come from each source; {name: rows}."""
        whole = n_rows // SUPER_BLOCK
        rest, _ = draw(self.counts, np.arange(whole * SUPER_BLOCK, n_rows), seed)
        rows = whole * np.array(self.counts) + np.bincount(rest, minlength=len(self.sources))
        return {s.name: int(n) for s, n in zip(self.sources, rows)}

    def n_batches(self, batch_size, seed):
        """Batches of an epoch: as many as all sources have blocks, or until the first source is exhausted."""
        n_rows = exhausted_at(self.counts, self.blocks, seed) if self.stop_when == 'first_exhausted' \
            else sum(self.blocks)
        require((n_rows >= batch_size, f'the mixture has {n_rows:,} rows in an epoch, fewer than batch_size ='
                 f' {batch_size}; give it more text or a smaller batch'))
        return n_rows // batch_size

    def starts(self, order, seed, batch, batch_size):
        """Return the (batch_size,) positions of the run's batch; a source that is through begins anew, reshuffled."""
        first = batch * batch_size
        source, index = draw(self.counts, np.arange(first, first + batch_size), seed)
        passes, index = np.divmod(index, np.array(self.blocks)[source])
        if order == 'permuted':
            for k, p in set(zip(source.tolist(), passes.tolist())):
                mine = (source == k) & (passes == p)
                index[mine] = permute(index[mine], self.blocks[k], key_of(seed, self.sources[k].name, p))
        return self.offsets[source] + index * self.block_size

    def gather(self, starts, length):
        """Return inputs and targets as bins.Bin.gather does; no row reaches over the end of its source."""
        x, y = np.full((2, len(starts), length), -1, np.int64)
        starts = np.asarray(starts)
        source = np.searchsorted(self.offsets, starts, 'right') - 1
        for k in np.unique(source[starts >= 0]):
            mine = source == k
            x[mine], y[mine] = self.sources[k].gather(starts[mine] - self.offsets[k], length)
        x[x < 0] = self.start_id
        return x, y

    def n_scored(self, starts, length):
        return int((np.asarray(starts) >= 0).sum()) * length


def open_data(data_dir, dataset, data_mix, split, block_size, stop_when='never', verify=False):
    """Open one split of a data set, or of a mix where one is given."""
    if data_mix:
        return open_mixture(data_dir, data_mix, split, block_size, stop_when, verify)
    return open_bin(data_dir, dataset, split, verify)


def data_rules(k, data, name, splits, block_size):
    """For require(): does a training split (before it is cut short) fit the knobs of a run, a namespace k?"""
    asked, row_length = k.train_only_on_leading_tokens, data.row_length
    most = data.n_balanced if k.data_mix else data.n_tokens
    return [(asked <= most, f'train_only_on_leading_tokens = {asked:,}, but {name!r} has {most:,}; use 0 for all, or'
             ' prepare more data'),
            (row_length in (0, block_size), f'block_size = {block_size}, {name!r} has rows of {row_length} tokens; set'
             f' --block_size={row_length}'),
            (not row_length or k.order != 'random' and not k.online,
             f"{name!r} is row data, it takes order = 'permuted' or 'sequential' and no --online"),
            (row_length or k.loss_on == 'text', f'loss_on = {k.loss_on!r} needs row data, {name!r} has none;'
             ' make it with prepare_metadata.py'),
            (data.n_tokens > 0, f'the training split of {name!r} is empty'),
            ('val' in splits or not (k.do_pruning or k.data_mix), f'{name!r} has no validation split, which TAMADE and'
             ' mixtures need; prepare one or --no-do_pruning')]


def common_splits(data_dir, dataset, data_mix):
    """Return the splits that a data set, or every source of a mix, has."""
    names = list(parse_mix(data_mix)) if data_mix else [dataset]
    return [s for s in split_names(data_dir, names[0]) if all(s in split_names(data_dir, n) for n in names[1:])]


def open_mixture(data_dir, mix, split, block_size, stop_when='never', verify=False):
    """Open one split of all sources of a mix as a Mixture; they must share one tokenizer and all have the split."""
    shares = parse_mix(mix)
    metas = {name: read_meta(data_dir, name) for name in shares}
    kinds = {name: (m['tokenizer']['name'], m['tokenizer']['sha256'], m['vocab_size']) for name, m in metas.items()}
    without = [name for name, m in metas.items() if not m['splits'].get(split, {}).get('tokens')]
    as_rows = [name for name, m in metas.items() if 'rows' in m]
    require((not as_rows, f'{", ".join(as_rows)} of data_mix = {mix!r} is row data, expected sets of running text;'
             ' train on it with --dataset'),
            (len(set(kinds.values())) == 1, f'data_mix = {mix!r} mixes tokenizers ('
             + ', '.join(f'{name}: {kind[0]}, vocabulary {kind[2]}' for name, kind in kinds.items())
             + '); prepare all sets with one'),
            (not without, f'{", ".join(without)} of data_mix = {mix!r} has no {split} text;'
             ' prepare it with a larger --val_fraction'))
    sources = [open_bin(data_dir, name, split, verify) for name in shares]
    return Mixture(sources, list(shares.values()), block_size, stop_when)
