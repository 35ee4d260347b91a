"""Score a model on a split: sums first (nats, tokens, correct), means last, every token once, over all ranks.

Below: losses token by token, 95 % intervals over documents, and the same target tokens with and without metadata.
"""
import copy
import functools
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
CHUNK = 1 << 20                 # tokens searched at a time for marks between documents
WIKI40B_MARK = b'\n_START_ARTICLE_\n'


# --- rows that score every token once ---

def n_windows(n_tokens, block_size, minimal_context=0):
    """Count the rows that windows yields."""
    skip = max(minimal_context - 1, 0)
    if skip >= block_size:
        raise UserError(f'minimal_context_window = {minimal_context}, expected at most block_size = {block_size}')
    if n_tokens == 0:
        return 0
    after_first = max(0, n_tokens - block_size)
    return 1 + -(-after_first // (block_size - skip))


def windows(n_tokens, block_size, minimal_context=0):
    """Yield (start, first scored offset) of evaluation rows that score each of n_tokens exactly once.

    With minimal_context m, every scored token sees at least m predecessors where they exist: the target at offset o of
    a row has o + 1 inputs, so rows after the first score offsets from m - 1 on and advance by block_size - (m - 1).
    """
    skip = max(minimal_context - 1, 0)
    first_scored = 0
    for i in range(n_windows(n_tokens, block_size, minimal_context)):
        yield i * (block_size - skip), first_scored
        first_scored = skip


def rows_per_forward(block_size):
    """Rows per evaluation forward: about 16,384 tokens, where there is no GPU 4,096, which stay in a core's cache."""
    n_tokens = 4096
    if torch.cuda.is_available():
        n_tokens = 16384
    return max(1, n_tokens // block_size)


def gather_windows(data, batch, block_size):
    """Return inputs and targets, two (B, T) arrays, of a list of windows; targets before the first scored offset: -1.

    An empty batch becomes one row that scores nothing.
    """
    batch = batch or [(0, block_size)]
    x, y = data.gather([start for start, _ in batch], block_size)
    for target, (_, first_scored) in zip(y, batch):
        target[:first_scored] = -1
    return x, y


# --- sums and means ---

@torch.no_grad()
def score(model, data, block_size, batch_size, env, minimal_context=0, max_blocks=0, progress='', skip_first=False,
          units=None):
    """Return {'nats', 'tokens', 'correct'} of model on data (bins.Bin), summed over all ranks.

    batch_size: rows per forward on each rank. env: Env. max_blocks > 0 scores that many leading rows only.
    skip_first: the published convention, where a block's first token is input only (1,023 of 1,024 are scored).
    units: takes the losses of documents too. Cross-entropy is float32 per token and summed in float64.
    """
    n_rows = n_windows(data.n_tokens, block_size, minimal_context)
    if max_blocks:
        n_rows = min(n_rows, max_blocks)
    rows = windows(data.n_tokens, block_size, minimal_context)
    if skip_first:
        rows = ((start + 1, first_scored) for start, first_scored in rows)
        block_size -= 1
    rows_of_rank = islice(rows, env.rank, n_rows, env.world)

    sums = torch.zeros(3, dtype=torch.float64)                  # nats, tokens, correct
    was_training = model.training
    model.eval()
    if data.padded:
        model.left_padding = True                               # no other data has inputs that it would hide
    shown = progress and env.main
    bar = tqdm(total=n_rows, desc=progress, unit='row', disable=not shown, leave=False, mininterval=1)

    # Each rank makes as many forwards as the others: with FSDP2 all take part in each.
    n_forwards = -(-n_rows // (batch_size * env.world))
    for _ in range(n_forwards):
        batch = list(islice(rows_of_rank, batch_size))
        x, y = gather_windows(data, batch, block_size)
        x = env.put(x)
        y = env.put(y)
        with env.autocast():
            logits = model(x)
        nats, sums_of_batch = batch_sums(logits, y)
        sums += sums_of_batch
        if units and batch:
            starts = [start for start, _ in batch]
            scored = (y >= 0).cpu().numpy()
            units.add(starts, nats.numpy(), scored)
        bar.update(len(batch) * env.world)
    bar.close()
    model.train(was_training)
    nats, tokens, correct = env.sum(sums).tolist()
    return dict(nats=nats, tokens=int(tokens), correct=int(correct))


def batch_sums(logits, y):
    """Return the losses (B, T), float32, and the sums (3,) of nats, tokens and correct ones, float64; both on the CPU.

    There because MPS has no float64. Targets y (B, T) of -1 are never an argmax.
    """
    nats = losses_of(logits, y).cpu()
    n_scored = (y >= 0).sum()
    n_correct = (logits.argmax(-1) == y).sum()
    counts = torch.stack((n_scored, n_correct)).cpu().double()
    total = nats.flatten().sum(dtype=torch.float64)
    return nats, torch.cat((total[None], counts))


def losses_of(logits, y):
    """Return the cross-entropy (B, T), float32, of targets y (B, T), 0 where they are -1."""
    logits = logits.flatten(0, 1).float()
    return F.cross_entropy(logits, y.flatten(), ignore_index=-1, reduction='none').view(y.shape)


def metrics(sums, text_bytes, vocab_size):
    """Turn sums over tokens that stand for text_bytes bytes into nats, bits per byte, perplexity, accuracy, bytes.

    accuracy: share of tokens that are the most likely one (what Badger calls Hamming). information: 1 - H/ln V, the
    share of a uniform token's entropy that the model knows; negative where it is worse than a guess.
    """
    n_tokens = max(sums['tokens'], 1)
    loss = sums['nats'] / n_tokens
    bits = sums['nats'] / LN2
    uniform_loss = math.log(max(vocab_size, 2))
    return dict(
        loss_nats=loss,
        bits_per_byte=bits / max(text_bytes, 1),
        perplexity=math.exp(min(loss, 700)),
        accuracy=sums['correct'] / n_tokens,
        information=1 - loss / uniform_loss,
        data_bytes=bits / 8,
        tokens=sums['tokens'],
        text_bytes=text_bytes)


def evaluate(model, data, block_size, batch_size, env, minimal_context=0, max_blocks=0, progress='', skip_first=False,
             units=None):
    """Score and return metrics; text bytes are those of the scored tokens, with skip_first their share of the split."""
    sums = score(model, data, block_size, batch_size, env, minimal_context, max_blocks, progress, skip_first, units)
    if data.row_length:
        # Prefixes and padding are tokens too, but they are not scored.
        text_bytes = data.head(max_blocks * block_size).text_bytes
    elif skip_first:
        text_bytes = round(data.text_bytes * sums['tokens'] / max(data.n_tokens, 1))
    else:
        text_bytes = data.head(sums['tokens']).text_bytes
    return metrics(sums, text_bytes, data.vocab_size)


def random_like(data, seed):
    """Return up to 2^20 leading tokens of data (bins.Bin) with uniformly random ids in place of its own: a control.

    Rows keep their masks. No model is right about these tokens: H >= ln V, accuracy 1/V, information <= 0.
    """
    row = max(data.row_length, 1)
    control = copy.copy(data.head(RANDOM_TOKENS // row * row))
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, data.vocab_size, control.n_tokens)
    control.tokens = ids.astype(control.tokens.dtype)
    return control


def embedding_nats(n_numbers, bits, n_tokens):
    """Return what a vector that a decoder is given costs beside the loss, in nats per token: n·bits·ln2/n_tokens."""
    return n_numbers * bits * LN2 / n_tokens


# --- token by token ---

def two_windows(model, x, y):
    """Return S(t) - S(t-1) in nats, (B, T) float64, of targets y (B, T), -1 not scored, given inputs x (B, T).

    S(t): summed cross-entropy of targets 1..t where the model is given the inputs 1..t and nothing after them.
    """
    sums = [torch.zeros(len(x), dtype=torch.float64, device=x.device)]
    for t in range(1, x.shape[1] + 1):
        logits = model(x[:, :t])
        nats = losses_of(logits, y[:, :t])
        sums.append(nats.double().sum(1))
    return torch.stack(sums, 1).diff()


def token_costs(model, x, y):
    """Return {name: (B, T)}: loss, two-window entropy, and occlusion where a model has a memory (see lab/probe.py).

    Of a memory model of chunks the loss itself is the difference of two windows: no vector reaches back.
    """
    logits = model(x).float()
    loss = losses_of(logits, y).double()
    costs = dict(loss_nats=loss)
    if model.config.wrapper == 'memory':
        costs['two_window_nats'] = loss
    else:
        # An oracle takes shorter rows here, knowingly.
        of_any_length = model
        if model.config.wrapper == 'oracle':
            of_any_length = functools.partial(model, whole_rows=False)
        costs['two_window_nats'] = two_windows(of_any_length, x, y)
    if getattr(model, 'encoder', None) is not None:
        blind = model(x, blind=True).float()
        costs['occlusion_nats'] = losses_of(blind, y).double() - loss
        costs['occlusion_l1'] = (blind - logits).abs().sum(-1)
        costs['occlusion_cosine'] = 1 - torch.cosine_similarity(blind, logits, -1)
    return costs


# --- intervals ---

class UnitSums:
    """Nats and scored tokens, (2, units), of each unit of a split; edges: where each unit starts."""

    def __init__(self, edges):
        self.edges = edges
        self.sums = np.zeros((2, len(edges)))

    def add(self, starts, nats, scored):
        """Take the losses (B, T) in nats of rows that start at starts (B,); scored (B, T) says which count."""
        position = np.asarray(starts)[:, None] + np.arange(nats.shape[1])
        unit = np.searchsorted(self.edges, position[scored], 'right') - 1
        n_units = len(self.edges)
        self.sums[0] += np.bincount(unit, nats[scored], n_units)
        self.sums[1] += np.bincount(unit, minlength=n_units)

    def over_ranks(self, env):
        """Return the sums (2, units) of all ranks."""
        return env.sum(torch.from_numpy(self.sums)).cpu().numpy()


class Units(UnitSums):
    """Loss of each document of a split, or of each block of it where there are few, for the interval of their mean.

    Documents start where the index of the set says, else after the marks between them.
    """

    def __init__(self, data):
        if data.index:
            starts = np.fromfile(data.index, '<u8').astype(np.int64)
        else:
            starts = np.array([*document_starts(data)])
        starts = starts[starts < data.n_tokens]
        edges = np.unique(np.append(0, starts)).astype(np.int64)
        self.kind = 'documents'
        if len(edges) < FEW_DOCUMENTS:
            self.kind = f'blocks of {BLOCK_BYTES:,} bytes, as there are only {len(edges)} documents'
            text_bytes = max(data.text_bytes, 1)
            length = round(BLOCK_BYTES * data.n_tokens / text_bytes)
            edges = np.arange(0, max(data.n_tokens, 1), max(length, 1))
        super().__init__(edges)

    def interval(self, n_resamples, env):
        """Return the 95 % bootstrap interval of the mean loss over documents drawn with replacement, sums first."""
        nats, tokens = self.over_ranks(env)
        nats = nats[tokens > 0]
        tokens = tokens[tokens > 0]
        means = []
        for drawn in resamples(len(nats), n_resamples):
            means.append(nats @ drawn / (tokens @ drawn))
        low, high = middle_95(means)
        return dict(loss_low=low, loss_high=high, interval_over=f'{len(nats):,} {self.kind}')


def resamples(n_units, n_resamples):
    """Yield how often each unit is drawn, (n_units,), of n_units draws with replacement; the same in every run."""
    rng = np.random.default_rng(0)
    for _ in range(n_resamples):
        drawn = rng.integers(0, n_units, n_units)
        yield np.bincount(drawn, minlength=n_units)


def middle_95(means):
    """Return between which two values the middle 95 % of resampled means lie."""
    return np.quantile(means, (0.025, 0.975)).tolist()


def document_starts(data):
    """Yield where marks between documents end: end-of-text, three newlines, Wiki-40B's own; in constant memory."""
    if data.tokenizer != 'byte':
        for start in range(0, data.n_tokens, CHUNK):
            chunk = data.tokens[start:start + CHUNK]
            ends_of_text = np.flatnonzero(chunk == data.start_id)
            yield from (ends_of_text + start).tolist()
        return

    # Wiki-40B's mark begins a document, three newlines end one. A chunk reaches as far into the next one as a mark
    # that begins in it can.
    mark = b'\n\n\n'
    is_wiki40b = data.tokens[:len(WIKI40B_MARK)].tobytes() == WIKI40B_MARK
    if is_wiki40b:
        mark = WIKI40B_MARK
    for start in range(0, data.n_tokens, CHUNK):
        stop = start + CHUNK + len(mark) - 1
        chunk = data.tokens[start:stop].tobytes()
        for match in re.finditer(mark, chunk):
            if is_wiki40b:
                yield start + match.start()
            else:
                yield start + match.end()


# --- pairs: the same targets with and without metadata ---
# A set of prepare_metadata.py holds, for each type, the same pieces of validation documents with that metadata, without
# it, and behind another document's prefix. Every arm scores the same targets, so that losses differ by what is seen
# before them alone. Sums come first, means last: a document weighs as many tokens as it has.

def row_sums(model, rows, batch_size, env, progress=''):
    """Return the nats and scored tokens of each row, (2, n_rows), from all ranks."""
    units = UnitSums(np.arange(0, rows.n_tokens, rows.row_length))
    score(model, rows, rows.row_length, batch_size, env, progress=progress, units=units)
    return units.over_ranks(env)


def by_document(rows, sums, first_only):
    """Add the sums (2, n_rows) of each document's rows, or take its first row alone; (2, documents)."""
    first_rows = np.fromfile(rows.index, '<u8').astype(np.int64) // rows.row_length
    first_rows = first_rows[first_rows < sums.shape[1]]
    if first_only:
        return sums[:, first_rows]
    return np.add.reduceat(sums, first_rows, 1)


def difference(a, b, n_resamples):
    """Return the mean losses of two arms (2, documents) and a 95 % bootstrap interval over documents of a's - b's."""
    nats_a, tokens_a = a
    nats_b, tokens_b = b
    means = []
    for drawn in resamples(len(nats_a), n_resamples):
        gap = nats_a @ drawn - nats_b @ drawn
        means.append(gap / (tokens_a @ drawn))
    low = high = None
    if means:
        low, high = middle_95(means)
    loss_a = float(nats_a.sum() / tokens_a.sum())
    loss_b = float(nats_b.sum() / tokens_b.sum())
    return dict(
        with_nats=loss_a,
        without_nats=loss_b,
        difference_nats=loss_a - loss_b,
        difference_low=low,
        difference_high=high)


def evaluate_pairs(model, arms, batch_size, env, n_resamples=1000, max_rows=0, progress=''):
    """Yield two dicts of numbers of one type: over all pieces of the documents, and over first pieces alone.

    arms: {'with', 'without'[, 'other']: Rows}, see corpus.data.open_pairs. max_rows: leading rows of each, 0: all.
    """
    arms = {arm: rows.head(max_rows * rows.row_length) for arm, rows in arms.items()}
    sums = {}
    for arm, rows in arms.items():
        label = ''
        if progress:
            label = f'{progress} {arm}'
        sums[arm] = row_sums(model, rows, batch_size, env, label)
    for pieces in ('all', 'first'):
        documents = {}
        for arm, rows in arms.items():
            documents[arm] = by_document(rows, sums[arm], first_only=pieces == 'first')
        yield dict(pieces=pieces, **numbers_of_pairs(documents, arms['with'], n_resamples))


def numbers_of_pairs(documents, rows, n_resamples):
    """Return the numbers of the arms {arm: (2, documents)}; rows: those of the arm with metadata, for its bytes.

    true_wins: share of documents whose own prefix gives a lower loss than another document's, ties half.
    """
    nats, tokens = documents['with']
    n_tokens = int(tokens.sum())
    n_bytes = rows.text_bytes * n_tokens / rows.n_targets       # of first pieces: their share of the tokens
    numbers = dict(documents=len(nats), tokens=n_tokens,
                   **difference(documents['with'], documents['without'], n_resamples))
    total_nats = {arm: documents[arm][0].sum() for arm in ('with', 'without')}
    for arm, total in total_nats.items():
        numbers[f'{arm}_bits_per_byte'] = float(total / LN2 / n_bytes)
    for arm, total in total_nats.items():
        numbers[f'{arm}_perplexity'] = float(np.exp(total / n_tokens))
    if 'other' in documents:
        gain = documents['other'][0] - nats
        ties = (gain == 0).mean()
        numbers['true_wins'] = float((gain > 0).mean() + ties / 2)
    return numbers
