"""training/plan.py: phases of exact length, prunings, the learning rate, what --check says of memory."""
import math

import pytest
from conftest import run_script, train_knobs, write_dataset

import train
from corpus.data import Place
from model import config_from_knobs
from training import plan
from training.plan import Phase, Schedule


def phases_of(n_batches, *flags):
    """Return the phases of a run with these flags on epochs of n_batches."""
    return train.phases_of(n_batches, train_knobs(*flags))


def prunings(phase, n_steps, *flags):
    """Return the steps of a phase, up to n_steps, after which a run with these flags prunes."""
    k = train_knobs(*flags)
    return [done for done in range(1, n_steps + 1) if train.prunes_after(phase, done, k)]


# --- the learning rate ---

def test_warm_up_then_schedule_over_the_rest():
    """A schedule whose length ignores the warm-up ends a cosine early or late."""
    cosine = Schedule('cosine', 110, warmup_iters=10, end_ratio=0.1)
    rates = [cosine.rate(step, 2.0) for step in range(110)]
    assert [round(r, 9) for r in rates[:10]] == [round(2.0 * (i + 1) / 10, 9) for i in range(10)]
    for step in range(10, 110):
        assert abs(rates[step] - 2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2)) < 1e-12
    assert rates[10] == 2.0 and rates[109] < 0.2 * 1.01 and all(a >= b for a, b in zip(rates[10:], rates[11:]))
    linear = Schedule('linear', 8, warmup_iters=4, end_ratio=0.0)
    assert [linear.rate(step, 1.0) for step in range(8)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    constant = Schedule('constant', 50)
    assert {constant.rate(step, 3e-4) for step in range(50)} == {3e-4}
    shorter_than_its_warm_up = Schedule('cosine', 5, warmup_iters=10)
    assert shorter_than_its_warm_up.rate(3, 1.0) == 0.4


# --- phases ---

def test_phases_have_exact_lengths():
    """Off-by-one in batch limits."""
    phases = phases_of(10, '--epochs_prelude=1.5', '--epochs=2', '--epochs_fine_tuning=1',
                       '--stop_epoch_at_batch_fine_tuning=3')
    assert [(p.name, p.n_steps, p.epoch_steps, p.first_step, p.first_epoch) for p in phases] == [
        ('prelude', 15, 10, 0, 0), ('main', 20, 10, 15, 2), ('fine_tuning', 3, 3, 35, 4)]
    assert [p.procedure for p in phases] == ['vanilla', 'vanilla', 'vanilla']
    phases = phases_of(10, '--epochs=2', '--stop_epoch_at_batch=50', '--steps_per_chunk=3', '--procedure=rl1',
                       '--epochs_fine_tuning=0.001')
    assert [(p.n_steps, p.procedure) for p in phases] == [(60, 'rl1'), (1, 'vanilla')]
    phases = phases_of(10, '--max_iters=7', '--epochs=0', '--stop_epoch_at_batch=4')
    assert [(p.n_steps, p.epoch_steps) for p in phases] == [(7, 4)]
    assert phases_of(10, '--epochs=0') == []


def test_phases_are_cut_where_the_first_source_ends():
    """A phase that is not reached is left out, the last one is shortened."""
    phases = plan.plan_phases(10, (1, 2, 1))
    assert [(p.name, p.n_steps) for p in plan.cut_phases(phases, 25)] == [('prelude', 10), ('main', 15)]
    assert plan.cut_phases(phases, 40) == phases


def test_a_place_says_which_batch_a_step_takes():
    """Epochs count on over phases; steps of one chunk share a batch; online reads the first epoch in order."""
    phase = Phase('main', 'vanilla', epoch_steps=6, n_steps=18, first_step=6, first_epoch=1, steps_per_chunk=2)
    assert [phase.place(done) for done in (0, 1, 2, 7)] == [
        Place(1, 0, 3), Place(1, 0, 3), Place(1, 1, 4), Place(2, 0, 6)]
    first = Phase('main', 'vanilla', epoch_steps=2, n_steps=4)
    assert [first.place(done, online=True).sequential for done in range(4)] == [True, True, False, False]
    assert not first.place(0).sequential


def test_pruning_schedule():
    """Prune after epoch e (from 1) where e >= first and (e - first) mod every = 0, and only in the main phase."""
    flags = ('--do_pruning', '--first_pruning_after=3', '--prune_every=2', '--epochs=9', '--epochs_prelude=4',
             '--epochs_fine_tuning=5')
    prelude, main, fine_tuning = phases_of(10, *flags)
    assert prunings(main, 90, *flags) == [30, 50, 70, 90]
    assert prunings(prelude, 60, *flags) == prunings(fine_tuning, 60, *flags) == []
    flags = ('--do_pruning', '--first_pruning_after=0', '--epochs=1.5')
    main, = phases_of(10, *flags)
    assert prunings(main, 15, *flags) == [15]
    assert prunings(main, 15, '--first_pruning_after=1') == []              # do_pruning is off


# --- memory ---

MEMORY_PLAN = """
import os, runpy, sys, threading, time, types
import torch
import torch.utils.checkpoint
import configurator, model, score, sparse, train
from training import parallel, plan, run
from training.process import rss_anon_bytes
torch.optim.AdamW([torch.zeros(1)], fused=True)                 # loads 66 MiB of torch's own modules
before = rss_anon_bytes()
peak = 0
ended = False
def watch():
    global peak
    while not ended:
        peak = max(peak, rss_anon_bytes() - before)
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
runpy.run_path(train.__file__, run_name='__main__')
ended = True
thread.join()
config = configurator.configure(dict(__file__=train.__file__, __doc__=''), sys.argv[1:])
model_config = model.config_from_knobs(config, 256)
parts = plan.memory_by_part(model_config, model.n_parameters(model_config), types.SimpleNamespace(**config), 1, 4,
                            score.rows_per_forward(256))
print('RATIO', sum(parts.values()) / peak)
"""


@pytest.mark.slow
def test_memory_plan_is_near_the_measured_peak(tmp_path):
    """--check's estimate within 15 % of the rise of peak RssAnon after imports, transformer4.1m."""
    (tmp_path / 'memory.py').write_text(MEMORY_PLAN)
    write_dataset(str(tmp_path), sizes=(8192, 20_000, 300))     # scoring has as much in flight as it may have
    done = run_script(tmp_path / 'memory.py', '--model=transformer4.1m', '--block_size=256', '--batch_size=12',
                      '--epochs=0', '--max_iters=2', '--final_train_blocks=0', '--procedure=pmmp', '--dtype=float32',
                      '--device=cpu', f'--data_dir={tmp_path}', '--dataset=toy', f'--out_dir={tmp_path / "run"}')
    assert done.returncode == 0, done.stderr[-2000:]
    ratio = float(done.stdout.split('RATIO')[1])
    assert 0.85 < ratio < 1.15, ratio


def test_memory_counts_what_the_knobs_ask_for():
    """Lean PMMP, Muon, pruning and a grid each change the part that they hold, and no other."""
    def parts(*flags):
        k = train_knobs(*flags)
        config = config_from_knobs(vars(k), 256)
        return plan.memory_by_part(config, 1000, k, 2, 4, eval_rows=1)
    plain = parts()
    assert plain['weights'] == plain['gradients'] == 4000 and plain['optimizer'] == 8000
    assert parts('--procedure=pmmp')['procedure'] == 48_000
    assert parts('--procedure=pmmp', '--pmmp_state=lean')['procedure'] == 8000
    assert parts('--do_pruning')['masks'] == 1000 and plain['masks'] == 0
    assert parts('--qat_bits=4')['weights'] == 8000
    assert parts('--shard=full')['weights'] == 2000
    assert parts('--matrix_optimizer=muon')['optimizer'] == 8000 - 4 * 12 * 2 * 32 * 32
