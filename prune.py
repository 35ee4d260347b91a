"""Prune a checkpoint, weights or whole layers, and write another: continue it with train.py --init_from=OUT_DIR.

    python prune.py --from_ckpt=out/sample_vanilla --out_dir=out/pruned                      TAMADE on the run's data
    python prune.py --from_ckpt=out/RUN --method=magnitude --sparsity=0.8 --out_dir=out/p80  exactly 80 %
    python prune.py --from_ckpt=out/RUN --method=gamma --out_dir=out/g                       gamma < 1/2, from pmmp
    python prune.py --from_ckpt=gpt2 --strategy=alt --out_dir=out/gpt2-alt6                  6 of 12 layers, whole
    python prune.py --from_ckpt=gpt2 --strategy=sensitivity --dataset=openwebtext --out_dir=out/gpt2-s6

In: a checkpoint, a Hugging Face folder or hub id (for TAMADE and sensitivity also the validation split). Out:
OUT_DIR/{ckpt.pt, run.json} and the sparsity of every tensor, measured after pruning. A strategy, or --layers, takes
layers out and nothing else: embeddings, norms, head, kept blocks and masks stay (Li et al. 2021, arXiv 2110.08460).
"""
import os
from dataclasses import dataclass
from types import SimpleNamespace

from configurator import UserError, at_least, configure, one_of, require

# -----------------------------------------------------------------------------
from_ckpt = ''                  # checkpoint file, run folder, Hugging Face folder or hub id
out_dir = 'out/pruned'
overwrite = False
method = 'tamade'               # 'tamade', 'magnitude' (exact count), 'gamma' (pmmp checkpoints), 'none' (sweeps only)
regularise = 'matrices'         # which weights may go: 'matrices' (and embeddings) or 'all'
tolerated_relative_loss_increase = 0.01     # tamade: loss may rise by this share of the loss before
sparsity = 0.5                  # magnitude: share of the weights to zero, exactly
scope = 'global'                # magnitude: one ranking over all tensors ('global') or one in each ('tensor')
sweep_dead_units = True         # also drop units that cannot reach the output; the function is unchanged
drop_unused_rows = False        # also zero embedding rows of ids that never occur in the training split
strategy = ''                   # layers: '3l', '6t', '6b', '3b3t', 'alt', 'distil', 'sensitivity'; '' = prune weights
layers = ''                     # the layers to keep themselves, such as 0,2,4; '' = as strategy says
keep_layers = 6                 # sensitivity: drop the layer that matters least until so many are left
data_dir = 'data'
dataset = ''                    # '' = the data set of the checkpoint
device = 'auto'
dtype = 'auto'
# -----------------------------------------------------------------------------

STRATEGIES = {                  # {layers of the teacher: those kept}; another depth keeps as many, evenly spaced
    '3l': {12: (0, 6, 11), 24: (0, 12, 23)},
    '6t': {12: (6, 7, 8, 9, 10, 11), 24: (13, 15, 17, 19, 21, 23)},
    '6b': {12: (0, 1, 2, 3, 4, 5), 24: (0, 2, 4, 6, 8, 10)},
    '3b3t': {12: (0, 2, 4, 7, 9, 11), 24: (0, 4, 8, 15, 19, 23), 36: (0, 6, 12, 23, 29, 35)},
    'alt': {12: (0, 2, 4, 6, 8, 10), 24: (0, 4, 8, 12, 16, 20), 36: (0, 6, 12, 18, 24, 30),
            48: (0, 8, 16, 24, 32, 40)},
    'distil': {12: (0, 2, 4, 7, 9, 11), 24: (0, 4, 8, 13, 17, 21), 36: (0, 6, 12, 19, 25, 31),
               48: (0, 8, 16, 25, 33, 41)},
}


def rules(k):
    """Return what must hold of the knobs, as require takes it."""
    return [(k.from_ckpt != '', 'from_ckpt is empty; name a checkpoint, --from_ckpt=out/RUN'),
            one_of('method', k.method, ('tamade', 'magnitude', 'gamma', 'none')),
            one_of('strategy', k.strategy, ('', *STRATEGIES, 'sensitivity')),
            (not (k.strategy and k.layers), f'strategy = {k.strategy!r} and layers = {k.layers!r}, expected one of'
             ' them'),
            one_of('scope', k.scope, ('global', 'tensor')),
            one_of('regularise', k.regularise, ('matrices', 'all')),
            at_least('tolerated_relative_loss_increase', k.tolerated_relative_loss_increase, 0),
            (0 <= k.sparsity <= 1, f'sparsity = {k.sparsity}, expected a share in [0, 1]')]


config = configure(globals(), rules=rules)

import torch

import score
import sparse
from corpus.data import open_split
from corpus.objectives import with_objective
from model import build, model_args
from training.checkpoint import load_model, parent_of, save_checkpoint
from training.folder import RunRecord, close_run_folders, commit_run_folders, open_run_folder
from training.process import Env
from training.table import markdown

IDS_AT_ONCE = 1 << 24           # 16 M of the training split in memory at a time


@dataclass
class Validation:
    """The loss on leading blocks of the validation split, by which layers or weights are chosen."""
    data: object                # bins.Bin, with the rows of the checkpoint's objective
    env: object                 # Env

    def loss_of(self, model):
        """Return the loss of a model in nats per token."""
        T = model.config.block_size
        sums = score.score(model, self.data, T, score.rows_per_forward(T), self.env,
                           max_blocks=sparse.CALIBRATION_BLOCKS)
        return sums['nats'] / sums['tokens']


# --- whole layers ---

def named_layers(layers, n, path):
    """Return the layers that the text of --layers names, checked against the n layers of the checkpoint at path."""
    try:
        kept = [int(i) for i in layers.split(',')]
    except ValueError:
        raise UserError(f'layers = {layers!r}, expected numbers such as 0,2,4') from None
    ascending = kept == sorted(set(kept))
    require((ascending and kept[0] >= 0 and kept[-1] < n,
             f'layers = {layers!r}, expected different ascending numbers from 0 to {n - 1}: {path} has {n}'))
    return kept


def layers_of_strategy(strategy, n, path):
    """Return the layers that the table keeps of the n layers of the checkpoint at path, ascending, from 0."""
    n_kept = len(STRATEGIES[strategy][12])
    require((n >= n_kept, f'strategy {strategy!r} keeps {n_kept} layers, {path} has {n}; name them, --layers=0,2'))
    if n in STRATEGIES[strategy]:
        return list(STRATEGIES[strategy][n])
    return [i * n // n_kept for i in range(n_kept)]


def least_sensitive_out(model, validation, n_kept):
    """Drop layers of model one by one, each time the one whose loss costs least, to n_kept; returns the kept ones."""
    blocks = list(model.blocks)
    kept = list(range(len(blocks)))
    while len(kept) > n_kept:
        losses = {}
        for candidate in kept:
            model.blocks = type(model.blocks)(blocks[i] for i in kept if i != candidate)
            losses[candidate] = validation.loss_of(model)
        dropped = min(losses, key=losses.get)
        kept.remove(dropped)
        print(f'layer {dropped} out: validation loss {losses[dropped]:.5f} nats, {len(kept)} layers left')
    return kept


def keep_only(tensors, kept):
    """Return {name: tensor} of a checkpoint without the layers that are not kept, the others renumbered."""
    new_number = {old: new for new, old in enumerate(kept)}
    renamed = {}
    for name, tensor in tensors.items():
        if not name.startswith('blocks.'):
            renamed[name] = tensor
            continue
        _, number, rest = name.split('.', 2)
        if int(number) in new_number:
            renamed[f'blocks.{new_number[int(number)]}.{rest}'] = tensor
    return renamed


def smaller_model(checkpoint, kept):
    """Build the model of a checkpoint with the layers alone that are kept."""
    model = build(dict(checkpoint['model_args'], n_layer=len(kept)))
    model.load_state_dict(keep_only(checkpoint['model'], kept))
    return model


# --- weights ---

def masks_by_tamade(model, params, validation, tolerance):
    """Return masks {name: bool tensor} by the largest threshold that TAMADE finds, and what run.json says of it."""
    epsilon, before, at_epsilon, n_evaluations = sparse.tamade(lambda: validation.loss_of(model), params, tolerance)
    print(f'TAMADE: epsilon = {epsilon:.7f} after {n_evaluations} evaluations;'
          f' validation loss {before:.5f} -> {at_epsilon:.5f} nats')
    facts = dict(epsilon=epsilon, loss_before=before, loss_at_epsilon=at_epsilon)
    return sparse.masks_by_threshold(params, epsilon), facts


def masks_of_gamma(checkpoint, path, device):
    """Return the masks that gamma asks for, from a checkpoint of PMMP; UserError where the one at path holds none."""
    gamma = checkpoint.get('procedure', {}).get('gamma')
    require((gamma, f"{path} holds no gamma; it needs a checkpoint of procedure='pmmp' saved in the main phase"
             ' or at its end'))
    return {name: mask.to(device) for name, mask in sparse.masks_by_gamma(gamma).items()}


def used_ids(data, vocab_size):
    """Return a bool tensor (V,) that says which ids occur in data (bins.Bin), or stand before its first token."""
    used = torch.zeros(vocab_size, dtype=torch.bool)
    for start in range(0, data.n_tokens, IDS_AT_ONCE):
        ids = data.tokens[start:start + IDS_AT_ONCE].astype('int64')
        used[torch.from_numpy(ids).unique()] = True
    used[data.start_id] = True
    return used


def drop_rows_of_unused_ids(model, masks, data):
    """Zero the embedding rows of ids that data does not hold, and let the mask of the embedding hold them at zero."""
    used = used_ids(data, model.config.vocab_size)
    print(f'unused ids: {sparse.drop_unused_rows(model, used):,} weights zeroed')
    alive = model.embed.weight != 0
    if 'embed.weight' in masks:
        alive = masks['embed.weight'] & alive
    masks['embed.weight'] = alive


# --- what came of it ---

def sparsity_rows(model):
    """Return table rows of the sparsity of each parameter, measured; the last one is of all together."""
    rows = []
    for name, n_weights, nonzeros in sparse.sparsity_table(model):
        rows.append(dict(tensor=name, weights=n_weights, nonzeros=nonzeros, sparsity=1 - nonzeros / n_weights))
    n_weights = sum(row['weights'] for row in rows)
    nonzeros = sum(row['nonzeros'] for row in rows)
    return [*rows, dict(tensor='all', weights=n_weights, nonzeros=nonzeros, sparsity=1 - nonzeros / n_weights)]


if __name__ == '__main__':
    k = SimpleNamespace(**config)
    env = Env(device, dtype)
    model, checkpoint = load_model(from_ckpt, env.device)
    masks = {name: mask.to(env.device) for name, mask in checkpoint['masks'].items()}
    n_layers = len(model.blocks)

    # What is asked: whole layers or weights, and by their effect on the loss or not.
    whole_layers = bool(strategy or layers)
    by_loss = strategy == 'sensitivity' or method == 'tamade' and not whole_layers
    set_name = dataset or checkpoint['data']['dataset']
    needs_data = by_loss or drop_unused_rows
    require((set_name or not needs_data, f'{from_ckpt} names no data set; give one, --dataset=NAME'))
    validation = None
    if by_loss:
        val_split = open_split(data_dir, set_name, 'val')
        objective = checkpoint['config'].get('objective', 'clm')
        validation = Validation(with_objective(val_split, objective, model.config.wrapper), env)
    if layers:
        kept = named_layers(layers, n_layers, from_ckpt)
    elif whole_layers and not by_loss:
        kept = layers_of_strategy(strategy, n_layers, from_ckpt)
    elif whole_layers:
        require((1 <= keep_layers <= n_layers,
                 f'keep_layers = {keep_layers}, expected 1 to {n_layers}, the layers of {from_ckpt}'))

    # From here on the folder is ours. run.json does not say how an older run in it was treated.
    config.pop('overwrite')
    open_run_folder(out_dir, overwrite, parents=[from_ckpt])
    record = RunRecord(out_dir, config, env, parent=parent_of(from_ckpt),
                            procedure=checkpoint['config'].get('procedure', ''))
    facts = {}

    # Whole layers: a smaller model with the weights and masks of those that stay. Weights: new masks, which only add
    # zeros to those that were there.
    if strategy == 'sensitivity':
        facts['loss_before'] = validation.loss_of(model)
        kept = least_sensitive_out(model, validation, keep_layers)
    params = sparse.regularised(model, regularise)
    if whole_layers:
        config['layers'] = facts['layers'] = ','.join(map(str, kept))
        print(f"layers {facts['layers']} of {checkpoint['model_args']['n_layer']} kept")
        model = smaller_model(checkpoint, kept).to(env.device)
        masks = keep_only(masks, kept)
    elif method == 'tamade':
        new_masks, search = masks_by_tamade(model, params, validation, tolerated_relative_loss_increase)
        masks = sparse.merge_masks(masks, new_masks)
        facts.update(search)
    elif method == 'magnitude':
        masks = sparse.merge_masks(masks, sparse.masks_by_magnitude(params, sparsity, scope))
    elif method == 'gamma':
        masks = sparse.merge_masks(masks, masks_of_gamma(checkpoint, from_ckpt, env.device))
    sparse.apply_masks(dict(model.named_parameters()), masks)

    # Weights that cannot matter go too.
    if sweep_dead_units and not whole_layers:
        print(f'dead units: {sparse.sweep_dead_units(model, masks):,} weights zeroed')
    if drop_unused_rows:
        drop_rows_of_unused_ids(model, masks, open_split(data_dir, set_name, 'train'))

    # What came of it, measured.
    rows = sparsity_rows(model)
    shown = rows[-1:] if whole_layers else rows
    print(markdown(shown, ('tensor', 'weights', 'nonzeros', 'sparsity')))
    if by_loss:
        after = validation.loss_of(model)
        facts['loss_after'] = after
        print(f"validation loss after pruning: {after:.5f} nats ({after / facts['loss_before'] - 1:+.3%})")
    path = os.path.join(out_dir, 'ckpt.pt')
    save_checkpoint(path, dict(
        checkpoint, model=model.state_dict(), model_args=model_args(model), masks=masks, parent=record.values['parent'],
        config=dict(checkpoint['config'], **config), optimizer={}, procedure={}, grid={}, phase='pruned'))
    commit_run_folders()
    record.update(status='done', non_zero_params=rows[-1]['nonzeros'], sparsity=rows[-1]['sparsity'], **facts)
    print(f'wrote {path}; fine-tune it: python train.py --init_from={out_dir} --procedure=vanilla ...')
    close_run_folders()
