"""Mixtures: exact shares, closed-form rows, exhaustion known beforehand, the same rows however asked for."""
import numpy as np
import pytest
from conftest import write_dataset

from configurator import UserError
from corpus import bins, mixture
from corpus.data import open_mixture


def mix_of(sizes, shares, block_size=4, stop_when='never'):
    """A mixture of sources whose tokens tell where they come from: source k holds 1000 * k, 1000 * k + 1, ..."""
    sources = [bins.Bin(1000 * k + np.arange(n), 10 ** 6, start_id=7, name=f'set{k}', sha256=str(k))
               for k, n in enumerate(sizes)]
    return mixture.Mixture(sources, shares, block_size, stop_when)


def starts_of(mix, order, seed, number, batch_size):
    """The positions of the run's batch of this number; a mixture looks at no epoch."""
    return mix.starts(order, seed, 0, 0, number, batch_size, mix.block_size)


@pytest.mark.parametrize('shares', [(0.5, 0.5), (0.7, 0.2, 0.1), (1 / 3, 1 / 3, 1 / 3), (0.9991, 0.0009), (1.0,)])
def test_shares_are_met_within_a_thousandth_after_10_000_rows(shares):
    mix = mix_of([400] * len(shares), shares)
    source, index = mixture.draw(mix.counts, np.arange(10_000), seed=3)
    seen = np.bincount(source, minlength=len(shares))
    assert np.abs(seen / 10_000 - shares).max() < 1e-3 and sum(mix.counts) == 1000
    for k in range(len(shares)):                            # every index once: nothing is left out, nothing drawn twice
        assert sorted(index[source == k]) == list(range(seen[k]))
    for n in (0, 1, 999, 1000, 2345):
        assert list(mix.rows_by_source(n, 3).values()) == np.bincount(source[:n], minlength=len(shares)).tolist()
    if len(shares) > 1:
        assert 0 < (source[:50] == 1).sum() < 50 or shares[1] < 0.01            # mixed within a batch, not in runs
        assert not np.array_equal(source, mixture.draw(mix.counts, np.arange(10_000), seed=4)[0])


def test_a_row_does_not_depend_on_how_it_is_asked_for():
    """Closed form: any rows in any order give what a pass from the start gives; so 1, 2 or 4 ranks, and a resume."""
    counts, rows = (500, 300, 200), np.random.default_rng(0).permutation(5000)
    whole = np.stack(mixture.draw(counts, np.arange(5000), 1))
    assert np.array_equal(np.stack(mixture.draw(counts, rows, 1)), whole[:, rows])
    mix = mix_of([4000, 4000], (0.5, 0.5))
    for step in (0, 124, 125, 700):
        starts = starts_of(mix, 'permuted', 5, step, 8)
        x, y = mix.gather(starts, 4)
        for n_ranks in (1, 2, 4):
            parts = [mix.gather(starts[r * 8 // n_ranks:(r + 1) * 8 // n_ranks], 4) for r in range(n_ranks)]
            assert np.array_equal(np.concatenate([p[0] for p in parts]), x)
            assert np.array_equal(np.concatenate([p[1] for p in parts]), y)


@pytest.mark.parametrize('order', ['permuted', 'sequential'])
def test_each_pass_over_a_source_holds_every_block_once(order):
    mix = mix_of([400, 40], (0.5, 0.5))                     # 100 and 10 blocks; 55 batches of 2 are an epoch
    assert mix.n_batches(2, 4, seed=0) == 55 and mix.n_tokens == 440
    starts = np.concatenate([starts_of(mix, order, 0, b, 2) for b in range(20 * 55)])
    blocks = starts // 4
    small = blocks[blocks >= 100][:70]                      # seven passes over the small one
    assert all(sorted(small[i:i + 10]) == list(range(100, 110)) for i in range(0, 70, 10))
    assert sorted(blocks[blocks < 100][:100]) == list(range(100))


def test_gather_is_that_of_the_sources():
    mix = mix_of([40, 23], (0.5, 0.5))                      # the last 3 tokens of set1 fill no block
    assert mix.n_tokens == 60 and mix.text_bytes == 60
    x, y = mix.gather(np.array([0, 40, 56, -1, 36]), 4)
    assert y.tolist() == [[0, 1, 2, 3], [1000, 1001, 1002, 1003], [1016, 1017, 1018, 1019], [-1] * 4, [36, 37, 38, 39]]
    assert x.tolist() == [[7, 0, 1, 2], [7, 1000, 1001, 1002], [1015, 1016, 1017, 1018], [7] * 4, [35, 36, 37, 38]]
    assert mix.n_scored([0, -1, 56], 4) == 8


@pytest.mark.parametrize('sizes, shares', [((400, 400), (0.5, 0.5)), ((40_000, 400), (0.9, 0.1)), ((9, 9), (0.3, 0.7)),
                                           ((4000, 8000), (0.5, 0.5)), ((8004, 80_000), (0.3, 0.7))])
def test_exhaustion_is_known_beforehand(sizes, shares):
    """The row that closed form names is the first that counting finds."""
    mix = mix_of(sizes, shares, stop_when='first_exhausted')
    source, index = mixture.draw(mix.counts, np.arange(300_000), 2)
    first = int(np.argmax(index >= np.array(mix.blocks)[source]))
    assert mixture.exhausted_at(mix.counts, mix.blocks, 2) == first > 0
    drawn = list(mix.rows_by_source(first + 1, 2).values())
    assert sum(n > m for n, m in zip(drawn, mix.blocks)) == 1 and sum(drawn) == first + 1
    starts = starts_of(mix, 'permuted', 2, 0, first)
    assert len(set(starts.tolist())) == first               # no block twice before it
    assert mix.n_batches(2, 4, 2) == first // 2


def test_head_shares_the_unique_tokens():
    """A mixture of N tokens takes each source's share of them: the fair comparison with N tokens of one source."""
    whole = mix_of([4000, 4000], (0.75, 0.25))
    mix = whole.head(2000)
    assert [s.n_tokens for s in mix.sources] == [1500, 500] and mix.n_tokens == 2000
    assert mix.sha256 != mix.head(1000).sha256 and whole.head(0) is whole.head(8000) is whole
    assert whole.n_balanced == 5333 and whole.head(7_000).blocks == (1000, 333)
    assert whole.head(4).blocks == (1, 1)                   # a few calibration blocks still hold some of each


@pytest.mark.parametrize('text, message', [
    ('a:-1,b:2', 'weight of a is -1'), ('a:0,b:0', 'all weights are 0'), ('', 'all weights are 0'),
    ('a:x', "'x' is not a weight"), ('a,a', 'names a twice'), ('a:nan', 'expected >= 0'), ('a:inf', 'expected >= 0')])
def test_bad_weights(text, message):
    with pytest.raises(UserError, match=message):
        mixture.parse_mix(text)


def test_weights_are_normalised():
    assert mixture.parse_mix('a:3, b:1,c:0') == {'a': 0.75, 'b': 0.25}
    assert mixture.parse_mix('a,b') == {'a': 0.5, 'b': 0.5}
    with pytest.raises(UserError, match='less than one row in 1,000'):
        mix_of([400, 400], (0.9999, 0.0001))
    with pytest.raises(UserError, match='set1.*less than one block'):
        mix_of([400, 3], (0.5, 0.5))


def test_sources_must_fit_together(tmp_path):
    write_dataset(str(tmp_path), 'a')
    write_dataset(str(tmp_path), 'b')
    write_dataset(str(tmp_path), 'bpe', dtype='uint16', vocab_size=300)
    write_dataset(str(tmp_path), 'noval', splits=('train',))
    mix = open_mixture(str(tmp_path), 'a:1,b:3', 'train', 32)
    assert mix.name == 'a,b' and mix.shares == [0.25, 0.75] and mix.n_tokens == 8192
    for text, message in (('a,bpe', 'mixes tokenizers .a: byte, vocabulary 256, bpe: byte, vocabulary 300'),
                          ('a,noval', 'noval of data_mix.*has no val text'), ('a,none', "no data set 'none'")):
        with pytest.raises(UserError, match=message):
            open_mixture(str(tmp_path), text, 'val', 32)
