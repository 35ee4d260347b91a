"""Fine-tuning on a grid: every matrix is rounded to the steps that compress.py will write, and trained through it.

The grid is weights.py's: a step for each output row, chosen from its Fisher information so that all matrices together
cost `qat_bits` bits per non-zero weight. The forward and backward pass see rounded weights, the update moves the ones
behind them (straight-through estimator, Bengio et al. 2013). What the run ends with lies on the grid, whose codes
travel in the checkpoint: the archive holds the model that was trained, bit for bit.

A norm's gain is folded into the matrix after it when the model is packed, so a weight θ of it is rounded where it will
be written: s·round(θg/s)/g, s the step of its row, g the gain of its column.
"""
import math

import torch

GAINS = {'attention.qkv': 'norm1', 'feed_forward.up': 'norm2'}
SMALLEST_GAIN = 1e-6


def choose_codes(model, bits, x, y):
    """Return {matrix: int64 scale codes (rows,)} of a GPT, its Fisher information measured on rows x, y (N, T)."""
    from codec import weights
    from model import build, model_args
    args = dict(model_args(model), dropout=0.0)
    folded = weights.fold(model.state_dict(), args)
    plain = weights.load_folded(build(args), folded)
    plain.left_padding = model.left_padding
    tensors, _ = weights.quantise_to(folded, weights.fisher_information(plain, x, y), args, bits)
    return {n: torch.from_numpy(codes) for n, (q, codes) in tensors.items() if q.ndim == 2}


class Grid:
    """Swap weights for rounded ones and back; named_params {name: tensor}, codes as choose_codes returns them.

    A tied head shares the embedding's tensor and its codes. Without codes nothing is rounded.
    """

    def __init__(self, named_params, codes):
        if codes:
            from codec.weights import scale_from
        self.codes, self.theta = codes, [named_params[n].detach() for n in codes]
        self.behind = [torch.empty_like(p) for p in self.theta]
        self.steps = [torch.from_numpy(scale_from(c.numpy())).to(p)[:, None]
                      for c, p in zip(codes.values(), self.theta)]
        self.gains = [self.gain_of(n, named_params) for n in codes]

    @staticmethod
    def gain_of(name, named_params):
        block, _, key = name.removesuffix('.weight').partition('.')[2].partition('.')
        return named_params[f'blocks.{block}.{GAINS[key]}.weight'].detach() if key in GAINS else None

    def scales(self):
        """What each weight is a multiple of: (rows, 1), or (rows, columns) where a gain is folded in."""
        return [s if g is None else s / torch.where(g.abs() < SMALLEST_GAIN, SMALLEST_GAIN, g)
                for s, g in zip(self.steps, self.gains)]

    @torch.no_grad()
    def round(self):
        """Put rounded weights in the model; the ones behind them are kept for restore()."""
        if not self.theta:
            return
        torch._foreach_copy_(self.behind, self.theta)
        scales = self.scales()
        rounded = torch._foreach_div(self.theta, scales)
        torch._foreach_round_(rounded)
        torch._foreach_copy_(self.theta, torch._foreach_mul(rounded, scales))

    @torch.no_grad()
    def restore(self):
        if self.theta:
            torch._foreach_copy_(self.theta, self.behind)

    @torch.no_grad()
    def pull(self, theta, grad, state):
        """Add the gradient of state['bits_rate'] · bits of all matrices to that of those in the grid.

        An integer of a row whose mean magnitude is m costs about log2(1 + 2e·m) bits: the entropy of a Laplace
        distribution on a fine grid, 0 for an empty row, within a tenth in between. It is what weights.py pays, which
        codes every row in the context of its own mean magnitude. Differentiated: sign(θ) / (ln 2 · (s/2e + mean|θ|)).
        """
        at = {t.data_ptr(): g for t, g in zip(theta, grad)}
        for p, s, gain in zip(self.theta, self.steps, self.gains):
            size = p.abs() if gain is None else (p * gain).abs_()
            slope = state['bits_rate'] / math.log(2) / (s / (2 * math.e) + size.mean(1, keepdim=True))
            at[p.data_ptr()].addcmul_(p.sign(), slope if gain is None else slope * gain.abs())
