"""data.py: one surface over bins, rows, mixtures and objectives; batches as a pure function of their place."""
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import snapshot, write_dataset

from configurator import UserError, require
from corpus import bins
from corpus.bins import Bin
from corpus.data import (
    Batches,
    Place,
    common_splits,
    leading_rules,
    open_data,
    open_pairs,
    open_split,
    row_rule,
    rules,
)
from corpus.mixture import Mixture
from corpus.objectives import Objective
from corpus.rows import DocumentRowWriter, Rows

T = 32


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """Sets a and b of running text, and rows: 40 documents of 1 to 79 bytes in rows of 32, in all splits."""
    folder = str(tmp_path_factory.mktemp('data'))
    write_dataset(folder, 'a')
    write_dataset(folder, 'b', sizes=(2048, 1000, 300))
    entries = {}
    for split in ('train', 'val', 'test'):
        writer = DocumentRowWriter(os.path.join(folder, 'rows'), split, 'uint8', None, T)
        for i in range(40):
            writer.begin_document()
            writer.write(bytes([65 + i]) * (2 * i + 1))
        entries[split] = writer.commit()
    bins.write_meta(os.path.join(folder, 'rows'), 'prepare_text.py', [], entries, dict(kind='test'),
                    rows=dict(length=T, control=''))
    return folder


KINDS = {'bin': dict(dataset='a'), 'rows': dict(dataset='rows'), 'mixture': dict(dataset='', data_mix='a:0.75,b:0.25'),
         'objective': dict(dataset='a', objective='copy'), 'encoder': dict(dataset='a', objective='autoencode',
                                                                           wrapper='autoencoder'),
         'objective of rows': dict(dataset='rows', objective='copy'),
         'objective of a mixture': dict(dataset='', data_mix='a,b', objective='combined')}


def opened(data_dir, kind, split='train'):
    return open_data(data_dir, split=split, block_size=T, **KINDS[kind])


# --- opening ---

def test_what_is_opened(data_dir):
    assert type(opened(data_dir, 'bin')) is Bin and type(opened(data_dir, 'rows')) is Rows
    assert type(opened(data_dir, 'mixture')) is Mixture and type(opened(data_dir, 'objective')) is Objective
    assert type(opened(data_dir, 'objective of rows').data) is Rows
    assert type(open_split(data_dir, 'rows', 'val', verify=True)) is Rows


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_has_the_surface(data_dir, kind):
    """What a trainer or a scorer reads of data, without asking which it has; head(0) is all, head keeps the kind."""
    data = opened(data_dir, kind)
    assert data.name in ('a', 'rows', 'a,b') and data.split == 'train' and data.tokenizer == 'byte'
    assert (data.vocab_size, data.start_id) == (256, 10) and len(data.sha256) >= 64
    assert data.row_length == (T if 'rows' in kind else 0) and data.padded is False
    assert data.bytes_per_target == data.text_bytes / data.n_targets == 1.0
    assert data.n_targets <= data.n_tokens and data.n_balanced <= data.n_tokens
    assert data.head(0).n_tokens == data.n_tokens and data.head(10 ** 9).n_tokens == data.n_tokens
    part = data.head(10 * T)
    assert type(part) is type(data) and part.n_tokens == 10 * T and part.sha256 != data.sha256
    assert part.bytes_per_target == 1.0
    drawn = data.rows_by_source(1000, 0)
    assert sum(drawn.values()) == 1000 if 'mixture' in kind else drawn == {}


def test_bytes_per_target_of_rows_counts_what_is_scored(data_dir):
    """Padding stands for no text and is no target."""
    rows = open_split(data_dir, 'rows', 'train')
    assert rows.n_targets == rows.text_bytes == sum(2 * i + 1 for i in range(40)) < rows.n_tokens
    ids = Bin(np.arange(10, dtype=np.uint16), 300, text_bytes=35)
    assert ids.bytes_per_target == 3.5


# --- batches ---

@pytest.mark.parametrize('kind', KINDS)
def test_ranks_share_a_global_batch(data_dir, kind):
    """1, 2 and 4 ranks hold the same rows and agree on how many targets are scored, also in an epoch's last batch."""
    batches = Batches(opened(data_dir, kind), 'permuted', 858, 8, T)
    for place in (Place(0, 0, 0), Place(3, 2, 77), Place(1, batches.n_batches - 1, 2 * batches.n_batches - 1)):
        x, y, n_scored = batches.batch(place, 0, 1)
        assert x.shape == y.shape == (8, T) and x.dtype == y.dtype == np.int64 and n_scored == (y >= 0).sum() > 0
        for world in (2, 4):
            parts = [batches.batch(place, rank, world) for rank in range(world)]
            assert np.array_equal(np.concatenate([part[0] for part in parts]), x)
            assert np.array_equal(np.concatenate([part[1] for part in parts]), y)
            assert {part[2] for part in parts} == {n_scored}


@pytest.mark.parametrize('kind', ['bin', 'rows', 'objective'])
def test_an_epoch_holds_every_block_once(data_dir, kind):
    """n_batches is the length of an epoch: nothing is left out, nothing is drawn twice."""
    data = opened(data_dir, kind)
    for order in ('sequential', 'permuted'):
        batches = Batches(data, order, 1, 8, T)
        starts = [data.starts(order, 1, 2, b, 0, 8, T) for b in range(batches.n_batches)]
        blocks = np.concatenate(starts)
        assert sorted(blocks[blocks >= 0]) == list(range(0, data.n_tokens, T))
        scored = sum(batches.batch(Place(2, b))[2] for b in range(batches.n_batches))
        assert scored == data.n_scored(np.arange(0, data.n_tokens, T), T)


def test_a_place_decides_alone(data_dir):
    """Of an epoch and a batch for a single set, of the batches before for a mixture; sequential overrides the order."""
    batches = Batches(opened(data_dir, 'bin'), 'permuted', 5, 8, T)
    x, y, _ = batches.batch(Place(1, 3, 10))
    assert np.array_equal(batches.batch(Place(1, 3, 99))[0], x)
    assert not np.array_equal(batches.batch(Place(2, 3, 10))[0], x)
    ordered = Batches(opened(data_dir, 'bin'), 'sequential', 5, 8, T)
    first_pass = Place(epoch=0, batch=3, number=3, sequential=True)
    assert np.array_equal(batches.batch(first_pass)[1], ordered.batch(Place(0, 3, 3))[1])
    mixed = Batches(opened(data_dir, 'mixture'), 'permuted', 5, 8, T)
    assert np.array_equal(mixed.batch(Place(0, 0, 7))[0], mixed.batch(Place(4, 2, 7))[0])
    assert not np.array_equal(mixed.batch(Place(0, 0, 7))[0], mixed.batch(Place(0, 0, 8))[0])


# --- does it fit? ---

def knobs(**changes):
    return SimpleNamespace(**dict(dict(train_only_on_leading_tokens=0, order='permuted', online=False, data_mix='',
                                       do_pruning=False, loss_on='text'), **changes))


@pytest.mark.parametrize('kind, changes, message', [
    ('bin', dict(train_only_on_leading_tokens=5000), 'tokens = 5,000, but .set. has 4,096; use 0 for all'),
    ('mixture', dict(train_only_on_leading_tokens=6000, data_mix='a,b'), 'has 5,461'),
    ('rows', dict(order='random'), "takes order = 'permuted' or 'sequential' and no --online"),
    ('rows', dict(online=True), 'no --online'),
    ('bin', dict(loss_on='text+markup'), "loss_on = 'text.markup' needs row data"),
    ('objective', dict(do_pruning=True), 'no validation split')])
def test_rules_refuse(data_dir, kind, changes, message):
    data = opened(data_dir, kind)
    require(*rules(knobs(), data, 'set', ['train', 'val'], T))
    with pytest.raises(UserError, match=message):
        require(*rules(knobs(**changes), data, 'set', ['train'], T))


def test_rules_of_rows_and_of_leading_tokens(data_dir):
    require(row_rule(opened(data_dir, 'bin'), 'a', 64), row_rule(opened(data_dir, 'rows'), 'rows', T))
    with pytest.raises(UserError, match="block_size = 64, 'rows' has rows of 32 tokens; set --block_size=32"):
        require(row_rule(opened(data_dir, 'rows'), 'rows', 64))
    with pytest.raises(UserError, match="the training split of 'none' is empty"):
        require(*leading_rules(0, Bin(np.zeros(0, np.uint8)), 'none'))


def test_common_splits(data_dir, tmp_path):
    assert common_splits(data_dir, 'a') == common_splits(data_dir, '', 'a,b') == ['train', 'val', 'test']
    write_dataset(str(tmp_path), 'a', splits=('train', 'val'))
    write_dataset(str(tmp_path), 'b', splits=('val', 'test'))
    assert common_splits(str(tmp_path), '', 'a,b') == ['val']


def test_sets_without_pairs_are_refused(data_dir):
    with pytest.raises(UserError, match="'a' has no paired rows, expected one made by prepare_metadata.py"):
        open_pairs(data_dir, 'a')


def test_arms_of_a_pair_score_the_same(tmp_path):
    folder = str(tmp_path / 'rows')
    entries = {}
    for split, size in (('with', 40), ('without', 40), ('other', 41)):
        writer = DocumentRowWriter(folder, split, 'uint8', None, T)
        writer.begin_document()
        writer.write(b'x' * size)
        entries[split] = writer.commit()

    def write_pairs(*arms):
        bins.write_meta(folder, 'prepare_metadata.py', [], entries, dict(kind='test'),
                        rows=dict(length=T, control=''), pairs=dict(url={arm: arm for arm in arms}))
    write_pairs('with', 'without')
    assert open_pairs(str(tmp_path), 'rows')['url']['without'].n_targets == 40
    write_pairs('with', 'other')
    with pytest.raises(UserError, match="the arms of 'url' in 'rows' score different numbers of targets"):
        open_pairs(str(tmp_path), 'rows')


# --- names in meta.json ---

@pytest.mark.parametrize('name', ['../outside.bin', '/etc/passwd', 'below/train.bin', '..'])
@pytest.mark.parametrize('key', ['file', 'index', 'mask', 'token_bytes'])
def test_files_outside_the_folder_are_refused(tmp_path, key, name):
    """A meta.json from elsewhere can neither read nor remove what is not in its folder."""
    folder = str(tmp_path / 'rows')
    writer = DocumentRowWriter(folder, 'train', 'uint8', None, T)
    writer.begin_document()
    writer.write(b'some text')
    entry = writer.commit()
    tokenizer = dict(name='byte', sha256='')
    (tokenizer if key == 'token_bytes' else entry)[key] = name
    bins.write_meta(folder, 'prepare_text.py', [], dict(train=entry), dict(kind='test'), tokenizer=tokenizer,
                    rows=dict(length=T, control=''))
    (tmp_path / 'outside.bin').write_bytes(b'keep')
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match='expected a name without a folder') as caught:
        open_split(str(tmp_path), 'rows', 'train')
    assert '\n' not in str(caught.value)
    if key != 'token_bytes':
        with pytest.raises(UserError, match='expected a name without'):
            bins.finish(folder, 'prepare_text.py', [], {}, dict(kind='test'))
    assert snapshot(tmp_path) == before


def test_a_missing_or_damaged_mask_is_said(tmp_path):
    folder = str(tmp_path / 'rows')
    writer = DocumentRowWriter(folder, 'train', 'uint8', None, T)
    writer.begin_document()
    writer.write(b'some text')
    bins.write_meta(folder, 'prepare_text.py', ['--name=rows'], dict(train=writer.commit()), dict(kind='test'),
                    rows=dict(length=T, control=''))
    path = tmp_path / 'rows' / 'train.mask.bin'
    whole = path.read_bytes()
    path.write_bytes(whole[::-1])
    open_split(str(tmp_path), 'rows', 'train')
    with pytest.raises(UserError, match='train.mask.bin does not have the SHA-256'):
        open_split(str(tmp_path), 'rows', 'train', verify=True)
    path.write_bytes(whole[:5])
    with pytest.raises(UserError, match='has 5 bytes, expected one for each of 32 tokens; regenerate it: python prep'):
        open_split(str(tmp_path), 'rows', 'train')
    path.unlink()
    with pytest.raises(UserError, match='has 0 bytes'):
        open_split(str(tmp_path), 'rows', 'train')
    assert json.loads((tmp_path / 'rows' / 'meta.json').read_text())['splits']['train']['mask'] == path.name
