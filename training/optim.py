"""Muon for the matrices of a transformer's blocks, AdamW for embedding, head and vectors, as one optimiser.

Muon (Jordan et al. 2024) takes, in place of a matrix's momentum, the nearest matrix with orthonormal rows or columns
(five Newton-Schulz steps in bfloat16). torch.optim.Muon scales it to the root mean square of an AdamW step (Liu et al.
2025), so that both can share a learning rate. What a procedure or a mask does to a gradient comes before.
"""
import torch

from model import optimizer_groups

MOMENTUM = 0.95


def is_muons(name, tensor):
    """Say whether a named parameter is Muon's."""
    return name.startswith('blocks.') and tensor.dim() == 2


class MuonAndAdamW:
    """Look like one torch optimiser whose first groups are AdamW's and whose last is Muon's.

    adamw(groups) makes the AdamW of what is left; rate_ratio: Muon's learning rate in units of AdamW's.
    """

    def __init__(self, named_params, adamw, weight_decay, rate_ratio):
        matrices = [p for n, p in named_params.items() if is_muons(n, p)]
        self.adamw = adamw(optimizer_groups([p for n, p in named_params.items() if not is_muons(n, p)], weight_decay))
        self.muon = torch.optim.Muon([dict(params=matrices, rate_ratio=rate_ratio)], momentum=MOMENTUM,
                                     weight_decay=weight_decay, adjust_lr_fn='match_rms_adamw')
        self.n_groups = len(self.adamw.param_groups)
        self.n_others = sum(len(g['params']) for g in self.adamw.param_groups)

    @property
    def param_groups(self):
        return self.adamw.param_groups + self.muon.param_groups

    @property
    def state(self):
        return {**self.adamw.state, **self.muon.state}

    def step(self):
        self.adamw.step()
        self.muon.step()

    def zero_grad(self, set_to_none=True):
        self.adamw.zero_grad(set_to_none)
        self.muon.zero_grad(set_to_none)

    def _shifted(self, saved, by):
        """A state_dict with its parameters numbered from `by`."""
        return dict(state={i + by: s for i, s in saved['state'].items()},
                    param_groups=[dict(g, params=[i + by for i in g['params']]) for g in saved['param_groups']])

    def state_dict(self):
        first, second = self.adamw.state_dict(), self._shifted(self.muon.state_dict(), self.n_others)
        return dict(state=first['state'] | second['state'], param_groups=first['param_groups'] + second['param_groups'])

    def load_state_dict(self, saved):
        groups, states = saved['param_groups'], saved['state']
        self.adamw.load_state_dict(dict(state={i: s for i, s in states.items() if i < self.n_others},
                                        param_groups=groups[:self.n_groups]))
        self.muon.load_state_dict(self._shifted(
            dict(state={i: s for i, s in states.items() if i >= self.n_others}, param_groups=groups[self.n_groups:]),
            -self.n_others))


def make_optimizer(named_params, adamw, k):
    """Make a training script's optimiser of {name: tensor}; adamw(groups) makes an AdamW, k holds the knobs."""
    if k.matrix_optimizer == 'muon':
        return MuonAndAdamW(named_params, adamw, k.weight_decay, k.muon_rate_ratio)
    return adamw(optimizer_groups(list(named_params.values()), k.weight_decay))
