"""Prune a checkpoint and write another that holds masks: continue it with train.py --init_from=OUT_DIR.

    python prune.py --from_ckpt=out/sample_vanilla --out_dir=out/pruned                      TAMADE on the run's data
    python prune.py --from_ckpt=out/RUN --method=magnitude --sparsity=0.8 --out_dir=out/p80  exactly 80 %
    python prune.py --from_ckpt=out/RUN --method=gamma --out_dir=out/g                       gamma < 1/2, from pmmp

In: a checkpoint (for TAMADE also the validation split). Out: OUT_DIR/{ckpt.pt, run.json} and the sparsity of every
tensor, measured after pruning.
"""
import os

from configurator import at_least, configure, one_of, require, run

# -----------------------------------------------------------------------------
from_ckpt = ''                  # checkpoint file or run folder
out_dir = 'out/pruned'
overwrite = False
method = 'tamade'               # 'tamade', 'magnitude' (exact count), 'gamma' (pmmp checkpoints), 'none' (sweeps only)
regularise = 'matrices'         # which weights may go: 'matrices' (and embeddings) or 'all'
tolerated_relative_loss_increase = 0.01     # tamade: loss may rise by this share of the loss before
sparsity = 0.5                  # magnitude: share of the weights to zero, exactly
scope = 'global'                # magnitude: one ranking over all tensors ('global') or one in each ('tensor')
sweep_dead_units = True         # also drop units that cannot reach the output; the function is unchanged
drop_unused_rows = False        # also zero embedding rows of ids that never occur in the training split
data_dir = 'data'
dataset = ''                    # '' = the data set of the checkpoint
device = 'auto'
dtype = 'auto'
# -----------------------------------------------------------------------------


def main(argv=None):
    config = configure(globals(), argv)
    config.pop('overwrite')
    require((from_ckpt != '', 'from_ckpt is empty; name a checkpoint, --from_ckpt=out/RUN'),
            one_of('method', method, ('tamade', 'magnitude', 'gamma', 'none')),
            one_of('scope', scope, ('global', 'tensor')),
            one_of('regularise', regularise, ('matrices', 'all')),
            at_least('tolerated_relative_loss_increase', tolerated_relative_loss_increase, 0),
            (0 <= sparsity <= 1, f'sparsity = {sparsity}, expected a share in [0, 1]'))
    import torch

    import runs
    import score
    import sparse
    from bins import open_bin
    env = runs.Env(device, dtype)
    model, checkpoint = runs.load_model(from_ckpt, env.device)
    params = sparse.regularised(model, regularise)
    masks = {n: m.to(env.device) for n, m in checkpoint['masks'].items()}
    name = dataset or checkpoint['data']['dataset']
    runs.open_run_folder(out_dir, overwrite, parent=from_ckpt)
    record = runs.RunRecord(out_dir, config, env, parent=runs.parent_of(from_ckpt),
                            procedure=checkpoint['config'].get('procedure', ''))

    facts, loss_of = {}, None
    if method == 'tamade':
        data, T = open_bin(data_dir, name, 'val'), model.config.block_size

        def loss_of():
            found = score.score(model, data, T, score.rows_per_forward(T), env, max_blocks=sparse.CALIBRATION_BLOCKS)
            return found['nats'] / found['tokens']
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
    if sweep_dead_units:
        print(f'dead units: {sparse.sweep_dead_units(model, masks):,} weights zeroed')
    if drop_unused_rows:
        used = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        tokens = open_bin(data_dir, name, 'train')
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
    print(runs.markdown(rows, ('tensor', 'weights', 'nonzeros', 'sparsity')))
    if loss_of:
        facts['loss_after'] = after = loss_of()
        print(f"validation loss after pruning: {after:.5f} nats ({after / facts['loss_before'] - 1:+.3%})")
    path = os.path.join(out_dir, 'ckpt.pt')
    runs.save_checkpoint(path, dict(
        checkpoint, model=model.state_dict(), masks=masks, parent=record.values['parent'],
        config=dict(checkpoint['config'], **config), optimizer={}, procedure={}, phase='pruned'))
    record.update(status='done', non_zero_params=whole['nonzeros'], sparsity=rows[-1]['sparsity'], **facts)
    print(f'wrote {path}; fine-tune it: python train.py --init_from={out_dir} --procedure=vanilla ...')
    return 0


if __name__ == '__main__':
    run(main)
