"""Integer-valued inference of model.GPT: the same frequencies from any device, batch, thread count or kernel.

In: a model's shape, its weights as integers with scales (weights.py), its sites: a fixed-point scale per activation.
Out: per position a row of V integer frequencies, the only thing an entropy coder sees. Imported by the codec's files.

Why it is exact. A sum of integers is the same in any order while every partial sum fits the mantissa: float32 where
sum |a||b| < 2^24, float64 where it is < 2^53, int32 where int8 products (torch._int_mm) are faster. Every product
and every norm sums integers under such a bound, proven from the weights as they are and a clamp on the activations; a
model that breaks one is refused. What lies between is element by element, one correctly rounded IEEE operation per
kernel (add, multiply, divide, sqrt, round half to even), hence the same everywhere. exp, activations, sines and cosines
are tables made with Python integers, never by libm.

Shapes: B rows, T positions, C channels, H heads, D head width, V vocabulary, W positions of a cache.
"""
import functools
import hashlib
import math

import numpy as np
import torch

from codec.tables import ACTIVATION_ENTRIES, EXP_STEPS, activation_table, exp_table, rotation_table
from configurator import UserError
from model import unfold

FREQUENCY_TOP = 1 << 24                         # frequency of the likeliest symbol; every symbol has at least 1
SITES = {'attention': ('x1', 'a1', 'q', 'k', 'v', 'o', 'x2', 'a2', 'u', 'd'),       # per block; then x, a of the head
         'mixer': ('x1', 'v', 'x2', 'a2', 'u', 'd'),                # v: what is mixed; expanded: then 'vu', 'vd'
         'multihead_mixer': ('x1', 'a1', 'v', 'o', 'x2', 'a2', 'u', 'd')}
WIDE_LIMIT = 1 << 20                            # clamp of activations whose matrix product runs in float64
LIMB_LIMIT = 63 * 128 + 63                      # clamp of the others: two limbs of [-64, 63] in base 128 hold it
INT8_FROM, INT8_ROWS = 1 << 16, 256             # entries of a matrix from which int8 is faster; rows at a time (cache)
EPSILON = 1e-5                                  # of every norm in model.py
NORM_SCALE = 4096.0                             # fixed point of queries and keys that QK-norm normalises
SCORES_AT_ONCE = 1 << 20                        # attention scores held at a time (4 MB: they stay in the cache)


def tables_hash(args):
    """Hash of the tables a model of this shape uses: in the archive's header, so that other arithmetic is refused."""
    h = hashlib.sha256(exp_table(FREQUENCY_TOP, 1).tobytes() + activation_table(args['activation'], 8).tobytes())
    h.update(np.stack(rotation_table(min(64, args['block_size']), args['n_embd'] // args['n_head'])).tobytes())
    h.update(activation_table('gelu', 8).tobytes() if args.get('expansion') else b'')
    return h.hexdigest()[:16]


# --- scales ---

def scale_of(code):
    """The scale (1 + (code mod 4)/4)·2^floor(code/4): four steps per octave, exact in any float format."""
    return (1 + code % 4 / 4) * 2.0 ** (code // 4)


def code_below(value):
    """The largest scale code whose scale is at most value."""
    code = 4 * math.floor(math.log2(value)) + 4
    while scale_of(code) > value:
        code -= 1
    return code


def norm_bits(width):
    """Bits of a norm's input: its squared deviations, one bit wider, sum over width below 2^53."""
    return (53 - math.ceil(math.log2(width))) // 2 - 1


def attention_limits(wide, head_width, block_size):
    """Return (clamp of q and k, clamp of v, total of the attention weights) under 2^24, or 2^53 if wide.

    Weights w_t = round(p_t·total/sum p) sum to at most total + W/2 + 2, so |sum w_t v_t| <= (total + W/2 + 2)·clamp.
    """
    if wide:
        return WIDE_LIMIT, WIDE_LIMIT, 1 << 24
    return math.isqrt(((1 << 24) - 1) // head_width), ((1 << 24) - 1) // ((1 << 14) + block_size // 2 + 2), 1 << 14


def product_limit(q, wide):
    """Clamp of activations a that keeps partial sums of q @ a exact, q integers (out, in); UserError if none does."""
    largest = max(1, int(np.abs(q.astype(np.int64)).sum(1).max()))
    if largest * WIDE_LIMIT >= 1 << 53:
        raise UserError(f'a row\'s weights sum to {largest}: times {WIDE_LIMIT} float64 is not exact; use fewer bits')
    return WIDE_LIMIT if wide else min(LIMB_LIMIT, max(1, ((1 << 24) - 1) // largest))


def sites_of(args):
    """Return (sites of a block, products of a block, sites of the head) for a model's args."""
    kind, expanded = args.get('block_type', 'attention'), bool(args.get('expansion'))
    sites, at = SITES[kind], SITES[kind].index('v') + 1
    sites = (*sites[:at], 'vu', 'vd', *sites[at:]) if expanded else sites
    return sites, (3 if kind == 'mixer' else 5) + expanded, 'xa' if args.get('final_norm', True) else 'a'


def triangles(q, n):
    """Unfold a mixer's folded triangles (model.Triangles), (G·n/2, n + 1) -> (G, n, n)."""
    return unfold(torch.from_numpy(q).reshape(-1, n // 2, n + 1)).numpy()


# --- the device ---

@functools.lru_cache(None)
def known_answer(device):
    """Test products with extreme values against int64; returns the dtypes that are exact here, float64 first."""
    torch.set_float32_matmul_precision('highest')
    torch.backends.cuda.matmul.allow_tf32 = False
    rng, good = np.random.default_rng(7), []
    for dtype, bits in ((torch.float64, 53), (torch.float32, 24)):
        exact = True
        for b, m, k, n in ((0, 1, 64, 192), (0, 67, 256, 130), (0, 5, 1024, 33), (6, 1, 16, 200), (6, 33, 200, 16)):
            low = 1 << bits // 2 - 3
            high = ((1 << bits) - 1) // (low * k)
            x = rng.choice([-low, low, low - 1, 1, 0, low // 2 + 1], (max(b, 1), m, k))
            y = rng.choice([-high, high, high - 1, 1, 0, high // 2 + 1], (max(b, 1), k, n))
            x[:, 0], y[:, :, 0] = low, high                                     # one sum that reaches the bound
            got = torch.matmul(torch.tensor(x, dtype=dtype, device=device), torch.tensor(y, dtype=dtype, device=device))
            exact &= bool(np.array_equal(got.cpu().numpy().astype(np.int64), x.astype(np.int64) @ y.astype(np.int64)))
        good += [dtype] if exact else []
    if torch.device(device).type == 'cpu':      # int8: a second factor outside [-64, 63] saturates on some CPUs
        a, limb = rng.choice([-64, 63, 62, -1], (33, 512)), rng.choice([-64, 63, 62, -1], (512, 96))
        a[0], limb[:, 0], a[1], limb[:, 1] = -64, -64, 63, 63
        got = torch._int_mm(torch.tensor(a, dtype=torch.int8), torch.tensor(limb, dtype=torch.int8))
        good += [torch.int8] if np.array_equal(got.numpy(), a @ limb) else []
    if torch.float64 not in good:
        raise UserError(f'{device} does not sum integers exactly in float64; use --device=cpu')
    return tuple(good)


def _over(number, x):
    """number / x as a division of tensors: with a scalar on one side torch may multiply by a reciprocal."""
    return torch.full_like(x, number).div_(x)


def check_covered(args):
    """Refuse a model that this file does not evaluate; args as in a checkpoint's model_args."""
    known = dict(positions=('sinusoidal', 'learned', 'rotary', 'none'), norm=('layernorm', 'rmsnorm'),
                 activation=('gelu', 'gelu_tanh', 'relu2'), block_type=tuple(SITES))
    plain = {'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'tied', 'bias', 'qk_norm', 'dropout',
             'final_norm', 'expansion'}
    strange = [f'{k} = {v!r}' for k, v in args.items() if (v not in known[k] if k in known else k not in plain)]
    if strange:
        raise UserError(f'the codec does not cover models with {", ".join(strange)}; exact.py says what it does')


class Exact:
    """A GPT on integers. tensors: {name: (integers, scale)} as fold() names them; sites, wide: see choose_sites.

    float64_only runs every product in float64 (the test's way to see that the path does not matter). `seen` and
    `clamped` are filled while observe is True.
    """

    def __init__(self, args, tensors, sites, wide, device='cpu', float64_only=False):
        known_answer(device)
        self.args, self.device, self.observe, self.seen, self.clamped = args, device, False, {}, [0, 0]
        self.float32_exact = torch.float32 in known_answer(device) and not float64_only
        self.int8_exact = self.float32_exact and torch.int8 in known_answer(device)
        self.kind, self.C, self.n_layer = args.get('block_type', 'attention'), args['n_embd'], args['n_layer']
        self.H, self.W = 1 if self.kind == 'mixer' else args['n_head'], args['block_size']
        self.D, self.position, self.expansion = self.C // self.H, None, args.get('expansion', 0)
        sites, wide = iter(sites), iter(wide)
        value = {n: q * s for n, (q, s) in tensors.items() if q.ndim == 1 or n in ('embed.weight', 'position.weight')}
        self.embed = self._put(value['embed.weight'])
        if args['positions'] == 'learned':
            self.position = self._put(value['position.weight'])
        elif args['positions'] == 'sinusoidal':
            cos, sin = rotation_table(self.W, self.C)
            self.position = self._put(np.stack((sin, cos), 2).reshape(self.W, -1)[:, :self.C])
        elif args['positions'] == 'rotary':
            cos, sin = rotation_table(self.W, self.D)
            self.cos, self.sin = self._put(cos), self._put(sin)
        self.blocks = [self._block(i, tensors, value, sites, wide) for i in range(self.n_layer)]
        self.x = scale_of(next(sites)) if 'norm.weight' in value else None
        self.a = scale_of(next(sites))
        self.head = self._product('embed.weight' if args['tied'] else 'head.weight', tensors, self.a, next(wide))
        self.head['m'] = self._put(self.head['scale'] * EXP_STEPS, self.head['dtype'])
        self.gain = self._put(value['norm.weight'] * self.a) if self.x else None
        self.bias = self._put(value['norm.bias'] * self.a) if 'norm.bias' in value else None
        self.frequency_table = self._put(exp_table(FREQUENCY_TOP, 1), torch.float32)

    def _put(self, array, dtype=torch.float64):
        return torch.from_numpy(np.ascontiguousarray(array, np.float64)).to(dtype).to(self.device)

    def _product(self, name, tensors, scale_in, wide):
        """The matrix (in, out) in the dtype that is exact for it, the clamp of its input, its output's unit per row."""
        q, scale = tensors[name]
        dtype = torch.float64 if wide else torch.float32
        run = dtype if self.float32_exact else torch.float64
        limbs, rest = [], q.T.astype(np.int64)
        while self.int8_exact and not wide and q.size >= INT8_FROM and (not limbs or rest.any()):
            low = (rest + 64) % 128 - 64        # base 128, least limb first
            limbs, rest = [*limbs, torch.tensor(low, dtype=torch.int8)], (rest - low) // 128
        limbs = limbs if len(limbs) < 3 else []
        return dict(weight=self._put(q.T, run), run=run, dtype=dtype, limit=product_limit(q, wide), limbs=limbs,
                    scale=np.broadcast_to(np.asarray(scale, np.float64).reshape(-1), (len(q),)) / scale_in)

    def _block(self, i, tensors, value, sites, wide):
        s = {k: scale_of(next(sites)) for k in sites_of(self.args)[0]}
        b, name, args = dict(s, i=i), f'blocks.{i}.', self.args

        def product(site, key, out):            # out (rows,): output units per real unit
            p = b[key] = self._product(f'{name}{key}.weight', tensors, s[site], next(wide))
            bias = value.get(f'{name}{key}.bias')
            p['m'] = self._put(p['scale'] * out, p['dtype'])
            p['b'] = None if bias is None else self._put(bias * out, p['dtype'])

        def mixing(site, key, out, wide):       # as product, for the triangles of a mixer: G matrices (W, W)
            (q, scale), bias = tensors[f'{name}mixer.{key}.weight'], value.get(f'{name}mixer.{key}.bias')
            q, dtype = triangles(q, self.W), torch.float64 if wide else torch.float32
            run = dtype if self.float32_exact else torch.float64
            scale = np.broadcast_to(np.asarray(scale, np.float64).reshape(-1), (len(q) * self.W // 2,))
            scale = scale.reshape(len(q), -1)
            scale = np.concatenate((scale, scale[:, ::-1]), 1)[:, :, None]
            b[key] = dict(weight=self._put(q, run), run=run, dtype=dtype, m=self._put(scale / s[site] * out, dtype),
                          limit=product_limit(q.reshape(-1, self.W), wide),
                          b=None if bias is None else self._put((bias * out).reshape(len(q), -1, 1), dtype))

        def lookup(kind, site_in, site_out, key):
            """Let what is added before key's input hold half a table; return the table in units of that input."""
            p, half = b[key[0]], ACTIVATION_ENTRIES / 2 + 0.5
            p['b'] = torch.tensor(half, dtype=p['dtype'], device=self.device) if p['b'] is None else p['b'] + half
            table = activation_table(kind, int(math.log2(s[site_in]))).astype(np.float64) * (s[site_out] / 2 ** 32)
            return self._put(np.rint(table).clip(-b[key[1]]['limit'], b[key[1]]['limit']), b[key[1]]['dtype'])

        if self.kind == 'attention':
            qk = [NORM_SCALE] * 2 if args['qk_norm'] else [s['q'], s['k']]
            product('a1', 'attention.qkv', np.repeat(qk + [s['v']], self.C))
        elif self.kind == 'mixer':              # a gain per channel cannot go into a matrix over positions
            b['gain'], b['shift'] = (value.get(f'{name}norm1.{k}') for k in ('weight', 'bias'))
            b['gain'], b['shift'] = (None if g is None else self._put(g * s['v']) for g in (b['gain'], b['shift']))
        else:
            product('a1', 'mixer.heads', s['v'])
        b['wide'] = next(wide)
        b['dtype'] = torch.float64 if b['wide'] else torch.float32
        b['run'] = b['dtype'] if self.float32_exact else torch.float64
        if self.kind == 'attention':
            b['limit_qk'], b['limit_v'], b['total'] = attention_limits(b['wide'], self.D, self.W)
            for k in 'qk':
                gain = value.get(f'{name}attention.{k}_norm.weight')
                b[k + '_gain'] = None if gain is None else self._put(gain * s[k])
            b['step'] = float(np.float32(EXP_STEPS / (s['q'] * s['k'] * math.sqrt(self.D))))
            top = 1 << (24 if b['wide'] else min(16, 23 - math.ceil(math.log2(self.W))))   # sum of W of them < 2^24
            b['exp'] = self._put(exp_table(top, 0), b['dtype'])
            product('o', 'attention.proj', 1.0)
            b['o_step'] = float(np.float32(s['o'] / (s['v'] * b['total'])))
        else:
            out = s.get('o', 1.0)
            mixing('v', 'mix', s['vu'] if self.expansion else out, b['wide'])
            if self.expansion:
                mixing('vd', 'mix_down', out, next(wide))
                b['mix_table'] = lookup('gelu', 'vu', 'vd', ('mix', 'mix_down'))
            if self.kind == 'multihead_mixer':
                product('o', 'mixer.proj', 1.0)
        product('a2', 'feed_forward.up', s['u'])
        product('d', 'feed_forward.down', 1.0)
        b['table'] = lookup(args['activation'], 'u', 'd', ('feed_forward.up', 'feed_forward.down'))
        return b

    # --- pieces ---

    def _fit(self, y, limit, scale, site):
        """Round to integers and clamp, in place."""
        if self.observe:
            top, square, n = self.seen.get(site, (0.0, 0.0, 0))
            real, m = y.double() / scale, y.numel()
            square = (square * n + float(real.square().sum())) / (n + m)
            self.seen[site] = [max(top, float(real.abs().max())), square, n + m]
            self.clamped[0] += int((y.abs() > limit + 0.5).sum())
            self.clamped[1] += m
        return y.round_().clamp_(-limit, limit)

    def _norm(self, x, scale, site):
        """Return deviations (integers) and their factor to unit variance, x (B, T, C) float64."""
        lim = float((1 << norm_bits(self.C)) - 1)
        d = self._fit(x * scale, lim, scale, site)
        if self.args['norm'] == 'layernorm':
            d -= (d.sum(-1, keepdim=True) * (1.0 / self.C)).round_()
        variance = (d * d).sum(-1, keepdim=True) * (1.0 / (self.C * scale * scale))
        return d, _over(1.0 / scale, (variance + EPSILON).sqrt_())

    def _matmul(self, a, p):
        """Integers a (..., in) times a matrix: by int8 products of base-128 limbs where faster, else in floats."""
        if not p['limbs']:
            return torch.matmul(a.to(p['run']), p['weight']).to(p['dtype'])
        out = torch.empty(*a.shape[:-1], p['weight'].size(1))
        parts = a.reshape(-1, a.size(-1)).split(INT8_ROWS)
        for part, target in zip(parts, out.view(-1, out.size(-1)).split(INT8_ROWS)):
            high = ((part + 64) * (1 / 128)).floor_()
            low, high, total = (part - high * 128).to(torch.int8), high.to(torch.int8), None
            for w in reversed(p['limbs']):      # int32 sums, all below 2^24 in the end
                y = torch._int_mm(high, w).mul_(128).add_(torch._int_mm(low, w))
                total = y if total is None else total.mul_(128).add_(y)
            target.copy_(total)
        return out

    def _normalised_product(self, x, scale_x, scale_a, b, sites, key):
        d, factor = self._norm(x, scale_x, f'{b["i"]}.{sites[0]}')
        p = b[key]
        a = self._fit(d * (factor * scale_a), p['limit'], scale_a, f'{b["i"]}.{sites[1]}')
        y = self._matmul(a, p).mul_(p['m'])
        return y if p['b'] is None else y.add_(p['b'])

    def _activate(self, z, b, table, sites, key):
        """The activation of z, in units of the first site and half a table up, as integers that enter b[key]."""
        if self.observe:
            self._fit(z - ACTIVATION_ENTRIES / 2, ACTIVATION_ENTRIES / 2, b[sites[0]], f'{b["i"]}.{sites[0]}')
        a = table.index_select(0, z.clamp_(0, ACTIVATION_ENTRIES - 1).to(torch.int32).view(-1)).view(z.shape)
        if self.observe:
            self._fit(a.clone(), b[key]['limit'], b[sites[1]], f'{b["i"]}.{sites[1]}')
        return a

    def _query_key(self, z, b, k, start):
        """QK-norm, rotary positions, rounding; z (B, H, T, D) in units of site k."""
        if self.args['qk_norm']:
            z = z.double().round_().clamp_(-WIDE_LIMIT, WIDE_LIMIT)
            mean = (z * z).sum(-1, keepdim=True) * (1.0 / (self.D * NORM_SCALE * NORM_SCALE))
            z = z * _over(1.0 / NORM_SCALE, (mean + EPSILON).sqrt_()) * b[k + '_gain']
        if self.args['positions'] == 'rotary':
            stop = start + z.size(2)
            cos, sin, (first, second) = self.cos[start:stop], self.sin[start:stop], z.double().chunk(2, -1)
            z = torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
        return self._fit(z.to(b['dtype'], copy=True), b['limit_qk'], b[k], f'{b["i"]}.{k}').to(b['run'])

    def _attend(self, q, k, v, b):
        """Causal attention on integers: q (B, H, n, D) are the last n positions of k (B, H, D, T), v (B, H, T, D)."""
        B, H, n, D = q.shape
        T, out = k.size(3), torch.empty_like(q)
        step = max(1, min(n, SCORES_AT_ONCE // (B * H * T)))
        for i in range(0, n, step):
            j, t = min(i + step, n), T - n + min(i + step, n)
            s = torch.matmul(q[:, :, i:j], k[:, :, :, :t]).to(b['dtype'])      # (B, H, j - i, t)
            if j - i > 1:
                later = torch.ones(j - i, j - i, dtype=torch.bool, device=s.device).triu_(1)
                s[..., t - (j - i):].masked_fill_(later, -math.inf)
            s.sub_(s.amax(-1, keepdim=True)).mul_(-b['step']).clamp_max_(len(b['exp']) - 1)
            p = b['exp'].index_select(0, s.to(torch.int32).view(-1)).view(s.shape)
            p.mul_(_over(b['total'], p.sum(-1, keepdim=True))).round_()
            out[:, :, i:j] = torch.matmul(p.to(b['run']), v[:, :, :t])
        return out.to(b['dtype'])

    # --- the model ---

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
        for b in self.blocks:
            n = last if last and b is self.blocks[-1] else tokens.size(1)
            x = (self._attention if self.kind == 'attention' else self._mix)(x, b, cache, start, n)
            z = self._normalised_product(x, b['x2'], b['a2'], b, ('x2', 'a2'), 'feed_forward.up')
            a = self._activate(z, b, b['table'], ('u', 'd'), 'feed_forward.down')
            x = self._add(x, a, b['feed_forward.down'])
        if cache:
            cache.length = stop
        if self.x is None:
            return self._fit(x * self.a, self.head['limit'], self.a, 'a').to(self.head['run'])
        d, factor = self._norm(x, self.x, 'x')
        a = d * factor * self.gain
        a = a if self.bias is None else a + self.bias
        return self._fit(a, self.head['limit'], self.a, 'a').to(self.head['run'])

    def _attention(self, x, b, cache, start, n):
        """x (B, T, C) of positions from start on -> the last n of them with their attention added."""
        stop = start + x.size(1)
        z = self._normalised_product(x, b['x1'], b['a1'], b, ('x1', 'a1'), 'attention.qkv')
        q, k, v = z.view(*x.shape[:2], 3, self.H, self.D).permute(2, 0, 3, 1, 4)                # (B, H, T, D) each
        q = self._query_key(q[:, :, -n:], b, 'q', stop - n)
        k = self._query_key(k, b, 'k', start).transpose(2, 3)
        v = self._fit(v.to(b['dtype'], copy=True), b['limit_v'], b['v'], f'{b["i"]}.v').to(b['run'])
        if cache:                               # positions of keys are last: faster
            k, v = cache.extend((b['i'], 'k'), k, 3, start), cache.extend((b['i'], 'v'), v, 2, start)
        x, p = x[:, -n:], b['attention.proj']
        y = self._attend(q, k, v, b).transpose(1, 2).reshape(x.shape)
        return self._add(x, self._fit(y.mul_(b['o_step']), p['limit'], b['o'], f'{b["i"]}.o'), p)

    def _mix(self, x, b, cache, start, n):
        """As _attention, for a mixer's matrix over the positions."""
        stop = start + x.size(1)
        if self.kind == 'mixer':
            d, factor = self._norm(x, b['x1'], f'{b["i"]}.x1')
            v = d * factor * b['gain']
            v = v if b['shift'] is None else v + b['shift']
        else:
            v = self._normalised_product(x, b['x1'], b['a1'], b, ('x1', 'a1'), 'mixer.heads')
        v = v.view(*x.shape[:2], self.H, self.D).permute(2, 1, 0, 3).reshape(self.H, x.size(1), -1)     # (H, T, B·D)
        v = self._fit(v.to(b['dtype'], copy=True), b['mix']['limit'], b['v'], f'{b["i"]}.v').to(b['mix']['run'])
        v = cache.extend((b['i'], 'v'), v, 1, start) if cache else v
        if self.expansion:
            z = self._mixed(v, b['mix'], start, stop)                                           # (H·e, T, B·D)
            g = self._activate(z, b, b['mix_table'], ('vu', 'vd'), 'mix_down').to(b['mix_down']['run'])
            g = cache.extend((b['i'], 'g'), g, 1, start) if cache else g
            parts = self._mixed(g, b['mix_down'], stop - n, stop).view(self.H, self.expansion, n, -1).unbind(1)
            y = functools.reduce(torch.add, parts)          # one by one: a sum's order would be torch's own
        else:
            y = self._mixed(v, b['mix'], stop - n, stop)
        x, y = x[:, -n:], y.view(self.H, n, -1, self.D).permute(2, 1, 0, 3).reshape(len(x), n, -1)
        if self.kind == 'mixer':
            return x + y.double()
        p = b['mixer.proj']
        return self._add(x, self._fit(y, p['limit'], b['o'], f'{b["i"]}.o'), p)

    def _mixed(self, v, p, first, stop):
        """Positions first to stop of the mixtures (G, n, B·D) of integers v (H, stop, B·D), G/H of each head."""
        w = p['weight'].view(len(v), -1, self.W, self.W)[:, :, first:stop, :stop].flatten(1, 2)
        y = torch.bmm(w, v).to(p['dtype']).view(len(p['weight']), stop - first, -1).mul_(p['m'][:, first:stop])
        return y if p['b'] is None else y.add_(p['b'] if p['b'].ndim == 0 else p['b'][:, first:stop])

    def _add(self, x, a, p):
        y = self._matmul(a, p).mul_(p['m'])
        return x + (y if p['b'] is None else y.add_(p['b'])).double()

    @torch.inference_mode()
    def frequencies(self, a):
        """Return integer frequencies (N, V), float32, of head inputs a (N, C)."""
        z = self._matmul(a, self.head).mul_(self.head['m'])
        z = z.sub_(z.amax(-1, keepdim=True)).neg_().clamp_max_(len(self.frequency_table) - 1)
        return self.frequency_table.index_select(0, z.to(torch.int32).view(-1)).view(z.shape)


class Cache:
    """What the positions so far left for later ones, a tensor for W positions per block and kind, made when first used.

    Of attention keys (B, H, D, W) and values (B, H, W, D); of a mixer the inputs (G, W, B·D) of its matrices.
    """

    def __init__(self, size):
        self.size, self.length, self.stored = size, 0, {}

    def extend(self, key, x, axis, start):
        """Store x, whose positions lie along axis and begin at start; return all up to its last."""
        if key not in self.stored:
            self.stored[key] = x.new_empty([self.size if i == axis else n for i, n in enumerate(x.shape)])
        self.stored[key].narrow(axis, start, x.size(axis)).copy_(x)
        return self.stored[key].narrow(axis, 0, start + x.size(axis))


# --- from a trained model ---

def code_length_bits(model, tokens, targets, rows=16):
    """Sum of -log2(frequency/total) of targets (N, T) given inputs tokens (N, T), from the integer frequencies."""
    bits = 0.0
    for x, y in zip(torch.from_numpy(tokens).split(rows), torch.from_numpy(targets).split(rows)):
        f = model.frequencies(model.forward(x.to(model.device)).flatten(0, 1)).double()
        chosen = f.gather(1, y.to(model.device).reshape(-1, 1))[:, 0]
        bits += float((f.sum(1).log2() - chosen.log2()).sum())
    return bits
