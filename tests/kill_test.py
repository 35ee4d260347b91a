"""Kill a training with SIGKILL at random moments, resume it each time, and compare it with the unbroken run to the bit.

    python tests/kill_test.py [--kills=20] [--ranks=1] [--train_flags=--shard=full]

600 steps: prelude, main with pmmp and two prunings, fine-tuning, a checkpoint every 0.1 s. One line per kill, then
what differs, if anything does: exit code 1. Linux: processes are found in /proc. No GPU, one thread per rank.
"""
import glob
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

from conftest import ROOT, TINY, same, write_dataset

from configurator import configure, run

# -----------------------------------------------------------------------------
kills = 20
ranks = 1
seed = 0                        # of the moments
train_flags = ''                # more flags for train.py, such as --shard=full
# -----------------------------------------------------------------------------

FLAGS = (*TINY, '--dataset=toy', '--procedure=pmmp', '--alpha=1e-3', '--initial_u_value=0.1', '--epochs_prelude=1',
         '--stop_epoch_at_batch_prelude=150', '--epochs=2', '--stop_epoch_at_batch=150', '--epochs_fine_tuning=1',
         '--stop_epoch_at_batch_fine_tuning=150', '--do_pruning', '--first_pruning_after=1', '--eval_interval=40',
         '--tolerated_relative_loss_increase=0.05', '--final_train_blocks=8', '--log_interval=1')
N_STEPS = 600
LIMIT_SECONDS = 120             # of one launch
MOMENTS = ('step', 'save', 'resume', 'start')
# init_from, what was resumed, times, the working tree
MAY_DIFFER = {'config', 'parent', 'train_seconds', 'step_seconds', 'commit'}


def launch(folder, data_dir, n_ranks, *flags):
    """Start a run in a session of its own; its output goes to FOLDER.out."""
    torchrun = ('-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n_ranks}') if n_ranks > 1 else ()
    command = [sys.executable, *torchrun, os.path.join(ROOT, 'train.py'), *FLAGS, *flags, f'--data_dir={data_dir}',
               f'--out_dir={folder}']
    with open(f'{folder}.out', 'ab') as out:
        return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True,
                                env=dict(os.environ, OMP_NUM_THREADS='1'))


def processes_of(folder):
    """Return the ids of launcher and ranks: torchrun gives each rank its own session, so one killpg misses them."""
    found = []
    for path in glob.glob('/proc/[0-9]*/cmdline'):
        try:
            with open(path, 'rb') as f:
                if f'--out_dir={folder}'.encode() in f.read().split(b'\0'):
                    found.append(int(path.split('/')[2]))
        except OSError:                                     # has ended meanwhile
            continue
    return found


def kill_all(folder, process):
    """SIGKILL to every process of the run, launcher first, until none is left."""
    process.kill()
    process.wait(30)
    end = time.time() + 30
    while pids := processes_of(folder):
        if time.time() > end:
            raise RuntimeError(f'processes {pids} do not die')
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.005)


def progress(folder):
    """Return (process id, last logged step, time of ckpt.pt.tmp) of a run; 0 for what is not there."""
    import runs
    record, half = runs.read_run(folder), os.path.join(folder, 'ckpt.pt.tmp')
    try:
        written = os.stat(half).st_mtime_ns
    except FileNotFoundError:
        written = 0
    return record.get('pid', 0), record.get('step', 0), written


def wait_for(moment, target, folder, process, before, rng):
    """Return when the moment to kill has come; False when the run ended before.

    moment: 'start' target seconds after the launch, 'resume' after the first step (nothing is saved yet), 'step' within
    step target, 'save' while a checkpoint is written after step target. before: progress() as the last launch left it.
    """
    end = time.time() + (target if moment == 'start' else LIMIT_SECONDS)
    target = 1 if moment == 'resume' else target
    while process.poll() is None and time.time() < end:
        pid, step, written = progress(folder)
        if moment != 'start' and pid != before[0] and step >= target:
            if moment in ('step', 'resume'):
                time.sleep(rng.uniform(0, 0.01))            # anywhere in a step, or in the pruning that follows
                return True
            if written not in (0, before[2]):
                return True
        time.sleep(0.0005 if moment == 'save' else 0.002)
    return process.poll() is None and moment == 'start'


def phase_of(step):
    return ('prelude', 'main', 'main', 'fine_tuning', 'end')[step // 150]


def differences(unbroken, broken):
    """Compare two run folders: every entry of ckpt.pt but MAY_DIFFER, best.pt's weights, train_loss.csv."""
    import runs
    problems = []
    for name in ('ckpt.pt', 'best.pt'):
        a, b = (runs.load_checkpoint(os.path.join(folder, name)) for folder in (unbroken, broken))
        problems += [f'{name}: {key} differs' for key in sorted(a.keys() | b.keys() - MAY_DIFFER)
                     if key not in MAY_DIFFER and not (key in a and key in b and same(a[key], b[key]))]
    rows = []
    for folder in (unbroken, broken):
        with open(os.path.join(folder, 'train_loss.csv'), encoding='utf-8') as f:
            rows.append([line.removesuffix('\n').rpartition(',')[0] for line in f])     # the last is the time
    steps = [int(row.split(',')[2]) for row in rows[1][1:]]
    if steps != list(range(1, N_STEPS + 1)):
        problems.append(f'train_loss.csv has {len(steps)} steps, {len(set(steps))} different, expected 1 to {N_STEPS}')
    elif rows[0] != rows[1]:
        first = next(i for i, (a, b) in enumerate(zip(*rows)) if a != b)
        problems.append(f'train_loss.csv: first different row {first}: {rows[0][first]} and {rows[1][first]}')
    return problems


def finish(folder, data_dir, n_ranks, *flags):
    """Run to the end; RuntimeError with the last lines of its output if that fails."""
    process = launch(folder, data_dir, n_ranks, *flags)
    try:
        code = process.wait(LIMIT_SECONDS)
    finally:
        kill_all(folder, process)
    if code:
        raise RuntimeError(f'{folder} ended with {code}: {tail_of(folder)}')


def tail_of(folder):
    with open(f'{folder}.out', encoding='utf-8', errors='replace') as f:
        return f.read()[-2000:]


def kill_test(work, n_kills, n_ranks, seed, *flags):
    """Return the list of differences between a run killed n_kills times and an unbroken one; prints as it goes."""
    import runs
    rng, data_dir = random.Random(seed), os.path.join(work, 'data')
    write_dataset(data_dir, sizes=(40_000, 2000, 777))      # 157 batches of 8 x 32
    unbroken, broken = os.path.join(work, 'unbroken'), os.path.join(work, 'broken')
    finish(unbroken, data_dir, n_ranks, '--checkpoint_time=0', *flags)
    for i in range(n_kills):
        target = int((i + rng.random()) / n_kills * (N_STEPS - 10))
        moment = MOMENTS[i % len(MOMENTS)]
        before = progress(broken)
        process = launch(broken, data_dir, n_ranks, '--checkpoint_time=0.1', '--init_from=resume', *flags)
        try:
            alive = wait_for(moment, rng.uniform(0, 2 * n_ranks) if moment == 'start' else target, broken, process,
                             before, rng)
            if alive and moment != 'start':
                os.kill(progress(broken)[0], signal.SIGKILL)        # rank 0 at once: a save lasts milliseconds
        finally:
            kill_all(broken, process)
        if not alive:
            return [f'launch {i + 1} of {n_kills} ended before it was killed, see its output: ' + tail_of(broken)]
        path = os.path.join(broken, 'ckpt.pt')
        saved = runs.load_checkpoint(path)['step'] if os.path.exists(path) else 0
        _, step, written = progress(broken)
        half = ', in the middle of saving' if written not in (0, before[2]) else ''
        print(f'kill {i + 1:2} ({moment}): last logged step {step} ({phase_of(step)}), checkpoint of step'
              f' {saved} ({phase_of(saved)}){half}', flush=True)
    finish(broken, data_dir, n_ranks, '--checkpoint_time=0.1', '--init_from=resume', *flags)
    problems = differences(unbroken, broken)
    pruned = runs.read_run(broken)['n_prunings']
    return problems + ([] if pruned == 2 else [f'{pruned} prunings, expected 2'])


def main(argv=None):
    configure(globals(), argv)
    started = time.time()
    with tempfile.TemporaryDirectory() as work:
        problems = kill_test(work, kills, ranks, seed, *train_flags.split())
    print(*problems, sep='\n', end='\n' if problems else '')
    verdict = 'DIFFERENT' if problems else 'tensors and loss log identical to the unbroken run'
    print(f'{kills} kills, ranks={ranks} {train_flags}: {time.time() - started:.0f} s, {verdict}')
    return int(bool(problems))


if __name__ == '__main__':
    run(main)
