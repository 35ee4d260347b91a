"""Evaluate checkpoints on data sets: loss, bits per byte, accuracy, description lengths, and compressors beside them.

    python eval.py --from_ckpt=out/sample_pmmp                                  the run's own data set, test split
    python eval.py --from_ckpt=out/a,out/b --dataset=sample,mine --baselines    2 checkpoints x 2 sets, and xz & co.
    python eval.py --from_ckpt=out/a --description_length                       the training split too: two-part lengths
    python eval.py --from_ckpt=out/a --minimal_context_window=192               every byte sees at least 192 before it
    python eval.py --from_ckpt=out/a --pairs=c4meta             the same targets with and without metadata
    python eval.py --from_ckpt=out/a --metrics=ce,hamming,information,random_tokens
    python eval.py --from_ckpt=gpt2,out/b --dataset=wikitext103 --stride=512    a hub id; rows overlap by half

In: run folders, checkpoint files, Hugging Face folders or hub ids; data sets. Out: one table, and
out/eval-HASH/{run.json, table.md, table.csv}; HASH is of the knobs, checkpoints and data, so the same evaluation lands
in the same folder. Each token is scored once.
Totals are two-part code lengths, model bytes + data bytes, by what a weight costs: raw, 4 bytes each; nnz4, 4 bytes per
non-zero without its index (published figures do this; nothing decodes it); bits_est, the entropy of the 8-bit tensors.
archive_bytes is the size of a file that decodes, model included. online_bytes is the code length of the first pass of
training, each batch coded before its update: no model to send. Compressors' own programs are not counted.
hamming is the share of tokens guessed right (accuracy), information 1 - H/ln V of a loss of H nats per token;
random_tokens scores uniformly random ids too, of which a model that does not peek knows nothing.
embedding_nats is what the vector costs that a decoder is given beside its loss, per token; it is in no other column.
loss_low and loss_high are a 95 % bootstrap interval over documents; interval_over in the csv says of what.
"""
import hashlib
import itertools
import math
import os
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

from configurator import UserError, at_least, configure, names_in, one_of, require

# -----------------------------------------------------------------------------
from_ckpt = ''                  # run folders, files, Hugging Face folders, hub ids, by commas; '' = compressors only
data_dir = 'data'
dataset = ''                    # data sets, comma-separated; '' = each checkpoint's own
split = 'test'                  # splits, comma-separated
max_tokens = 0                  # leading tokens of each split; 0 = the whole split
pairs = ''                      # sets of prepare_metadata.py, by commas: the same targets with and without metadata
verify = False                  # check the SHA-256 of the data first
block_size = 0                  # tokens a row scores; 0 = the checkpoint's own
batch_size = 0                  # rows per forward on each rank; 0 = about 16,384 tokens, 4,096 without GPU
metrics = 'ce,ppl,bpb,hamming'  # columns: ce, ppl, bpb, hamming, information; random_tokens: again on random ids
random_seed = 0                 # of these ids
embedding_bits = 16             # of each number of the vector that a decoder is given, for embedding_nats
stride = 0                      # tokens a row advances and scores, the others are context; 0 = blocks side by side
minimal_context_window = 0      # tokens that every scored one sees before it, where they exist; 0 = as stride says
first_token = 'score'           # 'score', or 'skip': a block's first token is input only, as in published GPT-2 figures
description_length = False      # score the training split too
archive = ''                    # files packed with the checkpoints, comma-separated, one each; '' = none
online_archives = ''            # files made by compress.py online, comma-separated: a row each; '' = none
bootstrap = 1000                # resamples of documents for the 95 % interval of the loss; 0 = none
baselines = False               # compressors on the same bytes
baseline_timeout = 600.0        # seconds for each external compressor
out = 'out'                     # where eval-HASH goes
device = 'auto'
dtype = 'auto'                  # 'float32' for the last digit; 'auto' is bfloat16 where the GPU has it
# -----------------------------------------------------------------------------

config = configure(globals())

import score
import sparse
from codec.compressors import absent, baseline_rows
from codec.container import read_archive
from corpus.data import open_pairs, open_split
from corpus.mixture import parse_mix
from corpus.objectives import with_objective
from training.checkpoint import load_checkpoint, load_model, parent_of
from training.folder import RunRecord, read_run
from training.process import Env
from training.table import markdown, write_csv

METRICS = dict(ce='loss_nats embedding_nats loss_low loss_high', bpb='bits_per_byte',
               ppl='perplexity perplexity_per_word', hamming='accuracy', information='information',
               random_tokens='random_loss_nats random_perplexity random_accuracy random_information')
SHOWN = (f'run data tokens {" ".join(METRICS.values())} '
         'data_bytes raw_total_bytes nnz4_total_bytes bits_est_total_bytes archive_bytes online_bytes seconds').split()
SHOWN_PAIRS = ('run data type pieces documents tokens with_nats without_nats difference_nats difference_low '
               'difference_high with_bits_per_byte without_bits_per_byte with_perplexity without_perplexity true_wins '
               'seconds').split()


# --- knobs ---

def check_knobs(k):
    """Raise one UserError that lists every knob of the namespace k that cannot be meant."""
    paths = names_in(k.from_ckpt)
    archives = names_in(k.archive)
    wanted = names_in(k.metrics)
    counts = ('max_tokens', 'block_size', 'batch_size', 'minimal_context_window', 'stride', 'bootstrap')
    by_windows = k.minimal_context_window or k.stride
    two_ways = k.minimal_context_window and k.stride
    require((paths or k.baselines and names_in(k.dataset), 'from_ckpt is empty; name a checkpoint, --from_ckpt=out/RUN,'
             ' or --baselines with a --dataset'),
            (splits_of(k), 'split is empty; write --split=test'),
            one_of('first_token', k.first_token, ('score', 'skip')),
            (wanted, f'metrics is empty; name some of {", ".join(METRICS)}'),
            *(one_of('metrics', name, tuple(METRICS)) for name in wanted),
            *(at_least(name, vars(k)[name], 0) for name in counts),
            (k.first_token == 'score' or not by_windows,
             'first_token = skip cuts blocks side by side; drop minimal_context_window and stride'),
            (not two_ways, f'stride = {k.stride} and minimal_context_window = {k.minimal_context_window} say the same'
             ' in two ways; drop one'),
            (len(archives) in (0, len(paths)),
             f'archive names {len(archives)} files for {len(paths)} checkpoints, expected one each'),
            *((os.path.exists(p), f'no archive at {p!r}; make it with python compress.py pack CKPT FILE {p}')
              for p in archives),
            *((os.path.exists(p), f'no archive at {p!r}; make it with python compress.py online FILE {p}')
              for p in names_in(k.online_archives)))


def splits_of(k):
    """Return the names of the splits to score: those that are named, and the training split for a two-part length."""
    splits = names_in(k.split)
    if k.description_length and 'train' not in splits:
        splits.append('train')
    return splits


def context_of(length, k):
    """Tokens that every scored one sees before it in rows of a length; length - stride + 1 with windows by stride."""
    if k.stride:
        return length - k.stride + 1
    return k.minimal_context_window


# --- checkpoints and what they are scored on ---

def name_of(path):
    """Short name of a checkpoint: its run folder's, with the file's where that is not ckpt.pt."""
    folder = path
    file = 'ckpt.pt'
    if not os.path.isdir(path):
        folder, file = os.path.split(path)
    folder = os.path.basename(os.path.abspath(folder))
    return folder if file == 'ckpt.pt' else f'{folder}/{file.removesuffix(".pt")}'


def own_sets(checkpoint):
    """Names of the data sets that a checkpoint was trained on: the sources of a mixture, none where it does not say."""
    trained_on = checkpoint['data']['dataset']
    return list(parse_mix(trained_on)) if trained_on else []


def meant_for(checkpoint, name, k):
    """Say whether a data set is scored with a checkpoint: every one that --dataset names, else those of the run."""
    return bool(k.dataset) or name in own_sets(checkpoint)


def check_fit(path, checkpoint, data, k, length=0):
    """Raise UserError where a checkpoint cannot score a data set under these knobs; length: of rows that are fixed."""
    tokenizer = checkpoint['data']['tokenizer']
    vocab_size = checkpoint['model_args']['vocab_size']
    longest = checkpoint['model_args']['block_size']
    length = length or k.block_size or longest
    context = k.minimal_context_window
    same_tokens = tokenizer == data.tokenizer and data.vocab_size <= vocab_size
    require((same_tokens,
             f'{path} reads {tokenizer!r} tokens with a vocabulary of {vocab_size}, data set {data.name!r}'
             f' holds {data.tokenizer!r} tokens with {data.vocab_size}; prepare the text with the tokenizer of the'
             ' checkpoint'),
            (length <= longest, f'rows have {length} tokens, {path} was built for at most {longest}'),
            (k.stride <= length, f'stride = {k.stride}, expected at most {length}, the rows of {path}'),
            (context <= length,
             f'minimal_context_window = {context}, expected at most {length}, the rows of {path}'),
            (k.first_token == 'score' or length > 1, 'first_token = skip needs a block_size of at least 2'))


@dataclass
class Archive:
    """An archive on disk: its size, and the size and SHA-256 of the text that it holds."""
    path: str
    size: int
    text_bytes: int
    sha256: str

    def holds(self, data):
        """Say whether this is the very text of a split; ids have another hash than their text, there sizes do."""
        if data.tokenizer != 'byte':
            return self.text_bytes == data.text_bytes
        return self.text_bytes == data.n_tokens and self.sha256 == hashlib.sha256(data.tokens).hexdigest()


def open_archive(path):
    """Read the head of an archive; UserError where it is none."""
    with open(path, 'rb') as f:
        head = read_archive(f.read(), path)[1]
    return Archive(path, os.path.getsize(path), head['bytes'], head['sha256'])


# --- rows of the table ---

def known_bytes(path, data, own, archive, k):
    """Return what is known beside the losses: the size of an archive of this very text, the run's online length.

    own: is the set one that the checkpoint at path was trained on? archive: an Archive, or None.
    """
    known = {}
    if archive and archive.holds(data):
        known['archive_bytes'] = archive.size
    elif archive:
        print(f'{archive.path} holds another text than {data.name}/{data.split}: left out of its row')
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    online = read_run(folder or '.').get('online_description_length_bytes')
    whole_split = data.split == 'train' and not k.max_tokens
    if own and whole_split and online:
        known['online_bytes'] = online
    return known


def losses_on(model, checkpoint, split, label, length, env, k):
    """Return what score.evaluate says of a model on one split (bins.Bin), in rows of a length, and what follows of it.

    label: of the progress bar.
    """
    objective = checkpoint['config'].get('objective', 'clm')
    data = with_objective(split, objective, model.config.wrapper)
    rows = k.batch_size or score.rows_per_forward(length)
    context = context_of(length, k)
    skip_first = k.first_token == 'skip'
    units = score.Units(data) if k.bootstrap else None
    losses = score.evaluate(model, data, length, rows, env, context, progress=label, skip_first=skip_first, units=units)
    if units:
        losses.update(units.interval(k.bootstrap, env))

    # The control: the same on tokens without any structure.
    if 'random_tokens' in names_in(k.metrics):
        noise = with_objective(score.random_like(split, k.random_seed), objective, model.config.wrapper)
        chance = score.evaluate(model, noise, length, rows, env, context, skip_first=skip_first)
        for column in METRICS['random_tokens'].split():
            losses[column] = chance[column.removeprefix('random_')]

    # Words are counted over the whole split; the scored tokens hold their share.
    n_words = data.count_words() * losses['tokens'] / max(data.n_tokens, 1)
    if n_words:
        nats_per_word = losses['loss_nats'] * losses['tokens'] / n_words
        losses['perplexity_per_word'] = math.exp(min(nats_per_word, 700))
    losses['data_bytes'] = round(losses['data_bytes'])
    if sees_a_vector(model.config):
        n_numbers = model.config.bottleneck or model.config.n_embd
        losses['embedding_nats'] = score.embedding_nats(n_numbers, k.embedding_bits, length)
    return losses


def sees_a_vector(config):
    """Say whether a model's decoder is given a vector of the very tokens that it predicts."""
    return config.wrapper == 'autoencoder' or config.wrapper == 'oracle' and config.memory != 'none'


def model_rows(path, bins, archive, env, k):
    """Score one checkpoint on every data set of bins {(set, split): Bin} that is meant for it; yield table rows.

    archive: the Archive that was packed with it, or None.
    """
    model, checkpoint = load_model(path, env.device)
    sizes = sparse.model_sizes(model.parameters())
    length = k.block_size or model.config.block_size
    for (name, split_name), data in bins.items():
        if not meant_for(checkpoint, name, k):
            continue
        started = time.time()
        where = f'{name}/{split_name}'
        losses = losses_on(model, checkpoint, data, f'{name_of(path)} on {where}', length, env, k)
        totals = {}
        for form in ('raw', 'nnz4', 'bits_est'):
            totals[f'{form}_total_bytes'] = losses['data_bytes'] + sizes[f'{form}_bytes']
        own = name in own_sets(checkpoint)
        yield dict(run=name_of(path), data=where, dataset=name, split=split_name, from_ckpt=path, sha256=data.sha256,
                   seq_length=length, **losses, **sizes, **totals, **known_bytes(path, data, own, archive, k),
                   seconds=round(time.time() - started, 2))


def pair_rows(path, pair_sets, env, k):
    """Score one checkpoint on paired rows {set: {type: arms}}; yield a table row per set, type and pieces."""
    model, _ = load_model(path, env.device)
    for name, types in pair_sets.items():
        for kind, arms in types.items():
            started = time.time()
            length = arms['with'].row_length
            rows = k.batch_size or score.rows_per_forward(length)
            label = f'{name_of(path)} on {name}, {kind}'
            for numbers in score.evaluate_pairs(model, arms, rows, env, k.bootstrap, progress=label):
                yield dict(run=name_of(path), data=name, type=kind, from_ckpt=path, seq_length=length, **numbers,
                           seconds=round(time.time() - started, 2))


def online_row(archive, data):
    """Return the table row of a text that an untrained model learned as it coded it, beside the split it is."""
    n_bytes = archive.text_bytes
    return dict(run=f'online {os.path.basename(archive.path)}', data=f'{data.name}/{data.split}', text_bytes=n_bytes,
                tokens=n_bytes, bits_per_byte=8 * archive.size / max(n_bytes, 1), archive_bytes=archive.size)


def compressor_rows(bins, blocks, timeout):
    """Run the compressors on every split that is a text, whole and in blocks of each size; yield table rows."""
    for data in bins.values():
        if data.tokenizer != 'byte' or data.row_length:
            print(f'no baselines on {data.name}/{data.split}: its .bin holds {data.tokenizer} ids, not the text')
            continue
        yield from baseline_rows(data, sorted(blocks), timeout)
    print(f'compressors not here: {", ".join(absent()) or "none"}')


def keep(new, rows, record):
    """Append rows to the table as they come; run.json has every row that is there."""
    for row in new:
        rows.append(row)
        record.update(rows=rows)


def table_of(rows, wanted):
    """Format the rows as markdown, with a table of its own for pairs; columns of metrics that are not wanted go."""
    hidden = set()
    for name, columns in METRICS.items():
        if name not in wanted:
            hidden.update(columns.split())
    whole = [row for row in rows if 'pieces' not in row]
    paired = [row for row in rows if 'pieces' in row]
    tables = []
    for some, order in ((whole, SHOWN), (paired, SHOWN_PAIRS)):
        columns = [c for c in order if c not in hidden and any(c in row for row in some)]
        if some:
            tables.append(markdown(some, columns))
    return '\n'.join(tables)


# --- inputs ---

@dataclass
class Inputs:
    """What is scored. bins: {(set, split): Bin}. pair_sets: {set: {type: {arm: Rows}}}. blocks: lengths of rows."""
    bins: dict
    pair_sets: dict
    blocks: set

    def arms(self):
        """Return the rows of all arms of all types of all sets."""
        arms = []
        for types in self.pair_sets.values():
            for of_type in types.values():
                arms += of_type.values()
        return arms

    def open(self, name, split_name, k):
        """Open the leading max_tokens of a split, if it is not open yet."""
        if (name, split_name) not in self.bins:
            data = open_split(k.data_dir, name, split_name, k.verify)
            self.bins[name, split_name] = data.head(k.max_tokens)

    def fit(self, path, k):
        """Open a checkpoint's own sets where no other is named, and check that it can score what is meant for it."""
        checkpoint = load_checkpoint(path)
        own = own_sets(checkpoint)
        named = names_in(k.dataset) or self.pair_sets
        require((own or named, f'{path} names no data set; give one, --dataset=NAME'))
        if not named:
            for name, split_name in itertools.product(own, splits_of(k)):
                self.open(name, split_name, k)
        for (name, _), data in self.bins.items():
            if meant_for(checkpoint, name, k):
                check_fit(path, checkpoint, data, k)
        for data in self.arms():
            check_fit(path, checkpoint, data, k, data.row_length)
        self.blocks.add(k.block_size or checkpoint['model_args']['block_size'])


def open_inputs(k):
    """Open and check all data sets and checkpoints; UserError before the first of them is scored."""
    inputs = Inputs(bins={}, pair_sets={}, blocks={k.block_size} - {0})
    for name, split_name in itertools.product(names_in(k.dataset), splits_of(k)):
        inputs.open(name, split_name, k)
    for name in names_in(k.pairs):
        inputs.pair_sets[name] = open_pairs(k.data_dir, name, k.verify)
    for path in names_in(k.from_ckpt):
        inputs.fit(path, k)
    return inputs


def split_of(archive, bins):
    """Return the first of the splits whose text an archive holds; UserError where it is none of them."""
    for data in bins.values():
        if archive.holds(data):
            return data
    raise UserError(f'{archive.path} holds a text that is none of the scored splits; see python compress.py info')


def folder_of(k, parents, inputs):
    """Return the folder of an evaluation: its name is a hash of the knobs, checkpoints and data."""
    data = [*inputs.bins.values(), *inputs.arms()]
    identity = (sorted(vars(k).items()), [parent['sha256'] for parent in parents], [d.sha256 for d in data])
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=4).hexdigest()
    return os.path.join(k.out, f'eval-{digest}')


if __name__ == '__main__':
    k = SimpleNamespace(**config)
    check_knobs(k)
    env = Env(device, dtype)

    # Every input is opened and checked before the first is scored.
    archives = [open_archive(path) for path in names_in(archive)]
    inputs = open_inputs(k)
    online = [open_archive(path) for path in names_in(online_archives)]
    online_splits = [split_of(each, inputs.bins) for each in online]

    # The record is written by rank 0, after all ranks have read what was there.
    paths = names_in(from_ckpt)
    parents = [parent_of(path) for path in paths]
    folder = folder_of(k, parents, inputs)
    env.barrier()
    if env.main:
        os.makedirs(folder, exist_ok=True)
    record = RunRecord(folder, config, env, parents=parents)

    # All ranks score the models together; the rest is for one.
    rows = []
    for path, packed in itertools.zip_longest(paths, archives):
        keep(model_rows(path, inputs.bins, packed, env, k), rows, record)
        if inputs.pair_sets:
            keep(pair_rows(path, inputs.pair_sets, env, k), rows, record)
    env.close()
    if not env.main:
        sys.exit(0)

    # What is not a model: texts packed online, and other compressors.
    for each, data in zip(online, online_splits):
        keep([online_row(each, data)], rows, record)
    if baselines:
        keep(compressor_rows(inputs.bins, inputs.blocks, baseline_timeout), rows, record)

    # The table, as text and with every column.
    table = table_of(rows, names_in(metrics))
    with open(os.path.join(folder, 'table.md'), 'w', encoding='utf-8') as f:
        f.write(f'{table}\n')
    write_csv(os.path.join(folder, 'table.csv'), rows)
    record.update(status='done')
    print(f'{table}\nwrote {folder}')
