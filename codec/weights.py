"""Weights as integers with scales, and as few bytes as an adaptive range coder makes of them.

In: float weights with norms folded in, and their Fisher information. Out: {name: (integers, codes of scales)}, and
bytes that decode to it.

Quantisation. Rounding a weight to multiples of s costs N·F·s²/24 nats of data, F the Fisher information per symbol of
that weight and N the symbols coded, and saves log2 s bits; the sum is least at s² = 12/(N·F) (Rissanen 1983). So each
row gets the step its own Fisher information asks for, all tied to one number, `rate` = 1/N, which pack searches for the
fewest bytes.
Coding. First a flag, zero or not, in the context of the row's share of non-zeros (sent before) and the column's so far;
then a magnitude as bucket (1, 2, 3-4, 5-8, ...) and place, in the context of the row's mean magnitude (sent before) and
the column's so far. Counts are updated every 4096 weights and carry over from tensor to tensor. Nothing marks a mask:
its zeros cost what their row's and column's density says.
"""
import math

import constriction
import numpy as np
import torch

from codec.exact import (
    ACTIVATION_ENTRIES,
    WIDE_LIMIT,
    Exact,
    attention_limits,
    code_below,
    norm_bits,
    product_limit,
    scale_of,
    sites_of,
    triangles,
)
from configurator import UserError

CHUNK = 4096                                    # weights between two updates of the counts
BUCKETS = 17                                    # |q| < 2^15
FINE = 16                                       # places of a bucket told apart by counts; finer bits are sent plainly
CLASSES = 30                                    # of a row's density and of its non-zeros' mean magnitude
COLUMN_RATIOS = (0.25, 0.5, 0.7, 0.9, 1.15, 1.5, 2.0, 4.0)
LOWEST_CODE, CODES = -80, 160                   # half octaves of scales: 2^-40 to 2^40
OWN_SHARE = 0.9                                 # of a row's own Fisher information; the rest is its tensor's mean


def shapes(args):
    """Return {name: shape} of the folded weights of a model, in the order they are coded."""
    c, v, d = args['n_embd'], args['vocab_size'], args['n_embd'] // args['n_head']
    kind, n = args.get('block_type', 'attention'), args['block_size']
    mixed = (args['n_head'] if kind == 'multihead_mixer' else 1) * max(1, args.get('expansion', 0))
    mix = {f'mixer.{key}': (mixed * n // 2, n + 1) for key in ('mix', 'mix_down')[:1 + bool(args.get('expansion'))]}
    matrices = {'attention': {'attention.qkv': (3 * c, c), 'attention.proj': (c, c)}, 'mixer': mix,   # mix: folded
                'multihead_mixer': {'mixer.heads': (c, c), **mix, 'mixer.proj': (c, c)}}[kind]
    matrices = {**matrices, 'feed_forward.up': (4 * c, c), 'feed_forward.down': (c, 4 * c)}
    out = {'embed.weight': (v, c)}
    if args['positions'] == 'learned':
        out['position.weight'] = (n, c)
    for i in range(args['n_layer']):
        out.update({f'blocks.{i}.{key}.weight': shape for key, shape in matrices.items()})
    if not args['tied']:
        out['head.weight'] = (v, c)
    for i in range(args['n_layer']):
        if args['bias']:
            out.update({f'blocks.{i}.{key}.bias': (mixed * n if key in mix else shape[0],)
                        for key, shape in matrices.items()})
        if args['qk_norm'] and kind == 'attention':
            out[f'blocks.{i}.attention.q_norm.weight'] = out[f'blocks.{i}.attention.k_norm.weight'] = (d,)
    norms = [f'blocks.{i}.norm1' for i in range(args['n_layer']) if kind == 'mixer']
    for norm in norms + ['norm'] * args.get('final_norm', True):
        out[f'{norm}.weight'] = (c,)
        if args['bias'] and args['norm'] == 'layernorm':
            out[f'{norm}.bias'] = (c,)
    return out


def count(args):
    return sum(math.prod(shape) for shape in shapes(args).values())


# --- from a trained model ---

def fold(state, args):
    """Return {name: float64 array} with norm gains and biases folded into the product after; the head's norm stays."""
    w = {n: t.detach().double().cpu().numpy() for n, t in state.items()}
    if args['tied']:
        w.pop('head.weight', None)
    into = {'attention': {'norm1': 'attention.qkv'}, 'mixer': {},   # a flat mixer's norm1 keeps its gain and bias
            'multihead_mixer': {'norm1': 'mixer.heads'}}[args.get('block_type', 'attention')]
    for i in range(args['n_layer']):
        for norm, key in {**into, 'norm2': 'feed_forward.up'}.items():
            name, gain = f'blocks.{i}.{key}.', w.pop(f'blocks.{i}.{norm}.weight')
            shift = w.pop(f'blocks.{i}.{norm}.bias', None)
            if shift is not None:
                w[name + 'bias'] = w.get(name + 'bias', 0) + w[name + 'weight'] @ shift
            w[name + 'weight'] = w[name + 'weight'] * gain
    return w


def load_folded(model, folded):
    """Put folded weights {name: array} in a GPT whose block norms become plain: it computes what it did before."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in folded:
                p.copy_(torch.from_numpy(folded[name]))
            elif '.norm' in name:
                p.fill_(float(name.endswith('weight')))
    return model


def fisher_information(model, x, y):
    """Mean squared gradient per symbol {name: float64 array} of a GPT on rows x, y (N, T) int64, one row at a time.

    The square of a row's summed gradient stands for the sum of squares: gradients of two symbols hardly correlate.
    """
    total = {n: np.zeros(p.shape) for n, p in model.named_parameters()}
    for row in range(len(x)):
        model.zero_grad(set_to_none=True)
        model(torch.from_numpy(x[row:row + 1]), torch.from_numpy(y[row:row + 1])).backward()
        for n, p in model.named_parameters():
            total[n] += p.grad.double().numpy() ** 2
    model.zero_grad(set_to_none=True)
    return {n: f / y.size for n, f in total.items()}


# --- where the integer model rounds ---

def reference_sites(args):
    """Sites for the first look at a model: everything in float64 with wide ranges; returns (codes, wide flags)."""
    bits, (sites, n_products, last) = norm_bits(args['n_embd']), sites_of(args)
    codes = dict(x1=4 * (bits - 13), a1=48, q=40, k=40, v=40, o=40, x2=4 * (bits - 13), a2=48, u=24, d=40)
    codes.update(x=codes['x1'], a=codes['a1'], vu=codes['u'], vd=codes['d'])
    return [codes[s] for s in [*sites * args['n_layer'], *last]], [1] * (n_products * args['n_layer'] + 1)


def choose_sites(args, tensors, seen, all_wide=False):
    """Choose scale codes and wide flags from what a reference model saw: {site: [largest magnitude, mean square]}.

    A product runs in float32 if its clamped activations still resolve a 24th of their root mean square.
    """
    codes, wide, bits, (sites, _, last) = [], [], norm_bits(args['n_embd']), sites_of(args)
    attention = args.get('block_type', 'attention') == 'attention'
    before, after = ('attention.qkv', 'attention.proj') if attention else ('mixer.heads', 'mixer.proj')
    matrix = dict(a1=before, o=after, a2='feed_forward.up', d='feed_forward.down')

    def product(site, q):
        largest, rms = 1.25 * seen[site][0] + 1e-9, math.sqrt(seen[site][1]) + 1e-9
        narrow = product_limit(q, False) / largest
        wide.append(int(all_wide or narrow * rms < 24))
        codes.append(code_below(min(WIDE_LIMIT / 2 / largest, 4096 / rms) if wide[-1] else narrow))

    for i in range(args['n_layer']):
        for s in sites:
            site = f'{i}.{s}'
            largest = 1.25 * seen[site][0] + 1e-9
            if s in ('x1', 'x2'):
                codes.append(code_below(2 ** bits / (4 * largest)))
            elif s in ('u', 'vu'):
                codes.append(4 * max(-4, min(9, math.floor(math.log2(ACTIVATION_ENTRIES / 2 / largest)))))
            elif s in matrix:
                product(site, tensors[f'blocks.{i}.{matrix[s]}.weight'][0])
            elif not attention:
                key, n = 'mix' if s == 'v' else 'mix_down', args['block_size']
                product(site, triangles(tensors[f'blocks.{i}.mixer.{key}.weight'][0], n).reshape(-1, n))
            else:
                if s == 'q':
                    wide.append(int(all_wide))
                limit = attention_limits(wide[-1], args['n_embd'] // args['n_head'], args['block_size'])[s == 'v']
                codes.append(code_below(min(limit / largest, 4096 / largest if wide[-1] else math.inf)))
    if 'x' in last:
        codes.append(code_below(2 ** bits / (5 * seen['x'][0] + 1e-9)))
    product('a', tensors['embed.weight' if args['tied'] else 'head.weight'][0])
    return codes, wide


def observe(model, tokens, rows=16):
    """Run rows of tokens (N, T) through a model and return its `seen`."""
    model.observe, model.seen, model.clamped = True, {}, [0, 0]
    for part in torch.from_numpy(tokens).to(model.device).split(rows):
        model.forward(part)
    model.observe = False
    return model.seen


def fit_sites(args, tensors, tokens, all_wide=False):
    """Choose sites and wide flags for quantised tensors from sample tokens (N, T): look coarsely, then finely."""
    seen = observe(Exact(args, tensors, *reference_sites(args)), tokens)
    seen = observe(Exact(args, tensors, *choose_sites(args, tensors, seen, True)), tokens)
    return choose_sites(args, tensors, seen, all_wide)


# --- quantisation ---

def scale_code(step):
    """The half-octave code whose scale is nearest to step (array), as int64."""
    return np.clip(np.rint(2 * np.log2(np.maximum(step, 1e-12))), LOWEST_CODE, LOWEST_CODE + CODES - 1).astype(np.int64)


def scale_from(codes):
    """Scales (1 or 1.5)·2^k of half-octave codes: exact, so that every machine multiplies by the same number."""
    table = np.array([scale_of(2 * c) for c in range(LOWEST_CODE, LOWEST_CODE + CODES)])
    return table[np.asarray(codes) - LOWEST_CODE]


def quantise(folded, fisher, rate, trained=None):
    """Round each row of each matrix, and each vector, to the step that `rate` = 1/N makes of its Fisher information.

    folded, fisher: {name: float64 array}. trained: {name: codes} of matrices that were trained on a grid (qat.py), and
    keep it. Returns {name: (int32 array, codes)}; codes (rows,) or a scalar array.
    """
    out, trained = {}, trained or {}
    for name, w in folded.items():
        own, f = w.ndim == 2, fisher[name]
        f = OWN_SHARE * f.mean(1) + (1 - OWN_SHARE) * f.mean() if own else f.mean()
        step = np.sqrt(12 * rate / np.maximum(f, 1e-14))
        limit = 2.0 ** (BUCKETS - 3)            # no integer may leave the buckets
        codes = np.asarray(trained[name]) if name in trained else scale_code(step)
        codes = np.maximum(codes, scale_code(np.abs(w).max(1 if own else None) / limit) + 1)
        s = scale_from(codes)
        out[name] = np.rint(w / (s[:, None] if own else s)).astype(np.int32), codes
    return out


def quantise_to(folded, fisher, args, bits):
    """Quantise at the rate that spends `bits` per non-zero weight; returns (tensors, their bytes)."""
    budget = bits * sum(int(np.count_nonzero(w)) for w in folded.values())
    low, high = -60.0, 10.0                         # log2 of the rate: more rate, fewer bits
    for _ in range(14):
        middle = (low + high) / 2
        size = 8 * len(encode(quantise(folded, fisher, 2 ** middle), args))
        low, high = (middle, high) if size > budget else (low, middle)
    tensors = quantise(folded, fisher, 2 ** high)
    return tensors, encode(tensors, args)


def with_scales(tensors):
    """{name: (integers, codes)} -> {name: (integers, scales)} as exact.Exact takes them."""
    return {n: (q, scale_from(c)[:, None] if q.ndim == 2 else scale_from(c)) for n, (q, c) in tensors.items()}


def values(tensors):
    """{name: float64 array} that integers and codes stand for."""
    return {n: q * s for n, (q, s) in with_scales(tensors).items()}


# --- coding: one class for both directions, so that they cannot differ ---

class _Coder:
    """Adaptive coding of symbol arrays; encodes when made without data, else decodes and ignores the symbols."""

    def __init__(self, data=None):
        self.encoding = data is None
        queue = constriction.stream.queue
        self.queue = queue.RangeEncoder() if self.encoding else queue.RangeDecoder(data)
        self.family = constriction.stream.model.Categorical(perfect=False)

    def code(self, symbols, weights):
        """Code one symbol (n,) per row of weights (n, L), integers >= 1 held in float64; returns the symbols."""
        if not len(weights):
            return np.zeros(0, np.int64)
        if self.encoding:
            self.queue.encode(np.ascontiguousarray(symbols, np.int32), self.family, np.ascontiguousarray(weights))
            return np.asarray(symbols, np.int64)
        return np.asarray(self.queue.decode(self.family, np.ascontiguousarray(weights)), np.int64)

    def adaptive(self, symbols, contexts, counts, step=CHUNK):
        """Code symbols (n,) in contexts (n,) with counts (K, L), which are updated after every `step` symbols."""
        out = np.zeros(len(contexts), np.int64)
        for i in range(0, len(contexts), step):
            part = slice(i, i + step)
            out[part] = self.code(symbols[part] if self.encoding else None, counts[contexts[part]])
            np.add.at(counts, (contexts[part], out[part]), 32.0)
        return out


def _split(q):
    """|q| -> (bucket, place in the bucket): 0, 1, 2, 3-4, 5-8, ... so that bucket b > 1 starts at 2^(b-2) + 1."""
    magnitude = np.abs(q).astype(np.int64)
    bucket = np.where(magnitude > 1, np.frexp(np.maximum(magnitude - 1, 1).astype(np.float64))[1] + 1, magnitude)
    return bucket, magnitude - _START[bucket]


_START = np.array([0, 1] + [(1 << b - 2) + 1 for b in range(2, BUCKETS)])
_WIDTH = np.array([1, 1] + [1 << b - 2 for b in range(2, BUCKETS)])
_ODDS = np.array([2.0 ** k for k in range(-7, 8)])                              # non-zeros per zero: borders of classes
_MEANS = np.array([scale_of(2 * k) for k in range(1, CLASSES)])                 # of non-zeros: 1.5, 2, 3, 4, 6, ...
_COLUMNS = len(COLUMN_RATIOS) + 1


class _Counts:
    """The adaptive counts of a model's weights, shared by its tensors; a new symbol counts 32."""

    def __init__(self):
        odds = np.append(_ODDS, 2 * _ODDS[-1]) / 1.5
        share = (odds / (1 + odds))[:, None] * np.ones(_COLUMNS)
        self.flag = 1 + np.floor(256 * np.stack((1 - share, share), -1)).reshape(-1, 2)
        mean = np.append(_MEANS, 2 * _MEANS[-1]).reshape(-1, 1) / 1.25
        p, tail, parts = 1 - 1 / (mean + 0.25), 1.0, []                         # geometric: P(beyond m) = p^m
        power = p                               # squared from bucket to bucket: no libm
        for b in range(1, BUCKETS):
            after = tail * power
            parts.append(tail - after)
            tail, power = after, power if b == 1 else power * power
        self.bucket = np.repeat(1 + np.floor(128 * np.concatenate(parts, 1)), _COLUMNS, 0)
        self.place = np.zeros((BUCKETS, 2 * FINE))
        for b in range(1, BUCKETS):
            self.place[b, :2 * min(_WIDTH[b], FINE)] = 32
        self.row = np.ones((2, CLASSES))
        self.code = np.ones((2, 2 * CODES))


def _column_class(seen):
    """Class (columns,) of what a column has gathered so far against the mean column."""
    total = seen.sum()
    return np.searchsorted(COLUMN_RATIOS, seen * len(seen) / total) if total else np.full(len(seen), _COLUMNS // 2)


def _code_tensor(coder, q, shape, counts):
    """Code one matrix (rows, columns); q is None when decoding. Returns int32 (rows, columns)."""
    rows, columns = shape
    odds = mean = None
    if q is not None:
        bucket, place = _split(q)
        n = np.count_nonzero(q, 1)
        odds = np.searchsorted(_ODDS, n / np.maximum(columns - n, 0.5))
        mean = np.searchsorted(_MEANS, np.abs(q).sum(1) / np.maximum(n, 1))
    odds, mean = (coder.adaptive(c, np.full(rows, k), counts.row, 32) for k, c in enumerate((odds, mean)))
    n_seen, size_seen, r, step, out = np.zeros(columns), np.zeros(columns), 0, 512, np.zeros(shape, np.int32)
    while r < rows:
        part = slice(r, r + max(1, step // columns))
        r, step = part.stop, min(CHUNK, step * 2)
        context = odds[part, None] * _COLUMNS + _column_class(n_seen)
        flat = None if q is None else (q[part] != 0).reshape(-1)
        at = np.nonzero(coder.adaptive(flat, context.reshape(-1), counts.flag))[0]
        context = (mean[part, None] * _COLUMNS + _column_class(size_seen)).reshape(-1)[at]
        b = coder.adaptive(None if q is None else bucket[part].reshape(-1)[at] - 1, context, counts.bucket) + 1
        fine = np.minimum(_WIDTH[b], FINE)      # places that counts tell apart; each holds `coarse` values
        coarse, symbol, rest, low = _WIDTH[b] // fine, None, None, np.zeros(len(b), np.int64)
        if q is not None:
            places = place[part].reshape(-1)[at]
            symbol, rest = 2 * (places // coarse) + (q[part].reshape(-1)[at] < 0), places % coarse
        symbol = coder.adaptive(symbol, b, counts.place)
        for width in np.unique(coarse[coarse > 1]):
            which = np.nonzero(coarse == width)[0]
            low[which] = coder.code(None if q is None else rest[which], np.ones((len(which), width)))
        got = np.zeros(out[part].size, np.int32)
        got[at] = (_START[b] + symbol // 2 * coarse + low) * (1 - 2 * (symbol % 2))
        out[part] = got.reshape(-1, columns)
        n_seen += (out[part] != 0).sum(0)
        size_seen += (np.abs(out[part]) / np.append(_MEANS, 2 * _MEANS[-1])[mean[part], None]).sum(0)
    return out


def _code_all(coder, tensors, args):
    """Code every tensor of a model in order; tensors is None when decoding. Returns {name: (integers, codes)}."""
    counts, out, groups = _Counts(), {}, {}
    for name, shape in shapes(args).items():    # vectors of one length are coded as the rows of a matrix
        groups.setdefault(name if len(shape) == 2 else f'vectors of {shape[0]}', []).append(name)
    for names in groups.values():
        shape = shapes(args)[names[0]]
        shape = shape if len(shape) == 2 else (len(names), shape[0])
        q = codes = None
        if tensors is not None:
            q = np.concatenate([tensors[n][0].reshape(-1, shape[1]) for n in names])
            codes = np.diff(np.concatenate([np.reshape(tensors[n][1], -1) for n in names]), prepend=0) + CODES
        codes = np.cumsum(coder.adaptive(codes, np.arange(shape[0]).clip(0, 1), counts.code, 16) - CODES)
        if codes.min() < LOWEST_CODE or codes.max() >= LOWEST_CODE + CODES:
            raise UserError('the weights section holds a scale out of range; the archive is damaged')
        q = _code_tensor(coder, q, shape, counts)
        for i, n in enumerate(names):
            out[n] = (q, codes) if len(shapes(args)[n]) == 2 else (q[i], codes[i])
    return out


def encode(tensors, args):
    """Return the bytes of a model's integers and scale codes."""
    coder = _Coder()
    _code_all(coder, tensors, args)
    return coder.queue.get_compressed().astype('<u4').tobytes()


def decode(data, args):
    """Return {name: (integers, codes)} from encode()'s bytes."""
    if len(data) % 4:
        raise UserError(f'the weights section has {len(data)} bytes, expected a multiple of 4; the archive is damaged')
    return _code_all(_Coder(np.frombuffer(data, '<u4').astype(np.uint32)), None, args)
