"""The integer model of a two-part archive: made of a checkpoint for one file, or read from the archive.

Shapes: N rows of the file, T positions of a row.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from codec import exact, weights
from codec.container import DAMAGED
from codec.progress import say
from codec.streams import StreamCoder, arithmetic_hash
from configurator import UserError
from model import ModelConfig, build

MAX_STREAMS = 4096                              # of an archive that is read
MAX_CACHE_BYTES = 64 << 30                      # likewise, while it is decoded
GOOD_STREAMS = 256                              # at most, where pack chooses
GOOD_CACHE_BYTES = 4 << 30
SITE_ROWS = 16                                  # rows on which the ranges of activations are measured


# --- from a checkpoint ---

class Rows(NamedTuple):
    """Inputs and targets (N, T) int64 of rows of a file."""
    x: np.ndarray
    y: np.ndarray


def rows_of(ids, start_id, size, n_rows):
    """Return up to n_rows Rows of size T spread over ids; every target has its true predecessor."""
    size = min(size, len(ids))
    n = min(n_rows, len(ids) // size)
    starts = np.zeros(n, np.int64)
    if n > 1:
        starts = np.arange(n) * ((len(ids) - size) // (n - 1))
    both = np.concatenate(([start_id], ids)).astype(np.int64)
    places = starts[:, None] + np.arange(size)
    return Rows(both[places], both[places + 1])


def float_bits(model, rows):
    """Bits per position (T,) of a GPT on Rows, averaged over rows."""
    total = 0
    with torch.inference_mode():
        for x, y in zip(torch.from_numpy(rows.x).split(8), torch.from_numpy(rows.y).split(8)):
            nats = F.cross_entropy(model(x).transpose(1, 2), y, reduction='none')
            total = total + nats.double().sum(0)
    return (total / (math.log(2) * len(rows.x))).numpy()


class WeightSearch:
    """The weights of a GPT, and how many bytes they and a file take when they are rounded at some rate."""

    def __init__(self, model, checkpoint, text, n_rows):
        self.model = model
        self.args = checkpoint['model_args']
        self.n_symbols = len(text.ids)
        self.folded = weights.fold(checkpoint['model'], self.args)
        broken = [name for name, w in self.folded.items() if not np.isfinite(w).all()]
        if broken:
            raise UserError(f'{broken[0]} of the checkpoint is not finite; use an older checkpoint')
        weights.load_folded(model, self.folded)
        self.rows = rows_of(text.ids, text.start_id, self.args['block_size'], n_rows)
        self.bits_before = float_bits(model, self.rows).mean()
        self.fisher = weights.fisher_information(model, *self.rows)

        # Rows of the embedding that no symbol of this file ever looks up need not be kept.
        if not self.args['tied']:
            used = np.zeros(self.args['vocab_size'], bool)
            used[np.append(text.ids, text.start_id)] = True
            self.folded['embed.weight'][~used] = 0

        # Matrices that were trained on a grid keep it.
        grid = checkpoint.get('grid') or {}
        self.trained = {name: codes.numpy() for name, codes in grid.items()}

    def at(self, rate):
        """Return (tensors, their bytes) of weights that are quantised at a rate."""
        tensors = weights.quantise(self.folded, self.fisher, rate, self.trained)
        return tensors, weights.encode(tensors, self.args)

    def bits_with(self, tensors):
        """Return the bits per symbol at each position (T,) of quantised weights, which the model then holds."""
        weights.load_folded(self.model, weights.values(tensors))
        return float_bits(self.model, self.rows)

    def total_bits(self, rate):
        """Estimate the bits of weights and file together at a rate."""
        tensors, section = self.at(rate)
        return 8 * len(section) + self.n_symbols * self.bits_with(tensors).mean()

    def cheapest(self):
        """Walk downhill over the rate, with ever smaller steps; returns (tensors, their bytes) at the best."""
        rate = 1 / self.n_symbols
        costs = {}
        for step in (4, 2, 2 ** 0.5):
            while True:
                neighbours = (rate, rate * step, rate / step)
                for r in neighbours:
                    if r not in costs:
                        costs[r] = self.total_bits(r)
                best = min(neighbours, key=costs.get)
                if best == rate:
                    break
                rate = best
        return self.at(rate)

    def choose(self, bits_per_nonzero):
        """Quantise with so many bits per non-zero weight, or 0: with the fewest bytes in all."""
        if bits_per_nonzero:
            return weights.quantise_to(self.folded, self.fisher, self.args, bits_per_nonzero)
        return self.cheapest()


class Quantised(NamedTuple):
    """A model that has been quantised for a file."""
    tensors: dict                               # as weights.encode takes them
    section: bytes                              # the wght section
    rows: Rows                                  # of the file, on which all this was measured
    position_bits: np.ndarray                   # bits per symbol at each position (T,) of a row


def quantise(checkpoint, args, text, options):
    """Quantise a checkpoint's model for a text, and say what came out. Returns Quantised."""
    # Sums of floats choose the steps: they are made on one thread, so that they are the same whatever the machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    search = WeightSearch(build(args).eval(), checkpoint, text, options.sample_rows)
    nonzero = sum(int(np.count_nonzero(w)) for w in search.folded.values())
    tensors, section = search.choose(options.weight_bits)
    position_bits = search.bits_with(tensors)
    torch.set_num_threads(options.threads or before)

    bits_per_nonzero = 8 * len(section) / max(nonzero, 1)
    say(f'weights: {len(section):,} bytes, {bits_per_nonzero:.3f} bits per non-zero ({nonzero:,}); '
        f'sample {search.bits_before:.4f} -> {position_bits.mean():.4f} bits per symbol', options.progress)
    return Quantised(tensors, section, search.rows, position_bits)


def integers_of(args, quantised, options):
    """Return (exact model, its sites, its wide flags), and say how well the integers fit."""
    tensors = weights.with_scales(quantised.tensors)
    x = quantised.rows.x[:SITE_ROWS]
    sites, wide = exact.fit_sites(args, tensors, x)
    model = exact.Exact(args, tensors, sites, wide, options.device)
    seen = exact.observe(model, x)
    say(f'integer model: {100 * seen.n_clamped / seen.n_rounded:.4f} % of activations clamped, '
        f'{sum(wide)} of {len(wide)} products in float64', options.progress)
    return model, sites, wide


# --- how many streams ---

def cache_bytes(args, n_streams, bytes_per_value):
    """Bytes of what decoding keeps of n_streams windows."""
    values = 1
    if args.get('block_type', 'attention') == 'attention':
        values += 1
    elif args.get('expansion', 0):
        values += args['expansion']
    return bytes_per_value * values * n_streams * args['block_size'] * args['n_embd'] * args['n_layer']


def choose_streams(n, position_bits, args, keep):
    """Streams whose starts without context cost about 1 % of n symbols' code; at most 256, and 4 GB of cache."""
    late = position_bits[min(keep, len(position_bits) // 2):].mean()
    start_bits = max(24.0, float((position_bits[:keep] - late).sum()))           # noisy; 14 measured on a 230k model
    affordable = int(0.01 * n * late / start_bits)
    fitting = GOOD_CACHE_BYTES // cache_bytes(args, 1, 4)
    return max(1, min(GOOD_STREAMS, affordable, fitting))


class Fitted(NamedTuple):
    """What a file is coded with, and what its archive must hold so that it decodes."""
    coder: StreamCoder
    settings: dict                              # for the head
    section: bytes                              # wght


def fit(checkpoint, text, options):
    """Make the coder of a twopart.Text from a checkpoint's model. options: twopart.Packing. Returns Fitted."""
    args = dict(checkpoint['model_args'], dropout=0.0)
    quantised = quantise(checkpoint, args, text, options)
    model, sites, wide = integers_of(args, quantised, options)
    keep = min(options.keep or max(1, args['block_size'] // 2), args['block_size'])
    n_streams = options.streams or choose_streams(len(text.ids), quantised.position_bits, args, keep)
    settings = dict(args=args, start_id=text.start_id, tokenizer=text.tokenizer, streams=n_streams, keep=keep,
                    sites=sites, wide=wide, arithmetic=arithmetic_hash(args))
    return Fitted(StreamCoder(model, n_streams, keep, text.start_id), settings, quantised.section)


# --- from an archive ---

def load_model(head, sections, device='cpu', threads=0):
    """Build the integer model of an archive; a shape that its weights cannot fill is refused before memory is taken."""
    args = head['args']
    n_streams = head['streams']
    ModelConfig(**args)
    small = max(args['n_layer'], args['n_embd'], args.get('expansion', 0)) < 1 << 16
    n_weights = weights.count(args) if small else math.inf
    cache = cache_bytes(args, n_streams, 8)
    if n_weights > 4096 * len(sections['wght']) + 1e6 or cache > MAX_CACHE_BYTES or not 0 < n_streams <= MAX_STREAMS:
        raise UserError(f'the header asks for {n_weights:,} weights, {cache:,} bytes of cache: more than it can need')
    if not 0 < head['keep'] <= args['block_size']:
        raise UserError(f'the header has keep = {head["keep"]}, expected 1 to {args["block_size"]}; {DAMAGED}')
    here = arithmetic_hash(args)
    if head['arithmetic'] != here:
        raise UserError(f'tables and coder hash to {here} here, to {head["arithmetic"]} where it was '
                        'packed; install the versions of requirements.txt')
    if threads:
        torch.set_num_threads(threads)
    tensors = weights.with_scales(weights.decode(sections['wght'], args))
    return exact.Exact(args, tensors, head['sites'], head['wide'], device)


def coder_of(archive, options):
    """Return the StreamCoder that decodes an archive's blocks. options: twopart.Unpacking."""
    head = archive.head
    model = load_model(head, archive.sections, options.device, options.threads)
    return StreamCoder(model, head['streams'], head['keep'], head['start_id'], options.streams_at_once)
