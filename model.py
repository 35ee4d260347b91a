"""The transformer that every script trains, prunes, evaluates and packs; its named sizes and counts.

Pre-norm decoder: x += attention(norm(x)); x += feed_forward(norm(x)); final norm; head. Options: positions (sinusoidal,
learned, rotary), norm, activation, tied head, bias, QK-norm; a mixer in place of attention; an encoder beside it.

Shapes: B batch, T time, C channels, H heads, D head width, V vocabulary; S positions seen so far, with a cache; of
mixers: n positions, G groups (heads and their expansions).
"""
import functools
import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import UserError, at_least, failed, one_of, refuse, require

SIZES = {                               # arXiv 2505.17469: bytes, feed-forward 4d, untied head, sinusoidal positions
    'transformer200k': dict(n_embd=64, n_head=4, n_layer=4, block_size=2048),
    'transformer800k': dict(n_embd=128, n_head=4, n_layer=4, block_size=2048),
    'transformer3.2m': dict(n_embd=256, n_head=8, n_layer=4, block_size=2048),
    'transformer4.1m': dict(n_embd=256, n_head=8, n_layer=5, block_size=2048),
    'transformer308m': dict(n_embd=1600, n_head=25, n_layer=10, block_size=512),
    # Radford et al. 2019; with positions = 'learned', activation = 'gelu_tanh', tied = True they are GPT-2 itself
    'gpt2': dict(n_embd=768, n_head=12, n_layer=12, block_size=1024),
    'gpt2-medium': dict(n_embd=1024, n_head=16, n_layer=24, block_size=1024),
    'gpt2-large': dict(n_embd=1280, n_head=20, n_layer=36, block_size=1024),
    'gpt2-xl': dict(n_embd=1600, n_head=25, n_layer=48, block_size=1024),
}
ACTIVATIONS = {
    'gelu': F.gelu,
    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),
    'relu2': lambda x: F.relu(x).square(),
}
BYTES = 256                             # the vocabulary of byte data


@dataclass
class ModelConfig:
    block_size: int = 2048
    vocab_size: int = BYTES             # what the data say: no knob
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 64
    positions: str = 'sinusoidal'       # 'sinusoidal', 'learned', 'rotary', 'none'
    norm: str = 'layernorm'             # 'layernorm', 'rmsnorm'
    activation: str = 'gelu'            # 'gelu', 'gelu_tanh', 'relu2'
    tied: bool = False                  # head shares the token embedding
    bias: bool = True
    qk_norm: bool = False
    dropout: float = 0.0
    # what follows is in a checkpoint's model_args only where it differs from this
    block_type: str = 'attention'       # 'attention', 'mixer' (one matrix over the tokens), 'multihead_mixer' (n_head)
    kernel: int = 1                     # mixers: width over the features, odd
    expansion: int = 0                  # mixers: hidden values per position and feature; 0 = one mixing, not two
    final_norm: bool = True
    # an encoder before the decoder
    wrapper: str = ''                   # '' = none, 'autoencoder', 'oracle', 'memory' (of earlier chunks)
    n_layer_encoder: int = 0            # 0 = as n_layer
    bottleneck: int = 0                 # numbers in the encoder's vector; 0 = n_embd
    spread: str = 'repeat'              # autoencoder: 'repeat' or 'unroll' the vector over the positions
    memory: str = 'token'               # oracle: 'token', 'add', 'concat'; 'none' = control without encoder
    chunk_size: int = 0                 # memory: tokens of a chunk

    def __post_init__(self):
        refuse(self._problems())

    def _problems(self):
        """List what is wrong, one message each; a rule must bear values that break the others."""
        problems = failed(
            *(at_least(name, getattr(self, name), 1) for name in MUST_BE_POSITIVE),
            *(at_least(name, getattr(self, name), 0) for name in MAY_BE_ZERO),
            one_of('block_type', self.block_type, ('attention', 'mixer', 'multihead_mixer')),
            one_of('wrapper', self.wrapper, ('', 'autoencoder', 'oracle', 'memory')),
            one_of('spread', self.spread, ('repeat', 'unroll')),
            one_of('memory', self.memory, ('token', 'concat', 'add', 'none')))
        problems += self._problems_of_mixers()
        problems += self._problems_of_wrappers()
        if self.n_head >= 1 and self.n_embd % self.n_head:
            problems.append(f'n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}')
        head_width = self.n_embd // max(self.n_head, 1)
        if self.positions == 'rotary' and head_width % 2:
            problems.append(f'rotary positions need an even head width, got {self.n_embd} / {self.n_head}')
        if not 0 <= self.dropout < 1:
            problems.append(f'dropout = {self.dropout}, expected 0 <= dropout < 1')
        problems += failed(
            one_of('positions', self.positions, ('sinusoidal', 'learned', 'rotary', 'none')),
            one_of('norm', self.norm, ('layernorm', 'rmsnorm')),
            one_of('activation', self.activation, tuple(ACTIVATIONS)))
        return problems

    def _problems_of_mixers(self):
        problems = []
        mixer = self.block_type != 'attention'
        if not mixer and (self.kernel != 1 or self.expansion):
            problems.append(f'kernel = {self.kernel} and expansion = {self.expansion} are of mixers; set block_type')
        if self.kernel % 2 != 1 or self.kernel > self.n_embd:
            problems.append(f'kernel = {self.kernel}, expected an odd number up to n_embd = {self.n_embd}')
        if mixer and self.block_size % 2:
            problems.append(f"block_size = {self.block_size}, a mixer's must be even")
        if mixer and self.positions == 'rotary':
            problems.append('rotary positions turn the keys of attention, a mixer has none; use positions = none')
        return problems

    def _problems_of_wrappers(self):
        problems = []
        if self.wrapper and self.tied:
            problems.append(f'wrapper = {self.wrapper!r} has no tied head; set tied = False')
        if self.wrapper == 'autoencoder' and self.spread != 'repeat' and self.n_embd % 2:
            problems.append(f'spread = unroll takes half of n_embd = {self.n_embd}, which must be even')
        if self.wrapper != 'memory':
            return problems
        n_chunks = self.block_size // max(self.chunk_size, 1)
        if self.chunk_size <= 1 or self.block_size % self.chunk_size or n_chunks <= 1:
            problems.append(f'chunk_size = {self.chunk_size}: chunks of more than one token must fill block_size'
                            f' = {self.block_size}, two at least')
        if self.block_type != 'attention' and (self.chunk_size % 2 or n_chunks % 2):
            problems.append(f"a mixer's length must be even: {n_chunks} chunks of {self.chunk_size} are not both")
        if self.memory not in ('token', 'none'):
            problems.append(f'memory = {self.memory!r} is of wrapper = oracle; use token (one per earlier chunk) or'
                            ' none')
        return problems


MUST_BE_POSITIVE = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'kernel')
MAY_BE_ZERO = ('expansion', 'n_layer_encoder', 'bottleneck')
FIELDS = ModelConfig.__dataclass_fields__
ALWAYS_SAVED = tuple(FIELDS)[:tuple(FIELDS).index('block_type')]        # in every checkpoint's model_args


def config_from_knobs(knobs, vocab_size):
    """Build a ModelConfig: the named size, then every knob of it that is set (> 0, or not '')."""
    require(one_of('model', knobs['model'], tuple(SIZES)))
    size = dict(SIZES[knobs['model']])
    for name in size:
        if knobs[name] > 0:
            size[name] = knobs[name]
    options = {name: knobs[name] for name in FIELDS if name in knobs and name not in size}
    return ModelConfig(vocab_size=vocab_size, **size, **options)


# --- linear layers and attention, as a CPU computes them fastest ---
# torch multiplies float32 matrices with MKL, which stays at AVX2 on AMD processors: 103 GFLOP/s on one Zen 5 core,
# where oneDNN, which every x86 build of torch holds, reaches 250. And its attention skips masked keys in blocks of 512
# only.
# Both differ from the defaults by rounding alone; neither is used under torch.compile.

ENOUGH = 1 << 13                        # oneDNN's call takes 13 us: it pays for weights with more entries than these,
ROWS = 64                               # and from so many rows
QUERIES = 128                           # queries of a block of attention
LONGEST = 1024                          # up to this length blocks are faster


@functools.lru_cache(None)
def onednn():
    """oneDNN's linear layer f(x, weight, bias, 'none', [], ''), or None where it is missing or no faster."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != 'AVX512':
        return None
    return getattr(torch.ops.mkldnn, '_linear_pointwise', None)


class _Product(torch.autograd.Function):
    """x (..., K) times weight (N, K) transposed, plus bias (N,) or None, and its gradients, by three calls."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn()(x, weight, bias, 'none', [], '')

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        x_needed, weight_needed, bias_needed = ctx.needs_input_grad
        product = onednn()
        grad = grad.reshape(-1, grad.size(-1))                          # (rows, N)
        grad_x = grad_weight = grad_bias = None
        if x_needed:
            grad_x = product(grad, weight.t(), None, 'none', [], '').view_as(x)
        if weight_needed:
            rows = x.reshape(-1, x.size(-1))                            # (rows, K)
            grad_weight = product(grad.t(), rows.t(), None, 'none', [], '')
        if bias_needed:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias


def suits_onednn(x, weight):
    """Say whether oneDNN's product is the faster one: large enough, whole vectors of 16, float32, not compiled."""
    if weight.numel() <= ENOUGH or x.numel() < ROWS * x.size(-1) or x.size(-1) % 16:
        return False
    if x.device.type != 'cpu' or x.dtype != torch.float32 or onednn() is None:
        return False
    return not (torch.compiler.is_compiling() or torch.is_autocast_enabled('cpu'))


def linear(x, weight, bias=None):
    """F.linear, through oneDNN where that is faster."""
    if suits_onednn(x, weight):
        return _Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


@functools.lru_cache(8)
def _masks(length):
    """For each block of queries but the first, what is added to its scores against the keys up to its own last one."""
    with torch.inference_mode(False):                   # the first to ask may be scoring, the next one training
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        added = torch.zeros(length, length).masked_fill(later, -torch.inf)
        return [added[i:i + QUERIES, :i + QUERIES] for i in range(QUERIES, length, QUERIES)]


def causal_attention(q, k, v, dropout=0.0):
    """Attention (B, H, T, D) of each position to itself and those before it; on a CPU in blocks of queries."""
    T = q.size(2)
    if q.device.type != 'cpu' or not QUERIES < T <= LONGEST or dropout or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True)
    attention = F.scaled_dot_product_attention
    first = slice(0, QUERIES)
    outputs = [attention(q[:, :, first], k[:, :, first], v[:, :, first], is_causal=True)]
    for start, mask in zip(range(QUERIES, T, QUERIES), _masks(T)):
        stop = start + QUERIES
        outputs.append(attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], mask.to(q.dtype)))
    return torch.cat(outputs, 2)                                        # (B, H, T, D)


def with_earlier(x, cache, i):
    """Return all positions seen so far (B, H, S, D), the new ones x last, and keep them as entry i of a cache.

    cache: list of tensors of one block, filled in place; None, nothing is kept and there is nothing before x.
    """
    if cache is None:
        return x
    if len(cache) > i:
        x = torch.cat((cache[i], x), 2)
    cache[i:i + 1] = [x]
    return x


# --- the masked mixer: causal mixing of tokens by learned matrices instead of attention (Badger, arXiv 2409.01482) ---
# Position i of the output is a weighted sum of positions 0 to i, with weights that do not depend on the input; the
# tokens are the channels of a convolution over the features. Entries above the diagonal are no weights: they are not
# stored.

def unfold(folded):
    """Return the triangles (..., n, n) of folded ones (..., n/2, n + 1), zeros above the diagonal; see Triangles."""
    n = folded.size(-1) - 1
    low = folded[..., :n].flip(-2).tril(n // 2)
    high = folded.flip(-1)[..., :n].tril()
    return torch.cat((high, low), -2)


class Triangles(nn.Module):
    """`groups` mixings of n positions, x (B, G, T, D) -> (B, G, T, D), T <= n: kernel lower triangular matrices each.

    weight (G·kernel·n/2, n + 1): the triangles, folded. Row r of a folded triangle holds row n - 1 - r of the matrix
    from the left and row r from the right, reversed: together n + 1 entries. bias (G·n,): one per position.
    """

    def __init__(self, n, groups=1, kernel=1, bias=True):
        super().__init__()
        self.n = n
        self.groups = groups
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(groups * kernel * n // 2, n + 1))
        self.bias = nn.Parameter(torch.empty(groups * n)) if bias else None

    def matrices(self):
        """Return the matrices (G, kernel, n, n); [.., i, j] is the weight of position j for position i."""
        return unfold(self.weight.view(self.groups, self.kernel, self.n // 2, self.n + 1))

    def forward(self, x, start=0):
        """Mix x and return the positions from start on."""
        T = x.size(2)
        weight = self.matrices()[:, :, start:T, :T]                     # (G, kernel, T - start, T)
        bias = None
        if self.bias is not None:
            bias = self.bias.view(self.groups, self.n)[:, start:T]      # (G, T - start)
        if self.kernel > 1:
            return self._convolved(x, weight, bias)
        if self.groups == 1:
            # One product for the whole batch: the features are its rows.
            features = x[:, 0].transpose(1, 2)                          # (B, D, T)
            y = linear(features, weight[0, 0], None if bias is None else bias[0])
            return y.transpose(1, 2)[:, None]                           # (B, 1, T - start, D)
        y = weight[:, 0] @ x                                            # (B, G, T - start, D)
        if bias is not None:
            y = y + bias[:, :, None]
        return y

    def _convolved(self, x, weight, bias):
        """The positions are the channels, and the kernel moves along the features."""
        B, G, T, D = x.shape
        channels = x.reshape(B, G * T, D)
        filters = weight.permute(0, 2, 3, 1).flatten(0, 1)              # (G·(T - start), T, kernel)
        if bias is not None:
            bias = bias.flatten()
        y = F.conv1d(channels, filters, bias, padding=self.kernel // 2, groups=G)
        return y.view(B, G, -1, D)


class Mixer(nn.Module):
    """What takes attention's place in a block: x (B, T, C) -> (B, T, C).

    With several heads each has its own C/H features of a projection and its own matrix, and a projection follows.
    Expanded by e, each position has e hidden values per feature: mix, GELU, mix, sum.
    """

    def __init__(self, n, width, n_head=1, kernel=1, expansion=0, bias=True):
        super().__init__()
        self.n_head = n_head
        self.expansion = expansion
        self.heads = None
        self.proj = None
        if n_head > 1:
            self.heads = Linear(width, width, bias=bias)
            self.proj = Linear(width, width, bias=bias)
        self.mix = Triangles(n, n_head * max(expansion, 1), kernel, bias)
        self.mix_down = None
        if expansion:
            self.mix_down = Triangles(n, n_head * expansion, kernel, bias)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        H = self.n_head
        D = C // H
        if self.heads:
            x = self.heads(x)
        x = x.view(B, T, H, D).transpose(1, 2)                          # (B, H, T, D)
        if self.expansion:
            x = x.repeat_interleave(self.expansion, 1)                  # (B, G, T, D)

        # A cache keeps the inputs of both mixings, for a mixing reads all earlier ones.
        x = with_earlier(x, cache, 0)                                   # (B, G, S, D)
        start = x.size(2) - T
        y = self.mix(x, start)                                          # (B, G, T, D)
        if self.expansion:
            y = with_earlier(F.gelu(y), cache, 1)
            y = self.mix_down(y, start).view(B, H, self.expansion, T, D).sum(2)
        y = y.transpose(1, 2).reshape(B, T, C)
        if self.heads:
            y = self.proj(y)
        return y


# --- the transformer ---

def angles(n_positions, width):
    """Return position times frequency (T, width/2, rounded up), float64; frequencies fall from 1 to 1/10,000."""
    positions = torch.arange(n_positions, dtype=torch.float64)
    channels = torch.arange(0, width, 2, dtype=torch.float64)
    return positions[:, None] * torch.exp(channels * (-math.log(10000.0) / width))


def sinusoids(n_positions, n_embd):
    """Return the (T, C) table of Vaswani et al. 2017 §3.5: sines in even channels, cosines in odd ones."""
    angle = angles(n_positions, n_embd)
    table = torch.zeros(n_positions, n_embd, dtype=torch.float64)
    table[:, 0::2] = angle.sin()
    table[:, 1::2] = angle.cos()[:, :n_embd // 2]
    return table.float()


def rotary_table(n_positions, head_width):
    """Return the cosine and sine tables (T, D/2) of rotary positions (Su et al. 2021), base 10,000."""
    angle = angles(n_positions, head_width)
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    """Rotate the pairs (first half, second half) of x (B, H, T, D) by position; cos, sin (T, D/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).type_as(x)


def make_norm(config, width):
    if config.norm == 'layernorm':
        return nn.LayerNorm(width, bias=config.bias)
    return nn.RMSNorm(width, eps=1e-5)


class Attention(nn.Module):
    """Causal multi-head self-attention through SDPA; with a cache it sees the keys and values of earlier calls."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.rotary = config.positions == 'rotary'
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm:
            head_width = config.n_embd // config.n_head
            self.q_norm = nn.RMSNorm(head_width, eps=1e-5)
            self.k_norm = nn.RMSNorm(head_width, eps=1e-5)

    def forward(self, x, rope=None, cache=None, mask=None):
        """x (B, T, C) -> (B, T, C). rope: cosines and sines of its positions; mask: who sees whom, None = causal."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, H, T, D) each
        q = self.q_norm(q)
        k = self.k_norm(k)
        if self.rotary:
            q = rotate(q, *rope)
            k = rotate(k, *rope)

        # After earlier calls the queries are the last T of S positions.
        k = with_earlier(k, cache, 0)                                   # (B, H, S, D)
        v = with_earlier(v, cache, 1)
        S = k.size(2)
        if S > T:
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)

        dropout = self.dropout if self.training else 0.0
        if mask is None:
            y = causal_attention(q, k, v, dropout)                      # (B, H, T, D)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.is_mixer = config.block_type != 'attention'
        self.norm1 = make_norm(config, config.n_embd)
        if self.is_mixer:
            n_head = 1
            if config.block_type == 'multihead_mixer':
                n_head = config.n_head
            self.mixer = Mixer(config.block_size, config.n_embd, n_head, config.kernel, config.expansion, config.bias)
        else:
            self.attention = Attention(config)
        self.norm2 = make_norm(config, config.n_embd)
        self.feed_forward = FeedForward(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, cache=None, mask=None):
        y = self.norm1(x)
        if self.is_mixer:
            y = self.mixer(y, cache)
        else:
            y = self.attention(y, rope, cache, mask)
        x = x + self.drop(y)
        return x + self.drop(self.feed_forward(self.norm2(x)))


class Stack(nn.Module):
    """Embedding, blocks and norm: what a language model and an encoder share."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.position = None
        if config.positions == 'learned':
            self.position = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.recompute = False                  # activation checkpointing: keep a block's input only, run it twice
        self.left_padding = False               # an input of -1 is seen by no position but its own (corpus/rows.py)
        self.norm = make_norm(config, config.n_embd) if config.final_norm else nn.Identity()

        # Tables of positions are computed, not saved.
        if config.positions == 'sinusoidal':
            self.register_buffer('sinusoid', sinusoids(config.block_size, config.n_embd), persistent=False)
        if config.positions == 'rotary':
            cos, sin = rotary_table(config.block_size, config.n_embd // config.n_head)
            self.register_buffer('cos', cos, persistent=False)
            self.register_buffer('sin', sin, persistent=False)

    @torch.no_grad()
    def init_weights(self):
        """Draw matrices from N(0, 0.02), residual projections N(0, 0.02/sqrt(2 n_layer)) (GPT-2); biases 0, gains 1.

        With sinusoidal positions the embedding starts at the sinusoids' own root mean square, 0.71, not at 0.02: 35
        times smaller, the tokens would be noise on the position signal after the first norm. Without positions it
        starts at 1, and a mixer's matrices at a convolution's 1/sqrt(3 n kernel), as in Badger's code.
        """
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, 0.0, self._deviation(name, p))
            elif name.endswith('bias'):
                nn.init.constant_(p, 0.0)
            else:
                nn.init.constant_(p, 1.0)

    def _deviation(self, name, p):
        """Standard deviation of the initial weights of a named matrix."""
        layer = name.split('.')[-2]
        if layer in ('mix', 'mix_down'):
            n = p.size(1) - 1
            return (3 * n * self.config.kernel) ** -0.5
        if layer == 'embed':
            return self._deviation_of_tokens()
        if layer in ('proj', 'down'):
            return 0.02 / math.sqrt(2 * self.config.n_layer)
        return 0.02

    def _deviation_of_tokens(self):
        if not self.config.tied and self.config.positions == 'sinusoidal':
            return 0.71
        if not self.config.tied and self.config.positions == 'none':
            return 1.0
        return 0.02

    def hidden(self, x, cache=None):
        """Return the states after the final norm (B, T, C) for ids (B, T), or for states (B, T, C) in their place.

        cache is a list of one list per block, filled in place.
        """
        # Positions go on where the cache ends.
        start = 0
        if cache and cache[0]:
            start = cache[0][0].size(2)
        stop = start + x.size(1)
        if stop > self.config.block_size:
            raise UserError(f'{stop} positions asked of a model with block_size = {self.config.block_size};'
                            ' use shorter rows')

        mask = None
        if self.left_padding:
            mask = self._mask_of_padding(x, stop)                       # (B, 1, T, T)
            x = x.clamp(min=0)
        h = x if x.is_floating_point() else self.embed(x)               # (B, T, C)
        h, rope = self._with_positions(h, start, stop)
        h = self.drop(h)
        caches = cache or [None] * len(self.blocks)
        for block, cache_of_block in zip(self.blocks, caches):
            if self.recompute and self.training:
                h = checkpoint(block, h, rope, None, mask, use_reentrant=False)
            else:
                h = block(h, rope, cache_of_block, mask)
        return self.norm(h)

    def _mask_of_padding(self, x, stop):
        """Return who sees whom, (B, 1, T, T): itself, and earlier positions that are no padding (-1)."""
        if self.config.block_type != 'attention' or self.config.wrapper:
            raise UserError('rows with hidden padding (control = samecontext) need a plain model with attention')
        earlier = torch.ones(stop, stop, dtype=torch.bool, device=x.device).tril()
        itself = torch.eye(stop, dtype=torch.bool, device=x.device)
        seen = earlier & (x >= 0)[:, None]                              # (B, T, T)
        return (seen | itself)[:, None]

    def _with_positions(self, h, start, stop):
        """Return (states with positions added, what rotates keys and queries or None)."""
        positions = self.config.positions
        if positions == 'sinusoidal':
            return h + self.sinusoid[start:stop], None
        if positions == 'learned':
            return h + self.position.weight[start:stop], None
        if positions == 'rotary':
            return h, (self.cos[start:stop], self.sin[start:stop])
        return h, None


class GPT(Stack):
    """Map ids (B, T) to logits (B, T, V), or with targets (B, T) to the summed cross-entropy in nats (-1: no score)."""

    def __init__(self, config):
        super().__init__(config)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.init_weights()

    def forward(self, x, y=None, cache=None):
        return self.scored(self.head(self.hidden(x, cache)), y)

    def scored(self, logits, y):
        """Return logits, or where there are targets y (B, T) their summed cross-entropy."""
        if y is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=-1, reduction='sum')

    def encode(self, x):
        """Return one vector (B, C) for rows of ids (B, T): the state of the last position."""
        return self.hidden(x)[:, -1]

    def new_cache(self):
        """An empty cache for forward(x, cache=...), one list per block."""
        return [[] for _ in self.blocks]


# --- models with an encoder: an autoencoder, a decoder with an oracle's memory, a memory model of chunks ---
# The encoder reads a row and leaves one vector, the state of its last position; a causal decoder, which is the model
# itself, works from it (Badger, arXiv 2511.10618, 2602.13466). These models take the tokens of a row as they are, not
# the ones before them: corpus/objectives.py makes such rows, and rows for copying, of any data set.

class WithEncoder(GPT):
    """A decoder with `encoder`, a stack of its own; encoder_length, decoder_length: positions of each.

    Called with blind=True the decoder gets zeros in the vector's place.
    """

    def __init__(self, config, encoder_length, decoder_length):
        super().__init__(replace(config, block_size=decoder_length, wrapper=''))
        self.config = config
        self.encoder = None
        self.narrow = None                      # C -> bottleneck
        self.widen = None                       # bottleneck -> C
        if config.memory == 'none' and config.wrapper != 'autoencoder':
            return
        n_layer = config.n_layer_encoder or config.n_layer
        self.encoder = Stack(replace(config, block_size=encoder_length, wrapper='', n_layer=n_layer))
        if config.bottleneck:
            self.narrow = Linear(config.n_embd, config.bottleneck, bias=config.bias)
            self.widen = Linear(config.bottleneck, config.n_embd, bias=config.bias)

    def check(self, x):
        """Refuse rows of another length than the model is built for."""
        n = self.config.block_size
        if x.size(1) != n:
            raise UserError(f'rows of {x.size(1)} tokens, this model takes {n}: its encoder reads whole rows; use'
                            f' --block_size={n}, or another checkpoint')
        return x

    def encode(self, x):
        """Return what is left of rows of ids (B, T): a vector (B, C), or (B, bottleneck)."""
        vector = self.encoder.hidden(x)[:, -1]
        if self.narrow:
            vector = self.narrow(vector)
        return vector

    def new_cache(self):
        raise UserError(f'wrapper = {self.config.wrapper!r} reads whole rows and cannot generate text token by token')

    def given(self, vector, blind=False):
        """Return the vector as the decoder sees it, (B, C); zeros of its shape where the decoder is to be blind."""
        if self.widen:
            vector = self.widen(vector)
        if blind:
            vector = torch.zeros_like(vector)
        return vector


class Autoencoder(WithEncoder):
    """Regenerate the tokens (B, T) of a row from one vector; logits (B, T, V) of the tokens themselves, unshifted.

    The vector becomes T inputs by repetition, or unrolled: position i gets the C/2 features from i mod C on,
    cyclically, through one map C/2 -> C.
    """

    def __init__(self, config):
        super().__init__(config, config.block_size, config.block_size)
        del self.embed                          # the decoder reads no tokens
        self.unroll = None
        if config.spread == 'unroll':
            self.unroll = Linear(config.n_embd // 2, config.n_embd, bias=config.bias)
        self.init_weights()

    def decode(self, vector, y=None, blind=False):
        vector = self.given(vector, blind)                              # (B, C)
        T = self.config.block_size
        C = self.config.n_embd
        if self.unroll:
            first = torch.arange(T, device=vector.device)
            offset = torch.arange(C // 2, device=vector.device)
            places = (first[:, None] + offset) % C                      # (T, C/2)
            h = self.unroll(vector[:, places])                          # (B, T, C)
        else:
            h = vector[:, None].expand(-1, T, -1)
        return self.scored(self.head(self.hidden(h)), y)

    def forward(self, x, y=None, blind=False):
        return self.decode(self.encode(self.check(x)), y, blind)


class Oracle(WithEncoder):
    """A language model of tokens (B, T) that is given a vector of the very row: how much of it can a vector hold?

    memory: 'token', an input before the first; 'add', added to every input; 'concat', beside every input, through a map
    2C -> C; 'none', the control.
    """

    def __init__(self, config):
        super().__init__(config, config.block_size, config.block_size)
        self.join = None
        if config.memory == 'concat':
            self.join = Linear(2 * config.n_embd, config.n_embd, bias=config.bias)
        self.init_weights()

    def forward(self, x, y=None, blind=False, whole_rows=True):
        """blind: the memory is empty, what is it worth? whole_rows False: rows may be shorter than the model's."""
        if whole_rows:
            self.check(x)
        memory = self.config.memory
        h = self.embed(x[:, :-1])                                       # (B, T - 1, C)
        first = h.new_zeros(len(h), 1, h.size(-1))                      # (B, 1, C)
        if memory != 'none':
            vector = self.given(self.encode(x), blind)[:, None]         # (B, 1, C)
        if memory == 'token':
            first = vector.type_as(h)
        h = torch.cat((first, h), 1)                                    # (B, T, C)
        if memory == 'add':
            h = h + vector
        if memory == 'concat':
            h = self.join(torch.cat((h, vector.expand_as(h)), -1))
        return self.scored(self.head(self.hidden(h)), y)


class Memory(WithEncoder):
    """A language model of chunks of tokens that remembers each earlier chunk of its row as one vector, in a fixed slot.

    A chunk's decoder sees n_chunks - 1 slots, empty (0) where the chunk is not yet past, then its own tokens but the
    last; the state before each token predicts it, the last slot's the first. memory 'none': all slots are empty.
    """

    def __init__(self, config):
        self.n_chunks = config.block_size // config.chunk_size
        super().__init__(config, config.chunk_size, config.chunk_size + self.n_chunks - 2)
        self.init_weights()

    def forward(self, x, y=None, blind=False):
        B = len(self.check(x))
        n = self.n_chunks
        L = self.config.chunk_size
        chunks = x.reshape(B * n, L)
        h = self.embed(chunks[:, :-1])                                  # (B·n, L - 1, C)
        slots = h.new_zeros(B * n, n - 1, h.size(-1))
        if self.encoder:
            slots = self._slots(x, blind).type_as(h)
        h = self.hidden(torch.cat((slots, h), 1))                       # (B·n, n - 1 + L - 1, C)
        logits = self.head(h[:, n - 2:])                                # (B·n, L, V): from the last slot on
        return self.scored(logits.reshape(B, n * L, -1), y)

    def _slots(self, x, blind):
        """Return each chunk's slots (B·n, n - 1, C): the vectors of the chunks that are past, 0 for the others."""
        B = len(x)
        n = self.n_chunks
        L = self.config.chunk_size
        chunks = x[:, :-L].reshape(B * (n - 1), L)                      # the last one is remembered by none
        vectors = self.given(self.encode(chunks), blind).view(B, 1, n - 1, -1)
        past = torch.ones(n, n - 1, dtype=torch.bool, device=x.device).tril(-1)
        return (vectors * past[None, :, :, None]).flatten(0, 1)


# --- building and counting ---

KINDS = {'': GPT, 'autoencoder': Autoencoder, 'oracle': Oracle, 'memory': Memory}       # by ModelConfig.wrapper


def make(config):
    """Build the model that a ModelConfig describes, with fresh weights."""
    return KINDS[config.wrapper](config)


def build(model_args):
    """Build a model from a checkpoint's model_args dict."""
    return make(ModelConfig(**model_args))


def args_of(config):
    """A ModelConfig as a dict for build; what is of mixers and wrappers only where it is not the default."""
    args = {}
    for name, value in asdict(config).items():
        if name in ALWAYS_SAVED or value != FIELDS[name].default:
            args[name] = value
    return args


def model_args(model):
    return args_of(model.config)


def n_parameters(config):
    """Count trainable parameters of a config without allocating them."""
    with torch.device('meta'):
        model = make(config)
    return sum(p.numel() for p in model.parameters())


def flops_per_token(config):
    """Floating-point operations of one training token, forward and backward (Chowdhery et al. 2022, appendix B).

    6 per matrix weight used plus 12·L·C·T for attention scores and values, or 6·L·C·T for each matrix of a mixer, the
    causal half not deducted. An encoder's blocks count like the others; a memory model's see a chunk and its slots.
    """
    T = config.block_size
    positions_per_token = 1.0
    if config.wrapper == 'memory':
        T = config.chunk_size
        n_chunks = config.block_size // config.chunk_size
        positions_per_token = 1 + (n_chunks - 2) / config.chunk_size
    n_layer_encoder = 0
    if config.wrapper and config.memory != 'none':
        n_layer_encoder = config.n_layer_encoder or config.n_layer
    n_layers = config.n_layer * positions_per_token + n_layer_encoder
    head = 6 * config.vocab_size * config.n_embd
    return round(n_layers * flops_per_block(config, T) + head)


def flops_per_block(config, T):
    """Floating-point operations of one block for one of T positions, forward and backward."""
    C = config.n_embd
    if config.block_type == 'attention':
        return 72 * C * C + 12 * C * T
    feed_forward = 8 * C * C
    projections = 0
    if config.block_type == 'multihead_mixer':
        projections = 2 * C * C
    n_matrices = config.kernel * (2 * config.expansion or 1)
    return 6 * (feed_forward + projections + n_matrices * C * T)
