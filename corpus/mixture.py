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

from configurator import UserError, names_in, require
from corpus.bins import Data, key_of, permute

SUPER_BLOCK = 1000              # rows


def parse_mix(text):
    """Return {data set: share of the rows} of 'a:3,b:1' (no number means 1); shares sum to 1."""
    weights = {}
    for part in names_in(text):
        name, colon, number = part.partition(':')
        try:
            weight = 1.0
            if colon:
                weight = float(number)
        except ValueError:
            raise UserError(f'data_mix = {text!r}: {number!r} is not a weight, expected pubmed:0.5,uspto:0.5') from None
        require((0 <= weight < float('inf'), f'data_mix = {text!r}: the weight of {name} is {weight:g}, expected >= 0'),
                (name not in weights, f'data_mix = {text!r} names {name} twice'))
        weights[name] = weight
    total = sum(weights.values())
    require((total > 0, f'data_mix = {text!r}: all weights are 0, expected one above, as in pubmed:0.5,uspto:0.5'))
    return {name: weight / total for name, weight in weights.items() if weight}


# --- which row comes from where ---

def row_counts(shares):
    """Divide a super-block among shares (S,) by largest remainders; ties go to the earlier one."""
    exact = np.asarray(shares) * SUPER_BLOCK
    counts = np.floor(exact + 1e-9).astype(np.int64)
    n_left = SUPER_BLOCK - counts.sum()
    by_remainder = np.argsort(counts - exact, kind='stable')
    counts[by_remainder[:n_left]] += 1
    return tuple(counts.tolist())


@functools.lru_cache(maxsize=8)
def super_block(counts, seed, number):
    """Return source and rank among the rows of that source, two arrays, of the 1,000 rows of a super-block."""
    # Cards in a shuffled pack: the first counts[0] cards are of source 0, and so on.
    key = key_of(seed, 'mixture', number)
    card = permute(np.arange(SUPER_BLOCK), SUPER_BLOCK, key)
    source = np.searchsorted(np.cumsum(counts), card, 'right')
    rank = np.empty(SUPER_BLOCK, np.int64)
    for k, n in enumerate(counts):
        rank[source == k] = np.arange(n)
    return source, rank


def draw(counts, rows, seed):
    """Return source and index within the source, two arrays, of row numbers counted from the start of the run."""
    block, slot = np.divmod(np.asarray(rows, np.int64), SUPER_BLOCK)
    source = np.empty_like(block)
    index = np.empty_like(block)
    for b in np.unique(block).tolist():
        source_of_slot, rank_of_slot = super_block(counts, seed, b)
        inside = block == b
        source[inside] = source_of_slot[slot[inside]]

        # Each super-block before took counts[k] rows of source k.
        taken = b * np.array(counts)
        index[inside] = taken[source[inside]] + rank_of_slot[slot[inside]]
    return source, index


def exhausted_at(counts, blocks, seed):
    """Return the number of the first row for which some source has no block left that was not drawn before."""
    rows = []
    for k, (n, count) in enumerate(zip(blocks, counts)):
        # Block n, one more than there are, falls into this super-block, at this rank among the source's rows.
        number, missing = divmod(n, count)
        source, rank = super_block(counts, seed, number)
        is_block_n = (source == k) & (rank == missing)
        slot = int(np.flatnonzero(is_block_n)[0])
        rows.append(number * SUPER_BLOCK + slot)
    return min(rows)


class Mixture(Data):
    """Blocks of several sources (bins.Bin) drawn by shares; positions are those of the sources laid end to end."""

    def __init__(self, sources, shares, block_size, stop_when='never'):
        self.sources = sources
        self.shares = shares
        self.block_size = block_size
        self.stop_when = stop_when
        self.counts = row_counts(shares)                                                # rows in a super-block
        self.blocks = tuple(s.n_tokens // block_size for s in sources)                  # whole ones
        lengths = [n * block_size for n in self.blocks]
        self.offsets = np.cumsum([0, *lengths])

        # All sources have one tokenizer, so any of them says what it is.
        self.vocab_size = sources[0].vocab_size
        self.start_id = sources[0].start_id
        self.tokenizer = sources[0].tokenizer
        self.split = sources[0].split
        self.name = ','.join(s.name for s in sources)
        identity = [(s.sha256, n) for s, n in zip(sources, self.counts)]
        self.sha256 = hashlib.sha256(repr(identity).encode()).hexdigest()

        self.n_tokens = sum(lengths)
        self.n_targets = self.n_tokens
        self.text_bytes = sum(s.head(n).text_bytes for s, n in zip(sources, lengths) if n)
        self.n_balanced = int(min(n / share for n, share in zip(lengths, shares)))
        self._check()

    def _check(self):
        """Refuse a source without a block, and a share without a row."""
        short = [s.name for s, n in zip(self.sources, self.blocks) if not n]
        require((not short, f'{", ".join(short)} ({self.split}) hold less than one block of {self.block_size} tokens;'
                 ' give them more text or use a smaller --block_size'),
                (min(self.counts) > 0, f'a share of {min(self.shares):.2g} is less than one row in {SUPER_BLOCK:,};'
                 ' give it a larger weight'))

    def head(self, n_tokens):
        """Return the mixture of the leading blocks of each source, about n_tokens in all (0: all), by their shares.

        At most n_balanced: what the source that is the shortest for its share allows.
        """
        if n_tokens <= 0 or n_tokens >= self.n_tokens:
            return self
        n_blocks = min(n_tokens, self.n_balanced) / self.block_size
        leading = []
        for source, share in zip(self.sources, self.shares):
            of_source = max(round(n_blocks * share), 1)
            leading.append(source.head(of_source * self.block_size))
        return Mixture(leading, self.shares, self.block_size, self.stop_when)

    def rows_by_source(self, n_rows, seed):
        """Count how many of the first n_rows rows of a run come from each source; {name: rows}."""
        n_super_blocks = n_rows // SUPER_BLOCK
        of_whole = n_super_blocks * np.array(self.counts)

        # Of the last super-block, which is not whole, the rows themselves tell.
        others = np.arange(n_super_blocks * SUPER_BLOCK, n_rows)
        source, _ = draw(self.counts, others, seed)
        rows = of_whole + np.bincount(source, minlength=len(self.sources))
        return {s.name: int(n) for s, n in zip(self.sources, rows)}

    def n_batches(self, batch_size, block_size, seed):
        """Batches of an epoch: as many as all sources have blocks, or until the first source is exhausted."""
        n_rows = sum(self.blocks)
        if self.stop_when == 'first_exhausted':
            n_rows = exhausted_at(self.counts, self.blocks, seed)
        require((n_rows >= batch_size, f'the mixture has {n_rows:,} rows in an epoch, fewer than batch_size ='
                 f' {batch_size}; give it more text or a smaller batch'))
        return n_rows // batch_size

    def starts(self, order, seed, epoch, batch, number, batch_size, block_size):
        """Return the (batch_size,) positions of the run's batch of this number; epoch and batch are not used.

        A source that is through begins anew, reshuffled.
        """
        first = number * batch_size
        rows = np.arange(first, first + batch_size)
        source, index = draw(self.counts, rows, seed)
        blocks_there = np.array(self.blocks)[source]
        passes, block = np.divmod(index, blocks_there)
        if order == 'permuted':
            drawn = set(zip(source.tolist(), passes.tolist()))
            for k, p in drawn:
                of_pass = (source == k) & (passes == p)
                key = key_of(seed, self.sources[k].name, p)
                block[of_pass] = permute(block[of_pass], self.blocks[k], key)
        return self.offsets[source] + block * self.block_size

    def gather(self, starts, length):
        """Return inputs and targets as bins.Bin.gather does; no row reaches over the end of its source."""
        starts = np.asarray(starts)
        x = np.full((len(starts), length), self.start_id, np.int64)
        y = np.full((len(starts), length), -1, np.int64)
        source = np.searchsorted(self.offsets, starts, 'right') - 1
        for k in np.unique(source[starts >= 0]):
            of_source = source == k
            starts_there = starts[of_source] - self.offsets[k]
            inputs, targets = self.sources[k].gather(starts_there, length)
            x[of_source] = inputs
            y[of_source] = targets
        return x, y

    def n_scored(self, starts, length):
        """Count the targets that gather would score: blocks are whole."""
        n_rows = (np.asarray(starts) >= 0).sum()
        return int(n_rows) * length
