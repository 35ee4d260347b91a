"""Score a model on a split: sums first (nats, tokens, correct), means last, every token once, over all ranks."""
import copy
import math
import re
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import UserError

LN2 = math.log(2)
FEW_DOCUMENTS = 30              # below, the interval is over blocks
BLOCK_BYTES = 2048
RANDOM_TOKENS = 1 << 20         # of the control without any structure


def n_windows(n_tokens, block_size, minimal_context=0):
    """Count the rows that windows yields."""
    skip = max(minimal_context - 1, 0)
    if skip >= block_size:
        raise UserError(f'minimal_context_window = {minimal_context}, expected at most block_size = {block_size}')
    return 1 + max(0, -(-(n_tokens - block_size) // (block_size - skip))) if n_tokens else 0


def windows(n_tokens, block_size, minimal_context=0):
    """Yield (start, first scored offset) of evaluation rows that score each of n_tokens exactly once.

    With minimal_context m, every scored token sees at least m predecessors where they exist: the target at offset o of
    a row has o + 1 inputs, so rows after the first score offsets from m - 1 on and advance by block_size - (m - 1).
    """
    skip = max(minimal_context - 1, 0)
    for i in range(n_windows(n_tokens, block_size, minimal_context)):
        yield i * (block_size - skip), skip if i else 0


@torch.no_grad()
def score(model, data, block_size, batch_size, env, minimal_context=0, max_blocks=0, progress='', skip_first=False,
          units=None):
    """Return {'nats', 'tokens', 'correct'} of model on data (bins.Bin), summed over all ranks.

    batch_size: rows per forward on each rank. env: runs.Env. max_blocks > 0 scores that many leading rows only.
    skip_first: the published convention, where a block's first token is input only (1,023 of 1,024 are scored).
    units: takes the losses of documents too. Cross-entropy is float32 per token and summed in float64.
    """
    n_rows = n_windows(data.n_tokens, block_size, minimal_context)
    rows = windows(data.n_tokens, block_size, minimal_context)
    if skip_first:
        rows, block_size = ((start + 1, skip) for start, skip in rows), block_size - 1
    n_rows = min(n_rows, max_blocks or n_rows)
    rows = islice(rows, env.rank, n_rows, env.world)
    sums = torch.zeros(3, dtype=torch.float64)
    was_training = model.training
    model.eval()
    if data.padded:
        model.left_padding = True                               # no other data has inputs that it would hide
    bar = tqdm(total=n_rows, desc=progress, unit='row', disable=not (progress and env.main), leave=False, mininterval=1)
    for _ in range(-(-n_rows // (batch_size * env.world))):     # as many on each rank: with FSDP2 all take part in each
        batch = list(islice(rows, batch_size))
        x, y = data.gather([start for start, _ in batch] or [0], block_size)
        for target, (_, skip) in zip(y, batch or [(0, block_size)]):
            target[:skip] = -1
        x, y = env.put(x), env.put(y)
        with env.autocast():
            logits = model(x)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=-1, reduction='none').cpu()
        correct = (logits.argmax(-1) == y).sum()                # padding targets are -1, never an argmax
        counts = torch.stack(((y >= 0).sum(), correct)).cpu()     # on the CPU: MPS has no float64
        sums += torch.cat((nats.sum(dtype=torch.float64)[None], counts.double()))
        if units and batch:
            units.add([start for start, _ in batch], nats.view(y.shape).numpy(), (y >= 0).cpu().numpy())
        bar.update(len(batch) * env.world)
    bar.close()
    model.train(was_training)
    nats, tokens, correct = env.sum(sums).tolist()
    return dict(nats=nats, tokens=int(tokens), correct=int(correct))


def metrics(sums, text_bytes, vocab_size):
    """Turn sums over tokens that stand for text_bytes bytes into nats, bits per byte, perplexity, accuracy, bytes.

    accuracy: share of tokens that are the most likely one (what Badger calls Hamming). information: 1 - H/ln V, the
    share of a uniform token's entropy that the model knows; negative where it is worse than a guess.
    """
    tokens = max(sums['tokens'], 1)
    loss, bits = sums['nats'] / tokens, sums['nats'] / LN2
    return dict(loss_nats=loss, bits_per_byte=bits / max(text_bytes, 1), perplexity=math.exp(min(loss, 700)),
                accuracy=sums['correct'] / tokens, information=1 - loss / math.log(max(vocab_size, 2)),
                data_bytes=bits / 8, tokens=sums['tokens'], text_bytes=text_bytes)


def random_like(data, seed):
    """Return up to 2^20 leading tokens of data (bins.Bin) with uniformly random ids in place of its own: a control.

    Rows keep their masks. No model is right about these tokens: H >= ln V, accuracy 1/V, information <= 0.
    """
    part = copy.copy(data.head(RANDOM_TOKENS // max(data.row_length, 1) * max(data.row_length, 1)))
    part.tokens = np.random.default_rng(seed).integers(0, data.vocab_size, part.n_tokens).astype(part.tokens.dtype)
    return part


def embedding_nats(n_numbers, bits, n_tokens):
    """Return what a vector that a decoder is given costs beside the loss, in nats per token: n·bits·ln2/n_tokens."""
    return n_numbers * bits * LN2 / n_tokens


def evaluate(model, data, block_size, batch_size, env, minimal_context=0, max_blocks=0, progress='', skip_first=False,
             units=None):
    """Score and return metrics; text bytes are those of the scored tokens, with skip_first their share of the split."""
    sums = score(model, data, block_size, batch_size, env, minimal_context, max_blocks, progress, skip_first, units)
    if data.row_length:                                         # prefixes and padding are tokens too, but not scored
        return metrics(sums, data.head(max_blocks * block_size).text_bytes, data.vocab_size)
    part = round(data.text_bytes * sums['tokens'] / max(data.n_tokens, 1))
    text_bytes = part if skip_first else data.head(sums['tokens']).text_bytes
    return metrics(sums, text_bytes, data.vocab_size)


# --- token by token ---

def nats_of(logits, y):
    """Return the cross-entropy (B, T), float64, of targets y (B, T), 0 where they are -1."""
    return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=-1, reduction='none').view(
        y.shape).double()


def two_windows(model, x, y):
    """Return S(t) - S(t-1) in nats, (B, T) float64, of targets y (B, T), -1 not scored, given inputs x (B, T).

    S(t): summed cross-entropy of targets 1..t where the model is given the inputs 1..t and nothing after them.
    """
    sums = [torch.zeros(len(x), dtype=torch.float64, device=x.device)]
    sums += [nats_of(model(x[:, :t]), y[:, :t]).sum(1) for t in range(1, x.shape[1] + 1)]
    return torch.stack(sums, 1).diff()


def token_costs(model, x, y):
    """Return {name: (B, T)}: loss, two-window entropy, and occlusion where a model has a memory (see lab/probe.py).

    Of a memory model of chunks the loss itself is the difference of two windows: no vector reaches back.
    """
    logits, found = model(x).float(), {}
    loss = nats_of(logits, y)
    if getattr(model, 'encoder', None) is not None:
        with_memory = model.given
        model.given = lambda vector: torch.zeros_like(with_memory(vector))
        blind = model(x).float()
        del model.given
        found = dict(occlusion_nats=nats_of(blind, y) - loss, occlusion_l1=(blind - logits).abs().sum(-1),
                     occlusion_cosine=1 - torch.cosine_similarity(blind, logits, -1))
    if model.config.wrapper == 'memory':
        return dict(loss_nats=loss, two_window_nats=loss, **found)
    model.check = lambda rows: rows                             # an oracle takes shorter rows here, knowingly
    windows = two_windows(model, x, y)
    del model.check
    return dict(loss_nats=loss, two_window_nats=windows, **found)


# --- intervals ---

class Units:
    """Loss of each document of a split, or of each block of it where there are few, for the interval of their mean.

    Documents start where the index of the set says, else after the marks between them.
    """

    def __init__(self, data):
        starts = np.fromfile(data.index, '<u8').astype(np.int64) if data.index else np.array([*document_starts(data)])
        self.edges, self.kind = np.unique(np.append(0, starts[starts < data.n_tokens])).astype(np.int64), 'documents'
        if len(self.edges) < FEW_DOCUMENTS:
            length = max(1, round(BLOCK_BYTES * data.n_tokens / max(data.text_bytes, 1)))
            self.kind = f'blocks of {BLOCK_BYTES:,} bytes, as there are only {len(self.edges)} documents'
            self.edges = np.arange(0, max(data.n_tokens, 1), length)
        self.sums = np.zeros((2, len(self.edges)))                      # nats, tokens

    def add(self, starts, nats, scored):
        """Take the losses (B, T) in nats of rows that start at starts (B,); scored (B, T) says which count."""
        position = np.asarray(starts)[:, None] + np.arange(nats.shape[1])
        unit = np.searchsorted(self.edges, position[scored], 'right') - 1
        self.sums += [np.bincount(unit, nats[scored], len(self.edges)), np.bincount(unit, minlength=len(self.edges))]

    def interval(self, n_resamples, env):
        """Return the 95 % bootstrap interval of the mean loss over documents drawn with replacement, sums first."""
        nats, tokens = env.sum(torch.from_numpy(self.sums)).cpu().numpy()
        nats, tokens, rng, means = nats[tokens > 0], tokens[tokens > 0], np.random.default_rng(0), []
        for _ in range(n_resamples):
            drawn = np.bincount(rng.integers(0, len(nats), len(nats)), minlength=len(nats))
            means.append(nats @ drawn / (tokens @ drawn))
        low, high = np.quantile(means, (0.025, 0.975)).tolist()
        return dict(loss_low=low, loss_high=high, interval_over=f'{len(nats):,} {self.kind}')


def document_starts(data):
    """Yield where marks between documents end: end-of-text, three newlines, Wiki-40B's own; in constant memory."""
    for start in range(0, data.n_tokens if data.tokenizer != 'byte' else 0, 1 << 20):
        yield from (np.flatnonzero(data.tokens[start:start + (1 << 20)] == data.start_id) + start).tolist()
    wiki40b = data.tokens[:17].tobytes() == b'\n_START_ARTICLE_\n'
    mark = b'\n_START_ARTICLE_\n' if wiki40b else b'\n\n\n'
    for start in range(0, data.n_tokens if data.tokenizer == 'byte' else 0, 1 << 20):
        piece = data.tokens[start:start + (1 << 20) + len(mark) - 1].tobytes()
        yield from (start + found.end() - (len(mark) if wiki40b else 0) for found in re.finditer(mark, piece))


def rows_per_forward(block_size):
    """Rows per evaluation forward: about 16,384 tokens, where there is no GPU 4,096, which stay in a core's cache."""
    return max(1, (16384 if torch.cuda.is_available() else 4096) // block_size)

