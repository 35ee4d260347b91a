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

from configurator import UserError, at_least, configure, one_of, require, run

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


def layers_to_keep(n):
    """Return the layers that --layers or the table keeps of n, ascending, from 0."""
    if layers:
        try:
            kept = [int(i) for i in layers.split(',')]
        except ValueError:
            raise UserError(f'layers = {layers!r}, expected numbers such as 0,2,4') from None
        require((kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < n,
                 f'layers = {layers!r}, expected different ascending numbers from 0 to {n - 1}: {from_ckpt} has {n}'))
        return kept
    n_kept = len(STRATEGIES[strategy][12])
    require((n >= n_kept, f'strategy {strategy!r} keeps {n_kept} layers, {from_ckpt} has {n}; name them, --layers=0,2'))
    return list(STRATEGIES[strategy].get(n) or (i * n // n_kept for i in range(n_kept)))


def least_sensitive_out(model, loss_of):
    """Drop layers of model one by one, each time the one whose loss costs least, to keep_layers; returns the kept."""
    blocks, kept = list(model.blocks), list(range(len(model.blocks)))
    while len(kept) > keep_layers:
        losses = {}
        for dropped in kept:
            model.blocks = type(model.blocks)(blocks[i] for i in kept if i != dropped)
            losses[dropped] = loss_of()
        dropped = min(losses, key=losses.get)
        kept.remove(dropped)
        print(f'layer {dropped} out: validation loss {losses[dropped]:.5f} nats, {len(kept)} layers left')
    return kept


def keep_only(tensors, kept):
    """Return {name: tensor} of a checkpoint without the layers that are not kept, the others renumbered."""
    new = {old: i for i, old in enumerate(kept)}
    split = [(name.split('.', 2), t) for name, t in tensors.items()]
    return {'.'.join([p[0], str(new[int(p[1])]), p[2]] if p[0] == 'blocks' else p): t
            for p, t in split if p[0] != 'blocks' or int(p[1]) in new}


def main(argv=None):
    config = configure(globals(), argv)
    config.pop('overwrite')
    require((from_ckpt != '', 'from_ckpt is empty; name a checkpoint, --from_ckpt=out/RUN'),
            one_of('method', method, ('tamade', 'magnitude', 'gamma', 'none')),
            one_of('strategy', strategy, ('', *STRATEGIES, 'sensitivity')),
            (not (strategy and layers), f'strategy = {strategy!r} and layers = {layers!r}, expected one of them'),
            one_of('scope', scope, ('global', 'tensor')),
            one_of('regularise', regularise, ('matrices', 'all')),
            at_least('tolerated_relative_loss_increase', tolerated_relative_loss_increase, 0),
            (0 <= sparsity <= 1, f'sparsity = {sparsity}, expected a share in [0, 1]'))
    import torch

    import runs
    import score
    import sparse
    from corpus.data import open_split
    from corpus.objectives import with_objective
    from model import build, model_args
    env = runs.Env(device, dtype)
    model, checkpoint = runs.load_model(from_ckpt, env.device)
    params = sparse.regularised(model, regularise)
    masks = {n: m.to(env.device) for n, m in checkpoint['masks'].items()}
    name, whole_layers = dataset or checkpoint['data']['dataset'], bool(strategy or layers)
    by_loss = strategy == 'sensitivity' or method == 'tamade' and not whole_layers
    require((name or not (by_loss or drop_unused_rows), f'{from_ckpt} names no data set; give one, --dataset=NAME'))
    data, T = open_split(data_dir, name, 'val') if by_loss else None, model.config.block_size
    if by_loss:
        data = with_objective(data, checkpoint['config'].get('objective', 'clm'), model.config.wrapper)
    kept = layers_to_keep(len(model.blocks)) if whole_layers and not by_loss else []
    require((not by_loss or not whole_layers or 1 <= keep_layers <= len(model.blocks),
             f'keep_layers = {keep_layers}, expected 1 to {len(model.blocks)}, the layers of {from_ckpt}'))
    runs.open_run_folder(out_dir, overwrite, parents=[from_ckpt])
    record = runs.RunRecord(out_dir, config, env, parent=runs.parent_of(from_ckpt),
                            procedure=checkpoint['config'].get('procedure', ''))

    def loss_of():
        found = score.score(model, data, T, score.rows_per_forward(T), env, max_blocks=sparse.CALIBRATION_BLOCKS)
        return found['nats'] / found['tokens']

    facts = {}
    if whole_layers:
        if by_loss:
            facts['loss_before'] = loss_of()
            kept = least_sensitive_out(model, loss_of)
        config['layers'] = facts['layers'] = ','.join(map(str, kept))
        print(f"layers {facts['layers']} of {checkpoint['model_args']['n_layer']} kept")
        model = build(dict(checkpoint['model_args'], n_layer=len(kept))).to(env.device)
        model.load_state_dict(keep_only(checkpoint['model'], kept))
        masks = keep_only(masks, kept)
    elif method == 'tamade':
        epsilon, before, at_epsilon, n_evaluations = sparse.tamade(loss_of, params, tolerated_relative_loss_increase)
        masks = sparse.merge_masks(masks, sparse.masks_by_threshold(params, epsilon))
        facts.update(epsilon=epsilon, loss_before=before, loss_at_epsilon=at_epsilon)
        print(f'TAMADE: epsilon = {epsilon:.7f} after {n_evaluations} evaluations;'
              f' validation loss {before:.5f} -> {at_epsilon:.5f} nats')
    elif method == 'magnitude':
        masks = sparse.merge_masks(masks, sparse.masks_by_magnitude(params, sparsity, scope))
    elif method == 'gamma':
        gamma = checkpoint.get('procedure', {}).get('gamma')
        require((gamma, f"{from_ckpt} holds no gamma; it needs a checkpoint of procedure='pmmp' saved in the main phase"
                 ' or at its end'))
        masks = sparse.merge_masks(masks, {n: m.to(env.device) for n, m in sparse.masks_by_gamma(gamma).items()})
    sparse.apply_masks(dict(model.named_parameters()), masks)
    if sweep_dead_units and not whole_layers:
        print(f'dead units: {sparse.sweep_dead_units(model, masks):,} weights zeroed')
    if drop_unused_rows:
        used = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        tokens = open_split(data_dir, name, 'train')
        for start in range(0, tokens.n_tokens, 1 << 24):                # 16 M ids at a time: constant memory
            used[torch.from_numpy(tokens.tokens[start:start + (1 << 24)].astype('int64')).unique()] = True
        used[tokens.start_id] = True
        print(f'unused ids: {sparse.drop_unused_rows(model, used):,} weights zeroed')
        alive = model.embed.weight != 0
        masks['embed.weight'] = masks['embed.weight'] & alive if 'embed.weight' in masks else alive

    rows = [dict(tensor=n, weights=total, nonzeros=kept, sparsity=1 - kept / total)
            for n, total, kept in sparse.sparsity_table(model)]
    whole = dict(tensor='all', weights=sum(r['weights'] for r in rows), nonzeros=sum(r['nonzeros'] for r in rows))
    rows.append(dict(whole, sparsity=1 - whole['nonzeros'] / whole['weights']))
    print(runs.markdown(rows[-1:] if whole_layers else rows, ('tensor', 'weights', 'nonzeros', 'sparsity')))
    if by_loss:
        facts['loss_after'] = after = loss_of()
        print(f"validation loss after pruning: {after:.5f} nats ({after / facts['loss_before'] - 1:+.3%})")
    path = os.path.join(out_dir, 'ckpt.pt')
    runs.save_checkpoint(path, dict(
        checkpoint, model=model.state_dict(), model_args=model_args(model), masks=masks, parent=record.values['parent'],
        config=dict(checkpoint['config'], **config), optimizer={}, procedure={}, grid={}, phase='pruned'))
    runs.commit_run_folders()
    record.update(status='done', non_zero_params=whole['nonzeros'], sparsity=rows[-1]['sparsity'], **facts)
    print(f'wrote {path}; fine-tune it: python train.py --init_from={out_dir} --procedure=vanilla ...')
    runs.close_run_folders()
    return 0


if __name__ == '__main__':
    run(main)
