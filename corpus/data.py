"""The one place that opens data: a split, a mixture or an objective's rows, and the batches that are drawn from them.

Below stand bins (token files), rows (with a mask), mixture and objectives; what they have in common is bins.Data, so a
trainer never asks which of them it has. The batch of a place in a run is a pure function of that place: resuming needs
no state, and the number of processes does not change what a global batch holds.
"""
from dataclasses import dataclass

from configurator import require
from corpus.bins import dataset_folder, open_bin, read_meta, split_names
from corpus.mixture import Mixture, parse_mix
from corpus.objectives import with_objective
from corpus.rows import open_rows

# --- opening ---

def open_split(data_dir, dataset, split, verify=False):
    """Open one split of a data set as a Bin, or as Rows where it has a mask; checked as bins.open_bin says."""
    data = open_bin(data_dir, dataset, split, verify)
    meta = read_meta(data_dir, dataset)
    if 'mask' not in meta['splits'][split]:
        return data
    return open_rows(data, meta, dataset_folder(data_dir, dataset), verify)


def open_data(data_dir, dataset, split, block_size, data_mix='', stop_when='never', verify=False, loss_on='text',
              objective='clm', wrapper=''):
    """Open one split of a data set, or of a mix where one is given, with the rows of an objective.

    block_size, stop_when: of a mixture. loss_on: what of row data is scored. wrapper: of the model, see objectives.
    """
    if data_mix:
        data = open_mixture(data_dir, data_mix, split, block_size, stop_when, verify)
    else:
        data = open_split(data_dir, dataset, split, verify)
    if data.row_length:
        data = data.scoring(loss_on)
    return with_objective(data, objective, wrapper)


def open_mixture(data_dir, mix, split, block_size, stop_when='never', verify=False):
    """Open one split of all sources of a mix as a Mixture; they must share one tokenizer and all have the split."""
    shares = parse_mix(mix)
    metas = {name: read_meta(data_dir, name) for name in shares}
    row_data = [name for name, meta in metas.items() if 'rows' in meta]
    without = [name for name, meta in metas.items() if not meta['splits'].get(split, {}).get('tokens')]
    tokenizers = {}
    for name, meta in metas.items():
        tokenizer = meta['tokenizer']
        tokenizers[name] = (tokenizer['name'], tokenizer['sha256'], meta['vocab_size'])
    described = ', '.join(f'{name}: {tokenizer}, vocabulary {size}' for name, (tokenizer, _, size)
                          in tokenizers.items())
    require((not row_data, f'{", ".join(row_data)} of data_mix = {mix!r} is row data, expected sets of running text;'
             ' train on it with --dataset'),
            (len(set(tokenizers.values())) == 1, f'data_mix = {mix!r} mixes tokenizers ({described}); prepare all sets'
             ' with one'),
            (not without, f'{", ".join(without)} of data_mix = {mix!r} has no {split} text;'
             ' prepare it with a larger --val_fraction'))
    sources = [open_split(data_dir, name, split, verify) for name in shares]
    return Mixture(sources, list(shares.values()), block_size, stop_when)


def open_pairs(data_dir, dataset, verify=False):
    """Return {type: {'with', 'without'[, 'other']: Rows}} of a data set, checked to score equal numbers of targets."""
    split_of = read_meta(data_dir, dataset).get('pairs')
    require((split_of, f'data set {dataset!r} has no paired rows, expected one made by prepare_metadata.py with'
             ' --pair_documents above 0'))
    pairs = {}
    for kind, arms in split_of.items():
        pairs[kind] = {arm: open_split(data_dir, dataset, split, verify) for arm, split in arms.items()}
    unequal = [kind for kind, arms in pairs.items() if len({rows.n_targets for rows in arms.values()}) > 1]
    require(*((False, f'the arms of {kind!r} in {dataset!r} score different numbers of targets; prepare the data set'
               ' again') for kind in unequal))
    return pairs


def common_splits(data_dir, dataset, data_mix=''):
    """Return the splits that a data set, or every source of a mix, has."""
    names = list(parse_mix(data_mix)) if data_mix else [dataset]
    first, *others = [split_names(data_dir, name) for name in names]
    return [split for split in first if all(split in other for other in others)]


# --- does it fit? ---

def row_rule(data, name, block_size):
    """For require(): is block_size that of row data, if it is such?"""
    return (data.row_length in (0, block_size), f'block_size = {block_size}, {name!r} has rows of {data.row_length}'
            f' tokens; set --block_size={data.row_length}')


def leading_rules(asked, data, name):
    """For require(): does a training split hold tokens, and as many as train_only_on_leading_tokens asks for?"""
    return [(asked <= data.n_balanced, f'train_only_on_leading_tokens = {asked:,}, but {name!r} has'
             f' {data.n_balanced:,}; use 0 for all, or prepare more data'),
            (data.n_tokens > 0, f'the training split of {name!r} is empty')]


def rules(k, data, name, splits, block_size):
    """For require(): does a training split (before it is cut short) fit the knobs of a run, a namespace k?"""
    fits_leading, holds_tokens = leading_rules(k.train_only_on_leading_tokens, data, name)
    in_order = k.order != 'random' and not k.online
    needs_val = k.do_pruning or k.data_mix
    return [fits_leading,
            row_rule(data, name, block_size),
            (not data.row_length or in_order,
             f"{name!r} is row data, it takes order = 'permuted' or 'sequential' and no --online"),
            (data.row_length or k.loss_on == 'text', f'loss_on = {k.loss_on!r} needs row data, {name!r} has none;'
             ' make it with prepare_metadata.py'),
            holds_tokens,
            ('val' in splits or not needs_val, f'{name!r} has no validation split, which TAMADE and mixtures need;'
             ' prepare one or --no-do_pruning')]


# --- batches ---

@dataclass
class Place:
    """Where in a run a batch stands: the batch of an epoch, and the number of batches before it in the run.

    sequential: the batch is drawn in the order of the text, whatever the order of the run (a run online).
    """

    epoch: int = 0
    batch: int = 0
    number: int = 0
    sequential: bool = False


class Batches:
    """The batches of a run on some data: order, seed and sizes are fixed, a Place says which batch.

    batch_size: rows over all ranks, a multiple of their number. n_batches: batches of an epoch.
    """

    def __init__(self, data, order, seed, batch_size, block_size):
        self.data = data
        self.order = order
        self.seed = seed
        self.batch_size = batch_size
        self.block_size = block_size
        self.n_batches = data.n_batches(batch_size, block_size, seed)

    def batch(self, place, rank=0, world=1):
        """Return inputs and targets of a rank, two (B / world, T) int64 arrays, and the targets scored on all ranks."""
        order = 'sequential' if place.sequential else self.order
        starts = self.data.starts(order, self.seed, place.epoch, place.batch, place.number, self.batch_size,
                                  self.block_size)
        n_scored = self.data.n_scored(starts, self.block_size)
        n_rows = self.batch_size // world
        of_rank = starts[rank * n_rows:(rank + 1) * n_rows]
        x, y = self.data.gather(of_rank, self.block_size)
        return x, y, n_scored
