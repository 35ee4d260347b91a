"""Losses of the same target tokens with and without metadata, by document: difference, interval, and a probe.

A set of prepare_metadata.py holds, for each type, the same pieces of validation documents with that metadata, without
it, and behind another document's prefix. Every arm scores the same targets, so that losses differ by what is seen
before them alone. Sums come first, means last: a document weighs as many tokens as it has.
"""
import numpy as np
import torch

import score


class RowSums(score.Units):
    """Loss of each row of a split: nats and scored tokens, (2, n_rows)."""

    def __init__(self, rows):
        self.edges = np.arange(0, rows.n_tokens, rows.row_length)
        self.sums = np.zeros((2, len(self.edges)))


def row_sums(model, rows, batch_size, env, progress=''):
    """Return the nats and scored tokens of each row, (2, n_rows), from all ranks."""
    units = RowSums(rows)
    score.score(model, rows, rows.row_length, batch_size, env, progress=progress, units=units)
    return env.sum(torch.from_numpy(units.sums)).cpu().numpy()


def by_document(rows, sums, first_only):
    """Add the sums (2, n_rows) of each document's rows, or take its first row alone; (2, documents)."""
    first = np.fromfile(rows.index, '<u8').astype(np.int64) // rows.row_length
    first = first[first < sums.shape[1]]
    return sums[:, first] if first_only else np.add.reduceat(sums, first, 1)


def difference(a, b, n_resamples):
    """Return the mean losses of two arms (2, documents) and a 95 % bootstrap interval over documents of a's - b's."""
    rng, n = np.random.default_rng(0), a.shape[1]
    draws = [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(n_resamples)]
    means = [(a[0] @ d - b[0] @ d) / (a[1] @ d) for d in draws]
    low, high = np.quantile(means, (0.025, 0.975)).tolist() if means else (None, None)
    loss_a, loss_b = (float(arm[0].sum() / arm[1].sum()) for arm in (a, b))
    return dict(with_nats=loss_a, without_nats=loss_b, difference_nats=loss_a - loss_b, difference_low=low,
                difference_high=high)


def evaluate(model, arms, batch_size, env, n_resamples=1000, max_rows=0, progress=''):
    """Yield two dicts of numbers of one type: over all pieces of the documents, and over first pieces alone.

    true_wins: share of documents whose own prefix gives a lower loss than another document's, ties half.
    """
    arms = {arm: rows.head(max_rows * rows.row_length) for arm, rows in arms.items()}
    sums = {arm: row_sums(model, rows, batch_size, env, f'{progress} {arm}' if progress else '')
            for arm, rows in arms.items()}
    for pieces in ('all', 'first'):
        of = {arm: by_document(rows, sums[arm], pieces == 'first') for arm, rows in arms.items()}
        n_tokens, whole = int(of['with'][1].sum()), arms['with']
        bits = dict(zip(('with', 'without'), (arm[0].sum() / score.LN2 for arm in (of['with'], of['without']))))
        n_bytes = whole.text_bytes * n_tokens / whole.n_targets     # of first pieces: their share of the tokens
        found = dict(pieces=pieces, documents=of['with'].shape[1], tokens=n_tokens,
                     **difference(of['with'], of['without'], n_resamples),
                     **{f'{arm}_bits_per_byte': float(b / n_bytes) for arm, b in bits.items()},
                     **{f'{arm}_perplexity': float(np.exp(of[arm][0].sum() / n_tokens)) for arm in bits})
        if 'other' in of:
            gain = of['other'][0] - of['with'][0]
            found['true_wins'] = float((gain > 0).mean() + (gain == 0).mean() / 2)
        yield found
