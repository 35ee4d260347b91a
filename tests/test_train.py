"""train.py: procedures in the loop, pruning, resuming to the bit, several ranks, bad input.

Most tests run train.py in this process on a model of 42k parameters.
"""
import functools
import inspect
import json
import math
import os
import signal

import pytest
import torch
from conftest import (
    PRUNED,
    RESUMED,
    ROOT,
    THREE_PHASES,
    TINY,
    OneProcess,
    assert_same_run,
    at_step,
    losses_of,
    make_text,
    run_here,
    run_script,
    same,
    snapshot,
    stop_at,
    torchrun,
    train_knobs,
    weights_of,
    write_dataset,
)

import score
import sparse
from configurator import UserError
from corpus import bins, data
from model import GPT, config_from_knobs
from training import folder as folders
from training import process, run
from training import step as steps
from training.checkpoint import load_checkpoint, load_model, parent_of, save_checkpoint
from training.folder import read_run, read_status
from training.plan import Schedule


def test_a_run_has_exactly_the_planned_steps_and_prunings(train_tiny, tmp_path):
    """Off-by-one in stop_epoch_at_batch*, prunings at the wrong epoch, a schedule that differs from the plan."""
    flags = ('--prune_every=2', '--warmup_iters=5', '--schedule=cosine')
    assert train_tiny(*THREE_PHASES, *flags, draw=True) == 0
    rows = losses_of(tmp_path / 'run')
    assert [r['phase'] for r in rows] == ['prelude'] * 6 + ['main'] * 12 + ['fine_tuning'] * 4
    assert [int(r['step']) for r in rows] == list(range(1, 23))
    assert [int(r['epoch']) for r in rows] == [0] * 6 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert [int(r['tokens']) for r in rows] == [256 * s for s in range(1, 23)]
    schedule = Schedule('cosine', 22, warmup_iters=5, end_ratio=0.1)
    assert all(abs(float(r['lr']) / schedule.rate(i, 3e-3) - 1) < 1e-3 for i, r in enumerate(rows))
    nonzeros = [int(r['nonzeros']) for r in rows]               # counted where a phase starts and after a pruning
    spans = [set(nonzeros[i:j]) for i, j in ((0, 6), (6, 10), (10, 18), (18, 22))]
    assert all(len(span) == 1 for span in spans) and nonzeros[6] > nonzeros[10] > nonzeros[18]
    record = read_run(tmp_path / 'run')
    assert record['n_prunings'] == 2 and record['status'] == 'done' and record['non_zero_params'] == nonzeros[18]
    assert record['n_steps'] == 22
    assert [p for p in open(tmp_path / 'run' / 'log.txt') if ' prune ' in p and 'step=10' in p]
    assert abs(record['sparsity'] - (1 - nonzeros[18] / record['n_params'])) < 1e-12
    for name in ('ckpt.pt', 'best.pt', 'log.txt', 'train_loss.csv', 'loss.png', 'run.json'):
        assert (tmp_path / 'run' / name).exists()


def test_steps_per_chunk_repeats_each_batch(train_tiny, tmp_path):
    """steps_per_chunk = 2 takes two updates on one batch, then goes on to the next."""
    train_tiny('--max_iters=4', '--steps_per_chunk=2', '--learning_rate=1e-9', out='twice')
    train_tiny('--max_iters=2', '--learning_rate=1e-9', out='once')
    twice, once = ([round(float(r['loss_nats']), 4) for r in losses_of(tmp_path / n)] for n in ('twice', 'once'))
    assert twice == [once[0], once[0], once[1], once[1]]


# --- procedures in the loop ---

@pytest.mark.parametrize('name', ('rl1', 'drr'))
def test_coefficient_zero_is_bit_identical_to_vanilla(name, train_tiny, tmp_path):
    """A procedure that costs something besides its penalty: with alpha = 0 every byte must be vanilla's."""
    for procedure in ('vanilla', name):
        train_tiny(f'--procedure={procedure}', '--alpha=0', '--max_iters=12', '--grad_clip=1',
                   '--final_train_blocks=-1', out=procedure)
    assert same(weights_of(tmp_path / 'vanilla'), weights_of(tmp_path / name))
    assert losses_of(tmp_path / 'vanilla') == losses_of(tmp_path / name)


@pytest.mark.parametrize('name', ('rl1', 'drr', 'pmmp'))
def test_coefficient_matters(name, train_tiny, tmp_path):
    """A penalty that never reaches the weights: a strong one must make the sum of magnitudes smaller than vanilla's."""
    train_tiny('--max_iters=16', '--final_train_blocks=-1', out='vanilla')
    train_tiny(f'--procedure={name}', '--alpha=0.05', '--initial_u_value=1', '--initial_p_value=0.5',
               '--max_iters=16', '--final_train_blocks=-1')
    size = {n: sum(float(t.abs().sum()) for t in weights_of(tmp_path / n).values() if t.dim() == 2)
            for n in ('vanilla', 'run')}
    assert size['run'] < size['vanilla'] * 0.999


def test_w_starts_at_theta_when_the_main_phase_starts(train_tiny, monkeypatch):
    """After a prelude PMMP pulls θ back to its random start, where w was copied at construction."""
    starts = []
    first = []
    real_init = GPT.init_weights

    def spy_on_begin(names):
        real = names['PMMP'].begin

        def begin(self, params, *more):
            real(self, params, *more)
            starts.append(all(torch.equal(p, w) for p, w in zip(params.values(), self.w, strict=True)))
            starts.append(any(torch.equal(p, q) for p, q in zip(params.values(), first, strict=True)))
        names['PMMP'].begin = begin

    def init(self):
        real_init(self)
        first[:] = [p.detach().clone() for p in self.parameters() if p.dim() >= 2]
    monkeypatch.setattr(GPT, 'init_weights', init)
    train_tiny('--procedure=pmmp', '--epochs_prelude=0.25', '--max_iters=1', '--final_train_blocks=-1',
               change=spy_on_begin)
    assert starts == [True, False]                              # equal to θ as it is now, not to θ as it was drawn


def test_gamma_stays_a_probability_at_a_large_rate(train_tiny):
    """γ is clamped after every step; the run is such that without the projection it would leave [0, 1]."""
    left = []
    inside = []

    def spy_on_project(names):
        real = names['PMMP'].project

        def project(self):
            left.append(any(float(g.min()) < 0 or float(g.max()) > 1 for g in self.gamma))
            real(self)
            inside.append(all(0 <= float(g.min()) and float(g.max()) <= 1 for g in self.gamma))
        names['PMMP'].project = project
    train_tiny('--procedure=pmmp', '--alpha=0.1', '--initial_u_value=0.5', '--procedure_learning_rate=0.3',
               '--max_iters=20', '--final_train_blocks=-1', change=spy_on_project)
    assert len(inside) == 20 and all(inside) and any(left)


def test_clipping_scales_theta_only_and_after_the_penalty(train_tiny, tmp_path):
    """Upstream clips after adding the penalty; both norms are logged, and w, γ, u stay outside the clipped norm."""
    train_tiny('--procedure=pmmp', '--alpha=10', '--initial_u_value=5', '--grad_clip=1e-3', '--max_iters=6',
               '--final_train_blocks=-1',
               '--initial_p_value=0.5')
    rows = losses_of(tmp_path / 'run')
    assert all(float(r['grad_norm']) < 0.9 * float(r['grad_norm_penalised']) for r in rows)
    saved = load_checkpoint(str(tmp_path / 'run'))['procedure']
    assert any(float(g.max()) < 0.5 - 0.003 * 3 for g in saved['gamma'].values())       # an unclipped alpha = 10


# --- pruning in the loop ---

def test_masks_only_grow_and_masked_weights_stay_exactly_zero(train_tiny, tmp_path, monkeypatch):
    """A pruned weight that comes back by Adam's momentum, decay or a later mask; checked before each step."""
    held = {}
    history = []
    checked = []
    real_grow = sparse.Masks.grow
    real_rate = Schedule.rate

    def grow(self, new):
        before = dict(self.masks)
        real_grow(self, new)
        assert all((mask | ~self.masks[n]).all() for n, mask in before.items())
        held.update(params=self.named_params, masks={n: mask.clone() for n, mask in self.masks.items()})
        history.append(sum(int((~mask).sum()) for mask in self.masks.values()))

    def rate(self, step, peak):
        if held:
            assert all(not held['params'][n][~mask].any() for n, mask in held['masks'].items())
            checked.append(step)
        return real_rate(self, step, peak)
    monkeypatch.setattr(sparse.Masks, 'grow', grow)
    monkeypatch.setattr(Schedule, 'rate', rate)
    train_tiny(*THREE_PHASES, '--weight_decay=0.1', '--epochs_fine_tuning=4')
    assert len(history) == 3 and 0 < history[0] < history[1] < history[2] and checked[-1] == 33
    end = load_checkpoint(str(tmp_path / 'run'))
    assert same(end['masks'], held['masks']) and all(not end['model'][n][~m].any() for n, m in end['masks'].items())
    names = [n for group in (True, False) for n, t in end['model'].items() if (t.dim() >= 2) == group]
    adamw, = end['optimizer']
    for i, name in enumerate(names):                            # AdamW's groups: matrices first, then the rest
        for moment in ('exp_avg', 'exp_avg_sq'):
            values = adamw['state'][i][moment]
            assert values.shape == end['model'][name].shape
            assert name not in end['masks'] or not values[~end['masks'][name]].any()


@pytest.mark.parametrize('regularise', ('matrices', 'all'))
def test_pruning_respects_the_tolerated_loss(train_tiny, tmp_path, regularise):
    """The measured loss after pruning must be within δ of the measured loss before; repeated prunings add up."""
    train_tiny(*THREE_PHASES, f'--regularise={regularise}')
    spent = 0
    lines = [dict(p.split('=') for p in line.split() if '=' in p)
             for line in (tmp_path / 'run' / 'log.txt').read_text().splitlines() if ' prune ' in line]
    assert len(lines) == 3
    for line in lines:
        before, after = float(line['loss_before']), float(line['loss_after'])
        assert before * 0.9 < after <= before * 1.05 + 1e-5
        spent += after / before - 1
        assert abs(float(line['tolerance_spent']) - spent) < 1e-3
    end = load_checkpoint(str(tmp_path / 'run'))
    assert (regularise == 'all') == any(end['model'][n].dim() == 1 for n in end['masks'])


def test_tamade_sees_the_leading_100_validation_blocks(train_tiny, tmp_path, monkeypatch):
    """Calibration is on the first 100 blocks of the validation split, on every rank the same."""
    seen = []
    real = score.score

    def spy(*args, **named):
        given = inspect.signature(real).bind(*args, **named).arguments
        seen.append((given['data'].split, given.get('max_blocks', 0)))
        return real(*args, **named)
    monkeypatch.setattr(score, 'score', spy)
    train_tiny('--max_iters=2', '--do_pruning', '--procedure=rl1', '--final_train_blocks=-1')
    assert seen.count(('val', 100)) == 25                       # before, 23 halvings, after


def test_prune_by_gamma(train_tiny, tmp_path):
    """γ < ½ is pruned, γ >= ½ stays, and the weights follow."""
    train_tiny('--procedure=pmmp', '--alpha=0.01', '--initial_u_value=0.1', '--procedure_learning_rate=0.05',
               '--max_iters=24', '--do_pruning',
               '--prune_by=gamma', '--final_train_blocks=-1')
    end = load_checkpoint(str(tmp_path / 'run'))
    gamma = end['procedure']['gamma']
    share = sum(int((~m).sum()) for m in end['masks'].values()) / sum(m.numel() for m in end['masks'].values())
    assert 0.01 < share < 1 and set(gamma) == set(end['masks'])
    for name, mask in end['masks'].items():
        assert (gamma[name][mask] >= 0.5).all() and not end['model'][name][~mask].any()
        assert end['model'][name][mask].all()


# --- the step ---

@pytest.mark.parametrize('world', (1, 2, 4))
def test_ranks_share_one_global_batch(world, train_tiny, monkeypatch):
    """1, 2 and 4 ranks must see the same rows, each once: the loop's own slices, put together again."""
    seen = {}
    real = bins.Bin.gather

    def gather(self, starts, length):
        if self.split == 'train':
            seen.setdefault(rank, []).extend(starts)
        return real(self, starts, length)
    monkeypatch.setattr(bins.Bin, 'gather', gather)
    for rank in range(world):
        monkeypatch.setattr(process, 'Env', lambda *more, rank=rank: OneProcess(rank, world))
        train_tiny('--max_iters=3', '--train_only_on_leading_tokens=600', '--micro_batch_size=1',
                   '--final_train_blocks=-1', out=f'{rank}')
    for step in range(3):                                       # 19 blocks: the third batch has 3 rows and 5 of padding
        share = 8 // world
        rows = [start for rank in range(world) for start in seen[rank][step * share:(step + 1) * share]]
        assert rows == bins.batch_starts('permuted', 858, 0, step, 8, 600, 32).tolist()


@pytest.mark.parametrize('order', ('permuted', 'sequential', 'random'))
def test_accumulation_does_not_change_the_losses(train_tiny, tmp_path, order):
    """A loss normalised per micro-batch is wrong where rows are short; 4,001 bytes leave a short row and padding."""
    for name, micro in (('whole', 0), ('split', 2)):
        train_tiny(f'--micro_batch_size={micro}', '--epochs=2', '--train_only_on_leading_tokens=4001',
                   f'--order={order}', out=name)
    whole, split = losses_of(tmp_path / 'whole'), losses_of(tmp_path / 'split')
    assert [r['tokens'] for r in whole] == [r['tokens'] for r in split] and len(whole) == 32
    assert order == 'random' or int(whole[15]['tokens']) == 4001
    assert max(abs(float(a['loss_nats']) - float(b['loss_nats'])) for a, b in zip(whole, split)) < 1e-5


def test_dropout_depends_on_the_step_alone(train_tiny, tmp_path, monkeypatch):
    """With dropout a resumed run must draw what the unbroken one drew."""
    flags = ('--dropout=0.2', '--max_iters=8', '--eval_interval=3', '--final_train_blocks=-1')
    train_tiny(*flags, out='whole')
    stop_at(monkeypatch, 4)
    assert train_tiny(*flags, out='cut') == 85
    monkeypatch.undo()
    assert train_tiny(*flags, '--init_from=resume', out='cut') == 0
    assert same(weights_of(tmp_path / 'whole'), weights_of(tmp_path / 'cut'))


def plain_losses(text, steps, batch=8, T=32, rate=3e-3):
    """Train a GPT by the shortest loop there is on consecutive blocks; return Σ nats per step before each update."""
    torch.manual_seed(858)
    net = GPT(config_from_knobs(vars(train_knobs()), 256))
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.0, fused=True)
    sums = []
    ids = torch.tensor([10, *text])
    for s in range(steps):
        rows = [ids[i * T:(i + 1) * T + 1] for i in range(s * batch, (s + 1) * batch) if i * T < len(text)]
        nats = sum(torch.nn.functional.cross_entropy(net(r[None, :-1])[0], r[1:], reduction='sum') for r in rows)
        n = sum(len(r) - 1 for r in rows)
        (nats / n).backward()
        optimizer.step()
        optimizer.zero_grad()
        sums.append((nats.item(), n))
    return sums


def test_online_description_length_is_the_first_pass_in_bytes(train_tiny, tmp_path):
    """Online length in bits in a column called bytes, and all epochs summed."""
    assert train_tiny('--online', '--epochs=3', '--train_only_on_leading_tokens=4001', '--final_train_blocks=-1') == 0
    by_hand = plain_losses(make_text(4096)[:4001], 16)
    assert sum(n for _, n in by_hand) == 4001
    found = read_run(tmp_path / 'run')['online_description_length_bytes']
    expected = sum(nats for nats, _ in by_hand) / math.log(2) / 8
    assert abs(found - expected) <= 1 + 1e-4 * expected and 4001 * 0.3 < found < 4001
    rows = losses_of(tmp_path / 'run')
    assert max(abs(float(r['loss_nats']) - nats / n) for r, (nats, n) in zip(rows, by_hand)) < 1e-4
    train_tiny('--max_iters=2', '--final_train_blocks=-1', out='other')
    assert read_run(tmp_path / 'other')['online_description_length_bytes'] is None     # the cell stays empty


def test_final_numbers_are_of_whole_splits(train_tiny, tmp_path):
    """Losses "over the data set" that cover part of it; here against a plain loop over rows."""
    train_tiny('--max_iters=6', '--train_only_on_leading_tokens=4001')
    record = read_run(tmp_path / 'run')
    net, _ = load_model(str(tmp_path / 'run'))
    for split, name in (('train', 'mean_train_loss'), ('test', 'mean_test_loss'), ('val', 'final_val_loss')):
        ids = torch.tensor([10, *make_text(dict(train=4096, val=2000, test=777)[split],
                                           ('train', 'val', 'test').index(split))[:4001]])
        with torch.no_grad():
            nats = sum(float(net(ids[None, i:i + 32][:, :len(ids) - 1 - i],
                                 ids[None, i + 1:i + 33])) for i in range(0, len(ids) - 1, 32))
        assert abs(record[name] - nats / (len(ids) - 1)) < 1e-5, split
    assert abs(record['train_data_bytes'] - record['mean_train_loss'] * 4001 / math.log(2) / 8) < 1


def test_non_finite_loss_stops_before_the_update(train_tiny, tmp_path, monkeypatch):
    """A NaN that reaches the weights or the checkpoint; the last good one stays and the message says what to try."""
    real = GPT.forward

    def broken(self, x, y=None, cache=None):
        broken.calls += 1
        return real(self, x, y, cache) * (math.nan if broken.calls > 5 else 1)
    broken.calls = 0
    monkeypatch.setattr(GPT, 'forward', broken)
    with pytest.raises(UserError, match='loss nan.*--learning_rate'):
        train_tiny('--max_iters=20', '--checkpoint_time=1e-9')
    end = load_checkpoint(str(tmp_path / 'run'))
    assert end['step'] == 5 and all(torch.isfinite(t).all() for t in end['model'].values())
    assert read_run(tmp_path / 'run')['status'] == 'failed'


# --- stopping and resuming ---

def status_of(folder):
    """Return the exit status of runs.py status: 0 done, 85 paused, 1 anything else."""
    return run_here('runs.py', 'status', folder)


def left_by_exit(monkeypatch):
    """Let what ends a process at once end only the run that is in this process."""
    def leave(code):
        raise SystemExit(code)
    monkeypatch.setattr(os, '_exit', leave)


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory, toy):
    """An unbroken run of three phases to compare resumed ones with."""
    folder = tmp_path_factory.mktemp('unbroken') / 'run'
    assert run_here('train.py', *TINY, f'--data_dir={toy}', '--dataset=toy', f'--out_dir={folder}', *RESUMED) == 0
    return folder


@pytest.mark.parametrize('stops', [(3,), (6,), (8,), (10,), (13, 15), (18,), (20,), (21, 22)], ids=str)
def test_resume_is_bit_exact(stops, train_tiny, tmp_path, monkeypatch, unbroken):
    """Resume replays the first batches or skips data; in every phase, at its ends, at prunings."""
    resume = ()
    for stop in stops:
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            left_by_exit(patch)                             # in the last step (22) only the scoring is left to stop
            assert train_tiny(*RESUMED, *resume) == 85
        assert status_of(tmp_path / 'run') == 85
        assert int(losses_of(tmp_path / 'run')[-1]['step']) == stop
        resume = ('--init_from=resume',)
    assert train_tiny(*RESUMED, *resume) == 0
    assert status_of(tmp_path / 'run') == 0
    assert_same_run(tmp_path / 'run', unbroken)


@pytest.mark.parametrize('stop', (1, 5, 9, 18, 21))
def test_nanomdl_stop_at_step_pauses_and_resumes(stop, train_tiny, tmp_path, monkeypatch, unbroken):
    """A stop that depends on no clock: after that many steps of the whole run, once."""
    monkeypatch.setenv('NANOMDL_STOP_AT_STEP', str(stop))
    assert train_tiny(*RESUMED) == 85
    record = read_run(tmp_path / 'run')
    assert record['status'] == 'paused' and record['step'] == stop == len(losses_of(tmp_path / 'run'))
    assert f'paused step={stop} reason=NANOMDL_STOP_AT_STEP; continue with' in record['paused']
    assert load_checkpoint(str(tmp_path / 'run'))['step'] == stop and status_of(tmp_path / 'run') == 85
    assert train_tiny(*RESUMED, '--init_from=resume') == 0                  # it is past that step now
    assert_same_run(tmp_path / 'run', unbroken)


def test_nanomdl_stop_at_the_last_step_leaves_the_scoring(train_tiny, tmp_path, monkeypatch, unbroken):
    """All is saved by then: the final numbers are left to whoever resumes."""
    with monkeypatch.context() as patch:
        patch.setenv('NANOMDL_STOP_AT_STEP', '22')
        left_by_exit(patch)
        assert train_tiny(*RESUMED) == 85
    assert 'while scoring by NANOMDL_STOP_AT_STEP' in read_run(tmp_path / 'run')['paused']
    assert train_tiny(*RESUMED, '--init_from=resume') == 0
    assert_same_run(tmp_path / 'run', unbroken)


def test_time_limit_checkpoint_holds_everything(train_tiny, tmp_path, unbroken, monkeypatch):
    """The time-limit checkpoint crashes, never triggers, or omits γ, w, u and the mask."""
    with monkeypatch.context() as patch:
        stop_at(patch, 13, signal.SIGALRM)                      # the hour is over after the first pruning
        assert train_tiny(*RESUMED, '--max_runtime=3600') == 85
    assert 'reason=max_runtime' in read_run(tmp_path / 'run')['paused']
    saved = load_checkpoint(str(tmp_path / 'run'))
    assert saved['step'] == 13 and saved['phase'] == 'main' and saved['masks'] and saved['optimizer'][0]['state']
    for key in ('w', 'gamma', 'u'):
        assert set(saved['procedure'][key]) == {n for n, t in saved['model'].items() if t.dim() >= 2}
    assert any(float(u.max()) > 0.1 for u in saved['procedure']['u'].values())
    assert train_tiny(*RESUMED, '--init_from=resume') == 0
    assert_same_run(tmp_path / 'run', unbroken)


def interrupt_at(monkeypatch, step, *numbers):
    """Send this process signals while the given step (from 1) is under way, as if Ctrl-C were never ignored here."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    left = list(numbers)                                    # the rate is asked for several times a step

    def press():
        while left:
            os.kill(os.getpid(), left.pop(0))
    at_step(monkeypatch, step, press)


@pytest.mark.parametrize('stop', (2, 9, 14, 21))
def test_ctrl_c_saves_and_says_how_to_go_on(stop, train_tiny, tmp_path, monkeypatch, unbroken, capfd):
    """SIGINT threw a run away. The SIGTERM that torchrun sends after it is no second interrupt."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, stop, signal.SIGINT, signal.SIGTERM)
        assert train_tiny(*RESUMED) == 85
    line = f'paused step={stop} reason=SIGINT; continue with --init_from=resume'
    record = read_run(str(tmp_path / 'run'))
    assert record['status'] == 'paused' and record['paused'] == line
    assert (tmp_path / 'run' / 'log.txt').read_text().rstrip('\n').endswith(line)
    shown = capfd.readouterr()
    assert line in shown.out and shown.err.count('interrupt: ') == 1 and 'second Ctrl-C' in shown.err
    assert train_tiny(*RESUMED, '--init_from=resume') == 0
    assert_same_run(tmp_path / 'run', unbroken)
    assert 'paused' not in read_run(str(tmp_path / 'run'))


def test_a_second_ctrl_c_leaves_at_once(train_tiny, tmp_path, monkeypatch, unbroken):
    """Nobody waits for a step that hangs; what the last checkpoint holds is what a resume goes on from."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 9, signal.SIGINT, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(*RESUMED, '--checkpoint_time=1e-9')
    assert load_checkpoint(str(tmp_path / 'run'))['step'] == 8
    folders.close_run_folders()                                # as at exit
    assert train_tiny(*RESUMED, '--init_from=resume') == 0
    assert_same_run(tmp_path / 'run', unbroken)


def test_ctrl_c_while_scoring_leaves_that_to_a_resume(train_tiny, tmp_path, monkeypatch, unbroken):
    """All is saved by then: out at once with 85, and the same line where people look for it."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 22, signal.SIGINT)
        left_by_exit(patch)
        status = train_tiny(*RESUMED)
    record = read_run(str(tmp_path / 'run'))
    assert status == 85 and record['status'] == 'paused' and '--init_from=resume' in record['paused']
    assert (tmp_path / 'run' / 'log.txt').read_text().rstrip('\n').endswith(record['paused'])
    assert os.listdir(tmp_path) == ['run']                  # the lock is gone, although no atexit was run
    assert train_tiny(*RESUMED, '--init_from=resume') == 0
    assert_same_run(tmp_path / 'run', unbroken)


def test_an_ignored_ctrl_c_stays_ignored(train_tiny, tmp_path):
    """nohup and a shell's background jobs ignore SIGINT: what is pressed for the foreground must not end them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2, signal.SIGINT)
        assert train_tiny('--max_iters=4', '--final_train_blocks=-1') == 0


def test_killed_after_a_checkpoint_leaves_no_gap_and_no_repeat(train_tiny, tmp_path, unbroken, monkeypatch):
    """kill -9 some steps after the last checkpoint: log.txt and train_loss.csv must be cut back to it, not repeated."""
    class Killed(BaseException):
        """Not an Exception: nothing may catch it."""

    def die():
        raise Killed

    def save(path, checkpoint, *more):
        if checkpoint['step'] <= 12:
            save_checkpoint(path, checkpoint, *more)
    with monkeypatch.context() as patch:
        at_step(patch, 17, die)
        patch.setattr(run, 'save_checkpoint', save)
        with pytest.raises(Killed):
            train_tiny(*RESUMED, '--checkpoint_time=1e-9', '--log_interval=1')
    with open(tmp_path / 'run' / 'train_loss.csv', 'a') as f:   # rows that reached the disk later
        f.write('main,3,13,3328,9.9,0.1,1,1,5,9.5\nmain,3,14,3584,9.9,0.1,1,1,5,9.75\nmain,3,1')
    assert load_checkpoint(str(tmp_path / 'run'))['step'] == 12
    assert train_tiny(*RESUMED, '--init_from=resume', '--log_interval=1') == 0
    assert_same_run(tmp_path / 'run', unbroken)
    with open(tmp_path / 'run' / 'log.txt') as f:
        steps = [line.split('step=')[1].split()[0] for line in f if ' train phase=' in line]
    assert steps == [str(s) for s in range(1, 23)]


def test_fp16_resume_keeps_the_loss_scale(train_tiny, tmp_path, monkeypatch):
    """Under fp16 the scaler's state decides which steps are skipped: it must come back with the rest."""
    flags = ('--dtype=float16', '--max_iters=6', '--final_train_blocks=-1')
    growing_fast = functools.partial(torch.amp.GradScaler, growth_interval=2)
    monkeypatch.setattr(torch.amp, 'GradScaler', growing_fast)
    train_tiny(*flags, out='whole')
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert train_tiny(*flags, out='cut') == 85
    assert train_tiny(*flags, '--init_from=resume', out='cut') == 0
    whole, cut = (load_checkpoint(str(tmp_path / n)) for n in ('whole', 'cut'))
    assert whole['scaler']['scale'] > 65536 and same(whole['scaler'], cut['scaler'])
    assert same(whole['model'], cut['model'])


def test_init_from_takes_weights_and_masks_and_starts_at_step_0(train_tiny, tmp_path, unbroken):
    """init_from = a run: its weights and masks, which then hold, and a fresh optimiser and count."""
    assert train_tiny(f'--init_from={unbroken}', '--max_iters=5', '--final_train_blocks=-1') == 0
    parent, child = load_checkpoint(str(unbroken)), load_checkpoint(str(tmp_path / 'run'))
    assert same(parent['masks'], child['masks']) and child['step'] == 5 and not same(parent['model'], child['model'])
    assert all(not child['model'][n][~m].any() for n, m in child['masks'].items())
    assert child['parent']['sha256'] == parent_of(str(unbroken))['sha256'] != ''
    first = float(losses_of(tmp_path / 'run')[0]['loss_nats'])
    assert abs(first - float(losses_of(unbroken)[-1]['loss_nats'])) < 0.5


def test_resume_where_nothing_was_saved_starts_from_scratch(train_tiny, tmp_path):
    """A queue always launches with --init_from=resume; the first launch must simply start."""
    assert train_tiny('--init_from=resume', '--max_iters=3', '--final_train_blocks=-1', out='a') == 0
    assert train_tiny('--max_iters=3', '--final_train_blocks=-1', out='b') == 0
    assert same(weights_of(tmp_path / 'a'), weights_of(tmp_path / 'b'))
    assert losses_of(tmp_path / 'a') == losses_of(tmp_path / 'b')


@pytest.mark.parametrize('change, words', [
    ('--batch_size=16', ('batch_size', '16', '8')), ('--seed=1', ('seed', '858')),
    ('--procedure=rl1', ("'rl1'", "'pmmp'")),
    ('--order=random', ("'random'", "'permuted'")), ('--train_only_on_leading_tokens=4000', ('sha256', ':4000')),
    ('--n_embd=64', ('n_embd: 32 there, 64 here',)), ('--no-online', ('online',))])
def test_resume_with_other_data_or_shape_is_refused(change, words, train_tiny, tmp_path, unbroken):
    """A resumed run with another batch, order, seed, data or shape would silently see other data."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3)
        assert train_tiny(*RESUMED) == 85
    before = snapshot(tmp_path)
    with pytest.raises(UserError) as e:
        train_tiny(*RESUMED, '--init_from=resume', change)
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)
    assert snapshot(tmp_path) == before


# --- bad input ---

@pytest.mark.parametrize('flags, words', [
    (['--alpha=-1e-7'], ('alpha = -1e-07', 'at least 0')),
    (['--alpha=nan'], ('alpha = nan',)),
    (['--batch_size=8', '--micro_batch_size=3'], ('batch_size = 8', 'micro_batch_size 3', 'nearest that is: 9')),
    (['--batch_size=0'], ('batch_size = 0', 'at least 1')),
    (['--alhpa=1'], ("'alhpa'", 'did you mean alpha')),
    (['--epochs=lots'], ('lots', 'float')),
    (['--epochs=inf'], ('epochs = inf',)),
    (['--procedure=pmpm'], ("'pmpm'", "did you mean 'pmmp'")),
    (['--initial_p_value=1.5'], ('initial_p_value = 1.5', '[0, 1]')),
    (['--prune_by=gamma', '--procedure=rl1'], ("prune_by = 'gamma'", 'pmmp')),
    (['--online', '--dropout=0.1'], ('online', 'dropout')),
    (['--learning_rate=0'], ('learning_rate = 0.0', '> 0')),
    (['--beta2=1.5'], ('beta2 = 1.5',)),
    (['--adam_epsilon=-1'], ('adam_epsilon = -1',)),
    (['--eval_blocks=-2'], ('eval_blocks = -2',)),
    (['--dropout=1'], ('dropout = 1.0',)),
    (['--positions=rotory'], ("did you mean 'rotary'",)),
    (['--model=transformer4m'], ("'transformer4m'", 'transformer4.1m')),
    (['--n_head=5'], ('n_embd = 32', 'n_head = 5')),
    (['--device=gpu'], ("'gpu'", 'cuda')),
    (['--dtype=fp16'], ("'fp16'", 'float16')),
    (['--dataset=wiki40b_en'], ('wiki40b_en', 'prepare_wiki40b.py')),
    (['--train_only_on_leading_tokens=999999'], ('999,999', '4,096')),
    (['--epochs=0'], ('nothing to train', 'epochs')),
    (['--init_from=nowhere'], ("'nowhere'", 'no checkpoint')),
    (['--alpha=-1', '--beta=-2', '--schedule=cosin'], ('alpha = -1', 'beta = -2', "did you mean 'cosine'")),
], ids=lambda v: ' '.join(v) if isinstance(v, list) else '')
def test_bad_knob_is_one_line_and_touches_nothing(flags, words, train_tiny, tmp_path, unbroken):
    """Bad input: one line with value, expectation and cure; even with --overwrite a finished run must survive it."""
    folder = tmp_path / 'run'
    folder.mkdir()
    for name, content in snapshot(unbroken).items():
        (folder / name).write_bytes(content)
    before = snapshot(tmp_path)
    with pytest.raises(UserError) as e:
        train_tiny('--overwrite', *flags)
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)
    assert snapshot(tmp_path) == before


def test_finished_run_is_refused_without_overwrite(toy, unbroken):
    """Hours of training must not be replaced by a second launch, and a finished run has nothing to resume."""
    before = snapshot(unbroken)
    argv = ['train.py', *TINY, f'--out_dir={unbroken}', '--dataset=toy', f'--data_dir={toy}', *RESUMED]
    with pytest.raises(UserError, match='--overwrite'):
        run_here(*argv)
    with pytest.raises(UserError, match='finished'):
        run_here(*argv, '--init_from=resume')
    assert snapshot(unbroken) == before


@pytest.mark.parametrize('damage, words', [
    (lambda p: os.truncate(p, os.path.getsize(p) // 2), ('cut short',)),
    (lambda p: torch.save(dict(model={}), p), ('nanomdl-ckpt-1',))], ids=('half', 'foreign'))
@pytest.mark.parametrize('flag', ('--init_from={}', '--init_from=resume'))
def test_damaged_checkpoint_is_refused_and_left_alone(damage, words, flag, train_tiny, tmp_path):
    """A cut or foreign checkpoint: one line, not a traceback, and nothing overwritten."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        assert train_tiny('--max_iters=4') == 85
    damage(tmp_path / 'run' / 'ckpt.pt')
    before = snapshot(tmp_path)
    other = flag.format(tmp_path / 'run')
    with pytest.raises(UserError) as e:
        train_tiny('--max_iters=4', other, out='run' if 'resume' in other else 'new')
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)
    assert snapshot(tmp_path) == before


def test_checkpoint_of_another_shape_is_refused(train_tiny, tmp_path, unbroken):
    """A checkpoint of another shape: the message names what differs, and the run to be replaced is still there."""
    train_tiny('--max_iters=1', '--final_train_blocks=-1')
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match='n_embd: 32 there, 64 here.*shape') as e:
        train_tiny('--n_embd=64', f'--init_from={unbroken}', '--max_iters=1', '--overwrite')
    assert '\n' not in str(e.value) and snapshot(tmp_path) == before


def test_a_run_cannot_clear_the_checkpoint_it_starts_from(train_tiny, tmp_path):
    """--init_from=X --out_dir=X --overwrite would delete X before it is read."""
    train_tiny('--max_iters=2', '--final_train_blocks=-1')
    before = snapshot(tmp_path)
    for parent in (tmp_path / 'run', tmp_path / 'run' / 'best.pt'):
        with pytest.raises(UserError, match='out_dir'):
            train_tiny('--max_iters=1', f'--init_from={parent}', '--overwrite')
        assert snapshot(tmp_path) == before


def test_damaged_data_stops_before_the_run_folder_is_touched(train_tiny, tmp_path):
    """A truncated .bin and an id above the vocabulary: one line, and --overwrite has not yet overwritten."""
    data_dir = str(tmp_path / 'data')
    write_dataset(data_dir)
    assert train_tiny('--max_iters=1', '--final_train_blocks=-1', data_dir=data_dir) == 0
    os.truncate(os.path.join(data_dir, 'toy', 'val.bin'), 100)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match='val.bin has 100 bytes.*2000 tokens.*prepare_text.py'):
        train_tiny('--max_iters=1', '--overwrite', data_dir=data_dir)
    assert snapshot(tmp_path) == before


def test_pruning_needs_a_validation_split(train_tiny, tmp_path):
    """Validation never aliases training: without a split TAMADE is refused, and plain training works."""
    write_dataset(str(tmp_path / 'data'), splits=('train',))
    with pytest.raises(UserError, match='no validation split'):
        train_tiny('--do_pruning', '--max_iters=1', data_dir=str(tmp_path / 'data'))
    assert train_tiny('--max_iters=1', data_dir=str(tmp_path / 'data')) == 0
    write_dataset(str(tmp_path / 'data'), sizes=(500, 0, 10))
    with pytest.raises(UserError, match='val'):
        train_tiny('--do_pruning', '--max_iters=1', data_dir=str(tmp_path / 'data'), out='empty')


@pytest.mark.parametrize('batch, ranks, micro', [(8, 3, 0), (4, 8, 0), (16, 2, 3)])
def test_batch_that_ranks_cannot_share_shows_the_numbers(batch, ranks, micro, train_tiny, monkeypatch):
    """The effective batch is one number; what does not divide it must be said with the nearest that does."""
    monkeypatch.setenv('WORLD_SIZE', str(ranks))
    with pytest.raises(UserError, match=f'batch_size = {batch} is not a multiple of {ranks} ranks'):
        train_tiny(f'--batch_size={batch}', f'--micro_batch_size={micro}')


# --- as a user calls it ---

@pytest.mark.slow
def test_mistake_on_the_command_line_is_one_line_and_exit_1(tmp_path, toy):
    """A traceback where one line would do; nothing on stdout, nothing on disk."""
    done = run_script(os.path.join(ROOT, 'train.py'), '--alpha=-1', f'--data_dir={toy}', '--dataset=toy', cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == '' and done.stderr.count('\n') == 1 and os.listdir(tmp_path) == []
    assert done.stderr.startswith('error: alpha = -1.0, expected at least 0')


def test_the_time_limit_counts_from_the_start(train_tiny, monkeypatch):
    """max_runtime is what a queue grants a job: the timer runs before data are opened and a model is made."""
    seen = []
    real = data.open_data

    def opening(*args, **named):
        seen.append(signal.getitimer(signal.ITIMER_REAL)[0])
        return real(*args, **named)
    monkeypatch.setattr(data, 'open_data', opening)
    assert train_tiny('--max_iters=1', '--final_train_blocks=-1', '--max_runtime=1e6') == 0
    assert len(seen) == 3 and 0 < seen[0] <= 1e6
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)               # and ends with the run


@pytest.mark.parametrize('phase', ('steps', 'scoring'))
def test_time_limit_is_kept(phase, train_tiny, tmp_path, monkeypatch):
    """The end of max_runtime ends steps after the one under way, and the final scoring, at once."""
    real = score.evaluate
    scored = []

    def evaluate(*args, progress='', **named):
        if progress:                                        # of the end's splits
            scored.append(progress)
            os.kill(os.getpid(), signal.SIGALRM)
        return real(*args, progress=progress, **named)
    monkeypatch.setattr(score, 'evaluate', evaluate)
    left_by_exit(monkeypatch)
    if phase == 'steps':
        stop_at(monkeypatch, 3, signal.SIGALRM)
    assert train_tiny('--max_iters=5', '--epochs=0', '--max_runtime=3600') == 85
    assert read_status(tmp_path / 'run') == 'paused'
    log = (tmp_path / 'run' / 'log.txt').read_text()
    assert ('reason=max_runtime' in log) == (phase == 'steps')
    assert ('while scoring by max_runtime' in log) == (phase == 'scoring')
    assert scored == ([] if phase == 'steps' else ['train split'])
    assert load_checkpoint(tmp_path / 'run')['step'] == (3 if phase == 'steps' else 5)


@pytest.mark.slow
def test_a_paused_process_exits_with_85_and_so_does_its_status(tmp_path, toy):
    """An sbatch file requeues on 85: from a real process that ran out of time."""
    done = run_script(os.path.join(ROOT, 'train.py'), *TINY, f'--data_dir={toy}', '--dataset=toy', '--max_runtime=1e-6',
                      cwd=tmp_path)
    assert done.returncode == 85, done.stderr
    assert run_script(os.path.join(ROOT, 'runs.py'), 'status', 'out/run', cwd=tmp_path).returncode == 85
    assert len(losses_of(tmp_path / 'out' / 'run')) == 1


MEMORY = '''
import sys
from conftest import run_here
from training.plan import Schedule
from training.process import rss_anon_bytes
real = Schedule.rate
peak = {}
def rate(*more):
    peak[name] = max(peak.get(name, 0), rss_anon_bytes())
    return real(*more)
Schedule.rate = rate
folder, *flags = sys.argv[1:]
for name in ('small', 'small', 'large'):
    status = run_here('train.py', *flags, f'--data_dir={folder}', f'--out_dir={folder}/out', f'--dataset={name}',
                      '--overwrite')
    assert status == 0
    peak[name] = max(peak[name], rss_anon_bytes())
print(peak['small'], peak['large'])
'''


@pytest.mark.slow
@pytest.mark.parametrize('order', ('permuted',))
def test_memory_does_not_grow_with_the_data(tmp_path, order):
    """Int64 data copied whole; a 2 GB train.bin must cost at most 50 MB more than one of 10 MB."""
    for name, size in (('small', 10 << 20), ('large', 2 << 30)):
        write_dataset(str(tmp_path), name, sizes=(100, 3200, 100))
        os.truncate(tmp_path / name / 'train.bin', size)        # a sparse file: takes no space
        meta = json.loads((tmp_path / name / 'meta.json').read_text())
        meta['splits']['train'].update(tokens=size, text_bytes=size, sha256='')
        (tmp_path / name / 'meta.json').write_text(json.dumps(meta))
    (tmp_path / 'memory.py').write_text(MEMORY)
    done = run_script(tmp_path / 'memory.py', tmp_path, *TINY, '--max_iters=4', '--final_train_blocks=2',
                      f'--order={order}', '--do_pruning')
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split('\n')[-2].split())
    assert 0 < small and large - small < 50 << 20


# --- several ranks ---

@pytest.fixture(scope='module')
def two_ranks(tmp_path_factory, toy):
    """Run all multi-rank trainings under one torchrun with two gloo ranks, and the same ones in this process."""
    folder = tmp_path_factory.mktemp('ranks')
    short = ('--epochs_prelude=0.25', '--max_iters=12', '--initial_u_value=0.1', '--epochs_fine_tuning=0.25',
             '--do_pruning', '--grad_clip=1',
             '--tolerated_relative_loss_increase=0.05', '--train_only_on_leading_tokens=4001', '--eval_interval=4')
    flags = {p: (f'--procedure={p}', '--alpha=1e-4', *short) for p in ('vanilla', 'rl1', 'drr', 'pmmp')}
    flags['long'] = ('--procedure=pmmp', '--alpha=1e-4', '--epochs_prelude=0.25', '--max_iters=200', '--do_pruning',
                     '--first_pruning_after=5',
                     '--prune_every=5', '--final_train_blocks=8', '--initial_u_value=0.01')

    def argv(name, where, *more):
        return [*TINY, f'--data_dir={toy}', '--dataset=toy', f'--out_dir={folder / where / name}', *flags[name], *more]
    jobs = [[name, -1, -1, argv(name, 'two')] for name in flags]
    flags['cut'] = flags['pmmp']
    jobs += [['cut', 1, 9, argv('cut', 'two')], ['cut', -1, -1, argv('cut', 'two', '--init_from=resume')]]
    (folder / 'jobs.json').write_text(json.dumps(jobs))
    done = torchrun(2, os.path.join(ROOT, 'tests', 'ddp_worker.py'), folder / 'jobs.json')
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ('vanilla', 'rl1', 'drr', 'pmmp'):
        assert run_here('train.py', *argv(name, 'one')) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('name', ('vanilla', 'rl1', 'drr', 'pmmp'))
def test_two_ranks_give_the_losses_of_one_process(name, two_ranks):
    """A batch, penalty or loss that depends on the number of ranks; sums over one rank's share."""
    one, two = losses_of(two_ranks / 'one' / name), losses_of(two_ranks / 'two' / name)
    assert len(one) == len(two) == 20 and [r['tokens'] for r in one] == [r['tokens'] for r in two]
    assert max(abs(float(a['loss_nats']) - float(b['loss_nats'])) for a, b in zip(one[:16], two[:16])) < 1e-5
    a, b = (read_run(two_ranks / n / name) for n in ('one', 'two'))
    assert abs(a['epsilon'] - b['epsilon']) < 1e-4 and abs(a['non_zero_params'] / b['non_zero_params'] - 1) < 1e-2
    for key in ('mean_train_loss', 'mean_test_loss', 'final_val_loss'):
        assert abs(a[key] - b[key]) < 1e-3, key
    assert a['tokens_seen'] == b['tokens_seen'] and b['n_processes'] == 2


@pytest.mark.slow
def test_replicas_are_identical_after_200_pmmp_steps(two_ranks):
    """PMMP replicas drift apart; per-rank thresholds in TAMADE give per-rank masks."""
    saved = weights_of(two_ranks / 'two' / 'long')
    zero, one = (dict(zip(saved, torch.load(two_ranks / 'two' / 'long' / f'long-theta-{r}.pt'), strict=True))
                 for r in (0, 1))
    assert len(losses_of(two_ranks / 'two' / 'long')) == 204 and same(zero, one)
    assert same(zero, saved)
    assert read_run(two_ranks / 'two' / 'long')['n_prunings'] >= 2
    assert (zero['blocks.0.feed_forward.up.weight'] == 0).any()


@pytest.mark.slow
@pytest.mark.parametrize('name', ('pmmp', 'long'))
def test_w_equals_theta_on_every_rank_at_the_start_of_main(name, two_ranks):
    """W copied from a per-rank random init, or before the prelude."""
    starts = [torch.load(two_ranks / 'two' / name / f'{name}-start-{r}.pt') for r in (0, 1)]
    assert same(starts[0]['w'], starts[0]['theta']) and same(starts[1]['w'], starts[1]['theta'])
    assert same(starts[0], starts[1])


@pytest.mark.slow
def test_a_signal_on_one_rank_pauses_all_and_resume_is_bit_exact(two_ranks):
    """A queue signals one process; ranks that stop at different steps hang, and resume must end on the same bits."""
    assert same(weights_of(two_ranks / 'two' / 'cut'), weights_of(two_ranks / 'two' / 'pmmp'))
    assert losses_of(two_ranks / 'two' / 'cut') == losses_of(two_ranks / 'two' / 'pmmp')
    assert [(two_ranks / 'two' / 'cut' / f'cut-status-{r}').read_text() for r in (0, 1)] == ['0', '0']
    log = (two_ranks / 'two' / 'cut' / 'log.txt').read_text()
    assert log.count('paused step=10') == 1


# --- the order of a step ---

def test_gradients_of_pruned_weights_are_no_part_of_the_norm(train_tiny, tmp_path, monkeypatch):
    """Clipping at a norm that counted them throttled the weights that are left; their gradients are made huge here."""
    flags = ('--procedure=drr', '--alpha=1e-3', '--epochs=1', '--epochs_fine_tuning=1', *PRUNED, '--grad_clip=1')
    assert train_tiny(*flags, out='plain') == 0

    # Of matrices only pruned weights are exactly zero. Their gradients grow before anything looks at them.
    real = steps.unscale
    changed = []

    def unscale(optimizers, params, *more):
        real(optimizers, params, *more)
        for p in params:
            if p.dim() >= 2:
                pruned = p.detach() == 0
                p.grad[pruned] = 1e6
                changed.append(int(pruned.sum()))
    monkeypatch.setattr(steps, 'unscale', unscale)
    assert train_tiny(*flags, out='blown_up') == 0
    assert sum(changed) > 1000
    assert_same_run(tmp_path / 'plain', tmp_path / 'blown_up')
