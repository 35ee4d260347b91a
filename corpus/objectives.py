"""Rows that an objective asks for, of any data set: rows to copy, and tokens themselves for models with an encoder."""
import numpy as np

from configurator import one_of
from corpus.bins import Data

OBJECTIVES = {                          # of each wrapper of a model
    '': ('clm', 'copy', 'blank_copy', 'combined'),
    'autoencoder': ('autoencode',),
    'oracle': ('memory',),
    'memory': ('memory', 'copy', 'blank_copy', 'combined'),
}
FACTS = ('n_tokens', 'n_targets', 'n_balanced', 'text_bytes', 'vocab_size', 'start_id', 'tokenizer', 'name', 'split',
         'sha256', 'row_length', 'padded')


def objective_rule(objective, config):
    """For require(): does this objective fit a ModelConfig?"""
    return one_of(f'objective of wrapper = {config.wrapper!r}', objective, OBJECTIVES[config.wrapper])


class Objective(Data):
    """A data set whose rows are those of an objective; everything but them is the data set's own.

    copy: the second half of a row repeats the first and is what is scored; blank_copy: and its inputs are blank, the
    start id; combined: every second row is copied, the others predict as ever.
    """

    def __init__(self, data, objective, wrapper):
        self.data = data
        self.objective = objective
        self.wrapper = wrapper
        for fact in FACTS:
            setattr(self, fact, getattr(data, fact))

    # What only a single split has, and eval.py asks for.

    @property
    def tokens(self):
        return self.data.tokens

    @property
    def index(self):
        return self.data.index

    def count_words(self):
        return self.data.count_words()

    # The rows.

    def head(self, n_tokens):
        return Objective(self.data.head(n_tokens), self.objective, self.wrapper)

    def n_batches(self, batch_size, block_size, seed):
        return self.data.n_batches(batch_size, block_size, seed)

    def starts(self, order, seed, epoch, batch, number, batch_size, block_size):
        return self.data.starts(order, seed, epoch, batch, number, batch_size, block_size)

    def rows_by_source(self, n_rows, seed):
        return self.data.rows_by_source(n_rows, seed)

    def gather(self, starts, length):
        """Return inputs and targets as the data set's gather does."""
        x, y = self.data.gather(starts, length)

        # The tokens of a row: its inputs from the second on, and the last target, 0 where that is not scored.
        last = np.maximum(y[:, -1:], 0)
        tokens = np.concatenate((x[:, 1:], last), 1)
        if self.objective in ('copy', 'blank_copy', 'combined'):
            copied = self.copied_rows(starts, length)[:, None]
            tokens, y = copy_first_half(tokens, y, copied)
            if self.objective == 'blank_copy':
                tokens[:, length // 2:] = self.start_id
            x = np.concatenate((x[:, :1], tokens[:, :-1]), 1)

        # A model with an encoder shifts the tokens itself.
        if self.wrapper:
            return tokens, y
        return x, y

    def copied_rows(self, starts, length):
        """Say which rows (B,) are copied: all, but with 'combined' those of even number."""
        starts = np.asarray(starts)
        if self.objective == 'combined':
            return starts // length % 2 == 0
        return np.full(len(starts), True)

    def n_scored(self, starts, length):
        """Count the targets that gather would score."""
        _, y = self.gather(starts, length)
        return int((y >= 0).sum())


def copy_first_half(tokens, y, copied):
    """Repeat the first half of rows (B, T) where copied (B, 1), and score the repetition alone; return tokens and y."""
    half = tokens.shape[1] // 2
    twice = np.tile(tokens[:, :half], 2)
    not_scored = np.full_like(y[:, :half], -1)
    targets = np.concatenate((not_scored, y[:, :half]), 1)
    return np.where(copied, twice, tokens), np.where(copied, targets, y)


def with_objective(data, objective, wrapper):
    """Return data as it is for plain language modelling, else with the objective's rows."""
    if objective == 'clm' and not wrapper:
        return data
    return Objective(data, objective, wrapper)
