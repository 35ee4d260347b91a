"""eval.py: every token once, code lengths against brute force, compressors against their libraries, bad input."""
import bz2
import csv
import gzip
import hashlib
import json
import lzma
import math
import os
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_text, run_here, run_script, write_dataset

import score as scoring
from codec import container as archive_file
from configurator import UserError
from corpus import bins
from corpus.bins import write_json
from corpus.data import open_split
from model import ModelConfig, make, model_args
from training.checkpoint import save_checkpoint
from training.folder import read_run
from training.process import rss_anon_bytes

T = 16
N_TEST = 777                                    # bytes of conftest's test split: not a multiple of T


def save(folder, spoil=None, dataset='toy', tokenizer='byte', seed=1, **options):
    """Save a tiny model, changed by spoil(model), as a run folder; returns (path, model)."""
    torch.manual_seed(seed)
    config = dict(block_size=T, vocab_size=256, n_layer=1, n_head=2, n_embd=8, positions='learned') | options
    model = make(ModelConfig(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():            # far from uniform, so that every prediction counts
            p.add_(torch.randn_like(p) * 0.5)
        if spoil:
            spoil(model)
    os.makedirs(folder, exist_ok=True)
    facts = dict(dataset=dataset, sha256='', start_id=10, tokenizer=tokenizer)
    save_checkpoint(os.path.join(folder, 'ckpt.pt'), dict(
        model=model.state_dict(), model_args=model_args(model), masks={}, config={}, data=facts))
    return str(folder), model


@torch.no_grad()
def uniform(model):
    model.head.weight.zero_()


@torch.no_grad()
def forget_context(model):
    """Leave what depends on the input byte alone: a bigram model."""
    model.position.weight.zero_()
    for block in model.blocks:
        block.attention.proj.weight.zero_()
        block.attention.proj.bias.zero_()


@torch.no_grad()
def nats_of(model, context, target):
    """Nats of one byte after a context of bytes: one forward for one prediction."""
    return -float(model(torch.tensor([list(context)]))[0, -1].double().log_softmax(0)[target])


def score(toy, tmp_path, *flags):
    """Run eval.py; returns the rows of the one folder that it wrote last."""
    assert run_here('eval.py', f'--data_dir={toy}', f'--out={tmp_path}', '--device=cpu', '--dtype=float32', *flags) == 0
    folders = [tmp_path / name for name in os.listdir(tmp_path) if name.startswith('eval-')]
    with open(max(folders, key=lambda f: os.stat(f / 'run.json').st_mtime_ns) / 'run.json') as f:
        record = json.load(f)
    assert record['status'] == 'done'
    return record['rows']


def test_uniform_model_costs_8_bits_a_byte(toy, tmp_path):
    """A zero head gives every byte 1/256: bytes in, bytes out."""
    path, _ = save(tmp_path / 'u', uniform)
    row, = score(toy, tmp_path, f'--from_ckpt={path}')
    assert row['bits_per_byte'] == pytest.approx(8, abs=1e-6) and row['perplexity'] == pytest.approx(256, rel=1e-5)
    assert (row['tokens'], row['text_bytes'], row['data_bytes']) == (N_TEST, N_TEST, N_TEST)


def test_metrics_equal_a_loop_over_predictions(toy, tmp_path, capsys):
    """Accuracy, perplexity and information by one forward per byte; the same on random ids, which are seeded."""
    path, model = save(tmp_path / 'm')
    row, = score(toy, tmp_path, f'--from_ckpt={path}', '--max_tokens=40', '--metrics=ppl,information,random_tokens')
    header = capsys.readouterr().out.splitlines()[0]
    assert all(c in header for c in (' perplexity ', ' information ', ' random_accuracy ', ' random_information '))
    assert not any(c in header for c in (' loss_nats ', ' bits_per_byte ', ' accuracy '))       # not asked for
    text = open(os.path.join(toy, 'toy', 'test.bin'), 'rb').read()[:40]
    for before, ids in (('', text), ('random_', np.random.default_rng(0).integers(0, 256, 40).tolist())):
        ids, nats, right = [10, *ids], [], 0
        for i in range(40):
            context = ids[i // T * T:i + 1]
            nats.append(nats_of(model, context, ids[i + 1]))
            right += int(model(torch.tensor([context]))[0, -1].argmax()) == ids[i + 1]
        loss = sum(nats) / 40
        assert row[f'{before}loss_nats'] == pytest.approx(loss, rel=1e-6)
        assert row[f'{before}perplexity'] == pytest.approx(math.exp(loss), rel=1e-5)
        assert row[f'{before}accuracy'] == right / 40
        assert row[f'{before}information'] == pytest.approx(1 - loss / math.log(256), abs=1e-6)
    other, = score(toy, tmp_path, f'--from_ckpt={path}', '--metrics=random_tokens', '--max_tokens=40',
                   '--random_seed=1')
    assert other['random_loss_nats'] != row['random_loss_nats'] and other['loss_nats'] == row['loss_nats']


@pytest.mark.parametrize('options, numbers', [
    (dict(wrapper='autoencoder'), 8), (dict(wrapper='oracle', bottleneck=3, block_type='mixer', positions='none'), 3),
    (dict(wrapper='oracle', memory='none'), 0), (dict(wrapper='memory', chunk_size=8), 0)], ids=str)
def test_models_with_an_encoder_and_what_their_vector_costs(options, numbers, toy, tmp_path):
    """The loss of whole rows; a vector of the row costs extra, those of earlier chunks are paid for."""
    path, model = save(tmp_path / 'w', **options)
    row, = score(toy, tmp_path, f'--from_ckpt={path}', f'--max_tokens={4 * T}', '--embedding_bits=8',
                 '--metrics=ce,hamming,information,random_tokens')
    text = open(os.path.join(toy, 'toy', 'test.bin'), 'rb').read()[:4 * T]
    draws = np.random.default_rng(0).integers(0, 256, 4 * T)
    for before, ids in (('', torch.tensor(list(text))), ('random_', torch.from_numpy(draws))):
        with torch.no_grad():
            logits = model(ids.view(-1, T)).flatten(0, 1)
        assert row[f'{before}loss_nats'] == pytest.approx(float(F.cross_entropy(logits, ids)), rel=1e-5)
        assert row[f'{before}accuracy'] == float((logits.argmax(-1) == ids).double().mean())
    if numbers:
        assert row['embedding_nats'] == pytest.approx(numbers * 8 * math.log(2) / T)
    else:
        assert 'embedding_nats' not in row


def test_nothing_is_known_of_random_tokens(toy, tmp_path):
    """A model with a uniform prediction knows nothing of both; a vector costs all of its bits."""
    path, _ = save(tmp_path / 'u', uniform)
    row, = score(toy, tmp_path, f'--from_ckpt={path}', '--metrics=information,random_tokens')
    assert row['information'] == pytest.approx(0, abs=1e-6) and row['random_information'] == pytest.approx(0, abs=1e-6)
    assert scoring.embedding_nats(64, 16, 512) * 512 / math.log(2) == pytest.approx(64 * 16)


@pytest.mark.parametrize('flags', [(), ('--batch_size=3',), ('--block_size=7',), ('--minimal_context_window=5',),
                                   (f'--minimal_context_window={T}',), ('--block_size=1',)])
def test_every_byte_is_scored_once_whatever_the_rows(toy, tmp_path, flags):
    """A model that ignores context costs the sum over all pairs of neighbours, a byte missed or repeated would show."""
    path, model = save(tmp_path / 'm', forget_context)
    text = open(os.path.join(toy, 'toy', 'test.bin'), 'rb').read()
    with torch.no_grad():
        table = model(torch.arange(256)[:, None])[:, 0].double().log_softmax(-1)
    expected = -sum(float(table[a, b]) for a, b in zip(b'\n' + text, text))
    row, = score(toy, tmp_path, f'--from_ckpt={path}', *flags)
    assert row['tokens'] == len(text) and row['loss_nats'] * len(text) == pytest.approx(expected, rel=1e-6)
    assert row['accuracy'] == sum(int(table[a].argmax()) == b for a, b in zip(b'\n' + text, text)) / len(text)


def test_code_lengths_agree_between_block_sizes_64_and_256(toy, tmp_path):
    """Issue 2: the same for a model that ignores context; and not the same for one that uses it."""
    blind, _ = save(tmp_path / 'blind', forget_context, block_size=256)
    seeing, _ = save(tmp_path / 'seeing', block_size=256)
    found = [[r['loss_nats'] for r in score(toy, tmp_path, f'--from_ckpt={blind},{seeing}', f'--block_size={size}')]
             for size in (64, 256)]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert abs(found[0][1] - found[1][1]) > 1e-3


@pytest.mark.parametrize('minimal', [0, 1, 6, T])
def test_minimal_context_equals_one_forward_per_byte(toy, tmp_path, minimal):
    """Brute force: rows of T bytes, each new one begins so that its first scored byte has `minimal` inputs."""
    path, model = save(tmp_path / 'm')
    text = open(os.path.join(toy, 'toy', 'test.bin'), 'rb').read()[:90]
    inputs, expected, start, shortest = b'\n' + text, 0.0, 0, T
    for t, target in enumerate(text):
        if t - start == T:                      # the row is full: the next starts with just enough context for t
            start = t - max(minimal - 1, 0)
        expected += nats_of(model, inputs[start:t + 1], target)
        if t >= T:
            shortest = min(shortest, t + 1 - start)
    assert shortest == max(minimal, 1)
    row, = score(toy, tmp_path, f'--from_ckpt={path}', '--max_tokens=90', f'--minimal_context_window={minimal}')
    assert row['tokens'] == 90 and row['loss_nats'] * 90 == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('stride', [1, 5, T])
def test_stride_equals_one_forward_per_window(toy, tmp_path, stride):
    """Windows of T bytes every `stride`, the first scored whole, the others their last `stride`: brute force."""
    path, model = save(tmp_path / 'm')
    text = open(os.path.join(toy, 'toy', 'test.bin'), 'rb').read()[:90]
    inputs, expected = b'\n' + text, 0.0
    for t, target in enumerate(text):
        start = max(0, -(-(t + 1 - T) // stride) * stride)
        expected += nats_of(model, inputs[start:t + 1], target)
    row, = score(toy, tmp_path, f'--from_ckpt={path}', '--max_tokens=90', f'--stride={stride}')
    assert row['tokens'] == 90 and row['loss_nats'] * 90 == pytest.approx(expected, rel=1e-5)
    assert row['perplexity_per_word'] == pytest.approx(math.exp(expected / len(text.split())), rel=1e-4)


def test_words_and_bytes_of_ids(tmp_path):
    """Of BPE data words are as meta.json counted them, text bytes the sum over ids, also of a part."""
    folder = str(tmp_path / 'data' / 'bpe')
    writer = bins.BinWriter(folder, 'test', 'uint16')
    lengths = np.arange(300, dtype='<u2') % 7 + 1
    writer.write(np.arange(300), text_bytes=int(lengths.sum()))
    writer.words = 60
    lengths.tofile(os.path.join(folder, 'token_bytes.bin'))
    bins.write_meta(folder, 'prepare_text.py', [], dict(test=writer.commit()), 'x', 'uint16', 300, 0,
                    dict(name='gpt2', sha256='', token_bytes='token_bytes.bin'))
    path, _ = save(tmp_path / 'm', uniform, dataset='bpe', tokenizer='gpt2', vocab_size=300)
    for n, words in ((0, 60), (100, 20)):
        row, = score(str(tmp_path / 'data'), tmp_path, f'--from_ckpt={path}', f'--max_tokens={n}')
        assert row['text_bytes'] == int(lengths[:n or 300].sum())
        assert row['perplexity_per_word'] == pytest.approx(300 ** (row['tokens'] / words), rel=1e-5)


def test_words_are_counted_across_chunks():
    """Of 3 MB, whose chunks of 1 MiB end anywhere."""
    text = make_text(3_000_000) + b'\x0b\t a\r\nb'
    assert bins.words_in(np.frombuffer(text, np.uint8)) == len(text.split()) and bins.words_in(np.zeros(0, int)) == 0


def test_a_hugging_face_folder_is_a_checkpoint(tmp_path, toy):
    """Scored like the checkpoint it was exported from; without --dataset it says that it names none."""
    path, _ = save(tmp_path / 'm', activation='gelu_tanh')
    run_here('runs.py', 'export', path, tmp_path / 'hf')
    a, b = score(toy, tmp_path, f'--from_ckpt={path},{tmp_path / "hf"}', '--dataset=toy')
    assert b['run'] == 'hf' and a['loss_nats'] == pytest.approx(b['loss_nats'], rel=1e-6)
    with pytest.raises(UserError, match='names no data set; give one'):
        score(toy, tmp_path, f'--from_ckpt={tmp_path / "hf"}')


def test_skipping_first_tokens_gives_the_published_convention(toy, tmp_path):
    """A block's own bytes are its only context and its first byte is not scored: 15 of 16."""
    path, model = save(tmp_path / 'm')
    text, expected, n = open(os.path.join(toy, 'toy', 'test.bin'), 'rb').read()[:90], 0.0, 0
    for start in range(0, 90, T):
        block = text[start:start + T]
        for o in range(1, len(block)):
            expected, n = expected + nats_of(model, block[:o], block[o]), n + 1
    row, = score(toy, tmp_path, f'--from_ckpt={path}', '--max_tokens=90', '--first_token=skip')
    assert row['tokens'] == n == 90 - 6 and row['loss_nats'] * n == pytest.approx(expected, rel=1e-5)
    assert row['bits_per_byte'] == pytest.approx(row['loss_nats'] / math.log(2))


def test_several_checkpoints_on_several_sets_in_one_table(tmp_path, capsys):
    """2 checkpoints x 2 sets x 2 splits are 8 rows; without --dataset each is scored on its own set."""
    data = str(tmp_path / 'data')
    write_dataset(data, 'one')
    write_dataset(data, 'two', sizes=(500, 400, 300))
    a, _ = save(tmp_path / 'a', uniform, dataset='one')
    b, _ = save(tmp_path / 'b', dataset='two')
    rows = score(data, tmp_path, f'--from_ckpt={a},{b}', '--dataset=one,two', '--split=val,test')
    assert [(r['run'], r['data']) for r in rows] == [(run, f'{name}/{part}') for run in 'ab' for name in ('one', 'two')
                                                    for part in ('val', 'test')]
    printed = capsys.readouterr().out
    assert printed.count('| a ') == 4 and printed.count('| b ') == 4
    folder = tmp_path / printed.splitlines()[-1].split(os.sep)[-1]
    assert (folder / 'table.md').read_text() in printed
    with open(folder / 'table.csv', newline='') as f:
        assert [float(r['bits_per_byte']) for r in csv.DictReader(f)] == [r['bits_per_byte'] for r in rows]
    own = score(data, tmp_path, f'--from_ckpt={a},{b}')
    assert [(r['run'], r['data']) for r in own] == [('a', 'one/test'), ('b', 'two/test')]
    assert [r['loss_nats'] for r in own] == [rows[1]['loss_nats'], rows[7]['loss_nats']]


def test_description_lengths_are_model_plus_data(toy, tmp_path):
    """raw and nnz4 counted by hand, data by -log2 p, the training split with the online length of the run."""
    def prune(model):
        model.embed.weight[:, :5] = 0
    path, model = save(tmp_path / 'm', prune)
    write_json(os.path.join(path, 'run.json'), dict(online_description_length_bytes=4321))
    test, train = score(toy, tmp_path, f'--from_ckpt={path}', '--description_length')
    n = sum(p.numel() for p in model.parameters())
    nonzeros = n - 256 * 5
    for row, split, size in ((test, 'test', N_TEST), (train, 'train', 4096)):
        assert (row['split'], row['tokens'], row['n_params'], row['nonzeros']) == (split, size, n, nonzeros)
        data_bytes = row['loss_nats'] * size / math.log(2) / 8
        assert row['data_bytes'] == round(data_bytes)
        assert row['raw_total_bytes'] == 4 * n + row['data_bytes']
        assert row['nnz4_total_bytes'] == 4 * nonzeros + row['data_bytes']
        assert row['data_bytes'] < row['bits_est_total_bytes'] < row['data_bytes'] + n + 2 * 1000
    assert train['online_bytes'] == 4321 and 'online_bytes' not in test


def test_archive_stands_in_the_row_of_the_text_it_holds(toy, tmp_path, monkeypatch, capsys):
    """The size is that of the file on disk; an archive of another text is said to be one."""
    path, _ = save(tmp_path / 'm', uniform)
    packed = tmp_path / 'packed'
    packed.write_bytes(b'x' * 555)
    held = bins.read_meta(toy, 'toy')['splits']['test']['sha256']
    monkeypatch.setattr(archive_file, 'read_archive', lambda raw, name: (1, dict(sha256=held, bytes=N_TEST), [], {}))
    test, train = score(toy, tmp_path, f'--from_ckpt={path}', '--description_length', f'--archive={packed}')
    assert test['archive_bytes'] == 555 and 'archive_bytes' not in train
    assert 'holds another text than toy/train' in capsys.readouterr().out
    leading = hashlib.sha256(open(os.path.join(toy, 'toy', 'test.bin'), 'rb').read(100)).hexdigest()
    monkeypatch.setattr(archive_file, 'read_archive', lambda raw, name: (1, dict(sha256=leading, bytes=100), [], {}))
    both = score(toy, tmp_path, f'--from_ckpt={path}', '--max_tokens=100', f'--archive={packed}',
                 f'--online_archives={packed}')
    assert [r['archive_bytes'] for r in both] == [555, 555] and both[1]['bits_per_byte'] == 8 * 555 / 100
    with pytest.raises(UserError, match='none of the scored splits'):
        score(toy, tmp_path, f'--from_ckpt={path}', f'--online_archives={packed}')


def test_baselines_equal_their_libraries(toy, tmp_path, monkeypatch):
    """Whole file and per block, in bytes, with the settings that the name says."""
    monkeypatch.setenv('PATH', '')
    text = open(os.path.join(toy, 'toy', 'train.bin'), 'rb').read()
    rows = score(toy, tmp_path, '--dataset=toy', '--split=train', '--baselines', '--block_size=256')
    size = {r['run']: r['data_bytes'] for r in rows}
    kinds = {'gzip -9': lambda t: gzip.compress(t, 9), 'bzip2 -9': lambda t: bz2.compress(t, 9),
             'xz -9e': lambda t: lzma.compress(t, preset=9 | lzma.PRESET_EXTREME)}
    for name, compress in kinds.items():
        assert size[name] == len(compress(text))
        assert size[f'{name}, each 256 bytes alone'] == sum(len(compress(text[i:i + 256])) for i in range(0, 4096, 256))
    zstd = pytest.importorskip('zstandard')
    assert size['zstd -19'] == len(zstd.ZstdCompressor(level=19).compress(text))
    whole = next(r for r in rows if r['run'] == 'xz -9e')
    assert whole['archive_bytes'] == whole['data_bytes'] and whole['bits_per_byte'] == 8 * size['xz -9e'] / 4096
    assert all(('archive_bytes' in r) != ('per_block' in r) for r in rows)


def test_external_compressors_are_found_timed_and_excused(toy, tmp_path, monkeypatch, capsys):
    """A tool on PATH gives a row; one that hangs or fails gives a line and the others still run."""
    tools = tmp_path / 'tools'
    tools.mkdir()
    scripts = dict(bzip3='/bin/cp "$4" "$5"; printf more >> "$5"', zpaq='/bin/sleep 20')
    scripts['7z'] = 'exit 3'
    for name, body in scripts.items():
        (tools / name).write_text(f'#!/bin/sh\n{body}\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv('PATH', str(tools))
    real = subprocess.run

    def run(command, **more):
        """The time limit is for the one that hangs: on a busy machine the others may need longer than that."""
        return real(command, **more if command[0].endswith('zpaq') else more | dict(timeout=None))
    monkeypatch.setattr(subprocess, 'run', run)
    rows = score(toy, tmp_path, '--dataset=toy', '--baselines', '--baseline_timeout=0.3')
    assert {r['run']: r['data_bytes'] for r in rows}['bzip3'] == N_TEST + 4
    printed = capsys.readouterr().out
    assert 'zpaq -m5 on toy/test: stopped after 0.3 s' in printed and '7z PPMd on toy/test: failed' in printed
    assert not {'zpaq -m5', '7z PPMd'} & {r['run'] for r in rows} and 'xz -9e' in printed


def test_no_baselines_where_the_file_is_not_the_text(tmp_path, capsys):
    """Token ids are no text: that is said, and no compressor is run on them."""
    data = str(tmp_path / 'data')
    writer = bins.BinWriter(os.path.join(data, 'bpe'), 'test', 'uint16')
    writer.write(list(range(300)), text_bytes=1234)
    bins.write_meta(os.path.join(data, 'bpe'), 'prepare_text.py', [], dict(test=writer.commit()), 'x', 'uint16', 300, 0,
                    dict(name='gpt2', sha256=''))
    path, _ = save(tmp_path / 'm', uniform, dataset='bpe', tokenizer='gpt2', vocab_size=300)
    row, = score(data, tmp_path, f'--from_ckpt={path}', '--baselines')
    assert 'no baselines on bpe/test: its .bin holds gpt2 ids' in capsys.readouterr().out
    assert row['bits_per_byte'] == pytest.approx(300 * math.log2(300) / 1234)


def test_the_same_evaluation_lands_in_the_same_folder(toy, tmp_path):
    """Scored again, the folder is the same, named after knobs, checkpoints and data; another knob has another."""
    path, _ = save(tmp_path / 'm', uniform)
    for flags, n_folders in (((), 1), ((), 1), (('--max_tokens=50',), 2)):
        score(toy, tmp_path, f'--from_ckpt={path}', *flags)
        assert len(list(tmp_path.glob('eval-*'))) == n_folders


BAD = {
    'no checkpoint': ('--from_ckpt=MISSING', 'no checkpoint at'),
    'second one missing': ('--from_ckpt=GOOD,MISSING', 'no checkpoint at'),
    'cut checkpoint': ('--from_ckpt=CUT', 'cut short or not a checkpoint'),
    'nothing to do': ('', 'from_ckpt is empty'),
    'unknown split': ('--from_ckpt=GOOD --split=tset', "no split 'tset'"),
    'unknown set': ('--from_ckpt=GOOD --dataset=nope', 'no data set'),
    'vocabulary': ('--from_ckpt=SMALL', 'vocabulary of 100'),
    'tokenizer': ('--from_ckpt=BPE', "'gpt2' tokens"),
    'block size': ('--from_ckpt=GOOD --block_size=17', 'at most 16'),
    'context': ('--from_ckpt=GOOD --minimal_context_window=17', 'at most 16'),
    'convention': ('--from_ckpt=GOOD --first_token=drop', 'first_token'),
    'stride': ('--from_ckpt=GOOD --stride=17', 'stride = 17, expected at most 16'),
    'two ways': ('--from_ckpt=GOOD --stride=3 --minimal_context_window=3', 'drop one'),
    'negative': ('--from_ckpt=GOOD --max_tokens=-1', 'max_tokens = -1'),
    'archive count': ('--from_ckpt=GOOD --archive=a,b', 'expected one each'),
    'no archive': ('--from_ckpt=GOOD --archive=MISSING', 'no archive at'),
    'metric': ('--from_ckpt=GOOD --metrics=ce,haming', "'haming', expected one of 'ce', 'bpb', 'ppl', 'hamming'"),
    'no metric': ('--from_ckpt=GOOD --metrics=,', 'metrics is empty; name some of ce'),
    'not an archive': ('--from_ckpt=GOOD --archive=CUT', 'is not a nanoMDL archive'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line_and_leaves_nothing(toy, tmp_path, name):
    """The line names the value and the cure; no folder is left that looks like an evaluation."""
    flags, expected = BAD[name]
    places = dict(GOOD=save(tmp_path / 'good')[0], SMALL=save(tmp_path / 'small', vocab_size=100)[0],
                  BPE=save(tmp_path / 'bpe', tokenizer='gpt2')[0], MISSING=str(tmp_path / 'missing'),
                  CUT=str(tmp_path / 'cut.pt'))
    with open(os.path.join(places['GOOD'], 'ckpt.pt'), 'rb') as f:
        (tmp_path / 'cut.pt').write_bytes(f.read()[:5000])
    for word, path in places.items():
        flags = flags.replace(word, path)
    with pytest.raises(UserError, match=expected) as caught:
        run_here('eval.py', f'--data_dir={toy}', f'--out={tmp_path / "out"}', '--device=cpu', *flags.split())
    assert '\n' not in str(caught.value) and not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_a_script_error_is_one_line_and_exit_code_1(toy, tmp_path):
    done = run_script('eval.py', f'--from_ckpt={tmp_path}', f'--data_dir={toy}')
    assert done.returncode == 1 and done.stderr.startswith('error: no checkpoint') and done.stderr.count('\n') == 1


# --- the interval over documents ---

def write_documents(data_dir, name, documents, end=b'\n\n\n'):
    """A byte-level set whose test split is these documents with the mark between them."""
    folder, entries = os.path.join(data_dir, name), {}
    for split in ('train', 'test'):
        writer = bins.BinWriter(folder, split)
        writer.write(end.join(documents))
        entries[split] = writer.commit()
    bins.write_meta(folder, 'test', [], entries, dict(kind='test'))


def test_interval_is_the_bootstrap_over_documents(tmp_path):
    """Against brute force: losses token by token, cut at the marks, resampled by the same generator."""
    rng = np.random.default_rng(3)
    documents = [make_text(int(n), seed=i) for i, n in enumerate(rng.integers(5, 90, 40))]
    write_documents(str(tmp_path), 'toy', documents)
    path, model = save(tmp_path / 'run')
    run_here('eval.py', f'--from_ckpt={path}', f'--data_dir={tmp_path}', f'--out={tmp_path / "out"}', '--device=cpu',
             '--bootstrap=500')
    folder = next(p for p in (tmp_path / 'out').iterdir())
    row = read_run(str(folder))['rows'][0]
    data = open_split(str(tmp_path), 'toy', 'test')
    x, y = data.gather(list(range(0, data.n_tokens, T)), T)
    with torch.no_grad():
        logits, targets = model(torch.from_numpy(x)).flatten(0, 1), torch.from_numpy(y).flatten()
        nats = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction='none').numpy()
    sizes = [len(d) + 3 for d in documents[:-1]] + [len(documents[-1])]         # the mark ends its document
    sums = np.array([part.sum() for part in np.split(nats[:data.n_tokens].astype(np.float64), np.cumsum(sizes)[:-1])])
    rng, means = np.random.default_rng(0), []
    for _ in range(500):
        drawn = rng.integers(0, 40, 40)
        means.append(sums[drawn].sum() / np.array(sizes)[drawn].sum())
    assert (row['loss_low'], row['loss_high']) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), rel=1e-6)
    assert row['loss_low'] < row['loss_nats'] < row['loss_high'] and row['interval_over'] == '40 documents'
    with open(folder / 'table.csv', newline='') as f:
        assert next(csv.DictReader(f))['interval_over'] == '40 documents'
    run_here('eval.py', f'--from_ckpt={path}', f'--data_dir={tmp_path}', f'--out={tmp_path / "off"}', '--bootstrap=0')
    assert 'loss_low' not in (next((tmp_path / 'off').iterdir()) / 'table.md').read_text()


def test_few_documents_give_way_to_blocks_of_2048_bytes(tmp_path):
    import score
    few = bins.Bin(np.frombuffer(b'\n\n\n'.join([b'x' * 3000] * 5), np.uint8), name='few')
    units = score.Units(few)
    assert units.edges.tolist() == list(range(0, 15012, 2048)) and 'only 5 documents' in units.kind
    many = bins.Bin(np.array([7, 50, 7] * 40 + [7], np.uint16), 60, start_id=50, text_bytes=500, tokenizer='gpt2')
    assert score.Units(many).edges.tolist() == [0, *range(1, 120, 3)]
    many.index = str(tmp_path / 'index')
    np.arange(0, 200, 2, dtype='<u8').tofile(many.index)    # what the set itself says comes first
    assert score.Units(many).edges.tolist() == list(range(0, 121, 2))
    wiki = bins.Bin(np.frombuffer(b'\n_START_ARTICLE_\nA\n\n\nb' * 30, np.uint8))
    assert score.Units(wiki).edges.tolist() == list(range(0, 22 * 30, 22))
    mark = bins.Bin(np.frombuffer((b'x' * ((1 << 20) - 2) + b'\n\n\n') * 2 + b'abc\n\n\n' * 30, np.uint8))
    assert score.Units(mark).edges[:4].tolist() == [0, (1 << 20) + 1, 2 * (1 << 20) + 2, 2 * (1 << 20) + 8]


def test_a_mixture_is_evaluated_on_its_own_sets(tmp_path):
    for name in ('a', 'b'):
        write_dataset(str(tmp_path), name)
    path, _ = save(tmp_path / 'run', dataset='a:0.5,b:0.5')
    run_here('eval.py', f'--from_ckpt={path}', f'--data_dir={tmp_path}', f'--out={tmp_path / "out"}', '--device=cpu')
    rows = read_run(str(next((tmp_path / 'out').iterdir())))['rows']
    assert [r['data'] for r in rows] == ['a/test', 'b/test']


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='RssAnon is Linux')
def test_memory_is_flat_in_the_number_of_tokens(tmp_path):
    """A stub of a model over a memory map: 1 MB and 30 MB of documents differ by sums of documents, not of tokens."""
    import threading
    import time

    from conftest import OneProcess

    import score
    stub, peaks = torch.nn.Module(), []
    stub.forward = lambda x: torch.zeros(*x.shape, 2)
    for n_tokens in (1_000_000, 30_000_000):
        path, done = tmp_path / f'{n_tokens}', threading.Event()
        np.tile(np.array([0, 1] * 999 + [10, 10], np.uint8), n_tokens // 2000).tofile(path)
        data = bins.Bin(np.memmap(path, np.uint8, 'r'), 2, start_id=10, tokenizer='gpt2', text_bytes=n_tokens)
        y_in_vocabulary = data.gather
        data.gather = lambda starts, n, get=y_in_vocabulary: tuple(np.where(a > 1, 1, a) for a in get(starts, n))
        before, peak = rss_anon_bytes(), [0]

        def watch(done=done, peak=peak):
            while not done.is_set():
                peak[0] = max(peak[0], rss_anon_bytes())
                time.sleep(0.01)
        thread = threading.Thread(target=watch)
        thread.start()
        units = score.Units(data)
        found = score.evaluate(stub, data, 1024, 256, OneProcess(), units=units)
        assert found['loss_nats'] == pytest.approx(math.log(2)) and len(units.edges) == n_tokens // 1000 + 1
        done.set()
        thread.join()
        peaks.append(peak[0] - before)
    assert abs(peaks[1] - peaks[0]) < 50e6, peaks
