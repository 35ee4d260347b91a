"""The procedures of train.py: edits against autograd of the written objectives, projection, state, kernels."""
import copy
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from train import DRR, PMMP, RL1, LeanPMMP, Vanilla
from training import parallel

SHAPES = dict(a=(7, 5), b=(3,), c=(4, 4))
SGD = partial(torch.optim.SGD, lr=0.1)
ADAMW = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0)


def random_params(shapes=SHAPES, dtype=torch.float64):
    torch.manual_seed(3)
    return {name: torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for name, shape in shapes.items()}


def begun(procedure, params, make_adamw=SGD, saved=None):
    procedure.begin(params, make_adamw, saved)
    return procedure


def random_pmmp(params, kind=PMMP):
    """A PMMP whose (w,) γ, u are away from their start."""
    procedure = begun(kind(0.3), params)
    for w in getattr(procedure, 'w', ()):
        w.copy_(torch.randn_like(w))
    for gamma, u in zip(procedure.gamma, procedure.u):
        gamma.copy_(torch.rand_like(gamma))
        u.copy_(torch.rand_like(u))
    return procedure


def edited(procedure, gradients=None):
    """Edit gradients of the loss, zeros by default, and return what they become."""
    for i, p in enumerate(procedure.theta):
        p.grad = torch.zeros_like(p) if gradients is None else gradients[i].clone()
    procedure.edit()
    return [p.grad for p in procedure.theta]


def with_gradients(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


# --- the edits ---

def test_pmmp_gradients_equal_autograd_of_the_written_objective():
    """A wrong sign or factor in a hand-written gradient; u is maximised, hence its opposite sign."""
    params = random_params()
    pmmp = random_pmmp(params)
    of_loss = [torch.randn_like(p) for p in params.values()]
    found = edited(pmmp, of_loss)
    theta = with_gradients(params.values())
    w = with_gradients(pmmp.w)
    gamma = with_gradients(pmmp.gamma)
    u = with_gradients(pmmp.u)
    objective = sum((0.3 * gg + uu * ((tt - ww * gg) ** 2 + ww ** 2 * gg * (1 - gg))).sum()
                    for tt, ww, gg, uu in zip(theta, w, gamma, u))
    objective.backward()
    close = partial(torch.allclose, rtol=1e-12, atol=1e-12)
    for i in range(len(theta)):
        assert close(found[i], of_loss[i] + theta[i].grad)
        assert close(pmmp.w[i].grad, w[i].grad)
        assert close(pmmp.gamma[i].grad, gamma[i].grad)
        assert close(pmmp.u[i].grad, -u[i].grad)


def test_lean_pmmp_is_pmmp_at_the_w_that_minimises_it():
    """The closed form w = θ: there ∂w is 0, and θ, γ, u have the gradients that the exact edit gives them."""
    params = random_params()
    lean = random_pmmp(params, LeanPMMP)
    exact = random_pmmp(params)
    assert not hasattr(lean, 'w') and all(t.grad is None for t in lean.gamma + lean.u)
    torch._foreach_copy_(exact.w, [p.detach() for p in params.values()])
    torch._foreach_copy_(exact.gamma, lean.gamma)
    torch._foreach_copy_(exact.u, lean.u)
    ones = [torch.ones_like(p) for p in params.values()]
    of_lean = edited(lean, ones)
    of_exact = edited(exact, ones)
    assert all(not w.grad.any() for w in exact.w)
    for a, b in zip(of_lean, of_exact, strict=True):
        assert torch.allclose(a, b, rtol=1e-12) and not torch.equal(a, torch.ones_like(a))
    for a, b in zip(lean.gamma + lean.u, exact.gamma + exact.u, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-12) and a.grad.any()


def test_pmmp_bracket_is_the_expectation_over_keep_variables():
    """Nothing is sampled only because the bracket is E(θ - wz)² for z ~ Bernoulli(γ): ∂u must be minus that."""
    params = random_params()
    pmmp = random_pmmp(params)
    edited(pmmp)
    for p, w, g, u in zip(params.values(), pmmp.w, pmmp.gamma, pmmp.u):
        assert torch.allclose(-u.grad, g * (p - w) ** 2 + (1 - g) * p ** 2, rtol=1e-12)


@pytest.mark.parametrize('kind', (PMMP, LeanPMMP))
def test_pmmp_gradients_are_rewritten_each_step(kind):
    """Gradients of w, γ, u that add up over steps: a second edit must give the same ones."""
    pmmp = random_pmmp(random_params(), kind)
    gradients = []
    for _ in range(2):
        edited(pmmp)
        gradients.append([t.grad.clone() for key in pmmp.state for t in getattr(pmmp, key)])
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


@pytest.mark.parametrize('procedure, penalty', [
    (RL1(0.3), lambda t: 0.3 * t.abs()),
    (DRR(0.3, 5.0), lambda t: 0.3 * (1 - torch.exp(-5.0 * t.abs())))], ids=('rl1', 'drr'))
def test_rl1_and_drr_edits_equal_autograd(procedure, penalty):
    """A wrong sign or factor in the edit of rl1 or drr; at θ = 0 both must add nothing."""
    params = random_params()
    params['a'].data[0, 0] = 0.0
    begun(procedure, params)
    found = edited(procedure, [torch.ones_like(p) for p in params.values()])
    copies = with_gradients(params.values())
    sum(penalty(t).sum() for t in copies).backward()
    for gradient, t in zip(found, copies, strict=True):
        assert torch.allclose(gradient, 1 + torch.where(t == 0, 0.0, t.grad), rtol=1e-12)


def test_vanilla_adds_nothing_and_says_so():
    """A step asks `edits` whether there is a second norm to log."""
    vanilla = begun(Vanilla(), random_params())
    ones = [torch.ones_like(p) for p in vanilla.theta]
    assert not vanilla.edits and all(torch.equal(a, b) for a, b in zip(edited(vanilla, ones), ones))
    assert RL1(0).edits and DRR(0, 5.0).edits and PMMP(0).edits and LeanPMMP(0).edits


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('make', (lambda: RL1(0.1), lambda: DRR(0.1, 5.0), lambda: PMMP(0.1), lambda: LeanPMMP(0.1)),
                         ids=('rl1', 'drr', 'pmmp', 'lean'))
def test_edits_launch_as_many_kernels_for_forty_tensors_as_for_two(make):
    """Python loops over parameters in every step; multi-tensor calls do not grow with the count."""
    counts = []
    for n in (2, 40):
        params = random_params({f'p{i}': (3, 2) for i in range(n)}, torch.float32)
        procedure = begun(make(), params)
        for p in params.values():
            p.grad = torch.ones_like(p)
        with CountOps() as ops:
            procedure.edit()
            procedure.project()
        counts.append(ops.n)
    assert counts[0] == counts[1] > 0


# --- projection and state ---

@pytest.mark.parametrize('kind', (PMMP, LeanPMMP))
def test_gamma_is_projected_to_the_unit_interval(kind):
    """γ is a probability; Adam steps out of [0, 1] in either direction."""
    pmmp = random_pmmp(random_params(), kind)
    for gamma in pmmp.gamma:
        gamma.copy_(4 * torch.randn_like(gamma))
    pmmp.project()
    assert all(0 <= gamma.min() and gamma.max() <= 1 for gamma in pmmp.gamma)


@pytest.mark.parametrize('kind', (PMMP, LeanPMMP))
def test_pmmp_starts_at_theta_and_comes_back_from_a_checkpoint(kind):
    """A checkpoint without γ, w, u or their optimiser; and w is a copy of θ as it is now."""
    params = random_params(dtype=torch.float32)
    pmmp = begun(kind(0.3, 0.9, 0.2), params, ADAMW)
    for w, p in zip(getattr(pmmp, 'w', ()), params.values()):
        assert torch.equal(w, p) and w.data_ptr() != p.data_ptr()
    assert all((gamma == 0.9).all() for gamma in pmmp.gamma) and all((u == 0.2).all() for u in pmmp.u)

    def steps(procedure, n):
        for _ in range(n):
            edited(procedure)
            optimizer, = procedure.optimizers
            optimizer.param_groups[0]['lr'] = 0.1
            optimizer.step()
            procedure.project()
    steps(pmmp, 3)
    saved = copy.deepcopy(pmmp.saved(parallel.full))
    again = begun(kind(0.3, 0.9, 0.2), params, ADAMW, saved)
    steps(pmmp, 3)
    steps(again, 3)
    assert not any(torch.equal(saved['u'][name], u) for name, u in zip(SHAPES, again.u, strict=True))
    expected = {PMMP: {'w', 'gamma', 'u', 'optimizer'}, LeanPMMP: {'gamma', 'u', 'optimizer'}}
    assert saved.keys() == expected[kind]
    for key in pmmp.state:
        assert all(torch.equal(x, y) for x, y in zip(getattr(pmmp, key), getattr(again, key), strict=True))


@pytest.mark.parametrize('kind', (PMMP, LeanPMMP))
def test_pmmp_forgets_what_is_pruned(kind):
    """w and γ of a pruned weight are 0, so is its momentum; u, a multiplier, stays."""
    params = random_params()
    pmmp = random_pmmp(params, kind)
    pmmp.optimizers = [ADAMW([t for key in pmmp.state for t in getattr(pmmp, key)])]
    edited(pmmp)
    pmmp.optimizers[0].step()
    u_before = [u.clone() for u in pmmp.u]
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in params.items()}
    pmmp.forget(masks)
    assert all(torch.equal(a, b) for a, b in zip(u_before, pmmp.u, strict=True))
    for key in pmmp.state:
        for tensor, mask in zip(getattr(pmmp, key), masks.values(), strict=True):
            assert key == 'u' or not tensor[~mask].any() and tensor[mask].all()
            for moment in ('exp_avg', 'exp_avg_sq'):
                values = pmmp.optimizers[0].state[tensor][moment]
                assert not values[~mask].any() and values[mask].all()
