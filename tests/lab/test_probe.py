"""lab/probe.py: what is frozen stays, numbers equal loops, a better encoder shows, a probe pauses and goes on."""
import csv
import math
import os
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import run_here, same, snapshot, torchrun

import score
from configurator import UserError
from corpus import bins
from lab import probe
from model import GPT, ModelConfig, make, model_args
from training import huggingface
from training.checkpoint import load_checkpoint, load_model, save_checkpoint
from training.folder import close_run_folders, read_run, read_status
from training.plan import Schedule
from training.process import PAUSED

T, C, SYMBOLS = 8, 48, 4                        # rows of 8 draws from 4 letters: 16 bits
FLAGS = ('--device=cpu', '--dtype=float32', '--max_iters=200', '--batch_size=64', '--learning_rate=3e-3',
         '--log_interval=100')


def config(**options):
    return ModelConfig(**dict(dict(block_size=T, vocab_size=256, n_layer=1, n_head=2, n_embd=C), **options))


def save(folder, model, dataset='draws', tokenizer='byte'):
    os.makedirs(folder)
    facts = dict(dataset=dataset, sha256='', start_id=10, tokenizer=tokenizer)
    save_checkpoint(os.path.join(folder, 'ckpt.pt'), dict(
        model=model.state_dict(), model_args=model_args(model), masks={}, config={}, data=facts))
    bins.write_json(os.path.join(folder, 'run.json'), dict(status='done'))
    return str(folder)


@pytest.fixture(scope='module')
def draws(tmp_path_factory):
    """A data set of letters drawn at random, and the run folder of an encoder that was trained to keep them."""
    out = tmp_path_factory.mktemp('probe')
    rng, entries = np.random.default_rng(0), {}
    for split, n_rows in (('train', 4096), ('test', 256)):
        writer = bins.BinWriter(str(out / 'data' / 'draws'), split)
        writer.write(rng.integers(97, 97 + SYMBOLS, n_rows * T).astype(np.uint8).tobytes(), text_bytes=n_rows * T)
        entries[split] = writer.commit()
    bins.write_meta(str(out / 'data' / 'draws'), 'prepare_text.py', [], entries, dict(kind='test'))
    data = torch.from_numpy(np.fromfile(out / 'data' / 'draws' / 'train.bin', np.uint8).astype(np.int64)).view(-1, T)
    torch.manual_seed(0)
    joint = make(config(wrapper='autoencoder', spread='unroll'))
    optimizer = torch.optim.AdamW(joint.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(400):
        for group in optimizer.param_groups:
            group['lr'] = 3e-3 * (1 - step / 400)
        x = data[step * 64 % 4096:][:64]
        (joint(x, x) / x.numel()).backward()
        torch.nn.utils.clip_grad_norm_(joint.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return str(out / 'data'), save(out / 'encoder', joint)


@pytest.fixture
def run_probe(draws, tmp_path):
    def call(*flags, out='probe'):
        return run_here('lab/probe.py', f'--data_dir={draws[0]}', f'--from_ckpt={draws[1]}',
                        f'--out_dir={tmp_path / out}', *FLAGS, *flags)
    return call


@pytest.fixture
def keep_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def table(folder):
    with open(os.path.join(folder, 'train_loss.csv'), newline='') as f:
        return [{k: v for k, v in row.items() if k != 'seconds'} for row in csv.DictReader(f)]


def probe_of(out, encoder):
    """Put together again what was trained: an encoder, which no training has touched, and the decoder of out."""
    saved = load_checkpoint(str(out / 'ckpt.pt'))
    model = probe.Probe(encoder, ModelConfig(**saved['model_args']))
    model.decoder.load_state_dict(saved['decoder'])
    return model.eval()


def test_an_encoder_that_keeps_its_input_beats_an_untrained_one(run_probe, draws, tmp_path, capsys):
    """The gap shows in all numbers, which equal a loop over the encoder as its checkpoint, or its seed, has it."""
    assert run_probe('--untrained', '--own_decoder') == 0
    record = read_run(tmp_path / 'probe')
    trained, fresh, own = record['rows']
    assert record['status'] == 'done' and [r['kind'] for r in record['rows']] == ['trained', 'untrained', 'own decoder']
    assert trained['accuracy'] > fresh['accuracy'] + 0.2 and trained['information'] > fresh['information'] + 0.05
    assert trained['embedding_nats'] == pytest.approx(C * 16 * math.log(2) / T) and trained['numbers'] == C
    ids = torch.from_numpy(np.fromfile(os.path.join(draws[0], 'draws', 'test.bin'), np.uint8).astype(np.int64))
    encoder, _ = load_model(draws[1])
    torch.manual_seed(858 + 1)
    untrained = make(config(wrapper='autoencoder', spread='unroll'))
    models = [probe_of(tmp_path / 'probe' / 'encoder', encoder.eval()),
              probe_of(tmp_path / 'probe' / 'encoder-untrained', untrained.eval())]
    for model, row in zip(models, (trained, fresh)):
        nats, right = 0.0, 0
        for x in ids.view(-1, T):                           # one vector, T predictions
            vector = model.encoder.encode(x[None])[0].detach()
            cyclic = torch.stack([torch.cat((vector, vector))[i:i + C // 2] for i in range(T)])
            states = model.decoder.hidden(model.decoder.unroll(cyclic[None]))
            logits = model.decoder.head(states)[0].detach().double().log_softmax(-1)
            nats -= float(logits[range(T), x].sum())
            right += int((logits.argmax(-1) == x).sum())
        assert row['loss_nats'] == pytest.approx(nats / len(ids), rel=1e-5) and row['accuracy'] == right / len(ids)
        assert row['information'] == pytest.approx(1 - nats / len(ids) / math.log(256), rel=1e-5)
    autoencoder, _ = load_model(draws[1])
    with torch.no_grad():                                   # the decoder that it was trained with
        expected = float(autoencoder.eval()(ids.view(-1, T), ids.view(-1, T))) / len(ids)
    assert own['loss_nats'] == pytest.approx(expected, rel=1e-5) and own['accuracy'] > fresh['accuracy'] + 0.2
    printed = capsys.readouterr().out
    assert '| trained ' in printed and 'information' in printed
    for name in ('run.json', 'table.md', 'table.csv', *(f'{encoder}/{file}' for encoder in (
            'encoder', 'encoder-untrained') for file in ('ckpt.pt', 'log.txt', 'train_loss.csv', 'loss.png'))):
        assert (tmp_path / 'probe' / name).stat().st_size > 0, name


@pytest.mark.parametrize('number', (signal.SIGUSR1, signal.SIGINT))
def test_a_paused_probe_ends_with_the_same_bytes(number, run_probe, tmp_path, monkeypatch, keep_ctrl_c):
    """A signal in the second of two encoders, then a resume: it goes on, the first is kept, all is as unbroken."""
    flags = ('--untrained', '--max_iters=6')
    assert run_probe(*flags, out='whole') == 0
    real = Schedule.rate
    calls = []

    def interrupt(self, step, peak):
        calls.append(step)
        if len(calls) == 9:
            os.kill(os.getpid(), number)
        return real(self, step, peak)
    monkeypatch.setattr(Schedule, 'rate', interrupt)
    assert run_probe(*flags) == PAUSED
    for folder in ('probe', 'probe/encoder-untrained'):
        assert read_status(tmp_path / folder) == 'paused'
        assert '--init_from=resume' in read_run(tmp_path / folder)['paused']
    first = os.stat(tmp_path / 'probe' / 'encoder' / 'ckpt.pt').st_mtime_ns
    for more, words in ((('--learning_rate=1e-4',), 'cannot resume: learning_rate = 0.0001'),
                        (('--n_layer=2',), 'cannot resume: n_layer = 2')):
        with pytest.raises(UserError, match=words):
            run_probe(*flags, *more, '--init_from=resume')
    with pytest.raises(UserError, match='continue it with --init_from=resume'):
        run_probe(*flags)
    assert run_probe(*flags, '--init_from=resume') == 0
    assert calls == [*range(6), 0, 1, 2, 3, 4, 5] and os.stat(
        tmp_path / 'probe' / 'encoder' / 'ckpt.pt').st_mtime_ns == first
    for name in ('encoder', 'encoder-untrained'):
        a, b = (load_checkpoint(str(tmp_path / out / name / 'ckpt.pt')) for out in ('whole', 'probe'))
        assert all(same(a[key], b[key]) for key in ('decoder', 'optimizer', 'step', 'tokens'))
        assert table(tmp_path / 'whole' / name) == table(tmp_path / 'probe' / name)
    a, b = (read_run(tmp_path / out)['rows'] for out in ('whole', 'probe'))
    assert [row | dict(seconds=0) for row in a] == [row | dict(seconds=0) for row in b]
    with pytest.raises(UserError, match='finished run'):
        run_probe(*flags, '--init_from=resume')


def test_ctrl_c_while_a_probe_is_scored(run_probe, tmp_path, monkeypatch, keep_ctrl_c):
    """The decoder is saved: out at once, both run.json paused, and a resume scores without a step of training."""
    assert run_probe('--max_iters=3', out='whole') == 0
    real = score.evaluate

    def interrupted(*args, **named):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **named)
    with monkeypatch.context() as patch:
        patch.setattr(score, 'evaluate', interrupted)
        patch.setattr(os, '_exit', sys.exit)
        assert run_probe('--max_iters=3') == PAUSED
    for folder in ('probe', 'probe/encoder'):
        assert '--init_from=resume' in read_run(tmp_path / folder)['paused']
    assert run_probe('--max_iters=3', '--init_from=resume') == 0
    a, b = (read_run(tmp_path / out)['rows'][0] for out in ('whole', 'probe'))
    assert a['loss_nats'] == b['loss_nats']
    assert table(tmp_path / 'whole' / 'encoder') == table(tmp_path / 'probe' / 'encoder')


def test_a_start_that_fails_costs_no_older_probe(run_probe, tmp_path, monkeypatch):
    """Out of memory in the first step of --overwrite: the finished probe is as it was, its encoder's folder too."""
    flags = ('--max_iters=2', '--overwrite')
    run_probe(*flags)
    before = snapshot(tmp_path)

    def out_of_memory(*_):
        raise RuntimeError('out of memory')
    with monkeypatch.context() as patch:
        patch.setattr(Schedule, 'rate', out_of_memory)
        with pytest.raises(RuntimeError, match='out of memory'):
            run_probe(*flags)
    close_run_folders()                                     # as at exit
    assert snapshot(tmp_path) == before
    assert run_probe(*flags, '--seed=3') == 0
    assert read_run(tmp_path / 'probe')['seed'] == 3 and os.listdir(tmp_path) == ['probe']
    assert sorted(os.listdir(tmp_path / 'probe')) == ['encoder', 'run.json', 'table.csv', 'table.md']


def test_a_probe_refuses_before_its_first_encoder_is_trained(run_probe, tmp_path):
    """The folder of the second encoder holds what no run made: said at once, not after hours."""
    folder = tmp_path / 'probe' / 'encoder-untrained'
    os.makedirs(folder)
    (folder / 'log.txt').write_text('mine')
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match='log.txt'):
        run_probe('--untrained', '--overwrite')
    assert snapshot(tmp_path) == before


def test_a_probe_does_not_replace_its_encoder(run_probe, draws):
    before = snapshot(draws[1])
    with pytest.raises(UserError, match='lies in out_dir'):
        run_probe(f'--out_dir={draws[1]}', '--overwrite')
    assert snapshot(draws[1]) == before


@pytest.mark.slow
def test_micro_batches_and_ranks_change_nothing(run_probe, draws, tmp_path):
    """Four micro-batches, and two processes: the losses of one, to float rounding."""
    run_probe('--max_iters=4')
    run_probe('--max_iters=4', '--micro_batch_size=16', out='micro')
    done = torchrun(2, '-m', 'lab.probe', f'--data_dir={draws[0]}', f'--from_ckpt={draws[1]}',
                    f'--out_dir={tmp_path / "two"}',
                    *FLAGS, '--max_iters=4')
    assert done.returncode == 0, done.stderr[-2000:]
    one, *others = (table(tmp_path / out / 'encoder') for out in ('probe', 'micro', 'two'))
    for other in others:
        for a, b in zip(one, other, strict=True):
            assert float(a['loss_nats']) == pytest.approx(float(b['loss_nats']), rel=2e-5)
    a, b = (read_run(tmp_path / out)['rows'][0] for out in ('probe', 'two'))
    assert a['loss_nats'] == pytest.approx(b['loss_nats'], rel=1e-4) and a['tokens'] == b['tokens']


def test_a_hugging_face_folder_is_an_encoder(draws, tmp_path):
    """The same weights as a GPT-2 folder give the same numbers; the data set must then be named."""
    torch.manual_seed(5)
    path = save(tmp_path / 'm', GPT(config(positions='learned')))
    huggingface.main(['export', f'{path}/ckpt.pt', str(tmp_path / 'folder')])
    flags = ['lab/probe.py', f'--data_dir={draws[0]}', f'--from_ckpt={path},{tmp_path / "folder"}',
             f'--out_dir={tmp_path / "p"}', *FLAGS, '--max_iters=5', '--spread=repeat', '--positions=learned']
    with pytest.raises(UserError, match='--dataset=NAME'):
        run_here(*flags)
    assert run_here(*flags, '--dataset=draws') == 0
    one, two = read_run(tmp_path / 'p')['rows']
    assert one['loss_nats'] == two['loss_nats'] and (one['encoder'], two['encoder']) == ('m', 'folder')


@pytest.mark.parametrize('options, flags, numbers', [
    (dict(block_type='mixer', positions='none'), (), C), (dict(wrapper='oracle', bottleneck=5), ('--n_embd=16',), 5),
    (dict(wrapper='memory', chunk_size=4), ('--block_type=multihead_mixer', '--spread=repeat'), C),
    (dict(wrapper='autoencoder', bottleneck=7, block_type='multihead_mixer', positions='none'), ('--kernel=3',), 7)],
    ids=str)
def test_every_kind_of_model_is_an_encoder(options, flags, numbers, draws, tmp_path):
    """Its vector, of any width, reaches a decoder of any width and type; a memory model's stands for a chunk."""
    torch.manual_seed(6)
    path = save(tmp_path / 'm', make(config(**options)))
    assert run_here('lab/probe.py', f'--data_dir={draws[0]}', f'--from_ckpt={path}', f'--out_dir={tmp_path / "p"}',
                    *FLAGS, '--max_iters=3', *flags) == 0
    row, = read_run(tmp_path / 'p')['rows']
    length = options.get('chunk_size', T)
    assert row['numbers'] == numbers and row['tokens'] == 256 * T
    assert row['embedding_nats'] == pytest.approx(numbers * 16 * math.log(2) / length)
    assert read_run(tmp_path / 'p' / 'm')['seq_length'] == length
    with pytest.raises(UserError, match='the decoder of a probe'):
        load_model(str(tmp_path / 'p' / 'm'))


def test_a_probe_compiles_in_one_piece():
    """A frozen memory model with mixers: one graph, the same loss, gradients in the decoder alone."""
    torch.manual_seed(9)
    encoder = make(config(wrapper='memory', chunk_size=4, block_type='mixer', positions='none'))
    model = probe.Probe(encoder, config(block_size=4, wrapper='autoencoder', spread='unroll')).train()
    ids = torch.randint(256, (2, 4))
    loss = torch.compile(model, backend='eager', fullgraph=True)(ids, ids)
    torch.testing.assert_close(loss, model(ids, ids))
    loss.backward()
    assert all((p.grad is None) == name.startswith('encoder.') for name, p in model.named_parameters())


# --- bad input ---

BAD = {
    'no encoder': ('--from_ckpt=', 'from_ckpt is empty'),
    'vocabulary': ('--from_ckpt=SMALL', "with a vocabulary of 100, data set 'draws'"),
    'tokenizer': ('--from_ckpt=BPE', "reads 'gpt2' tokens"),
    'long rows': ('--block_size=9', 'rows have 9 tokens, .* at most 8; write --block_size=8'),
    'entropy': ('--mode=entropy', 'python -m lab.entropy'),
    'spread': ('--spread=roll', "spread = 'roll'"),
    'rotary repeat': ('--spread=repeat --positions=rotary', 'cannot tell apart'),
    'no steps': ('--max_iters=0', 'max_iters = 0, expected at least 1'),
    'batch': ('--batch_size=6 --micro_batch_size=4', 'not a multiple'),
    'split': ('--split=val', "no split 'val'"),
    'two sets': ('--from_ckpt=GOOD,OTHER', 'name one for all, --dataset=NAME'),
    'heads': ('--n_head=5', 'is not a multiple of n_head = 5'),
    'missing': ('--from_ckpt=MISSING', 'no checkpoint at'),
    'no memory': ('--from_ckpt=BLIND', "has no encoder .memory = 'none'."),
    'odd mixer': ('--block_type=mixer --block_size=7', "block_size = 7, a mixer's must be even"),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, draws, tmp_path):
    """The line names the value and the cure; no folder is made."""
    flags, expected = BAD[name]
    makers = dict(BLIND=lambda p: save(p, make(config(wrapper='oracle', memory='none'))),
                  SMALL=lambda p: save(p, GPT(config(vocab_size=100))), MISSING=lambda p: f'{p}/none',
                  BPE=lambda p: save(p, GPT(config()), tokenizer='gpt2'),
                  OTHER=lambda p: save(p, GPT(config()), dataset='other'), GOOD=lambda p: draws[1])
    for word, maker in makers.items():
        if word in flags:
            flags = flags.replace(word, maker(tmp_path / word.lower()))
    with pytest.raises(UserError, match=expected) as caught:
        run_here('lab/probe.py', f'--data_dir={draws[0]}', f'--from_ckpt={draws[1]}', f'--out_dir={tmp_path / "out"}',
                 *FLAGS, *flags.split())
    assert '\n' not in str(caught.value) and not (tmp_path / 'out').exists()


def test_names_of_encoders_differ():
    assert probe.names_of(['out/a', 'out/b/', 'out/a/best.pt', 'other/a/ckpt.pt', 'gpt2']) == [
        'a', 'b', 'a-best', 'a-3', 'gpt2']
