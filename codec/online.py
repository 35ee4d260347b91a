"""Online archives: a small transformer learns the file while it codes it, so that no weights are stored (prequential).

In: a file, or an online archive. Out: the other. Imported by compress.py, whose knobs (online_*) it takes.

Both sides start from one seed and repeat: code a block of every stream with the current weights, rounded to integers
and run by exact.py (so parallel coding and stepwise decoding agree); then take the same float training steps on it and
on a replay of what came before. Those steps must be bitwise repeatable: each half of a batch is computed on one thread,
the halves are added in one order, and a fingerprint (torch build, processor, and the SHA-256 of the weights after three
fixed steps at the archive's shapes) refuses any machine that trains differently before a byte is written.

Shapes: S streams, n symbols per stream, W window, R rows of an update.
"""
import hashlib
import io
import json
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import constriction
import numpy as np
import torch

from codec import exact, weights
from codec.container import CODED, DAMAGED, ONLINE, STORED, Bar, Output, arithmetic_hash, read_input, write_archive
from configurator import UserError, at_least, require
from corpus.bins import NEWLINE, key_of, mix64
from model import ModelConfig, build
from training.optim import is_muons
from training.process import PAUSED, HeldInterrupt, cpu_name

PARTS = 2                                       # of a batch: part of the format, since float sums depend on it
LEVELS = 255                                    # of a weight's magnitude in its row while coding
FIRST_BLOCK = 4                                 # steps; blocks then hold an eighth of what was seen, up to `block`
SEGMENT_SYMBOLS = 65536                         # coded by one range coder, under one CRC; a state is saved after each
REFIT_BLOCKS = 8                                # blocks between two looks at the ranges of activations
MOMENTUM, WARM_UP = 0.95, 30                    # of Muon; updates over which the rate rises
LIMITS = dict(streams=4096, block=1 << 16, updates=4096, rows=4096)


def settings_of(knobs, n_bytes):
    """The part of the knobs that an archive's content depends on."""
    k = {n[7:]: v for n, v in knobs.items() if n.startswith('online_')}
    size = dict(block_size=k.pop('window'), n_layer=k.pop('n_layer'), n_head=k.pop('n_head'), n_embd=k.pop('n_embd'))
    kind = k.pop('block_type')
    config = ModelConfig(**size, positions='rotary' if kind == 'attention' else 'none', norm='rmsnorm',
                         activation='relu2', bias=False, qk_norm=kind == 'attention', block_type=kind)
    k['streams'] = min(k['streams'], 1 + n_bytes // 1024)
    return dict(k, args=vars(config), bytes=n_bytes)


def orthogonalise(g):
    """Newton-Schulz iteration towards the nearest orthogonal matrix (Jordan et al. 2024, Muon), coefficients theirs."""
    x = g / (g.norm() + 1e-7)
    x = x.T if g.size(0) > g.size(1) else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.size(0) > g.size(1) else x


class SeededDropout(torch.nn.Module):
    """Dropout with a generator of its own, so that the parts of a batch can run side by side and still repeat."""

    def __init__(self, p):
        super().__init__()
        self.p, self.generator = p, torch.Generator()

    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(x.shape, generator=self.generator) >= self.p) * (1 / (1 - self.p))


class Learner:
    """The float model and its optimisers; whatever it does is bitwise repeatable on one machine type."""

    def __init__(self, settings):
        torch.set_num_threads(1)
        self.s, self.n_updates, self.sites = settings, 0, None
        torch.manual_seed(settings['seed'])
        self.models = [build(settings['args']) for _ in range(PARTS)]
        self.drops = [[SeededDropout(settings['dropout']) for _ in range(1 + len(m.blocks))] for m in self.models]
        for m, drops in zip(self.models, self.drops):           # on the residual branches, not inside attention
            for module, drop in zip((m, *m.blocks), drops):
                module.drop = drop
        self.params = [list(m.parameters()) for m in self.models]
        self.spread()
        main = self.models[0]
        muon = {n: is_muons(n, p) and '.mix.' not in n for n, p in main.named_parameters()}
        self.matrices, rest = ([p for n, p in main.named_parameters() if muon[n] == k] for k in (True, False))
        self.momentum = [torch.zeros_like(p) for p in self.matrices]
        self.adam = torch.optim.Adam(rest, lr=settings['learning_rate'], betas=(0.9, 0.99), foreach=True)
        self.pool = ThreadPoolExecutor(PARTS, initializer=torch.set_num_threads, initargs=(1,))

    def spread(self):
        """Copy the first model's weights to its replicas."""
        with torch.no_grad():
            for other in self.params[1:]:
                torch._foreach_copy_(other, self.params[0])

    def gradient(self, part, x, y, n_symbols):
        model = self.models[part].train(self.s['dropout'] > 0)
        for i, drop in enumerate(self.drops[part]):
            drop.generator.manual_seed(key_of(self.s['seed'], self.n_updates, part, i) >> 1)
        for p in self.params[part]:
            p.grad = None
        (model(x, y) / n_symbols).backward()

    def update(self, x, y, share_done):
        """One training step on rows x, y (R, T) int64."""
        jobs = list(zip(range(PARTS), torch.from_numpy(x).tensor_split(PARTS), torch.from_numpy(y).tensor_split(PARTS)))
        jobs = [(part, a, b, y.size) for part, a, b in jobs if len(a)]
        list(self.pool.map(lambda job: self.gradient(*job), jobs))
        with torch.no_grad():
            grads = [p.grad for p in self.params[0]]
            for part, *_ in jobs[1:]:
                torch._foreach_add_(grads, [p.grad for p in self.params[part]])
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            torch._foreach_mul_(grads, torch.clamp(1.0 / (norm + 1e-6), max=1.0))
            self.n_updates += 1
            rate = min(1.0, self.n_updates / WARM_UP) * (1 - 0.9 * share_done)
            for group in self.adam.param_groups:
                group['lr'] = self.s['learning_rate'] * rate
            self.adam.step()
            steps = list(self.pool.map(self.muon_step, self.matrices, self.momentum))
            for p, step in zip(self.matrices, steps):
                p.sub_(step * (self.s['muon_rate'] * rate * max(1.0, p.size(0) / p.size(1)) ** 0.5))
        self.spread()

    @staticmethod
    @torch.no_grad()
    def muon_step(p, momentum):
        momentum.mul_(MOMENTUM).add_(p.grad)
        return orthogonalise(p.grad + MOMENTUM * momentum)

    def learn(self, history, done, n, n_steps):
        """Take the updates that follow a block of n steps; history (S, 1 + n_steps) has its first 1 + done symbols.

        A short block gets its share of them: many steps on little text fix what is hard to unlearn.
        """
        S, R, width = len(history), self.s['rows'], min(self.s['args']['block_size'], done)
        for _ in range(max(1, round(self.s['updates'] * n / self.s['block']))):
            key = np.uint64(key_of(self.s['seed'], self.n_updates, 'rows') >> 1)
            draw = mix64(np.arange(3 * R, dtype=np.uint64) + key).reshape(3, R)
            rows = (draw[0] % np.uint64(S)).astype(np.int64)
            ends = width + (draw[1] % np.uint64(done - width + 1)).astype(np.int64)
            newest = (draw[2] % np.uint64(1000)).astype(np.int64) < 1000 * self.s['newest']
            at = np.where(newest, done, ends)[:, None] - width + np.arange(width + 1)
            both = history[rows[:, None], at].astype(np.int64)
            self.update(np.ascontiguousarray(both[:, :-1]), np.ascontiguousarray(both[:, 1:]), done / n_steps)

    def integers(self, sample=None):
        """The current weights as an integer model; sample rows (N, T) int64 renew the ranges of activations."""
        args, tensors = self.s['args'], {}
        for name, w in weights.fold(self.models[0].state_dict(), args).items():
            scale = np.maximum(np.abs(w).max(-1, keepdims=True), 1e-9) / LEVELS
            tensors[name] = np.rint(w / scale).astype(np.int32), scale
        if sample is not None:
            self.sites = exact.fit_sites(args, tensors, sample)
        return exact.Exact(args, tensors, *self.sites)

    def digest(self):
        h = hashlib.sha256()
        for p in self.params[0]:
            h.update(p.detach().numpy().tobytes())
        return h.hexdigest()

    def state(self):
        return dict(model=self.models[0].state_dict(), adam=self.adam.state_dict(), momentum=self.momentum,
                    n_updates=self.n_updates, sites=self.sites)

    def restore(self, state):
        self.models[0].load_state_dict(state['model'])
        self.adam.load_state_dict(state['adam'])
        for mine, saved in zip(self.momentum, state['momentum']):
            mine.copy_(saved)
        self.n_updates, self.sites = state['n_updates'], state['sites']
        self.spread()


def fingerprint(settings):
    """What must agree between packing and unpacking machine; takes three training steps at the archive's shapes."""
    learner = Learner(settings)
    size, R = settings['args']['block_size'], settings['rows']
    for i in range(3):
        x = (mix64(np.arange(R * size + 1, dtype=np.uint64) + np.uint64(i << 32)) % np.uint64(64)).astype(np.int64) + 32
        learner.update(x[:-1].reshape(R, size), x[1:].reshape(R, size), 0.0)
    return dict(torch=torch.__version__, device='cpu', processor=cpu_name(), parts=PARTS, weights=learner.digest(),
                capability=torch.backends.cpu.get_cpu_capability(), arithmetic=arithmetic_hash(settings['args']))


class Session:
    """One pass over a file: streams, blocks, segments, and a state that can be saved between segments.

    Encoder and Decoder differ in what they do with a segment's coder: begin(), code(first, stop), finish(text).
    """

    def __init__(self, settings, key, state_path, show):
        self.s, self.key, self.state_path, self.show = settings, key, state_path, show
        self.interrupt = None                               # a Ctrl-C that waits for the segment to end
        n, self.S = settings['bytes'], settings['streams']
        whole, more = divmod(n, self.S)
        self.steps, self.active = whole + (more > 0), more or self.S            # active: streams in the last step
        self.history = np.full((self.S, self.steps + 1), NEWLINE, np.uint8)
        self.family = constriction.stream.model.Categorical(perfect=False)
        self.learner, self.done, self.blocks, self.bits, self.n_models = Learner(settings), 0, [], 0.0, 0
        if state_path and os.path.exists(state_path):
            self.resume()

    def resume(self):
        try:
            saved = torch.load(self.state_path, weights_only=True)
            fits = saved['key'] == self.key
        except Exception as e:
            raise UserError(f'{self.state_path} is not a saved state ({type(e).__name__}); name another file') from None
        if not fits:
            raise UserError(f'{self.state_path} belongs to another file or other settings; delete it or name another')
        self.learner.restore(saved['learner'])
        self.history[:] = saved['history'].numpy()
        self.blocks = [(form, n, *(b.numpy().tobytes() for b in both)) for form, n, *both in saved['blocks']]
        self.done, self.bits, self.n_models = saved['done'], saved['bits'], saved['n_models']

    def save(self):
        if not self.state_path:
            return
        blocks = [(form, n, *(torch.tensor([*b], dtype=torch.uint8) for b in both)) for form, n, *both in self.blocks]
        state = dict(key=self.key, learner=self.learner.state(), history=torch.from_numpy(self.history), blocks=blocks,
                     done=self.done, bits=self.bits, n_models=self.n_models)

        # Made in memory first: torch's writer does not look whether a file took all that it was given.
        data = io.BytesIO()
        torch.save(state, data)
        with Output(self.state_path, overwrite=True) as out:
            out.write(data.getbuffer())
            out.commit()

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
        done = min(self.done * self.S, self.s['bytes'])
        print(f'\npaused after {done:,} of {self.s["bytes"]:,} bytes; the same command goes on from {self.state_path}',
              file=sys.stderr)
        raise SystemExit(PAUSED)

    def segments(self):
        """Code and learn segment by segment, saving the state after each."""
        while self.done < self.steps:
            self.first, self.stop = self.done, min(self.steps, self.done + max(1, SEGMENT_SYMBOLS // self.S))
            self.begin()
            while self.done < self.stop:
                n = min(self.stop - self.done, self.s['block'], max(FIRST_BLOCK, self.done // 8))
                self.code(self.done, self.done + n)
                self.done += n
                if self.done < self.steps:
                    self.learner.learn(self.history, self.done, n, self.steps)
                self.show(min(self.done * self.S, self.s['bytes']), self.bits)
            inside = self.history[:, self.first + 1:self.stop + 1]              # of the segment, stream after stream
            cut = self.active if self.stop == self.steps else self.S
            self.finish(inside[:cut].tobytes() + inside[cut:, :-1].tobytes())
            self.save()
            if self.interrupt and self.interrupt.received and self.done < self.steps:
                self.leave()

    def model(self, stop):
        """Return the integer model that codes a block up to step `stop`, and the first input of its window."""
        sample = None
        if self.n_models % REFIT_BLOCKS == 0:
            width = min(self.s['args']['block_size'], self.done + 1)
            sample = self.history[:4, self.done + 1 - width:self.done + 1].astype(np.int64)
        self.n_models += 1
        return self.learner.integers(sample), max(0, stop - self.s['args']['block_size'])

    def inputs(self, first, stop):
        return torch.from_numpy(self.history[:, first:stop].astype(np.int64))

    def in_order(self, frequencies, stop):
        """Frequencies in coding order, up to step `stop`, without the streams that have ended."""
        f = frequencies.double().numpy()
        return f[:len(f) - self.S + self.active] if stop == self.steps else f

    def whole(self):
        """The file: each stream's symbols in turn."""
        return b''.join(row[1:self.steps + (s < self.active)].tobytes() for s, row in enumerate(self.history))


class Encoder(Session):
    def set_text(self, raw):
        lengths = [self.steps - (s >= self.active) for s in range(self.S)]
        rows = np.split(np.frombuffer(raw, np.uint8), np.cumsum(lengths)[:-1])
        self.truth = np.stack([np.pad(row, (0, self.steps - len(row))) for row in rows])

    def begin(self):
        self.coder, self.bits_before = constriction.stream.queue.RangeEncoder(), self.bits

    def code(self, first, stop):
        model, start = self.model(stop)
        self.history[:, first + 1:stop + 1] = self.truth[:, first:stop]
        parts = [x for x in self.inputs(start, stop).tensor_split(PARTS) if len(x)]
        hidden = torch.cat(list(self.learner.pool.map(lambda x: model.forward(x, last=stop - first), parts)))
        f = self.in_order(model.frequencies(hidden.transpose(0, 1).flatten(0, 1)), stop)
        symbols = self.truth[:, first:stop].T.reshape(-1)[:len(f)].astype(np.int32)
        self.coder.encode(symbols, self.family, f)
        self.bits += float((np.log2(f.sum(1)) - np.log2(f[np.arange(len(f)), symbols])).sum())

    def finish(self, text):
        data = self.coder.get_compressed().astype('<u4').tobytes()
        if len(data) >= len(text):
            self.bits = self.bits_before + 8 * len(text)
        self.blocks.append((CODED, len(text), data, text) if len(data) < len(text) else (STORED, len(text), text, text))


class Decoder(Session):
    def set_data(self, table, data):
        self.table, ends = table, np.cumsum([0] + [b[2] for b in table])
        self.data = [data[a:b] for a, b in zip(ends, ends[1:])]

    def begin(self):
        form, _, _, self.crc = self.table[len(self.blocks)]
        data = self.data[len(self.blocks)]
        self.coder = self.stored = None
        if form == CODED:
            self.coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, '<u4').astype(np.uint32))
        else:
            width = self.stop - self.first
            lengths = [width - (self.stop == self.steps and s >= self.active) for s in range(self.S)]
            rows = np.split(np.frombuffer(data, np.uint8), np.cumsum(lengths)[:-1])
            self.stored = np.stack([np.pad(row, (0, width - len(row))) for row in rows])

    def code(self, first, stop):
        model, start = self.model(stop)
        if self.stored is not None:
            self.history[:, first + 1:stop + 1] = self.stored[:, first - self.first:stop - self.first]
            return
        cache = model.cache()
        for i in range(first, stop):
            hidden = model.forward(self.inputs(start if i == first else i, i + 1), cache, last=1)
            f = self.in_order(model.frequencies(hidden[:, 0]), i + 1)
            self.history[:len(f), i + 1] = self.coder.decode(self.family, f)

    def finish(self, text):
        if zlib.crc32(text) != self.crc:
            raise UserError(f'a segment decodes to other bytes than were packed: other arithmetic here, or {DAMAGED}')
        self.bits += 8 * len(self.data[len(self.blocks)])
        self.blocks.append((0, 0, b'', b''))


def encode(path, out, knobs, state_path):
    """Write the online archive of a file to out; returns (original, computed bytes)."""
    require(*(at_least(f'online_{n}', knobs[f'online_{n}'], 1) for n in LIMITS),
            (0 <= knobs['online_dropout'] < 1, f'online_dropout = {knobs["online_dropout"]}, expected 0 to below 1'),
            (knobs['device'] == 'cpu', f'device = {knobs["device"]!r}: online archives are made on the cpu'))
    raw = read_input(path)
    head = dict(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    if not raw:
        return raw, write_archive(out, ONLINE, head, {}, [])
    settings = settings_of(knobs, len(raw))
    head |= dict(settings=settings, fingerprint=fingerprint(settings))
    bar = Bar('online', len(raw), knobs['progress'])
    session = Encoder(settings, json.dumps(head, sort_keys=True), state_path, bar.show)
    session.set_text(raw)
    session.run()
    bar.show(len(raw), session.bits, last=True)
    return raw, write_archive(out, ONLINE, head, {}, session.blocks) + session.bits / 8


def decode_blocks(head, table, sections, progress, state_path):
    """Yield the text of an online archive, whole, when every segment has passed its CRC."""
    if not table:
        return
    settings = head['settings']
    if any(not 0 < settings[n] <= top for n, top in LIMITS.items()) or settings['bytes'] != sum(b[1] for b in table):
        raise UserError(f'the settings do not fit the block table; {DAMAGED}')
    ModelConfig(**settings['args'])
    if weights.count(settings['args']) > 1 << 28 or settings['streams'] * settings['args']['block_size'] > 1 << 24:
        raise UserError('the header asks for a model or a cache larger than any online archive needs')
    here, there = fingerprint(settings), head['fingerprint']
    if here['weights'] != there['weights']:
        differ = [f'{k}: {v} there, {here.get(k)} here' for k, v in there.items() if here.get(k) != v and k[0] != 'w']
        raise UserError('this machine trains other weights from the same data than the one that packed and cannot '
                        f'unpack this archive; differences: {"; ".join(differ) or "none that is recorded"}')
    key = hashlib.sha256(json.dumps(head, sort_keys=True).encode() + sections['data']).hexdigest()
    bar = Bar('unpack', head['bytes'], progress)
    session = Decoder(settings, key, state_path, bar.show)
    session.set_data(table, sections['data'])
    session.run()
    bar.show(head['bytes'], session.bits, last=True)
    yield session.whole()
