"""lab/entropy.py: what tokens cost equals closed forms and loops; a memory taken away is a model without one."""
import csv
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import OneProcess, run_here, snapshot

import score
from configurator import UserError
from corpus import bins
from corpus.data import open_split
from model import GPT, ModelConfig, make, model_args
from training.checkpoint import save_checkpoint
from training.folder import read_run

T = 8
C = 48
FLAGS = ('--device=cpu', '--dtype=float32')


def config(**options):
    return ModelConfig(**dict(dict(block_size=T, vocab_size=256, n_layer=1, n_head=2, n_embd=C), **options))


def save(folder, model):
    os.makedirs(folder)
    facts = dict(dataset='draws', sha256='', start_id=10, tokenizer='byte')
    save_checkpoint(os.path.join(folder, 'ckpt.pt'), dict(
        model=model.state_dict(), model_args=model_args(model), masks={}, config={}, data=facts))
    bins.write_json(os.path.join(folder, 'run.json'), dict(status='done'))
    return str(folder)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """A data folder whose set 'draws' has a test split of letters drawn at random."""
    folder = tmp_path_factory.mktemp('data')
    writer = bins.BinWriter(str(folder / 'draws'), 'test')
    letters = np.random.default_rng(0).integers(97, 101, 256 * T).astype(np.uint8)
    writer.write(letters.tobytes(), text_bytes=len(letters))
    bins.write_meta(str(folder / 'draws'), 'prepare_text.py', [], dict(test=writer.commit()), dict(kind='test'))
    return str(folder)


@pytest.fixture
def run_entropy(data_dir, tmp_path):
    def call(*flags):
        return run_here('lab/entropy.py', f'--data_dir={data_dir}', f'--out_dir={tmp_path / "e"}', *FLAGS, *flags)
    return call


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


def test_entropy_of_a_causal_model_is_its_loss(run_entropy, data_dir, tmp_path, capsys):
    """Both columns of entropy.csv agree token by token, and their mean is what score.py finds on these rows."""
    torch.manual_seed(3)
    model = GPT(config()).eval()
    path = save(tmp_path / 'm', model)
    assert run_entropy(f'--from_ckpt={path}', '--max_rows=5') == 0
    with open(tmp_path / 'e' / 'entropy.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert [int(r['row']) * T + int(r['position']) for r in rows] == list(range(5 * T))
    data = open_split(data_dir, 'draws', 'test')
    assert [int(r['token']) for r in rows] == data.tokens[:5 * T].tolist()
    losses, windows = ([float(r[c]) for r in rows] for c in ('loss_nats', 'two_window_nats'))
    assert windows == pytest.approx(losses, abs=2e-5)
    expected = score.evaluate(model, data, T, 2, OneProcess(), max_blocks=5)
    row, = read_run(tmp_path / 'e')['rows']
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


def test_occlusion_of_a_memory_model_begins_with_the_second_chunk(run_entropy, tmp_path):
    """The first chunk has no earlier one; an oracle's row of means has every column."""
    torch.manual_seed(8)
    paths = [save(tmp_path / name, make(config(wrapper=name, chunk_size=4 if name == 'memory' else 0)))
             for name in ('memory', 'oracle')]
    assert run_entropy(f'--from_ckpt={",".join(paths)}', '--max_rows=2') == 0
    with open(tmp_path / 'e' / 'entropy.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 2 * 2 * T and all(all(r.values()) for r in rows)
    chunk = [r for r in rows if r['encoder'] == 'memory' and int(r['position']) < 4]
    later = [r for r in rows if r['encoder'] == 'memory' and int(r['position']) >= 4]
    assert all(float(r['occlusion_nats']) == 0 == float(r['occlusion_l1']) for r in chunk)
    assert all(float(r['occlusion_l1']) > 0 and r['two_window_nats'] == r['loss_nats'] for r in later)
    for row in read_run(tmp_path / 'e')['rows']:
        mine = [r for r in rows if r['encoder'] == row['encoder']]
        for key in ('loss_nats', 'two_window_nats', 'occlusion_nats', 'occlusion_l1', 'occlusion_cosine'):
            assert row[key] == pytest.approx(np.mean([float(r[key]) for r in mine]), rel=1e-9)


def test_max_rows_0_is_all_rows(run_entropy, tmp_path):
    path = save(tmp_path / 'm', GPT(config()))
    assert run_entropy(f'--from_ckpt={path}', '--max_rows=0') == 0
    row, = read_run(tmp_path / 'e')['rows']
    assert (row['rows'], row['tokens']) == (256, 256 * T)


# --- bad input ---

BAD = {
    'no model': ('--from_ckpt=', 'from_ckpt is empty'),
    'missing': ('--from_ckpt=MISSING', 'no checkpoint at'),
    'autoencoder': ('--from_ckpt=AUTOENCODER', 'predicts no next token'),
    'part of a row': ('--from_ckpt=ORACLE --block_size=4', 'takes rows of 8'),
    'long rows': ('--from_ckpt=GOOD --block_size=9', 'rows have 9 tokens, .* at most 8; write --block_size=8'),
    'split': ('--from_ckpt=GOOD --split=val', "no split 'val'"),
    'own folder': ('--from_ckpt=GOOD --out_dir=GOOD --overwrite', 'lies in out_dir'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, run_entropy, tmp_path):
    """The line names the value and the cure; no folder is made, and none is changed."""
    flags, expected = BAD[name]
    models = dict(AUTOENCODER=dict(wrapper='autoencoder'), ORACLE=dict(wrapper='oracle'), GOOD={})
    for word, options in models.items():
        if word in flags:
            flags = flags.replace(word, save(tmp_path / word.lower(), make(config(**options))))
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=expected) as caught:
        run_entropy(*flags.replace('MISSING', f'{tmp_path}/none').split())
    assert '\n' not in str(caught.value) and not (tmp_path / 'e').exists() and snapshot(tmp_path) == before


def test_it_runs_in_one_process(run_entropy, tmp_path, monkeypatch):
    path = save(tmp_path / 'm', GPT(config()))
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UserError, match='drop torchrun'):
        run_entropy(f'--from_ckpt={path}')
