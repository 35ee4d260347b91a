"""Optimisers of a training run: AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

Muon (Jordan et al. 2024) takes, in place of a matrix's momentum, the nearest matrix with orthonormal rows or columns
(five Newton-Schulz steps in bfloat16). torch.optim.Muon scales it to the root mean square of an AdamW step (Liu et al.
2025), so that both share a learning rate. What a procedure or a mask does to a gradient comes before.

A run steps a list of optimisers; a checkpoint holds the list of their states. Checkpoints of earlier versions hold one
state, of AdamW or of both in a row, which load_states takes apart.
"""
import torch

from training.parallel import load_optimizer, optimizer_state, parameters_of

MUON_MOMENTUM = 0.95


def is_muons(name, tensor):
    """Say whether a named parameter is Muon's: a matrix of a block."""
    return name.startswith('blocks.') and tensor.dim() == 2


def adamw_groups(params, weight_decay):
    """Split a list of parameters in two AdamW groups: matrices and embeddings decay, biases and norm gains do not."""
    matrices = [p for p in params if p.dim() >= 2]
    vectors = [p for p in params if p.dim() < 2]
    return [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]


def make_optimizers(named_params, make_adamw, matrix_optimizer='adamw', weight_decay=0.0, muon_rate_ratio=1.0):
    """Return the optimisers of {name: tensor}: [AdamW], or with matrix_optimizer = 'muon' [AdamW, Muon].

    make_adamw(groups) makes an AdamW with the rates of the run; muon_rate_ratio: Muon's rate in units of AdamW's.
    """
    if matrix_optimizer != 'muon':
        return [make_adamw(adamw_groups(list(named_params.values()), weight_decay))]
    matrices = [p for n, p in named_params.items() if is_muons(n, p)]
    others = [p for n, p in named_params.items() if not is_muons(n, p)]
    groups = [dict(params=matrices, rate_ratio=muon_rate_ratio)]
    muon = torch.optim.Muon(groups, momentum=MUON_MOMENTUM, weight_decay=weight_decay,
                            adjust_lr_fn='match_rms_adamw')
    return [make_adamw(adamw_groups(others, weight_decay)), muon]


def set_rate(optimizers, rate):
    """Set the learning rate of all parameters, of those with a rate_ratio in that ratio."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = rate * group.get('rate_ratio', 1.0)


@torch.no_grad()
def forget(optimizers, masks):
    """Zero the moments of masked entries, so that no momentum moves them; masks {parameter: bool tensor}."""
    for optimizer in optimizers:
        for p, mask in masks.items():
            state = optimizer.state.get(p, {})
            for key in ('exp_avg', 'exp_avg_sq', 'momentum_buffer'):
                if key in state:
                    state[key].mul_(mask)


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


# --- states in checkpoints ---

def states_of(optimizers, view):
    """Return the state of each optimiser as a checkpoint holds it; view(tensor, like): parallel.full or as_whole."""
    return [optimizer_state(optimizer, parameters_of(optimizer), view) for optimizer in optimizers]


def load_states(optimizers, saved):
    """Load what states_of returned, or the one state that earlier versions saved."""
    if isinstance(saved, dict):
        saved = split_state(saved, optimizers)
    for optimizer, state in zip(optimizers, saved, strict=True):
        load_optimizer(optimizer, state, parameters_of(optimizer))


def split_state(saved, optimizers):
    """Take apart one state of several optimisers whose groups and parameters were numbered in a row."""
    states = []
    first_group = 0
    first_parameter = 0
    for optimizer in optimizers:
        n_groups = len(optimizer.param_groups)
        n_parameters = len(parameters_of(optimizer))
        groups = saved['param_groups'][first_group:first_group + n_groups]
        numbers = range(first_parameter, first_parameter + n_parameters)
        states.append(dict(
            state={i - first_parameter: saved['state'][i] for i in numbers if i in saved['state']},
            param_groups=[dict(g, params=[i - first_parameter for i in g['params']]) for g in groups]))
        first_group += n_groups
        first_parameter += n_parameters
    return states
