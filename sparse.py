"""Sparsity: the procedures, masks (TAMADE, exact-count magnitude, γ < ½), dead units, and how many bytes a model is.

One keep rule everywhere: a weight stays if |θ| >= ε. Masks are {parameter name: bool tensor}; zeros are only added.
"""
import torch

from model import ACTIVATIONS
from training.parallel import load_optimizer, optimizer_state, part

EPSILON_MAX, RESOLUTION, MAX_HALVINGS = 0.8, 1e-7, 50       # upstream's; 0.8/2^23 is the first below 1e-7
CALIBRATION_BLOCKS = 100


def regularised(model, which):
    """Return {name: parameter} that a procedure penalises and prunes: 'matrices' (and embeddings) or 'all'."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and (which == 'all' or p.dim() >= 2)}


def count_nonzero(tensors):
    """Count non-zero entries over tensors, such as model.parameters()."""
    return sum(int(torch.count_nonzero(p)) for p in tensors)


def sparsity_table(model):
    """Return [(name, entries, non-zeros)] per parameter, measured."""
    return [(n, p.numel(), int(torch.count_nonzero(p))) for n, p in model.named_parameters()]


@torch.no_grad()
def apply_masks(params, masks):
    """Set masked entries to zero; params {name: parameter}."""
    for name, mask in masks.items():
        params[name].mul_(mask)


def merge_masks(old, new):
    """Keep what both keep, so that masks only grow in zeros."""
    return {n: new[n] & old[n] if n in old else new[n] for n in new} | {n: m for n, m in old.items() if n not in new}


@torch.no_grad()
def tamade(loss_of, params, tolerance, epsilon_max=EPSILON_MAX, resolution=RESOLUTION):
    """Find the largest ε with loss(θ·[|θ| >= ε]) <= (1 + tolerance)·loss(θ) by bisection (Barth & von Petersenn 2025).

    loss_of() evaluates the current weights and must agree on all ranks. params: {name: parameter}; their values are
    restored. Returns (ε, loss before, loss at ε, evaluations); ε is the last accepted point, 0 if none was.
    """
    saved = {n: p.detach().clone() for n, p in params.items()}
    before = accepted_loss = loss_of()
    low, high, n_evaluations = 0.0, epsilon_max, 1
    while high - low >= resolution and n_evaluations <= MAX_HALVINGS:
        middle = (low + high) / 2
        for n, p in params.items():
            p.copy_(saved[n] * (saved[n].abs() >= middle))
        loss = loss_of()
        n_evaluations += 1
        if loss <= (1 + tolerance) * before:            # a nan loss is refused
            low, accepted_loss = middle, loss
        else:
            high = middle
    for n, p in params.items():
        p.copy_(saved[n])
    return low, before, accepted_loss, n_evaluations


def masks_by_threshold(params, epsilon):
    """Keep |θ| >= ε; an entry that is zero already stays out whatever ε is."""
    return {n: (p.detach().abs() >= epsilon) & (p.detach() != 0) for n, p in params.items()}


def masks_by_gamma(gamma):
    """Keep γ >= ½; gamma {name: tensor} from a PMMP run."""
    return {n: g >= 0.5 for n, g in gamma.items()}


def _smallest(values, k):
    """Mark exactly k entries of a flat tensor, the smallest; ties fall by position."""
    drop = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    if k > 0:
        limit = values.kthvalue(k).values
        drop = values < limit
        ties = (values == limit).nonzero()[:k - int(drop.sum()), 0]
        drop[ties] = True
    return drop


def masks_by_magnitude(params, sparsity, scope='global'):
    """Drop exactly round(sparsity · entries), the smallest |θ| first: over all ('global') or in each ('tensor')."""
    sizes = {n: p.detach().abs().flatten() for n, p in params.items()}
    if scope == 'tensor':
        return {n: ~_smallest(a, round(sparsity * a.numel())).view_as(params[n]) for n, a in sizes.items()}
    flat = torch.cat(list(sizes.values()))
    keep = (~_smallest(flat, round(sparsity * flat.numel()))).split([a.numel() for a in sizes.values()])
    return {n: part.view_as(p) for (n, p), part in zip(params.items(), keep)}


# --- procedures: edit(theta, grad, state) after backward, project(state) after the step ---
# theta and grad are lists of local tensors; grad is edited in place by a handful of multi-tensor operations.

@torch.no_grad()
def rl1_edit(theta, grad, state):
    """Add the gradient of alpha·Σ|θ|."""
    torch._foreach_add_(grad, torch._foreach_sign(theta), alpha=state['alpha'])


@torch.no_grad()
def drr_edit(theta, grad, state):
    """Add the gradient of alpha·Σ(1 - exp(-beta|θ|)), a smooth count of non-zeros."""
    pull = torch._foreach_abs(theta)
    torch._foreach_mul_(pull, -state['beta'])
    torch._foreach_exp_(pull)
    torch._foreach_addcmul_(grad, pull, torch._foreach_sign(theta), value=state['alpha'] * state['beta'])


@torch.no_grad()
def pmmp_edit(theta, grad, state):
    """Edit the gradients for probabilistic minimax pruning, and set those of w, γ, u.

    Objective per weight: alpha·γ + u·((θ - wγ)² + w²γ(1 - γ)), minimised over θ, w, γ and maximised over u, hence the
    sign of u.grad (Barth & von Petersenn 2025, arXiv 2505.17469). ∂w and ∂γ stand as 2uγ(w - θ) and uw(w - 2θ) + alpha:
    the same polynomials with fewer cancelling terms.
    """
    if 'w' not in state:
        return _pmmp_lean_edit(theta, grad, state)
    w, gamma, u = state['w'], state['gamma'], state['u']
    grad_w, grad_gamma, grad_u = ([t.grad for t in tensors] for tensors in (w, gamma, u))
    w_gamma = torch._foreach_mul(w, gamma)
    gap = torch._foreach_sub(theta, w_gamma)                            # d = θ - wγ
    torch._foreach_addcmul_(grad, u, gap, value=2.0)
    torch._foreach_copy_(grad_w, w)
    torch._foreach_sub_(grad_w, theta)                                  # w - θ
    torch._foreach_copy_(grad_gamma, grad_w)
    torch._foreach_sub_(grad_gamma, theta)                              # w - 2θ
    torch._foreach_mul_(grad_gamma, w)
    torch._foreach_mul_(grad_gamma, u)
    torch._foreach_add_(grad_gamma, state['alpha'])
    torch._foreach_mul_(grad_w, gamma)
    torch._foreach_mul_(grad_w, u)
    torch._foreach_mul_(grad_w, 2.0)
    torch._foreach_copy_(grad_u, w_gamma)
    torch._foreach_mul_(grad_u, w)                                      # w²γ
    torch._foreach_addcmul_(grad_u, grad_u, gamma, value=-1.0)          # w²γ(1 - γ), never negative
    torch._foreach_addcmul_(grad_u, gap, gap)
    torch._foreach_neg_(grad_u)


def _pmmp_lean_edit(theta, grad, state):
    """The same with w at its minimum, which is θ: the objective is alpha·γ + u·θ²(1 - γ)."""
    pull = torch._foreach_neg(state['gamma'])
    torch._foreach_add_(pull, 1.0)
    torch._foreach_mul_(pull, theta)                                    # θ(1 - γ)
    torch._foreach_addcmul_(grad, state['u'], pull, value=2.0)
    torch._foreach_mul_(pull, theta)
    torch._foreach_neg_(pull)                                           # -θ²(1 - γ), the gradient of u
    grad_gamma = torch._foreach_mul(theta, theta)
    torch._foreach_mul_(grad_gamma, state['u'])
    torch._foreach_neg_(grad_gamma)
    torch._foreach_add_(grad_gamma, state['alpha'])                     # alpha - uθ²
    for tensors, grads in ((state['gamma'], grad_gamma), (state['u'], pull)):
        for t, g in zip(tensors, grads):
            t.grad = g


class SignStep(torch.optim.Optimizer):
    """θ -= lr·sign(gradient), without state: what Adam comes to where a gradient keeps its sign. Frees the gradient."""

    def __init__(self, params, lr=0.0):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            grads = [p.grad for p in group['params']]
            torch._foreach_sign_(grads)
            torch._foreach_add_(group['params'], grads, alpha=-group['lr'])
        self.zero_grad()


@torch.no_grad()
def pmmp_project(state):
    """Keep γ in [0, 1]."""
    torch._foreach_clamp_min_(state['gamma'], 0.0)
    torch._foreach_clamp_max_(state['gamma'], 1.0)


def no_edit(theta, grad, state):
    pass


def no_project(state):
    pass


PROCEDURES = {'vanilla': (no_edit, no_project), 'rl1': (rl1_edit, no_project), 'drr': (drr_edit, no_project),
              'pmmp': (pmmp_edit, pmmp_project)}


@torch.no_grad()
def pmmp_state(params, alpha, initial_p, initial_u, make_optimizer, saved=None, lean=False):
    """Start w at θ, γ at initial_p, u at initial_u, or restore them; call it at the start of the main phase.

    params {name: parameter or this rank's part of it}, the same on all ranks. make_optimizer(tensors) gives the
    optimiser of w, γ and u; saved is what pmmp_saved returned. lean: without w, which is θ, and with sign steps.
    """
    begin = dict(w=lambda p: p.detach().clone(), gamma=lambda p: torch.full_like(p, initial_p),
                 u=lambda p: torch.full_like(p, initial_u))
    keys = ('gamma', 'u') if lean else ('w', 'gamma', 'u')
    state = dict({key: [begin[key](p) for p in params.values()] for key in keys}, alpha=alpha, keys=keys,
                 names=list(params), theta=list(params.values()))
    for key in keys:
        for name, tensor in zip(state['names'], state[key], strict=True):
            if saved:
                tensor.copy_(part(saved[key][name], params[name]))
            tensor.grad = None if lean else torch.zeros_like(tensor)
    state['optimizer'] = (SignStep if lean else make_optimizer)([t for key in keys for t in state[key]])
    if saved:
        load_optimizer(state['optimizer'], saved['optimizer'], len(keys) * state['theta'])
    return state


def pmmp_saved(state, view):
    """What a checkpoint keeps of PMMP's state: (w,) γ and u by parameter name, and their optimiser.

    view(tensor, like) makes of a rank's part what is to be saved: parallel.full or parallel.as_whole.
    """
    named = {key: {n: view(t.detach(), like) for n, t, like in zip(state['names'], state[key], state['theta'])}
             for key in state['keys']}
    return dict(named, optimizer=optimizer_state(state['optimizer'], len(state['keys']) * state['theta'], view))


@torch.no_grad()
def pmmp_forget(state, masks):
    """Drop what masks {name: bool tensor} drop: w and γ there, and the moments of all."""
    dropped = [masks[n] for n in state['names']]
    for key in state['keys']:
        forget(state['optimizer'], dict(zip(state[key], dropped)))
        if key != 'u':
            torch._foreach_mul_(state[key], dropped)


@torch.no_grad()
def forget(optimizer, masks):
    """Zero the moments of masked entries, so that no momentum moves them; masks {parameter: bool tensor}."""
    for p, mask in masks.items():
        for key in ('exp_avg', 'exp_avg_sq', 'momentum_buffer'):
            if key in optimizer.state.get(p, {}):
                optimizer.state[p][key].mul_(mask)


@torch.no_grad()
def pull_towards_zero(theta, pulls, rate, name):
    """Decoupled penalty: θ -= rate·pull; rl1 and drr stop at zero instead of crossing it (a proximal step)."""
    moved = torch._foreach_sub(theta, torch._foreach_mul(pulls, rate))
    if name != 'pmmp':
        for new, old in zip(moved, theta):
            new.masked_fill_(new * old < 0, 0.0)
    torch._foreach_copy_([t.detach() for t in theta], moved)


# --- structure that no longer does anything ---

def _sweep(incoming, bias, outgoing, next_bias, constant, may_fold):
    """Zero units that cannot matter; returns the number of weights zeroed.

    incoming (units, in), bias (units,) or None, outgoing (out, units). A unit with no way out loses its incoming
    weights and bias; one with no way in is the constant `constant(bias)`, folded into next_bias before its outgoing
    weights go.
    """
    zeroed = 0
    no_out = (outgoing == 0).all(0)
    for tensor in (incoming, bias):
        if tensor is not None:
            zeroed += int(torch.count_nonzero(tensor[no_out]))
            tensor[no_out] = 0
    no_in = (incoming == 0).all(1) & ~no_out
    if bias is not None:
        silent = no_in & (bias == 0)
        loud = no_in & (bias != 0)
        if loud.any() and next_bias is not None:
            extra = outgoing[:, loud].double() @ constant(bias[loud].double())
            if may_fold(extra):
                next_bias += extra.to(next_bias.dtype)
                silent = no_in
    else:
        silent = no_in
    zeroed += int(torch.count_nonzero(outgoing[:, silent]))
    outgoing[:, silent] = 0
    return zeroed


@torch.no_grad()
def sweep_dead_units(model, masks):
    """Zero feed-forward units and attention value columns that cannot reach the output; the function is unchanged.

    The transformer's form of random gradient pruning: a weight whose gradient is zero for every input. Repeats until
    nothing changes; masks are updated in place where they exist. Returns the number of weights zeroed.
    """
    total, last = 0, -1
    act = ACTIVATIONS[model.config.activation]
    c = model.config.n_embd
    while total != last:
        last = total
        for i, block in enumerate(model.blocks):
            att, ff = getattr(block, 'attention', None), block.feed_forward
            units = [(ff.up.weight, ff.up.bias, ff.down.weight, ff.down.bias, act,
                      f'blocks.{i}.feed_forward.down.bias')]
            if att:
                units = [(att.qkv.weight[2 * c:], None if att.qkv.bias is None else att.qkv.bias[2 * c:],
                          att.proj.weight, att.proj.bias, lambda b: b, f'blocks.{i}.attention.proj.bias'), *units]
            for incoming, bias, outgoing, next_bias, constant, name in units:
                held = masks.get(name)
                total += _sweep(incoming, bias, outgoing, next_bias, constant,
                                lambda extra, held=held: held is None or bool((extra[~held] == 0).all()))
    params = dict(model.named_parameters())
    for name in masks:
        masks[name] &= (params[name] != 0).to(masks[name].device)
    return total


@torch.no_grad()
def drop_unused_rows(model, used):
    """Zero embedding rows of ids that never occur; used is a bool tensor (V,). Returns the number of weights zeroed.

    With a tied head none: there the row also makes the logits of its id.
    """
    if model.config.tied:
        return 0
    before = int(torch.count_nonzero(model.embed.weight))
    model.embed.weight.mul_(used[:, None].to(model.embed.weight.device))
    return before - int(torch.count_nonzero(model.embed.weight))


# --- model size ---

def entropy_bits(symbols):
    """Bits to code an integer tensor with the order-0 entropy of its own histogram."""
    counts = torch.unique(symbols, return_counts=True)[1].double()
    return float(-(counts * (counts / counts.sum()).log2()).sum())


@torch.no_grad()
def model_sizes(tensors, bits=8):
    """Return bytes of a model three ways: raw (4 per weight), nnz4 (4 per non-zero, no indices), bits_est.

    tensors: its parameters, read once. bits_est: every tensor quantised to `bits`, one 16-bit scale per row, coded at
    its order-0 entropy, zero a symbol.
    """
    n = nonzero = estimate = 0
    for p in tensors:
        rows = p.detach().float().cpu().reshape(p.size(0) if p.dim() >= 2 else 1, -1)
        scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / (2 ** (bits - 1) - 1)
        estimate += entropy_bits((rows / scale).round().int()) + 16 * rows.size(0)
        n, nonzero = n + p.numel(), nonzero + int(torch.count_nonzero(p))
    return dict(raw_bytes=4 * n, nnz4_bytes=4 * nonzero, bits_est_bytes=round(estimate / 8), n_params=n,
                nonzeros=nonzero)
