"""train_tokenizer.py and what is made with it: identical ids everywhere, every byte back, rows of one document."""
import base64
import json
import os
import random

import numpy as np
import pytest
import tiktoken
import transformers
from conftest import TINY, snapshot

import bins
import eval as evaluation
import prepare_text
import runs
import sample
import tokens
import train
import train_tokenizer
from configurator import UserError

WORDS = 'alpha beta gamma délta 日本語 Привет мир שלום don\'t we\'ll 1984 x2 émile naïve 🙂🙃 \t tab \r\n'.split(' ')


def make_words(n_bytes, seed=0):
    """Words of several scripts with a skewed distribution, spaces and line ends."""
    rng, text, size = random.Random(seed), [], 0
    stems = WORDS + [''.join(rng.choice('etaoinshrdlu') for _ in range(rng.randint(2, 9))) for _ in range(300)]
    while size < n_bytes:
        word = stems[min(int(rng.expovariate(0.02)), len(stems) - 1)] + rng.choice((' ', ' ', ' ', ', ', '.\n', '  '))
        text.append(word)
        size += len(word.encode())
    return ''.join(text)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """data/tokenizers/own, 700 ids, of a file of 300 kB."""
    folder = tmp_path_factory.mktemp('tok')
    (folder / 'text.txt').write_text(make_words(3_000_000), encoding='utf-8', newline='')
    train_tokenizer.main(['--name=own', f'--source={folder / "text.txt"}', '--vocab_size=700', '--max_bytes=2500000',
                          f'--data_dir={folder}'])
    return folder


def load_all(folder):
    """The tokenizer as tiktoken and as transformers load it."""
    meta = json.loads((folder / 'meta.json').read_text())
    ranks = {base64.b64decode(a): int(b) for a, b in (
        line.split() for line in (folder / 'ranks.tiktoken').read_bytes().splitlines())}
    return (tiktoken.Encoding('own', pat_str=meta['pattern'], mergeable_ranks=ranks,
                              special_tokens=meta['special_tokens'], explicit_n_vocab=meta['vocab_size']),
            transformers.AutoTokenizer.from_pretrained(str(folder)), meta)


def test_tiktoken_and_transformers_have_the_same_ids(made):
    """On a megabyte: words seen and unseen, other scripts, control characters, white space in all forms."""
    fast, slow, meta = load_all(made / 'tokenizers/own')
    rng = random.Random(1)
    noise = ''.join(chr(rng.choice((rng.randint(0, 31), rng.randint(32, 126), rng.randint(160, 0x2fff),
                                    rng.randint(0x1f300, 0x1f6ff)))) for _ in range(100_000))
    for text in (make_words(700_000, 5), noise, ' ' * 999 + 'x' * 3000 + '\n' * 99):
        a, b = fast.encode_ordinary(text), slow.encode(text, add_special_tokens=False)
        assert a == b and fast.decode(a) == text == slow.decode(b) and max(a) < 699
    assert slow.eos_token_id == 699 == meta['special_tokens']['<|endoftext|>'] and len(slow) == 700
    raw = bytes(range(256)) + os.urandom(5000)                          # not UTF-8: every byte string comes back
    assert fast.decode_bytes(fast._encode_bytes(raw)) == raw
    ours = tokens.load_tokenizer(str(made / 'tokenizers/own'))
    text = make_words(5000, 6)
    assert ours.encode([text])[0].tolist() == fast.encode_ordinary(text) and ours.end == 699
    assert 1.5 < meta['held_out_bytes_per_token'] < 6 and meta['text_bytes'] >= 2_500_000


def test_the_result_is_a_function_of_the_text(made, tmp_path):
    """Twice the same bytes; another text gives others. Nothing is left of one that fails."""
    again = ['--name=own', f'--source={made / "text.txt"}', '--vocab_size=700', f'--data_dir={tmp_path}']
    train_tokenizer.main([*again, '--max_bytes=2500000'])
    first, second = (json.loads((d / 'tokenizers/own/meta.json').read_text())['files'] for d in (made, tmp_path))
    assert first == second
    before = snapshot(tmp_path)
    for flags, message in (
            (['--vocab_size=256', '--overwrite'], 'vocab_size = 256, expected more than 256'),
            (['--vocab_size=300000', '--overwrite'], 'bytes of text hold only .* tokens that stand there 2 times'),
            ([], 'holds a tokenizer; give this one another --name'),
            (['--source=nothing*.txt', '--overwrite'], 'no file matches'),
            ([f'--source={made / "empty.txt"}', '--overwrite'], 'holds no text')):
        (made / 'empty.txt').write_text('')
        with pytest.raises(UserError, match=message):
            train_tokenizer.main([*again, *flags])
    assert snapshot(tmp_path) == before


# --- prepare_text.py with it ---

@pytest.fixture(scope='module')
def texts(made):
    """40 documents as jsonl in two files, lengths 10 to 3,000 bytes."""
    rng = random.Random(3)
    for part in range(2):
        with open(made / f'part{part}.jsonl', 'w', encoding='utf-8') as f:
            for i in range(20):
                f.write(json.dumps(dict(text=make_words(rng.randint(10, 3000), 100 * part + i))) + '\n')
    return str(made / 'part*.jsonl')


@pytest.mark.parametrize('flags', [(), ('--rows=64',)], ids=str)
def test_workers_do_not_change_a_byte(made, texts, tmp_path, flags):
    """1, 2 and 3 workers write the same files."""
    found = []
    for n in (1, 2, 3):
        prepare_text.main(['--name=set', f'--source={texts}', f'--tokenizer={made / "tokenizers/own"}', *flags,
                           '--val_fraction=0.1', '--test_fraction=0.1', f'--num_proc={n}',
                           f'--data_dir={tmp_path / str(n)}'])
        found.append({k: v for k, v in snapshot(tmp_path / str(n)).items() if not k.endswith('meta.json')})
    assert found[0] == found[1] == found[2] and any(name.endswith('train.bin') for name in found[0])


@pytest.mark.parametrize('tokenizer', ['byte', 'own'])
def test_rows_of_one_document(made, texts, tmp_path, tokenizer):
    """Each document begins a row; its tokens are all there, once; the rest of its last row is padding."""
    name = 'byte' if tokenizer == 'byte' else str(made / 'tokenizers/own')
    common = [f'--source={texts}', f'--tokenizer={name}', '--val_fraction=0', '--test_fraction=0',
              f'--data_dir={tmp_path}']
    prepare_text.main(['--name=packed', *common])
    prepare_text.main(['--name=rows', '--rows=64', *common])
    packed, rows = (bins.open_bin(str(tmp_path), n, 'train', verify=True) for n in ('packed', 'rows'))
    edges = [np.fromfile(data.index, '<u8').astype(int).tolist() + [data.n_tokens] for data in (packed, rows)]
    assert len(edges[0]) == len(edges[1]) == 41 and not any(at % 64 for at in edges[1])
    ids, mask = rows.rows_at(np.arange(0, rows.n_tokens, 64), 64)
    gap = 3 if tokenizer == 'byte' else 1                               # the separator, or end-of-text
    for i in range(40):
        piece = slice(edges[1][i] // 64, edges[1][i + 1] // 64)
        own = ids[piece][mask[piece] == 1]
        end = edges[0][i + 1] - (gap if i < 39 else 0)
        assert own.tolist() == packed.tokens[edges[0][i]:end].tolist()
        assert (mask[piece][:-1] == 1).all() and (np.diff(mask[piece][-1].astype(int)) <= 0).all()
    assert rows.text_bytes == sum(len(json.loads(line)['text'].encode()) for part in (0, 1)
                                  for line in open(made / f'part{part}.jsonl', encoding='utf-8'))
    assert rows.n_targets == rows.n_scored(np.arange(0, rows.n_tokens, 64), 64)


def test_training_evaluating_and_sampling(made, texts, tmp_path, capsysbinary):
    """Own tokens in rows through train.py and eval.py, and text out of sample.py."""
    prepare_text.main(['--name=rows', '--rows=32', f'--source={texts}', f'--tokenizer={made / "tokenizers/own"}',
                       '--val_fraction=0.1', '--test_fraction=0.1', f'--data_dir={tmp_path}'])
    train.main([*TINY, f'--data_dir={tmp_path}', '--dataset=rows', f'--out_dir={tmp_path / "run"}', '--max_iters=4'])
    evaluation.main([f'--from_ckpt={tmp_path / "run"}', f'--data_dir={tmp_path}', '--device=cpu', f'--out={tmp_path}'])
    row, = runs.read_run(str(next(tmp_path.glob('eval-*'))))['rows']
    test = bins.open_bin(str(tmp_path), 'rows', 'test')
    assert row['bits_per_byte'] == pytest.approx(row['loss_nats'] / np.log(2) * test.n_targets / test.text_bytes)
    assert sample.main([f'--from_ckpt={tmp_path / "run"}', '--prompt=alpha ', '--max_new_tokens=5']) == 0
    assert b'alpha ' in capsysbinary.readouterr().out
    os.remove(tmp_path / 'rows/tokenizer.json')
    with pytest.raises(UserError, match='name its tokenizer.json with --tokenizer=PATH'):
        sample.main([f'--from_ckpt={tmp_path / "run"}'])
