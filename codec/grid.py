"""Fine-tuning on a grid: every matrix is rounded to the steps that compress.py will write, and trained through it.

The grid is weights.py's: a step for each output row, chosen from its Fisher information so that all matrices together
cost `qat_bits` bits per non-zero weight. The forward and backward pass see rounded weights, the update moves the ones
behind them (straight-through estimator, Bengio et al. 2013). What the run ends with lies on the grid, whose codes
travel in the checkpoint: the archive holds the model that was trained, bit for bit.

A norm's gain is folded into the matrix after it when the model is packed, so a weight θ of it is rounded where it will
be written: s·round(θg/s)/g, s the step of its row, g the gain of its column.
"""
import contextlib
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


class GridMatrix:
    """A matrix that is rounded to its grid and put back: theta (R, C), the step of each row (R, 1), gains (C,) or None.

    gain: of the norm before it, which is folded into the matrix when the model is packed.
    """

    def __init__(self, theta, steps, gain):
        self.theta = theta
        self.steps = steps
        self.gain = gain
        self.behind = torch.empty_like(theta)

    def scale(self):
        """Return what each weight is a multiple of: (R, 1), or (R, C) where a gain is folded in."""
        if self.gain is None:
            return self.steps
        return self.steps / torch.where(self.gain.abs() < SMALLEST_GAIN, SMALLEST_GAIN, self.gain)

    def slope(self, rate):
        """Return the derivative of rate times the bits of the matrix with respect to |θ|; see Grid.edit."""
        size = self.theta.abs() if self.gain is None else (self.theta * self.gain).abs_()
        slope = rate / math.log(2) / (self.steps / (2 * math.e) + size.mean(1, keepdim=True))
        return slope if self.gain is None else slope * self.gain.abs()


def gain_before(name, named_params):
    """Return the gain of the norm that is folded into a matrix of this name, or None."""
    block, _, key = name.removesuffix('.weight').partition('.')[2].partition('.')
    if key not in GAINS:
        return None
    return named_params[f'blocks.{block}.{GAINS[key]}.weight'].detach()


class Grid:
    """Training through rounded weights, with the interface of train.py's procedures.

    named_params {name: tensor}; codes as choose_codes returns them, {} rounds nothing. rate: nats that a bit of weights
    costs in the loss, 0 = no penalty. A tied head shares the embedding's tensor and its codes.
    """

    optimizers = ()

    def __init__(self, named_params, codes, rate=0.0):
        self.codes = codes
        self.rate = rate
        self.edits = rate > 0
        self.parameters = [named_params[name] for name in codes]
        self.matrices = []
        for name, code in codes.items():
            theta = named_params[name].detach()
            steps = torch.from_numpy(weights.scale_from(code.numpy())).to(theta)[:, None]
            self.matrices.append(GridMatrix(theta, steps, gain_before(name, named_params)))
        self.theta = [matrix.theta for matrix in self.matrices]
        self.behind = [matrix.behind for matrix in self.matrices]

    @torch.no_grad()
    def before_forward(self):
        """Put rounded weights in the model; the ones behind them are kept."""
        if not self.theta:
            return
        torch._foreach_copy_(self.behind, self.theta)
        scales = [matrix.scale() for matrix in self.matrices]
        rounded = torch._foreach_div(self.theta, scales)
        torch._foreach_round_(rounded)
        torch._foreach_copy_(self.theta, torch._foreach_mul(rounded, scales))

    @torch.no_grad()
    def after_backward(self):
        """Put back the weights behind the rounded ones: the update moves these."""
        if self.theta:
            torch._foreach_copy_(self.theta, self.behind)

    @contextlib.contextmanager
    def as_evaluated(self):
        """Show the model with the weights that it is scored and saved with."""
        self.before_forward()
        try:
            yield
        finally:
            self.after_backward()

    @torch.no_grad()
    def edit(self):
        """Add the gradient of rate times the bits of all matrices.

        An integer of a row whose mean magnitude is m costs about log2(1 + 2e·m) bits: the entropy of a Laplace
        distribution on a fine grid, 0 for an empty row, within a tenth in between. It is what weights.py pays, which
        codes every row in the context of its own mean magnitude. Differentiated: sign(θ) / (ln 2 · (s/2e + mean|θ|)).
        """
        for parameter, matrix in zip(self.parameters, self.matrices):
            parameter.grad.addcmul_(matrix.theta.sign(), matrix.slope(self.rate))

    def project(self):
        """Nothing to do: what the run ends with is rounded when it is saved."""

    def forget(self, masks):
        """Nothing to do: no pruning follows."""

    def saved(self, view):
        return {}
