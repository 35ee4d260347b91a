"""lab/probe.py: what is frozen stays, numbers equal loops, a better encoder shows, entropies equal closed forms."""
import csv
import math
import os
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import OneProcess, run_here, same, torchrun

import runs
import score
from configurator import UserError
from corpus import bins
from corpus.data import open_split
from lab import probe
from model import GPT, ModelConfig, make, model_args

T, C, SYMBOLS = 8, 48, 4                        # rows of 8 draws from 4 letters: 16 bits
FLAGS = ('--device=cpu', '--dtype=float32', '--max_iters=200', '--batch_size=64', '--learning_rate=3e-3',
         '--log_interval=100')


def config(**options):
    return ModelConfig(**dict(dict(block_size=T, vocab_size=256, n_layer=1, n_head=2, n_embd=C), **options))


def save(folder, model, dataset='draws', tokenizer='byte'):
    os.makedirs(folder)
    facts = dict(dataset=dataset, sha256='', start_id=10, tokenizer=tokenizer)
    runs.save_checkpoint(os.path.join(folder, 'ckpt.pt'), dict(
        model=model.state_dict(), model_args=model_args(model), masks={}, config={}, data=facts))
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
        return probe.main([f'--data_dir={draws[0]}', f'--from_ckpt={draws[1]}', f'--out_dir={tmp_path / out}', *FLAGS,
                           *flags])
    return call


def table(folder):
    with open(os.path.join(folder, 'train_loss.csv'), newline='') as f:
        return [{k: v for k, v in row.items() if k != 'seconds'} for row in csv.DictReader(f)]


def test_ctrl_c_while_a_probe_is_scored(run_probe, tmp_path, monkeypatch):
    """The decoder is saved: out at once, both run.json paused, and a resume scores without a step of training."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert run_probe('--max_iters=3', out='whole') == 0
    real = score.evaluate

    def interrupted(*args, **named):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **named)
    with monkeypatch.context() as patch:
        patch.setattr(score, 'evaluate', interrupted)
        patch.setattr(os, '_exit', sys.exit)
        with pytest.raises(SystemExit) as left:
            run_probe('--max_iters=3')
    assert left.value.code == runs.PAUSED
    for folder in ('probe', 'probe/encoder'):
        assert '--init_from=resume' in runs.read_run(tmp_path / folder)['paused']
    assert run_probe('--max_iters=3', '--init_from=resume') == 0
    a, b = (runs.read_run(tmp_path / out)['rows'][0] for out in ('whole', 'probe'))
    assert a['loss_nats'] == b['loss_nats']
    assert table(tmp_path / 'whole' / 'encoder') == table(tmp_path / 'probe' / 'encoder')


def test_an_encoder_that_keeps_its_input_beats_an_untrained_one(run_probe, draws, tmp_path, monkeypatch, capsys):
    """The gap shows in all numbers, which equal a loop; encoders get no gradient and keep every bit."""
    made, real = [], probe.make_probe

    def watched(encoder, decoder):
        made.append((real(encoder, decoder), {n: t.clone() for n, t in encoder.state_dict().items()}))
        return made[-1][0]
    monkeypatch.setattr(probe, 'make_probe', watched)
    assert run_probe('--untrained', '--own_decoder') == 0
    record = runs.read_run(tmp_path / 'probe')
    trained, fresh, own = record['rows']
    assert record['status'] == 'done' and [r['kind'] for r in record['rows']] == ['trained', 'untrained', 'own decoder']
    assert trained['accuracy'] > fresh['accuracy'] + 0.2 and trained['information'] > fresh['information'] + 0.05
    assert trained['embedding_nats'] == pytest.approx(C * 16 * math.log(2) / T) and trained['numbers'] == C
    ids = torch.from_numpy(np.fromfile(os.path.join(draws[0], 'draws', 'test.bin'), np.uint8).astype(np.int64))
    for (model, before), row in zip(made, (trained, fresh)):
        assert same(before, dict(model.encoder.state_dict())) and not model.encoder.training
        assert all(p.grad is None and not p.requires_grad for p in model.encoder.parameters())
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
    assert not same(made[0][1], made[1][1]) and len(made) == 2
    autoencoder, _ = runs.load_model(draws[1])
    with torch.no_grad():                                   # the decoder that it was trained with
        expected = float(autoencoder.eval()(ids.view(-1, T), ids.view(-1, T))) / len(ids)
    assert own['loss_nats'] == pytest.approx(expected, rel=1e-5) and own['accuracy'] > fresh['accuracy'] + 0.2
    printed = capsys.readouterr().out
    assert '| trained ' in printed and 'information' in printed
    for name in ('run.json', 'table.md', 'table.csv', *(f'{encoder}/{file}' for encoder in (
            'encoder', 'encoder-untrained') for file in ('ckpt.pt', 'log.txt', 'train_loss.csv', 'loss.png'))):
        assert (tmp_path / 'probe' / name).stat().st_size > 0, name


@pytest.mark.parametrize('number', (signal.SIGUSR1, signal.SIGINT))
def test_a_paused_probe_ends_with_the_same_bytes(number, run_probe, tmp_path, monkeypatch):
    """A signal in the second of two encoders, then a resume: it goes on, the first is kept, all is as unbroken."""
    flags = ('--untrained', '--max_iters=6')
    assert run_probe(*flags, out='whole') == 0
    real, calls = probe.rate_at, []

    def interrupt(step, *more):
        calls.append(step)
        if len(calls) == 9:
            os.kill(os.getpid(), number)
        return real(step, *more)
    monkeypatch.setattr(probe, 'rate_at', interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert run_probe(*flags) == runs.PAUSED and runs.read_status(tmp_path / 'probe') == 'paused'
    assert '--init_from=resume' in runs.read_run(tmp_path / 'probe')['paused']
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
        a, b = (runs.load_checkpoint(str(tmp_path / out / name / 'ckpt.pt')) for out in ('whole', 'probe'))
        assert all(same(a[key], b[key]) for key in ('decoder', 'optimizer', 'step', 'tokens'))
        assert table(tmp_path / 'whole' / name) == table(tmp_path / 'probe' / name)
    a, b = (runs.read_run(tmp_path / out)['rows'] for out in ('whole', 'probe'))
    assert [row | dict(seconds=0) for row in a] == [row | dict(seconds=0) for row in b]
    with pytest.raises(UserError, match='finished run'):
        run_probe(*flags, '--init_from=resume')


def test_micro_batches_and_ranks_change_nothing(run_probe, draws, tmp_path):
    """Four micro-batches, and two processes: the losses of one, to float rounding."""
    run_probe('--max_iters=4')
    run_probe('--max_iters=4', '--micro_batch_size=16', out='micro')
    done = torchrun(2, 'lab/probe.py', f'--data_dir={draws[0]}', f'--from_ckpt={draws[1]}',
                    f'--out_dir={tmp_path / "two"}',
                    *FLAGS, '--max_iters=4')
    assert done.returncode == 0, done.stderr[-2000:]
    one, *others = (table(tmp_path / out / 'encoder') for out in ('probe', 'micro', 'two'))
    for other in others:
        for a, b in zip(one, other, strict=True):
            assert float(a['loss_nats']) == pytest.approx(float(b['loss_nats']), rel=2e-5)
    a, b = (runs.read_run(tmp_path / out)['rows'][0] for out in ('probe', 'two'))
    assert a['loss_nats'] == pytest.approx(b['loss_nats'], rel=1e-4) and a['tokens'] == b['tokens']


def test_a_hugging_face_folder_is_an_encoder(draws, tmp_path):
    """The same weights as a GPT-2 folder give the same numbers; the data set must then be named."""
    torch.manual_seed(5)
    path = save(tmp_path / 'm', GPT(config(positions='learned')))
    run_here('runs.py', 'export', f'{path}/ckpt.pt', tmp_path / 'folder')
    flags = [f'--data_dir={draws[0]}', f'--from_ckpt={path},{tmp_path / "folder"}', f'--out_dir={tmp_path / "p"}',
             *FLAGS, '--max_iters=5', '--spread=repeat', '--positions=learned']
    with pytest.raises(UserError, match='--dataset=NAME'):
        probe.main(flags)
    assert probe.main([*flags, '--dataset=draws']) == 0
    one, two = runs.read_run(tmp_path / 'p')['rows']
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
    assert probe.main([f'--data_dir={draws[0]}', f'--from_ckpt={path}', f'--out_dir={tmp_path / "p"}', *FLAGS,
                       '--max_iters=3', *flags]) == 0
    row, = runs.read_run(tmp_path / 'p')['rows']
    length = options.get('chunk_size', T)
    assert row['numbers'] == numbers and row['tokens'] == 256 * T
    assert row['embedding_nats'] == pytest.approx(numbers * 16 * math.log(2) / length)
    assert runs.read_run(tmp_path / 'p' / 'm')['seq_length'] == length
    with pytest.raises(UserError, match='the decoder of a probe'):
        runs.load_model(str(tmp_path / 'p' / 'm'))


def test_a_probe_compiles_in_one_piece():
    """A frozen memory model with mixers: one graph, the same loss, gradients in the decoder alone."""
    torch.manual_seed(9)
    encoder = make(config(wrapper='memory', chunk_size=4, block_type='mixer', positions='none'))
    model = probe.make_probe(encoder, config(block_size=4, wrapper='autoencoder', spread='unroll')).train()
    ids = torch.randint(256, (2, 4))
    loss = torch.compile(model, backend='eager', fullgraph=True)(ids, ids)
    torch.testing.assert_close(loss, model(ids, ids))
    loss.backward()
    assert all((p.grad is None) == name.startswith('encoder.') for name, p in model.named_parameters())


# --- entropy ---

TRANSITIONS = np.array([[0.7, 0.2, 0.1], [0.05, 0.05, 0.9], [1 / 3, 1 / 3, 1 / 3]])


class Bigram(torch.nn.Module):
    """Predict with the very transition matrix of the source."""

    config = ModelConfig(block_size=64, vocab_size=3)

    def forward(self, x):
        return torch.from_numpy(TRANSITIONS).log()[x]


class Oracle(torch.nn.Module):
    """Know how often each symbol stands in the window (from its inputs), and predict each with that share."""

    def forward(self, x):
        shares = torch.stack([(x == a).double().mean(1) for a in range(3)], 1).clamp(min=1e-12)
        return shares.log()[:, None].expand(*x.shape, 3)


def chain(n, seed=0):
    """Draw n symbols of the bigram source from its stationary distribution."""
    rng, values = np.random.default_rng(seed), np.linalg.eig(TRANSITIONS.T)
    stationary = np.real(values[1][:, np.argmax(values[0].real)])
    stationary /= stationary.sum()
    states = [int(rng.choice(3, p=stationary))]
    for _ in range(n):
        states.append(int(rng.choice(3, p=TRANSITIONS[states[-1]])))
    return states, stationary


def test_two_windows_of_a_bigram_source_are_its_conditional_entropy():
    """H(X'|X) = -sum pi_a P_ab ln P_ab in closed form, from the chain rule alone; each token costs -ln P exactly."""
    states, stationary = chain(12_000)
    x, y = torch.tensor(states[:-1]).view(-1, 12), torch.tensor(states[1:]).view(-1, 12)
    found = score.two_windows(Bigram(), x, y)
    costs = -torch.from_numpy(TRANSITIONS).log()[x, y]
    torch.testing.assert_close(found, costs, rtol=0, atol=2e-5)         # sums of up to 12 tokens in float32
    expected = -float((stationary[:, None] * TRANSITIONS * np.log(TRANSITIONS)).sum())
    deviation = float(costs.std()) / math.sqrt(costs.numel())
    assert float(found.mean()) == pytest.approx(expected, abs=4 * deviation)


def test_two_windows_of_a_model_that_sees_its_window():
    """With shares known, S(t) is t times the empirical entropy, so that a token costs its increment, not its loss."""
    states, _ = chain(40, seed=1)
    x = torch.tensor(states[:40]).view(2, 20)
    found = score.two_windows(Oracle(), x, x)                           # the symbols counted are those predicted
    for row, costs in zip(x.tolist(), found.tolist()):
        sums = [0.0]
        for t in range(1, 21):
            shares = np.bincount(row[:t], minlength=3) / t
            sums.append(-t * sum(p * math.log(p) for p in shares if p))
        assert costs == pytest.approx(np.diff(sums).tolist(), abs=1e-5)
    loss = F.cross_entropy(Oracle()(x).flatten(0, 1), x.flatten(), reduction='none').view(2, 20)
    assert not torch.allclose(loss, found, atol=0.05)
    torch.testing.assert_close(loss.sum(1), found.sum(1), rtol=0, atol=1e-4)


def test_entropy_of_a_causal_model_is_its_loss(draws, tmp_path, capsys):
    """Both columns of entropy.csv agree token by token, and their mean is what score.py finds on these rows."""
    torch.manual_seed(3)
    model = GPT(config()).eval()
    path = save(tmp_path / 'm', model)
    flags = [f'--data_dir={draws[0]}', f'--from_ckpt={path}', f'--out_dir={tmp_path / "e"}', '--mode=entropy',
             '--device=cpu', '--dtype=float32', '--max_rows=5']
    assert probe.main(flags) == 0
    with open(tmp_path / 'e' / 'entropy.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert [int(r['row']) * T + int(r['position']) for r in rows] == list(range(5 * T))
    data = open_split(draws[0], 'draws', 'test')
    assert [int(r['token']) for r in rows] == data.tokens[:5 * T].tolist()
    losses, windows = ([float(r[c]) for r in rows] for c in ('loss_nats', 'two_window_nats'))
    assert windows == pytest.approx(losses, abs=2e-5)
    expected = score.evaluate(model, data, T, 2, OneProcess(), max_blocks=5)
    row, = runs.read_run(tmp_path / 'e')['rows']
    assert row['loss_nats'] == pytest.approx(expected['loss_nats'], rel=1e-6) and row['tokens'] == 5 * T
    assert 'two_window_nats' in capsys.readouterr().out


def oracle(**options):
    torch.manual_seed(7)
    return make(config(wrapper='oracle', vocab_size=5, **options)).eval()


@torch.no_grad()
def test_two_windows_of_an_oracle_are_two_oracles_of_two_lengths():
    """S(t) by a model that was built for t tokens, with the same weights."""
    model, x = oracle(), torch.randint(5, (3, T), generator=torch.Generator().manual_seed(0))
    sums = [torch.zeros(3)]
    for t in range(1, T + 1):
        short = oracle(block_size=t)
        short.load_state_dict(model.state_dict())
        sums.append(torch.stack([short(row[None], row[None]) for row in x[:, :t]]))
    found = score.token_costs(model, x, x)
    torch.testing.assert_close(found['two_window_nats'].float(), torch.stack(sums, 1).diff(), rtol=0, atol=1e-4)
    assert not torch.allclose(found['two_window_nats'], found['loss_nats'], atol=1e-4)
    with pytest.raises(UserError, match='rows of 5 tokens'):            # outside of it, it is as strict as ever
        model(x[:, :5])


@torch.no_grad()
@pytest.mark.parametrize('memory', ['token', 'add'])
def test_occlusion_is_the_difference_to_a_model_without_memory(memory):
    """The blind output is that of memory = none with the same decoder; distances by numpy."""
    model, blind = oracle(memory=memory), oracle(memory='none')
    state = {n: t for n, t in model.state_dict().items() if not n.startswith('encoder.')}
    blind.load_state_dict(state)
    x = torch.randint(5, (2, T), generator=torch.Generator().manual_seed(1))
    found, a, b = score.token_costs(model, x, x), model(x).double().numpy(), blind(x).double().numpy()
    nats = [np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, x.numpy()[..., None], -1)[..., 0] for z in (a, b)]
    assert found['occlusion_nats'].numpy() == pytest.approx(nats[1] - nats[0], abs=1e-5)
    assert found['occlusion_l1'].numpy() == pytest.approx(np.abs(a - b).sum(-1), rel=1e-4)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert found['occlusion_cosine'].numpy() == pytest.approx(1 - cosine, abs=1e-5)
    assert found['occlusion_nats'].abs().min() > 0
    torch.testing.assert_close(model(x), torch.from_numpy(a).float())   # its memory is back


def test_occlusion_of_a_memory_model_begins_with_the_second_chunk(draws, tmp_path):
    """The first chunk has no earlier one; an oracle's row of means has every column."""
    torch.manual_seed(8)
    paths = [save(tmp_path / name, make(config(wrapper=name, chunk_size=4 if name == 'memory' else 0)))
             for name in ('memory', 'oracle')]
    assert probe.main([f'--data_dir={draws[0]}', f'--from_ckpt={",".join(paths)}', f'--out_dir={tmp_path / "e"}',
                       '--mode=entropy', '--device=cpu', '--dtype=float32', '--max_rows=2']) == 0
    with open(tmp_path / 'e' / 'entropy.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 2 * 2 * T and all(all(r.values()) for r in rows)
    chunk = [r for r in rows if r['encoder'] == 'memory' and int(r['position']) < 4]
    later = [r for r in rows if r['encoder'] == 'memory' and int(r['position']) >= 4]
    assert all(float(r['occlusion_nats']) == 0 == float(r['occlusion_l1']) for r in chunk)
    assert all(float(r['occlusion_l1']) > 0 and r['two_window_nats'] == r['loss_nats'] for r in later)
    for row in runs.read_run(tmp_path / 'e')['rows']:
        mine = [r for r in rows if r['encoder'] == row['encoder']]
        for key in ('loss_nats', 'two_window_nats', 'occlusion_nats', 'occlusion_l1', 'occlusion_cosine'):
            assert row[key] == pytest.approx(np.mean([float(r[key]) for r in mine]), rel=1e-9)


# --- bad input ---

BAD = {
    'no encoder': ('--from_ckpt=', 'from_ckpt is empty'),
    'vocabulary': ('--from_ckpt=SMALL', "with a vocabulary of 100, data set 'draws'"),
    'tokenizer': ('--from_ckpt=BPE', "reads 'gpt2' tokens"),
    'long rows': ('--block_size=9', 'rows have 9 tokens, .* at most 8; write --block_size=8'),
    'unknown mode': ('--mode=enthropy', "did you mean 'entropy'"),
    'spread': ('--spread=roll', "spread = 'roll'"),
    'rotary repeat': ('--spread=repeat --positions=rotary', 'cannot tell apart'),
    'no steps': ('--max_iters=0', 'max_iters = 0, expected at least 1'),
    'batch': ('--batch_size=6 --micro_batch_size=4', 'not a multiple'),
    'split': ('--split=val', "no split 'val'"),
    'two sets': ('--from_ckpt=GOOD,OTHER', 'name one for all, --dataset=NAME'),
    'heads': ('--n_head=5', 'is not a multiple of n_head = 5'),
    'missing': ('--from_ckpt=MISSING', 'no checkpoint at'),
    'autoencoder': ('--mode=entropy', 'predicts no next token'),
    'no memory': ('--from_ckpt=BLIND', "has no encoder .memory = 'none'."),
    'part of a row': ('--from_ckpt=ORACLE --mode=entropy --block_size=4', 'takes rows of 8'),
    'odd mixer': ('--block_type=mixer --block_size=7', "block_size = 7, a mixer's must be even"),
    'entropy resumed': ('--mode=entropy --init_from=resume', 'from scratch'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, draws, tmp_path):
    """The line names the value and the cure; no folder is made."""
    flags, expected = BAD[name]
    makers = dict(BLIND=lambda p: save(p, make(config(wrapper='oracle', memory='none'))),
                  ORACLE=lambda p: save(p, make(config(wrapper='oracle'))),
                  SMALL=lambda p: save(p, GPT(config(vocab_size=100))), MISSING=lambda p: f'{p}/none',
                  BPE=lambda p: save(p, GPT(config()), tokenizer='gpt2'),
                  OTHER=lambda p: save(p, GPT(config()), dataset='other'), GOOD=lambda p: draws[1])
    for word, maker in makers.items():
        if word in flags:
            flags = flags.replace(word, maker(tmp_path / word.lower()))
    with pytest.raises(UserError, match=expected) as caught:
        probe.main([f'--data_dir={draws[0]}', f'--from_ckpt={draws[1]}', f'--out_dir={tmp_path / "out"}', *FLAGS,
                    *flags.split()])
    assert '\n' not in str(caught.value) and not (tmp_path / 'out').exists()


def test_names_of_encoders_differ():
    assert probe.names_of(['out/a', 'out/b/', 'out/a/best.pt', 'other/a/ckpt.pt', 'gpt2']) == [
        'a', 'b', 'a-best', 'a-3', 'gpt2']
