"""The layers of model.GPT on integers: products, norms, tables of activations, attention and mixers.

A layer takes and returns what exact.py says: sums of integers under proven bounds, and between them single IEEE
operations, so that any order, batch, thread count or kernel gives the same numbers. Residual states are float64.

Shapes: B rows, T positions, C channels, H heads, D head width, W positions of a cache, G = H·e mixing matrices.
"""
import functools
import math

import numpy as np
import torch

from codec.sites import WIDE_LIMIT, attention_limits, norm_bits, product_limit, triangles
from codec.tables import ACTIVATION_ENTRIES, EXP_STEPS, activation_table, exp_table
from configurator import UserError

INT8_FROM = 1 << 16                             # entries of a matrix from which int8 products are faster
INT8_ROWS = 256                                 # rows that they take at a time: these stay in the cache
MAX_LIMBS = 2                                   # int8 matrices that a matrix may be split into
EPSILON = 1e-5                                  # of every norm in model.py
NORM_SCALE = 4096.0                             # fixed point of queries and keys that QK-norm normalises
SCORES_AT_ONCE = 1 << 20                        # attention scores held at a time (4 MB: they stay in the cache)


# --- the device ---

def _extreme_factors(rng, bits, shape):
    """Return integer factors (max(b, 1), m, k) and (max(b, 1), k, n), one of whose sums reaches 2^bits."""
    b, m, k, n = shape
    low = 1 << bits // 2 - 3
    high = ((1 << bits) - 1) // (low * k)
    x = rng.choice([-low, low, low - 1, 1, 0, low // 2 + 1], (max(b, 1), m, k))
    y = rng.choice([-high, high, high - 1, 1, 0, high // 2 + 1], (max(b, 1), k, n))
    x[:, 0] = low
    y[:, :, 0] = high
    return x, y


def _floats_are_exact(rng, dtype, bits, device):
    """Whether products in dtype of several shapes are those of int64."""
    exact = True
    for shape in ((0, 1, 64, 192), (0, 67, 256, 130), (0, 5, 1024, 33), (6, 1, 16, 200), (6, 33, 200, 16)):
        x, y = _extreme_factors(rng, bits, shape)
        product = torch.matmul(torch.tensor(x, dtype=dtype, device=device), torch.tensor(y, dtype=dtype, device=device))
        expected = x.astype(np.int64) @ y.astype(np.int64)
        if not np.array_equal(product.cpu().numpy().astype(np.int64), expected):
            exact = False
    return exact


def _int8_is_exact(rng):
    """Whether int8 products sum exactly: a second factor outside [-64, 63] saturates on some CPUs."""
    x = rng.choice([-64, 63, 62, -1], (33, 512))
    y = rng.choice([-64, 63, 62, -1], (512, 96))
    x[0] = -64
    y[:, 0] = -64
    x[1] = 63
    y[:, 1] = 63
    product = torch._int_mm(torch.tensor(x, dtype=torch.int8), torch.tensor(y, dtype=torch.int8))
    return np.array_equal(product.numpy(), x @ y)


@functools.lru_cache(None)
def known_answer(device):
    """Test products with extreme values against int64; returns the dtypes that are exact here, float64 first."""
    torch.set_float32_matmul_precision('highest')
    torch.backends.cuda.matmul.allow_tf32 = False
    rng = np.random.default_rng(7)
    good = [dtype for dtype, bits in ((torch.float64, 53), (torch.float32, 24))
            if _floats_are_exact(rng, dtype, bits, device)]
    if torch.device(device).type == 'cpu' and _int8_is_exact(rng):
        good.append(torch.int8)
    if torch.float64 not in good:
        raise UserError(f'{device} does not sum integers exactly in float64; use --device=cpu')
    return tuple(good)


class Arithmetic:
    """Where a model runs and in which types. float64_only: every product in float64, which must change nothing."""

    def __init__(self, device, float64_only):
        exact = known_answer(device)
        self.device = device
        self.float32_exact = torch.float32 in exact and not float64_only
        self.int8_exact = self.float32_exact and torch.int8 in exact

    def put(self, array, dtype=torch.float64):
        """Return a numpy array as a tensor on the device."""
        return torch.from_numpy(np.ascontiguousarray(array, np.float64)).to(dtype).to(self.device)

    def types(self, wide):
        """Return (type of what follows a product, the same on every machine; type that the product runs in here)."""
        dtype = torch.float64 if wide else torch.float32
        return dtype, dtype if self.float32_exact else torch.float64


def divide(number, x):
    """number / x as a division of tensors: with a scalar on one side torch may multiply by a reciprocal."""
    return torch.full_like(x, number).div_(x)


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
        largest, mean_square, n = self.seen.get(rounding.name, (0.0, 0.0, 0))
        real = y.double() / rounding.scale
        m = y.numel()
        mean_square = (mean_square * n + float(real.square().sum())) / (n + m)
        self.seen[rounding.name] = [max(largest, float(real.abs().max())), mean_square, n + m]
        self.n_clamped += int((y.abs() > rounding.limit + 0.5).sum())
        self.n_rounded += m


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

    def values(self, name):
        """Return what integers and scales stand for, float64; None if the model has no such tensor."""
        name = f'{self.prefix}{name}'
        if name not in self.tensors:
            return None
        q, scale = self.tensors[name]
        return q * scale

    def scaled(self, name, scale):
        """Return values times a scale, on the device; None if the model has no such tensor."""
        values = self.values(name)
        return None if values is None else self.arithmetic.put(values * scale)

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


class Product:
    """Integers times a matrix of integers: y = (a @ weight)·factor + shift, in `out` units per real unit.

    name: the product's, whose weights are `weight` or NAME.weight; site: where its input becomes integers.
    out: a number, or an array (rows,).
    """

    def __init__(self, parts, name, site, out, weight=''):
        q, scale = parts.tensors[f'{parts.prefix}{weight or name + ".weight"}']
        bias = parts.values(f'{name}.bias')
        wide = parts.wide[name]
        put = parts.arithmetic.put
        self.dtype, self.run = parts.arithmetic.types(wide)
        self.input = parts.rounding(site, product_limit(q, wide))

        # Units of the input go out of a row's scale, units of the output into it.
        scale = np.broadcast_to(np.asarray(scale, np.float64).reshape(-1), (len(q),))
        self.weight = put(q.T, self.run)                                        # (in, out)
        self.factor = put(scale / self.input.scale * out, self.dtype)
        self.shift = None if bias is None else put(bias * out, self.dtype)

        self.limbs = []
        if parts.arithmetic.int8_exact and not wide and q.size >= INT8_FROM:
            self.limbs = limbs_of(q)

    def __call__(self, a):
        """Return the outputs of integers a (..., in)."""
        y = self.multiply(a).mul_(self.factor)
        return y if self.shift is None else y.add_(self.shift)

    def add_to(self, x, a):
        """Return residual states x with the outputs of integers a added."""
        return x + self(a).double()

    def multiply(self, a):
        """Integers a (..., in) times the matrix: by int8 products of base-128 limbs where faster, else in floats."""
        if self.limbs:
            return self.multiply_limbs(a)
        return torch.matmul(a.to(self.run), self.weight).to(self.dtype)

    def multiply_limbs(self, a):
        out = torch.empty(*a.shape[:-1], self.weight.size(1))
        parts = a.reshape(-1, a.size(-1)).split(INT8_ROWS)
        for part, target in zip(parts, out.view(-1, out.size(-1)).split(INT8_ROWS)):
            high = ((part + 64) * (1 / 128)).floor_()
            low = (part - high * 128).to(torch.int8)
            high = high.to(torch.int8)
            total = None
            for limb in reversed(self.limbs):   # int32 sums, all below 2^24 in the end
                y = torch._int_mm(high, limb).mul_(128).add_(torch._int_mm(low, limb))
                total = y if total is None else total.mul_(128).add_(y)
            target.copy_(total)
        return out

    def raise_by(self, offset):
        """Add a number to every output from now on."""
        if self.shift is None:
            self.shift = torch.tensor(offset, dtype=self.dtype, device=self.weight.device)
        else:
            self.shift = self.shift + offset


class MixingProduct:
    """As Product, for the triangles of a mixer: G matrices (W, W) over the positions."""

    def __init__(self, parts, name, site, out):
        folded, scale = parts.tensors[f'{parts.prefix}{name}.weight']
        bias = parts.values(f'{name}.bias')
        wide = parts.wide[name]
        put = parts.arithmetic.put
        self.W = parts.args['block_size']
        q = triangles(folded, self.W)                                           # (G, W, W)
        self.dtype, self.run = parts.arithmetic.types(wide)
        self.input = parts.rounding(site, product_limit(q.reshape(-1, self.W), wide))

        # A folded row holds two rows of its matrix, one from either end, and both have its scale.
        scale = np.broadcast_to(np.asarray(scale, np.float64).reshape(-1), (len(q) * self.W // 2,))
        scale = scale.reshape(len(q), -1)
        scale = np.concatenate((scale, scale[:, ::-1]), 1)[:, :, None]
        self.weight = put(q, self.run)
        self.factor = put(scale / self.input.scale * out, self.dtype)           # (G, W, 1)
        self.shift = None if bias is None else put((bias * out).reshape(len(q), -1, 1), self.dtype)

    def mix(self, v, first, stop):
        """Positions first to stop of the mixtures (G, n, B·D) of integers v (H, stop, B·D), G/H of each head."""
        weight = self.weight.view(len(v), -1, self.W, self.W)[:, :, first:stop, :stop].flatten(1, 2)
        y = torch.bmm(weight, v).to(self.dtype).view(len(self.weight), stop - first, -1)
        y.mul_(self.factor[:, first:stop])
        return y if self.shift is None else y.add_(self.shift[:, first:stop])

    def raise_by(self, offset):
        """Add a number to every output from now on."""
        if self.shift is None:
            self.shift = torch.full_like(self.factor, offset)
        else:
            self.shift = self.shift + offset


class Activation:
    """An activation by table, from what one product gives to the integers that another takes.

    The table's middle is input 0: the first product's outputs, in units of site `site`, are raised by half a table.
    """

    def __init__(self, parts, kind, site, before, after):
        before.raise_by(ACTIVATION_ENTRIES / 2 + 0.5)
        self.input = parts.rounding(site, ACTIVATION_ENTRIES / 2)
        self.output = after.input
        steps = int(math.log2(self.input.scale))
        table = activation_table(kind, steps).astype(np.float64) * (self.output.scale / 2 ** 32)
        limit = self.output.limit
        self.table = parts.arithmetic.put(np.rint(table).clip(-limit, limit), after.dtype)

    def __call__(self, z):
        """Return integers for sums z, which are overwritten."""
        if self.input.statistics.on:
            self.input.look(z - ACTIVATION_ENTRIES / 2)
        index = z.clamp_(0, ACTIVATION_ENTRIES - 1).to(torch.int32)
        a = self.table.index_select(0, index.view(-1)).view(z.shape)
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
        self.input = parts.rounding(site, float((1 << norm_bits(self.C)) - 1))
        if output is not None:
            self.gain = parts.scaled(f'{name}.weight', output.scale)
            self.shift = parts.scaled(f'{name}.bias', output.scale)

    def deviations(self, x):
        """Return deviations (integers) and their factor to unit variance."""
        scale = self.input.scale
        d = self.input.fit(x * scale)
        if self.centred:
            d -= (d.sum(-1, keepdim=True) * (1.0 / self.C)).round_()
        variance = (d * d).sum(-1, keepdim=True) * (1.0 / (self.C * scale * scale))
        return d, divide(1.0 / scale, (variance + EPSILON).sqrt_())

    def multiply(self, x, product):
        """Return a Product of the normalised states."""
        d, factor = self.deviations(x)
        return product(product.input.fit(d * (factor * product.input.scale)))

    def apply(self, x):
        """Return the normalised states with gain and bias, in units of the output."""
        d, factor = self.deviations(x)
        y = d * factor * self.gain
        return y if self.shift is None else y + self.shift


# --- layers ---

class Attention:
    """Causal attention on integers; scores by a table of exp, weights that sum to about `total`."""

    def __init__(self, parts, rotation):
        args = parts.args
        scale = parts.scale
        wide = parts.wide['attention']
        self.name = parts.site_prefix
        self.H = args['n_head']
        self.C = args['n_embd']
        self.D = self.C // self.H
        self.rotation = rotation                # cos and sin (W, D/2) of rotary positions, or None
        self.qk_norm = args['qk_norm']

        # Queries and keys leave their product in units of their sites, or of the norm between.
        query_key = [NORM_SCALE, NORM_SCALE] if self.qk_norm else [scale['q'], scale['k']]
        self.norm = Norm(parts, 'x1')
        self.qkv = Product(parts, 'attention.qkv', 'a1', np.repeat(query_key + [scale['v']], self.C))
        self.gain_q = parts.scaled('attention.q_norm.weight', scale['q'])
        self.gain_k = parts.scaled('attention.k_norm.weight', scale['k'])

        # The clamps keep every sum of the two products inside exact.
        self.dtype, self.run = parts.arithmetic.types(wide)
        limits = attention_limits(wide, self.D, args['block_size'])
        self.q = parts.rounding('q', limits.query_key)
        self.k = parts.rounding('k', limits.query_key)
        self.v = parts.rounding('v', limits.value)
        self.total = limits.total

        # Scores below the largest become steps of the table of exp, whose sum over W positions is below 2^24.
        self.step = float(np.float32(EXP_STEPS / (scale['q'] * scale['k'] * math.sqrt(self.D))))
        top_bits = 24 if wide else min(16, 23 - math.ceil(math.log2(args['block_size'])))
        self.exp = parts.arithmetic.put(exp_table(1 << top_bits, 0), self.dtype)
        self.proj = Product(parts, 'attention.proj', 'o', 1.0)
        self.out_step = float(np.float32(scale['o'] / (scale['v'] * self.total)))

    def __call__(self, x, cache, start, n):
        """x (B, T, C) of positions from start on -> the last n of them with their attention added."""
        stop = start + x.size(1)
        z = self.norm.multiply(x, self.qkv)
        q, k, v = z.view(*x.shape[:2], 3, self.H, self.D).permute(2, 0, 3, 1, 4)                # (B, H, T, D) each
        q = self.query_key(q[:, :, -n:], self.gain_q, self.q, stop - n)
        k = self.query_key(k, self.gain_k, self.k, start).transpose(2, 3)       # positions are last: faster
        v = self.v.fit(v.to(self.dtype, copy=True)).to(self.run)
        if cache:
            k = cache.extend((self.name, 'k'), k, 3, start)
            v = cache.extend((self.name, 'v'), v, 2, start)
        x = x[:, -n:]
        y = self.attend(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.proj.add_to(x, self.proj.input.fit(y.mul_(self.out_step)))

    def query_key(self, z, gain, rounding, start):
        """QK-norm, rotary positions, rounding; z (B, H, T, D) in units of its site, or of the norm."""
        if self.qk_norm:
            z = z.double().round_().clamp_(-WIDE_LIMIT, WIDE_LIMIT)
            mean = (z * z).sum(-1, keepdim=True) * (1.0 / (self.D * NORM_SCALE * NORM_SCALE))
            z = z * divide(1.0 / NORM_SCALE, (mean + EPSILON).sqrt_()) * gain
        if self.rotation is not None:
            stop = start + z.size(2)
            cos = self.rotation[0][start:stop]
            sin = self.rotation[1][start:stop]
            first, second = z.double().chunk(2, -1)
            z = torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
        return rounding.fit(z.to(self.dtype, copy=True)).to(self.run)

    def attend(self, q, k, v):
        """Causal attention on integers: q (B, H, n, D) are the last n positions of k (B, H, D, T), v (B, H, T, D)."""
        B, H, n, _ = q.shape
        T = k.size(3)
        out = torch.empty_like(q)
        step = max(1, min(n, SCORES_AT_ONCE // (B * H * T)))
        for i in range(0, n, step):
            j = min(i + step, n)
            t = T - n + j                                                       # positions that query j - 1 sees
            scores = torch.matmul(q[:, :, i:j], k[:, :, :, :t]).to(self.dtype)  # (B, H, j - i, t)
            if j - i > 1:
                later = torch.ones(j - i, j - i, dtype=torch.bool, device=scores.device).triu_(1)
                scores[..., t - (j - i):].masked_fill_(later, -math.inf)
            scores.sub_(scores.amax(-1, keepdim=True)).mul_(-self.step).clamp_max_(len(self.exp) - 1)
            p = self.exp.index_select(0, scores.to(torch.int32).view(-1)).view(scores.shape)
            p.mul_(divide(self.total, p.sum(-1, keepdim=True))).round_()
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
        self.mixing = MixingProduct(parts, 'mixer.mix', 'v', scale['vu'] if self.expansion else out)
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
        stop = start + x.size(1)
        v = self.norm.apply(x) if self.flat else self.norm.multiply(x, self.heads)
        v = v.view(*x.shape[:2], self.H, self.D).permute(2, 1, 0, 3).reshape(self.H, x.size(1), -1)     # (H, T, B·D)
        v = self.mixing.input.fit(v.to(self.mixing.dtype, copy=True)).to(self.mixing.run)
        if cache:
            v = cache.extend((self.name, 'v'), v, 1, start)
        if self.expansion:
            y = self.expanded(v, cache, start, stop, n)
        else:
            y = self.mixing.mix(v, stop - n, stop)
        x = x[:, -n:]
        y = y.view(self.H, n, -1, self.D).permute(2, 1, 0, 3).reshape(len(x), n, -1)
        if self.flat:
            return x + y.double()
        return self.proj.add_to(x, self.proj.input.fit(y))

    def expanded(self, v, cache, start, stop, n):
        """The last n positions of mix, GELU, mix, sum of integers v (H, stop, B·D)."""
        z = self.mixing.mix(v, start, stop)                                     # (H·e, T, B·D)
        g = self.activation(z).to(self.mixing_down.run)
        if cache:
            g = cache.extend((self.name, 'g'), g, 1, start)
        parts = self.mixing_down.mix(g, stop - n, stop).view(self.H, self.expansion, n, -1).unbind(1)
        return functools.reduce(torch.add, parts)                               # a sum's order would be torch's own


class FeedForward:
    """The two products after the second norm."""

    def __init__(self, parts):
        self.norm = Norm(parts, 'x2')
        self.up = Product(parts, 'feed_forward.up', 'a2', parts.scale['u'])
        self.down = Product(parts, 'feed_forward.down', 'd', 1.0)
        self.activation = Activation(parts, parts.args['activation'], 'u', self.up, self.down)

    def __call__(self, x):
        """x (B, n, C) -> the same with the outputs added."""
        return self.down.add_to(x, self.activation(self.norm.multiply(x, self.up)))


class Block:
    """Attention or a mixer, then the feed-forward network, on residual states (B, T, C) float64."""

    def __init__(self, parts, rotation):
        attends = parts.args.get('block_type', 'attention') == 'attention'
        self.mixer = Attention(parts, rotation) if attends else Mixer(parts)
        self.feed_forward = FeedForward(parts)

    def __call__(self, x, cache, start, n):
        return self.feed_forward(self.mixer(x, cache, start, n))
