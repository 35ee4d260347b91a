"""Weights as integers with scales, and as few bytes as an adaptive range coder makes of them.

In: float weights with norms folded in, and their Fisher information. Out: {name: (integers, codes of scales)}, and
bytes that decode to it. Imports nothing of the integer model: what it makes of them is exact.py's.

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
from typing import NamedTuple

import constriction
import numpy as np
import torch

from codec.sites import scale_of
from configurator import UserError

CHUNK = 4096                                    # weights between two updates of the counts
FIRST_CHUNK = 512                               # rows are coded in groups of so many weights, then twice as many, ...
NEW_COUNT = 32.0                                # what a symbol adds to its count
BUCKETS = 17                                    # |q| < 2^15
FINE = 16                                       # places of a bucket told apart by counts; finer bits are sent plainly
CLASSES = 30                                    # of a row's density and of its non-zeros' mean magnitude
COLUMN_RATIOS = (0.25, 0.5, 0.7, 0.9, 1.15, 1.5, 2.0, 4.0)
LOWEST_CODE = -80                               # half octaves of scales: 2^-40 to 2^40
CODES = 160
OWN_SHARE = 0.9                                 # of a row's own Fisher information; the rest is its tensor's mean


# --- the weights of a model ---

def block_matrices(args):
    """Return {name: shape} of the folded matrices of one block, in the order they are coded."""
    c = args['n_embd']
    kind = args.get('block_type', 'attention')
    if kind == 'attention':
        out = {'attention.qkv': (3 * c, c), 'attention.proj': (c, c)}
    elif kind == 'mixer':
        out = triangle_shapes(args)
    else:
        out = {'mixer.heads': (c, c), **triangle_shapes(args), 'mixer.proj': (c, c)}
    out['feed_forward.up'] = (4 * c, c)
    out['feed_forward.down'] = (c, 4 * c)
    return out


def triangle_shapes(args):
    """Return {name: shape} of a mixer's folded triangles."""
    n = args['block_size']
    expansion = args.get('expansion', 0)
    heads = args['n_head'] if args['block_type'] == 'multihead_mixer' else 1
    shape = (heads * max(1, expansion) * n // 2, n + 1)
    return {'mixer.mix': shape, 'mixer.mix_down': shape} if expansion else {'mixer.mix': shape}


def shapes(args):
    """Return {name: shape} of the folded weights of a model, in the order they are coded."""
    c = args['n_embd']
    blocks = [f'blocks.{i}' for i in range(args['n_layer'])]
    matrices = block_matrices(args)
    kind = args.get('block_type', 'attention')
    out = {'embed.weight': (args['vocab_size'], c)}
    if args['positions'] == 'learned':
        out['position.weight'] = (args['block_size'], c)
    for block in blocks:
        for key, shape in matrices.items():
            out[f'{block}.{key}.weight'] = shape
    if not args['tied']:
        out['head.weight'] = (args['vocab_size'], c)

    # Vectors come after all matrices. A folded triangle's row is two rows, with a bias each.
    for block in blocks:
        if args['bias']:
            for key, (rows, _) in matrices.items():
                out[f'{block}.{key}.bias'] = (2 * rows if key.startswith('mixer.mix') else rows,)
        if args['qk_norm'] and kind == 'attention':
            head_width = args['n_embd'] // args['n_head']
            out[f'{block}.attention.q_norm.weight'] = (head_width,)
            out[f'{block}.attention.k_norm.weight'] = (head_width,)

    # Norms that no matrix could take in: a flat mixer's first ones, and the last of all.
    norms = [f'{block}.norm1' for block in blocks] if kind == 'mixer' else []
    if args.get('final_norm', True):
        norms.append('norm')
    for norm in norms:
        out[f'{norm}.weight'] = (c,)
        if args['bias'] and args['norm'] == 'layernorm':
            out[f'{norm}.bias'] = (c,)
    return out


def count(args):
    return sum(math.prod(shape) for shape in shapes(args).values())


# --- from a trained model ---

def folded_norms(args):
    """Return {norm: the matrix after it, which takes in its gain and bias} of a block."""
    kind = args.get('block_type', 'attention')
    if kind == 'attention':
        return {'norm1': 'attention.qkv', 'norm2': 'feed_forward.up'}
    if kind == 'multihead_mixer':
        return {'norm1': 'mixer.heads', 'norm2': 'feed_forward.up'}
    return {'norm2': 'feed_forward.up'}         # a gain per channel cannot go into a matrix over positions


def fold(state, args):
    """Return {name: float64 array} with norm gains and biases folded into the product after; the head's norm stays."""
    w = {name: t.detach().double().cpu().numpy() for name, t in state.items()}
    if args['tied']:
        w.pop('head.weight', None)
    for i in range(args['n_layer']):
        for norm, key in folded_norms(args).items():
            weight = f'blocks.{i}.{key}.weight'
            bias = f'blocks.{i}.{key}.bias'
            gain = w.pop(f'blocks.{i}.{norm}.weight')
            shift = w.pop(f'blocks.{i}.{norm}.bias', None)
            if shift is not None:
                w[bias] = w.get(bias, 0) + w[weight] @ shift
            w[weight] = w[weight] * gain
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
    total = {name: np.zeros(p.shape) for name, p in model.named_parameters()}
    for row in range(len(x)):
        inputs = torch.from_numpy(x[row:row + 1])
        targets = torch.from_numpy(y[row:row + 1])
        model.zero_grad(set_to_none=True)
        model(inputs, targets).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad.double().numpy() ** 2
    model.zero_grad(set_to_none=True)
    return {name: squares / y.size for name, squares in total.items()}


# --- quantisation ---

def scale_code(step):
    """The half-octave code whose scale is nearest to step (array), as int64."""
    codes = np.rint(2 * np.log2(np.maximum(step, 1e-12)))
    return np.clip(codes, LOWEST_CODE, LOWEST_CODE + CODES - 1).astype(np.int64)


def scale_from(codes):
    """Scales (1 or 1.5)·2^k of half-octave codes: exact, so that every machine multiplies by the same number."""
    table = np.array([scale_of(2 * code) for code in range(LOWEST_CODE, LOWEST_CODE + CODES)])
    return table[np.asarray(codes) - LOWEST_CODE]


def scales_of(q, codes):
    """Scales that integers q are multiplied by: one a row of a matrix, one for a vector."""
    scales = scale_from(codes)
    return scales[:, None] if q.ndim == 2 else scales


def quantise(folded, fisher, rate, trained=None):
    """Round each row of each matrix, and each vector, to the step that `rate` = 1/N makes of its Fisher information.

    folded, fisher: {name: float64 array}. trained: {name: codes} of matrices that were trained on a grid (grid.py), and
    keep it. Returns {name: (int32 array, codes)}; codes (rows,) or a scalar array.
    """
    out = {}
    trained = trained or {}
    for name, w in folded.items():
        if w.ndim == 2:
            information = OWN_SHARE * fisher[name].mean(1) + (1 - OWN_SHARE) * fisher[name].mean()
            largest = np.abs(w).max(1)
        else:
            information = fisher[name].mean()
            largest = np.abs(w).max()
        if name in trained:
            codes = np.asarray(trained[name])
        else:
            codes = scale_code(np.sqrt(12 * rate / np.maximum(information, 1e-14)))

        # No integer may leave the buckets.
        limit = 2.0 ** (BUCKETS - 3)
        codes = np.maximum(codes, scale_code(largest / limit) + 1)
        out[name] = np.rint(w / scales_of(w, codes)).astype(np.int32), codes
    return out


def quantise_to(folded, fisher, args, bits):
    """Quantise at the rate that spends `bits` per non-zero weight; returns (tensors, their bytes)."""
    n_nonzero = sum(int(np.count_nonzero(w)) for w in folded.values())
    low = -60.0                                 # log2 of the rate: more rate, fewer bits
    high = 10.0
    for _ in range(14):
        middle = (low + high) / 2
        size = 8 * len(encode(quantise(folded, fisher, 2 ** middle), args))
        if size > bits * n_nonzero:
            low = middle
        else:
            high = middle
    tensors = quantise(folded, fisher, 2 ** high)
    return tensors, encode(tensors, args)


def with_scales(tensors):
    """{name: (integers, codes)} -> {name: (integers, scales)} as exact.Exact takes them."""
    return {name: (q, scales_of(q, codes)) for name, (q, codes) in tensors.items()}


def values(tensors):
    """{name: float64 array} that integers and codes stand for."""
    return {name: q * scales for name, (q, scales) in with_scales(tensors).items()}


# --- buckets ---

BUCKET_START = np.array([0, 1] + [(1 << bucket - 2) + 1 for bucket in range(2, BUCKETS)])
BUCKET_WIDTH = np.array([1, 1] + [1 << bucket - 2 for bucket in range(2, BUCKETS)])
PLACE_WIDTH = BUCKET_WIDTH // np.minimum(BUCKET_WIDTH, FINE)                    # values in each place that counts know


def split(q):
    """|q| -> (bucket, place in the bucket): 0, 1, 2, 3-4, 5-8, ... so that bucket b > 1 starts at 2^(b-2) + 1."""
    magnitude = np.abs(q).astype(np.int64)
    exponent = np.frexp(np.maximum(magnitude - 1, 1).astype(np.float64))[1]
    bucket = np.where(magnitude > 1, exponent + 1, magnitude)
    return bucket, magnitude - BUCKET_START[bucket]


# --- the context model, which coding and decoding share ---

ODDS = np.array([2.0 ** k for k in range(-7, 8)])                               # non-zeros per zero: borders of classes
MEANS = np.array([scale_of(2 * k) for k in range(1, CLASSES)])                  # of non-zeros: 1.5, 2, 3, 4, 6, ...
CLASS_MEANS = np.append(MEANS, 2 * MEANS[-1])                                   # what stands for each class
COLUMN_CLASSES = len(COLUMN_RATIOS) + 1


def row_classes(q):
    """Return the class of density and the class of mean magnitude of each row of q (rows, columns)."""
    n = np.count_nonzero(q, 1)
    odds = np.searchsorted(ODDS, n / np.maximum(q.shape[1] - n, 0.5))
    means = np.searchsorted(MEANS, np.abs(q).sum(1) / np.maximum(n, 1))
    return odds, means


def column_classes(gathered):
    """Class (columns,) of what a column has gathered so far against the mean column."""
    total = gathered.sum()
    if not total:
        return np.full(len(gathered), COLUMN_CLASSES // 2)
    return np.searchsorted(COLUMN_RATIOS, gathered * len(gathered) / total)


def first_flag_counts():
    """Counts (classes · COLUMN_CLASSES, 2) of zero and non-zero that a row of each class begins with."""
    odds = np.append(ODDS, 2 * ODDS[-1]) / 1.5
    share = (odds / (1 + odds))[:, None] * np.ones(COLUMN_CLASSES)
    return 1 + np.floor(256 * np.stack((1 - share, share), -1)).reshape(-1, 2)


def first_bucket_counts():
    """Counts (CLASSES · COLUMN_CLASSES, BUCKETS - 1): a geometric distribution of each class's mean, P(beyond m) = p^m.

    p^m is squared from bucket to bucket: nothing comes from libm.
    """
    mean = CLASS_MEANS.reshape(-1, 1) / 1.25
    beyond = 1.0
    p = 1 - 1 / (mean + 0.25)
    power = p
    parts = []
    for bucket in range(1, BUCKETS):
        after = beyond * power
        parts.append(beyond - after)
        beyond = after
        if bucket > 1:
            power = power * power
    shares = np.concatenate(parts, 1)
    return np.repeat(1 + np.floor(128 * shares), COLUMN_CLASSES, 0)


def first_place_counts():
    """Counts (BUCKETS, 2·FINE) of place and sign in each bucket."""
    counts = np.zeros((BUCKETS, 2 * FINE))
    for bucket in range(1, BUCKETS):
        counts[bucket, :2 * min(BUCKET_WIDTH[bucket], FINE)] = NEW_COUNT
    return counts


class Counts:
    """The adaptive counts of a model's weights, shared by its tensors."""

    def __init__(self):
        self.flag = first_flag_counts()
        self.bucket = first_bucket_counts()
        self.place = first_place_counts()
        self.row = np.ones((2, CLASSES))        # of classes of density, of classes of mean magnitude
        self.code = np.ones((2, 2 * CODES))     # of a tensor's first scale, and of steps from row to row


class Contexts:
    """The contexts of one matrix's weights: each row's classes, and what the columns have gathered so far."""

    def __init__(self, odds, means, columns):
        self.odds = odds
        self.means = means
        self.n_gathered = np.zeros(columns)
        self.size_gathered = np.zeros(columns)

    def of_flags(self, part):
        """Contexts of the flags of rows `part` (a slice), one row after another."""
        context = self.odds[part, None] * COLUMN_CLASSES + column_classes(self.n_gathered)
        return context.reshape(-1)

    def of_buckets(self, part, at):
        """Contexts of the buckets of the non-zeros of rows `part`, which stand at places `at` of them."""
        context = self.means[part, None] * COLUMN_CLASSES + column_classes(self.size_gathered)
        return context.reshape(-1)[at]

    def gather(self, part, q):
        """Take in rows `part`, whose integers are q."""
        self.n_gathered += (q != 0).sum(0)
        self.size_gathered += (np.abs(q) / CLASS_MEANS[self.means[part], None]).sum(0)


def row_groups(rows, columns):
    """Yield slices of the rows that are coded together: few at first, for nothing is known of the columns."""
    start = 0
    size = FIRST_CHUNK
    while start < rows:
        stop = start + max(1, size // columns)
        yield slice(start, stop)
        start = stop
        size = min(CHUNK, 2 * size)


def plain_groups(widths):
    """Yield (width, where) of the values that are sent plainly, one of `width` equally likely ones each."""
    for width in np.unique(widths[widths > 1]):
        yield width, np.nonzero(widths == width)[0]


def chunks(n, size):
    """Yield slices of n symbols, after each of which counts are updated."""
    for start in range(0, n, size):
        yield slice(start, start + size)


class Group(NamedTuple):
    """Tensors that are coded as one matrix: a matrix alone, or all vectors of one length as its rows."""
    names: list
    rows: int
    columns: int
    vectors: bool


def coding_order(args):
    """Return the Groups of a model's tensors, in the order they are coded."""
    of_length = {}
    groups = []
    for name, shape in shapes(args).items():
        if len(shape) == 2:
            groups.append(Group([name], *shape, False))
        else:
            of_length.setdefault(shape[0], []).append(name)
    return groups + [Group(names, len(names), length, True) for length, names in of_length.items()]


def code_contexts(rows):
    """Contexts of a tensor's scale codes: the first, which is sent whole, and the others, sent as differences."""
    return np.arange(rows).clip(0, 1)


def codes_are_valid(codes):
    return codes.min() >= LOWEST_CODE and codes.max() < LOWEST_CODE + CODES


# --- coding ---

class Encoder:
    """Symbols to bytes, by a range coder with adaptive counts."""

    def __init__(self):
        self.queue = constriction.stream.queue.RangeEncoder()
        self.family = constriction.stream.model.Categorical(perfect=False)

    def plain(self, symbols, weights):
        """Code one symbol (n,) per row of weights (n, L), integers >= 1 held in float64."""
        symbols = np.ascontiguousarray(symbols, np.int32)
        self.queue.encode(symbols, self.family, np.ascontiguousarray(weights))

    def adaptive(self, symbols, contexts, counts, step=CHUNK):
        """Code symbols (n,) in contexts (n,) with counts (K, L), which are updated after every `step` symbols."""
        for part in chunks(len(contexts), step):
            self.plain(symbols[part], counts[contexts[part]])
            np.add.at(counts, (contexts[part], symbols[part]), NEW_COUNT)

    def matrix(self, q, counts):
        """Code integers (rows, columns)."""
        rows, columns = q.shape
        odds, means = row_classes(q)
        self.adaptive(odds, np.full(rows, 0), counts.row, 32)
        self.adaptive(means, np.full(rows, 1), counts.row, 32)
        contexts = Contexts(odds, means, columns)
        for part in row_groups(rows, columns):
            flat = q[part].reshape(-1)
            flags = (flat != 0).astype(np.int64)
            self.adaptive(flags, contexts.of_flags(part), counts.flag)

            # What is not zero: its bucket, the place in it with the sign, and where counts are too coarse the rest.
            at = np.nonzero(flags)[0]
            bucket, place = split(flat[at])
            width = PLACE_WIDTH[bucket]
            self.adaptive(bucket - 1, contexts.of_buckets(part, at), counts.bucket)
            self.adaptive(2 * (place // width) + (flat[at] < 0), bucket, counts.place)
            for n, where in plain_groups(width):
                self.plain((place % width)[where], np.ones((len(where), n)))
            contexts.gather(part, q[part])

    def tobytes(self):
        return self.queue.get_compressed().astype('<u4').tobytes()


class Decoder:
    """The other way: each method takes back what the Encoder's of its name coded."""

    def __init__(self, data):
        self.queue = constriction.stream.queue.RangeDecoder(data)
        self.family = constriction.stream.model.Categorical(perfect=False)

    def plain(self, weights):
        """Return one symbol per row of weights (n, L)."""
        return np.asarray(self.queue.decode(self.family, np.ascontiguousarray(weights)), np.int64)

    def adaptive(self, contexts, counts, step=CHUNK):
        """Return the symbols (n,) in contexts (n,)."""
        symbols = np.zeros(len(contexts), np.int64)
        for part in chunks(len(contexts), step):
            symbols[part] = self.plain(counts[contexts[part]])
            np.add.at(counts, (contexts[part], symbols[part]), NEW_COUNT)
        return symbols

    def matrix(self, rows, columns, counts):
        """Return integers (rows, columns), int32."""
        odds = self.adaptive(np.full(rows, 0), counts.row, 32)
        means = self.adaptive(np.full(rows, 1), counts.row, 32)
        contexts = Contexts(odds, means, columns)
        q = np.zeros((rows, columns), np.int32)
        for part in row_groups(rows, columns):
            flags = self.adaptive(contexts.of_flags(part), counts.flag)

            # What is not zero: its bucket, the place in it with the sign, and where counts are too coarse the rest.
            at = np.nonzero(flags)[0]
            bucket = self.adaptive(contexts.of_buckets(part, at), counts.bucket) + 1
            width = PLACE_WIDTH[bucket]
            symbol = self.adaptive(bucket, counts.place)
            rest = np.zeros(len(at), np.int64)
            for n, where in plain_groups(width):
                rest[where] = self.plain(np.ones((len(where), n)))
            magnitude = BUCKET_START[bucket] + symbol // 2 * width + rest
            flat = np.zeros(len(flags), np.int32)
            flat[at] = np.where(symbol % 2, -magnitude, magnitude)
            q[part] = flat.reshape(-1, columns)
            contexts.gather(part, q[part])
        return q


def encode(tensors, args):
    """Return the bytes of a model's integers and scale codes, {name: (integers, codes)}."""
    encoder = Encoder()
    counts = Counts()
    for names, rows, columns, _ in coding_order(args):
        q = np.concatenate([tensors[name][0].reshape(-1, columns) for name in names])
        codes = np.concatenate([np.reshape(tensors[name][1], -1) for name in names])
        if not codes_are_valid(codes):
            raise UserError(f'{names[0]} has scale codes {codes.min()} to {codes.max()}, expected {LOWEST_CODE} to'
                            f' {LOWEST_CODE + CODES - 1}: its weights are too large or too small to be coded')
        encoder.adaptive(np.diff(codes, prepend=0) + CODES, code_contexts(rows), counts.code, 16)
        encoder.matrix(q, counts)
    return encoder.tobytes()


def decode(data, args):
    """Return {name: (integers, codes)} from encode()'s bytes."""
    if len(data) % 4:
        raise UserError(f'the weights section has {len(data)} bytes, expected a multiple of 4; the archive is damaged')
    decoder = Decoder(np.frombuffer(data, '<u4').astype(np.uint32))
    counts = Counts()
    out = {}
    for names, rows, columns, vectors in coding_order(args):
        codes = np.cumsum(decoder.adaptive(code_contexts(rows), counts.code, 16) - CODES)
        if not codes_are_valid(codes):
            raise UserError('the weights section holds a scale out of range; the archive is damaged')
        q = decoder.matrix(rows, columns, counts)
        if vectors:
            out.update({name: (q[i], codes[i]) for i, name in enumerate(names)})
        else:
            out[names[0]] = q, codes
    return out
