"""Kill a training with SIGKILL at random moments, resume it each time, and compare it with the unbroken run to the bit.

    python tests/kill_test.py [--kills=20] [--ranks=1] [--train_flags=--shard=full]
    python tests/kill_test.py --signal=int [--script=train]     Ctrl-C instead: train, distill, probe, online (--state)

600 steps: prelude, main with pmmp and two prunings, fine-tuning, a checkpoint every 0.1 s. One line per kill, then
what differs, if anything does: exit code 1. Linux: processes are found in /proc. No GPU, one thread per rank.

A Ctrl-C goes to the process that a terminal would send it to, torchrun's own where there are ranks. Each must end the
launch with exit status 85, run.json as paused and log.txt with the line that says how to go on.
"""
import glob
import os
import random
import signal as signals
import subprocess
import sys
import tempfile
import time

from conftest import ROOT, TINY, make_text, same, write_dataset

from configurator import configure, one_of
from training.checkpoint import load_checkpoint
from training.folder import read_run
from training.process import PAUSED

# -----------------------------------------------------------------------------
kills = 20
ranks = 1
seed = 0                        # of the moments
train_flags = ''                # more flags for the script, such as --shard=full
signal = 'kill'                 # 'kill' (SIGKILL, train.py alone) or 'int' (Ctrl-C)
script = 'train'                # with --signal=int: 'train', 'distill', 'probe', 'online'
# -----------------------------------------------------------------------------


def rules(k):
    """Check the knobs above."""
    return [one_of('signal', k.signal, ('kill', 'int')),
            one_of('script', k.script, ('train', 'distill', 'probe', 'online')),
            (k.signal == 'int' or k.script == 'train', f'script = {k.script!r} takes --signal=int')]


config = configure(globals(), rules=rules)

FLAGS = (*TINY, '--dataset=toy', '--procedure=pmmp', '--alpha=1e-3', '--initial_u_value=0.1', '--epochs_prelude=1',
         '--stop_epoch_at_batch_prelude=150', '--epochs=2', '--stop_epoch_at_batch=150', '--epochs_fine_tuning=1',
         '--stop_epoch_at_batch_fine_tuning=150', '--do_pruning', '--first_pruning_after=1', '--eval_interval=40',
         '--tolerated_relative_loss_increase=0.05', '--final_train_blocks=8', '--log_interval=1')
N_STEPS = 600
SHORT = ('--device=cpu', '--dtype=float32', '--dataset=toy', '--max_iters=200', '--batch_size=8', '--log_interval=1')
ONLINE = ('--online_n_layer=1', '--online_n_embd=32', '--online_n_head=2', '--online_window=32', '--online_streams=4',
          '--online_block=32', '--online_updates=2', '--online_rows=2', '--no-verify', '--no-progress')
COMPRESS = ('import runpy; from codec import online; online.SEGMENT_SYMBOLS = 1000; '
            f"runpy.run_path({os.path.join(ROOT, 'compress.py')!r}, run_name='__main__')")
LIMIT_SECONDS = 1700            # of one launch
MOMENTS = ('step', 'save', 'resume', 'start')
# init_from, what was resumed, times, the working tree
MAY_DIFFER = {'config', 'parent', 'train_seconds', 'step_seconds', 'commit'}


def launch(folder, data_dir, n_ranks, *flags, program='train.py'):
    """Start a run in a session of its own; its output goes to FOLDER.out."""
    torchrun = ('-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n_ranks}') if n_ranks > 1 else ()
    first = FLAGS if program == 'train.py' else ()
    command = [*torchrun, os.path.join(ROOT, program), *first, *flags, f'--data_dir={data_dir}', f'--out_dir={folder}']
    return start(command, folder)


def start(command, folder):
    """Start Python with a command; its output goes to FOLDER.out."""
    with open(f'{folder}.out', 'ab') as out:
        return subprocess.Popen([sys.executable, *command], stdout=out, stderr=out, start_new_session=True,
                                env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=ROOT), preexec_fn=hear_interrupts)


def hear_interrupts():
    """Undo what a shell does to the jobs that it starts in the background: SIGINT ignored."""
    signals.signal(signals.SIGINT, signals.SIG_DFL)


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
    process.wait(LIMIT_SECONDS)
    end = time.monotonic() + LIMIT_SECONDS
    while pids := processes_of(folder):
        if time.monotonic() > end:
            raise RuntimeError(f'processes {pids} do not die')
        for pid in pids:
            try:
                os.kill(pid, signals.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.005)


def progress(folder):
    """Return (process id, last logged step, time of ckpt.pt.tmp) of a run; 0 for what is not there."""
    record, half = read_run(folder), os.path.join(folder, 'ckpt.pt.tmp')
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
    end = time.monotonic() + (target if moment == 'start' else LIMIT_SECONDS)
    target = 1 if moment == 'resume' else target
    while process.poll() is None and time.monotonic() < end:
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


def differences(unbroken, broken, n_steps=N_STEPS, names=('ckpt.pt', 'best.pt')):
    """Compare two run folders: every entry of ckpt.pt but MAY_DIFFER, best.pt's weights, train_loss.csv."""
    problems = []
    for name in names:
        a, b = (load_checkpoint(os.path.join(folder, name)) for folder in (unbroken, broken))
        problems += [f'{name}: {key} differs' for key in sorted(a.keys() | b.keys() - MAY_DIFFER)
                     if key not in MAY_DIFFER and not (key in a and key in b and same(a[key], b[key]))]
    rows = []
    for folder in (unbroken, broken):
        with open(os.path.join(folder, 'train_loss.csv'), encoding='utf-8') as f:
            rows.append([line.removesuffix('\n').rpartition(',')[0] for line in f])     # the last is the time
    steps = [int(row.split(',')[2]) for row in rows[1][1:]]
    if steps != list(range(1, n_steps + 1)):
        problems.append(f'train_loss.csv has {len(steps)} steps, {len(set(steps))} different, expected 1 to {n_steps}')
    elif rows[0] != rows[1]:
        first = next(i for i, (a, b) in enumerate(zip(*rows)) if a != b)
        problems.append(f'train_loss.csv: first different row {first}: {rows[0][first]} and {rows[1][first]}')
    return problems


def finish(folder, data_dir, n_ranks, *flags, program='train.py'):
    """Run to the end; RuntimeError with the last lines of its output if that fails."""
    process = launch(folder, data_dir, n_ranks, *flags, program=program)
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
                os.kill(progress(broken)[0], signals.SIGKILL)        # rank 0 at once: a save lasts milliseconds
        finally:
            kill_all(broken, process)
        if not alive:
            return [f'launch {i + 1} of {n_kills} ended before it was killed, see its output: ' + tail_of(broken)]
        path = os.path.join(broken, 'ckpt.pt')
        saved = load_checkpoint(path)['step'] if os.path.exists(path) else 0
        _, step, written = progress(broken)
        half = ', in the middle of saving' if written not in (0, before[2]) else ''
        print(f'kill {i + 1:2} ({moment}): last logged step {step} ({phase_of(step)}), checkpoint of step'
              f' {saved} ({phase_of(saved)}){half}', flush=True)
    finish(broken, data_dir, n_ranks, '--checkpoint_time=0.1', '--init_from=resume', *flags)
    problems = differences(unbroken, broken)
    pruned = read_run(broken)['n_prunings']
    return problems + ([] if pruned == 2 else [f'{pruned} prunings, expected 2'])


# --- Ctrl-C ---

class Interrupted:
    """A script to interrupt: its flags, the folders that its runs write, and how many steps it has in all."""

    def __init__(self, work, name, data_dir):
        self.program = 'lab/probe.py' if name == 'probe' else f'{name}.py'
        self.parts = ('',)                                  # run folders below out_dir
        self.names = ('ckpt.pt', 'best.pt')                 # checkpoints to compare
        self.n_steps = N_STEPS                              # of each part
        self.flags = ()
        if name == 'train':
            return
        teacher = os.path.join(work, 'teacher')
        finish(teacher, data_dir, 1, '--epochs_prelude=0', '--epochs_fine_tuning=0', '--stop_epoch_at_batch=8',
               '--no-do_pruning', '--epochs=1')
        self.n_steps = 200
        self.flags = (*SHORT, f'--teacher={teacher}', '--n_layer=1', '--n_embd=32', '--n_head=2', '--block_size=32',
                      '--eval_interval=40')
        if name == 'probe':
            self.parts = ('teacher', 'teacher-untrained')
            self.names = ('ckpt.pt',)
            self.flags = (*SHORT, f'--from_ckpt={teacher}', '--untrained')

    def step(self, folder):
        """Return the last logged step of a run, over all its parts."""
        records = [read_run(os.path.join(folder, part)) for part in self.parts]
        return sum(self.n_steps if r.get('status') == 'done' else r.get('step', 0) for r in records)

    def differences(self, unbroken, broken):
        return [f'{part}: {line}' for part in self.parts for line in differences(
            os.path.join(unbroken, part), os.path.join(broken, part), self.n_steps, self.names)]


def interrupt(process, folder):
    """Press Ctrl-C once, wait for all processes to end, and return the exit status."""
    process.send_signal(signals.SIGINT)
    try:
        return process.wait(LIMIT_SECONDS)
    finally:
        kill_all(folder, process)


def wrong_ending(folder, parts, code, n_ranks):
    """Return what a run that Ctrl-C ended has not done as it should, '' if nothing."""
    record = read_run(folder)
    if n_ranks == 1 and code != PAUSED:
        return f'exit status {code}, expected {PAUSED}'
    if record.get('status') != 'paused' or '--init_from=resume' not in record.get('paused', ''):
        return f'run.json has status {record.get("status")!r} and {record.get("paused")!r}'
    lines = []
    for part in parts:
        path = os.path.join(folder, part, 'log.txt')
        if os.path.exists(path):
            with open(path, encoding='utf-8') as f:
                lines += f.readlines()[-1:]
    said = any(' paused ' in line and '--init_from=resume' in line for line in lines)
    return '' if said else f'no log.txt ends with a line that says how to go on: {lines}'


def interrupt_test(work, name, n_interrupts, n_ranks, seed, *flags):
    """Return the list of differences between a run that Ctrl-C stopped n_interrupts times and an unbroken one."""
    rng = random.Random(seed)
    data_dir = os.path.join(work, 'data')
    write_dataset(data_dir, sizes=(40_000, 2000, 777))
    job = Interrupted(work, name, data_dir)
    unbroken = os.path.join(work, 'unbroken')
    broken = os.path.join(work, 'broken')
    flags = (*job.flags, *flags)
    finish(unbroken, data_dir, n_ranks, *flags, program=job.program)
    n_steps = job.n_steps * len(job.parts)
    for i in range(n_interrupts):
        target = 1 + int((i + rng.random()) / n_interrupts * (n_steps - 60))
        before = progress(broken)[0]
        process = launch(broken, data_dir, n_ranks, '--init_from=resume', *flags, program=job.program)
        try:
            while process.poll() is None and (progress(broken)[0] == before or job.step(broken) < target):
                time.sleep(0.002)
            if process.poll() is not None:
                return [f'launch {i + 1} of {n_interrupts} ended before its Ctrl-C: {tail_of(broken)}']
            code = interrupt(process, broken)
        finally:
            kill_all(broken, process)
        if wrong := wrong_ending(broken, job.parts, code, n_ranks):
            return [f'Ctrl-C {i + 1} after step {target}: {wrong}; {tail_of(broken)}']
        print(f'Ctrl-C {i + 1:2} after step {target}: paused at step {job.step(broken)}', flush=True)
    finish(broken, data_dir, n_ranks, '--init_from=resume', *flags, program=job.program)
    return job.differences(unbroken, broken)


def interrupt_coding(command, state, folder, rng):
    """Start an online command and press Ctrl-C after 1 to 4 segments; return its exit status."""
    process = start(['-c', COMPRESS, *command, f'--state={state}'], folder)
    seen = os.stat(state).st_mtime_ns if os.path.exists(state) else 0
    left = rng.randint(1, 4)
    while process.poll() is None and left:
        now = os.stat(state).st_mtime_ns if os.path.exists(state) else seen
        left -= now != seen
        seen = now
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05))                        # anywhere in a segment
    if process.poll() is None:
        process.send_signal(signals.SIGINT)
    return process.wait(LIMIT_SECONDS)


def online_test(work, n_interrupts, seed):
    """Return what is wrong after Ctrl-C has stopped coding, then decoding, with --state n_interrupts times each.

    A launch is stopped within 6 segments of 1,000 bytes, so that there are some left when all have been.
    """
    rng = random.Random(seed)
    names = {name: os.path.join(work, name) for name in ('text', 'whole', 'broken', 'decoded', 'state')}
    with open(names['text'], 'wb') as f:
        f.write(make_text(6000 * n_interrupts + 4000))
    code = start(['-c', COMPRESS, 'online', names['text'], names['whole'], *ONLINE], names['whole']).wait(LIMIT_SECONDS)
    if code:
        return [f'coding failed: {tail_of(names["whole"])}']
    code_it = ['online', names['text'], names['broken'], *ONLINE]
    decode_it = ['unpack', names['broken'], names['decoded'], '--no-progress']
    for command, result, expected in ((code_it, 'broken', 'whole'), (decode_it, 'decoded', 'text')):
        for i in range(n_interrupts):
            code = interrupt_coding(command, names['state'], names[result], rng)
            print(f'{command[0]}: exit status {code}', flush=True)
            if code != PAUSED:
                return [f'{command[0]}: Ctrl-C {i + 1} ended it with {code}: {tail_of(names[result])}']
        last = start(['-c', COMPRESS, *command, f'--state={names["state"]}'], names[result])
        code = last.wait(LIMIT_SECONDS)
        if code:
            return [f'{command[0]} ended with {code}: {tail_of(names[result])}']
        with open(names[result], 'rb') as a, open(names[expected], 'rb') as b:
            if a.read() != b.read():
                return [f'{command[0]}: {result} is not {expected}']
    return []


if __name__ == '__main__':
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        if signal == 'kill':
            problems = kill_test(work, kills, ranks, seed, *train_flags.split())
        elif script == 'online':
            problems = online_test(work, kills, seed)
        else:
            problems = interrupt_test(work, script, kills, ranks, seed, *train_flags.split())
    for problem in problems:
        print(problem)
    verdict = 'DIFFERENT' if problems else 'identical to the unbroken run, to the bit'
    what = 'kills' if signal == 'kill' else f'Ctrl-C of {script}'
    print(f'{kills} {what}, ranks={ranks} {train_flags}: {time.monotonic() - started:.0f} s, {verdict}')
    sys.exit(bool(problems))
