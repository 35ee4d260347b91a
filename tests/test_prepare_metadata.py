"""prepare_metadata.py: rows, pairs, resuming, bad records, --annotate; records made here."""
import collections
import gzip
import json
import os

import numpy as np
import pytest
import zstandard
from conftest import peak_memory, run_here, snapshot

from configurator import UserError
from corpus import bins, documents, metadata, rows
from corpus.data import open_split

WORDS = 'a byte of text has its price and each zero is free until the model pays for what it knows'.split()


def item(key, value, start=None, end=None, **more):
    """A global item, or a local one where it has a span."""
    if start is None:
        return dict(key=key, type='global', value=value)
    return dict(key=key, type='local', char_start_idx=start, char_end_idx=end, value=value, **more)


def tag(name, start, end, open_at=None, close_at=None, **attrs):
    return item('html', name, start, end, relative_start_pos=open_at, relative_end_pos=close_at,
                html_attrs=dict(attrs=[a.rstrip('_') for a in attrs], values=list(attrs.values())))


def rendered(text, *items):
    kinds = collections.defaultdict(list)
    for i in items:
        kinds[i['key']].append(i)
    return ''.join(s for s, _ in metadata.segments_of(text, kinds, metadata.TYPES))


# --- rows ---

def make_records(n, seed=0):
    """Plain records with url and title, of very different lengths; each third has in-line tags in the record format."""
    rng, found = np.random.default_rng(seed), []
    for i in range(n):
        text = ' '.join(rng.choice(WORDS, rng.integers(4, 60)))
        url, title = f'https://site{i % 5}.org/2019/0{i % 9 + 1}/{WORDS[i % len(WORDS)]}', f'No. {i} on {text[:12]}'
        if i % 3:
            found.append(dict(text=text, url=url, title=title))
        else:
            cut = text.index(' ') + 1
            tags = [tag('b', 0, cut - 1, 1, 0), tag('p', 0, len(text), 0, 0, id='x'), tag('br', cut, cut, 0, 1)]
            found.append(dict(text=text, metadata=[item('url', url), item('title', title), *tags]))
    return found


def write_jsonl(path, records):
    opener = {'.gz': gzip.open, '.zst': zstandard.open}.get(os.path.splitext(path)[1], open)
    with opener(path, 'wt', encoding='utf-8') as f:
        f.writelines(json.dumps(r) + '\n' for r in records)
    return path


@pytest.fixture
def prepare(tmp_path):
    """Prepare 120 records as byte rows of 96 in this process; returns the set's folder."""
    source = write_jsonl(str(tmp_path / 'records.jsonl.gz'), make_records(120))

    def call(*flags, name='meta'):
        run_here('prepare_metadata.py', f'--source={source}', '--types=url,title,html', '--tokenizer=byte',
                 '--block_size=96',
                 '--val_fraction=0.3', '--test_fraction=0.1', '--num_proc=1', f'--name={name}',
                 f'--data_dir={tmp_path}', *flags)
        return str(tmp_path / name)
    return call


def rows_of(folder, split='train'):
    return open_split('', folder, split, verify=True)


def contents(folder):
    """The data files of a set, without meta.json."""
    return {name: data for name, data in snapshot(folder).items() if name != 'meta.json'}


def test_rows_hold_each_text_once_behind_its_repeated_prefix(prepare):
    """Text tokens of a document's rows join to its text; each piece starts with its prefix; documents never mix."""
    rows, by_text = rows_of(prepare('--metadata_probability=1')), {}
    ids, mask = rows.rows_at(np.arange(0, rows.n_tokens, 96), 96)
    starts = np.fromfile(rows.index, '<u8').astype(int) // 96
    for r in make_records(120):
        by_text[r['text']] = metadata.read_record(r, 'x')[1]
    for first, last in zip(starts, [*starts[1:], len(ids)]):
        text = bytes(ids[first:last][mask[first:last] == 1].astype(np.uint8)).decode()
        items = by_text[text.lstrip(' ')]
        prefixes = {bytes(i[m == 2].astype(np.uint8)).decode() for i, m in zip(ids[first:last], mask[first:last])}
        given = [[t for t in ('url', 'title') if t in which] for which in (['url'], ['title'], ['url', 'title'], [])]
        assert len(prefixes) == 1
        assert next(iter(prefixes)) in [p if len(p) <= 48 else p[:44] + ' |||'
                                        for p in (metadata.prefix_of(items, g) for g in given)]
        assert (text[0] == ' ') == (prefixes != {''})                   # a text behind a prefix has a leading space
        for row in mask[first:last]:                                    # prefix, then text and markup, then padding
            assert ''.join('p' if k == 2 else '0' if k == 0 else 't' for k in row).strip('0').lstrip('p').strip(
                't') == '' and (row == 1).any()
    assert len(starts) == rows.entry['documents']
    assert rows.n_targets == (mask == 1).sum() == rows.text_bytes and set(np.unique(mask)) == {0, 1, 2, 3}


def test_prefix_is_neither_scored_nor_lost(prepare):
    """gather: inputs are the row shifted by the start id; targets are -1 but for text, or text and markup."""
    rows = rows_of(prepare())
    starts = np.array([0, 96 * 3, -1])
    ids, mask = rows.rows_at(starts, 96)
    for loss_on, kinds in (('text', [1]), ('text+markup', [1, 3])):
        x, y = rows.scoring(loss_on).gather(starts, 96)
        assert (x[:, 0] == 10).all() and (x[:, 1:] == ids[:, :-1]).all()
        assert (y == np.where(np.isin(mask, kinds), ids, -1)).all() and (y[2] == -1).all()
        assert rows.scoring(loss_on).n_scored(starts, 96) == (y >= 0).sum()
    part = rows.head(96 * 5 + 7)
    assert part.n_tokens == 96 * 5 and part.n_targets == part.n_scored(np.arange(0, 480, 96), 96) == part.text_bytes
    with pytest.raises(UserError, match='rows of 96 tokens, asked for 64'):
        rows.gather([0], 64)


def test_probability_zero_is_the_control_none(prepare):
    """The plain baseline: the same documents, bit for bit the rows that a probability of 0 makes; pairs as ever."""
    zero, none, half = (contents(prepare(*flags, name=name)) for name, flags in dict(
        zero=['--metadata_probability=0'], none=['--control=none'], half=[]).items())
    assert zero == none and none['train.bin'] != half['train.bin']
    assert {n: v for n, v in none.items() if n.startswith('pairs')} == {n: v for n, v in half.items()
                                                                       if n.startswith('pairs')}


def test_samecontext_hides_what_metadata_would_take(prepare):
    """The same text in the same rows, ending at the same place, and padding where prefix and markup would be."""
    made, hidden = (rows_of(prepare('--metadata_probability=0.7', *flags, name=name)) for name, flags in dict(
        made=[], hidden=['--control=samecontext']).items())
    assert made.n_tokens == hidden.n_tokens and hidden.padded and not made.padded
    (ids, mask), (h_ids, h_mask) = (r.rows_at(np.arange(0, r.n_tokens, 96), 96) for r in (made, hidden))
    for i, m, hi, hm in zip(ids, mask, h_ids, h_mask):
        assert (i[m == 1] == hi[hm == 1]).all() and (m > 0).sum() == np.flatnonzero(hm)[-1] + 1
        assert set(np.unique(hm)) <= {0, 1} and (hi[hm == 0] == 10).all()
    x, y = hidden.gather(np.arange(0, hidden.n_tokens, 96), 96)
    left = np.argmax(h_mask > 0, 1)
    assert left.max() > 20 and all((row[:n] == -1).all() and row[n] == 10 for row, n in zip(x, left))


@pytest.mark.parametrize('tokenizer', ['byte', 'bpe'])
def test_pairs_score_the_same_targets(prepare, tokenizer, tmp_path):
    """Over the whole set: every arm scores the same ids in the same order, never a prefix, never a row's first text."""
    if tokenizer == 'bpe':
        from tokenizers import ByteLevelBPETokenizer
        learned = ByteLevelBPETokenizer()
        learned.train_from_iterator([' '.join(WORDS)] * 3, vocab_size=320, min_frequency=1,
                                    special_tokens=['<|endoftext|>'])
        learned.save(tokenizer := str(tmp_path / 'bpe.json'))
    folder = prepare(f'--tokenizer={tokenizer}', '--overwrite')
    pairs = bins.read_meta('', folder)['pairs']
    assert set(pairs) == {'url', 'title', 'html', 'all'} and set(pairs['html']) == {'with', 'without'}
    for arms in pairs.values():
        targets, n_seen = {}, {}
        for arm, split in arms.items():
            rows = rows_of(folder, split)
            starts = np.arange(0, rows.n_tokens, 96)
            ids, mask = rows.rows_at(starts, 96)
            y = rows.gather(starts, 96)[1]
            targets[arm], n_seen[arm] = [row[row >= 0].tolist() for row in y], (mask == 2).sum()
            for row in mask:
                assert row[0] != 1 and (row == 1).any()
        assert all(t == targets['with'] for t in targets.values()) and n_seen['with'] >= n_seen['without'] > 0
    without, url = (rows_of(folder, pairs['url'][arm]) for arm in ('without', 'with'))
    assert 0.9 < url.n_targets / (rows_of(folder, 'val').entry['scored']['text']) < 1 and without.index


def test_rows_do_not_depend_on_processes_or_interruptions(prepare, tmp_path, monkeypatch):
    """Two processes and a hub layout make what one and jsonl make; a run cut off anywhere goes on to the same files."""
    whole = contents(prepare(name='whole'))
    os.mkdir(tmp_path / 'hub')
    write_jsonl(str(tmp_path / 'hub' / 'train.jsonl'), make_records(120))
    assert contents(prepare(f'--source={tmp_path / "hub"}', name='from_hub')) == whole
    assert contents(prepare('--num_proc=2', name='two')) == whole
    real, calls = rows.RowWriter.write, [0]

    def write(self, *args):
        calls[0] += 1
        if calls[0] in (60, 150):                                       # within a document, whose saved state is older
            raise KeyboardInterrupt
        return real(self, *args)
    monkeypatch.setattr(rows.RowWriter, 'write', write)
    monkeypatch.setattr(os, 'fsync', lambda descriptor: None)           # 22 files after each document: 17 s
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare('--save_every=0', name='cut')
        assert not os.path.exists(tmp_path / 'cut' / 'meta.json')
    assert contents(prepare('--save_every=0', name='cut')) == whole and calls[0] > 120


def test_passes_draw_anew_and_max_bytes_stops(prepare):
    """Two passes are two draws of each training document; val and test stay single."""
    one, two = (bins.read_meta('', prepare(f'--passes={n}', name=f'p{n}')) for n in (1, 2))
    assert two['splits']['train']['text_bytes'] > 1.99 * one['splits']['train']['text_bytes'] - 200
    assert two['splits']['val']['sha256'] == one['splits']['val']['sha256']
    few = bins.read_meta('', prepare('--max_bytes=2000', name='few'))['splits']
    assert 2000 <= few['train']['text_bytes'] < 2600 and few['val'] == one['splits']['val']


@pytest.mark.parametrize('flags, message', [
    (['--types=url,titel'], "types = 'titel', expected one of 'url'.*did you mean 'title'"),
    (['--types='], 'types is empty, expected some of url'),
    (['--types=url,entity', '--name=b'], 'entity of types = .* occurs in none of 120 records'),
    (['--block_size=8'], 'block_size = 8 is too short for a prefix and text, expected more than 9'),
    (['--control=same'], 'control = .*samecontext'), (['--source=nothing*.jsonl'], 'no file matches'),
    (['--type_weights=url:1'], 'expected a number above 0 for each of url,title,html'),
    (['--annotate'], 'expected a path.jsonl.gz with --annotate')])
def test_bad_input_is_one_line(prepare, tmp_path, flags, message):
    """Value, expectation, cure; nothing that looks finished is left."""
    with pytest.raises(UserError, match=message) as e:
        prepare(*flags)
    assert '\n' not in str(e.value).replace('\n  ', '')
    assert os.listdir(tmp_path) == ['records.jsonl.gz']


def test_broken_lines_stop_or_are_counted(prepare, tmp_path):
    """Invalid JSON, a record without text and a timestamp of no date: named with file and line, or left out."""
    lines = [json.dumps(r) for r in make_records(60)]
    lines[7:7] = ['{"text": ', json.dumps(dict(url='u')), '[1]']
    path = tmp_path / 'broken.jsonl'
    path.write_text('\n'.join(lines))
    with pytest.raises(UserError, match=r'broken\.jsonl:8 is not JSON.*--skip_broken=True'):
        prepare(f'--source={path}')
    folder = prepare(f'--source={path}', '--skip_broken=True', '--overwrite')
    meta, clean = bins.read_meta('', folder), write_jsonl(str(tmp_path / 'clean.jsonl.zst'), make_records(60))
    assert meta['rows']['broken'] == 3 and meta['rows']['records'] == 60
    assert contents(prepare(f'--source={clean}', name='clean')) == contents(folder)


def test_annotate_writes_the_record_format(tmp_path, prepare):
    """Pages and plain records become records; reading them gives what annotating on the fly gave."""
    with gzip.open(tmp_path / 'a.html.gz', 'wt') as f:
        f.write('<title>T</title><body><p>Hello <b>you</b></p>')
    plain = write_jsonl(str(tmp_path / 'plain.jsonl'), make_records(30)[1:3])
    for source, out in ((tmp_path / '*.html.gz', tmp_path / 'page.jsonl.gz'), (plain, tmp_path / 'plain.jsonl.gz')):
        run_here('prepare_metadata.py', '--annotate', f'--source={source}', f'--out={out}')
    (_, page), = documents.records_of(str(tmp_path / 'page.jsonl.gz'))
    text, items = metadata.read_record(page, 'x')
    assert text == 'Hello you' and rendered(text, *items['html']) == '<p>Hello <b>you</b></p>'
    for (_, made), record in zip(documents.records_of(str(tmp_path / 'plain.jsonl.gz')), make_records(30)[1:3]):
        assert metadata.read_record(made, 'x') == metadata.read_record(record, 'x')


def test_a_damaged_mask_is_named(prepare):
    """A mask of another length would shift what is scored."""
    folder = prepare()
    with open(os.path.join(folder, 'val.mask.bin'), 'ab') as f:
        f.write(b'1')
    with pytest.raises(UserError, match='val.mask.bin has .* expected one for each of .*prepare_metadata.py'):
        rows_of(folder, 'val')


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='RssAnon is Linux')
def test_memory_does_not_grow_with_the_source(tmp_path):
    """Anonymous memory while 2 and 20 MB of records are prepared differs by a fraction of the text."""
    peaks = []
    for n in (400, 4000):
        records = [dict(text=f'{i} ' + ' '.join(WORDS) * 55, title=f'No. {i}') for i in range(n)]
        path = write_jsonl(str(tmp_path / f'{n}.jsonl'), records)
        peaks.append(peak_memory('prepare_metadata.py', f'--source={path}', '--types=title', '--tokenizer=byte',
                                 f'--name=m{n}', '--num_proc=1', f'--data_dir={tmp_path}', '--pair_documents=50'))
    assert peaks[1] - peaks[0] < 6, peaks
