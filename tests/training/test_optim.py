"""training/optim.py: each parameter's library optimiser; states of today and of earlier versions; masks that hold."""
import copy
import os
from functools import partial

import pytest
import torch
from conftest import THREE_PHASES, assert_resumes, assert_same_run, same, stop_at, weights_of

from configurator import UserError
from model import GPT, ModelConfig
from training import optim, parallel
from training.checkpoint import load_checkpoint, save_checkpoint

ADAMW = partial(torch.optim.AdamW, betas=(0.9, 0.95))
MUON = ('--matrix_optimizer=muon', '--muon_rate_ratio=2', '--weight_decay=0.01', '--schedule=cosine')


def small():
    torch.manual_seed(3)
    return GPT(ModelConfig(block_size=16, n_layer=2, n_head=2, n_embd=16))


def both(model, rate_ratio=2.0):
    """AdamW and Muon of a model, at 1e-2 and at rate_ratio times that."""
    optimizers = optim.make_optimizers(dict(model.named_parameters()), ADAMW, 'muon', 0.1, rate_ratio)
    optim.set_rate(optimizers, 1e-2)
    return optimizers


def steps(model, optimizers, n, seed):
    """Take n steps on random gradients; returns the weights."""
    for i in range(n):
        torch.manual_seed(seed + i)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for optimizer in optimizers:
            optimizer.step()
    return model.state_dict()


def test_each_parameter_gets_the_step_of_its_library_optimiser():
    """Matrices of the blocks step as under torch.optim.Muon, embedding, head and vectors as under AdamW."""
    model = small()
    alone = small()
    steps(model, both(model), 3, 0)
    named = dict(alone.named_parameters())
    matrices = [p for n, p in named.items() if optim.is_muons(n, p)]
    assert len(matrices) == 8
    muon = torch.optim.Muon(matrices, lr=2e-2, weight_decay=0.1, adjust_lr_fn='match_rms_adamw')
    steps(alone, [muon], 3, 0)
    others = [p for n, p in named.items() if not optim.is_muons(n, p)]
    steps(alone, [ADAMW(optim.adamw_groups(others, 0.1), lr=1e-2)], 3, 0)
    assert same(model.state_dict(), alone.state_dict())


def test_without_muon_there_is_one_adamw_whose_vectors_do_not_decay():
    """Norm gains and biases that decay would be pulled to 0."""
    model = small()
    optimizer, = optim.make_optimizers(dict(model.named_parameters()), ADAMW, weight_decay=0.1)
    assert isinstance(optimizer, torch.optim.AdamW)
    decays = {group['weight_decay']: {p.dim() for p in group['params']} for group in optimizer.param_groups}
    assert decays == {0.1: {2}, 0.0: {1}}
    assert len(parallel.parameters_of(optimizer)) == len(list(model.parameters()))


def test_states_come_back():
    """A checkpoint's index must mean the same parameter when it is loaded into fresh optimisers."""
    model = small()
    optimizers = both(model)
    steps(model, optimizers, 2, 0)
    saved = copy.deepcopy(optim.states_of(optimizers, parallel.full))       # a state_dict shares its tensors
    for state, optimizer in zip(saved, optimizers, strict=True):
        numbers = [i for group in state['param_groups'] for i in group['params']]
        assert sorted(numbers) == list(range(len(parallel.parameters_of(optimizer)))) == sorted(state['state'])
    twin = small()
    twin.load_state_dict(model.state_dict())
    fresh = both(twin, rate_ratio=1.0)
    optim.load_states(fresh, saved)
    assert same(optim.states_of(fresh, parallel.full), saved) and fresh[1].param_groups[-1]['rate_ratio'] == 2.0
    assert same(steps(model, optimizers, 2, 9), steps(twin, fresh, 2, 9))


# --- states of earlier versions ---

def in_a_row(states):
    """Return states as one, the way earlier versions saved them: groups and parameters numbered through."""
    whole = dict(state={}, param_groups=[])
    for state in states:
        first = sum(len(group['params']) for group in whole['param_groups'])
        whole['state'] |= {first + i: values for i, values in state['state'].items()}
        whole['param_groups'] += [dict(group, params=[first + i for i in group['params']])
                                  for group in state['param_groups']]
    return whole


@pytest.mark.parametrize('matrix_optimizer', ('adamw', 'muon'))
def test_one_state_of_an_earlier_version_is_taken_apart(matrix_optimizer):
    """AdamW's one state_dict, or AdamW's and Muon's in a row."""
    model = small()
    optimizers = optim.make_optimizers(dict(model.named_parameters()), ADAMW, matrix_optimizer, 0.1, 2.0)
    optim.set_rate(optimizers, 1e-2)
    steps(model, optimizers, 2, 0)
    saved = copy.deepcopy(optim.states_of(optimizers, parallel.full))
    old = in_a_row(saved)
    assert sorted(old['state']) == list(range(len(list(model.parameters()))))
    assert same(optim.split_state(old, optimizers), saved)
    twin = small()
    twin.load_state_dict(model.state_dict())
    fresh = optim.make_optimizers(dict(twin.named_parameters()), ADAMW, matrix_optimizer, 0.1, 2.0)
    optim.load_states(fresh, old)
    assert same(optim.states_of(fresh, parallel.full), saved)
    assert same(steps(model, optimizers, 2, 9), steps(twin, fresh, 2, 9))


def test_a_state_taken_apart_may_have_gaps():
    """A parameter that never had a gradient has no state: the numbers behind it must not move up."""
    model = small()
    optimizers = both(model)
    matrices = parallel.parameters_of(optimizers[1])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    matrices[0].grad = None
    for optimizer in optimizers:
        optimizer.step()
    saved = copy.deepcopy(optim.states_of(optimizers, parallel.full))
    assert 0 not in saved[1]['state'] and len(saved[1]['state']) == len(matrices) - 1
    assert same(optim.split_state(in_a_row(saved), optimizers), saved)


@pytest.mark.parametrize('flags', [(), MUON], ids=('adamw', 'muon'))
def test_a_checkpoint_of_an_earlier_version_goes_on(flags, train_tiny, tmp_path, monkeypatch):
    """Written in one state, resumed to the same bits as today's list."""
    assert train_tiny(*THREE_PHASES, *flags, out='whole') == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 14)
        assert train_tiny(*THREE_PHASES, *flags) == 85
    path = str(tmp_path / 'run' / 'ckpt.pt')
    checkpoint = load_checkpoint(path)
    save_checkpoint(path, dict(checkpoint, optimizer=in_a_row(checkpoint['optimizer'])))
    assert train_tiny(*THREE_PHASES, *flags, '--init_from=resume') == 0
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


# --- small pieces ---

def test_sign_steps_go_downhill_and_free_the_gradient():
    """A step of lr against the gradient's sign, none where it is zero; the gradient must not outlive it."""
    p = torch.tensor([1.0, 2.0, 3.0])
    p.grad = torch.tensor([0.5, -7.0, 0.0])
    optim.SignStep([p], lr=0.25).step()
    assert p.tolist() == [0.75, 2.25, 3.0] and p.grad is None


def test_forget_clears_both_moments():
    """Adam's momentum moves a weight whose gradient is zero."""
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.ones(4)
    optimizer.step()
    mask = torch.tensor([True, False, True, False])
    p.data.mul_(mask)
    optim.forget([optimizer], {p: mask})
    p.grad = torch.zeros(4)
    for _ in range(3):
        optimizer.step()
    assert p[~mask].tolist() == [0, 0] and (p[mask] != 1 - 0.1).all()


# --- in train.py ---

@pytest.mark.parametrize('stop', (3, 10, 20))
def test_resume_is_bit_exact(stop, train_tiny, tmp_path, monkeypatch):
    """Through a prelude, pmmp with prunings and fine-tuning."""
    assert_resumes((*THREE_PHASES, *MUON), stop, train_tiny, tmp_path, monkeypatch)


def test_masks_hold_although_muon_moves_every_weight(train_tiny, tmp_path):
    """An orthogonalised step is dense; what is pruned stays zero, and has no momentum."""
    assert train_tiny(*THREE_PHASES, *MUON) == 0
    checkpoint = load_checkpoint(os.path.join(tmp_path, 'run', 'ckpt.pt'))
    name = 'blocks.0.feed_forward.up.weight'
    dropped = ~checkpoint['masks'][name]
    assert dropped.any() and not checkpoint['model'][name][dropped].any()
    _, muon = checkpoint['optimizer']
    buffers = [state['momentum_buffer'] for state in muon['state'].values()]
    buffer = next(b for b in buffers if b.shape == dropped.shape)
    assert not buffer[dropped].any() and buffer.any()
    assert weights_of(tmp_path / 'run')[name].abs().max() > 0


def test_its_rate_is_in_units_of_adamws(train_tiny, monkeypatch):
    """Both follow the schedule; Muon's groups at muon_rate_ratio times the rate."""
    rates = dict(AdamW=[], Muon=[])

    def spy_on(kind):
        real = kind.step

        def step(self, *more):
            rates[kind.__name__].append([group['lr'] for group in self.param_groups])
            return real(self, *more)
        monkeypatch.setattr(kind, 'step', step)
    spy_on(torch.optim.AdamW)
    spy_on(torch.optim.Muon)
    assert train_tiny('--max_iters=4', '--matrix_optimizer=muon', '--muon_rate_ratio=3', '--schedule=linear') == 0
    assert len(rates['AdamW']) == len(rates['Muon']) == 4
    for (matrices, vectors), (muons,) in zip(rates['AdamW'], rates['Muon']):
        assert muons == pytest.approx(3 * matrices) and matrices == vectors
    assert rates['AdamW'][0][0] > rates['AdamW'][-1][0]


def test_sharding_is_refused(train_tiny, monkeypatch):
    """A rank's rows of a matrix cannot be orthogonalised on their own."""
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(UserError, match='whole matrices'):
        train_tiny('--matrix_optimizer=muon', '--shard=full')
