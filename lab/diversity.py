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

import numpy as np

from configurator import at_least, configure, require, run

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

PROTOCOL = ('n_sequences', 'sequence_length', 'head_epochs', 'head_batch_size', 'head_learning_rate', 'seed')
SHOWN = 'data diversity ci95 pairs_ci95 body_diversity n_batches ngram_diversity'.split()
EPSILON = 1e-8


# --- the embedding of a batch ---

def fisher_layers(model):
    """Return [(name, module)] of the weights that enter an embedding: all but biases and the head, as in Task2Vec.

    A matrix gives a number per row of Hugging Face's layout, whose Conv1D is input x output: one per input feature.
    GPT-2 small: 134,993 numbers.
    """
    from torch import nn
    return [(name, m) for name, m in model.named_modules()
            if isinstance(m, (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)) and m is not model.head]


def embedding_width(model):
    return sum(m.weight.shape[1] if type(m).__name__ == 'Linear' else m.weight.shape[0]
               for _, m in fisher_layers(model))


def squared_gradients(module, x, delta):
    """Return the squared gradients of a layer's weight, per sequence, averaged over all axes but the first, summed.

    x: what went in, (B, T, ...); delta: gradient of what came out, (B, T, ...). The gradient of a matrix for one
    sequence is sum_t delta_t x_t', so its squared norm over outputs is x' (delta delta') x: T x T products per
    sequence in place of a gradient per sequence.
    """
    import torch
    from torch.nn import functional as F
    kind = type(module).__name__
    if kind in ('LayerNorm', 'RMSNorm'):
        normed = F.layer_norm(x, module.normalized_shape, eps=module.eps) if kind == 'LayerNorm' else \
            F.rms_norm(x, module.normalized_shape, eps=module.eps)
        return (delta * normed).flatten(1, -2).sum(1).square().sum(0)
    gram = delta @ delta.transpose(1, 2)                                        # (B, T, T)
    if kind == 'Linear':
        return (x * (gram @ x)).sum((0, 1)) / delta.shape[-1]
    same = x[:, :, None] == x[:, None, :]                                       # the row of an id collects its places
    total = torch.zeros(module.weight.shape[0], dtype=delta.dtype, device=delta.device)
    return total.index_add_(0, x.flatten(), (gram * same).sum(2).flatten()) / delta.shape[-1]


def fisher(model, head, x, uniforms, micro):
    """Return the Task2Vec embedding (width,) of rows x (n, T): the diagonal Fisher of the body, mean over sequences.

    Targets are sampled from the model itself by inverting its distribution at uniforms (n, T). The loss of a sequence
    is its mean over tokens. head: (V, C), the fitted one.
    """
    import torch
    from torch.nn import functional as F

    from model import linear
    layers, taken = fisher_layers(model), {}
    position = getattr(model, 'position', None)

    def hook(module, inputs, output):
        if not output.requires_grad:                                            # the first layer: weights are frozen
            output.requires_grad_()
        x_in = inputs[0].detach()

        def take(delta):
            taken[module] = taken.get(module, 0) + squared_gradients(module, x_in, delta)
            if module is model.embed and position is not None:                  # added to it: the same gradient
                row = torch.zeros(position.weight.shape[0], dtype=delta.dtype, device=delta.device)
                row[:delta.shape[1]] = delta.square().sum((0, 2)) / delta.shape[2]
                taken[position] = taken.get(position, 0) + row
        output.register_hook(take)

    handles = [m.register_forward_hook(hook) for _, m in layers if m is not position]
    try:
        for i in range(0, len(x), micro):
            logits = linear(model.hidden(x[i:i + micro]), head)                 # (B, T, V)
            with torch.no_grad():
                steps = logits.softmax(-1).cumsum(-1)
                level = (uniforms[i:i + micro] * steps[..., -1])[..., None]
                targets = torch.searchsorted(steps, level, right=True)[..., 0].clamp_(max=head.shape[0] - 1)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction='sum') / x.shape[1]
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat([taken[m] for _, m in layers]) / len(x)


def fit_head(model, x, y, micro, generator):
    """Return the model's head (V, C) after head_epochs passes over a batch; the body is frozen, so its states serve."""
    import torch
    from torch.nn import functional as F

    from model import linear
    with torch.no_grad():
        states = torch.cat([model.hidden(x[i:i + micro]) for i in range(0, len(x), micro)])     # (n, T, C)
    head = model.head.weight.detach().clone().requires_grad_()                  # untied from the embedding
    optimizer = torch.optim.AdamW([head], lr=head_learning_rate, weight_decay=0.0)
    for _ in range(head_epochs):
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(head_batch_size):
            loss = F.cross_entropy(linear(states[rows], head).flatten(0, 1), y[rows].flatten(), ignore_index=-1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return head.detach()


def embed(model, x, y, key):
    """Return the embedding (width,) of a batch; key seeds the order of rows that fit the head, and the targets."""
    import torch
    micro = micro_batch_size or max(1, 4096 // sequence_length)
    generator = torch.Generator().manual_seed(key >> 1)
    head = fit_head(model, x, y, micro, generator) if head_epochs else model.head.weight.detach()
    uniforms = torch.rand(x.shape, generator=generator).to(x.device)
    return fisher(model, head, x, uniforms, micro).cpu().numpy()


# --- distances ---

def distance(a, b):
    """Cosine distance of two embeddings, each divided by their sum (Achille et al. 2019, eq. 5)."""
    total = a + b + EPSILON
    a, b = a / total, b / total
    return 1 - float(a @ b / math.sqrt((a @ a) * (b @ b)))


def coefficient(embeddings):
    """Return the mean distance over pairs of batches, with two half-widths of a 95 % interval.

    ci95: jackknife over batches, since pairs share them. pairs_ci95: as if pairs were independent, as published.
    """
    n = len(embeddings)
    d = np.zeros((n, n))
    for i, j in itertools.combinations(range(n), 2):
        d[i, j] = d[j, i] = distance(embeddings[i], embeddings[j])
    mean, pairs = d.sum() / (n * (n - 1)), d[np.triu_indices(n, 1)]
    found = dict(diversity=float(mean), n_batches=n)
    if n > 2:
        without = (d.sum() - 2 * d.sum(1)) / ((n - 1) * (n - 2))
        found.update(ci95=1.96 * math.sqrt((n - 1) / n * float(((without - mean) ** 2).sum())),
                     pairs_ci95=1.96 * float(pairs.std(ddof=1)) / math.sqrt(len(pairs)))
    return found


def cross_diversity(first, second):
    return float(np.mean([distance(a, b) for a in first for b in second]))


# --- data ---

class Synthetic:
    """A text of one token, or of uniformly random ones: below and above what every text measures.

    Random tokens are an upper bound only where a batch cannot hold every id: batches then differ in the ids that they
    hold. 8,192 random bytes are as good as any other 8,192, and real text is more diverse (LOG).
    """

    def __init__(self, name, vocab_size):
        self.name, self.vocab_size, self.sha256 = name, vocab_size, f'{name}:{vocab_size}'

    def rows(self, b):
        rng = np.random.Generator(np.random.PCG64([seed, b]))
        ids = rng.integers(0, self.vocab_size, (n_sequences, sequence_length + 1)) if self.name == 'random' else \
            np.full((n_sequences, sequence_length + 1), self.vocab_size // 2)
        return ids[:, :-1].copy(), ids[:, 1:].copy()


class Blocks:
    """Batches of disjoint blocks of a data set or mixture, in the order of training."""

    def __init__(self, data, name):
        self.data, self.name, self.sha256 = data, name, data.sha256
        available = data.n_batches(n_sequences, sequence_length, seed) if hasattr(data, 'sources') else \
            data.n_tokens // sequence_length // n_sequences
        require((available >= n_batches, f'{name} has {available} batches of {n_sequences} x {sequence_length} tokens,'
                 f' n_batches = {n_batches}; give it more text or use fewer batches'))

    def rows(self, b):
        from corpus.bins import key_of, permute
        if hasattr(self.data, 'sources'):
            starts = self.data.starts('permuted', seed, 0, 0, b, n_sequences, sequence_length)
        else:
            block = np.arange(b * n_sequences, (b + 1) * n_sequences)
            starts = permute(block, self.data.n_tokens // sequence_length, key_of(seed, 0)) * sequence_length
        return self.data.gather(starts, sequence_length)


def units_of(data):
    """Return leading words of byte data, or tokens, as an array to compare sets by; of a mixture by its shares."""
    if hasattr(data, 'sources'):
        parts = [units_of(s)[:round(companion_units * share)] for s, share in zip(data.sources, data.shares)]
        return np.concatenate(parts)
    if data.tokenizer != 'byte':
        return np.asarray(data.tokens[:companion_units]).astype('U8')
    return np.array(data.tokens[:20 * companion_units].tobytes().split()[:companion_units])


def ngram_diversity(units, n=3):
    """Share of distinct n-grams among all."""
    _, ids = np.unique(units, return_inverse=True)
    return len(np.unique(np.lib.stride_tricks.sliding_window_view(ids, n), axis=0)) / max(1, len(ids) - n + 1)


def jaccard(a, b):
    """Overlap of two vocabularies: size of what they share over size of what they have together."""
    shared = len(np.intersect1d(a, b))
    return shared / (len(np.unique(a)) + len(np.unique(b)) - shared)


# --- the run ---

def check_protocol(protocol):
    """Refuse a folder that holds numbers of another protocol; note this one in an empty one."""
    from corpus.bins import write_json
    path = os.path.join(out_dir, 'protocol.json')
    if os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            old = json.load(f)
        differ = [f'{k} = {old.get(k)!r} there, {v!r} now' for k, v in protocol.items() if old.get(k) != v]
        require((not differ, f'{out_dir} holds numbers of another protocol, which these cannot be compared with'
                 f' ({"; ".join(differ)}); use the same protocol or another --out_dir'))
    else:
        os.makedirs(out_dir, exist_ok=True)
        write_json(path, protocol)


def embeddings_of(source, model, env, progress):
    """Return the embeddings (n_batches, width) of a source; those of an earlier run are read, each new one is kept."""
    from corpus.bins import key_of
    folder = os.path.join(out_dir, f'{source.name}-{hashlib.sha256(source.sha256.encode()).hexdigest()[:8]}')
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, f'{b}.npy') for b in range(n_batches)]
    for b, path in enumerate(paths):
        if b % env.world == env.rank and not os.path.exists(path):
            x, y = source.rows(b)
            found = embed(model, env.put(x), env.put(y), key_of(seed, source.name, b))
            require((np.isfinite(found).all(), f'the embedding of {source.name}, batch {b}, is not finite;'
                     ' check the probe, or use a lower --head_learning_rate'))
            with open(f'{path}.tmp', 'wb') as f:
                np.save(f, found)
            os.replace(f'{path}.tmp', path)
        progress.update(b % env.world == env.rank)
    env.barrier()
    return np.stack([np.load(path).astype(np.float64) for path in paths])


def main(argv=None):
    config = configure(globals(), argv)
    names, held_out = ([n.strip() for n in text.split(',') if n.strip()] for text in (dataset, eval_sets))
    require((names or bounds, 'dataset is empty; name sets, --dataset=pubmed,uspto,mix'),
            ('mix' not in names or data_mix, "dataset names mix, but data_mix is empty; give --data_mix='a:0.5,b:0.5'"),
            *(at_least(k, globals()[k], low) for k, low in (
                ('n_batches', 2), ('n_sequences', 1), ('sequence_length', 1), ('head_epochs', 0),
                ('head_batch_size', 1), ('micro_batch_size', 0), ('companion_units', 100), ('max_tokens', 0))),
            (head_learning_rate > 0, f'head_learning_rate = {head_learning_rate}, expected > 0'))
    from tqdm import tqdm

    import runs
    from corpus.data import open_data, open_split
    from corpus.mixture import parse_mix
    env = runs.Env(device, 'float32')
    model, checkpoint = runs.load_model(probe, env.device)
    model.eval().requires_grad_(False)
    tokenizer, args = checkpoint['data']['tokenizer'], checkpoint['model_args']
    mixes = {n: data_mix if n == 'mix' else n.replace('+', ',') if '+' in n else '' for n in names}
    opened = {n: open_data(data_dir, n, split, sequence_length, mixes[n], 'first_exhausted').head(max_tokens)
              for n in names}
    others = {n: open_split(data_dir, n, 'test' if split == 'train' else split) for n in held_out}
    require((sequence_length <= args['block_size'], f'sequence_length = {sequence_length}, the probe was built for at'
             f' most {args["block_size"]}'),
            *((d.tokenizer == tokenizer and d.vocab_size <= args['vocab_size'], f'{n} holds {d.tokenizer!r} tokens with'
               f' a vocabulary of {d.vocab_size}, the probe {probe} reads {tokenizer!r} with {args["vocab_size"]};'
               ' prepare the text with the tokenizer of the probe') for n, d in {**opened, **others}.items()))
    sources = [Blocks(data, n) for n, data in opened.items()]
    if bounds:
        sources += [Synthetic(n, args['vocab_size']) for n in ('constant', 'random')]
    weights = hashlib.sha256()
    for tensor in checkpoint['model'].values():
        weights.update(tensor.contiguous().numpy().tobytes())
    protocol = dict(probe_sha256=weights.hexdigest(), tokenizer=tokenizer, split=split,
                    **{k: config[k] for k in PROTOCOL})
    if env.main:
        check_protocol(protocol)
    env.barrier()
    record, rows, found = runs.RunRecord(out_dir, config, env, protocol=protocol), [], {}
    with tqdm(total=len(sources) * len(range(env.rank, n_batches, env.world)), unit='batch',
              disable=not env.main) as progress:
        for source in sources:
            progress.set_description(source.name)
            found[source.name] = embeddings_of(source, model, env, progress)
    env.close()
    if not env.main:
        return 0
    held_units = {n: units_of(d) for n, d in others.items()}
    for source in sources:
        row = dict(data=source.name, sha256=source.sha256, **coefficient(found[source.name]))
        row['body_diversity'] = coefficient(found[source.name][:, args['vocab_size']:])['diversity']
        if source.name in opened:
            row['shares'] = parse_mix(mixes[source.name] or source.name)
            units = units_of(opened[source.name])
            row.update(ngram_diversity=ngram_diversity(units),
                       **{f'overlap_{n}': jaccard(units, other) for n, other in held_units.items()})
        rows.append(dict(row, **protocol))
    crossed = [dict(first=a, second=b, cross_diversity=(value := cross_diversity(found[a], found[b])),
                    alignment=1 - value, **protocol) for a, b in itertools.combinations(found, 2)]
    record.update(status='done', rows=rows, cross=crossed)
    columns = [*SHOWN, *(f'overlap_{n}' for n in held_out)]
    table = runs.markdown(rows, columns)
    if crossed:
        table += '\n\n' + runs.markdown(crossed, ['first', 'second', 'cross_diversity', 'alignment'])
    with open(os.path.join(out_dir, 'table.md'), 'w', encoding='utf-8') as f:
        f.write(f'{table}\n\nProtocol: {json.dumps(protocol)}\n')
    runs.write_csv(os.path.join(out_dir, 'table.csv'), rows)
    print(f'{table}\nwrote {out_dir}')
    if bounds:
        *texts, low, high = (row['diversity'] for row in rows)
        bad, batch = 'this probe and protocol do not measure diversity', n_sequences * sequence_length
        full = math.exp(-batch / args['vocab_size']) < 0.01             # the share of ids that a random batch lacks
        require((low < min([*texts, high]), f'constant text ({low:.4f}) is not below the others: {bad}'),
                (full or high > max([*texts, low]), f'random tokens ({high:.4f}) are not above the texts: {bad}'))
        if high <= max([*texts, low]):
            print(f'random tokens are no upper bound here: {batch:,} of them hold all {args["vocab_size"]:,} ids, so'
                  ' that one batch is like another')
    return 0


if __name__ == '__main__':
    run(main)
