"""sparse.py: TAMADE against an analytic threshold, exact counts, masks that hold, dead units, sizes."""
import pytest
import torch

import sparse
from model import GPT, ModelConfig
from sparse import Masks, masks_by_magnitude, masks_by_threshold, merge_masks, sweep_dead_units, tamade
from training import parallel

# --- TAMADE and masks ---

@pytest.mark.parametrize('delta', (0.01, 0.1, 0.5))
def test_tamade_finds_the_analytic_threshold(delta):
    """The toy loss is 1 + Σ dropped θ²: the answer is the smallest magnitude that no longer fits into δ."""
    values = torch.arange(1, 501, dtype=torch.float64) / 1000
    params = dict(a=torch.nn.Parameter(values[::2] * -1), b=torch.nn.Parameter(values[1::2].clone()))
    total = float((values ** 2).sum())
    before = {n: p.detach().clone() for n, p in params.items()}

    def loss_of():
        return 1 + total - sum(float((p.detach() ** 2).sum()) for p in params.values())
    epsilon, loss_before, loss_after, n_evaluations = tamade(loss_of, params, delta)
    limit = float(values[((values ** 2).cumsum(0) > delta * loss_before).nonzero()[0, 0]])
    assert limit - 1e-7 <= epsilon <= limit and abs(loss_before - 1) < 1e-9
    assert loss_after <= (1 + delta) * loss_before and n_evaluations == 24      # 23 halvings of 0.8 to below 1e-7
    assert all(torch.equal(before[n], p) for n, p in params.items())            # θ is restored
    sparse.apply_masks({n: p.data for n, p in params.items()}, masks_by_threshold(params, epsilon))
    assert abs(loss_of() - loss_after) < 1e-12                                  # one keep rule in search and mask


def test_keep_rule_is_at_or_above_epsilon():
    """Two rules, > in one place and >= in another, give a loss that was never measured."""
    params = dict(a=torch.nn.Parameter(torch.tensor([0.25, -0.25, 0.2499, 0.0, 1.0])))
    assert masks_by_threshold(params, 0.25)['a'].tolist() == [True, True, False, False, True]
    assert masks_by_threshold(params, 0.0)['a'].tolist() == [True, True, True, False, True]
    by_gamma = sparse.masks_by_gamma(dict(a=torch.tensor([0.5, 0.4999, 1.0, 0.0])))
    assert by_gamma['a'].tolist() == [True, False, True, False]


@pytest.mark.parametrize('loss', (float('nan'), float('inf'), 2.0))
def test_tamade_refuses_what_it_cannot_accept(loss):
    """A model that breaks at once must stay unpruned: ε = 0, not the last point tried."""
    params = dict(a=torch.nn.Parameter(torch.ones(4)))
    epsilon = tamade(lambda: 1.0 if (params['a'] == 1).all() else loss, dict(params), 0.01, epsilon_max=2.0)[0]
    assert 1 - 1e-6 < epsilon <= 1 + 1e-7
    calls = iter([1.0] + [loss] * 60)
    assert tamade(lambda: next(calls), params, 0.01)[0] == 0.0


@pytest.mark.parametrize('scope', ('global', 'tensor'))
@pytest.mark.parametrize('sparsity', (0.0, 0.25, 0.5, 0.8, 1.0))
def test_magnitude_pruning_is_exact_with_ties(scope, sparsity):
    """docs/faults.md, 11: `<= sorted[k]` prunes 75 % where 50 % was asked when values repeat."""
    params = dict(a=torch.nn.Parameter(torch.tensor([[1.0, -1, 1, 1, 2], [1, 1, -2, 2, 1]])),
                  b=torch.nn.Parameter(torch.ones(10)))
    masks = masks_by_magnitude(params, sparsity, scope)
    dropped = {n: int((~m).sum()) for n, m in masks.items()}
    if scope == 'tensor':
        assert dropped == {n: round(10 * sparsity) for n in params}
    else:
        assert sum(dropped.values()) == round(20 * sparsity)
    assert all(m.shape == params[n].shape for n, m in masks.items())
    again = masks_by_magnitude(params, sparsity, scope)
    assert all(torch.equal(masks[n], again[n]) for n in masks)
    kept, gone = ([v for n, m in masks.items() for v in params[n].detach().abs()[m == keep].tolist()]
                  for keep in (True, False))
    assert not gone or not kept or max(gone) <= min(kept) or scope == 'tensor'


def test_merged_masks_only_grow():
    """A weight that was pruned once must not come back with a lower threshold."""
    old = dict(a=torch.tensor([True, False, True]), c=torch.tensor([False]))
    new = dict(a=torch.tensor([True, True, False]), b=torch.tensor([True]))
    merged = merge_masks(old, new)
    assert {n: m.tolist() for n, m in merged.items()} == dict(a=[True, False, False], b=[True], c=[False])


def test_masks_of_a_run_hold_on_weights_and_gradients():
    """Grow, on gradients, on weights, saved: what is gone stays gone, whatever a step does to it."""
    params = {name: torch.nn.Parameter(torch.arange(1.0, 5.0)) for name in 'ab'}
    masks = Masks(params)
    assert not masks and masks.saved(parallel.full) == {}
    masks.on_gradients()                                        # nothing to do: there need be no gradients
    masks.grow(dict(a=torch.tensor([True, False, True, True])))
    assert masks and params['a'].tolist() == [1, 0, 3, 4] and params['b'].tolist() == [1, 2, 3, 4]
    masks.grow(dict(a=torch.tensor([True, True, False, True])))
    assert params['a'].tolist() == [1, 0, 0, 4]
    for p in params.values():
        p.grad = torch.ones(4)
    masks.on_gradients()
    assert params['a'].grad.tolist() == [1, 0, 0, 1] and params['b'].grad.tolist() == [1, 1, 1, 1]
    with torch.no_grad():
        params['a'] += 7
    masks.on_weights()
    assert params['a'].tolist() == [8, 0, 0, 11]
    assert list(masks.by_parameter()) == [params['a']]
    assert {n: m.tolist() for n, m in masks.saved(parallel.full).items()} == dict(a=[True, False, False, True])


def test_masks_of_frozen_parameters_are_handed_on():
    """A frozen encoder's mask belongs into the next checkpoint, though no step touches its weights."""
    params = dict(a=torch.nn.Parameter(torch.ones(2)))
    saved = dict(a=torch.tensor([True, False]), frozen=torch.tensor([False]))
    masks = Masks(params, saved)
    assert list(masks.masks) == ['a'] and masks.saved(parallel.full).keys() == saved.keys()
    masks.on_weights()
    assert params['a'].tolist() == [1, 0]


def test_regularised_leaves_out_norm_gains_and_biases_by_default():
    """A norm gain near 1 and a 0.02-scale weight do not share a threshold; 'all' is upstream's choice."""
    net = GPT(ModelConfig(block_size=8, n_layer=1, n_head=2, n_embd=8))
    assert all(p.dim() >= 2 for p in sparse.regularised(net, 'matrices').values())
    assert set(sparse.regularised(net, 'all')) == {n for n, _ in net.named_parameters()}


# --- dead units ---

def net_with_dead_units(**options):
    torch.manual_seed(1)
    net = GPT(ModelConfig(**dict(dict(block_size=12, vocab_size=20, n_layer=2, n_head=2, n_embd=8),
                                 **options))).eval().double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for block in net.blocks:
            up, down = block.feed_forward.up, block.feed_forward.down
            qkv, proj = block.attention.qkv, block.attention.proj
            up.weight[[1, 2, 3]] = 0                            # no way in: constant units (2: silent too)
            down.weight[:, [5, 6]] = 0                          # no way out
            qkv.weight[16 + 3] = 0                              # a value column that is its bias
            qkv.weight[16 + 4] = 0
            proj.weight[:, 6] = 0                               # a value column nobody reads
            if up.bias is not None:
                up.bias[2] = 0
                qkv.bias[16 + 4] = 0
    return net


@pytest.mark.parametrize('options', [dict(), dict(activation='relu2'), dict(bias=False),
                                     dict(norm='rmsnorm', positions='rotary', activation='gelu_tanh')])
@torch.no_grad()
def test_sweeping_dead_units_leaves_outputs_equal(options):
    """Random gradient pruning must not change the function; a constant unit is folded into the next bias first."""
    net, x = net_with_dead_units(**options), torch.randint(0, 20, (3, 12))
    before, n_before = net(x), sparse.count_nonzero(net.parameters())
    masks = {n: p != 0 for n, p in net.named_parameters() if p.dim() >= 2}
    zeroed = sweep_dead_units(net, masks)
    assert zeroed > 0 and (net(x) - before).abs().max() < 1e-6
    ff, att = net.blocks[0].feed_forward, net.blocks[0].attention
    assert not ff.down.weight[:, [1, 2, 3]].any() and not ff.up.weight[[5, 6]].any()
    assert not att.qkv.weight[16 + 6].any()
    assert not att.proj.weight[:, [3, 4]].any()
    if ff.up.bias is not None:
        assert not ff.up.bias[[1, 2, 3, 5, 6]].any() and not att.qkv.bias[[16 + 3, 16 + 6]].any()
    else:
        assert n_before - sparse.count_nonzero(net.parameters()) == zeroed   # nothing was folded, so all of it is gone
    params = dict(net.named_parameters())
    assert all(not params[n][~m].any() for n, m in masks.items())
    assert all(torch.equal(m, params[n] != 0) for n, m in masks.items())
    assert sweep_dead_units(net, masks) == 0                    # a second sweep finds nothing


@torch.no_grad()
def test_sweep_does_not_fold_into_a_masked_bias():
    """With regularise = 'all' the next bias may be masked: then the unit stays, since masked weights must stay zero."""
    net, x = net_with_dead_units(), torch.randint(0, 20, (3, 12))
    for block in net.blocks:
        block.feed_forward.down.bias.zero_()
    before = net(x)
    masks = {n: p != 0 for n, p in net.named_parameters()}
    sweep_dead_units(net, masks)
    assert (net(x) - before).abs().max() < 1e-6
    assert all(not p[~masks[n]].any() for n, p in net.named_parameters())
    assert not net.blocks[0].feed_forward.down.bias.any() and net.blocks[0].feed_forward.down.weight[:, 1].any()


@torch.no_grad()
def test_drop_unused_rows_counts_and_zeroes_only_those():
    """Rows of ids that never occur may go, and nothing else."""
    net, used = net_with_dead_units(), torch.arange(20) % 2 == 0
    x = torch.randint(0, 10, (2, 12)) * 2
    before = net(x)
    assert sparse.drop_unused_rows(net, used) == 10 * 8 and torch.equal(net(x), before)


@torch.no_grad()
def test_drop_unused_rows_leaves_a_tied_head_alone():
    """With a tied head a zeroed row changes the logits of its id, and with them every loss."""
    net, used = net_with_dead_units(tied=True), torch.arange(20) % 2 == 0
    x = torch.randint(0, 10, (2, 12)) * 2
    before = net(x)
    sparse.drop_unused_rows(net, used)
    assert torch.equal(net(x), before)


# --- sizes ---

def test_model_sizes_are_three_named_numbers():
    """docs/faults.md, 6: a model size without indices passed off as the size; nnz4 is kept apart from bits_est."""
    net = GPT(ModelConfig(block_size=8, n_layer=1, n_head=2, n_embd=8))
    with torch.no_grad():
        net.embed.weight.zero_()
    sizes = sparse.model_sizes(net.parameters())
    n = sum(p.numel() for p in net.parameters())
    nonzero = sum(int((p != 0).sum()) for p in net.parameters())
    assert sizes['raw_bytes'] == 4 * n and sizes['nnz4_bytes'] == 4 * nonzero and sizes['nonzeros'] == nonzero
    assert 0 < sizes['bits_est_bytes'] < sizes['nnz4_bytes']
    assert sum(nz for _, _, nz in sparse.sparsity_table(net)) == nonzero
    assert abs(sparse.entropy_bits(torch.tensor([0, 0, 1, 1])) - 4) < 1e-12
