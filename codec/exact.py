"""Integer-valued inference of model.GPT: the same frequencies from any device, batch, thread count or kernel.

In: a model's shape, its weights as integers with scales (weights.py), its sites (sites.py): a fixed-point scale per
activation. Out: per position a row of V integer frequencies, the only thing an entropy coder sees.

Why it is exact. A sum of integers is the same in any order while every partial sum fits the mantissa: float32 where
sum |a||b| < 2^24, float64 where it is < 2^53, int32 where int8 products (torch._int_mm) are faster. Every product
and every norm sums integers under such a bound, proven from the weights as they are and a clamp on the activations; a
model that breaks one is refused. What lies between is element by element, one correctly rounded IEEE operation per
kernel (add, multiply, divide, sqrt, round half to even), hence the same everywhere. exp, activations, sines and cosines
are tables made with Python integers, never by libm. The layers are in layers.py.

Shapes: B rows, T positions, C channels, D head width, V vocabulary, W positions of a cache.
"""
import hashlib

import numpy as np
import torch

from codec.arithmetic import Arithmetic, look_up
from codec.layers import Block, Norm, Parts, Product, Statistics
from codec.sites import choose_sites, head_weight, named, reference_sites
from codec.tables import EXP_STEPS, activation_table, exp_table, rotation_table
from configurator import UserError

FREQUENCY_TOP = 1 << 24                         # frequency of the likeliest symbol; every symbol has at least 1
COVERED = dict(
    positions=('sinusoidal', 'learned', 'rotary', 'none'),
    norm=('layernorm', 'rmsnorm'),
    activation=('gelu', 'gelu_tanh', 'relu2'),
    block_type=('attention', 'mixer', 'multihead_mixer'))
COVERED_WHATEVER = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'tied', 'bias', 'qk_norm', 'dropout',
                    'final_norm', 'expansion')


def check_covered(args):
    """Refuse a model that this file does not evaluate; args as in a checkpoint's model_args."""
    strange = []
    for name, value in args.items():
        covered = value in COVERED[name] if name in COVERED else name in COVERED_WHATEVER
        if not covered:
            strange.append(f'{name} = {value!r}')
    if strange:
        raise UserError(f'the codec does not cover models with {", ".join(strange)}; exact.py says what it does')


def tables_hash(args):
    """Hash of the tables a model of this shape uses: in the archive's header, so that other arithmetic is refused."""
    h = hashlib.sha256()
    h.update(exp_table(FREQUENCY_TOP, 1).tobytes())
    h.update(activation_table(args['activation'], 8).tobytes())
    rotation = rotation_table(min(64, args['block_size']), args['n_embd'] // args['n_head'])
    h.update(np.stack(rotation).tobytes())
    if args.get('expansion'):
        h.update(activation_table('gelu', 8).tobytes())
    return h.hexdigest()[:16]


# --- the model ---

class Exact:
    """A GPT on integers. tensors: {name: (integers, scale)} as weights.fold names them; sites, wide: see choose_sites.

    float64_only runs every product in float64 (the test's way to see that the path does not matter). `statistics` are
    filled while they are on.
    """

    def __init__(self, args, tensors, sites, wide, device='cpu', float64_only=False):
        self.args = args
        self.device = device
        self.W = args['block_size']
        self.arithmetic = Arithmetic(device, float64_only)
        self.statistics = Statistics()

        # The archive's lists get their names here, and each layer takes what it needs by name.
        *of_blocks, of_head = named(args, sites, wide)
        head = Parts(args, tensors, of_head, self.arithmetic, self.statistics)
        self.embed = head.scaled('embed.weight', 1.0)
        self.position = self._positions(head)
        rotation = self._rotation()
        self.blocks = []
        for i, settings in enumerate(of_blocks):
            parts = Parts(args, tensors, settings, self.arithmetic, self.statistics, f'blocks.{i}.', f'{i}.')
            self.blocks.append(Block(parts, rotation))

        # Logits come in steps of the table of exp.
        self.head = Product(head, 'head', 'a', EXP_STEPS, head_weight(args))
        self.norm = Norm(head, 'x', 'norm', self.head.input) if 'x' in of_head.scale else None
        self.frequency_table = self.arithmetic.put(exp_table(FREQUENCY_TOP, 1), torch.float32)

    def _positions(self, parts):
        """What is added to the embedding, (W, C), or None."""
        if self.args['positions'] == 'learned':
            return parts.scaled('position.weight', 1.0)
        if self.args['positions'] == 'sinusoidal':
            width = self.args['n_embd']
            cos, sin = rotation_table(self.W, width)
            interleaved = np.stack((sin, cos), 2).reshape(self.W, -1)
            return self.arithmetic.put(interleaved[:, :width])
        return None

    def _rotation(self):
        """cos and sin (W, D/2) that turn queries and keys, or None."""
        if self.args['positions'] != 'rotary':
            return None
        tables = rotation_table(self.W, self.args['n_embd'] // self.args['n_head'])
        return [self.arithmetic.put(table) for table in tables]

    def cache(self):
        """Room for what later positions need of W positions of some rows, which stay the same from call to call."""
        return Cache(self.W)

    @torch.inference_mode()
    def forward(self, tokens, cache=None, last=0):
        """Return the head's integer input (B, n, C) of the last n (`last`; 0: all) positions of int64 tokens (B, T)."""
        start = cache.length if cache else 0
        stop = start + tokens.size(1)
        if stop > self.W:
            raise ValueError(f'{stop} positions for a window of {self.W}')
        x = self.embed[tokens]
        if self.position is not None:
            x = x + self.position[start:stop]
        for block in self.blocks:
            only_last = last and block is self.blocks[-1]
            x = block(x, cache, start, last if only_last else tokens.size(1))
        if cache:
            cache.length = stop
        a = x * self.head.input.scale if self.norm is None else self.norm.apply(x)
        return self.head.input.fit(a).to(self.head.run)

    @torch.inference_mode()
    def frequencies(self, a):
        """Return integer frequencies (N, V), float32, of head inputs a (N, C)."""
        z = self.head(a)
        z.sub_(z.amax(-1, keepdim=True)).neg_()
        z.clamp_max_(len(self.frequency_table) - 1)
        return look_up(self.frequency_table, z)


class Cache:
    """What the positions so far left for later ones, a tensor for W positions per block and kind, made when first used.

    Of attention keys (B, H, D, W) and values (B, H, W, D); of a mixer the inputs (G, W, B·D) of its matrices.
    """

    def __init__(self, size):
        self.size = size
        self.length = 0
        self.stored = {}

    def extend(self, key, x, axis, start):
        """Store x, whose positions lie along axis and begin at start; return all up to its last."""
        if key not in self.stored:
            shape = list(x.shape)
            shape[axis] = self.size
            self.stored[key] = x.new_empty(shape)
        n = x.size(axis)
        self.stored[key].narrow(axis, start, n).copy_(x)
        return self.stored[key].narrow(axis, 0, start + n)


# --- from a trained model ---

def observe(model, tokens, rows=16):
    """Run rows of tokens (N, T) through a model and return the Statistics of its sites."""
    model.statistics.clear()
    model.statistics.on = True
    for part in torch.from_numpy(tokens).to(model.device).split(rows):
        model.forward(part)
    model.statistics.on = False
    return model.statistics


def fit_sites(args, tensors, tokens, all_wide=False):
    """Choose sites and wide flags for quantised tensors from sample tokens (N, T): look coarsely, then finely."""
    coarse = Exact(args, tensors, *reference_sites(args))
    seen = observe(coarse, tokens).seen
    fine = Exact(args, tensors, *choose_sites(args, tensors, seen, all_wide=True))
    seen = observe(fine, tokens).seen
    return choose_sites(args, tensors, seen, all_wide)


def code_length_bits(model, tokens, targets, rows=16):
    """Sum of -log2(frequency/total) of targets (N, T) given inputs tokens (N, T), from the integer frequencies."""
    bits = 0.0
    tokens = torch.from_numpy(tokens)
    targets = torch.from_numpy(targets)
    for x, y in zip(tokens.split(rows), targets.split(rows)):
        hidden = model.forward(x.to(model.device))
        f = model.frequencies(hidden.flatten(0, 1)).double()
        chosen = f.gather(1, y.to(model.device).reshape(-1, 1))[:, 0]
        bits += float((f.sum(1).log2() - chosen.log2()).sum())
    return bits
