"""lab/diversity.py: the fast Fisher against autograd per sequence, the layout, distances, bounds, protocol, resume."""
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, run_here, write_dataset
from torch.nn import functional as F

import train
from configurator import UserError
from corpus import bins
from lab import diversity
from model import GPT, ModelConfig
from training.checkpoint import load_model
from training.folder import read_run


def tiny_model(**options):
    """A small GPT with weights large enough that no Fisher entry vanishes."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{**dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16), **options}))
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model.eval().requires_grad_(False)


PROTOCOL = diversity.Protocol(n_sequences=64, sequence_length=32, head_epochs=10, head_batch_size=8,
                              head_learning_rate=1e-2, seed=0)


def exact_fisher(model, head, x, targets):
    """One backward per sequence, the definition: squared gradients of the mean token loss, averaged over sequences."""
    weights = {n: p for n, p in model.named_parameters() if n.endswith('weight') and n != 'head.weight'}
    for p in weights.values():
        p.requires_grad_()
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in weights.items()}
    for row, target in zip(x, targets):
        loss = F.cross_entropy((model.hidden(row[None]) @ head.T)[0], target)
        for name, grad in zip(weights, torch.autograd.grad(loss, list(weights.values()))):
            sums[name] += grad.double().square()
    model.requires_grad_(False)
    parts = []
    for name, total in sums.items():
        if total.dim() == 1:
            parts.append(total)
        elif name in ('embed.weight', 'position.weight'):
            parts.append(total.mean(1))
        else:                                               # (out, in) here, (in, out) in Conv1D: the first axis is in
            parts.append(total.mean(0))
    return torch.cat(parts) / len(x)


@pytest.mark.parametrize('options', [
    dict(), dict(positions='learned', tied=True, activation='gelu_tanh'), dict(positions='rotary', norm='rmsnorm'),
    dict(qk_norm=True, bias=False, positions='rotary', activation='relu2')])
@pytest.mark.parametrize('micro', [1, 3, 8])
def test_fast_fisher_is_the_exact_one(options, micro):
    model = tiny_model(**options)
    x, uniforms = torch.randint(0, 50, (8, 12)), torch.rand(8, 12)
    head = torch.randn(50, 16)
    steps = (model.hidden(x) @ head.T).double().softmax(-1).cumsum(-1)
    targets = (steps < uniforms[..., None]).sum(-1)         # the same inversion, counted
    fast, exact = diversity.fisher(model, head, x, uniforms, micro).double(), exact_fisher(model, head, x, targets)
    assert fast.shape == exact.shape == (diversity.embedding_width(model),)
    assert (exact > 0).float().mean() > 0.9
    assert torch.linalg.norm(fast - exact) / torch.linalg.norm(exact) < 1e-5
    assert torch.allclose(fast, exact, rtol=1e-4, atol=1e-5 * float(exact.mean()))
    assert not any(p.grad is not None for p in model.parameters())


def test_sampled_targets_follow_the_model():
    """Inverting the distribution at uniforms gives each token its probability."""
    model, head, seen = tiny_model(vocab_size=5), torch.randn(5, 16) * 0.3, []
    x = torch.randint(0, 5, (1, 4)).repeat(4000, 1)
    real = F.cross_entropy
    diversity_targets = lambda logits, targets, **more: seen.append(targets.view(-1, 4)) or real(          # noqa: E731
        logits, targets, **more)
    F.cross_entropy = diversity_targets
    try:
        diversity.fisher(model, head, x, torch.rand(4000, 4, generator=torch.Generator().manual_seed(1)), 4000)
    finally:
        F.cross_entropy = real
    expected = (model.hidden(x[:1]) @ head.T).softmax(-1)[0]
    for t in range(4):
        shares = torch.bincount(seen[0][:, t], minlength=5) / 4000
        assert (shares - expected[t]).abs().max() < 4 * 0.5 / 4000 ** 0.5


def test_embedding_of_a_gpt2_folder_is_that_of_the_definition(tmp_path):
    """Against transformers itself: squared gradients of module.weight, averaged over all axes but the first."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / 'gpt2')
    model, _ = load_model(str(tmp_path / 'gpt2'))
    model.eval().requires_grad_(False)
    x, uniforms, head = torch.randint(0, 60, (5, 16)), torch.rand(5, 16), torch.randn(60, 16)
    modules = [m for n, m in theirs.transformer.named_modules() if hasattr(m, 'weight')]
    total = [0.0] * len(modules)
    for row, u in zip(x, uniforms):
        logits = (theirs.transformer(row[None]).last_hidden_state @ head.T)[0]
        target = (logits.detach().double().softmax(-1).cumsum(-1) < u[:, None]).sum(-1)
        grads = torch.autograd.grad(F.cross_entropy(logits, target), [m.weight for m in modules])
        total = [t + g.square().reshape(len(g), -1).mean(1) / 5 for t, g in zip(total, grads)]
    expected, mine = torch.cat(total), diversity.fisher(model, head, x, uniforms, 2)
    assert mine.shape == expected.shape
    assert torch.linalg.norm(mine - expected) / torch.linalg.norm(expected) < 1e-5


def test_gpt2_small_has_134_993_numbers():
    with torch.device('meta'):
        model = GPT(ModelConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768,
                                positions='learned', tied=True, activation='gelu_tanh'))
    assert diversity.embedding_width(model) == 134_993
    assert [n for n, _ in diversity.fisher_layers(model)][:3] == ['embed', 'position', 'blocks.0.norm1']


def test_head_is_fitted_apart_from_the_embedding():
    """The body, tied embedding included, stays what it was; the fitted head predicts the batch better."""
    model = tiny_model(tied=True, positions='learned')
    before = {n: t.clone() for n, t in model.state_dict().items()}
    x, y = torch.randint(0, 5, (16, 12)), torch.randint(0, 5, (16, 12))
    head = diversity.fit_head(model, x, y, 4, torch.Generator().manual_seed(0), PROTOCOL)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    loss = lambda w: F.cross_entropy((model.hidden(x) @ w.T).flatten(0, 1), y.flatten())                    # noqa: E731
    assert loss(head) < 0.5 * loss(model.head.weight)


def test_distances_and_intervals():
    a, b = np.array([1.0, 2, 3, 0]), np.array([3.0, 2, 1, 0])
    u, v = a / (a + b + 1e-8), b / (a + b + 1e-8)
    assert diversity.distance(a, b) == pytest.approx(1 - u @ v / np.linalg.norm(u) / np.linalg.norm(v), abs=1e-12)
    assert diversity.distance(a, a) == pytest.approx(0, abs=1e-12)
    assert diversity.distance(a, b) == pytest.approx(diversity.distance(7 * a, 7 * b), abs=1e-6)
    sets = np.random.default_rng(0).gamma(1.0, size=(6, 40))
    found = diversity.coefficient(sets)
    pairs = [diversity.distance(sets[i], sets[j]) for i in range(6) for j in range(6) if i != j]
    assert found['diversity'] == pytest.approx(np.mean(pairs))
    d = np.array([[diversity.distance(a, b) for a in sets] for b in sets])
    left_out = [np.mean([d[i, j] for i in range(6) for j in range(6) if len({i, j, k}) == 3]) for k in range(6)]
    assert found['ci95'] == pytest.approx(1.96 * np.sqrt(5 / 6 * np.sum((np.array(left_out) - np.mean(pairs)) ** 2)))
    assert found['pairs_ci95'] == pytest.approx(1.96 * np.std(pairs[:], ddof=0) * np.sqrt(15 / 14) / np.sqrt(15))
    assert diversity.cross_diversity(sets[:2], sets[2:]) == pytest.approx(
        np.mean([diversity.distance(a, b) for a in sets[:2] for b in sets[2:]]))


def test_companions():
    assert diversity.ngram_diversity(np.array(list('abcabcabc')), 3) == pytest.approx(3 / 7)
    assert diversity.jaccard(np.array(['a', 'b', 'b', 'c']), np.array(['b', 'd'])) == pytest.approx(1 / 4)
    data = bins.Bin(np.frombuffer(b'two words  and\nmore', np.uint8))
    assert diversity.units_of(data, 100).tolist() == [b'two', b'words', b'and', b'more']


# --- the script ---

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A folder with data sets one, two, bpe and a trained probe; all tests of the script work in copies of its out."""
    root = tmp_path_factory.mktemp('diversity')
    for name in ('one', 'two'):
        write_dataset(str(root / 'data'), name, sizes=(9000, 2000, 2000))
    write_dataset(str(root / 'data'), 'bpe', dtype='uint16', vocab_size=300)
    train.main([*TINY, f'--data_dir={root / "data"}', '--dataset=one', '--max_iters=60', f'--out_dir={root / "probe"}',
                '--final_train_blocks=0'])
    return root


SMALL = ('--n_batches=3', '--n_sequences=16', '--sequence_length=32', '--head_epochs=2', '--device=cpu')


def measure(home, out, *flags):
    return run_here('lab/diversity.py', f'--data_dir={home / "data"}', f'--probe={home / "probe"}', f'--out_dir={out}',
                    *SMALL, *flags)


def test_numbers_travel_with_their_protocol(home, tmp_path, capsys):
    assert measure(home, tmp_path / 'd', '--dataset=one,two,mix,one+two', '--data_mix=one:3,two:1',
                   '--eval_sets=two', '--n_batches=4', '--max_tokens=6000') == 0
    record = read_run(str(tmp_path / 'd'))
    assert [row['data'] for row in record['rows']] == ['one', 'two', 'mix', 'one+two'] and len(record['cross']) == 6
    for row in record['rows'] + record['cross']:
        assert (row['n_sequences'], row['sequence_length'], row['seed'], row['tokenizer']) == (16, 32, 0, 'byte')
        assert len(row['probe_sha256']) == 64
    for row in record['rows']:
        assert 0 < row['diversity'] < 1 and row['ci95'] > 0 and row['n_batches'] == 4
        folder = next(p for p in (tmp_path / 'd').iterdir() if p.name.startswith(row['data'] + '-'))
        body = np.stack([np.load(folder / f'{b}.npy') for b in range(4)]).astype(np.float64)[:, 256:]
        assert row['body_diversity'] == diversity.coefficient(body)['diversity']
    assert all(0 < row['ngram_diversity'] <= 1 and 0 < row['overlap_two'] < 1 for row in record['rows'])
    assert [row['shares'] for row in record['rows']][1:] == [dict(two=1), dict(one=.75, two=.25), dict(one=.5, two=.5)]
    assert all(c['alignment'] == 1 - c['cross_diversity'] for c in record['cross'])
    assert 'cross_diversity' in capsys.readouterr().out and os.path.exists(tmp_path / 'd' / 'table.csv')


def test_interrupted_measurement_goes_on_and_later_sets_join(home, tmp_path, monkeypatch):
    assert measure(home, tmp_path / 'whole', '--dataset=one,two') == 0
    real, kept = os.replace, []

    def keep(path, target):
        """The third embedding is interrupted before it is kept."""
        if target.endswith('.npy'):
            kept.append(target)
            if len(kept) == 3:
                raise KeyboardInterrupt
        real(path, target)
    monkeypatch.setattr(os, 'replace', keep)
    with pytest.raises(KeyboardInterrupt):
        measure(home, tmp_path / 'd', '--dataset=one')
    measure(home, tmp_path / 'd', '--dataset=one')
    assert len(kept) == 4                                   # two kept, the third asked for twice
    measure(home, tmp_path / 'd', '--dataset=one,two')
    assert len(kept) == 7                                   # those of two alone
    whole, mine = (read_run(str(tmp_path / name)) for name in ('whole', 'd'))
    assert whole['rows'] == mine['rows'] and whole['cross'] == mine['cross']


def test_constant_text_and_random_tokens_enclose_real_text(home, tmp_path, capsys):
    """The self-test of the measure, at the size where random tokens are a bound: 512 of them miss 13 % of 256 ids."""
    assert measure(home, tmp_path / 'd', '--dataset=one', '--bounds', '--n_batches=6') == 0
    found = {row['data']: row['diversity'] for row in read_run(str(tmp_path / 'd'))['rows']}
    assert found['constant'] < found['one'] < found['random'] and 'no upper bound' not in capsys.readouterr().out
    diversity.check_bounds(of_diversities(0.5, 0.1, 0.3), 256, PROTOCOL)
    assert 'random tokens are no upper bound here: 2,048 of them hold all 256' in capsys.readouterr().out


def of_diversities(*values):
    return [dict(diversity=value) for value in values]


def test_a_measure_that_fails_its_self_test_says_so(home, tmp_path):
    """By itself, and as the script ends: here with kept embeddings that were all made one."""
    short = replace(PROTOCOL, n_sequences=16)
    with pytest.raises(UserError, match='constant text .0.5000. is not below the others.*random tokens'):
        diversity.check_bounds(of_diversities(0.5, 0.5, 0.5), 256, short)
    flags = ('--dataset=one', '--bounds', '--n_batches=2')
    measure(home, tmp_path / 'd', *flags)
    for path in (tmp_path / 'd').glob('*/*.npy'):
        np.save(path, np.ones_like(np.load(path)))
    with pytest.raises(UserError, match='constant text .0.0000. is not below the others.*random tokens'):
        measure(home, tmp_path / 'd', *flags)


def test_another_protocol_is_refused(home, tmp_path):
    measure(home, tmp_path / 'd', '--dataset=one')
    for flag in ('--sequence_length=16', '--seed=1', '--head_epochs=1'):
        with pytest.raises(UserError, match=f'another protocol.*{flag[2:].split("=")[0]}.*--out_dir'):
            measure(home, tmp_path / 'd', '--dataset=two', flag)
    with open(tmp_path / 'd' / 'protocol.json') as f:
        assert json.load(f)['sequence_length'] == 32


@pytest.mark.parametrize('flags, message', [
    (['--dataset=bpe'], "bpe holds 'byte' tokens with a vocabulary of 300, the probe"), ([], 'dataset is empty'),
    (['--dataset=mix'], 'data_mix is empty'), (['--dataset=one', '--n_batches=99'], 'one has 17 batches'),
    (['--dataset=one', '--sequence_length=64'], 'at most 32'), (['--dataset=one', '--n_batches=1'], 'n_batches = 1'),
    (['--dataset=none'], "no data set 'none'"), (['--dataset=one', '--eval_sets=none'], "no data set 'none'"),
    (['--dataset=mix', '--data_mix=one,two', '--n_batches=90'], 'mix has')])
def test_bad_input_is_one_line_and_makes_nothing(flags, message, home, tmp_path):
    with pytest.raises(UserError, match=message) as e:
        measure(home, tmp_path / 'd', *flags)
    assert '\n' not in str(e.value) and not os.path.exists(tmp_path / 'd')
