"""muon.py: two library optimisers behind one face; state that resumes to the bit; masks that hold."""
import os
from copy import deepcopy
from functools import partial

import pytest
import torch
from conftest import same
from test_train import THREE_PHASES, assert_resumes, weights_of

import runs
from configurator import UserError
from model import GPT, ModelConfig, optimizer_groups
from training import optim

ADAMW = partial(torch.optim.AdamW, betas=(0.9, 0.95))
MUON = ('--matrix_optimizer=muon', '--muon_rate_ratio=2', '--weight_decay=0.01', '--schedule=cosine')


def small():
    torch.manual_seed(3)
    return GPT(ModelConfig(block_size=16, n_layer=2, n_head=2, n_embd=16))


def both(model, rate_ratio=2.0):
    optimizer = optim.MuonAndAdamW(dict(model.named_parameters()), ADAMW, 0.1, rate_ratio)
    for group in optimizer.param_groups:
        group['lr'] = 1e-2 * group.get('rate_ratio', 1.0)
    return optimizer


def steps(model, optimizer, n, seed):
    for i in range(n):
        torch.manual_seed(seed + i)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return model.state_dict()


def test_each_parameter_gets_the_step_of_its_library_optimiser():
    """Matrices of the blocks step as under torch.optim.Muon, embedding, head and vectors as under AdamW."""
    model, alone = small(), small()
    steps(model, both(model), 3, 0)
    named = dict(alone.named_parameters())
    matrices = [p for n, p in named.items() if optim.is_muons(n, p)]
    assert len(matrices) == 8
    steps(alone, torch.optim.Muon(matrices, lr=2e-2, weight_decay=0.1, adjust_lr_fn='match_rms_adamw'), 3, 0)
    rest = [p for n, p in named.items() if not optim.is_muons(n, p)]
    steps(alone, ADAMW(optimizer_groups(rest, 0.1), lr=1e-2), 3, 0)
    assert same(model.state_dict(), alone.state_dict())


def test_state_dict_numbers_every_parameter_once_and_restores():
    """A checkpoint's index must mean the same parameter when it is loaded into a fresh optimiser."""
    model = small()
    optimizer = both(model)
    steps(model, optimizer, 2, 0)
    saved = deepcopy(optimizer.state_dict())                # a state_dict shares its tensors
    numbers = [i for g in saved['param_groups'] for i in g['params']]
    assert sorted(numbers) == list(range(len(list(model.parameters())))) == sorted(saved['state'])
    twin = small()
    twin.load_state_dict(model.state_dict())
    fresh = both(twin, rate_ratio=1.0)
    fresh.load_state_dict(saved)
    assert same(fresh.state_dict(), saved) and fresh.param_groups[-1]['rate_ratio'] == 2.0
    assert same(steps(model, optimizer, 2, 9), steps(twin, fresh, 2, 9))


@pytest.mark.parametrize('stop', (3, 10, 20))
def test_resume_is_bit_exact(stop, train_tiny, tmp_path, monkeypatch):
    """Through a prelude, pmmp with prunings and fine-tuning."""
    assert_resumes((*THREE_PHASES, *MUON), stop, train_tiny, tmp_path, monkeypatch)


def test_masks_hold_although_muon_moves_every_weight(train_tiny, tmp_path):
    """An orthogonalised step is dense; what is pruned stays zero, and has no momentum."""
    assert train_tiny(*THREE_PHASES, *MUON) == 0
    checkpoint = runs.load_checkpoint(os.path.join(tmp_path, 'run', 'ckpt.pt'))
    name = 'blocks.0.feed_forward.up.weight'
    dropped = ~checkpoint['masks'][name]
    assert dropped.any() and not checkpoint['model'][name][dropped].any()
    buffers = [s['momentum_buffer'] for s in checkpoint['optimizer']['state'].values() if 'momentum_buffer' in s]
    assert not next(b for b in buffers if b.shape == dropped.shape)[dropped].any()
    assert weights_of(tmp_path / 'run')[name].abs().max() > 0


def test_its_rate_is_in_units_of_adamws(train_tiny, monkeypatch):
    """Both follow the schedule; Muon's groups at muon_rate_ratio times the rate."""
    rates, real = [], optim.MuonAndAdamW.step

    def step(self):
        rates.append([g['lr'] for g in self.param_groups])
        real(self)
    monkeypatch.setattr(optim.MuonAndAdamW, 'step', step)
    assert train_tiny('--max_iters=4', '--matrix_optimizer=muon', '--muon_rate_ratio=3', '--schedule=linear') == 0
    assert len(rates) == 4 and all(r[-1] == pytest.approx(3 * r[0]) and r[0] == r[1] for r in rates)
    assert rates[0][0] > rates[-1][0]


def test_sharding_is_refused(train_tiny, monkeypatch):
    """A rank's rows of a matrix cannot be orthogonalised on their own."""
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(UserError, match='whole matrices'):
        train_tiny('--matrix_optimizer=muon', '--shard=full')
