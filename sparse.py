"""Sparsity: masks (TAMADE, exact-count magnitude, γ < ½), units that do nothing, and how many bytes a model is.

One keep rule everywhere: a weight stays if |θ| >= ε. Masks are {parameter name: bool tensor}; zeros are only added. The
procedures that make weights small are in train.py.
"""
import torch

from model import ACTIVATIONS
from training.parallel import part

EPSILON_MAX = 0.8                       # of TAMADE, as its authors' code has it; 0.8/2^23 is the first below 1e-7
RESOLUTION = 1e-7
MAX_HALVINGS = 50
CALIBRATION_BLOCKS = 100                # leading validation blocks that its losses are measured on


# --- masks ---

class Masks:
    """Which weights of a model stay, held on weights and gradients of a run.

    named_params {name: this rank's tensor}; saved {name: whole mask} of a checkpoint. Masks of parameters that are not
    among them (frozen ones) are handed on unchanged.
    """

    def __init__(self, named_params, saved=None):
        self.named_params = named_params
        self.masks = {}
        self.others = {}
        for name, mask in (saved or {}).items():
            if name in named_params:
                self.masks[name] = part(mask, named_params[name])
            else:
                self.others[name] = mask
        self._list()

    def _list(self):
        """Keep what the two multi-tensor calls of a step need."""
        self.tensors = [self.named_params[name] for name in self.masks]
        self.values = [self.named_params[name].detach() for name in self.masks]
        self.mask_list = list(self.masks.values())

    def __bool__(self):
        return bool(self.masks)

    def grow(self, new):
        """Add the zeros of new masks {name: bool tensor} and set the weights there to zero."""
        self.masks = merge_masks(self.masks, new)
        self._list()
        self.on_weights()

    @torch.no_grad()
    def on_gradients(self):
        """Zero the gradients of weights that are gone."""
        if self.masks:
            torch._foreach_mul_([t.grad for t in self.tensors], self.mask_list)

    @torch.no_grad()
    def on_weights(self):
        """Zero the weights that are gone."""
        if self.masks:
            torch._foreach_mul_(self.values, self.mask_list)

    def by_parameter(self):
        """Return {tensor: mask}, as training.optim.forget takes them."""
        return dict(zip(self.tensors, self.mask_list))

    def saved(self, view):
        """Return what a checkpoint holds; view(tensor, like): parallel.full or parallel.as_whole."""
        mine = {name: view(mask, self.named_params[name]) for name, mask in self.masks.items()}
        return mine | self.others


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
    merged = dict(old)
    for name, mask in new.items():
        merged[name] = mask & old[name] if name in old else mask
    return merged


@torch.no_grad()
def tamade(loss_of, params, tolerance, epsilon_max=EPSILON_MAX, resolution=RESOLUTION):
    """Find the largest ε with loss(θ·[|θ| >= ε]) <= (1 + tolerance)·loss(θ) by bisection (Barth & von Petersenn 2025).

    loss_of() evaluates the current weights and must agree on all ranks. params: {name: parameter}; their values are
    restored. Returns (ε, loss before, loss at ε, evaluations); ε is the last accepted point, 0 if none was.
    """
    saved = {n: p.detach().clone() for n, p in params.items()}
    before = loss_of()
    accepted_loss = before
    n_evaluations = 1
    low = 0.0
    high = epsilon_max
    while high - low >= resolution and n_evaluations <= MAX_HALVINGS:
        middle = (low + high) / 2
        for n, p in params.items():
            p.copy_(saved[n] * (saved[n].abs() >= middle))
        loss = loss_of()
        n_evaluations += 1
        if loss <= (1 + tolerance) * before:            # a nan loss is refused
            low = middle
            accepted_loss = loss
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


# --- structure that no longer does anything ---

def _sweep(incoming, bias, outgoing, next_bias, constant, next_mask):
    """Zero units that cannot matter; returns the number of weights zeroed.

    incoming (units, in), bias (units,) or None, outgoing (out, units). A unit with no way out loses its incoming
    weights and bias; one with no way in is the constant `constant(bias)`, folded into next_bias before its outgoing
    weights go.
    """
    zeroed = 0

    # Units that nothing reads: what goes into them is of no use.
    no_out = (outgoing == 0).all(0)
    for tensor in (incoming, bias):
        if tensor is not None:
            zeroed += int(torch.count_nonzero(tensor[no_out]))
            tensor[no_out] = 0

    # Units that read nothing: constants. Those that are zero are silent, the others become so by folding.
    no_in = (incoming == 0).all(1) & ~no_out
    silent = no_in
    if bias is not None:
        silent = no_in & (bias == 0)
        loud = no_in & (bias != 0)
        if loud.any() and next_bias is not None:
            extra = outgoing[:, loud].double() @ constant(bias[loud].double())
            if next_mask is None or bool((extra[~next_mask] == 0).all()):     # a masked bias takes nothing
                next_bias += extra.to(next_bias.dtype)
                silent = no_in
    zeroed += int(torch.count_nonzero(outgoing[:, silent]))
    outgoing[:, silent] = 0
    return zeroed


def _units_of(block, name, activation, width):
    """Yield the groups of units of a block: (incoming, bias, outgoing, next bias, constant of a bias, its name)."""
    attention = getattr(block, 'attention', None)
    if attention:
        # A value column of attention passes through it unchanged, as the attention weights sum to one.
        value_bias = None if attention.qkv.bias is None else attention.qkv.bias[2 * width:]
        yield (attention.qkv.weight[2 * width:], value_bias, attention.proj.weight, attention.proj.bias,
               lambda bias: bias, f'{name}.attention.proj.bias')
    ff = block.feed_forward
    yield (ff.up.weight, ff.up.bias, ff.down.weight, ff.down.bias, activation, f'{name}.feed_forward.down.bias')


@torch.no_grad()
def sweep_dead_units(model, masks):
    """Zero feed-forward units and attention value columns that cannot reach the output; the function is unchanged.

    The transformer's form of random gradient pruning: a weight whose gradient is zero for every input. Repeats until
    nothing changes; masks are updated in place where they exist. Returns the number of weights zeroed.
    """
    total = 0
    last = -1
    activation = ACTIVATIONS[model.config.activation]
    while total != last:
        last = total
        for i, block in enumerate(model.blocks):
            for *unit, bias_name in _units_of(block, f'blocks.{i}', activation, model.config.n_embd):
                total += _sweep(*unit, masks.get(bias_name))
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
    n_params = 0
    nonzeros = 0
    estimate = 0.0
    for p in tensors:
        n_rows = p.size(0) if p.dim() >= 2 else 1
        rows = p.detach().float().cpu().reshape(n_rows, -1)
        scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / (2 ** (bits - 1) - 1)
        estimate += entropy_bits((rows / scale).round().int()) + 16 * n_rows
        n_params += p.numel()
        nonzeros += int(torch.count_nonzero(p))
    return dict(raw_bytes=4 * n_params, nnz4_bytes=4 * nonzeros, bits_est_bytes=round(estimate / 8), n_params=n_params,
                nonzeros=nonzeros)
