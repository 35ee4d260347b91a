"""The model of an online archive: a small transformer that takes the same training steps wherever it runs.

Its steps must be bitwise repeatable: each half of a batch is computed on one thread, and the halves are added in one
order. What still differs between machines is refused by a fingerprint: torch build, processor, and the SHA-256 of the
weights after three fixed steps at the archive's shapes.

Shapes: S streams, R rows of an update, T positions of a row.
"""
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from codec import exact, weights
from codec.streams import arithmetic_hash
from corpus.bins import key_of, mix64
from model import build
from training.optim import is_muons
from training.process import cpu_name

PARTS = 2                                       # of a batch: part of the format, since float sums depend on it
LEVELS = 255                                    # of a weight's magnitude in its row while coding
MOMENTUM = 0.95                                 # of Muon
WARM_UP = 30                                    # updates over which the rate rises
LARGEST_NORM = 1.0                              # of a gradient


@dataclass
class Settings:
    """What an online archive rests on, as its head holds it; the order is the archive's."""
    streams: int
    block: int                                  # steps between two rounds of updates
    updates: int                                # after each whole block
    rows: int                                   # of an update
    newest: float                               # share of them that end at the newest byte
    learning_rate: float                        # of Adam
    muon_rate: float
    dropout: float
    seed: int
    args: dict                                  # of the model
    bytes: int                                  # of the file


def orthogonalise(g):
    """Newton-Schulz iteration towards the nearest orthogonal matrix (Jordan et al. 2024, Muon), coefficients theirs."""
    tall = g.size(0) > g.size(1)
    x = g / (g.norm() + 1e-7)
    if tall:
        x = x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def below(n, numbers):
    """Return hashed numbers, uint64, as int64 from 0 to n - 1."""
    return (numbers % np.uint64(n)).astype(np.int64)


class SeededDropout(torch.nn.Module):
    """Dropout with a generator of its own, so that the parts of a batch can run side by side and still repeat."""

    def __init__(self, p):
        super().__init__()
        self.p = p
        self.generator = torch.Generator()

    def forward(self, x):
        if not self.training:
            return x
        kept = torch.rand(x.shape, generator=self.generator) >= self.p
        return x * kept * (1 / (1 - self.p))


def seed_dropouts(model, p):
    """Give the residual branches of a model, not the inside of its attention, dropouts with seeds; returns them."""
    dropouts = []
    for module in (model, *model.blocks):
        module.drop = SeededDropout(p)
        dropouts.append(module.drop)
    return dropouts


class Learner:
    """The float model and its optimisers; whatever it does is bitwise repeatable on one machine type."""

    def __init__(self, settings):
        torch.set_num_threads(1)
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.n_updates = 0
        self.sites = None                       # (sites, wide flags) of the integer model, once it has been fitted

        # The first model is the one that learns; the others are copies, each for its part of a batch.
        self.models = [build(settings.args) for _ in range(PARTS)]
        self.dropouts = [seed_dropouts(model, settings.dropout) for model in self.models]
        self.params = [list(model.parameters()) for model in self.models]
        self.spread()
        self.matrices = []
        others = []
        for name, p in self.models[0].named_parameters():
            if is_muons(name, p) and '.mix.' not in name:
                self.matrices.append(p)
            else:
                others.append(p)
        self.momentum = [torch.zeros_like(p) for p in self.matrices]
        self.adam = torch.optim.Adam(others, lr=settings.learning_rate, betas=(0.9, 0.99), foreach=True)
        self.pool = ThreadPoolExecutor(PARTS, initializer=torch.set_num_threads, initargs=(1,))

    def spread(self):
        """Copy the first model's weights to its replicas."""
        with torch.no_grad():
            for other in self.params[1:]:
                torch._foreach_copy_(other, self.params[0])

    # --- one training step ---

    def update(self, x, y, share_done):
        """Take one training step on rows x, y (R, T) int64."""
        with_rows = self.backward(x, y)
        with torch.no_grad():
            gradients = [p.grad for p in self.params[0]]
            for part in with_rows[1:]:
                torch._foreach_add_(gradients, [p.grad for p in self.params[part]])
            norms = torch.stack(torch._foreach_norm(gradients))
            norm = torch.linalg.vector_norm(norms)
            torch._foreach_mul_(gradients, torch.clamp(LARGEST_NORM / (norm + 1e-6), max=1.0))

            # The rate rises over the first updates, and falls to a tenth as the file is learned.
            self.n_updates += 1
            rising = min(1.0, self.n_updates / WARM_UP)
            falling = 1 - 0.9 * share_done
            self.step(rising * falling)
        self.spread()

    def backward(self, x, y):
        """Let each model take its part of the rows, on a thread of its own; returns the parts that have any."""
        xs = torch.from_numpy(x).tensor_split(PARTS)
        ys = torch.from_numpy(y).tensor_split(PARTS)
        with_rows = [part for part in range(PARTS) if len(xs[part])]
        jobs = []
        for part in with_rows:
            jobs.append(self.pool.submit(self.gradient, part, xs[part], ys[part], y.size))
        for job in jobs:
            job.result()
        return with_rows

    def gradient(self, part, x, y, n_symbols):
        """Leave the gradient of some rows, as a share of n_symbols' mean loss, in the model of that part."""
        for i, dropout in enumerate(self.dropouts[part]):
            key = key_of(self.settings.seed, self.n_updates, part, i)
            dropout.generator.manual_seed(key >> 1)
        for p in self.params[part]:
            p.grad = None
        model = self.models[part].train(self.settings.dropout > 0)
        (model(x, y) / n_symbols).backward()

    def step(self, rate):
        """Let both optimisers move the first model, at a share of their learning rates."""
        for group in self.adam.param_groups:
            group['lr'] = self.settings.learning_rate * rate
        self.adam.step()
        directions = self.pool.map(muon_direction, self.matrices, self.momentum)
        for p, direction in zip(self.matrices, directions):
            shape_factor = max(1.0, p.size(0) / p.size(1)) ** 0.5
            p.sub_(direction * (self.settings.muon_rate * rate * shape_factor))

    # --- the updates after a block ---

    def learn(self, history, done, n, n_steps):
        """Take the updates that follow a block of n steps; history (S, 1 + n_steps) has its first 1 + done symbols.

        A short block gets its share of them: many steps on little text fix what is hard to unlearn.
        """
        width = min(self.settings.args['block_size'], done)
        n_updates = max(1, round(self.settings.updates * n / self.settings.block))
        for _ in range(n_updates):
            streams, ends = self.draw(len(history), width, done)
            places = ends[:, None] - width + np.arange(width + 1)
            rows = history[streams[:, None], places].astype(np.int64)                   # (R, width + 1)
            x = np.ascontiguousarray(rows[:, :-1])
            y = np.ascontiguousarray(rows[:, 1:])
            self.update(x, y, done / n_steps)

    def draw(self, n_streams, width, done):
        """Draw the stream and the end of each row (R,) of an update; a share of the rows ends at the newest symbol."""
        n_rows = self.settings.rows
        key = key_of(self.settings.seed, self.n_updates, 'rows') >> 1
        numbers = mix64(np.arange(3 * n_rows, dtype=np.uint64) + np.uint64(key)).reshape(3, n_rows)
        streams = below(n_streams, numbers[0])
        ends = width + below(done - width + 1, numbers[1])
        is_newest = below(1000, numbers[2]) < 1000 * self.settings.newest
        return streams, np.where(is_newest, done, ends)

    # --- what it knows ---

    def integers(self, rows=None):
        """Return the current weights as an integer model; rows (N, T) int64 renew the ranges of its activations."""
        args = self.settings.args
        tensors = {}
        for name, w in weights.fold(self.models[0].state_dict(), args).items():
            largest = np.abs(w).max(-1, keepdims=True)
            scale = np.maximum(largest, 1e-9) / LEVELS
            tensors[name] = (np.rint(w / scale).astype(np.int32), scale)
        if rows is not None:
            self.sites = exact.fit_sites(args, tensors, rows)
        return exact.Exact(args, tensors, *self.sites)

    def digest(self):
        """Return the SHA-256 of the weights."""
        h = hashlib.sha256()
        for p in self.params[0]:
            h.update(p.detach().numpy().tobytes())
        return h.hexdigest()

    def state(self):
        """Return all that restore() needs."""
        return dict(model=self.models[0].state_dict(), adam=self.adam.state_dict(), momentum=self.momentum,
                    n_updates=self.n_updates, sites=self.sites)

    def restore(self, state):
        """Go on from a state."""
        self.models[0].load_state_dict(state['model'])
        self.adam.load_state_dict(state['adam'])
        for mine, saved in zip(self.momentum, state['momentum']):
            mine.copy_(saved)
        self.n_updates = state['n_updates']
        self.sites = state['sites']
        self.spread()


@torch.no_grad()
def muon_direction(p, momentum):
    """Add a matrix's gradient to its momentum, and return what Muon steps along."""
    momentum.mul_(MOMENTUM).add_(p.grad)
    return orthogonalise(p.grad + MOMENTUM * momentum)


def fingerprint(settings):
    """What must agree between packing and unpacking machine; takes three training steps at the archive's shapes."""
    learner = Learner(settings)
    size = settings.args['block_size']
    n_rows = settings.rows
    for i in range(3):
        numbers = mix64(np.arange(n_rows * size + 1, dtype=np.uint64) + np.uint64(i << 32))
        symbols = 32 + below(64, numbers)
        x = symbols[:-1].reshape(n_rows, size)
        y = symbols[1:].reshape(n_rows, size)
        learner.update(x, y, 0.0)
    return dict(torch=torch.__version__, device='cpu', processor=cpu_name(), parts=PARTS, weights=learner.digest(),
                capability=torch.backends.cpu.get_cpu_capability(), arithmetic=arithmetic_hash(settings.args))
