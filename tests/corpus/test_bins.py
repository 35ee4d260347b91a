"""bins.py: files that are the text itself, checks on opening, batches as a pure function of (seed, epoch, batch)."""
import json
import os

import numpy as np
import pytest
from conftest import snapshot, write_dataset

from configurator import UserError
from corpus import bins
from corpus.bins import Bin, BinWriter, batch_starts, n_blocks, open_bin, permute
from corpus.data import open_split


def edit_meta(data_dir, change):
    path = os.path.join(data_dir, 'toy', 'meta.json')
    with open(path) as f:
        meta = json.load(f)
    change(meta)
    with open(path, 'w') as f:
        json.dump(meta, f)


@pytest.fixture
def data(tmp_path):
    """A fresh data set that the test may damage: (data_dir, texts)."""
    return str(tmp_path), write_dataset(str(tmp_path), sizes=(9000, 500, 300))


# --- files ---

def test_byte_data_is_the_text_itself(data):
    """cmp and sha256sum must apply to train.bin, so no header and no change of a byte."""
    data_dir, texts = data
    for split, text in texts.items():
        with open(os.path.join(data_dir, 'toy', f'{split}.bin'), 'rb') as f:
            assert f.read() == text
        found = open_bin(data_dir, 'toy', split, verify=True)
        assert bytes(found.tokens) == text and found.text_bytes == len(text) and found.start_id == 10


def test_ids_are_little_endian(tmp_path):
    """uint16 data must read the same on every machine."""
    writer = BinWriter(str(tmp_path), 'train', 'uint16')
    writer.write([1, 258, 50256], text_bytes=7)
    entry = writer.commit()
    assert (tmp_path / 'train.bin').read_bytes() == b'\x01\x00\x02\x01\x50\xc4' and entry['tokens'] == 3
    assert entry['text_bytes'] == 7


def test_writer_refuses_ids_that_do_not_fit(tmp_path):
    """An id above the dtype must not wrap around silently: 300 would be stored as 44."""
    writer = BinWriter(str(tmp_path), 'train', 'uint8')
    with pytest.raises(UserError, match='300'):
        writer.write([1, 300])


def test_interrupted_writer_leaves_nothing_that_looks_finished(tmp_path):
    """Only commit makes a .bin appear, and without meta.json a folder is no data set."""
    writer = BinWriter(str(tmp_path / 'toy'), 'train')
    writer.write(b'half of it')
    writer.flush()
    assert not (tmp_path / 'toy' / 'train.bin').exists()
    with pytest.raises(UserError, match='no data set'):
        bins.read_meta(str(tmp_path), 'toy')
    writer.abort()
    assert os.listdir(tmp_path / 'toy') == []


def test_writer_resumes_at_a_recorded_byte(tmp_path):
    """A resumed prepare must neither repeat nor lose bytes, and its hash must be that of the whole file."""
    writer = BinWriter(str(tmp_path), 'train')
    writer.write(b'first part,')
    writer.flush()
    saved = writer.n_bytes
    writer.write(b'lost when the process died')
    writer.file.close()
    writer = BinWriter(str(tmp_path), 'train', resume_bytes=saved)
    writer.write(b' second part')
    entry = writer.commit()
    whole = (tmp_path / 'train.bin').read_bytes()
    assert whole == b'first part, second part' and entry['tokens'] == len(whole)
    assert entry['sha256'] == bins.sha256_file(tmp_path / 'train.bin')
    with pytest.raises(UserError, match='start again'):
        BinWriter(str(tmp_path), 'other', resume_bytes=5)


# --- bad input ---

def test_missing_data_set_names_the_command(tmp_path):
    """A missing data set must say how to make it."""
    with pytest.raises(UserError) as e:
        open_bin(str(tmp_path), 'wiki40b_en', 'train')
    assert 'wiki40b_en' in str(e.value) and 'prepare_wiki40b.py' in str(e.value)


@pytest.mark.parametrize('damage, words', [
    (lambda d: os.remove(f'{d}/toy/train.bin'),
     ('train.bin is missing', 'prepare_text.py --name=toy', "'--source=some text'")),
    (lambda d: os.truncate(f'{d}/toy/train.bin', 8000), ('8000 bytes', '9000 tokens', 'prepare_text.py')),
    (lambda d: edit_meta(d, lambda m: m.update(dtype='uint16')), ('9000 bytes', 'uint16', '18000')),
    (lambda d: edit_meta(d, lambda m: m.update(dtype='float32')), ("'float32'", 'uint8, uint16, uint32')),
    (lambda d: edit_meta(d, lambda m: m.update(vocab_size=100)), ('token id 12', 'vocabulary has 100')),
    (lambda d: edit_meta(d, lambda m: m.update(format='old')), ("'old'", 'nanomdl-bins-1')),
    (lambda d: open(f'{d}/toy/meta.json', 'w').write('{"format": '), ('meta.json', 'not valid JSON')),
    (lambda d: open(f'{d}/toy/meta.json', 'w').write('[]'), ('meta.json',)),
    (lambda d: edit_meta(d, lambda m: m['splits'].pop('train')), ("no split 'train'", 'val, test')),
], ids='missing truncated wrong-dtype unknown-dtype id-above-vocabulary foreign cut-meta list-meta no-split'.split())
def test_damaged_data_is_one_line_with_the_cure(data, damage, words):
    """Bad input: a missing or truncated .bin, wrong dtype, an id above the vocabulary; nothing on disk may change."""
    damage(data[0])
    before = snapshot(data[0])
    with pytest.raises(UserError) as e:
        open_bin(data[0], 'toy', 'train')
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)
    assert snapshot(data[0]) == before


def test_id_above_vocabulary_is_seen_at_the_far_end(data):
    """Ids are checked at both ends, so that a file written with another tokenizer is found."""
    with open(f'{data[0]}/toy/train.bin', 'r+b') as f:
        f.seek(-1, 2)
        f.write(b'\xff')
    edit_meta(data[0], lambda m: m.update(vocab_size=128))
    with pytest.raises(UserError, match='token id 255'):
        open_bin(data[0], 'toy', 'train')


def test_verify_finds_one_changed_byte(data):
    """Only the hash can see a flipped byte in the middle."""
    with open(f'{data[0]}/toy/train.bin', 'r+b') as f:
        f.seek(4567)
        f.write(b'\x00')
    open_bin(data[0], 'toy', 'train')
    with pytest.raises(UserError, match='SHA-256'):
        open_bin(data[0], 'toy', 'train', verify=True)


# --- rows ---

def test_first_input_is_the_start_id_and_every_target_has_the_byte_before():
    """Upstream never scores the first byte of a block; here T targets have T inputs, targets past the end are -1."""
    data = Bin(np.arange(1, 11, dtype=np.uint8), start_id=77)
    x, y = data.gather([0, 4, 8, -1], 4)
    assert x.tolist() == [[77, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 77], [77] * 4]
    assert y.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, -1, -1], [-1] * 4]
    assert data.n_scored([0, 4, 8, -1], 4) == 10 == int((y >= 0).sum())


@pytest.mark.parametrize('order', ('sequential', 'permuted'))
@pytest.mark.parametrize('n_tokens, block, batch', [(1, 8, 4), (64, 8, 4), (65, 8, 4), (1000, 7, 3), (31, 32, 2)])
def test_every_token_is_a_target_exactly_once_an_epoch(order, n_tokens, block, batch):
    """An epoch that skips or repeats blocks, the short last one included (docs/faults.md, 4, fault 7's off-by-one)."""
    data = Bin(np.arange(n_tokens, dtype=np.uint32), vocab_size=n_tokens)
    for epoch in (0, 1):
        seen = []
        for b in range(n_blocks(n_blocks(n_tokens, block), batch)):
            starts = batch_starts(order, 5, epoch, b, batch, n_tokens, block)
            x, y = data.gather(starts, block)
            assert data.n_scored(starts, block) == (y >= 0).sum()
            inner = (y > 0)
            assert (x[inner] == y[inner] - 1).all()             # the token before, across block borders too
            seen += y[y >= 0].tolist()
        assert sorted(seen) == list(range(n_tokens))
        if order == 'sequential':
            assert seen == list(range(n_tokens))


def test_epochs_and_seeds_differ_and_repeat():
    """Batches must be a pure function of (seed, epoch, batch): the same again, another order for others."""
    def of(seed, epoch):
        return np.concatenate([batch_starts('permuted', seed, epoch, b, 8, 8000, 10) for b in range(100)]).tolist()
    assert of(1, 0) == of(1, 0) and of(1, 0) != of(1, 1) and of(1, 0) != of(2, 0) and of(1, 0) != sorted(of(1, 0))


@pytest.mark.parametrize('n', (1, 2, 3, 5, 64, 65, 1000, 4097))
def test_keyed_permutation_is_a_bijection(n):
    """A permutation that is none would train on some blocks twice and on others never."""
    for key in (0, 2**64 - 1, 12345):
        assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


def test_permutation_of_ten_million_blocks_needs_no_table():
    """Wiki-40B's block count must not cost memory or give images outside the range."""
    n = 9_307_817_984 // 512
    images = permute(np.arange(n - 1000, n), n, 7)
    assert len(set(images.tolist())) == 1000 and images.min() >= 0 and images.max() < n
    assert abs(images.mean() / n - 0.5) < 0.1


def test_random_order_draws_whole_rows_everywhere():
    """'random' must stay inside the data, reach both ends and change with batch and epoch."""
    draws = np.concatenate([batch_starts('random', 1, 0, b, 64, 40, 8) for b in range(40)])
    assert draws.min() == 0 and draws.max() == 32 and len(set(draws.tolist())) == 33
    assert not np.array_equal(batch_starts('random', 1, 0, 0, 64, 4000, 8),
                              batch_starts('random', 1, 1, 0, 64, 4000, 8))
    assert batch_starts('random', 1, 0, 0, 4, 5, 8).tolist() == [0] * 4         # data shorter than a row


def test_gather_reads_only_its_rows_from_the_map(data):
    """docs/faults.md, 8: int64 data copied whole to every rank; tokens must stay a read-only map of the file."""
    found = open_bin(data[0], 'toy', 'train')
    assert isinstance(found.tokens, np.memmap) and found.tokens.dtype == np.uint8 and found.tokens.mode == 'r'
    assert isinstance(found.head(100).tokens, np.memmap) and found.head(100).n_tokens == 100 and found.head(0) is found
    assert found.gather([0, 64], 64)[0].shape == (2, 64)


def test_head_scales_text_bytes_of_bpe_data():
    """Bits per byte of a leading part need its share of the text bytes, and its identity must differ from the whole."""
    part = Bin(np.zeros(100, np.uint16), text_bytes=450, sha256='ab').head(10)
    assert part.text_bytes == 45 and part.sha256 == 'ab:10'


def test_empty_split_opens(tmp_path):
    """An empty split cannot be memory-mapped; opening must not crash."""
    write_dataset(str(tmp_path), sizes=(100, 0, 50))
    assert open_bin(str(tmp_path), 'toy', 'val').n_tokens == 0


# --- names from meta.json ---

HOSTILE = ('/etc/passwd', '../precious', 'sub/../../precious', 'sub/x.bin', '..', '', 7)


@pytest.mark.parametrize('name', HOSTILE, ids=str)
@pytest.mark.parametrize('field', ('file', 'index', 'mask', 'token_bytes'))
def test_a_meta_json_may_not_name_files_elsewhere(tmp_path, field, name):
    """A data set from a stranger whose train.bin is /etc/shadow: refused in one line when it is opened."""
    write_dataset(str(tmp_path))
    path = tmp_path / 'toy' / 'meta.json'
    meta = json.loads(path.read_text())
    meta['rows'] = dict(length=32, control='')              # asked for where there is a mask
    place = meta['tokenizer'] if field == 'token_bytes' else meta['splits']['train']
    place[field] = name
    path.write_text(json.dumps(meta))
    if field == 'token_bytes' and name == '':
        assert bins.open_bin(str(tmp_path), 'toy', 'train').n_tokens == 4096        # '' there: no table
        return
    with pytest.raises(UserError, match='meta.json names the file') as e:
        open_split(str(tmp_path), 'toy', 'train')
    assert '\n' not in str(e.value) and repr(name) in str(e.value)


@pytest.mark.parametrize('name', HOSTILE, ids=str)
@pytest.mark.parametrize('field', ('file', 'index', 'mask'))
def test_overwriting_a_data_set_deletes_nothing_elsewhere(tmp_path, field, name):
    """--overwrite deleted what the old meta.json named: refused before a byte is written, and at the end again."""
    write_dataset(str(tmp_path))
    (tmp_path / 'precious').write_text('mine')
    (tmp_path / 'toy' / 'sub').mkdir()
    path = tmp_path / 'toy' / 'meta.json'
    meta = json.loads(path.read_text())
    meta['splits']['train'][field] = name
    path.write_text(json.dumps(meta))
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match='meta.json names the file'):
        bins.may_write(str(tmp_path / 'toy'), 'prepare_text.py', ['--overwrite'], True)
    with pytest.raises(UserError, match='meta.json names the file'):
        bins.finish(str(tmp_path / 'toy'), 'prepare_text.py', [], {}, {})
    assert snapshot(tmp_path) == before


def test_a_broken_meta_json_can_be_overwritten(tmp_path):
    """Its cure is to prepare the data set again, which must not end in the same message after hours."""
    folder = str(tmp_path / 'toy')
    write_dataset(str(tmp_path))
    (tmp_path / 'toy' / 'meta.json').write_text('{"form')
    assert bins.may_write(folder, 'prepare_text.py', ['--name=toy', '--overwrite'], True) == ['--name=toy']
    writer = bins.BinWriter(folder, 'train')
    writer.write(b'new text')
    bins.finish(folder, 'prepare_text.py', [], {'train': writer}, {})
    assert bytes(bins.open_bin(str(tmp_path), 'toy', 'train').tokens) == b'new text'
