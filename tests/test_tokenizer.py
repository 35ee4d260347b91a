"""train_tokenizer.py: the same ids in tiktoken, transformers and here; and a model on them from text to archive."""
import base64
import glob
import gzip
import json
import os
import random

import numpy as np
import pytest
from conftest import make_text, run_here, snapshot

from configurator import UserError
from corpus import bins, tokens
from corpus.data import open_split
from training.checkpoint import load_checkpoint

SIZE = 700


def odd_text(seed, n=20_000):
    """Characters of all planes and of none: controls, marks, unassigned code points, white space of every kind."""
    rng = random.Random(seed)
    ranges = ((0, 0x100), (0x300, 0x370), (0x400, 0x500), (0x900, 0x980), (0x2000, 0x2070), (0x3040, 0x3100),
              (0x4E00, 0x9FFF), (0xE000, 0xE100), (0xFFF0, 0x10000), (0x1F300, 0x1F700), (0x10FF00, 0x110000))
    return ''.join(chr(rng.randrange(*rng.choice(ranges))) * rng.choice((1, 1, 1, 2, 5))
                   + rng.choice(('', '', ' ', '\n')) for _ in range(n))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with a megabyte of text (English, Russian, Chinese, odd.txt) and data/tokenizers/own learned from it."""
    folder = tmp_path_factory.mktemp('tokenizer')
    rng, words = random.Random(3), 'мы не знаем сколько весит модель пока байт не оплачен'.split()
    russian = ' '.join(rng.choices(words, k=30_000))
    chinese = ''.join(rng.choices('我们不知道模型有多重直到每个字节都付了钱。', k=60_000))
    texts = dict(english=make_text(400_000).decode(), russian=russian, chinese=chinese, odd=odd_text(1))
    for name, text in texts.items():
        (folder / f'{name}.txt').write_bytes(text.encode())
    assert sum(map(os.path.getsize, glob.glob(str(folder / '*.txt')))) > 950_000
    run_here('train_tokenizer.py', *learn(folder))
    return folder


def learn(folder, *flags, source='*.txt', name='own', data='data'):
    return [f'--source={folder / source}', f'--name={name}', f'--vocab_size={SIZE}', f'--data_dir={folder / data}',
            '--held_out_every=10', *flags]


def meta_of(folder, name='own', data='data'):
    return json.loads((folder / data / 'tokenizers' / name / 'meta.json').read_text())


def test_tiktoken_transformers_and_this_project_agree(folder):
    """Identical ids on text learned from and on other text; every piece has its bytes; end-of-text is never text."""
    import tiktoken
    import transformers
    where, meta = folder / 'data/tokenizers/own', meta_of(folder)
    ranks = {}
    for line in (where / 'ranks.tiktoken').read_bytes().splitlines():              # the format of tiktoken's own files
        piece, rank = line.split()
        ranks[base64.b64decode(piece)] = int(rank)
    theirs = tiktoken.Encoding('x', pat_str=meta['pattern'], mergeable_ranks=ranks, explicit_n_vocab=SIZE,
                               special_tokens=meta['special_tokens'])
    auto = transformers.AutoTokenizer.from_pretrained(str(where))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(where / 'tokenizer.json'))
    ours = tokens.load_tokenizer('own', data_dir=str(folder / 'data'))
    assert len(ranks) + 1 == len(auto) == len(ours.byte_lengths) == meta['vocab_size'] == SIZE
    texts = [p.read_bytes().decode() for p in sorted(folder.glob('*.txt'))] + [odd_text(2), "It's 12 o'clock\r\n\n x  "]
    for text in texts:
        ids = theirs.encode_ordinary(text)
        assert ours.encode([text])[0].tolist() == ids
        assert auto.encode(text, add_special_tokens=False) == fast.encode(text, add_special_tokens=False) == ids
        assert theirs.decode_bytes(ids) == text.encode() and auto.decode(ids) == text
        assert ours.byte_lengths[ids].sum() == len(text.encode())
    assert len(set(np.concatenate(ours.encode(texts)).tolist())) > 600           # nearly all pieces were compared
    assert auto.eos_token_id == ours.end == theirs.eot_token == SIZE - 1 and ours.byte_lengths[ours.end] == 0
    assert ours.end not in ours.encode(['a<|endoftext|>b'])[0]


def test_tiktokens_loader_reads_the_file(folder, monkeypatch):
    """load_tiktoken_bpe, without the cache it keeps by path."""
    from tiktoken.load import load_tiktoken_bpe
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', '')
    ranks = load_tiktoken_bpe(str(folder / 'data/tokenizers/own/ranks.tiktoken'))
    assert ranks == tokens.learned_encoding(str(folder / 'data/tokenizers/own'))._mergeable_ranks
    assert sorted(ranks.values()) == list(range(SIZE - 1)) and all(bytes([b]) in ranks for b in range(256))


def test_every_byte_string_round_trips(folder):
    """Random bytes, every single one, cut characters: ids, and the bytes again."""
    encoding = tokens.learned_encoding(str(folder / 'data/tokenizers/own'))
    strings = [encoding.decode_single_token_bytes(i) for i in range(SIZE)]
    encode = tokens.bytes_encoder(encoding.encode_ordinary, strings)
    rng, text = random.Random(5), make_text(300) + '日本🙂 мы'.encode()
    cases = [b'', bytes(range(256)), text, *(bytes([b]) for b in range(256)), *(rng.randbytes(200) for _ in range(50)),
             *(text[i:j] + b'\xff' + text[j:] for i in range(290, 320) for j in (310, 313))]
    for raw in cases:
        assert b''.join(strings[i] for i in encode(raw)) == raw == encoding.decode_bytes(encode(raw))
    assert encode(text) == encoding.encode_ordinary(text.decode())


def test_the_result_is_a_function_of_text_and_settings(folder, monkeypatch):
    """Again, on one thread, from a gzipped copy of the documents: the same files but for the command in meta.json."""
    files = sorted(folder.glob('*.txt'))
    with gzip.open(folder / 'all.jsonl.gz', 'wt') as f:
        for path in files:
            f.write(json.dumps(dict(text=path.read_bytes().decode())) + '\n')
    monkeypatch.setenv('TOKENIZERS_PARALLELISM', 'false')
    run_here('train_tokenizer.py', *learn(folder, source='all.jsonl.gz', data='again'))
    first, second = (snapshot(folder / data / 'tokenizers/own') for data in ('data', 'again'))
    metas = [json.loads(found.pop('meta.json')) for found in (first, second)]
    assert first == second and metas[0]['sha256'] == metas[1]['sha256']
    for key in ('documents', 'text_bytes', 'sha256'):
        assert metas[0]['source'][key] == metas[1]['source'][key]
    assert metas[0]['bytes_per_token'] == metas[1]['bytes_per_token']


def test_bytes_per_token_on_learned_and_held_out_text(folder, capsys):
    """Recomputed from the pieces; what is held out teaches nothing: a word of held-out pieces alone is no piece."""
    with open(folder / 'h.jsonl', 'w') as f:
        for i in range(40):
            f.write(json.dumps(dict(text=('unseenwords ' if i % 4 == 3 else make_text(200, i).decode()) * 20)) + '\n')
    flags = '--vocab_size=320', '--held_out_every=4'
    run_here('train_tokenizer.py', *learn(folder, source='h.jsonl', name='held'), *flags)
    encoding, meta = tokens.learned_encoding(str(folder / 'data/tokenizers/held')), meta_of(folder, 'held')
    with open(folder / 'h.jsonl') as f:
        texts = [json.loads(line)['text'] for line in f]
    for part, chosen in (('held_out', texts[3::4]), ('learned', [t for i, t in enumerate(texts) if i % 4 != 3])):
        n_tokens = sum(len(encoding.encode_ordinary(t)) for t in chosen)
        assert meta['bytes_per_token'][part] == pytest.approx(sum(len(t.encode()) for t in chosen) / n_tokens)
    assert meta['bytes_per_token']['held_out'] < 2 < meta['bytes_per_token']['learned']
    assert f'{meta["bytes_per_token"]["held_out"]:.3f} on held-out text' in capsys.readouterr().out
    run_here('train_tokenizer.py', *learn(folder, source='h.jsonl', name='lead'), *flags, '--max_bytes=20000')
    assert 20_000 <= meta_of(folder, 'lead')['source']['text_bytes'] < 25_000


@pytest.mark.parametrize('flags, message', [
    (['--vocab_size=255'], 'vocab_size = 255, expected at least 257'), (['--vocab_size=256'], 'expected at least 257'),
    (['--source=HERE/small.txt'], r'vocab_size = 700, but 300 bytes of text fill only \d+ ids .*smaller --vocab_size'),
    (['--source=HERE/empty.txt'], 'holds no text'), (['--source=HERE/none.txt'], 'no file matches'),
    (['--source='], 'source is empty'), (['--name='], "name = ''"), (['--name=a/b'], 'expected that of a new folder'),
    (['--name=gpt2'], "name = 'gpt2'"), (['--source=HERE/latin.txt'], 'not UTF-8'),
    (['--source=HERE/small.jsonl', '--text_field=body'], "no key 'body'"), (['--held_out_every=1'], 'at least 2'),
    (['--name=own'], 'exists; give this one another --name')])
def test_bad_input_leaves_nothing(folder, flags, message):
    (folder / 'in').mkdir(exist_ok=True)
    for name, data in (('small.txt', make_text(300)), ('empty.txt', b''), ('latin.txt', 'caf\xe9 '.encode('latin-1')),
                       ('small.jsonl', b'{"text": "a"}\n')):
        (folder / 'in' / name).write_bytes(data)
    before = snapshot(folder / 'data')
    with pytest.raises(UserError, match=message) as caught:
        run_here('train_tokenizer.py', *learn(folder, name='new'),
                 *(f.replace('HERE', str(folder / 'in')) for f in flags))
    assert '\n' not in str(caught.value) and snapshot(folder / 'data') == before


def test_an_interrupted_run_leaves_the_older_tokenizer(folder, tmp_path, monkeypatch):
    """Stopped while files are written: what was there stays whole, and no half folder remains."""
    def interrupted(*_):
        raise KeyboardInterrupt
    run_here('train_tokenizer.py', *learn(folder, f'--data_dir={tmp_path}', '--vocab_size=400', source='english.txt'))
    before = snapshot(tmp_path)
    monkeypatch.setattr(bins, 'write_json', interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_here('train_tokenizer.py', *learn(folder, f'--data_dir={tmp_path}', '--overwrite'))
    assert snapshot(tmp_path) == before and os.listdir(tmp_path / 'tokenizers') == ['own']


def test_a_damaged_tokenizer_is_refused(folder, tmp_path):
    run_here('train_tokenizer.py', *learn(folder, f'--data_dir={tmp_path}', '--vocab_size=400', source='english.txt',
             name='bad'))
    ranks = tmp_path / 'tokenizers/bad/ranks.tiktoken'
    whole = ranks.read_bytes()
    for data, message in ((whole.replace(b' 300\n', b' 301\n'), 'SHA-256'), (whole[:-30], 'SHA-256|whole'),
                          (b'?', 'no whole tokenizer')):
        ranks.write_bytes(data)
        with pytest.raises(UserError, match=message):
            tokens.load_tokenizer('bad', data_dir=str(tmp_path))
    with pytest.raises(UserError, match='the --name of one that train_tokenizer.py made'):
        tokens.load_tokenizer('none', data_dir=str(tmp_path))


# --- a model on it ---

def own_name(folder):
    return f'own@{meta_of(folder)["sha256"]["tokenizer.json"][:8]}'


@pytest.fixture(scope='module')
def model(folder):
    """data/text: the English text in ids of the own BPE; out/run: a tiny model of it."""
    run_here('prepare_text.py', f'--source={folder / "english.txt"}', '--name=text', '--tokenizer=own',
             f'--data_dir={folder / "data"}', '--max_bytes=60000')
    run_here('train.py', '--n_layer=1', '--n_embd=32', '--n_head=2', '--block_size=32', '--batch_size=8',
             '--device=cpu', '--dtype=float32', f'--data_dir={folder / "data"}', '--dataset=text', '--max_iters=60',
             '--learning_rate=3e-3', f'--out_dir={folder / "run"}')
    return folder


def test_data_in_its_ids_are_the_text(model):
    """Packed ids give the bytes back, and meta.json carries the tokenizer: name, hash, file, bytes of each id."""
    data = open_split(str(model / 'data'), 'text', 'train', verify=True)
    meta = bins.read_meta(str(model / 'data'), 'text')
    encoding = tokens.learned_encoding(str(model / 'data/tokenizers/own'))
    raw = encoding.decode_bytes(data.tokens.tolist())
    assert (model / 'english.txt').read_bytes().startswith(raw) and len(raw) == data.text_bytes == 60_000 - 2 * 600
    assert (data.tokens.dtype, meta['start_id'], meta['tokenizer']['name']) == (np.uint16, SIZE - 1, own_name(model))
    assert meta['tokenizer']['sha256'] == meta_of(model)['sha256']['tokenizer.json']
    assert (data.byte_lengths[data.tokens]).sum() == len(raw)


def test_eval_counts_its_bytes(model):
    """Bits per byte are nats over the text's bytes, not over tokens."""
    run_here('eval.py', f'--from_ckpt={model / "run"}', f'--data_dir={model / "data"}', f'--out={model / "out"}',
             '--device=cpu', '--dtype=float32', '--bootstrap=0')
    path, = glob.glob(str(model / 'out/eval-*/run.json'))
    row, = json.load(open(path))['rows']
    data = open_split(str(model / 'data'), 'text', 'test')
    assert row['bits_per_byte'] == pytest.approx(row['loss_nats'] * data.n_tokens / data.text_bytes / np.log(2))
    assert 0 < row['bits_per_byte'] < 8 and data.n_tokens < data.text_bytes


def test_sample_speaks_it(model, capfdbinary):
    """A prompt of any bytes, and text that is whole pieces."""
    (model / 'prompt').write_bytes(b'the model \xff\xfe')
    flags = f'--from_ckpt={model / "run"}', '--device=cpu', '--max_new_tokens=20'
    for prompt, begin in (('the model', 'the model'), (f'FILE:{model / "prompt"}', 'the model \ufffd\ufffd')):
        assert run_here('sample.py', *flags, f'--prompt={prompt}') == 0
        said = capfdbinary.readouterr().out.decode()
        assert said.startswith(begin) and len(said) > len(begin) + 15


def test_pack_embeds_it(model, tmp_path):
    """The archive needs no tokenizer beside it: unpacked where there is none, the bytes are the same."""
    raw = make_text(3000, 9) + ' <|endoftext|> мы 日本'.encode()
    (tmp_path / 'text').write_bytes(raw)
    paths = map(str, (model / 'run/ckpt.pt', tmp_path / 'text', tmp_path / 'a'))
    assert run_here('compress.py', 'pack', *paths, '--no-verify', '--no-progress', '--weight_bits=6') == 0
    hidden = model / 'data' / 'hidden'
    os.rename(model / 'data' / 'text', hidden)
    try:
        assert run_here('compress.py', 'unpack', str(tmp_path / 'a'), str(tmp_path / 'back'), '--no-progress') == 0
    finally:
        os.rename(hidden, model / 'data' / 'text')
    assert (tmp_path / 'back').read_bytes() == raw
    from codec.container import read_archive
    head, sections = read_archive((tmp_path / 'a').read_bytes(), 'a')[1::2]
    assert 'tokn' in sections and head['tokenizer'] == own_name(model)


def test_a_tokenizer_trained_again_is_another_one(model, tmp_path):
    """Same name, other ids: eval.py refuses, and nobody takes the new tokenizer.json for the model's."""
    checkpoint = load_checkpoint(str(model / 'run'))
    assert tokens.tokenizer_folder(checkpoint) == str(model / 'data/text')
    data = f'--data_dir={tmp_path}'
    run_here('train_tokenizer.py', *learn(model, data, '--vocab_size=400', source='english.txt'))
    run_here('prepare_text.py', f'--source={model / "english.txt"}', '--name=text', '--tokenizer=own', data)
    with pytest.raises(UserError, match=r"reads 'own@\w{8}' tokens .* holds 'own@\w{8}' tokens"):
        run_here('eval.py', f'--from_ckpt={model / "run"}', data, '--dataset=text', f'--out={tmp_path}', '--device=cpu')
    checkpoint['config']['data_dir'] = str(tmp_path)
    assert tokens.tokenizer_folder(checkpoint) == ''
