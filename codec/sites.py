"""Where the integer model rounds, at which scale, and under which bounds its sums stay exact.

A site is a place where activations become integers: value times a scale, rounded and clamped. An archive holds the
scale of every site and, for every product, whether it runs in float64. Their order is part of the format; it is written
down once, as the tables of Site below.

In: a model's args, its quantised weights, and what its sites saw on sample tokens. Out: codes of scales, and flags.
"""
import math
from typing import NamedTuple

import numpy as np
import torch

from codec.tables import ACTIVATION_ENTRIES
from configurator import UserError
from model import unfold

FLOAT64_BITS = 53                               # of the mantissa: integers below 2^53 are exact
FLOAT32_BITS = 24
WIDE_LIMIT = 1 << 20                            # clamp of activations whose matrix product runs in float64
LIMB_LIMIT = 63 * 128 + 63                      # clamp of the others: two limbs of [-64, 63] in base 128 hold it
FINEST = 4096                                   # steps that a wide product gives a root mean square
COARSEST = 24                                   # steps that a product in float32 must give it
MARGIN = 1.25                                   # room above the largest value that sample tokens showed
TINY = 1e-9                                     # in place of a magnitude of 0


# --- the format: sites and products in their order ---

class Site(NamedTuple):
    """A place where a block rounds, and the product whose flag stands at this place in the archive ('' for none)."""
    name: str           # x: a norm's input; a: its output; q, k, v, o: around attention or mixing; u, d: feed-forward
    bounded_by: str     # what its integers go into: 'norm', 'matrix', 'triangles', 'attention' or 'activation'
    product: str = ''   # as the weights' name has it: 'feed_forward.up' of 'blocks.0.feed_forward.up.weight'


FEED_FORWARD_SITES = (
    Site('x2', 'norm'),
    Site('a2', 'matrix', 'feed_forward.up'),
    Site('u', 'activation'),
    Site('d', 'matrix', 'feed_forward.down'))
ATTENTION_SITES = (
    Site('x1', 'norm'),
    Site('a1', 'matrix', 'attention.qkv'),
    Site('q', 'attention', 'attention'),        # one flag for both products of attention
    Site('k', 'attention'),
    Site('v', 'attention'),
    Site('o', 'matrix', 'attention.proj'),
    *FEED_FORWARD_SITES)
EXPANSION_SITES = (
    Site('vu', 'activation'),
    Site('vd', 'triangles', 'mixer.mix_down'))
MIXED_SITE = Site('v', 'triangles', 'mixer.mix')
HEAD_NORM_SITE = Site('x', 'norm')
HEAD_SITE = Site('a', 'matrix', 'head')


def block_sites(args):
    """Return the sites of a block of a model with these args, in the archive's order."""
    kind = args.get('block_type', 'attention')
    if kind == 'attention':
        return ATTENTION_SITES
    mixed = (MIXED_SITE, *EXPANSION_SITES) if args.get('expansion') else (MIXED_SITE,)
    if kind == 'mixer':
        return (Site('x1', 'norm'), *mixed, *FEED_FORWARD_SITES)
    return (Site('x1', 'norm'), Site('a1', 'matrix', 'mixer.heads'), *mixed, Site('o', 'matrix', 'mixer.proj'),
            *FEED_FORWARD_SITES)


def head_sites(args):
    """Return the sites after the last block."""
    return (HEAD_NORM_SITE, HEAD_SITE) if args.get('final_norm', True) else (HEAD_SITE,)


def layout(args):
    """Yield the sites of each block in turn, then those of the head."""
    for _ in range(args['n_layer']):
        yield block_sites(args)
    yield head_sites(args)


class Settings(NamedTuple):
    """What an archive says about a block, or about the head."""
    scale: dict         # of a site, by its name
    wide: dict          # whether a product runs in float64, by its name


def named(args, codes, flags):
    """Give the archive's flat lists of scale codes and flags their names; returns Settings per block, the head's last.

    ValueError if the lists are too short for the model.
    """
    all_sites = list(layout(args))
    n_sites = sum(len(sites) for sites in all_sites)
    n_products = sum(bool(site.product) for sites in all_sites for site in sites)
    if len(codes) < n_sites or len(flags) < n_products:
        raise ValueError(f'{len(codes)} scales and {len(flags)} flags for a model of {n_sites} and {n_products}')
    codes = iter(codes)
    flags = iter(flags)
    out = []
    for sites in all_sites:
        scale = {site.name: scale_of(next(codes)) for site in sites}
        wide = {site.product: bool(next(flags)) for site in sites if site.product}
        out.append(Settings(scale, wide))
    return out


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


# --- bounds ---

def norm_bits(width):
    """Bits of a norm's input: its squared deviations, one bit wider, sum over width below 2^53."""
    return (FLOAT64_BITS - math.ceil(math.log2(width))) // 2 - 1


class AttentionLimits(NamedTuple):
    """Clamps of what enters attention, and the total that its integer weights are brought to."""
    query_key: int
    value: int
    total: int


def attention_limits(wide, head_width, block_size):
    """Return the AttentionLimits under which its sums stay below 2^24, or 2^53 if wide.

    Weights w_t = round(p_t·total/sum p) sum to at most total + W/2 + 2, so |sum w_t v_t| <= (total + W/2 + 2)·clamp.
    """
    if wide:
        return AttentionLimits(WIDE_LIMIT, WIDE_LIMIT, 1 << 24)
    largest = (1 << FLOAT32_BITS) - 1
    total = 1 << 14
    return AttentionLimits(math.isqrt(largest // head_width), largest // (total + block_size // 2 + 2), total)


def product_limit(q, wide):
    """Clamp of activations a that keeps partial sums of q @ a exact, q integers (out, in); UserError if none does."""
    largest = max(1, int(np.abs(q.astype(np.int64)).sum(1).max()))
    if largest * WIDE_LIMIT >= 1 << FLOAT64_BITS:
        raise UserError(f'a row\'s weights sum to {largest}: times {WIDE_LIMIT} float64 is not exact; use fewer bits')
    if wide:
        return WIDE_LIMIT
    return min(LIMB_LIMIT, max(1, ((1 << FLOAT32_BITS) - 1) // largest))


def triangles(q, n):
    """Unfold a mixer's folded triangles (model.Triangles), (G·n/2, n + 1) -> (G, n, n)."""
    return unfold(torch.from_numpy(q).reshape(-1, n // 2, n + 1)).numpy()


def head_weight(args):
    """Name of the matrix that makes logits."""
    return 'embed.weight' if args['tied'] else 'head.weight'


# --- choosing scales ---

REFERENCE_CODES = dict(a1=48, q=40, k=40, v=40, o=40, a2=48, u=24, d=40, vu=24, vd=40, a=48)


def reference_sites(args):
    """Sites for the first look at a model: everything in float64 with wide ranges; returns (codes, wide flags)."""
    of_a_norm = 4 * (norm_bits(args['n_embd']) - 13)
    codes = []
    flags = []
    for sites in layout(args):
        codes += [of_a_norm if site.bounded_by == 'norm' else REFERENCE_CODES[site.name] for site in sites]
        flags += [1 for site in sites if site.product]
    return codes, flags


class Seen(NamedTuple):
    """What a site saw: the largest magnitude, with a margin, and the root mean square."""
    largest: float
    rms: float


def _seen_at(site, seen):
    magnitude, mean_square, *_ = seen[site]
    return Seen(MARGIN * magnitude + TINY, math.sqrt(mean_square) + TINY)


def _choose_product(q, at, all_wide):
    """Return (scale code, flag) for the input of a product with integers q (out, in)."""
    narrow_scale = product_limit(q, False) / at.largest
    if all_wide or narrow_scale * at.rms < COARSEST:
        return code_below(min(WIDE_LIMIT / 2 / at.largest, FINEST / at.rms)), 1
    return code_below(narrow_scale), 0


def _choose_attention(limit, at, wide):
    """Return the scale code of queries, keys or values."""
    if wide:
        return code_below(min(limit / at.largest, FINEST / at.largest))
    return code_below(limit / at.largest)


def _choose_block(args, tensors, seen, i, all_wide):
    """Return (scale codes, flags) of block i; for the arguments see choose_sites."""
    codes = []
    flags = []
    for site in block_sites(args):
        at = _seen_at(f'{i}.{site.name}', seen)
        if site.bounded_by == 'norm':
            codes.append(code_below(2 ** norm_bits(args['n_embd']) / (4 * at.largest)))
        elif site.bounded_by == 'activation':
            octaves = math.floor(math.log2(ACTIVATION_ENTRIES / 2 / at.largest))
            codes.append(4 * max(-4, min(9, octaves)))
        elif site.bounded_by == 'attention':
            if site.product:
                flags.append(int(all_wide))
            limits = attention_limits(flags[-1], args['n_embd'] // args['n_head'], args['block_size'])
            limit = limits.value if site.name == 'v' else limits.query_key
            codes.append(_choose_attention(limit, at, flags[-1]))
        else:
            q = tensors[f'blocks.{i}.{site.product}.weight'][0]
            if site.bounded_by == 'triangles':
                q = triangles(q, args['block_size']).reshape(-1, args['block_size'])
            code, flag = _choose_product(q, at, all_wide)
            codes.append(code)
            flags.append(flag)
    return codes, flags


def choose_sites(args, tensors, seen, all_wide=False):
    """Choose scale codes and wide flags from what a reference model saw: {site: [largest magnitude, mean square]}.

    tensors: {name: (integers, scales)}. A product runs in float32 if its clamped activations still resolve a 24th of
    their root mean square.
    """
    codes = []
    flags = []
    for i in range(args['n_layer']):
        block_codes, block_flags = _choose_block(args, tensors, seen, i, all_wide)
        codes += block_codes
        flags += block_flags
    if HEAD_NORM_SITE in head_sites(args):
        codes.append(code_below(2 ** norm_bits(args['n_embd']) / (5 * seen['x'][0] + TINY)))
    code, flag = _choose_product(tensors[head_weight(args)][0], _seen_at('a', seen), all_wide)
    return codes + [code], flags + [flag]
