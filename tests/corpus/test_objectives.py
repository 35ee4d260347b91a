"""Rows of objectives: what is seen and what is scored."""
import numpy as np
import pytest

from configurator import UserError, require
from corpus import objectives
from corpus.bins import Bin
from corpus.objectives import Objective
from model import ModelConfig


def test_rows_of_objectives():
    """What is seen and what is scored, by hand."""
    data = Bin(np.arange(64, dtype=np.uint8), start_id=10)
    x, y = Objective(data, 'copy', '').gather([8], 8)
    assert x.tolist() == [[7, 8, 9, 10, 11, 8, 9, 10]] and y.tolist() == [[-1] * 4 + [8, 9, 10, 11]]
    x, y = Objective(data, 'blank_copy', 'memory').gather([8], 8)
    assert x.tolist() == [[8, 9, 10, 11] + [10] * 4] and y.tolist() == [[-1] * 4 + [8, 9, 10, 11]]
    x, y = Objective(data, 'combined', '').gather([8, 16], 8)
    plain = data.gather([8], 8)
    assert x[0].tolist() == plain[0][0].tolist() and y[1].tolist() == [-1] * 4 + [16, 17, 18, 19]
    x, y = Objective(data, 'autoencode', 'autoencoder').gather([56], 8)
    assert x.tolist() == y.tolist() == [list(range(56, 64))]
    assert Objective(data, 'copy', '').n_scored([0, 8], 8) == 8 and Objective(data, 'copy', '').head(16).n_tokens == 16


def test_everything_but_the_rows_is_the_data_sets_own():
    data = Bin(np.arange(64, dtype=np.uint8), text_bytes=100, sha256='x', name='few', index='file', words=9,
               tokenizer='gpt2')
    made = Objective(data, 'copy', '')
    for fact in (*objectives.FACTS, 'bytes_per_target', 'index'):
        assert getattr(made, fact) == getattr(data, fact)
    assert made.count_words() == 9 and made.n_batches(4, 8, 0) == 2 and made.rows_by_source(5, 0) == {}
    for order in ('sequential', 'permuted', 'random'):
        assert made.starts(order, 1, 0, 1, 1, 4, 8).tolist() == data.starts(order, 1, 0, 1, 1, 4, 8).tolist()
    assert not hasattr(made, 'byte_lengths')                # no catch-all: what is passed on is listed


def test_objectives_fit_models():
    with pytest.raises(UserError, match="objective of wrapper = 'oracle' = 'copy', expected one of 'memory'"):
        require(objectives.objective_rule('copy', ModelConfig(wrapper='oracle')))
