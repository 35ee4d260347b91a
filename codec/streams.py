"""A block of symbols in S streams side by side: one model call serves them all, one range coder takes their symbols.

Each stream is a piece of the block, and the model sees what came before in that stream alone. Coding knows all symbols
and runs a window at a time, decoding runs a step at a time; the model's integers make both the same.

Shapes: S streams, n symbols of a block, W window of the model, C channels, V vocabulary.
"""
import hashlib
from typing import NamedTuple

import constriction
import numpy as np
import torch

from codec.exact import tables_hash

FAMILY = constriction.stream.model.Categorical(perfect=False)
INPUTS_AT_ONCE = 8192                           # inputs of one call of the model while coding
FREQUENCIES_AT_ONCE = 1 << 22                   # frequencies that are held at a time while coding


# --- the range coder ---

def new_encoder():
    return constriction.stream.queue.RangeEncoder()


def coded_bytes(encoder):
    """Return what an encoder has made, the same on every machine."""
    return encoder.get_compressed().astype('<u4').tobytes()


def decoder_of(data):
    """Return a decoder of coded_bytes' result."""
    return constriction.stream.queue.RangeDecoder(np.frombuffer(data, '<u4').astype(np.uint32))


def code_length(frequencies, symbols):
    """Return the bits that symbols (n,) cost by frequencies (n, V)."""
    chosen = frequencies[np.arange(len(frequencies)), symbols]
    bits = np.log2(frequencies.sum(1)) - np.log2(chosen)
    return float(bits.sum())


def arithmetic_hash(args):
    """Hash of the integer tables and of a test message through the range coder: what an archive's numbers rest on."""
    encoder = new_encoder()
    frequencies = np.arange(64 * 32).reshape(64, 32) * 7919 % 1009 + 1
    symbols = np.arange(64) * 13 % 32
    encoder.encode(symbols.astype(np.int32), FAMILY, frequencies.astype(np.float64))
    message = coded_bytes(encoder)
    return hashlib.sha256(tables_hash(args).encode() + message).hexdigest()[:16]


# --- where a symbol is ---

class Layout:
    """Where n symbols lie in S streams, one stream after another; the first streams may have one more than the rest."""

    def __init__(self, n, n_streams):
        shortest, n_longer = divmod(n, n_streams)
        number = np.arange(n_streams)
        self.n_streams = n_streams
        self.lengths = shortest + (number < n_longer)                   # (S,)
        self.ends = np.cumsum(self.lengths)
        self.starts = self.ends - self.lengths
        self.n_steps = int(self.lengths[0])
        self.n_last = n_longer or n_streams                             # streams that have a symbol in the last step

    def n_active(self, step):
        """Return how many streams, the first ones, have a symbol in a step."""
        return self.n_last if step == self.n_steps - 1 else self.n_streams

    def in_order(self, rows, stop):
        """Cut rows, one per symbol in coding order up to step stop, to the streams that have not ended."""
        n_missing = self.n_streams - self.n_active(stop - 1)
        return rows[:len(rows) - n_missing]


class Window(NamedTuple):
    """Inputs [start, end) for one call of the model; those from `output` on predict symbols that are new."""
    start: int
    output: int
    end: int


def windows(n_context, n_steps, size, keep):
    """Yield the Windows of `size` inputs that predict n_steps symbols.

    n_context inputs are known, the last of which predicts symbol 0. A full window starts again with its last `keep`.
    """
    start = 0
    output = n_context - 1
    last = output + n_steps
    while output < last:
        end = min(start + size, last)
        yield Window(start, output, end)
        start = end - keep + 1
        output = end


# --- coding ---

class StreamCoder:
    """Codes or decodes blocks with one model; `context`, inputs (S, c) of before, is what goes on to the next block.

    model: an exact.Exact. keep: inputs that stay in sight when a window is full. at_once: streams that the model runs
    at a time when decoding, 0 = all. The caller sets context to what encode() or decode() returned where the block is
    coded so in the archive.
    """

    def __init__(self, model, n_streams, keep, start_id, at_once=0):
        self.model = model
        self.n_streams = n_streams
        self.keep = keep
        self.context = np.full((n_streams, 1), start_id, np.int64)
        self.vocab_size = model.args['vocab_size']
        self.caches = []                        # one per group of streams, made when first decoding
        self.groups = []
        at_once = at_once or n_streams
        for i in range(0, n_streams, at_once):
            self.groups.append(slice(i, min(i + at_once, n_streams)))

    def next_context(self, tokens, layout):
        """Return the last `keep` inputs of every stream after a block; all the same length, so they stay in step."""
        length = min(self.keep, int(layout.lengths.min()) + self.context.shape[1])
        rows = []
        for before, start, end in zip(self.context, layout.starts, layout.ends):
            row = np.concatenate((before, tokens[start:end]))
            rows.append(row[-length:])
        return np.stack(rows).astype(np.int64)

    def encode(self, tokens, tick=None):
        """Code one block of symbols (n,); returns (bytes, code length in bits, context after it).

        tick(n): called when about n symbols are done.
        """
        n = len(tokens)
        layout = Layout(n, self.n_streams)
        places = layout.starts[:, None] + np.arange(layout.n_steps)
        places = np.minimum(places, n - 1)                              # where a stream has ended: never coded
        symbols = tokens[places].astype(np.int64)                       # (S, steps)
        inputs = np.concatenate((self.context, symbols[:, :-1]), 1)
        inputs = torch.from_numpy(inputs).to(self.model.device)
        n_context = self.context.shape[1]
        at_once = max(1, FREQUENCIES_AT_ONCE // (self.n_streams * self.vocab_size))
        encoder = new_encoder()
        bits = 0.0

        # The coder takes symbols step by step, and in a step stream after stream, as decoding will find them.
        for window in windows(n_context, layout.n_steps, self.model.W, self.keep):
            hidden = self.hidden(inputs, window)                        # (S, outputs, C)
            first = window.output - (n_context - 1)
            for i in range(0, hidden.shape[1], at_once):
                some = hidden[:, i:i + at_once]
                start = first + i
                stop = start + some.shape[1]
                rows = some.transpose(0, 1).flatten(0, 1)
                frequencies = as_weights(self.model.frequencies(rows))
                frequencies = layout.in_order(frequencies, stop)
                wanted = symbols[:, start:stop].T.reshape(-1)
                wanted = layout.in_order(wanted, stop)
                encoder.encode(wanted.astype(np.int32), FAMILY, frequencies)
                bits += code_length(frequencies, wanted)
            if tick:
                tick((window.end - n_context + 1) * self.n_streams)
        return coded_bytes(encoder), bits, self.next_context(tokens, layout)

    def hidden(self, inputs, window):
        """Return the head's input (S, outputs, C) for a window of inputs (S, T), some streams at a time."""
        rows = max(1, INPUTS_AT_ONCE // (window.end - window.start))
        n_outputs = window.end - window.output
        parts = inputs[:, window.start:window.end].split(rows)
        return torch.cat([self.model.forward(part, last=n_outputs) for part in parts])

    def decode(self, data, n, tick=None):
        """Decode one block of n symbols; returns (symbols (n,), context after it)."""
        layout = Layout(n, self.n_streams)
        decoder = decoder_of(data)
        n_context = self.context.shape[1]
        inputs = np.zeros((self.n_streams, n_context + layout.n_steps), np.int64)
        inputs[:, :n_context] = self.context
        if not self.caches:
            self.caches = [self.model.cache() for _ in self.groups]
        for window in windows(n_context, layout.n_steps, self.model.W, self.keep):
            # The cache begins anew with the inputs that a window takes over; each later step adds one.
            for cache in self.caches:
                cache.length = 0
            start = window.start
            for i in range(window.output, window.end):
                frequencies = self.next_frequencies(inputs[:, start:i + 1])
                start = i + 1
                step = i - (n_context - 1)
                n_active = layout.n_active(step)
                inputs[:n_active, i + 1] = decoder.decode(FAMILY, frequencies[:n_active])
                if tick:
                    tick(step * self.n_streams)
        rows = []
        for row, length in zip(inputs, layout.lengths):
            rows.append(row[n_context:n_context + length])
        tokens = np.concatenate(rows)
        return tokens, self.next_context(tokens, layout)

    def next_frequencies(self, inputs):
        """Return the frequencies (S, V) that follow inputs (S, T) that the caches have not seen."""
        x = torch.from_numpy(inputs).to(self.model.device)
        parts = []
        for group, cache in zip(self.groups, self.caches):
            hidden = self.model.forward(x[group], cache, last=1)
            parts.append(self.model.frequencies(hidden[:, 0]))
        return as_weights(torch.cat(parts))


def as_weights(frequencies):
    """Return frequencies as the range coder takes them: integers in float64."""
    return frequencies.double().cpu().numpy()
