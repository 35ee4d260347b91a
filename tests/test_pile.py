"""prepare_pile.py on small shards in the Pile's format, written here: components, resumption, damage, one pass."""
import json
import os

import numpy as np
import pytest
import zstandard
from conftest import peak_memory, run_here
from test_prepare import byte_level_bpe

from configurator import UserError
from corpus import bins, documents
from corpus.data import open_split

SETS = {'PubMed Abstracts': 'pubmed', 'USPTO Backgrounds': 'uspto', 'Pile-CC': 'pile_cc'}
DOCUMENTS = [(f'Document {i}: ' + f'word{i % 7} ' * (i * 13 % 90) + 'é日本', list(SETS)[i // 2 % 3])
             for i in range(300)]


def write_shard(path, documents, keep=1.0):
    """Write a shard; keep < 1 cuts the compressed file there. Incompressible padding spreads the documents over it."""
    rng = np.random.default_rng(0)
    lines = [json.dumps(dict(text=text, meta=dict(pile_set_name=name), noise=rng.bytes(1500).hex()))
             for text, name in documents]
    data = zstandard.ZstdCompressor().compress('\n'.join(lines).encode())
    with open(path, 'wb') as f:
        f.write(data[:int(len(data) * keep)])


@pytest.fixture(autouse=True)
def shards(tmp_path, monkeypatch):
    """Three shards of 100 documents in the working directory, which is the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(os, 'fsync', lambda _: None)                    # saving after each document is slow enough
    for i in range(3):
        write_shard(f'{i}.jsonl.zst', DOCUMENTS[100 * i:100 * i + 100])


def prepare(*flags):
    run_here('prepare_pile.py', '--source=?.jsonl.zst', '--tokenizer=byte', '--val_fraction=0.2', '--test_fraction=0.2',
             *flags)


def texts(name, split='train'):
    with open(f'data/{name}/{split}.bin', encoding='utf-8') as f:
        return f.read().split('\n\n\n')


def content(*names):
    """Return everything that makes the data sets, without the recorded command line."""
    found = {}
    for name in names:
        for split in ('train', 'val', 'test'):
            with open(f'data/{name}/{split}.bin', 'rb') as f:
                found[name, split] = f.read(), bins.read_meta('data', name)['splits'][split]
    return found


def test_components_are_told_apart_in_one_pass_and_splits_are_disjoint():
    prepare('--subsets=pubmed,pile_cc')
    for component, name in (('PubMed Abstracts', 'pubmed'), ('Pile-CC', 'pile_cc')):
        parts = {s: texts(name, s) for s in ('train', 'val', 'test')}
        expected = [t for t, n in DOCUMENTS if n == component]
        assert sorted(sum(parts.values(), [])) == sorted(expected)
        assert parts['train'] == [t for t in expected if t in set(parts['train'])]      # the order of the stream
        assert 1 <= len(parts['val']) < 0.4 * len(expected)
        meta = bins.read_meta('data', name)
        assert meta['source']['component'] == component and meta['splits']['val']['documents'] == len(parts['val'])
        data = open_split('data', name, 'train', verify=True)
        starts = np.fromfile(f'data/{name}/train.index.bin', '<u8')
        assert starts.tolist() == [0, *(np.cumsum([len(t.encode()) + 3 for t in parts['train']])[:-1])]
        assert data.index.endswith('train.index.bin') and data.head(9).index == data.index
    assert not os.path.exists('data/uspto') and not os.path.exists('data/pubmed/resume.json')


def test_bpe_has_end_of_text_between_documents_or_the_published_recipe():
    tok = byte_level_bpe('tokenizer.json', [t for t, _ in DOCUMENTS])
    end = tok.token_to_id('<|endoftext|>')
    prepare('--subsets=pubmed', '--tokenizer=tokenizer.json')
    prepare('--subsets=pubmed', '--tokenizer=tokenizer.json', '--no-eot', '--prefix=plain_')
    ids, plain = (open_split('data', n, 'train', verify=True) for n in ('pubmed', 'plain_pubmed'))
    entry = bins.read_meta('data', 'pubmed')['splits']['train']
    n_documents = entry['documents']
    assert (ids.tokens == end).sum() == n_documents - 1 and np.array_equal(ids.tokens[ids.tokens != end], plain.tokens)
    prepare('--subsets=pubmed', '--prefix=bytes_')
    whole = ''.join(texts('bytes_pubmed'))
    assert entry['words'] == sum(len(t.split()) for t in texts('bytes_pubmed')) == ids.count_words()
    assert tok.decode(plain.tokens.tolist()) == whole and plain.text_bytes == ids.text_bytes == len(whole.encode())


def test_max_tokens_cuts_each_component_exactly():
    prepare('--subsets=pubmed,uspto')
    whole = content('pubmed', 'uspto')
    prepare('--subsets=pubmed,uspto', '--max_tokens=8000', '--overwrite', '--save_every=0')
    cut = content('pubmed', 'uspto')
    for name in ('pubmed', 'uspto'):
        assert cut[name, 'train'][0] == whole[name, 'train'][0][:8000]
        assert whole[name, 'val'][0].startswith(cut[name, 'val'][0])
        assert bins.read_meta('data', name)['splits']['train']['text_bytes'] == 8000


@pytest.mark.parametrize('stop_at', [1, 99, 150, 260])
@pytest.mark.parametrize('max_tokens', [0, 8000])
def test_interrupted_preparation_continues_to_the_same_bytes(stop_at, max_tokens, monkeypatch):
    flags = ('--subsets=pubmed,uspto', f'--max_tokens={max_tokens}', '--save_every=0')
    prepare(*flags, '--data_dir=whole')
    reader, n_read = documents.records_of, [0]

    def interrupted(path):
        for record in reader(path):
            n_read[0] += 1
            if n_read[0] > stop_at:
                raise KeyboardInterrupt
            yield record
    monkeypatch.setattr(documents, 'records_of', interrupted)
    try:
        prepare(*flags)
    except KeyboardInterrupt:
        assert not [n for n in os.listdir('data/pubmed') if n.endswith('.bin') or n == 'meta.json']
        with open('data/pubmed/resume.json') as f:
            assert json.load(f)['record'] == (stop_at - 1) % 100 + 1
    monkeypatch.setattr(documents, 'records_of', reader)
    prepare(*flags)
    for name in ('pubmed', 'uspto'):
        whole, mine = (bins.read_meta(folder, name)['splits'] for folder in ('whole', 'data'))
        assert whole == mine and open_split('data', name, 'val', verify=True)
        for split in whole:
            with open(f'whole/{name}/{split}.index.bin', 'rb') as f, open(f'data/{name}/{split}.index.bin', 'rb') as g:
                assert f.read() == g.read()
    stamp = os.stat('data/pubmed/train.bin').st_mtime_ns
    prepare(*flags)                                                     # a finished set is checked, not made again
    assert os.stat('data/pubmed/train.bin').st_mtime_ns == stamp


def test_other_knobs_do_not_continue_an_older_state(monkeypatch):
    """Training bytes chosen by one seed must never be joined to those of another."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bins, 'finish', lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare('--subsets=pubmed')
    flags = '--source=?.jsonl.zst', '--subsets=pubmed', '--tokenizer=byte', '--val_fraction=0.1', '--seed=1'
    for folder in ('data', 'other'):
        run_here('prepare_pile.py', *flags, f'--data_dir={folder}')
    assert bins.read_meta('data', 'pubmed')['splits'] == bins.read_meta('other', 'pubmed')['splits']


def test_a_shard_cut_in_half_is_named_and_what_was_read_is_kept(capsys):
    write_shard('1.jsonl.zst', DOCUMENTS[100:200], keep=0.5)
    with pytest.raises(UserError, match=r'1\.jsonl\.zst.*1 whole shards and \d+ documents of this one are kept'):
        prepare('--subsets=pubmed')
    assert not os.path.exists('data/pubmed/meta.json')
    prepare('--subsets=pubmed', '--skip_broken=True')
    out = capsys.readouterr().out
    assert 'going on from' in out and '1 of 3 shards are broken, their ends are missing: 1.jsonl.zst' in out
    found = set(sum((texts('pubmed', s) for s in bins.split_names('data', 'pubmed')), []))
    rest = {t for t, n in DOCUMENTS[:100] + DOCUMENTS[200:] if n == 'PubMed Abstracts'}
    assert rest <= found and len(found) > len(rest) and bins.read_meta('data', 'pubmed')['source']['broken']
    write_shard('1.jsonl.zst', DOCUMENTS[100:200])                      # mended: all of it, as if nothing had happened
    prepare('--subsets=pubmed', '--overwrite')
    assert len(set(sum((texts('pubmed', s) for s in ('train', 'val', 'test')), []))) == 100


def test_mended_shard_goes_on_from_where_it_broke():
    prepare('--subsets=pubmed', '--data_dir=whole')
    write_shard('1.jsonl.zst', DOCUMENTS[100:200], keep=0.5)
    with pytest.raises(UserError):
        prepare('--subsets=pubmed')
    write_shard('1.jsonl.zst', DOCUMENTS[100:200])
    prepare('--subsets=pubmed')
    assert bins.read_meta('whole', 'pubmed')['splits'] == bins.read_meta('data', 'pubmed')['splits']


def test_local_hub_layout_and_a_mirror_without_names(tmp_path):
    import pyarrow
    import pyarrow.parquet
    for folder, columns in (('mirror', {}), ('named', dict(meta=[dict(pile_set_name=n) for _, n in DOCUMENTS]))):
        os.mkdir(folder)
        table = pyarrow.table(dict(text=[t for t, _ in DOCUMENTS], **columns))
        pyarrow.parquet.write_table(table, f'{folder}/train-0.parquet')
    prepare('--subsets=uspto', f'--source={tmp_path}/named')
    n = sum(len(texts('uspto', s)) for s in ('train', 'val', 'test'))
    assert n == sum(name == 'USPTO Backgrounds' for _, name in DOCUMENTS)
    prepare('--subsets=pubmed', f'--source={tmp_path}/mirror', '--whole_source')
    assert sum(len(texts('pubmed', s)) for s in ('train', 'val', 'test')) == 300
    with pytest.raises(UserError, match="no column 'meta'.*--whole_source"):
        prepare('--subsets=pile_cc', f'--source={tmp_path}/mirror')


@pytest.mark.parametrize('flags, message', [
    (['--subsets=pubmet'], r"'pubmet'.*'pubmed', 'pubmed_central'.*did you mean 'pubmed'"), ([], 'subsets is empty'),
    (['--subsets=arxiv'], r'no document of arxiv \(ArXiv\)'),
    (['--subsets=pubmed', '--val_fraction=-1'], 'val_fraction = -1'),
    (['--subsets=pubmed', '--val_fraction=1e-9'], 'val of pubmed.*--val_fraction'),
    (['--subsets=pubmed', '--source=./none/*.zst'], 'no file matches'),
    (['--subsets=pubmed,uspto', '--whole_source'], 'takes one component')])
def test_bad_input_is_one_line(flags, message):
    with pytest.raises(UserError, match=message) as e:
        prepare(*flags)
    assert '\n' not in str(e.value)
    assert not os.path.exists('data') or not [n for _, _, names in os.walk('data') for n in names if n == 'meta.json']


def test_records_without_names_point_to_whole_source():
    with open('x.jsonl', 'w') as f:
        f.write('{"text": "a deduplicated Pile has no names"}\n')
    with pytest.raises(UserError, match='no meta.pile_set_name.*--whole_source'):
        prepare('--subsets=pubmed', '--source=x.jsonl')


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='RssAnon is Linux')
def test_memory_does_not_grow_with_the_stream():
    """Anonymous memory over shards of 3 and of 60 MB differs by a fraction of the text."""
    rng, peaks = np.random.default_rng(0), []
    for megabytes in (3, 60):
        records = (json.dumps(dict(text=f'{i} {rng.bytes(2400).hex()}', meta=dict(pile_set_name=list(SETS)[i % 3])))
                   for i in range(200 * megabytes))
        with open('big.jsonl.zst', 'wb') as f, zstandard.ZstdCompressor().stream_writer(f) as out:
            for record in records:
                out.write(record.encode() + b'\n')
        peaks.append(peak_memory('prepare_pile.py', '--source=big.jsonl.zst', '--subsets=pubmed,uspto',
                                 '--tokenizer=byte', '--test_fraction=0.1', f'--prefix=m{megabytes}_'))
    assert peaks[1] - peaks[0] < 20, peaks
