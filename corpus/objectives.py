"""Rows that an objective asks for, of any data set: rows to copy, and tokens themselves for models with an encoder."""
import numpy as np

from configurator import one_of

OBJECTIVES = {'': ('clm', 'copy', 'blank_copy', 'combined'), 'autoencoder': ('autoencode',), 'oracle': ('memory',),
              'memory': ('memory', 'copy', 'blank_copy', 'combined')}


def objective_rule(objective, config):
    """For require(): does this objective fit a ModelConfig?"""
    return one_of(f'objective of wrapper = {config.wrapper!r}', objective, OBJECTIVES[config.wrapper])


class Objective:
    """A data set whose rows are those of an objective; everything but them is the data set's own.

    copy: the second half of a row repeats the first and is what is scored; blank_copy: and its inputs are blank, the
    start id; combined: every second row is copied, the others predict as ever.
    """

    def __init__(self, data, objective, wrapper):
        self.data, self.objective, self.wrapper = data, objective, wrapper

    def __getattr__(self, name):
        return getattr(self.data, name)

    def head(self, n_tokens):
        return Objective(self.data.head(n_tokens), self.objective, self.wrapper)

    def gather(self, starts, length):
        """Return inputs and targets as the data set's gather does."""
        x, y = self.data.gather(starts, length)
        tokens = np.concatenate((x[:, 1:], np.maximum(y[:, -1:], 0)), 1)
        if self.objective in ('copy', 'blank_copy', 'combined'):
            half = length // 2
            chosen = np.asarray(starts) // length % 2 == 0 if self.objective == 'combined' else np.full(len(x), True)
            twice = np.concatenate((tokens[:, :half], tokens[:, :half]), 1)[:, :length]
            tokens = np.where(chosen[:, None], twice, tokens)
            target = np.concatenate((np.full_like(y[:, :half], -1), y[:, :half]), 1)
            y = np.where(chosen[:, None], target, y)
            if self.objective == 'blank_copy':
                tokens[:, half:] = self.data.start_id
            x = np.concatenate((x[:, :1], tokens[:, :-1]), 1)
        return (tokens if self.wrapper else x), y

    def n_scored(self, starts, length):
        """Count the targets that gather would score."""
        return int((self.gather(starts, length)[1] >= 0).sum())


def with_objective(data, objective, wrapper):
    """Return data as it is for plain language modelling, else with the objective's rows."""
    return Objective(data, objective, wrapper) if wrapper or objective != 'clm' else data
