"""Online archives: a small transformer learns the file while it codes it, so that no weights are stored (prequential).

In: a file, or an online archive. Out: the other. head: bytes, sha256, settings (learner.Settings), fingerprint.

Both sides start from one seed and repeat: code a block of every stream with the current weights, rounded to integers
and run by exact.py (so parallel coding and stepwise decoding agree); then take the same float training steps on it and
on a replay of what came before (learner.py).

Shapes: S streams, n symbols of a block, W window, V vocabulary.
"""
import hashlib
import io
import json
import os
import sys
import zlib
from dataclasses import asdict, dataclass

import numpy as np
import torch

from codec import weights
from codec.container import CODED, DAMAGED, ONLINE, STORED, Block, read_input, smaller_block, write_archive
from codec.learner import PARTS, Learner, Settings, fingerprint
from codec.output import Output
from codec.progress import Bar
from codec.streams import FAMILY, Layout, as_weights, code_length, coded_bytes, decoder_of, new_encoder
from configurator import UserError, at_least, require
from corpus.bins import NEWLINE
from model import ModelConfig
from training.process import PAUSED, HeldInterrupt

FIRST_BLOCK = 4                                 # steps; blocks then hold an eighth of what was seen, up to `block`
SEGMENT_SYMBOLS = 65536                         # coded by one range coder, under one CRC; a state is saved after each
REFIT_BLOCKS = 8                                # blocks between two looks at the ranges of activations
REFIT_STREAMS = 4                               # whose newest symbols are looked at
LIMITS = dict(streams=4096, block=1 << 16, updates=4096, rows=4096)
MAX_WEIGHTS = 1 << 28                           # of a model that an archive may ask for
MAX_INPUTS = 1 << 24                            # in the windows of all its streams


@dataclass
class Knobs:
    """What a user chooses: the knobs online_* of compress.py. An archive depends on every one of these."""
    n_layer: int
    n_embd: int
    n_head: int
    window: int
    block_type: str
    streams: int
    block: int
    updates: int
    rows: int
    newest: float
    learning_rate: float
    muon_rate: float
    dropout: float
    seed: int

    def check(self, device):
        """Raise a UserError that lists every knob that cannot be meant."""
        require(*(at_least(f'online_{name}', getattr(self, name), 1) for name in LIMITS),
                (0 <= self.dropout < 1, f'online_dropout = {self.dropout}, expected 0 to below 1'),
                (device == 'cpu', f'device = {device!r}: online archives are made on the cpu'))

    def settings(self, n_bytes):
        """Return what an archive of a file of n_bytes rests on."""
        attention = self.block_type == 'attention'
        config = ModelConfig(block_size=self.window, n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd,
                             positions='rotary' if attention else 'none', norm='rmsnorm', activation='relu2',
                             bias=False, qk_norm=attention, block_type=self.block_type)
        return Settings(streams=min(self.streams, 1 + n_bytes // 1024), block=self.block, updates=self.updates,
                        rows=self.rows, newest=self.newest, learning_rate=self.learning_rate,
                        muon_rate=self.muon_rate, dropout=self.dropout, seed=self.seed, args=vars(config),
                        bytes=n_bytes)


def streams_of(data, lengths):
    """Return bytes, which are the streams' symbols in turn, as rows (S, longest); what is missing is 0."""
    rows = np.split(np.frombuffer(data, np.uint8), np.cumsum(lengths)[:-1])
    return np.stack([np.pad(row, (0, max(lengths) - len(row))) for row in rows])


class Session:
    """One pass over a file: streams, blocks, segments, and a state that can be saved between segments.

    Encoder and Decoder differ in what they do with a segment's coder: begin(), code(first, stop), finish(text).
    key: what a saved state must belong to. show(bytes done, bits): called after every block.
    """

    def __init__(self, settings, key, state_path, show):
        self.settings = settings
        self.key = key
        self.state_path = state_path
        self.show = show
        self.interrupt = None                               # a Ctrl-C that waits for the segment to end
        self.window = settings.args['block_size']
        self.layout = Layout(settings.bytes, settings.streams)
        # The inputs of every stream (S, 1 + steps); the first is known to both sides.
        self.history = np.full((settings.streams, self.layout.n_steps + 1), NEWLINE, np.uint8)
        self.learner = Learner(settings)
        self.done = 0                                       # steps
        self.blocks = []                                    # [Block], one per segment
        self.bits = 0.0                                     # their code length
        self.n_models = 0                                   # integer models so far
        if state_path and os.path.exists(state_path):
            self.resume()

    # --- the saved state ---

    def resume(self):
        """Go on from the state file; UserError where it is none, or another file's."""
        try:
            saved = torch.load(self.state_path, weights_only=True)
            fits = saved['key'] == self.key
        except Exception as e:
            raise UserError(f'{self.state_path} is not a saved state ({type(e).__name__}); name another file') from None
        if not fits:
            raise UserError(f'{self.state_path} belongs to another file or other settings; delete it or name another')
        self.learner.restore(saved['learner'])
        self.history[:] = saved['history'].numpy()
        for form, n, data, text in saved['blocks']:
            self.blocks.append(Block(form, n, data.numpy().tobytes(), text.numpy().tobytes()))
        self.done = saved['done']
        self.bits = saved['bits']
        self.n_models = saved['n_models']

    def save(self):
        """Write the state file, if there is to be one."""
        if not self.state_path:
            return
        blocks = []
        for form, n, data, text in self.blocks:
            blocks.append((form, n, as_tensor(data), as_tensor(text)))
        state = dict(key=self.key, learner=self.learner.state(), history=torch.from_numpy(self.history), blocks=blocks,
                     done=self.done, bits=self.bits, n_models=self.n_models)

        # Made in memory first: torch's writer does not look whether a file took all that it was given.
        data = io.BytesIO()
        torch.save(state, data)
        with Output(self.state_path, overwrite=True) as out:
            out.write(data.getbuffer())
            out.commit()

    # --- the pass ---

    def run(self):
        """Code and learn to the end; with a state file Ctrl-C saves it after the segment and leaves with status 85.

        The state stays until the caller has written what came out.
        """
        if not self.state_path:
            self.segments()
            return
        with HeldInterrupt(f'{self.state_path} is saved after this segment, exit status {PAUSED}') as self.interrupt:
            self.segments()

    def leave(self):
        """End the process, its state being saved, with a line that says how to go on."""
        print(f'\npaused after {self.bytes_done():,} of {self.settings.bytes:,} bytes; the same command goes on from '
              f'{self.state_path}', file=sys.stderr)
        raise SystemExit(PAUSED)

    def bytes_done(self):
        return min(self.done * self.settings.streams, self.settings.bytes)

    def segments(self):
        """Code and learn segment by segment, saving the state after each."""
        while self.done < self.layout.n_steps:
            self.first = self.done                          # step that the segment begins with
            self.stop = min(self.layout.n_steps, self.done + max(1, SEGMENT_SYMBOLS // self.settings.streams))
            self.begin()
            while self.done < self.stop:
                self.block()
            self.finish(self.segment_text())
            self.save()
            if self.interrupt and self.interrupt.received and self.done < self.layout.n_steps:
                self.leave()

    def block(self):
        """Code the next block, whose length grows with what was seen, and learn from it."""
        n = min(self.stop - self.done, self.settings.block, max(FIRST_BLOCK, self.done // 8))
        self.code(self.done, self.done + n)
        self.done += n
        if self.done < self.layout.n_steps:
            self.learner.learn(self.history, self.done, n, self.layout.n_steps)
        self.show(self.bytes_done(), self.bits)

    def segment_lengths(self):
        """Return how many symbols of each stream (S,) are in the segment."""
        return np.minimum(self.layout.lengths, self.stop) - self.first

    def segment_text(self):
        """Return the segment's symbols, stream after stream."""
        inside = self.history[:, self.first + 1:self.stop + 1]
        return b''.join(row[:length].tobytes() for row, length in zip(inside, self.segment_lengths()))

    def whole(self):
        """Return the file: each stream's symbols in turn."""
        return b''.join(row[1:1 + length].tobytes() for row, length in zip(self.history, self.layout.lengths))

    # --- for Encoder and Decoder ---

    def model(self, stop):
        """Return the integer model that codes a block up to step `stop`, and the first input of its window."""
        newest = None
        if self.n_models % REFIT_BLOCKS == 0:
            width = min(self.window, self.done + 1)
            newest = self.history[:REFIT_STREAMS, self.done + 1 - width:self.done + 1].astype(np.int64)
        self.n_models += 1
        return self.learner.integers(newest), max(0, stop - self.window)

    def inputs(self, first, stop):
        """Return inputs (S, stop - first) as a model takes them."""
        return torch.from_numpy(self.history[:, first:stop].astype(np.int64))

    def weights_of(self, frequencies, stop):
        """Return frequencies up to step `stop` as the range coder takes them, without the streams that have ended."""
        return self.layout.in_order(as_weights(frequencies), stop)


def as_tensor(data):
    return torch.tensor([*data], dtype=torch.uint8)


class Encoder(Session):
    """A pass that codes a file: `blocks` is what comes out."""

    def set_text(self, raw):
        """Say what is coded: the bytes of the file."""
        self.truth = streams_of(raw, self.layout.lengths)                       # (S, steps)

    def begin(self):
        self.coder = new_encoder()
        self.bits_before = self.bits

    def code(self, first, stop):
        """Code steps first to stop, whose symbols are known, in one call of the model."""
        model, start = self.model(stop)
        self.history[:, first + 1:stop + 1] = self.truth[:, first:stop]
        parts = [x for x in self.inputs(start, stop).tensor_split(PARTS) if len(x)]
        jobs = [self.learner.pool.submit(model.forward, x, last=stop - first) for x in parts]
        hidden = torch.cat([job.result() for job in jobs])                      # (S, steps, C)
        frequencies = self.weights_of(model.frequencies(hidden.transpose(0, 1).flatten(0, 1)), stop)
        symbols = self.truth[:, first:stop].T.reshape(-1)
        symbols = self.layout.in_order(symbols, stop).astype(np.int32)
        self.coder.encode(symbols, FAMILY, frequencies)
        self.bits += code_length(frequencies, symbols)

    def finish(self, text):
        """Keep the segment's block, coded or as it is."""
        block = smaller_block(len(text), coded_bytes(self.coder), text)
        if block.form == STORED:
            self.bits = self.bits_before + 8 * len(text)
        self.blocks.append(block)


class Decoder(Session):
    """A pass that decodes an archive: whole() is what comes out."""

    def set_archive(self, archive):
        """Say what is decoded."""
        self.coded = list(archive.blocks())                                     # [(entry, data)], one per segment

    def begin(self):
        self.entry, self.data = self.coded[len(self.blocks)]
        if self.entry.form == CODED:
            self.coder = decoder_of(self.data)
        else:
            self.stored = streams_of(self.data, self.segment_lengths())         # (S, steps of the segment)

    def code(self, first, stop):
        """Decode steps first to stop, one after the other, into the history."""
        model, start = self.model(stop)
        if self.entry.form != CODED:
            self.history[:, first + 1:stop + 1] = self.stored[:, first - self.first:stop - self.first]
            return
        cache = model.cache()
        for i in range(first, stop):
            hidden = model.forward(self.inputs(start, i + 1), cache, last=1)
            start = i + 1
            frequencies = self.weights_of(model.frequencies(hidden[:, 0]), i + 1)
            self.history[:len(frequencies), i + 1] = self.coder.decode(FAMILY, frequencies)

    def finish(self, text):
        """Check the segment."""
        if zlib.crc32(text) != self.entry.text_crc:
            raise UserError(f'a segment decodes to other bytes than were packed: other arithmetic here, or {DAMAGED}')
        self.bits += 8 * len(self.data)
        self.blocks.append(Block(STORED, 0, b'', b''))                          # counts; its text is in the history


# --- out and in ---

def encode(path, out, knobs, device='cpu', state_path='', progress=False):
    """Write the online archive of a file to out, an Output.

    Returns (original, length in bytes that the model's probabilities promise).
    """
    knobs.check(device)
    raw = read_input(path)
    head = dict(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    if not raw:
        return raw, write_archive(out, ONLINE, head, {}, [])
    settings = knobs.settings(len(raw))
    head.update(settings=asdict(settings), fingerprint=fingerprint(settings))
    bar = Bar('online', len(raw), progress)
    session = Encoder(settings, json.dumps(head, sort_keys=True), state_path, bar.show)
    session.set_text(raw)
    session.run()
    bar.show(len(raw), session.bits, last=True)
    n_overhead = write_archive(out, ONLINE, head, {}, session.blocks)
    return raw, n_overhead + session.bits / 8


def check_settings(settings, table):
    """Refuse settings that no encoder makes, before memory is taken."""
    in_range = all(0 < getattr(settings, name) <= most for name, most in LIMITS.items())
    if not in_range or settings.bytes != sum(entry.n_symbols for entry in table):
        raise UserError(f'the settings do not fit the block table; {DAMAGED}')
    ModelConfig(**settings.args)
    n_inputs = settings.streams * settings.args['block_size']
    if weights.count(settings.args) > MAX_WEIGHTS or n_inputs > MAX_INPUTS:
        raise UserError('the header asks for a model or a cache larger than any online archive needs')


def check_machine(settings, there):
    """Refuse an archive whose fingerprint shows that the other machine trained other weights than this one would."""
    here = fingerprint(settings)
    if here['weights'] == there['weights']:
        return
    differ = []
    for name, value in there.items():
        if name != 'weights' and here.get(name) != value:
            differ.append(f'{name}: {value} there, {here.get(name)} here')
    raise UserError('this machine trains other weights from the same data than the one that packed and cannot '
                    f'unpack this archive; differences: {"; ".join(differ) or "none that is recorded"}')


def decode_blocks(archive, verb, state_path='', progress=False):
    """Yield the text of an online archive, whole, when every segment has passed its CRC."""
    if not archive.table:
        return
    head = archive.head
    settings = Settings(**head['settings'])
    check_settings(settings, archive.table)
    check_machine(settings, head['fingerprint'])
    key = json.dumps(head, sort_keys=True).encode() + archive.sections['data']
    bar = Bar(verb, head['bytes'], progress)
    session = Decoder(settings, hashlib.sha256(key).hexdigest(), state_path, bar.show)
    session.set_archive(archive)
    session.run()
    bar.show(head['bytes'], session.bits, last=True)
    yield session.whole()
