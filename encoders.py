"""Models with an encoder: an autoencoder, a decoder with an oracle's memory, and a memory model of chunks.

The encoder reads a row and leaves one vector, the state of its last position; a causal decoder, which is the model
itself, works from it (Badger, arXiv 2511.10618, 2602.13466). These models take the tokens of a row as they are, not the
ones before them: Objective makes such rows, and rows for copying, of any data set.
"""
from dataclasses import replace

import numpy as np
import torch

from configurator import UserError, one_of, require
from cpu import Linear
from model import GPT, Stack


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

    def given(self, vector):
        """The vector as the decoder sees it, (B, C)."""
        return self.widen(vector) if self.widen else vector


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

    def decode(self, vector, y=None):
        vector, T, C = self.given(vector), self.config.block_size, self.config.n_embd
        h = vector[:, None].expand(-1, T, -1)
        if self.unroll:
            places = torch.arange(T, device=h.device)[:, None] + torch.arange(C // 2, device=h.device)
            h = self.unroll(vector[:, places % C])
        return self.scored(self.head(self.hidden(h)), y)

    def forward(self, x, y=None):
        return self.decode(self.encode(self.check(x)), y)


class Oracle(WithEncoder):
    """A language model of tokens (B, T) that is given a vector of the very row: how much of it can a vector hold?

    memory: 'token', an input before the first; 'add', added to every input; 'concat', beside every input, through a map
    2C -> C; 'none', the control.
    """

    def __init__(self, config):
        super().__init__(config, config.block_size, config.block_size)
        self.join = Linear(2 * config.n_embd, config.n_embd, bias=config.bias) if config.memory == 'concat' else None
        self.init_weights()

    def forward(self, x, y=None):
        h = self.embed(self.check(x)[:, :-1])
        first = h.new_zeros(len(h), 1, h.size(-1))
        if self.encoder:
            vector = self.given(self.encode(x))[:, None]
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

    def forward(self, x, y=None):
        (B, _), n, L = self.check(x).shape, self.n_chunks, self.config.chunk_size
        chunks = x.reshape(B * n, L)
        h = self.embed(chunks[:, :-1])                                          # (B·n, L - 1, C)
        slots = h.new_zeros(B * n, n - 1, h.size(-1))
        if self.encoder:
            vectors = self.given(self.encode(x[:, :-L].reshape(B * (n - 1), L))).view(B, 1, n - 1, -1)
            past = torch.ones(n, n - 1, dtype=torch.bool, device=x.device).tril(-1)
            slots = (vectors * past[None, :, :, None]).flatten(0, 1).type_as(h)
        logits = self.head(self.hidden(torch.cat((slots, h), 1))[:, n - 2:])    # from the last slot on
        return self.scored(logits.reshape(B, n * L, -1), y)


WRAPPERS = {'autoencoder': Autoencoder, 'oracle': Oracle, 'memory': Memory}
OBJECTIVES = {'': ('clm', 'copy', 'blank_copy', 'combined'), 'autoencoder': ('autoencode',), 'oracle': ('memory',),
              'memory': ('memory', 'copy', 'blank_copy', 'combined')}


def objective_rule(objective, config):
    """For require(): does this objective fit a ModelConfig?"""
    return one_of(f'objective of wrapper = {config.wrapper!r}', objective, OBJECTIVES[config.wrapper])


def load_encoder(model, path):
    """Copy the encoder of a checkpoint, or a plain model without its head, into a model's encoder."""
    import runs
    require((getattr(model, 'encoder', None) is not None, f'encoder_ckpt = {path!r}: this model has no encoder'))
    checkpoint, mine = runs.load_checkpoint(path), model.encoder.state_dict()
    args, prefix = checkpoint['model_args'], 'encoder.' if checkpoint['model_args'].get('wrapper') else ''
    theirs = {n.removeprefix(prefix): t for n, t in checkpoint['model'].items()
              if n.startswith(prefix) and not n.startswith('head.')}
    if args['n_embd'] != model.config.n_embd:
        raise UserError(f'{path} holds an encoder of width {args["n_embd"]}, this model has n_embd ='
                        f' {model.config.n_embd}; they must be the same')
    shapes, expected = ({n: t.shape for n, t in state.items()} for state in (theirs, mine))
    if shapes != expected:
        strange = min(set(shapes.items()) ^ set(expected.items()))[0]
        raise UserError(f'{path} holds an encoder of another shape ({strange}); use its n_layer (as n_layer_encoder),'
                        ' block_type and length')
    model.encoder.load_state_dict(theirs)


class Objective:
    """A data set whose rows are those of an objective; everything but them is the data set's own.

    copy: the second half of a row repeats the first and is what is scored; blank_copy: and its inputs are blank, the
    start id; combined: every second row is copied, the others predict as ever.
    """

    def __init__(self, data, objective, wrapper):
        self.data, self.objective, self.wrapper = data, objective, wrapper

    def __getattr__(self, name):
        return getattr(self.data, name)

    def head(self, n_tokens):
        return Objective(self.data.head(n_tokens), self.objective, self.wrapper)

    def gather(self, starts, length):
        """Return inputs and targets as the data set's gather does."""
        x, y = self.data.gather(starts, length)
        tokens = np.concatenate((x[:, 1:], np.maximum(y[:, -1:], 0)), 1)
        if self.objective in ('copy', 'blank_copy', 'combined'):
            half = length // 2
            chosen = np.asarray(starts) // length % 2 == 0 if self.objective == 'combined' else np.full(len(x), True)
            twice = np.concatenate((tokens[:, :half], tokens[:, :half]), 1)[:, :length]
            tokens = np.where(chosen[:, None], twice, tokens)
            target = np.concatenate((np.full_like(y[:, :half], -1), y[:, :half]), 1)
            y = np.where(chosen[:, None], target, y)
            if self.objective == 'blank_copy':
                tokens[:, half:] = self.data.start_id
            x = np.concatenate((x[:, :1], tokens[:, :-1]), 1)
        return (tokens if self.wrapper else x), y

    def n_scored(self, starts, length):
        """Count the targets that gather would score."""
        return int((self.gather(starts, length)[1] >= 0).sum())


def with_objective(data, objective, wrapper):
    """Return data as it is for plain language modelling, else with the objective's rows."""
    return Objective(data, objective, wrapper) if wrapper or objective != 'clm' else data
