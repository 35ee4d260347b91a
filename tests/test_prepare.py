"""prepare_*.py offline, on small data sets in the real on-disk formats; every text is made here."""
import gzip
import hashlib
import json
import os
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import peak_memory, run_here, run_script

import prepare_wiki40b
from configurator import UserError
from corpus import bins, tfrecord, tokens, writer
from corpus.data import open_split

ARTICLES = [f'\n_START_ARTICLE_\nNo. {i}\n_START_PARAGRAPH_\nCafé "{i}" isn\'t \\n 日本'.encode()
            + b' word' * (i * 37 % 400) for i in range(60)]
PARTS = dict(train=ARTICLES[:40], validation=ARTICLES[40:50], test=ARTICLES[50:])


def read(*parts):
    with open(os.path.join(*map(str, parts)), 'rb') as f:
        return f.read()


def splits_of(folder):
    return bins.read_meta('', str(folder))['splits']


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No hub, no TFDS folder of the user's, and the working directory is the test's own."""
    for key in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE'):
        monkeypatch.setenv(key, '1')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'none'))
    monkeypatch.chdir(tmp_path)


# --- writers of the formats, independent of the readers ---

def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def length_delimited(number, data):
    n, size = len(data), b''
    while n > 127:
        size, n = size + bytes([n & 127 | 128]), n >> 7
    return bytes([number << 3 | 2]) + size + bytes([n]) + data


def example(text, **more):
    feature = lambda v: length_delimited(1, length_delimited(1, v))                                  # noqa: E731
    items = (*more.items(), ('text', text))
    entries = [length_delimited(1, k.encode()) + length_delimited(2, feature(v)) for k, v in items]
    return length_delimited(1, b''.join(length_delimited(1, e) for e in entries))


def write_tfds(root, form='tfrecord', lengths=None):
    folder = os.path.join(str(root), 'wiki40b', 'en', '1.3.0')
    os.makedirs(folder)
    lengths = lengths or dict(train=[15, 0, 25], validation=[10], test=[10])
    for split, sizes in lengths.items():
        start = 0
        for i, n in enumerate(sizes):
            path = os.path.join(folder, f'wiki40b-{split}.{form}-{i:05d}-of-{len(sizes):05d}')
            records = [example(a, wikidata_id=b'Q1', version_id=b'7') for a in PARTS[split][start:start + n]]
            start += n
            if form == 'array_record':
                from array_record.python.array_record_module import ArrayRecordWriter
                writer = ArrayRecordWriter(path, 'group_size:1')
                for r in records:
                    writer.write(r)
                writer.close()
            else:
                with open(path, 'wb') as f:
                    for r in records:
                        head = struct.pack('<Q', len(r))
                        f.write(head + struct.pack('<I', crc32c(head)) + r + struct.pack('<I', crc32c(r)))
    template = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
    splits = [dict(name=s, shardLengths=[str(n) for n in sizes], numBytes='1', filepathTemplate=template)
              for s, sizes in lengths.items()]
    info = dict(name='wiki40b', version='1.3.0', configName='en', fileFormat=form, splits=splits,
                moduleName='tensorflow_datasets.text.wiki40b')
    text = dict(pythonClassName='tensorflow_datasets.core.features.text_feature.Text', text={})
    features = dict(pythonClassName='tensorflow_datasets.core.features.features_dict.FeaturesDict',
                    featuresDict=dict(features={k: text for k in ('text', 'version_id', 'wikidata_id')}))
    for name, value in (('dataset_info.json', info), ('features.json', features)):
        with open(os.path.join(folder, name), 'w') as f:
            json.dump(value, f)
    return folder


def write_hub(root, texts, n_train=2, counts=None):
    """A hub layout: parquet shards, and a card with the configuration `en` and its article counts."""
    import pyarrow
    import pyarrow.parquet
    os.makedirs(os.path.join(root, 'en'))
    card = ['---', 'dataset_info:', '- config_name: en']
    card += ['  features:', '  - name: text', '    dtype: string', '  splits:']
    for split, part in texts.items():
        n = n_train if split == 'train' else 1
        for i in range(n):
            rows = part[len(part) * i // n:len(part) * (i + 1) // n]
            path = os.path.join(root, 'en', f'{split}-{i:05d}-of-{n:05d}.parquet')
            pyarrow.parquet.write_table(pyarrow.table(dict(text=rows)), path)
        card += [f'  - name: {split}', '    num_bytes: 1', f'    num_examples: {(counts or {}).get(split, len(part))}']
    card += ['configs:', '- config_name: en', '  data_files:']
    card += [line for s in texts for line in (f'  - split: {s}', f'    path: en/{s}-*')] + ['---', '']
    with open(os.path.join(root, 'README.md'), 'w') as f:
        f.write('\n'.join(card))
    return str(root)


def write_jsonl(path, texts, **more):
    data = ''.join(json.dumps(dict(text=t, **more)) + '\n' for t in texts).encode()
    path = str(path)
    if path.endswith('.zst'):
        import zstandard
        half = len(data) // 2                               # two frames: pzstd and appended files have several
        data = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    elif path.endswith('.gz'):
        data = gzip.compress(data)
    with open(path, 'wb') as f:
        f.write(data)
    return path


def nothing_finished(folder):
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return not [n for n in names if n.endswith('.bin') or n == 'meta.json']


# --- prepare_sample.py ---

def test_sample_splits_share_no_paragraph_and_refresh(capsys):
    run_here('prepare_sample.py')
    first = {s: read('data/sample', f'{s}.bin') for s in ('train', 'val', 'test')}
    total = sum(map(len, first.values()))
    assert all(0.07 < len(first[s]) / total < 0.1 for s in ('val', 'test'))
    assert open_split('data', 'sample', 'val', verify=True).n_tokens == len(first['val'])
    topics = bins.read_meta('data', 'sample')['source']['topics']
    assert len(set(sum(topics.values(), []))) == sum(map(len, topics.values()))
    paragraphs = {s: {' '.join(p.split()) for p in t.decode().split('\n\n') if len(p) > 80} for s, t in first.items()}
    assert not paragraphs['val'] & paragraphs['train']
    assert not paragraphs['test'] & (paragraphs['train'] | paragraphs['val'])
    stamp = os.stat('data/sample/meta.json').st_mtime_ns
    run_here('prepare_sample.py')
    assert os.stat('data/sample/meta.json').st_mtime_ns == stamp
    with open('data/sample/val.bin', 'ab') as f:
        f.write(b'x')
    run_here('prepare_sample.py')
    assert read('data/sample/val.bin') == first['val']
    with pytest.raises(UserError, match='--overwrite'):
        run_here('prepare_sample.py', '--seed=5')


# --- prepare_wiki40b.py ---

@pytest.mark.parametrize('form', ['tfrecord', 'array_record'])
def test_wiki40b_reads_tfds_folders(tmp_path, form, capsys):
    folder = write_tfds(tmp_path / 'tfds', form)
    run_here('prepare_wiki40b.py', f'--tfds_dir={tmp_path / "tfds"}')
    for split, ours in prepare_wiki40b.SPLITS.items():
        assert read('data/wiki40b_en', f'{ours}.bin') == b''.join(PARTS[split])
    entry = splits_of('data/wiki40b_en')['train']
    assert entry['documents'] == 40 and entry['sha256'] == hashlib.sha256(b''.join(PARTS['train'])).hexdigest()
    assert 'not the published full split' in capsys.readouterr().out
    assert sorted(os.listdir('data/wiki40b_en')) == ['meta.json', 'test.bin', 'train.bin', 'val.bin']
    if form == 'array_record':                                          # the trusted reader agrees
        tfds = pytest.importorskip('tensorflow_datasets')
        rows = tfds.builder_from_directory(folder).as_data_source('train')
        assert [r['text'] for r in rows] == PARTS['train']


def test_wiki40b_interrupted_and_resumed_gives_the_same_bytes(tmp_path, monkeypatch):
    write_tfds(tmp_path / 'tfds', lengths=dict(train=[10, 10, 10, 10], validation=[10], test=[10]))
    read_records, seen = tfrecord.tfrecords, []

    def interrupted(path):
        for n, record in enumerate(read_records(path)):
            if '00002-of' in path and n == 4:
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(tfrecord, 'tfrecords', interrupted)
    argv = [f'--tfds_dir={tmp_path / "tfds"}']
    with pytest.raises(KeyboardInterrupt):
        run_here('prepare_wiki40b.py', *argv)
    assert nothing_finished('data/wiki40b_en') and os.path.exists('data/wiki40b_en/train.bin.tmp')

    def counted(path):
        seen.append(os.path.basename(path))
        return read_records(path)

    monkeypatch.setattr(tfrecord, 'tfrecords', counted)
    run_here('prepare_wiki40b.py', *argv)
    assert [s for s in seen if 'train' in s] == [f'wiki40b-train.tfrecord-0000{i}-of-00004' for i in (2, 3)]
    assert read('data/wiki40b_en/train.bin') == b''.join(PARTS['train'])
    assert splits_of('data/wiki40b_en')['train']['sha256'] == hashlib.sha256(b''.join(PARTS['train'])).hexdigest()
    assert splits_of('data/wiki40b_en')['train']['documents'] == 40
    assert sorted(os.listdir('data/wiki40b_en')) == ['meta.json', 'test.bin', 'train.bin', 'val.bin']


@pytest.mark.parametrize('damage, message', [
    ('truncate', 'truncated'), ('length', 'damaged'), ('lost', 'shards of train'), ('foreign', 'no feature'),
    ('count', '25 articles, expected 24')])
def test_wiki40b_damaged_folder(tmp_path, damage, message):
    folder = write_tfds(tmp_path / 'tfds')
    shard = os.path.join(folder, 'wiki40b-train.tfrecord-00002-of-00003')
    data = bytearray(read(shard))
    if damage == 'lost':
        os.remove(shard)
    elif damage == 'count':
        info = json.loads(read(folder, 'dataset_info.json'))
        info['splits'][0]['shardLengths'][2] = '24'
        with open(os.path.join(folder, 'dataset_info.json'), 'w') as f:
            json.dump(info, f)
    else:
        if damage == 'length':
            data[1] ^= 1
        record = example(b'').replace(b'text', b'html')
        head = struct.pack('<Q', len(record))
        foreign = head + struct.pack('<I', crc32c(head)) + record + bytes(4)
        with open(shard, 'wb') as f:
            f.write(data[:-7] if damage == 'truncate' else foreign if damage == 'foreign' else data)
    with pytest.raises(UserError, match=message):
        run_here('prepare_wiki40b.py', f'--tfds_dir={tmp_path / "tfds"}')
    assert nothing_finished('data/wiki40b_en')


def test_wiki40b_max_bytes_and_refusals(tmp_path):
    write_tfds(tmp_path / 'tfds')
    argv = [f'--tfds_dir={tmp_path / "tfds"}', '--max_bytes=2000', '--max_eval_bytes=300']
    run_here('prepare_wiki40b.py', *argv)
    assert read('data/wiki40b_en/train.bin') == b''.join(PARTS['train'])[:2000]
    assert read('data/wiki40b_en/test.bin') == b''.join(PARTS['test'])[:300]
    with pytest.raises(UserError, match='--overwrite'):
        run_here('prepare_wiki40b.py', *(argv[:1]))
    run_here('prepare_wiki40b.py', *(argv[:1] + ['--overwrite']))
    assert read('data/wiki40b_en/train.bin') == b''.join(PARTS['train'])
    with pytest.raises(UserError, match='requirements-tfds.txt'):
        run_here('prepare_wiki40b.py', '--name=other')


@pytest.mark.parametrize('as_repr', [False, True])
def test_wiki40b_from_a_hub_layout(tmp_path, as_repr):
    texts = {s: [repr(a) if as_repr else a.decode() for a in part] for s, part in PARTS.items()}
    hub = write_hub(tmp_path / 'hub', texts)
    run_here('prepare_wiki40b.py', '--source=hub', f'--hub={hub}')
    for split, ours in prepare_wiki40b.SPLITS.items():
        assert read('data/wiki40b_en', f'{ours}.bin') == b''.join(PARTS[split])


def test_wiki40b_hub_count_is_checked(tmp_path):
    texts = {s: [a.decode() for a in part] for s, part in PARTS.items()}
    hub = write_hub(tmp_path / 'hub', texts, counts=dict(train=41))
    with pytest.raises(UserError, match='40 articles, expected 41'):
        run_here('prepare_wiki40b.py', '--source=hub', f'--hub={hub}')
    assert nothing_finished('data/wiki40b_en')
    run_here('prepare_wiki40b.py', '--source=hub', f'--hub={hub}', '--no-check_articles')
    assert len(read('data/wiki40b_en/train.bin')) == sum(map(len, PARTS['train']))


def test_repr_is_undone_only_where_it_is_one():
    for text in (b'plain', b"it's", b'both \' and "', 'caf\xe9'.encode(), b'', b'\x00\n\\'):
        assert prepare_wiki40b.undo_repr(repr(text)) == text
    for text in ("b'not closed", 'b"', "b'a' and b'c'", 'because', ''):
        assert prepare_wiki40b.undo_repr(text) == text.encode()


# --- prepare_text.py ---

TEXTS = [f'Document {i}: {"naïve word " * (i % 9)}end' for i in range(300)]


def write_file(path, data):
    with open(path, 'wb') as f:
        f.write(data)
    return str(path)


def test_text_one_file_with_val_source_is_the_leading_bytes():
    data = os.urandom(5000)                                             # not UTF-8: bytes are bytes
    run_here('prepare_text.py', '--name=a', f'--source={write_file("a.txt", data)}', '--max_bytes=3000',
             f'--val_source={write_file("b.txt", b"other text")}')
    assert read('data/a/train.bin') == data[:3000] and read('data/a/val.bin') == b'other text'
    assert list(splits_of('data/a')) == ['train', 'val']
    assert open_split('data', 'a', 'train', verify=True).n_tokens == 3000


def test_text_single_document_gives_up_its_tail():
    data = 'é日本'.encode() * 1000
    write_file('a.txt', data)
    run_here('prepare_text.py', '--name=a', '--source=a.txt', '--val_fraction=0.1', '--test_fraction=0.05')
    parts = [read('data/a', f'{s}.bin') for s in ('train', 'val', 'test')]
    assert b''.join(parts) == data and all(p.decode() for p in parts) and abs(len(parts[1]) - 800) < 8
    run_here('prepare_text.py', '--name=whole', '--source=a.txt', '--val_fraction=0')
    assert read('data/whole/train.bin') == data and list(splits_of('data/whole')) == ['train']


@pytest.mark.parametrize('name', ['x.jsonl', 'x.jsonl.gz', 'x.jsonl.zst', 'x.parquet'])
def test_text_documents_are_cut_by_hash_and_disjoint(name):
    texts = TEXTS + TEXTS[:100]                                         # a hundred stand twice
    if name.endswith('.parquet'):
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table(dict(text=texts)), name)
    else:
        write_jsonl(name, texts + [''], meta=dict(a=1))
    run_here('prepare_text.py', '--name=a', f'--source={name}', '--val_fraction=0.1', '--test_fraction=0.1')
    parts = {s: read('data/a', f'{s}.bin').decode().split('\n\n\n') for s in ('train', 'val', 'test')}
    assert sorted(sum(parts.values(), [])) == sorted(texts)
    assert len(set(parts['val'])) == len(set(parts['test'])) == 30 and sum(map(len, map(set, parts.values()))) == 300
    assert parts['train'] == [t for t in texts if t in set(parts['train'])]         # the order of the source
    run_here('prepare_text.py', '--name=b', f'--source={name}', '--val_fraction=0.1', '--test_fraction=0.1', '--seed=1')
    assert set(read('data/b/val.bin').decode().split('\n\n\n')) != set(parts['val'])


def test_text_many_documents_are_cut_by_range(monkeypatch):
    monkeypatch.setattr(writer, 'FEW', 50)
    write_jsonl('x.jsonl', TEXTS)
    run_here('prepare_text.py', '--name=a', '--source=x.jsonl', '--val_fraction=0.2', '--test_fraction=0.1')
    assert 35 < splits_of('data/a')['val']['documents'] < 85 and 15 < splits_of('data/a')['test']['documents'] < 50


def test_text_separator_glob_and_max_bytes():
    for i in range(3):
        write_file(f'{i}.txt', b'%d' % i * 10)
    flags = ['--val_fraction=0', r'--document_separator=\n--\n', '--max_bytes=20']
    run_here('prepare_text.py', '--name=a', '--source=?.txt', *flags)
    assert read('data/a/train.bin') == b'0' * 10 + b'\n--\n' + b'1' * 6
    run_here('prepare_text.py', '--name=b', '--source=?.txt')                   # three documents: one each
    assert sorted(read('data/b', f'{s}.bin')[:1] for s in ('train', 'val', 'test')) == [b'0', b'1', b'2']
    run_here('prepare_text.py', '--name=c', '--source=[01].txt')                # two: no test split
    assert list(splits_of('data/c')) == ['train', 'val']


def test_text_repeats_of_val_source_leave_train():
    write_jsonl('x.jsonl', TEXTS[:50])
    run_here('prepare_text.py', '--name=a', '--source=x.jsonl', f'--val_source={write_jsonl("v.jsonl", TEXTS[40:60])}')
    assert read('data/a/train.bin').decode().split('\n\n\n') == TEXTS[:40]
    assert bins.read_meta('data', 'a')['source']['repeated_documents'] == 10
    with pytest.raises(UserError, match='train would be empty'):
        run_here('prepare_text.py', '--name=b', '--source=x.jsonl', f'--val_source={write_jsonl("w.jsonl", TEXTS)}')
    with pytest.raises(UserError, match='share'):
        run_here('prepare_text.py', '--name=b', '--source=x.jsonl', '--val_source=x.jsonl')
    assert not os.path.exists('data/b')


def test_text_hub_layout_keeps_its_own_splits(tmp_path):
    hub = write_hub(tmp_path / 'hub', dict(train=TEXTS[:200], validation=TEXTS[200:220], test=TEXTS[220:230]))
    run_here('prepare_text.py', '--name=a', f'--source={hub}', '--hub_config=en', '--max_bytes=2000')
    assert read('data/a/train.bin') == '\n\n\n'.join(TEXTS[:200]).encode()[:2000]
    assert read('data/a/val.bin').decode() == '\n\n\n'.join(TEXTS[200:220])
    assert splits_of('data/a')['test']['documents'] == 10
    for flag, message in (('--text_field=body', "no column 'body', it has text"), ('--hub_config=fr', 'en')):
        with pytest.raises(UserError, match=message):
            run_here('prepare_text.py', '--name=b', f'--source={hub}', '--hub_config=en', flag)
    assert not os.path.exists('data/b')


def byte_level_bpe(path, texts, prefix_space=False):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space), decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=320, special_tokens=['<|endoftext|>'], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.save(path)
    return tok


def test_text_bpe_tokens_stand_for_the_original_bytes(monkeypatch):
    tok = byte_level_bpe('tokenizer.json', TEXTS)
    texts = [t + ' <|endoftext|> 日本\r\n' for t in TEXTS[:60]]         # its spelling in a text is text
    write_jsonl('x.jsonl', texts)
    monkeypatch.setattr(tokens, 'PIECE', 50)                      # cut often; the tokens may not change
    monkeypatch.setattr(writer, 'BATCH', 500)
    run_here('prepare_text.py', '--name=a', '--source=x.jsonl', '--tokenizer=tokenizer.json', '--val_fraction=0')
    ids, meta = open_split('data', 'a', 'train', verify=True).tokens, bins.read_meta('data', 'a')
    tok.encode_special_tokens = True
    expected = [tok.encode(t, add_special_tokens=False).ids for t in texts]
    end = tok.token_to_id('<|endoftext|>')
    assert ids.tolist() == sum(([end] + e for e in expected), [])[1:]
    assert ids.dtype == np.uint16 and meta['start_id'] == end
    n_bytes = sum(len(t.encode()) for t in texts)
    table = np.fromfile('data/a/token_bytes.bin', '<u2')
    assert meta['splits']['train']['text_bytes'] == n_bytes == table[ids].sum()
    assert meta['splits']['train']['documents'] == 60
    assert len(table) == meta['vocab_size'] == 320 and read('data/a/tokenizer.json') == read('tokenizer.json')


def test_text_bpe_refuses_what_it_cannot_give_back():
    byte_level_bpe('prefix.json', TEXTS, prefix_space=True)
    byte_level_bpe('tokenizer.json', TEXTS)
    write_jsonl('x.jsonl', TEXTS)
    write_file('latin.txt', 'text caf\xe9 '.encode('latin-1') * 100)
    for argv, message in ((['--tokenizer=prefix.json', '--source=x.jsonl'], 'does not give back'),
                          (['--tokenizer=x.jsonl', '--source=x.jsonl'], 'not a tokenizer.json'),
                          (['--tokenizer=none.json', '--source=x.jsonl'], 'expected byte, gpt2'),
                          (['--tokenizer=tokenizer.json', '--source=x.jsonl', '--end_of_text=<eos>'], '--end_of_text'),
                          (['--tokenizer=tokenizer.json', '--source=latin.txt'], 'not UTF-8 .byte 0xe9 near byte 8')):
        with pytest.raises(UserError, match=message):
            run_here('prepare_text.py', '--name=a', *argv)
        assert not os.path.exists('data/a')


def test_text_gpt2_vocabulary_missing_is_one_line(monkeypatch):
    import tiktoken
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: (_ for _ in ()).throw(ConnectionError('no route')))
    with pytest.raises(UserError, match='TIKTOKEN_CACHE_DIR'):
        run_here('prepare_text.py', '--name=a', f'--source={write_jsonl("x.jsonl", TEXTS)}', '--tokenizer=gpt2')


@pytest.mark.parametrize('file, data, message', [
    ('e.txt', b'', 'holds no text'), ('e.jsonl', b'\n\n{"text": ""}\n', 'holds no text'),
    ('e.jsonl', b'{"text": "a"}\n{', r'e\.jsonl:2 is not JSON'), ('e.jsonl', b'[1]\n', 'holds a list'),
    ('e.jsonl', b'{"body": 1}\n', 'has no key .text., it has body'), ('e.jsonl', b'{"text": 5}\n', 'holds a int'),
    ('e.txt.gz', gzip.compress(b'abc' * 1000)[:-9], 'to its end'), ('e.gz', b'not gzip', 'to its end'),
    ('e.txt.zst', b'not zstd', 'to its end')])
def test_text_bad_sources_leave_nothing(file, data, message):
    write_file(file, data)
    with pytest.raises(UserError, match=message):
        run_here('prepare_text.py', '--name=a', f'--source={file}')
    assert not os.path.exists('data/a')


def test_text_truncated_zstd_is_noticed():
    """zstandard's own reader ends silently in the middle of a frame."""
    import zstandard
    write_file('t.txt.zst', zstandard.compress(os.urandom(300_000))[:-1000])
    with pytest.raises(UserError, match='truncated zstd'):
        run_here('prepare_text.py', '--name=a', '--source=t.txt.zst')


def test_text_missing_sources(tmp_path):
    os.makedirs('texts')
    write_file('texts/a.txt', b'abc')
    for source, message in (('./no.txt', 'no file matches'), ('no-such-owner/no-such-set', 'neither a file here nor'),
                            ('texts', 'glob'), ('', 'source is empty')):
        with pytest.raises(UserError, match=message):
            run_here('prepare_text.py', '--name=a', f'--source={source}')
    assert not os.path.exists('data/a')


def test_text_failure_keeps_the_older_data_set():
    write_jsonl('x.jsonl', TEXTS)
    run_here('prepare_text.py', '--name=a', '--source=x.jsonl')
    before = read('data/a/train.bin')
    with open('x.jsonl', 'a') as f:
        f.write('{')
    with pytest.raises(UserError, match='not JSON'):
        run_here('prepare_text.py', '--name=a', '--source=x.jsonl')
    assert read('data/a/train.bin') == before and open_split('data', 'a', 'train', verify=True)
    assert not [n for n in os.listdir('data/a') if n.endswith('.tmp')]
    write_jsonl('x.jsonl', TEXTS[:50])
    run_here('prepare_text.py', '--name=a', '--source=x.jsonl', '--val_fraction=0', '--overwrite')
    # val and test of the older set went with it
    assert sorted(os.listdir('data/a')) == ['meta.json', 'train.bin', 'train.index.bin']


def test_text_interrupt_leaves_nothing(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(bins, 'finish', interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_here('prepare_text.py', '--name=a', f'--source={write_jsonl("x.jsonl", TEXTS)}')
    assert not os.path.exists('data/a')


@pytest.mark.slow
def test_help_is_instant_and_a_mistake_is_one_line():
    for script in ('prepare_sample.py', 'prepare_wiki40b.py', 'prepare_text.py', 'prepare_pile.py',
                   'prepare_metadata.py', 'train_tokenizer.py'):
        out = run_script('-X', 'importtime', script, '--help', timeout=1800)
        assert out.returncode == 0 and 'data_dir' in out.stdout
        heavy = ('torch', 'numpy', 'datasets', 'tensorflow_datasets', 'tiktoken', 'tokenizers', 'pyarrow')
        assert not any(f'| {module}\n' in out.stderr for module in heavy)
    out = run_script('prepare_text.py', '--name=a', '--source=./none.txt', timeout=1800)
    assert out.returncode == 1 and out.stderr.startswith('error: no file matches') and out.stderr.count('\n') == 1


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='RssAnon is Linux')
@pytest.mark.parametrize('flags', [[], ['--tokenizer=tokenizer.json', '--num_proc=1']])
def test_memory_does_not_grow_with_the_source(flags):
    """Anonymous memory while one text of 2 and of 100 MB (10 for BPE) is prepared differs by a fraction of the text."""
    byte_level_bpe('tokenizer.json', TEXTS)
    peaks = []
    for megabytes in (2, 10 if flags else 100):
        with open('big.txt', 'wb') as f:
            for i in range(megabytes):
                f.write((b'%d some words of text.\n' % i * 60_000)[:1_000_000])
        peaks.append(peak_memory('prepare_text.py', f'--name=m{megabytes}', '--source=big.txt', *flags))
    assert peaks[1] - peaks[0] < 30, peaks


# --- index, words, joined rows, cleaning, very long sets ---

@pytest.mark.parametrize('flags', [[], ['--tokenizer=tokenizer.json']])
def test_the_index_finds_every_document(flags):
    """uint64 positions of first tokens: what lies between two, without the separator, is the document; words add up."""
    tok = byte_level_bpe('tokenizer.json', TEXTS)
    texts = [*TEXTS[:20], '', 'x' * 200_000 + ' last words']
    write_jsonl('x.jsonl', texts)
    run_here('prepare_text.py', '--name=a', '--source=x.jsonl', '--val_fraction=0', *flags)
    data, entry = open_split('data', 'a', 'train'), splits_of('data/a')['train']
    starts = np.fromfile(os.path.join('data/a', entry['index']), '<u8')
    ends = [*(starts[1:] - (1 if flags else 3)), data.n_tokens]
    found = [data.tokens[a:b] for a, b in zip(starts, ends)]
    found = [tok.decode(list(ids)) if flags else ids.tobytes().decode() for ids in found]
    assert found == [text for text in texts if text] and entry['documents'] == len(found)       # an empty one is none
    assert data.count_words() == sum(len(text.split()) for text in texts)


@pytest.mark.parametrize('hub', [False, True])
def test_joined_rows_are_one_text(hub):
    """WikiText's rows are lines: with join_rows the split is one document, rows and empty rows as they were."""
    splits = dict(train=['= A =', '', 'one two', 'é'], validation=['= B ='], test=['', 'three'])
    for split, rows in splits.items():
        os.makedirs('wiki', exist_ok=True)
        if hub:
            pq.write_table(pa.table(dict(text=rows)), f'wiki/{split}.parquet')
        else:
            write_jsonl(f'wiki/{split}.jsonl', rows)
    where = ['--source=wiki'] if hub else ['--source=wiki/train.jsonl', '--val_source=wiki/validation.jsonl',
                                           '--test_source=wiki/test.jsonl']
    run_here('prepare_text.py', '--name=a', *where, '--join_rows', r'--document_separator=\n')
    assert read('data/a/train.bin').decode() == '= A =\n\none two\né' and read('data/a/test.bin') == b'\nthree'
    assert read('data/a/val.bin') == b'= B =' and splits_of('data/a')['train']['documents'] == 1


def test_cleaning_drops_lines_and_counts_them(capsys):
    """Near-duplicates by length without punctuation and outer words, HTML tags; nothing else changes."""
    docs = ['One two three four five six seven eight nine.\nx < 3 and y > 4 stay\n\nend',
            'One two three four, FIVE six seven eight nine\nOne two three four five six seven eight ninety\n'
            'see <a href="x">here</a>\r\n<br/>\nend\n\nlast',
            'end\n<p>']
    write_jsonl('x.jsonl', docs)
    run_here('prepare_text.py', '--name=a', '--source=x.jsonl', '--val_fraction=0', '--clean_lines')
    assert read('data/a/train.bin').decode() == (
        f'{docs[0]}\n\n\nOne two three four, FIVE six seven eight nine\n'
        'One two three four five six seven eight ninety\n\nlast')
    assert 'cleaned 11 lines: 2 near-duplicates and 3 with HTML tags dropped' in capsys.readouterr().out
    meta = bins.read_meta('data', 'a')
    assert meta['source']['cleaned'] == dict(lines=11, duplicate_lines=2, html_lines=3)
    assert meta['splits']['train']['documents'] == 2                    # of the third nothing was left


def test_more_than_two_billion_tokens():
    """Positions beyond 2^31 are read, batched and counted; the file is sparse, so nothing is written."""
    n = 2 ** 31 + 1000
    os.makedirs('data/long')
    with open('data/long/train.bin', 'wb') as f:
        f.truncate(2 * n)
        f.seek(2 * (n - 3))
        f.write(np.array([7, 8, 9], '<u2').tobytes())
    entry = dict(file='train.bin', tokens=n, text_bytes=n, documents=1, sha256='')
    bins.write_meta('data/long', 'prepare_text.py', [], dict(train=entry), 'x', 'uint16', 100, 0, dict(name='gpt2'))
    data = open_split('data', 'long', 'train')
    x, y = data.gather([n - 4], 8)
    assert y[0].tolist() == [0, 7, 8, 9, -1, -1, -1, -1] and data.n_scored([n - 4], 8) == 4
    last = bins.n_blocks(n, 8) - 1
    assert bins.batch_starts('sequential', 0, 0, last, 1, n, 8).tolist() == [last * 8]
    for order in ('permuted', 'random'):
        starts = np.concatenate([bins.batch_starts(order, 0, 0, i, 8, n, 8) for i in range(20)])
        assert starts.max() > 2 ** 30 and 0 <= starts.min() and starts.max() < n
