"""training/parallel.py: FSDP2 has the losses of one process and of DDP; one checkpoint for all; sharded ones; memory.

Everything runs under one torchrun with two gloo ranks, see ddp_worker.py; sizes are chosen so that rows split unevenly.
"""
import json
import os
import shutil

import pytest
import torch
from conftest import ROOT, TINY, losses_of, run_here, same, torchrun, weights_of

from configurator import UserError
from training import parallel
from training.checkpoint import load_checkpoint, load_model
from training.folder import read_run, read_status

PROCEDURES = dict({p: (f'--procedure={p}',) for p in ('vanilla', 'rl1', 'drr', 'pmmp')},
                  lean=('--procedure=pmmp', '--pmmp_state=lean'),
                  muon=('--matrix_optimizer=muon',), grid=('--qat_bits=4', '--bits_lambda=8'))
WHOLE_MATRICES = ('muon', 'grid')                       # no FSDP2
MODES = dict(one=(), ddp=(), fsdp=('--shard=full',))
ODD = ('--n_embd=36', '--n_head=2', '--n_layer=3', '--tied', '--positions=rotary')      # 3 blocks, 36 and 108 rows


@pytest.fixture(scope='module')
def jobs(tmp_path_factory, toy):
    """Run all trainings; returns the folder of the run folders."""
    folder = tmp_path_factory.mktemp('parallel')
    short = ('--epochs_prelude=0.5', '--max_iters=30', '--initial_u_value=0.1', '--epochs_fine_tuning=0.75',
             '--grad_clip=1', '--train_only_on_leading_tokens=4001', '--eval_interval=20', '--alpha=1e-4')

    def argv(name, *more):
        return [*TINY, f'--data_dir={toy}', '--dataset=toy', f'--out_dir={folder / name}', *short, *more]

    def together(listed):
        path = folder / 'jobs.json'
        path.write_text(json.dumps(listed))
        done = torchrun(2, os.path.join(ROOT, 'tests', 'ddp_worker.py'), path)
        assert done.returncode == 0, done.stderr[-3000:]

    first = []
    second = []
    for p, flags in PROCEDURES.items():
        run_here('train.py', *argv(f'one-{p}', *flags))
        first += [[f'{m}-{p}', -1, -1, argv(f'{m}-{p}', *flags, *MODES[m])] for m in ('ddp', 'fsdp')
                  if m == 'ddp' or p not in WHOLE_MATRICES]
    pmmp = ('--procedure=pmmp',)
    prune = ('--do_pruning', '--tolerated_relative_loss_increase=0.05')
    first += [['fsdp-odd', -1, -1, argv('fsdp-odd', *pmmp, *ODD, '--shard=full')],
              ['fsdp-micro', -1, -1, argv('fsdp-micro', *pmmp, '--shard=full', '--micro_batch_size=2',
                                          '--activation_checkpointing')],
              ['fsdp-prune', -1, -1, argv('fsdp-prune', *pmmp, *prune, '--shard=full')],
              ['ddp-cut', 1, 25, argv('ddp-cut', *pmmp)],
              ['fsdp-cut', 1, 25, argv('fsdp-cut', *pmmp, '--shard=full')],
              ['parts-cut', 0, 25, argv('parts-cut', *pmmp, *prune, '--shard=full', '--sharded_ckpt')]]
    run_here('train.py', *argv('one-odd', *pmmp, *ODD))
    run_here('train.py', *argv('one-prune', *pmmp, *prune))
    together(first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('NANOMDL_STOP_AT_STEP', '1')
        assert run_here('train.py', *argv('one-cut', *pmmp)) == 85
    for origin in ('one', 'ddp', 'fsdp', 'parts'):
        for m in MODES:
            shutil.copytree(folder / f'{origin}-cut', folder / f'{origin}-to-{m}')
            more = prune if origin == 'parts' else ()
            flags = argv(f'{origin}-to-{m}', *pmmp, *more, '--init_from=resume', *MODES[m])
            if origin == 'parts' and m == 'fsdp':
                flags += ['--sharded_ckpt']
            if m == 'one':
                run_here('train.py', *flags)
            else:
                second.append([f'{origin}-to-{m}', -1, -1, flags])
    together(second)
    return folder


def difference(a, b):
    """Largest difference of two runs' losses, of 50 steps each."""
    one, two = losses_of(a), losses_of(b)
    assert len(one) == len(two) == 50 and [r['step'] for r in one] == [r['step'] for r in two]
    return max(abs(float(x['loss_nats']) - float(y['loss_nats'])) for x, y in zip(one, two))


@pytest.mark.slow
@pytest.mark.parametrize('name', PROCEDURES)
def test_one_process_ddp_and_fsdp2_have_the_same_losses(name, jobs):
    """Gradient edits, norms and clipping that see a rank's part only."""
    bound = 3e-4 if name == 'muon' else 1e-5            # Muon rounds to bfloat16: a last bit becomes 2^-8 of an entry
    assert difference(jobs / f'one-{name}', jobs / f'ddp-{name}') < bound
    if name in WHOLE_MATRICES:
        return
    assert difference(jobs / f'one-{name}', jobs / f'fsdp-{name}') < 1e-5
    one, parts = weights_of(jobs / f'one-{name}'), weights_of(jobs / f'fsdp-{name}')
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in parts.items()}
    assert max(float((one[n] - parts[n]).abs().max()) for n in one) < 3e-3  # Adam amplifies a last bit
    a, b = (read_run(jobs / f'{m}-{name}') for m in ('one', 'fsdp'))
    assert a['n_params'] == b['n_params'] and abs(a['final_val_loss'] - b['final_val_loss']) < 1e-4


@pytest.mark.slow
def test_a_rank_holds_half(jobs):
    """w, gamma, u and their moments are the larger part of PMMP's state: sharded like the weights."""
    ddp, parts = (read_run(jobs / f'{m}-pmmp')['held_bytes_per_rank'] for m in ('ddp', 'fsdp'))
    n = read_run(jobs / 'ddp-pmmp')['n_params']
    assert ddp > 40 * n and 0.5 <= parts / ddp < 0.52


@pytest.mark.slow
def test_a_tied_head_and_uneven_rows(jobs):
    """37 rows on two ranks, a weight that is head and embedding, accumulation and recomputed activations."""
    assert difference(jobs / 'one-odd', jobs / 'fsdp-odd') < 1e-5
    assert difference(jobs / 'one-pmmp', jobs / 'fsdp-micro') < 1e-5


@pytest.mark.slow
def test_pruning_sees_the_whole_model(jobs):
    """Thresholds, counts and masks of one rank's rows."""
    one, parts = (read_run(jobs / f'{m}-prune') for m in ('one', 'fsdp'))
    assert parts['n_prunings'] == 1 and abs(one['epsilon'] - parts['epsilon']) < 1e-4
    saved = load_checkpoint(str(jobs / 'fsdp-prune'))
    nonzero = sum(int(torch.count_nonzero(t)) for n, t in saved['model'].items())
    assert parts['non_zero_params'] == nonzero < 0.9 * parts['n_params']
    assert all(m.dtype == torch.bool and (saved['model'][n][~m] == 0).all() for n, m in saved['masks'].items())
    assert abs(one['non_zero_params'] / nonzero - 1) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize('to', MODES)
@pytest.mark.parametrize('origin', MODES)
def test_a_checkpoint_of_any_mode_continues_in_any_other(origin, to, jobs):
    """Per-rank optimiser state in a file, or parameter orders that differ: w, gamma, u, moments, masks, counters."""
    assert difference(jobs / 'one-pmmp', jobs / f'{origin}-to-{to}') < 1e-5
    if origin == to:
        assert same(weights_of(jobs / f'{origin}-to-{to}'), weights_of(jobs / f'{origin}-pmmp'))


@pytest.mark.slow
def test_sharded_checkpoints_continue_everywhere_and_convert(jobs, tmp_path):
    """A folder that only as many ranks can read, or whose parts are put together in another order."""
    assert not (jobs / 'parts-cut' / 'ckpt.pt').exists() and read_status(str(jobs / 'parts-cut')) == 'paused'
    for m in MODES:
        assert difference(jobs / 'one-prune', jobs / f'parts-to-{m}') < 5e-2            # pruned at another last bit
        assert losses_of(jobs / f'parts-to-{m}')[:25] == losses_of(jobs / 'parts-cut')[:25]
    folder = str(jobs / 'parts-to-fsdp' / 'ckpt.sharded')
    assert run_here('runs.py', 'convert', folder, tmp_path / 'ckpt.pt') == 0
    whole, parts = load_checkpoint(str(tmp_path / 'ckpt.pt')), load_checkpoint(folder)
    assert same({**whole, 'versions': 0, 'commit': 0}, {**parts, 'versions': 0, 'commit': 0})
    model, _ = load_model(str(jobs / 'parts-to-fsdp'))
    assert same(dict(model.state_dict()), whole['model']) and whole['masks'] and whole['step'] == 50
    os.remove(os.path.join(folder, 'rest.pt'))
    with pytest.raises(UserError, match='cut short'):
        load_checkpoint(folder)


def test_sharding_needs_torchrun(train_tiny):
    with pytest.raises(UserError, match='needs torchrun'):
        train_tiny('--shard=full')
    with pytest.raises(UserError, match=r'\(1\) cpu_offload .* \(2\) sharded_ckpt '):
        train_tiny('--cpu_offload', '--sharded_ckpt')


def test_a_rank_that_cannot_write_its_part_is_an_ordinary_error(tmp_path, monkeypatch):
    """torch's CheckpointException derives from BaseException: a full disk went past every handler, as a traceback."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    def full(*_, **__):
        raise CheckpointException('save', {1: (OSError(28, 'No space left on device'), None)})
    monkeypatch.setattr(dcp, 'save', full)
    with pytest.raises(OSError, match='rank 1: .*No space left'):
        parallel.save_sharded(str(tmp_path), dict(model={}))
