"""sparse.py: procedures against autograd of their objectives, TAMADE against an analytic threshold, exact counts."""
import copy
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparse
from model import GPT, ModelConfig
from sparse import PROCEDURES, masks_by_magnitude, masks_by_threshold, merge_masks, pmmp_state, sweep_dead_units, tamade
from training import parallel

SHAPES = dict(a=(7, 5), b=(3,), c=(4, 4))


def random_params(shapes=None, dtype=torch.float64, scale=1.0):
    torch.manual_seed(3)
    return {n: torch.nn.Parameter(scale * torch.randn(s, dtype=dtype)) for n, s in (shapes or SHAPES).items()}


def random_pmmp(params, alpha=0.3, lean=False):
    """A PMMP state with (w,) γ, u away from their start."""
    state = pmmp_state(params, alpha, 1.0, 0.0, partial(torch.optim.SGD, lr=0.1), lean=lean)
    for w in state.get('w', ()):
        w.copy_(torch.randn_like(w))
    for g, u in zip(state['gamma'], state['u']):
        g.copy_(torch.rand_like(g)), u.copy_(torch.rand_like(u))
    return state


# --- procedures ---

def test_pmmp_gradients_equal_autograd_of_the_written_objective():
    """A wrong sign or factor in a hand-written gradient; u is maximised, hence its opposite sign."""
    params = random_params()
    state = random_pmmp(params)
    theta = list(params.values())
    loss_grad = [torch.randn_like(p) for p in theta]
    edited = [g.clone() for g in loss_grad]
    with torch.no_grad():
        sparse.pmmp_edit(theta, edited, state)
    groups = theta, state['w'], state['gamma'], state['u']
    t, w, g, u = ([x.detach().clone().requires_grad_() for x in xs] for xs in groups)
    sum((0.3 * gg + uu * ((tt - ww * gg) ** 2 + ww ** 2 * gg * (1 - gg))).sum() for tt, ww, gg,
        uu in zip(t, w, g, u)).backward()
    for i in range(len(t)):
        assert torch.allclose(edited[i], loss_grad[i] + t[i].grad, rtol=1e-12, atol=1e-12)
        assert torch.allclose(state['w'][i].grad, w[i].grad, rtol=1e-12, atol=1e-12)
        assert torch.allclose(state['gamma'][i].grad, g[i].grad, rtol=1e-12, atol=1e-12)
        assert torch.allclose(state['u'][i].grad, -u[i].grad, rtol=1e-12, atol=1e-12)


def test_lean_pmmp_is_pmmp_at_the_w_that_minimises_it():
    """The closed form w = θ: there ∂w is 0, and θ, γ, u have the gradients that the exact edit gives them."""
    params = random_params()
    lean, exact = random_pmmp(params, lean=True), random_pmmp(params)
    assert 'w' not in lean and all(t.grad is None for t in lean['gamma'] + lean['u'])
    for key, like in (('w', params.values()), ('gamma', lean['gamma']), ('u', lean['u'])):
        torch._foreach_copy_(exact[key], [t.detach() for t in like])
    edited = {}
    for name, state in (('lean', lean), ('exact', exact)):
        edited[name] = [torch.ones_like(p) for p in params.values()]
        with torch.no_grad():
            sparse.pmmp_edit(list(params.values()), edited[name], state)
    assert all(not w.grad.any() for w in exact['w'])
    for a, b in zip(edited['lean'], edited['exact']):
        assert torch.allclose(a, b, rtol=1e-12)
    for key in ('gamma', 'u'):
        for a, b in zip(lean[key], exact[key]):
            assert torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-12) and a.grad.any()


def test_sign_steps_go_downhill_and_free_the_gradient():
    """A step of lr against the gradient's sign, none where it is zero; the gradient must not outlive it."""
    p = torch.tensor([1.0, 2.0, 3.0])
    p.grad = torch.tensor([0.5, -7.0, 0.0])
    sparse.SignStep([p], lr=0.25).step()
    assert p.tolist() == [0.75, 2.25, 3.0] and p.grad is None


def test_pmmp_bracket_is_the_expectation_over_keep_variables():
    """Nothing is sampled only because the bracket is E(θ - wz)² for z ~ Bernoulli(γ): ∂u must be minus that."""
    params = random_params()
    state = random_pmmp(params)
    with torch.no_grad():
        sparse.pmmp_edit(list(params.values()), [torch.zeros_like(p) for p in params.values()], state)
    for p, w, g, u in zip(params.values(), state['w'], state['gamma'], state['u']):
        assert torch.allclose(-u.grad, g * (p - w) ** 2 + (1 - g) * p ** 2, rtol=1e-12)


def test_pmmp_gradients_are_rewritten_each_step():
    """Gradients of w, γ, u that add up over steps: a second edit must give the same ones."""
    params = random_params()
    state = random_pmmp(params)
    grads = []
    for _ in range(2):
        with torch.no_grad():
            sparse.pmmp_edit(list(params.values()), [torch.zeros_like(p) for p in params.values()], state)
        grads.append([t.grad.clone() for key in ('w', 'gamma', 'u') for t in state[key]])
    assert all(torch.equal(x, y) for x, y in zip(*grads))


@pytest.mark.parametrize('name, penalty', [('rl1', lambda t: 0.3 * t.abs()),
                                           ('drr', lambda t: 0.3 * (1 - torch.exp(-5.0 * t.abs())))])
def test_rl1_and_drr_edits_equal_autograd(name, penalty):
    """A wrong sign or factor in the edit of rl1 or drr; at θ = 0 both must add nothing."""
    params = random_params()
    theta = list(params.values())
    theta[0].data[0, 0] = 0.0
    edited = [torch.ones_like(p) for p in theta]
    with torch.no_grad():
        PROCEDURES[name][0](theta, edited, dict(alpha=0.3, beta=5.0))
    copies = [p.detach().clone().requires_grad_() for p in theta]
    sum(penalty(t).sum() for t in copies).backward()
    for e, t in zip(edited, copies):
        assert torch.allclose(e, 1 + torch.where(t == 0, 0.0, t.grad), rtol=1e-12)


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('name, lean', (('rl1', 0), ('drr', 0), ('pmmp', 0), ('pmmp', 1)))
def test_edits_launch_as_many_kernels_for_forty_tensors_as_for_two(name, lean):
    """LOG, fault 8: Python loops over parameters in every step; multi-tensor calls do not grow with the count."""
    counts = []
    for n in (2, 40):
        params = random_params({f'p{i}': (3, 2) for i in range(n)}, torch.float32)
        state = random_pmmp(params, lean=lean) if name == 'pmmp' else dict(alpha=0.1, beta=5.0)
        with torch.no_grad(), CountOps() as ops:
            PROCEDURES[name][0](list(params.values()), [torch.ones_like(p) for p in params.values()], state)
            n_made = n                                          # ones_like above
            PROCEDURES[name][1](state)
        counts.append(ops.n - n_made)
    assert counts[0] == counts[1] > 0


def test_gamma_is_projected_to_the_unit_interval():
    """γ is a probability; Adam steps out of [0, 1] in either direction."""
    state = random_pmmp(random_params())
    for g in state['gamma']:
        g.copy_(4 * torch.randn_like(g))
    sparse.pmmp_project(state)
    assert all(0 <= g.min() and g.max() <= 1 for g in state['gamma'])


@pytest.mark.parametrize('lean', (False, True))
def test_pmmp_state_starts_at_theta_and_comes_back_from_a_checkpoint(lean):
    """LOG, fault 3: a checkpoint without γ, w, u or their optimiser; fault 2: w is a copy of θ as it is now."""
    params = random_params(dtype=torch.float32)
    make = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0)
    state = pmmp_state(params, 0.3, 0.9, 0.2, make, lean=lean)
    assert lean or all(torch.equal(w, p) and w.data_ptr() != p.data_ptr() for w, p in zip(state['w'], params.values()))
    assert all((g == 0.9).all() for g in state['gamma']) and all((u == 0.2).all() for u in state['u'])

    def steps(s, n):
        for _ in range(n):
            with torch.no_grad():
                sparse.pmmp_edit(list(params.values()), [torch.zeros_like(p) for p in params.values()], s)
            s['optimizer'].param_groups[0]['lr'] = 0.1
            s['optimizer'].step()
            sparse.pmmp_project(s)
    steps(state, 3)
    saved = copy.deepcopy(sparse.pmmp_saved(state, parallel.full))
    again = pmmp_state(params, 0.3, 0.9, 0.2, make, saved, lean)
    steps(state, 3), steps(again, 3)
    assert state['keys'] == (('gamma', 'u') if lean else ('w', 'gamma', 'u'))
    for key in state['keys']:
        assert all(torch.equal(x, y) for x, y in zip(state[key], again[key]))


def test_decoupled_penalty_stops_at_zero():
    """A proximal l1 step that crosses zero would oscillate instead of giving exact zeros."""
    theta = [torch.nn.Parameter(torch.tensor([0.001, -0.001, 0.5, 0.0]))]
    sparse.pull_towards_zero(theta, [torch.tensor([1.0, -1.0, 1.0, 1.0])], 0.1, 'rl1')
    assert theta[0][:2].tolist() == [0, 0] and abs(theta[0][2].item() - 0.4) < 1e-7


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
    """LOG, fault 11: `<= sorted[k]` prunes 75 % where 50 % was asked when values repeat."""
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


def test_forget_clears_both_moments():
    """Adam's momentum moves a weight whose gradient is zero."""
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.ones(4)
    optimizer.step()
    mask = torch.tensor([True, False, True, False])
    p.data.mul_(mask)
    sparse.forget(optimizer, {p: mask})
    p.grad = torch.zeros(4)
    for _ in range(3):
        optimizer.step()
    assert p[~mask].tolist() == [0, 0] and (p[mask] != 1 - 0.1).all()


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
    """LOG, fault 6: a model size without indices passed off as the size; nnz4 is kept apart from bits_est."""
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
