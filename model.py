"""The transformer that every script trains, prunes, evaluates and packs; its named sizes, counts and optimiser groups.

Pre-norm decoder: x += attention(norm(x)); x += feed_forward(norm(x)); final norm; head. Options: positions (sinusoidal,
learned, rotary), norm, activation, tied head, bias, QK-norm. Shape legend: B batch, T time, C channels, H heads, D head
width, V vocabulary.
"""
import functools
import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import UserError, at_least, one_of, require

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
        sizes = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'kernel')
        mixer, n_chunks = self.block_type != 'attention', self.block_size // max(self.chunk_size, 1)
        require(*(at_least(k, getattr(self, k), 1) for k in sizes),
                *(at_least(k, getattr(self, k), 0) for k in ('expansion', 'n_layer_encoder', 'bottleneck')),
                one_of('block_type', self.block_type, ('attention', 'mixer', 'multihead_mixer')),
                one_of('wrapper', self.wrapper, ('', 'autoencoder', 'oracle', 'memory')),
                one_of('spread', self.spread, ('repeat', 'unroll')),
                one_of('memory', self.memory, ('token', 'concat', 'add', 'none')),
                (mixer or self.kernel == 1 and not self.expansion, f'kernel = {self.kernel} and expansion ='
                 f' {self.expansion} are of mixers; set block_type'),
                (self.kernel % 2 == 1 and self.kernel <= self.n_embd, f'kernel = {self.kernel}, expected an odd number'
                 f' up to n_embd = {self.n_embd}'),
                (not mixer or self.block_size % 2 == 0, f'block_size = {self.block_size}, a mixer\'s must be even'),
                (not (mixer and self.positions == 'rotary'), 'rotary positions turn the keys of attention, a mixer has'
                 ' none; use positions = none'),
                (not (self.wrapper and self.tied), f'wrapper = {self.wrapper!r} has no tied head; set tied = False'),
                (self.wrapper != 'autoencoder' or self.spread == 'repeat' or self.n_embd % 2 == 0,
                 f'spread = unroll takes half of n_embd = {self.n_embd}, which must be even'),
                (self.wrapper != 'memory' or self.chunk_size > 1 and self.block_size % self.chunk_size == 0
                 and n_chunks > 1, f'chunk_size = {self.chunk_size}: chunks of more than one token must fill block_size'
                 f' = {self.block_size}, two at least'),
                (self.wrapper != 'memory' or not mixer or (self.chunk_size % 2, n_chunks % 2) == (0, 0),
                 f'a mixer\'s length must be even: {n_chunks} chunks of {self.chunk_size} are not both'),
                (self.wrapper != 'memory' or self.memory in ('token', 'none'),
                 f'memory = {self.memory!r} is of wrapper = oracle; use token (one per earlier chunk) or none'),
                (self.n_head < 1 or self.n_embd % self.n_head == 0,
                 f'n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}'),
                (self.positions != 'rotary' or self.n_embd // max(self.n_head, 1) % 2 == 0,
                 f'rotary positions need an even head width, got {self.n_embd} / {self.n_head}'),
                (0 <= self.dropout < 1, f'dropout = {self.dropout}, expected 0 <= dropout < 1'),
                one_of('positions', self.positions, ('sinusoidal', 'learned', 'rotary', 'none')),
                one_of('norm', self.norm, ('layernorm', 'rmsnorm')),
                one_of('activation', self.activation, tuple(ACTIVATIONS)))


N_PLAIN = [*ModelConfig.__dataclass_fields__].index('block_type')       # fields before it are in every model_args


def config_from_knobs(knobs, vocab_size):
    """Build a ModelConfig: the named size, then every knob of it that is set (> 0, or not '')."""
    require(one_of('model', knobs['model'], tuple(SIZES)))
    size = dict(SIZES[knobs['model']])
    size.update({k: knobs[k] for k in size if knobs[k] > 0})
    options = {k: knobs[k] for k in ModelConfig.__dataclass_fields__ if k in knobs and k not in size}
    return ModelConfig(vocab_size=vocab_size, **size, **options)


# --- linear layers and attention, as a CPU computes them fastest ---
# torch multiplies float32 matrices with MKL, which stays at AVX2 on AMD processors: 103 GFLOP/s on one Zen 5 core,
# where oneDNN, which every x86 build of torch holds, reaches 250. And its attention skips masked keys in blocks of 512
# only.
# Both differ from the defaults by rounding alone; neither is used under torch.compile.

ENOUGH, ROWS = 1 << 13, 64              # oneDNN's call takes 13 us: it pays for larger weights and from so many rows
QUERIES, LONGEST = 128, 1024            # queries of a block of attention; up to this length blocks are faster


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
        grad, needed, product = grad.reshape(-1, grad.size(-1)), ctx.needs_input_grad, onednn()
        return (product(grad, weight.t(), None, 'none', [], '').view_as(x) if needed[0] else None,
                product(grad.t(), x.reshape(-1, x.size(-1)).t(), None, 'none', [], '') if needed[1] else None,
                grad.sum(0) if needed[2] else None)


def linear(x, weight, bias=None):
    """F.linear, through oneDNN where that is faster."""
    unfit = weight.numel() <= ENOUGH or x.numel() < ROWS * x.size(-1) or x.size(-1) % 16        # 16: whole vectors
    if unfit or x.device.type != 'cpu' or x.dtype != torch.float32 or onednn() is None \
            or torch.compiler.is_compiling() or torch.is_autocast_enabled('cpu'):
        return F.linear(x, weight, bias)
    return _Product.apply(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


@functools.lru_cache(8)
def _masks(length):
    """For each block of queries but the first, what is added to its scores against the keys up to its own last one."""
    with torch.inference_mode(False):                   # the first to ask may be scoring, the next one training
        seen = torch.zeros(length, length).masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        return [seen[i:i + QUERIES, :i + QUERIES] for i in range(QUERIES, length, QUERIES)]


def causal_attention(q, k, v, dropout=0.0):
    """Attention (B, H, T, D) of each position to itself and those before it; on a CPU in blocks of queries."""
    T = q.size(2)
    if q.device.type != 'cpu' or not QUERIES < T <= LONGEST or dropout or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True)
    found = [F.scaled_dot_product_attention(*(x[:, :, :QUERIES] for x in (q, k, v)), is_causal=True)]
    for i, mask in zip(range(QUERIES, T, QUERIES), _masks(T)):
        stop = i + QUERIES
        found.append(F.scaled_dot_product_attention(q[:, :, i:stop], k[:, :, :stop], v[:, :, :stop], mask.to(q.dtype)))
    return torch.cat(found, 2)


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
        self.n, self.groups, self.kernel = n, groups, kernel
        self.weight = nn.Parameter(torch.empty(groups * kernel * n // 2, n + 1))
        self.bias = nn.Parameter(torch.empty(groups * n)) if bias else None

    def matrices(self):
        """Return the matrices (G, kernel, n, n); [.., i, j] is the weight of position j for position i."""
        return unfold(self.weight.view(self.groups, self.kernel, self.n // 2, self.n + 1))

    def forward(self, x, start=0):
        """Mix x and return the positions from start on."""
        B, G, T, D = x.shape
        weight = self.matrices()[:, :, start:T, :T]
        bias = None if self.bias is None else self.bias.view(G, self.n)[:, start:T]
        if self.kernel > 1:
            y = F.conv1d(x.reshape(B, G * T, D), weight.permute(0, 2, 3, 1).flatten(0, 1),
                         None if bias is None else bias.flatten(), padding=self.kernel // 2, groups=G)
            return y.view(B, G, T - start, D)
        if G == 1:                              # one product for the whole batch: features are its rows
            y = linear(x[:, 0].transpose(1, 2), weight[0, 0], None if bias is None else bias[0])
            return y.transpose(1, 2)[:, None]
        y = weight[:, 0] @ x
        return y if bias is None else y + bias[:, :, None]


class Mixer(nn.Module):
    """What takes attention's place in a block: x (B, T, C) -> (B, T, C).

    With several heads each has its own C/H features of a projection and its own matrix, and a projection follows.
    Expanded by e, each position has e hidden values per feature: mix, GELU, mix, sum.
    """

    def __init__(self, n, width, n_head=1, kernel=1, expansion=0, bias=True):
        super().__init__()
        self.n_head, self.expansion = n_head, expansion
        self.heads, self.proj = (Linear(width, width, bias=bias) if n_head > 1 else None for _ in range(2))
        self.mix = Triangles(n, n_head * max(expansion, 1), kernel, bias)
        self.mix_down = Triangles(n, n_head * expansion, kernel, bias) if expansion else None

    def forward(self, x, cache=None):
        B, T, C = x.shape
        if self.heads:
            x = self.heads(x)
        x = x.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)         # (B, H, T, D)
        if self.expansion:
            x = x.repeat_interleave(self.expansion, 1)
        start = 0
        if cache is not None:                                                   # earlier inputs of the mixings
            start = cache[0].size(2) if cache else 0
            x = torch.cat((cache[0], x), 2) if start else x
            cache[0:1] = [x]
        y = self.mix(x, start)
        if self.expansion:
            y = F.gelu(y)
            if cache is not None:
                y = torch.cat((cache[1], y), 2) if start else y
                cache[1:2] = [y]
            y = self.mix_down(y, start).view(B, self.n_head, self.expansion, T, C // self.n_head).sum(2)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.proj(y) if self.heads else y


# --- the transformer ---

def sinusoids(n_positions, n_embd):
    """Return the (T, C) table of Vaswani et al. 2017 §3.5: sines in even channels, cosines in odd ones."""
    angle = torch.arange(n_positions, dtype=torch.float64)[:, None] * torch.exp(
        torch.arange(0, n_embd, 2, dtype=torch.float64) * (-math.log(10000.0) / n_embd))
    table = torch.zeros(n_positions, n_embd, dtype=torch.float64)
    table[:, 0::2], table[:, 1::2] = angle.sin(), angle.cos()[:, :n_embd // 2]
    return table.float()


def rotary_table(n_positions, head_width):
    """Return the cosine and sine tables (T, D/2) of rotary positions (Su et al. 2021), base 10,000."""
    angle = torch.arange(n_positions, dtype=torch.float64)[:, None] * torch.exp(
        torch.arange(0, head_width, 2, dtype=torch.float64) * (-math.log(10000.0) / head_width))
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    """Rotate the pairs (first half, second half) of x (B, H, T, D) by position; cos, sin (T, D/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).type_as(x)


def make_norm(config, width):
    return nn.LayerNorm(width, bias=config.bias) if config.norm == 'layernorm' else nn.RMSNorm(width, eps=1e-5)


class Attention(nn.Module):
    """Causal multi-head self-attention through SDPA; with a cache it sees the keys and values of earlier calls."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout, self.rotary = config.n_head, config.dropout, config.positions == 'rotary'
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        head_width = config.n_embd // config.n_head
        self.q_norm, self.k_norm = (nn.RMSNorm(head_width, eps=1e-5) if config.qk_norm else nn.Identity() for _ in 'qk')

    def forward(self, x, rope=None, cache=None, mask=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)   # (B, H, T, D) each
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = rotate(q, *rope), rotate(k, *rope)
        causal = mask is None
        if cache is not None:
            if cache:
                k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
                mask, causal = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T), False
            cache[:] = k, v
        dropout = self.dropout if self.training else 0.0
        y = causal_attention(q, k, v, dropout) if causal else F.scaled_dot_product_attention(q, k, v, mask, dropout)
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
        self.norm1 = make_norm(config, config.n_embd)
        if config.block_type == 'attention':
            self.attention = Attention(config)
        else:
            self.mixer = Mixer(config.block_size, config.n_embd, config.n_head if 'multihead' in config.block_type else
                               1, config.kernel, config.expansion, config.bias)
        self.norm2, self.feed_forward = make_norm(config, config.n_embd), FeedForward(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, cache=None, mask=None):
        y = self.norm1(x)
        x = x + self.drop(self.mixer(y, cache) if hasattr(self, 'mixer') else self.attention(y, rope, cache, mask))
        return x + self.drop(self.feed_forward(self.norm2(x)))


class Stack(nn.Module):
    """Embedding, blocks and norm: what a language model and an encoder share."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.position = nn.Embedding(config.block_size, config.n_embd) if config.positions == 'learned' else None
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.recompute = False                  # activation checkpointing: keep a block's input only, run it twice
        self.left_padding = False               # an input of -1 is seen by no position but its own (rows.py)
        self.norm = make_norm(config, config.n_embd) if config.final_norm else nn.Identity()
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
        residual, config = 0.02 / math.sqrt(2 * self.config.n_layer), self.config
        token = 0.02 if config.tied else {'sinusoidal': 0.71, 'none': 1.0}.get(config.positions, 0.02)
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                mixing = (3 * (p.size(1) - 1) * config.kernel) ** -0.5 if name.split('.')[-2].startswith('mix') else 0
                narrow = name.endswith(('proj.weight', 'down.weight'))
                nn.init.normal_(p, 0.0, mixing or (token if name.endswith('embed.weight') else residual if narrow else
                                                   0.02))
            else:
                nn.init.constant_(p, 0.0 if name.endswith('bias') else 1.0)

    def hidden(self, x, cache=None):
        """Return the states after the final norm (B, T, C) for ids (B, T), or for states (B, T, C) in their place.

        cache is a list of one list per block, filled in place.
        """
        start = cache[0][0].size(2) if cache and cache[0] else 0
        stop = start + x.size(1)
        if stop > self.config.block_size:
            raise UserError(f'{stop} positions asked of a model with block_size = {self.config.block_size};'
                            ' use shorter rows')
        mask = rope = None
        if self.left_padding:
            if self.config.block_type != 'attention' or self.config.wrapper:
                raise UserError('rows with hidden padding (control = samecontext) need a plain model with attention')
            seen = torch.ones(stop, stop, dtype=torch.bool, device=x.device).tril() & (x >= 0)[:, None]     # (B, T, T)
            mask = (seen | torch.eye(stop, dtype=torch.bool, device=x.device))[:, None]
            x = x.clamp(min=0)
        h = x if x.is_floating_point() else self.embed(x)
        if self.config.positions == 'sinusoidal':
            h = h + self.sinusoid[start:stop]
        elif self.config.positions == 'learned':
            h = h + self.position.weight[start:stop]
        elif self.config.positions == 'rotary':
            rope = self.cos[start:stop], self.sin[start:stop]
        h = self.drop(h)
        for i, block in enumerate(self.blocks):
            if self.recompute and self.training:
                h = checkpoint(block, h, rope, None, mask, use_reentrant=False)
            else:
                h = block(h, rope, cache[i] if cache else None, mask)
        return self.norm(h)


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
    """A decoder with `encoder`, a stack of its own; encoder_length, decoder_length: positions of each."""

    def __init__(self, config, encoder_length, decoder_length):
        super().__init__(replace(config, block_size=decoder_length, wrapper=''))
        self.config, c = config, config.n_embd
        self.encoder = self.narrow = self.widen = None
        if config.memory != 'none' or config.wrapper == 'autoencoder':
            self.encoder = Stack(replace(config, block_size=encoder_length, wrapper='',
                                         n_layer=config.n_layer_encoder or config.n_layer))
            if config.bottleneck:
                self.narrow = Linear(c, config.bottleneck, bias=config.bias)
                self.widen = Linear(config.bottleneck, c, bias=config.bias)

    def check(self, x):
        """Refuse rows of another length than the model is built for."""
        n = self.config.block_size
        require((x.size(1) == n, f'rows of {x.size(1)} tokens, this model takes {n}: its encoder reads whole rows; use'
                 f' --block_size={n}, or another checkpoint'))
        return x

    def encode(self, x):
        """Return what is left of rows of ids (B, T): a vector (B, C), or (B, bottleneck)."""
        vector = self.encoder.hidden(x)[:, -1]
        return self.narrow(vector) if self.narrow else vector

    def new_cache(self):
        raise UserError(f'wrapper = {self.config.wrapper!r} reads whole rows and cannot generate text token by token')

    def given(self, vector, blind=False):
        """Return the vector as the decoder sees it, (B, C); zeros of its shape where the decoder is to be blind."""
        seen = self.widen(vector) if self.widen else vector
        return torch.zeros_like(seen) if blind else seen


class Autoencoder(WithEncoder):
    """Regenerate the tokens (B, T) of a row from one vector; logits (B, T, V) of the tokens themselves, unshifted.

    The vector becomes T inputs by repetition, or unrolled: position i gets the C/2 features from i mod C on,
    cyclically, through one map C/2 -> C.
    """

    def __init__(self, config):
        super().__init__(config, config.block_size, config.block_size)
        del self.embed                          # the decoder reads no tokens
        self.unroll = Linear(config.n_embd // 2, config.n_embd, bias=config.bias) if config.spread == 'unroll' else None
        self.init_weights()

    def decode(self, vector, y=None, blind=False):
        vector, T, C = self.given(vector, blind), self.config.block_size, self.config.n_embd
        h = vector[:, None].expand(-1, T, -1)
        if self.unroll:
            places = torch.arange(T, device=h.device)[:, None] + torch.arange(C // 2, device=h.device)
            h = self.unroll(vector[:, places % C])
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
        self.join = Linear(2 * config.n_embd, config.n_embd, bias=config.bias) if config.memory == 'concat' else None
        self.init_weights()

    def forward(self, x, y=None, blind=False, whole_rows=True):
        """blind: the memory is empty, what is it worth? whole_rows False: rows may be shorter than the model's."""
        if whole_rows:
            self.check(x)
        h = self.embed(x[:, :-1])
        first = h.new_zeros(len(h), 1, h.size(-1))
        if self.encoder:
            vector = self.given(self.encode(x), blind)[:, None]
            if self.config.memory == 'token':
                first = vector.type_as(h)
            else:
                h = torch.cat((first, h), 1)
                h = h + vector if self.config.memory == 'add' else self.join(torch.cat((h, vector.expand_as(h)), -1))
                return self.scored(self.head(self.hidden(h)), y)
        return self.scored(self.head(self.hidden(torch.cat((first, h), 1))), y)


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
        (B, _), n, L = self.check(x).shape, self.n_chunks, self.config.chunk_size
        chunks = x.reshape(B * n, L)
        h = self.embed(chunks[:, :-1])                                          # (B·n, L - 1, C)
        slots = h.new_zeros(B * n, n - 1, h.size(-1))
        if self.encoder:
            vectors = self.given(self.encode(x[:, :-L].reshape(B * (n - 1), L)), blind).view(B, 1, n - 1, -1)
            past = torch.ones(n, n - 1, dtype=torch.bool, device=x.device).tril(-1)
            slots = (vectors * past[None, :, :, None]).flatten(0, 1).type_as(h)
        logits = self.head(self.hidden(torch.cat((slots, h), 1))[:, n - 2:])    # from the last slot on
        return self.scored(logits.reshape(B, n * L, -1), y)


WRAPPERS = {'autoencoder': Autoencoder, 'oracle': Oracle, 'memory': Memory}


# --- building and counting ---

def make(config):
    """Build the model that a ModelConfig describes, with fresh weights."""
    if config.wrapper:
        return WRAPPERS[config.wrapper](config)
    return GPT(config)


def build(model_args):
    """Build a model from a checkpoint's model_args dict."""
    return make(ModelConfig(**model_args))


def args_of(config):
    """A ModelConfig as a dict for build; what is of mixers and wrappers only where it is not the default."""
    return {k: v for i, (k, v) in enumerate(asdict(config).items())
            if i < N_PLAIN or v != ModelConfig.__dataclass_fields__[k].default}


def model_args(model):
    return args_of(model.config)


def n_parameters(config):
    """Count trainable parameters of a config without allocating them."""
    with torch.device('meta'):
        return sum(p.numel() for p in make(config).parameters())


def flops_per_token(config):
    """Floating-point operations of one training token, forward and backward (Chowdhery et al. 2022, appendix B).

    6 per matrix weight used plus 12·L·C·T for attention scores and values, or 6·L·C·T for each matrix of a mixer, the
    causal half not deducted. An encoder's blocks count like the others; a memory model's see a chunk and its slots.
    """
    c, t, ratio = config.n_embd, config.block_size, 1.0
    if config.wrapper == 'memory':
        t, ratio = config.chunk_size, 1 + (config.block_size // config.chunk_size - 2) / config.chunk_size
    n_matrices = config.kernel * (2 * config.expansion or 1)
    heads = 2 * c * c if config.block_type == 'multihead_mixer' else 0
    mixer = 6 * (8 * c * c + heads + n_matrices * c * t)
    layer = 72 * c * c + 12 * c * t if config.block_type == 'attention' else mixer
    n_layer_encoder = (config.n_layer_encoder or config.n_layer) * bool(config.wrapper and config.memory != 'none')
    return round((config.n_layer * ratio + n_layer_encoder) * layer + 6 * config.vocab_size * c)


def optimizer_groups(params, weight_decay):
    """Split a list of parameters in two AdamW groups: matrices and embeddings decay, biases and norm gains do not."""
    return [dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
            dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
