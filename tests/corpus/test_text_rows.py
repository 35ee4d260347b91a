"""prepare_text.py packed and with --rows: no tail is lost, padding counts nowhere, threads change no byte."""
import glob
import json
import os

import numpy as np
import pytest
import torch
from conftest import TINY, make_text, run_here, snapshot

from configurator import UserError
from corpus import bins, tokens, writer
from corpus.data import open_split
from corpus.rows import DocumentRowWriter
from training.checkpoint import load_model

SIZES = (1, 31, 32, 33, 64, 65, 400, 7)
DOCS = [make_text(SIZES[i % len(SIZES)] + i // 40, seed=i).decode() + ' é日' * (i % 3) for i in range(120)]
MODES = [['--tokenizer=byte'], ['--tokenizer=own']]


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """A folder with x.jsonl, 120 documents, and a BPE of 300 ids."""
    folder = tmp_path_factory.mktemp('rows')
    (folder / 'x.jsonl').write_text(''.join(json.dumps(dict(text=t)) + '\n' for t in DOCS))
    run_here('train_tokenizer.py', f'--data_dir={folder}', f'--source={folder / "x.jsonl"}', '--name=own',
             '--vocab_size=300')
    return str(folder)


def prepare(data_dir, name, *flags):
    run_here('prepare_text.py', f'--data_dir={data_dir}', f'--source={data_dir}/x.jsonl', f'--name={name}', *flags)
    return os.path.join(data_dir, name)


def encoded(data_dir, text, flags):
    tok = tokens.load_tokenizer(flags[0].split('=')[1], data_dir=data_dir)
    return list(text.encode()) if tok is None else tok.encode([text])[0].tolist()


@pytest.mark.parametrize('flags', MODES)
@pytest.mark.parametrize('truncate', [False, True])
def test_each_document_has_its_own_rows(data_dir, flags, truncate):
    """Rows rebuilt by hand: a document's ids, then padding of id start_id and mask 0; the index finds each document."""
    more = ['--truncate'] if truncate else []
    prepare(data_dir, f'rows{truncate}{flags[0][12:]}', *flags, '--rows=32', '--val_fraction=0', *more)
    data = open_split(data_dir, f'rows{truncate}{flags[0][12:]}', 'train', verify=True)
    expected, mask, starts = [], [], []
    for text in DOCS:
        ids = encoded(data_dir, text, flags)[:32 if truncate else None]
        padding = [data.start_id] * (-len(ids) % 32)
        starts.append(len(expected))
        expected, mask = expected + ids + padding, mask + [1] * len(ids) + [0] * len(padding)
    assert data.tokens.tolist() == expected and data.mask.tolist() == mask and data.row_length == 32
    assert np.fromfile(data.index, '<u8').tolist() == starts
    n_bytes = sum(mask) if data.byte_lengths is None else int(data.byte_lengths[expected][np.array(mask) > 0].sum())
    assert (data.n_targets, data.text_bytes, data.entry['documents']) == (sum(mask), n_bytes, len(DOCS))
    assert truncate or n_bytes == sum(len(t.encode()) for t in DOCS)
    x, y = data.gather(np.arange(0, data.n_tokens, 32), 32)
    assert (y[y >= 0].tolist(), set(x[:, 0])) == ([i for i, m in zip(expected, mask) if m], {data.start_id})


@pytest.mark.parametrize('flags', MODES)
def test_packed_rows_lose_no_tail(data_dir, flags):
    """Every token is a target once, the last row of an epoch included, though it is short."""
    prepare(data_dir, f'packed{flags[0][12:]}', *flags, '--val_fraction=0')
    data = open_split(data_dir, f'packed{flags[0][12:]}', 'train')
    assert data.n_tokens % 32
    scored = []
    for batch in range(-(-bins.n_blocks(data.n_tokens, 32) // 8)):
        starts = bins.batch_starts('sequential', 0, 0, batch, 8, data.n_tokens, 32)
        y = data.gather(starts, 32)[1]
        scored += y[y >= 0].tolist()
    assert scored == data.tokens.tolist()
    tok = tokens.load_tokenizer(flags[0][12:], data_dir=data_dir)
    text = bytes(scored) if tok is None else tokens.learned_encoding(f'{data_dir}/tokenizers/own').decode_bytes(scored)
    assert text.decode() == ('\n\n\n' if tok is None else tokens.END_OF_TEXT).join(DOCS)
    assert data.text_bytes == len(text) - (0 if tok is None else len(tokens.END_OF_TEXT) * (len(DOCS) - 1))


@pytest.mark.parametrize('more', [[], ['--rows=32'], ['--rows=32', '--truncate']])
def test_the_number_of_threads_changes_no_byte(data_dir, more, monkeypatch):
    """1, 2 and 3 threads, batches of few documents, pieces of documents: the same files, meta.json's argv aside."""
    monkeypatch.setattr(writer, 'BATCH', 700)
    monkeypatch.setattr(tokens, 'PIECE', 40)
    found = []
    for num_proc in (1, 2, 3):
        files = snapshot(prepare(data_dir, 'w', '--tokenizer=own', f'--num_proc={num_proc}', '--overwrite', *more))
        meta = json.loads(files.pop('meta.json'))
        assert meta.pop('made_by')['argv'].count(f'--num_proc={num_proc}') == 1
        found.append((files, meta))
    assert found[0] == found[1] == found[2]
    assert set(found[0][0]) >= {f'{s}.{kind}' for s in ('train', 'val', 'test') for kind in ('bin', 'index.bin')}


def test_pieces_of_a_document_join_in_its_rows(tmp_path):
    """A document written in parts of any size gives the rows of the whole."""
    ids, folders = np.arange(200, 300, dtype=np.uint8), []
    for sizes in ([100], [1] * 100, [31, 1, 0, 33, 35]):
        writer, at = DocumentRowWriter(str(tmp_path / str(len(sizes))), 'train', 'uint8', None, 32), 0
        for _ in range(2):
            writer.begin_document()
            for size in sizes:
                writer.write(ids[:100][at % 100:at % 100 + size].tobytes())
                at += size
        writer.commit()
        folders.append(snapshot(tmp_path / str(len(sizes))))
    assert folders[0] == folders[1] == folders[2] and len(folders[0]['train.bin']) == 2 * 128


def test_a_million_spaces(data_dir, tmp_path):
    """A run that overflows tiktoken's stack at once is cut before: the bytes come back."""
    text = 'a' + ' ' * 1_200_000 + 'x'
    (tmp_path / 's.txt').write_text(text)
    prepare(data_dir, 'spaces', '--tokenizer=own', f'--source={tmp_path / "s.txt"}', '--val_fraction=0', '--overwrite')
    ids = open_split(data_dir, 'spaces', 'train').tokens.tolist()
    assert tokens.learned_encoding(f'{data_dir}/tokenizers/own').decode_bytes(ids).decode() == text


def test_packed_after_rows_leaves_no_mask(data_dir):
    """Replacing one form by the other leaves no file of the older one."""
    folder = prepare(data_dir, 'both', '--rows=32')
    assert os.path.exists(f'{folder}/train.mask.bin') and 'mask' in bins.read_meta('', folder)['splits']['train']
    prepare(data_dir, 'both', '--overwrite')
    assert not glob.glob(f'{folder}/*mask*') and not open_split(data_dir, 'both', 'train').row_length


def test_an_interrupted_run_leaves_nothing(data_dir, monkeypatch):
    """Stopped after some rows are on disk."""
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return real(*args)
    real = writer.hash_of
    monkeypatch.setattr(writer, 'hash_of', interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(data_dir, 'stopped', '--rows=32', '--tokenizer=own')
    assert not os.path.exists(f'{data_dir}/stopped')
    monkeypatch.setattr(bins, 'finish', interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(data_dir, 'stopped', '--rows=32', '--tokenizer=own')
    assert not os.path.exists(f'{data_dir}/stopped')


@pytest.mark.parametrize('flags, message', [
    (['--rows=1'], 'rows = 1, expected at least 2'), (['--rows=-5'], 'rows = -5'), (['--truncate'], 'set --rows=512'),
    (['--rows=8', '--join_rows'], 'leave one out'), (['--num_proc=-1'], 'num_proc = -1'),
    (['--rows=8', '--tokenizer=nowhere'], "tokenizer = 'nowhere'")])
def test_bad_input(data_dir, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        prepare(data_dir, 'bad', *flags)
    assert '\n' not in str(caught.value) and not os.path.exists(f'{data_dir}/bad')


def test_train_and_eval_take_the_rows(data_dir, tmp_path):
    """A tiny run learns; bits per byte are the loss of the text's tokens over its bytes, computed here row by row."""
    prepare(data_dir, 'learn', '--rows=32', '--tokenizer=own', '--test_fraction=0.2')
    out = str(tmp_path / 'run')
    flags = [*TINY, f'--data_dir={data_dir}', '--dataset=learn', f'--out_dir={out}']
    with pytest.raises(UserError, match='set --block_size=32'):
        run_here('train.py', *flags, '--block_size=16')
    run_here('train.py', *flags, '--max_iters=40', '--eval_interval=20')
    with open(f'{out}/train_loss.csv') as f:
        head, *lines = (line.split(',') for line in f.read().splitlines())
    losses = [float(line[head.index('loss_nats')]) for line in lines]
    assert losses[-1] < losses[0] - 0.5
    run_here('eval.py', f'--from_ckpt={out}', f'--data_dir={data_dir}', f'--out={tmp_path}', '--device=cpu',
             '--dtype=float32', '--bootstrap=50')
    path, = glob.glob(f'{tmp_path}/eval-*/run.json')
    with open(path) as f:
        row, = json.load(f)['rows']
    data, (model, _) = open_split(data_dir, 'learn', 'test'), load_model(out, torch.device('cpu'))
    nats = 0.0
    for start in range(0, data.n_tokens, 32):
        kept = data.mask[start:start + 32] == 1
        ids = torch.tensor([data.start_id, *data.tokens[start:start + 32].tolist()])
        with torch.no_grad():
            log_p = model.eval()(ids[None, :-1])[0].log_softmax(-1)
        nats -= float(log_p[torch.arange(32), ids[1:]][torch.tensor(kept)].double().sum())
    assert row['tokens'] == data.n_targets < data.n_tokens and row['loss_low'] < row['loss_nats'] < row['loss_high']
    assert row['bits_per_byte'] == pytest.approx(nats / np.log(2) / data.text_bytes, rel=1e-5)
