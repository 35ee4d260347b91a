"""Measure how diverse data sets are: Task2Vec diversity coefficient, cross-diversity, and cheap companions.

    python -m lab.diversity config/diversity/task2vec.py --dataset=pubmed,uspto,mix          GPT-2 as probe
    python -m lab.diversity --probe=out/RUN --dataset=mine --n_batches=8 --n_sequences=64    one of our own checkpoints

In: data sets, a probe network. Out: a table and OUT_DIR/{run.json, table.md, table.csv, NAME-HASH/BATCH.npy}. Each
batch of text is embedded by what a probe, its head fitted to the batch, would learn from it: the diagonal Fisher
information (Achille et al. 2019). The coefficient is the mean distance between embeddings of batches of one set (Lee
et al. 2023), 1 - cross-diversity the alignment of two. Values are comparable under one protocol only, which is stored
with every number; a folder takes one protocol. Embeddings are kept: the same command goes on where it stopped, and
later sets join earlier ones. body_diversity leaves out the rows of the token embedding, which say only which ids occur
in a batch: much of the coefficient is that (LOG).
"""
import hashlib
import itertools
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace

from configurator import at_least, configure, names_in, require

# -----------------------------------------------------------------------------
dataset = ''                    # data sets, comma-separated; a+b is both in equal parts, mix stands for data_mix
data_mix = ''                   # 'pubmed:0.5,uspto:0.5'
eval_sets = ''                  # held-out sets for the vocabulary overlap, which is a known confounder; '' = none
split = 'train'
max_tokens = 0                  # leading tokens of each set, shared by the sources of a mixture; 0 = all
data_dir = 'data'
out_dir = 'out/diversity'
# protocol: published values are the defaults
probe = 'gpt2'                  # hub id or Hugging Face folder of a GPT-2, or a checkpoint or run folder of ours
n_batches = 200                 # batches embedded of each set; more narrow the interval, the coefficient stays
n_sequences = 512               # of a batch
sequence_length = 128
head_epochs = 10                # passes over the batch that fit the head
head_batch_size = 8
head_learning_rate = 5e-5       # AdamW, no decay
seed = 0
# speed
micro_batch_size = 0            # sequences per backward; 0 = about 4,096 tokens
bounds = False                  # measure constant and uniformly random tokens too: they should enclose every text
companion_units = 100_000       # leading words (byte data) or tokens for n-grams and vocabulary overlap
device = 'auto'
# -----------------------------------------------------------------------------


def rules(k):
    """Return what must hold of the knobs, as require takes it."""
    names = names_in(k.dataset)
    lowest = dict(n_batches=2, n_sequences=1, sequence_length=1, head_epochs=0, head_batch_size=1, micro_batch_size=0,
                  companion_units=100, max_tokens=0)
    return [(names or k.bounds, 'dataset is empty; name sets, --dataset=pubmed,uspto,mix'),
            ('mix' not in names or k.data_mix,
             "dataset names mix, but data_mix is empty; give --data_mix='a:0.5,b:0.5'"),
            *(at_least(name, vars(k)[name], low) for name, low in lowest.items()),
            (k.head_learning_rate > 0, f'head_learning_rate = {k.head_learning_rate}, expected > 0')]


config = configure(globals(), rules=rules)

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from corpus.bins import key_of, permute, write_json
from corpus.data import open_data, open_split
from corpus.mixture import parse_mix
from model import linear
from training.checkpoint import load_model
from training.folder import RunRecord
from training.process import Env
from training.table import markdown, write_csv

SHOWN = 'data diversity ci95 pairs_ci95 body_diversity n_batches ngram_diversity'.split()
EPSILON = 1e-8


@dataclass
class Protocol:
    """How a batch is made and embedded: knobs of these names. Numbers are comparable under one protocol only."""
    n_sequences: int
    sequence_length: int
    head_epochs: int
    head_batch_size: int
    head_learning_rate: float
    seed: int


# --- the embedding of a batch ---

def fisher_layers(model):
    """Return [(name, module)] of the weights that enter an embedding: all but biases and the head, as in Task2Vec.

    A matrix gives a number per row of Hugging Face's layout, whose Conv1D is input x output: one per input feature.
    GPT-2 small: 134,993 numbers.
    """
    kinds = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
    return [(name, m) for name, m in model.named_modules() if isinstance(m, kinds) and m is not model.head]


def embedding_width(model):
    """Count the numbers of an embedding."""
    width = 0
    for _, module in fisher_layers(model):
        width += module.weight.shape[1] if isinstance(module, nn.Linear) else module.weight.shape[0]
    return width


def squared_gradients(module, x, delta):
    """Return the squared gradients of a layer's weight, per sequence, averaged over all axes but the first, summed.

    x: what went in, (B, T, ...); delta: gradient of what came out, (B, T, ...). The gradient of a matrix for one
    sequence is sum_t delta_t x_t', so its squared norm over outputs is x' (delta delta') x: T x T products per
    sequence in place of a gradient per sequence.
    """
    if isinstance(module, nn.LayerNorm):
        return squared_gradients_of_gain(F.layer_norm(x, module.normalized_shape, eps=module.eps), delta)
    if isinstance(module, nn.RMSNorm):
        return squared_gradients_of_gain(F.rms_norm(x, module.normalized_shape, eps=module.eps), delta)
    gram = delta @ delta.transpose(1, 2)                                        # (B, T, T)
    if isinstance(module, nn.Linear):
        return (x * (gram @ x)).sum((0, 1)) / delta.shape[-1]

    # The row of an id collects the places where the id stands.
    same_id = x[:, :, None] == x[:, None, :]
    of_places = (gram * same_id).sum(2)                                         # (B, T)
    total = torch.zeros(module.weight.shape[0], dtype=delta.dtype, device=delta.device)
    return total.index_add_(0, x.flatten(), of_places.flatten()) / delta.shape[-1]


def squared_gradients_of_gain(normed, delta):
    """Return what squared_gradients does of a norm's gain (C,), given its normed input and the gradient, (B, T, C)."""
    of_sequences = (delta * normed).flatten(1, -2).sum(1)
    return of_sequences.square().sum(0)


class FisherSums:
    """Squared gradients of all layers of a model, summed over the sequences that go through it while it is watched."""

    def __init__(self, model):
        self.embed = model.embed
        self.position = getattr(model, 'position', None)
        self.layers = [module for _, module in fisher_layers(model)]
        self.sums = {}

    def watch(self):
        """Hook into the layers; returns handles that undo it."""
        return [module.register_forward_hook(self.on_forward) for module in self.layers if module is not self.position]

    def on_forward(self, module, inputs, output):
        if not output.requires_grad:                                            # the first layer: weights are frozen
            output.requires_grad_()
        output.register_hook(partial(self.on_backward, module, inputs[0].detach()))

    def on_backward(self, module, x, delta):
        self.add(module, squared_gradients(module, x, delta))

        # Positions are added to the token embedding: they have its gradient.
        if module is self.embed and self.position is not None:
            of_positions = torch.zeros(self.position.weight.shape[0], dtype=delta.dtype, device=delta.device)
            of_positions[:delta.shape[1]] = delta.square().sum((0, 2)) / delta.shape[2]
            self.add(self.position, of_positions)

    def add(self, module, squares):
        self.sums[module] = self.sums.get(module, 0) + squares


def fisher(model, head, x, uniforms, micro):
    """Return the Task2Vec embedding (width,) of rows x (n, T): the diagonal Fisher of the body, mean over sequences.

    Targets are sampled from the model itself by inverting its distribution at uniforms (n, T). The loss of a sequence
    is its mean over tokens. head: (V, C), the fitted one. micro: sequences per backward.
    """
    gradients = FisherSums(model)
    handles = gradients.watch()
    try:
        for start in range(0, len(x), micro):
            logits = linear(model.hidden(x[start:start + micro]), head)         # (B, T, V)
            targets = sampled(logits, uniforms[start:start + micro])
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction='sum') / x.shape[1]
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat([gradients.sums[module] for module in gradients.layers]) / len(x)


@torch.no_grad()
def sampled(logits, uniforms):
    """Return ids (B, T) drawn by logits (B, T, V): the distribution inverted at uniforms (B, T)."""
    steps = logits.softmax(-1).cumsum(-1)
    level = (uniforms * steps[..., -1])[..., None]
    ids = torch.searchsorted(steps, level, right=True)[..., 0]
    return ids.clamp_(max=logits.shape[-1] - 1)


def fit_head(model, x, y, micro, generator, protocol):
    """Return the model's head (V, C) after some epochs over a batch; the body is frozen, so its states serve."""
    with torch.no_grad():
        states = torch.cat([model.hidden(x[i:i + micro]) for i in range(0, len(x), micro)])     # (n, T, C)
    head = model.head.weight.detach().clone().requires_grad_()                  # untied from the embedding
    optimizer = torch.optim.AdamW([head], lr=protocol.head_learning_rate, weight_decay=0.0)
    for _ in range(protocol.head_epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for rows in order.split(protocol.head_batch_size):
            logits = linear(states[rows], head)
            loss = F.cross_entropy(logits.flatten(0, 1), y[rows].flatten(), ignore_index=-1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return head.detach()


def embed(model, x, y, key, micro, protocol):
    """Return the embedding (width,) of a batch; key seeds the order of rows that fit the head, and the targets."""
    generator = torch.Generator().manual_seed(key >> 1)
    head = model.head.weight.detach()
    if protocol.head_epochs:
        head = fit_head(model, x, y, micro, generator, protocol)
    uniforms = torch.rand(x.shape, generator=generator).to(x.device)
    return fisher(model, head, x, uniforms, micro).cpu().numpy()


# --- distances ---

def distance(a, b):
    """Cosine distance of two embeddings, each divided by their sum (Achille et al. 2019, eq. 5)."""
    total = a + b + EPSILON
    a = a / total
    b = b / total
    return 1 - float(a @ b / math.sqrt((a @ a) * (b @ b)))


def coefficient(embeddings):
    """Return the mean distance over pairs of batches, with two half-widths of a 95 % interval.

    ci95: jackknife over batches, since pairs share them. pairs_ci95: as if pairs were independent, as published.
    """
    n = len(embeddings)
    distances = np.zeros((n, n))
    for i, j in itertools.combinations(range(n), 2):
        distances[i, j] = distances[j, i] = distance(embeddings[i], embeddings[j])
    mean = distances.sum() / (n * (n - 1))
    numbers = dict(diversity=float(mean), n_batches=n)
    if n > 2:
        without_one = (distances.sum() - 2 * distances.sum(1)) / ((n - 1) * (n - 2))
        squares = float(((without_one - mean) ** 2).sum())
        of_pairs = distances[np.triu_indices(n, 1)]
        numbers['ci95'] = 1.96 * math.sqrt((n - 1) / n * squares)
        numbers['pairs_ci95'] = 1.96 * float(of_pairs.std(ddof=1)) / math.sqrt(len(of_pairs))
    return numbers


def cross_diversity(first, second):
    """Return the mean distance between the embeddings of two sets."""
    return float(np.mean([distance(a, b) for a in first for b in second]))


# --- sources of batches: rows(b) gives inputs and targets, (n, T) each; name, sha256 say of what ---

class Synthetic:
    """A text of one token, or of uniformly random ones: below and above what every text measures.

    Random tokens are an upper bound only where a batch cannot hold every id: batches then differ in the ids that they
    hold. 8,192 random bytes are as good as any other 8,192, and real text is more diverse (LOG).
    """

    def __init__(self, name, vocab_size, protocol):
        self.name = name
        self.vocab_size = vocab_size
        self.sha256 = f'{name}:{vocab_size}'
        self.seed = protocol.seed
        self.shape = (protocol.n_sequences, protocol.sequence_length + 1)

    def rows(self, b):
        if self.name == 'random':
            rng = np.random.Generator(np.random.PCG64([self.seed, b]))
            ids = rng.integers(0, self.vocab_size, self.shape)
        else:
            ids = np.full(self.shape, self.vocab_size // 2)
        return ids[:, :-1].copy(), ids[:, 1:].copy()


class Blocks:
    """Batches of disjoint blocks of a data set or mixture, in the order of training."""

    def __init__(self, data, name, n_batches, protocol):
        self.data = data
        self.name = name
        self.sha256 = data.sha256
        self.protocol = protocol
        self.is_mixture = hasattr(data, 'sources')
        n = protocol.n_sequences
        length = protocol.sequence_length
        self.n_blocks = data.n_tokens // length                                 # whole ones
        available = self.n_blocks // n
        if self.is_mixture:
            available = data.n_batches(n, length, protocol.seed)
        require((available >= n_batches, f'{name} has {available} batches of {n} x {length} tokens, n_batches ='
                 f' {n_batches}; give it more text or use fewer batches'))

    def rows(self, b):
        n = self.protocol.n_sequences
        length = self.protocol.sequence_length
        seed = self.protocol.seed
        if self.is_mixture:
            starts = self.data.starts('permuted', seed, 0, 0, b, n, length)
        else:
            blocks = np.arange(b * n, (b + 1) * n)
            starts = permute(blocks, self.n_blocks, key_of(seed, 0)) * length
        return self.data.gather(starts, length)


# --- companions: cheap numbers beside the coefficient ---

def units_of(data, n_units):
    """Return leading words of byte data, or tokens, as an array to compare sets by; of a mixture by its shares."""
    if hasattr(data, 'sources'):
        of_sources = []
        for source, share in zip(data.sources, data.shares):
            of_sources.append(units_of(source, n_units)[:round(n_units * share)])
        return np.concatenate(of_sources)
    if data.tokenizer != 'byte':
        return np.asarray(data.tokens[:n_units]).astype('U8')
    words = data.tokens[:20 * n_units].tobytes().split()
    return np.array(words[:n_units])


def ngram_diversity(units, n=3):
    """Share of distinct n-grams among all."""
    _, ids = np.unique(units, return_inverse=True)
    n_grams = np.lib.stride_tricks.sliding_window_view(ids, n)
    return len(np.unique(n_grams, axis=0)) / max(1, len(ids) - n + 1)


def jaccard(a, b):
    """Overlap of two vocabularies: size of what they share over size of what they have together."""
    shared = len(np.intersect1d(a, b))
    return shared / (len(np.unique(a)) + len(np.unique(b)) - shared)


# --- the run ---

def mix_of(name, data_mix):
    """Return the mixture that a name of --dataset stands for, '' where it is a data set of that name."""
    if name == 'mix':
        return data_mix
    return name.replace('+', ',') if '+' in name else ''


def check_fit(probe, checkpoint, sets, length):
    """Raise UserError where the probe cannot read rows of this length, or one of the data sets {name: data}."""
    tokenizer = checkpoint['data']['tokenizer']
    vocab_size = checkpoint['model_args']['vocab_size']
    longest = checkpoint['model_args']['block_size']
    rules = [(length <= longest, f'sequence_length = {length}, the probe was built for at most {longest}')]
    for name, data in sets.items():
        fits = data.tokenizer == tokenizer and data.vocab_size <= vocab_size
        rules.append((fits, f'{name} holds {data.tokenizer!r} tokens with a vocabulary of {data.vocab_size}, the probe'
                      f' {probe} reads {tokenizer!r} with {vocab_size}; prepare the text with the tokenizer of the'
                      ' probe'))
    require(*rules)


def hash_of(tensors):
    """Return the SHA-256 of tensors, one after the other."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def check_protocol(protocol, out_dir):
    """Refuse a folder that holds numbers of another protocol; note this one, a dict, in an empty one."""
    path = os.path.join(out_dir, 'protocol.json')
    if not os.path.exists(path):
        os.makedirs(out_dir, exist_ok=True)
        write_json(path, protocol)
        return
    with open(path, encoding='utf-8') as f:
        there = json.load(f)
    differ = []
    for name, value in protocol.items():
        if there.get(name) != value:
            differ.append(f'{name} = {there.get(name)!r} there, {value!r} now')
    require((not differ, f'{out_dir} holds numbers of another protocol, which these cannot be compared with'
             f' ({"; ".join(differ)}); use the same protocol or another --out_dir'))


def embeddings_of(source, n_batches, model, env, micro, protocol, out_dir, progress):
    """Return the embeddings (n_batches, width) of a source; those of an earlier run are read, each new one is kept."""
    digest = hashlib.sha256(source.sha256.encode()).hexdigest()
    folder = os.path.join(out_dir, f'{source.name}-{digest[:8]}')
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, f'{b}.npy') for b in range(n_batches)]
    for b in range(env.rank, n_batches, env.world):
        if not os.path.exists(paths[b]):
            x, y = source.rows(b)
            key = key_of(protocol.seed, source.name, b)
            embedding = embed(model, env.put(x), env.put(y), key, micro, protocol)
            require((np.isfinite(embedding).all(), f'the embedding of {source.name}, batch {b}, is not finite;'
                     ' check the probe, or use a lower --head_learning_rate'))
            with open(f'{paths[b]}.tmp', 'wb') as f:
                np.save(f, embedding)
            os.replace(f'{paths[b]}.tmp', paths[b])
        progress.update()
    env.barrier()
    return np.stack([np.load(path).astype(np.float64) for path in paths])


def row_of(source, embeddings, vocab_size, data, mix, held_units, n_units):
    """Return the table row of a source, without its protocol.

    data: the data set or mixture, None of a synthetic text; mix: what it is mixed of. held_units: {held-out set: units}
    for the overlap of vocabularies; n_units: how many units of data are compared with them.
    """
    row = dict(data=source.name, sha256=source.sha256, **coefficient(embeddings))
    row['body_diversity'] = coefficient(embeddings[:, vocab_size:])['diversity']
    if data is not None:
        row['shares'] = parse_mix(mix or source.name)
        units = units_of(data, n_units)
        row['ngram_diversity'] = ngram_diversity(units)
        for name, other in held_units.items():
            row[f'overlap_{name}'] = jaccard(units, other)
    return row


def cross_rows(embeddings):
    """Return a table row for each two of the sets {name: embeddings}, without their protocol."""
    rows = []
    for first, second in itertools.combinations(embeddings, 2):
        value = cross_diversity(embeddings[first], embeddings[second])
        rows.append(dict(first=first, second=second, cross_diversity=value, alignment=1 - value))
    return rows


def check_bounds(rows, vocab_size, protocol):
    """Raise UserError unless constant text is below all texts, and random tokens above where they can be.

    rows: of the texts, then of the constant and the random one. Random tokens are a bound where a batch lacks ids.
    """
    *texts, low, high = (row['diversity'] for row in rows)
    useless = 'this probe and protocol do not measure diversity'
    batch = protocol.n_sequences * protocol.sequence_length
    holds_every_id = math.exp(-batch / vocab_size) < 0.01                       # the share of ids that it lacks
    is_above = high > max([*texts, low])
    require((low < min([*texts, high]), f'constant text ({low:.4f}) is not below the others: {useless}'),
            (holds_every_id or is_above, f'random tokens ({high:.4f}) are not above the texts: {useless}'))
    if not is_above:
        print(f'random tokens are no upper bound here: {batch:,} of them hold all {vocab_size:,} ids, so'
              ' that one batch is like another')


if __name__ == '__main__':
    k = SimpleNamespace(**config)
    protocol = Protocol(n_sequences, sequence_length, head_epochs, head_batch_size, head_learning_rate, seed)
    env = Env(device, 'float32')
    model, checkpoint = load_model(probe, env.device)
    model.eval().requires_grad_(False)
    vocab_size = checkpoint['model_args']['vocab_size']

    # The sets to measure, and held-out ones to compare their vocabularies with.
    names = names_in(dataset)
    mixes = {name: mix_of(name, data_mix) for name in names}
    opened = {}
    for name in names:
        data = open_data(data_dir, name, split, sequence_length, mixes[name], 'first_exhausted')
        opened[name] = data.head(max_tokens)
    held_split = 'test' if split == 'train' else split
    held_out = {name: open_split(data_dir, name, held_split) for name in names_in(eval_sets)}
    check_fit(probe, checkpoint, opened | held_out, sequence_length)
    sources = [Blocks(data, name, n_batches, protocol) for name, data in opened.items()]
    if bounds:
        sources += [Synthetic(name, vocab_size, protocol) for name in ('constant', 'random')]

    # A folder holds numbers of one protocol.
    stored_protocol = dict(
        probe_sha256=hash_of(checkpoint['model'].values()),
        tokenizer=checkpoint['data']['tokenizer'],
        split=split,
        **asdict(protocol))
    if env.main:
        check_protocol(stored_protocol, out_dir)
    env.barrier()
    record = RunRecord(out_dir, config, env, protocol=stored_protocol)

    # Ranks share the batches; the rest is for one.
    micro = micro_batch_size or max(1, 4096 // sequence_length)
    embeddings = {}
    n_own = len(range(env.rank, n_batches, env.world))
    with tqdm(total=len(sources) * n_own, unit='batch', disable=not env.main) as progress:
        for source in sources:
            progress.set_description(source.name)
            embeddings[source.name] = embeddings_of(source, n_batches, model, env, micro, protocol, out_dir, progress)
    env.close()
    if not env.main:
        sys.exit(0)

    # Every row carries the protocol.
    held_units = {name: units_of(data, companion_units) for name, data in held_out.items()}
    rows = []
    for source in sources:
        row = row_of(source, embeddings[source.name], vocab_size, opened.get(source.name), mixes.get(source.name),
                     held_units, companion_units)
        rows.append(row | stored_protocol)
    crossed = [row | stored_protocol for row in cross_rows(embeddings)]
    record.update(status='done', rows=rows, cross=crossed)

    # The tables.
    table = markdown(rows, [*SHOWN, *(f'overlap_{name}' for name in held_out)])
    if crossed:
        table += '\n\n' + markdown(crossed, ['first', 'second', 'cross_diversity', 'alignment'])
    with open(os.path.join(out_dir, 'table.md'), 'w', encoding='utf-8') as f:
        f.write(f'{table}\n\nProtocol: {json.dumps(stored_protocol)}\n')
    write_csv(os.path.join(out_dir, 'table.csv'), rows)
    print(f'{table}\nwrote {out_dir}')
    if bounds:
        check_bounds(rows, vocab_size, protocol)
