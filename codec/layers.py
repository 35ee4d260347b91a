"""The layers of model.GPT on integers: products, norms, tables of activations, attention and mixers.

A layer takes and returns what exact.py says: sums of integers under proven bounds, and between them single IEEE
operations, so that any order, batch, thread count or kernel gives the same numbers. Residual states are float64.

Shapes: B rows, T positions, C channels, H heads, D head width, W positions of a cache, G = H·e mixing matrices.
"""
import functools
import math

import numpy as np
import torch

from codec.arithmetic import divide, look_up
from codec.sites import WIDE_LIMIT, attention_limits, norm_bits, product_limit, triangles
from codec.tables import ACTIVATION_ENTRIES, ACTIVATION_FRACTION, EXP_STEPS, activation_table, exp_table

INT8_FROM = 1 << 16                             # entries of a matrix from which int8 products are faster
INT8_ROWS = 256                                 # rows that they take at a time: these stay in the cache
MAX_LIMBS = 2                                   # int8 matrices that a matrix may be split into
EPSILON = 1e-5                                  # of every norm in model.py
NORM_SCALE = 4096.0                             # fixed point of queries and keys that QK-norm normalises
SCORES_AT_ONCE = 1 << 20                        # attention scores held at a time (4 MB: they stay in the cache)


# --- sites ---

class Statistics:
    """What the sites of a model meet while `on`: seen {site: [largest magnitude, mean square, count]}, and clamps."""

    def __init__(self):
        self.on = False
        self.clear()

    def clear(self):
        self.seen = {}
        self.n_clamped = 0
        self.n_rounded = 0

    def add(self, rounding, y):
        """Count y, in steps of the scale of a Rounding."""
        name = rounding.name
        before, mean_square, n = self.seen.get(name, (0.0, 0.0, 0))
        total = n + y.numel()
        real = y.double() / rounding.scale
        largest = float(real.abs().max())
        squares = float(real.square().sum())
        mean_square = (mean_square * n + squares) / total
        self.seen[name] = [max(before, largest), mean_square, total]
        clamped = y.abs() > rounding.limit + 0.5
        n_clamped = clamped.sum()
        self.n_clamped += int(n_clamped)
        self.n_rounded += y.numel()


class Rounding:
    """A site: activations, in steps of 1/scale, become integers of magnitude at most limit."""

    def __init__(self, name, scale, limit, statistics):
        self.name = name
        self.scale = scale
        self.limit = limit
        self.statistics = statistics

    def fit(self, y):
        """Round to integers and clamp, in place."""
        self.look(y)
        return y.round_().clamp_(-self.limit, self.limit)

    def look(self, y):
        """Count y where a model is observed."""
        if self.statistics.on:
            self.statistics.add(self, y)


class Parts:
    """What a block, or what stands around the blocks, is made of: weights, scales and flags by their short names."""

    def __init__(self, args, tensors, settings, arithmetic, statistics, prefix='', site_prefix=''):
        self.args = args
        self.tensors = tensors                  # {name: (integers, scales)}
        self.scale = settings.scale
        self.wide = settings.wide
        self.arithmetic = arithmetic
        self.statistics = statistics
        self.prefix = prefix                    # of the names of weights: 'blocks.0.'
        self.site_prefix = site_prefix          # of the names of sites: '0.'

    def matrix(self, name):
        """Return (integers, scales) of a matrix."""
        return self.tensors[f'{self.prefix}{name}']

    def scaled(self, name, scale, dtype=torch.float64):
        """Return the values of a tensor times a scale, on the device; None if the model has no such tensor."""
        name = f'{self.prefix}{name}'
        if name not in self.tensors:
            return None
        q, step = self.tensors[name]
        return self.arithmetic.put(q * step * scale, dtype)

    def rounding(self, site, limit):
        return Rounding(f'{self.site_prefix}{site}', self.scale[site], limit, self.statistics)


# --- products ---

def limbs_of(q):
    """Split integers (out, in) into int8 matrices (in, out), digits in base 128, least first; [] if too many."""
    limbs = []
    rest = q.T.astype(np.int64)
    while rest.any() or not limbs:
        if len(limbs) == MAX_LIMBS:
            return []
        low = (rest + 64) % 128 - 64
        limbs.append(torch.tensor(low, dtype=torch.int8))
        rest = (rest - low) // 128
    return limbs


def per_row(scale, rows):
    """Return the scales of a matrix's rows (rows,), float64."""
    scale = np.asarray(scale, np.float64).reshape(-1)
    return np.broadcast_to(scale, (rows,))


class Product:
    """Integers times a matrix of integers: y = (a @ weight)·factor + shift, in `out` units per real unit.

    name: the product's, whose weights are `weight` or NAME.weight; site: where its input becomes integers.
    out: a number, or an array (rows,).
    """

    def __init__(self, parts, name, site, out, weight=''):
        arithmetic = parts.arithmetic
        q, scale = parts.matrix(weight or f'{name}.weight')
        wide = parts.wide[name]
        dtype, run = arithmetic.types(wide)
        self.dtype = dtype                      # of the results, the same on every machine
        self.run = run                          # in which they are computed here
        self.input = parts.rounding(site, product_limit(q, wide))
        self.weight = arithmetic.put(q.T, run)                                  # (in, out)

        # Units of the input go out of a row's scale, units of the output into it.
        factor = per_row(scale, len(q)) / self.input.scale * out
        self.factor = arithmetic.put(factor, dtype)
        self.shift = parts.scaled(f'{name}.bias', out, dtype)

        self.limbs = []
        if arithmetic.int8_exact and not wide and q.size >= INT8_FROM:
            self.limbs = limbs_of(q)

    def __call__(self, a):
        """Return the outputs of integers a (..., in)."""
        y = self.multiply(a).mul_(self.factor)
        if self.shift is not None:
            y.add_(self.shift)
        return y

    def add_to(self, x, a):
        """Return residual states x with the outputs of integers a added."""
        return x + self(a).double()

    def multiply(self, a):
        """Integers a (..., in) times the matrix: by int8 products of base-128 limbs where faster, else in floats."""
        if self.limbs:
            return self.multiply_limbs(a)
        y = torch.matmul(a.to(self.run), self.weight)
        return y.to(self.dtype)

    def multiply_limbs(self, a):
        columns, rows_out = self.weight.shape
        out = torch.empty(*a.shape[:-1], rows_out)
        inputs = a.reshape(-1, columns).split(INT8_ROWS)
        outputs = out.view(-1, rows_out).split(INT8_ROWS)
        for x, target in zip(inputs, outputs):
            high = ((x + 64) * (1 / 128)).floor_()
            low = (x - high * 128).to(torch.int8)
            high = high.to(torch.int8)
            total = None
            for limb in reversed(self.limbs):   # int32 sums, all below 2^24 in the end
                y = torch._int_mm(high, limb).mul_(128)
                y.add_(torch._int_mm(low, limb))
                if total is not None:
                    y.add_(total.mul_(128))
                total = y
            target.copy_(total)
        return out


class MixingProduct:
    """As Product, for the triangles of a mixer: G matrices (W, W) over the positions."""

    def __init__(self, parts, name, site, out):
        arithmetic = parts.arithmetic
        folded, scale = parts.matrix(f'{name}.weight')
        W = parts.args['block_size']
        q = triangles(folded, W)
        G = len(q)
        wide = parts.wide[name]
        dtype, run = arithmetic.types(wide)
        limit = product_limit(q.reshape(-1, W), wide)
        self.dtype = dtype
        self.run = run
        self.input = parts.rounding(site, limit)
        self.weight = arithmetic.put(q, run)                                    # (G, W, W)

        # A folded row holds two rows of its matrix, one from either end, and both have its scale.
        of_folded = per_row(scale, len(folded)).reshape(G, -1)
        scale = np.concatenate((of_folded, of_folded[:, ::-1]), 1)
        factor = scale / self.input.scale * out
        self.factor = arithmetic.put(factor, dtype).unsqueeze(-1)               # (G, W, 1)
        self.shift = parts.scaled(f'{name}.bias', out, dtype)
        if self.shift is not None:
            self.shift = self.shift.view(G, W, 1)

    def mix(self, v, first, stop):
        """Positions first to stop of the mixtures (G, n, B·D) of integers v (H, stop, B·D), G/H of each head."""
        H = len(v)
        G = len(self.weight)
        rows = self.weight[:, first:stop, :stop].reshape(H, -1, stop)           # of all matrices of a head
        y = torch.bmm(rows, v).to(self.dtype)
        y = y.view(G, stop - first, -1).mul_(self.factor[:, first:stop])
        if self.shift is not None:
            y.add_(self.shift[:, first:stop])
        return y


def raise_outputs(product, offset):
    """Add a number to every output of a Product or MixingProduct from now on."""
    if product.shift is None:
        product.shift = torch.zeros_like(product.factor)
    product.shift = product.shift + offset


class Activation:
    """An activation by table, from what one product gives to the integers that another takes.

    The table's middle is input 0: the first product's outputs, in units of site `site`, are raised by half a table.
    """

    def __init__(self, parts, kind, site, before, after):
        raise_outputs(before, ACTIVATION_ENTRIES / 2 + 0.5)
        self.input = parts.rounding(site, ACTIVATION_ENTRIES / 2)
        self.output = after.input
        octave = int(math.log2(self.input.scale))
        table = activation_table(kind, octave)
        unit = self.output.scale / (1 << ACTIVATION_FRACTION)
        steps = np.rint(table.astype(np.float64) * unit)
        limit = self.output.limit
        self.table = parts.arithmetic.put(steps.clip(-limit, limit), after.dtype)

    def __call__(self, z):
        """Return integers for sums z, which are overwritten."""
        if self.input.statistics.on:
            self.input.look(z - ACTIVATION_ENTRIES / 2)
        a = look_up(self.table, z.clamp_(0, ACTIVATION_ENTRIES - 1))
        self.output.look(a)
        return a


# --- norms ---

class Norm:
    """LayerNorm or RMSNorm of residual states x (B, T, C), by the variance of their deviations as integers.

    With `output`, the Rounding of what the norm gives, gain and bias are applied here, in its units; without it they
    are folded into the product after.
    """

    def __init__(self, parts, site, name='', output=None):
        self.C = parts.args['n_embd']
        self.centred = parts.args['norm'] == 'layernorm'
        largest = (1 << norm_bits(self.C)) - 1
        self.input = parts.rounding(site, float(largest))
        if output is not None:
            self.gain = parts.scaled(f'{name}.weight', output.scale)
            self.shift = parts.scaled(f'{name}.bias', output.scale)

    def deviations(self, x):
        """Return deviations (integers) and their factor to unit variance."""
        scale = self.input.scale
        d = self.input.fit(x * scale)
        if self.centred:
            mean = d.sum(-1, keepdim=True) * (1.0 / self.C)
            d -= mean.round_()
        squares = (d * d).sum(-1, keepdim=True)
        variance = squares * (1.0 / (self.C * scale * scale))
        deviation = (variance + EPSILON).sqrt_()
        return d, divide(1.0 / scale, deviation)

    def multiply(self, x, product):
        """Return a Product of the normalised states."""
        site = product.input
        d, factor = self.deviations(x)
        a = site.fit(d * (factor * site.scale))
        return product(a)

    def apply(self, x):
        """Return the normalised states with gain and bias, in units of the output."""
        d, factor = self.deviations(x)
        y = d * factor * self.gain
        if self.shift is not None:
            y = y + self.shift
        return y


# --- layers ---

class Attention:
    """Causal attention on integers; scores by a table of exp, weights that sum to about `total`."""

    def __init__(self, parts, rotation):
        args = parts.args
        wide = parts.wide['attention']
        W = args['block_size']
        C = args['n_embd']
        self.name = parts.site_prefix
        self.H = args['n_head']
        self.D = C // self.H
        self.rotation = rotation                # cos and sin (W, D/2) of rotary positions, or None
        self.qk_norm = args['qk_norm']

        # The clamps keep every sum of the two products inside exact.
        limits = attention_limits(wide, self.D, W)
        self.q = parts.rounding('q', limits.query_key)
        self.k = parts.rounding('k', limits.query_key)
        self.v = parts.rounding('v', limits.value)
        self.total = limits.total
        self.dtype, self.run = parts.arithmetic.types(wide)

        # Queries and keys leave their product in units of their sites, or of the norm between.
        units = [self.q.scale, self.k.scale, self.v.scale]
        if self.qk_norm:
            units[:2] = [NORM_SCALE, NORM_SCALE]
        self.norm = Norm(parts, 'x1')
        units = np.repeat(units, C)
        self.qkv = Product(parts, 'attention.qkv', 'a1', units)
        self.gain_q = parts.scaled('attention.q_norm.weight', self.q.scale)
        self.gain_k = parts.scaled('attention.k_norm.weight', self.k.scale)

        # Scores below the largest become steps of the table of exp, whose sum over W positions is below 2^24.
        step = EXP_STEPS / (self.q.scale * self.k.scale * math.sqrt(self.D))
        self.step = float(np.float32(step))
        room = 23 - math.ceil(math.log2(W))
        top_bits = 24 if wide else min(16, room)
        table = exp_table(1 << top_bits, 0)
        self.exp = parts.arithmetic.put(table, self.dtype)

        # Sums of weights times values, over their total, become integers again.
        self.proj = Product(parts, 'attention.proj', 'o', 1.0)
        out_step = self.proj.input.scale / (self.v.scale * self.total)
        self.out_step = float(np.float32(out_step))

    def __call__(self, x, cache, start, n):
        """x (B, T, C) of positions from start on -> the last n of them with their attention added."""
        B, T, _ = x.shape
        z = self.norm.multiply(x, self.qkv)
        z = z.view(B, T, 3, self.H, self.D)
        q, k, v = z.permute(2, 0, 3, 1, 4)                                      # (B, H, T, D) each
        q = q[:, :, -n:]
        q = self.query_key(q, self.gain_q, self.q, start + T - n)
        k = self.query_key(k, self.gain_k, self.k, start)
        k = k.transpose(2, 3)                                                   # positions are last: faster
        v = self.v.fit(v.to(self.dtype, copy=True))
        v = v.to(self.run)
        if cache:
            k = cache.extend((self.name, 'k'), k, 3, start)
            v = cache.extend((self.name, 'v'), v, 2, start)
        x = x[:, -n:]
        y = self.attend(q, k, v)
        y = y.transpose(1, 2).reshape(x.shape)
        a = self.proj.input.fit(y.mul_(self.out_step))
        return self.proj.add_to(x, a)

    def query_key(self, z, gain, rounding, start):
        """QK-norm, rotary positions, rounding; z (B, H, T, D) in units of its site, or of the norm."""
        if self.qk_norm:
            z = z.double().round_().clamp_(-WIDE_LIMIT, WIDE_LIMIT)
            squares = (z * z).sum(-1, keepdim=True)
            mean = squares * (1.0 / (self.D * NORM_SCALE * NORM_SCALE))
            deviation = (mean + EPSILON).sqrt_()
            factor = divide(1.0 / NORM_SCALE, deviation)
            z = z * factor * gain
        if self.rotation is not None:
            stop = start + z.size(2)
            cos, sin = self.rotation
            cos = cos[start:stop]
            sin = sin[start:stop]
            first, second = z.double().chunk(2, -1)
            turned_first = first * cos - second * sin
            turned_second = first * sin + second * cos
            z = torch.cat((turned_first, turned_second), -1)
        a = rounding.fit(z.to(self.dtype, copy=True))
        return a.to(self.run)

    def attend(self, q, k, v):
        """Causal attention on integers: q (B, H, n, D) are the last n positions of k (B, H, D, T), v (B, H, T, D)."""
        B, H, n, _ = q.shape
        T = k.size(3)
        out = torch.empty_like(q)
        step = SCORES_AT_ONCE // (B * H * T)                                    # queries at a time
        step = max(1, min(n, step))
        for i in range(0, n, step):
            j = min(i + step, n)
            t = T - n + j                                                       # positions that query j - 1 sees
            scores = torch.matmul(q[:, :, i:j], k[..., :t])                     # (B, H, j - i, t)
            scores = scores.to(self.dtype)
            if j - i > 1:
                later = scores.new_ones(j - i, j - i, dtype=torch.bool).triu_(1)
                scores[..., i - j:].masked_fill_(later, -math.inf)

            # Weights in steps of the table of exp, brought to their total.
            scores.sub_(scores.amax(-1, keepdim=True))
            scores.mul_(-self.step).clamp_max_(len(self.exp) - 1)
            p = look_up(self.exp, scores)
            total = p.sum(-1, keepdim=True)
            p.mul_(divide(self.total, total)).round_()
            out[:, :, i:j] = torch.matmul(p.to(self.run), v[:, :, :t])
        return out.to(self.dtype)


class Mixer:
    """Matrices over the positions, one or e a head, in attention's place; with e, GELU and a second set of them."""

    def __init__(self, parts):
        args = parts.args
        scale = parts.scale
        self.name = parts.site_prefix
        self.flat = args['block_type'] == 'mixer'
        self.expansion = args.get('expansion', 0)
        self.H = 1 if self.flat else args['n_head']
        self.D = args['n_embd'] // self.H

        # A flat mixer adds to the residual states, in real units; several heads enter a projection.
        out = 1.0 if self.flat else scale['o']
        mixed = scale['vu'] if self.expansion else out
        self.mixing = MixingProduct(parts, 'mixer.mix', 'v', mixed)
        if self.expansion:
            self.mixing_down = MixingProduct(parts, 'mixer.mix_down', 'vd', out)
            self.activation = Activation(parts, 'gelu', 'vu', self.mixing, self.mixing_down)

        # A gain per channel cannot be folded into a matrix over positions.
        if self.flat:
            self.norm = Norm(parts, 'x1', 'norm1', self.mixing.input)
        else:
            self.norm = Norm(parts, 'x1')
            self.heads = Product(parts, 'mixer.heads', 'a1', scale['v'])
            self.proj = Product(parts, 'mixer.proj', 'o', 1.0)

    def __call__(self, x, cache, start, n):
        """x (B, T, C) of positions from start on -> the last n of them with their mixtures added."""
        B, T, C = x.shape
        H = self.H
        D = self.D
        stop = start + T
        mixing = self.mixing
        if self.flat:
            v = self.norm.apply(x)
        else:
            v = self.norm.multiply(x, self.heads)
        v = v.view(B, T, H, D).permute(2, 1, 0, 3)
        v = v.reshape(H, T, B * D)
        v = mixing.input.fit(v.to(mixing.dtype, copy=True))
        v = v.to(mixing.run)
        if cache:
            v = cache.extend((self.name, 'v'), v, 1, start)
        if self.expansion:
            y = self.expanded(v, cache, start, n)
        else:
            y = mixing.mix(v, stop - n, stop)
        x = x[:, -n:]
        y = y.view(H, n, B, D).permute(2, 1, 0, 3)
        y = y.reshape(B, n, C)
        if self.flat:
            return x + y.double()
        a = self.proj.input.fit(y)
        return self.proj.add_to(x, a)

    def expanded(self, v, cache, start, n):
        """The last n positions of mix, GELU, mix, sum of integers v (H, stop, B·D)."""
        stop = v.size(1)
        z = self.mixing.mix(v, start, stop)                                     # (H·e, T, B·D)
        g = self.activation(z).to(self.mixing_down.run)
        if cache:
            g = cache.extend((self.name, 'g'), g, 1, start)
        y = self.mixing_down.mix(g, stop - n, stop)                             # (H·e, n, B·D)
        y = y.view(self.H, self.expansion, n, -1)
        return functools.reduce(torch.add, y.unbind(1))                         # a sum's order would be torch's own


class FeedForward:
    """The two products after the second norm."""

    def __init__(self, parts):
        self.norm = Norm(parts, 'x2')
        self.up = Product(parts, 'feed_forward.up', 'a2', parts.scale['u'])
        self.down = Product(parts, 'feed_forward.down', 'd', 1.0)
        self.activation = Activation(parts, parts.args['activation'], 'u', self.up, self.down)

    def __call__(self, x):
        """x (B, n, C) -> the same with the outputs added."""
        z = self.norm.multiply(x, self.up)
        a = self.activation(z)
        return self.down.add_to(x, a)


class Block:
    """Attention or a mixer, then the feed-forward network, on residual states (B, T, C) float64."""

    def __init__(self, parts, rotation):
        if parts.args.get('block_type', 'attention') == 'attention':
            self.mixer = Attention(parts, rotation)
        else:
            self.mixer = Mixer(parts)
        self.feed_forward = FeedForward(parts)

    def __call__(self, x, cache, start, n):
        return self.feed_forward(self.mixer(x, cache, start, n))
