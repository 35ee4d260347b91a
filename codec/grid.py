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

from codec import weights
from model import build, model_args

GAINS = {'attention.qkv': 'norm1', 'feed_forward.up': 'norm2'}
SMALLEST_GAIN = 1e-6


def choose_codes(model, bits, x, y):
    """Return {matrix: int64 scale codes (rows,)} of a GPT, its Fisher information measured on rows x, y (N, T)."""
    args = dict(model_args(model), dropout=0.0)
    folded = weights.fold(model.state_dict(), args)
    plain = weights.load_folded(build(args), folded)
    plain.left_padding = model.left_padding
    fisher = weights.fisher_information(plain, x, y)
    tensors, _ = weights.quantise_to(folded, fisher, args, bits)
    return {name: torch.from_numpy(codes) for name, (q, codes) in tensors.items() if q.ndim == 2}


def gain_of(name, named_params):
    """Return the gain that is folded into the columns of a matrix, or None."""
    block, _, key = name.removesuffix('.weight').removeprefix('blocks.').partition('.')
    if key not in GAINS:
        return None
    return named_params[f'blocks.{block}.{GAINS[key]}.weight'].detach()


class Grid:
    """Swap weights for rounded ones and back around each forward and backward pass, and price their bits.

    The interface is that of train.py's procedures. Until begin() nothing is rounded and every method does nothing.
    bits_rate: nats that a bit of the weights costs per target, bits_lambda·ln2/N; 0 for no price.
    """

    def __init__(self, bits_rate=0.0):
        self.bits_rate = bits_rate
        self.codes = {}                         # what a checkpoint keeps
        self.names = []
        self.theta = []
        self.behind = []
        self.steps = []
        self.gains = []

    def begin(self, named_params, codes):
        """Round from now on. named_params {name: parameter} of a whole model, codes as choose_codes returns them.

        A tied head shares the embedding's tensor and its codes.
        """
        self.codes = codes
        self.names = list(codes)
        self.theta = [named_params[name].detach() for name in codes]
        self.behind = [torch.empty_like(p) for p in self.theta]
        self.gains = [gain_of(name, named_params) for name in codes]
        self.steps = []
        for p, of_rows in zip(self.theta, codes.values(), strict=True):
            step = torch.from_numpy(weights.scale_from(of_rows.numpy()))
            self.steps.append(step.to(p)[:, None])

    def scales(self):
        """What each weight is a multiple of: (rows, 1), or (rows, columns) where a gain is folded in."""
        out = []
        for step, gain in zip(self.steps, self.gains):
            if gain is None:
                out.append(step)
            else:
                out.append(step / torch.where(gain.abs() < SMALLEST_GAIN, SMALLEST_GAIN, gain))
        return out

    @torch.no_grad()
    def before_forward(self):
        """Put rounded weights in the model; the ones behind them are kept for after_backward()."""
        if not self.theta:
            return
        torch._foreach_copy_(self.behind, self.theta)
        scales = self.scales()
        rounded = torch._foreach_div(self.theta, scales)
        torch._foreach_round_(rounded)
        torch._foreach_copy_(self.theta, torch._foreach_mul(rounded, scales))

    @torch.no_grad()
    def after_backward(self):
        """Put back the weights behind the rounded ones, which the update then moves."""
        if self.theta:
            torch._foreach_copy_(self.theta, self.behind)

    @torch.no_grad()
    def edit(self, gradients):
        """Add the gradient of bits_rate · bits of all matrices to gradients {name: tensor}, in place.

        An integer of a row whose mean magnitude is m costs about log2(1 + 2e·m) bits: the entropy of a Laplace
        distribution on a fine grid, 0 for an empty row, within a tenth in between. It is what weights.py pays, which
        codes every row in the context of its own mean magnitude. Differentiated: sign(θ) / (ln 2 · (s/2e + mean|θ|)).
        """
        if not self.bits_rate:
            return
        for name, p, step, gain in zip(self.names, self.theta, self.steps, self.gains):
            size = p.abs() if gain is None else (p * gain).abs_()
            slope = self.bits_rate / math.log(2) / (step / (2 * math.e) + size.mean(1, keepdim=True))
            if gain is not None:
                slope = slope * gain.abs()
            gradients[name].addcmul_(p.sign(), slope)

    def project(self):
        """Nothing: the next before_forward() rounds anew."""
