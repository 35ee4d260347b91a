"""What every test shares: thread settings made before torch loads, a small structured data set, ways to run scripts.

No test needs a network, a GPU or a file that it did not make. Sizes are tiny: a training step takes a few milliseconds.
"""
import ast
import csv
import os
import random
import runpy
import signal
import subprocess
import sys
import types

os.environ.setdefault('GOMP_SPINCOUNT', '1000')         # idle OpenMP threads sleep; see configurator.run
os.environ['OMP_NUM_THREADS'] = '1'
os.environ['HF_HUB_OFFLINE'] = '1'                     # what is no path is a hub id: no test asks the network
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import pytest  # noqa: E402
import torch  # noqa: E402

import configurator  # noqa: E402
from corpus import bins  # noqa: E402
from training import curves, plan  # noqa: E402
from training import folder as folders  # noqa: E402
from training.checkpoint import load_checkpoint  # noqa: E402

torch.set_num_threads(1)

TINY = ('--n_layer=2', '--n_embd=32', '--n_head=2', '--block_size=32', '--batch_size=8', '--learning_rate=3e-3',
        '--device=cpu', '--dtype=float32')
PATIENCE = 1700                 # seconds that a process may take: more than a ten times slower machine needs
WORDS = b'the model weighs nothing until a byte of its text has been paid for in bits and every zero is free'.split()


def make_text(n_bytes, seed=0):
    """Random sentences of few words: structured enough to learn, and no two blocks alike."""
    rng = random.Random(seed)
    parts = []
    size = 0
    while size < n_bytes:
        sentence = b' '.join(rng.choice(WORDS) for _ in range(rng.randint(3, 9)))
        sentence += rng.choice((b'.\n', b', ', b' %d; ' % rng.randint(0, 99)))
        parts.append(sentence)
        size += len(sentence)
    return b''.join(parts)[:n_bytes]


def write_dataset(data_dir, name='toy', sizes=(4096, 2000, 777), dtype='uint8', vocab_size=256,
                  splits=('train', 'val', 'test')):
    """Write data_dir/name with the real writer; returns {split: bytes}. 4,096 bytes are 16 batches of 8 x 32."""
    folder = os.path.join(data_dir, name)
    texts = {}
    entries = {}
    for i, (split, size) in enumerate(zip(splits, sizes)):
        writer = bins.BinWriter(folder, split, dtype)
        texts[split] = make_text(size, seed=i)
        writer.write(texts[split] if dtype == 'uint8' else list(texts[split]), text_bytes=size)
        entries[split] = writer.commit()
    bins.write_meta(folder, 'prepare_text.py', [f'--name={name}', '--source=some text'], entries, dict(kind='test'),
                    dtype=dtype,
                    vocab_size=vocab_size)
    return texts


def run_script(*argv, timeout=PATIENCE, cwd=None, **environ):
    """Run python with argv as a subprocess on one thread; returns CompletedProcess with text output."""
    path = os.pathsep.join((ROOT, os.path.join(ROOT, 'tests')))         # scripts of tests may import conftest, too
    env = dict(os.environ, OMP_NUM_THREADS='1', GOMP_SPINCOUNT='1000', PYTHONPATH=path) | environ
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, timeout=timeout,
                          cwd=cwd or ROOT, env=env)


def run_here(script, *argv, change=None):
    """Run a script in this process as `python SCRIPT argv...` would; returns its exit status. UserErrors come through.

    script: a path below the repository, 'train.py' or 'lab/probe.py'. change(names): called with the script's names
    when all is defined and before the run below `if __name__ == '__main__':` begins, to put a spy in.
    """
    path = os.path.join(ROOT, script)
    argv_before = sys.argv
    hook_before = sys.excepthook
    sys.argv = [script, *map(str, argv)]
    try:
        if change:
            run_changed(path, change)
        else:
            runpy.run_path(path, run_name='__main__')
    except SystemExit as e:
        return 0 if e.code is None else e.code
    finally:
        sys.argv = argv_before
        sys.excepthook = hook_before
    return 0


def run_changed(path, change):
    """Execute the definitions of a script, call change with its names, then execute what its __main__ block holds."""
    with open(path, encoding='utf-8') as f:
        tree = ast.parse(f.read())
    *definitions, last = tree.body
    assert ast.unparse(last).startswith("if __name__ == '__main__':"), path
    names = dict(__name__='__main__', __file__=path, __doc__=ast.get_docstring(tree))
    exec(compile(ast.Module(definitions, []), path, 'exec'), names)
    change(names)
    exec(compile(ast.Module([last], []), path, 'exec'), names)


def peak_memory(script, *argv):
    """Run a script in a process of its own; returns the most anonymous memory that it had, in megabytes."""
    code = ('import runpy, sys, threading, time; peak = 0\n'
            'def anon(): return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0])\n'
            'def watch():\n    global peak\n    while True: peak = max(peak, anon()); time.sleep(0.005)\n'
            'threading.Thread(target=watch, daemon=True).start()\n'
            'sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name="__main__"); print(max(peak, anon()))')
    done = run_script('-c', code, os.path.join(ROOT, script), *argv, cwd=os.getcwd())
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) / 1e3


def torchrun(n_ranks, script, *argv, timeout=PATIENCE):
    """Run a script under torchrun with gloo on this machine."""
    return run_script('-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n_ranks}', script, *argv,
                      timeout=timeout)


def snapshot(folder):
    """Return {path: content} of everything below a folder, to show that nothing was overwritten."""
    found = {}
    for where, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(where, name), 'rb') as f:
                found[os.path.relpath(os.path.join(where, name), folder)] = f.read()
    return found


def same(a, b):
    """Compare nested dicts, lists and tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


class OneProcess:
    """What scripts use of process.Env, for any rank of any world, without a process group."""

    kind = 'cpu'
    torch = torch
    dtype = 'float32'
    device = torch.device('cpu')
    distributed = False

    def __init__(self, rank=0, world=1):
        self.rank = rank
        self.world = world
        self.main = rank == 0

    def autocast(self):
        return torch.autocast('cpu', enabled=False)

    def put(self, array):
        return torch.from_numpy(array)

    def sum(self, tensor):
        return tensor

    def barrier(self):
        pass

    close = barrier


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """A trainer installs handlers for signals and a timer, and opens a run folder; give pytest its own back."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)
    folders.close_run_folders()             # what a process does at its exit


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    """A data folder with the data set 'toy'; tests only read it."""
    folder = tmp_path_factory.mktemp('data')
    write_dataset(str(folder))
    return str(folder)


@pytest.fixture
def train_tiny(toy, tmp_path):
    """Run train.py in this process with tiny sizes; returns its exit status. Later flags win.

    draw: with loss.png, which takes longer than the steps.
    """
    def call(*flags, out='run', data_dir=toy, change=None, draw=False):
        argv = (*TINY, f'--data_dir={data_dir}', '--dataset=toy', f'--out_dir={tmp_path / out}', *flags)
        with pytest.MonkeyPatch.context() as patch:
            if not draw:
                patch.setattr(curves, 'draw_run', lambda out_dir, loss_file: 'not drawn')
            return run_here('train.py', *argv, change=change)
    return call


# --- runs of train.py: what they leave, and how to stop them ---

PRUNED = ('--do_pruning', '--first_pruning_after=1', '--tolerated_relative_loss_increase=0.05')
# 6 steps of prelude, 3 epochs of 4 batches with a pruning after each, 4 steps of fine-tuning
THREE_PHASES = ('--procedure=pmmp', '--alpha=1e-3', '--initial_u_value=0.1', '--epochs_prelude=1',
                '--stop_epoch_at_batch_prelude=6', '--epochs=3', '--stop_epoch_at_batch=4', '--epochs_fine_tuning=1',
                '--stop_epoch_at_batch_fine_tuning=4', *PRUNED)
RESUMED = (*THREE_PHASES, '--online', '--warmup_iters=3', '--schedule=cosine', '--eval_interval=5', '--grad_clip=1',
           '--weight_decay=0.01')
# of a checkpoint, in which a resumed run may differ from an unbroken one
MAY_DIFFER = {'config', 'parent', 'train_seconds', 'step_seconds', 'versions', 'commit'}
RESULTS = ('status', 'mean_test_loss', 'mean_train_loss', 'final_val_loss', 'epsilon', 'non_zero_params', 'tokens_seen',
           'n_prunings', 'tolerance_spent', 'online_description_length_bytes', 'final_train_loss')


def train_knobs(*flags):
    """Return the knobs of train.py as its functions take them, with tiny sizes; later flags win."""
    script = dict(__file__=os.path.join(ROOT, 'train.py'), __doc__='')
    return types.SimpleNamespace(**configurator.configure(script, [*TINY, *flags]))


def losses_of(folder):
    """Return the rows of train_loss.csv as dicts, without the time they took."""
    with open(os.path.join(folder, 'train_loss.csv'), newline='') as f:
        return [{k: v for k, v in row.items() if k != 'seconds'} for row in csv.DictReader(f)]


def seconds_of(folder):
    with open(os.path.join(folder, 'train_loss.csv'), newline='') as f:
        return [float(row['seconds']) for row in csv.DictReader(f)]


def weights_of(folder, name='ckpt.pt'):
    return load_checkpoint(os.path.join(folder, name))['model']


def at_step(monkeypatch, step, act):
    """Call act() while the given step (from 1) of a run of this process is under way; the rate is asked for twice."""
    real = plan.Schedule.rate

    def rate(self, done, peak):
        if done == step - 1:
            act()
        return real(self, done, peak)
    monkeypatch.setattr(plan.Schedule, 'rate', rate)


def stop_at(monkeypatch, step, number=signal.SIGUSR1):
    """Send this process a real signal while the given step (from 1) is under way."""
    at_step(monkeypatch, step, lambda: os.kill(os.getpid(), number))


def assert_same_run(folder, reference):
    """The same tensors in both checkpoints, the same rows in train_loss.csv, the same results."""
    one = load_checkpoint(os.path.join(folder, 'ckpt.pt'))
    two = load_checkpoint(os.path.join(reference, 'ckpt.pt'))
    assert one.keys() == two.keys()
    for key in set(one) - MAY_DIFFER:
        assert same(one[key], two[key]), key
    assert same(weights_of(folder, 'best.pt'), weights_of(reference, 'best.pt'))
    assert losses_of(folder) == losses_of(reference)

    # The last column is the time of the steps, over all resumptions: it only grows, and ends at the counter.
    seconds = seconds_of(folder)
    assert seconds == sorted(seconds) and seconds[-1] == pytest.approx(one['step_seconds'], abs=1e-3)
    assert 0 < seconds[0] < seconds[-1] < one['train_seconds'] + 1e-3
    a = folders.read_run(folder)
    b = folders.read_run(reference)
    for key in RESULTS:
        assert a[key] == b[key], key


def assert_resumes(flags, stop, train_tiny, tmp_path, monkeypatch):
    """A run that is stopped in a step and resumed must end as an unbroken one, which is run once for all its tests."""
    if flags not in unbroken_runs:
        assert train_tiny(*flags, out='whole') == 0
        unbroken_runs[flags] = tmp_path / 'whole'
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        assert train_tiny(*flags) == 85
    assert train_tiny(*flags, '--init_from=resume') == 0
    assert_same_run(tmp_path / 'run', unbroken_runs[flags])


unbroken_runs = {}              # flags: folder
