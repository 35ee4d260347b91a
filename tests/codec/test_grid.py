"""grid.py: what is trained on a grid is what compress.py writes; the estimate of bits and its gradient; resume."""
import math
import os

import numpy as np
import pytest
import torch
from conftest import THREE_PHASES, assert_resumes, run_here, stop_at

import score
from codec import weights
from codec.grid import Grid, choose_codes
from configurator import UserError
from corpus.data import open_split
from model import GPT, ModelConfig, build, model_args
from training.checkpoint import load_checkpoint, load_model
from training.folder import read_run
from training.process import Env

GRID = ('--qat_bits=4', '--qat_rows=8')
OPTIONS = [dict(), dict(norm='rmsnorm', bias=False, qk_norm=True, positions='rotary', tied=True),
           dict(positions='learned')]


def small(**options):
    """A model with norm gains away from 1, and rows to measure on."""
    torch.manual_seed(5)
    model = GPT(ModelConfig(block_size=16, n_layer=2, n_head=2, n_embd=16, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    rows = np.random.default_rng(1).integers(0, 256, (8, 17))
    return model, rows[:, :-1], rows[:, 1:]


def grid_of(model, x, y, bits=4.0):
    return Grid(dict(model.named_parameters()), choose_codes(model, bits, x, y), 0.01)


@pytest.mark.parametrize('options', OPTIONS)
def test_rounded_weights_are_multiples_of_the_steps_that_are_written(options):
    """Folded, every matrix is integers times steps, so that weights.quantise changes nothing but vectors."""
    model, x, y = small(**options)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    grid = grid_of(model, x, y)
    grid.before_forward()
    folded = weights.fold(model.state_dict(), model_args(model))
    fisher = {n: np.ones_like(w) for n, w in folded.items()}
    tensors = weights.quantise(folded, fisher, 1e-6, {n: c.numpy() for n, c in grid.codes.items()})
    assert set(grid.codes) == {n for n, w in folded.items() if w.ndim == 2}
    for n, value in weights.values(tensors).items():
        if n in grid.codes:
            assert np.array_equal(tensors[n][1], grid.codes[n].numpy())
            assert np.allclose(value, folded[n], rtol=1e-5, atol=1e-9), n
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    assert set(changed) >= set(grid.codes) and all(n in grid.codes or n == 'head.weight' for n in changed)
    grid.after_backward()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_codes_spend_the_bits_asked_for():
    """qat_bits means what compress.py's weight_bits means."""
    model, x, y = small()
    sizes = []
    for bits in (3.0, 5.0):
        grid = grid_of(model, x, y, bits)
        grid.before_forward()
        folded = weights.fold(model.state_dict(), model_args(model))
        tensors = weights.quantise(folded, {n: np.ones_like(w) for n, w in folded.items()}, 1e-3,
                                   {n: c.numpy() for n, c in grid.codes.items()})
        n = sum(w.size for w in folded.values())
        sizes.append(8 * len(weights.encode(tensors, model_args(model))) / n)
        grid.after_backward()
    assert sizes[0] == pytest.approx(3, abs=0.4) and sizes[1] == pytest.approx(5, abs=0.4)


def scales_of(grid):
    return [matrix.scale() for matrix in grid.matrices]


def estimated_bits(w, step):
    """The estimate whose gradient edit() adds: a row of n weights costs n·log2(1 + 2e·mean|w|/s)."""
    return w.size(1) * torch.log2(1 + 2 * math.e * w.abs().mean(1) / step[:, 0])


@pytest.mark.parametrize('options', OPTIONS)
def test_edit_adds_the_gradient_of_the_estimate(options):
    """Autograd through the folded weights agrees."""
    model, x, y = small(**options)
    grid, named = grid_of(model, x, y), dict(model.named_parameters())
    total = sum(estimated_bits(named[n] if g is None else named[n] * g, s).sum()
                for n, s, g in ((n, m.steps, m.gain) for n, m in zip(grid.codes, grid.matrices)))
    expected = torch.autograd.grad(total * 0.01, [named[n] for n in grid.codes])
    for p in named.values():
        p.grad = torch.zeros_like(p)
    grid.edit()
    found = {n: p.grad for n, p in named.items()}
    for n, e in zip(grid.codes, expected):
        assert torch.allclose(found[n], e, rtol=1e-4, atol=1e-9), n
    assert not any(found[n].any() for n in named if n not in grid.codes)


def test_estimate_is_within_a_tenth_of_what_is_written():
    """Laplacian rows from mostly empty to fine, against weights.encode."""
    args = dict(model_args(GPT(ModelConfig(n_embd=64, n_layer=1, n_head=2))), bias=False, positions='rotary')
    rng = np.random.default_rng(2)
    for mean in (0.3, 0.6, 2.0, 10.0):
        tensors = {n: (np.rint(rng.laplace(size=shape) * mean).astype(np.int32),
                       np.zeros(shape[0], np.int64) if len(shape) == 2 else np.int64(0))
                   for n, shape in weights.shapes(args).items()}
        estimate = sum(float(estimated_bits(torch.from_numpy(q).double(), torch.ones(len(q), 1)).sum())
                       for q, _ in tensors.values() if q.ndim == 2)
        assert 8 * len(weights.encode(tensors, args)) == pytest.approx(estimate, rel=0.1)


def test_the_archive_holds_the_model_that_was_trained(train_tiny, tmp_path, toy):
    """Matrices decode to the checkpoint's, with its vectors the loss is that of training; pruned weights stay zero."""
    flags = ('--do_pruning', '--epochs=1', '--epochs_fine_tuning=1', '--tolerated_relative_loss_increase=0.05')
    assert train_tiny(*flags, *GRID) == 0
    run, archive = tmp_path / 'run', tmp_path / 'toy.mdl'
    checkpoint = load_checkpoint(run)
    text = os.path.join(toy, 'toy', 'train.bin')
    assert run_here('compress.py', 'pack', run, text, archive, '--no-verify', '--no-progress') == 0
    from codec.container import read_archive
    sections = read_archive(archive.read_bytes(), str(archive))[3]
    args = checkpoint['model_args']
    written = weights.values(weights.decode(sections['wght'], args))
    folded = weights.fold(checkpoint['model'], args)
    for n in checkpoint['grid']:
        used = folded[n].any(1) if n != 'embed.weight' else written[n].any(1)       # rows of unused bytes are dropped
        assert np.allclose(written[n][used], folded[n][used], rtol=1e-5, atol=1e-9), n
        assert (folded[n] == 0).mean() > 0.01
    before = score.evaluate(build(args), open_split(toy, 'toy', 'train'), 32, 8, Env('cpu', 'float32'))
    written.update({n: w for n, w in folded.items() if n not in checkpoint['grid']})
    after = [score.evaluate(m, open_split(toy, 'toy', 'train'), 32, 8, Env('cpu', 'float32'))['loss_nats']
             for m in (weights.load_folded(build(args), written), load_model(run)[0])]
    assert after[0] == pytest.approx(after[1], rel=1e-6) and after[1] < before['loss_nats'] - 1
    assert read_run(run)['mean_train_loss'] == pytest.approx(after[1], rel=1e-6)


def test_a_penalty_on_bits_makes_smaller_weights(train_tiny, tmp_path):
    """The same run with bits_lambda, packed: fewer bytes of weights."""
    sizes = []
    for i, strength in enumerate((0, 30)):
        assert train_tiny('--epochs=1', '--epochs_fine_tuning=4', *GRID, f'--bits_lambda={strength}', out=f'{i}') == 0
        checkpoint = load_checkpoint(tmp_path / f'{i}')
        folded = weights.fold(checkpoint['model'], checkpoint['model_args'])
        tensors = weights.quantise(folded, {n: np.ones_like(w) for n, w in folded.items()}, 1e-3, checkpoint['grid'])
        sizes.append(len(weights.encode(tensors, checkpoint['model_args'])))
    assert sizes[1] < 0.95 * sizes[0]


def test_training_goes_through_the_grid(train_tiny, tmp_path, monkeypatch):
    """Each step sees rounded weights and moves the ones behind them, by no more than its rate; best.pt is rounded."""
    grids, seen, moved, rates = [], [], [], []
    real_init, real_before, real_edit = Grid.__init__, Grid.before_forward, Grid.edit
    real_forward = GPT.forward

    def off_grid(theta, scales):
        return max(float((p / s - (p / s).round()).abs().max()) for p, s in zip(theta, scales))

    def init(self, named_params, codes, rate=0.0):
        real_init(self, named_params, codes, rate)
        grids.append(self)
        self.last = None

    def before_forward(self):
        if self.theta and self.last and len(moved) < 5:
            moved.append(max(float((p - q).abs().max()) for p, q in zip(self.theta, self.last)))
        real_before(self)
        self.last = [p.clone() for p in self.behind]

    def edit(self):
        rates.append(self.rate)
        real_edit(self)

    def forward(self, *args):
        if self.training and grids and grids[-1].theta:
            seen.append(off_grid(grids[-1].theta, scales_of(grids[-1])))
        return real_forward(self, *args)
    for owner, name, spy in ((Grid, '__init__', init), (Grid, 'before_forward', before_forward), (Grid, 'edit', edit),
                             (GPT, 'forward', forward)):
        monkeypatch.setattr(owner, name, spy)
    assert train_tiny('--epochs=0', '--max_iters=0', '--epochs_fine_tuning=1', '--bits_lambda=3', *GRID,
                      '--learning_rate=1e-5', '--norm=rmsnorm') == 0
    assert len(seen) == len(rates) == 16 and max(seen) < 1e-3
    assert moved and 0 < max(moved) < 2e-5 < 0.01 * max(float(s.max()) for s in scales_of(grids[-1]))
    assert rates[0] == pytest.approx(3 * math.log(2) / 4096)
    best = load_checkpoint(os.path.join(tmp_path, 'run', 'best.pt'))
    kept = Grid(best['model'], best['grid'])
    assert off_grid(kept.theta, scales_of(kept)) < 1e-3


@pytest.mark.parametrize('stop', (18, 20))
def test_resume_is_bit_exact(stop, train_tiny, tmp_path, monkeypatch):
    """Before and inside the phase with a grid: the weights behind it and its codes are what a checkpoint keeps."""
    flags = (*THREE_PHASES, *GRID, '--bits_lambda=1', '--eval_interval=1')
    assert_resumes(flags, stop, train_tiny, tmp_path, monkeypatch)


def test_a_grid_cannot_be_changed_by_a_resume(train_tiny, monkeypatch):
    """Codes are chosen once: other bits on the command line would be recorded, and do nothing."""
    with monkeypatch.context() as patch:
        stop_at(patch, 20)
        assert train_tiny(*THREE_PHASES) == 85
    with pytest.raises(UserError, match='qat_bits = 4.0, the checkpoint has 0.0'):
        train_tiny(*THREE_PHASES, *GRID, '--init_from=resume')


@pytest.mark.parametrize('flags, words', [
    (('--qat_bits=4',), 'epochs_fine_tuning'), (('--bits_lambda=1',), 'needs qat_bits'),
    (('--qat_bits=40', '--epochs_fine_tuning=1'), 'expected 1 to 12'),
    (('--qat_bits=4', '--epochs_fine_tuning=1', '--shard=full'), 'whole matrices'),
    (('--qat_bits=4', '--epochs_fine_tuning=1', '--block_type=mixer', '--positions=none'), 'covers attention')])
def test_bad_settings_are_one_line(flags, words, train_tiny, monkeypatch):
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(UserError, match=words):
        train_tiny(*flags)
