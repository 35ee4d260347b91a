"""What every test shares: thread settings made before torch loads, a small structured data set, ways to run scripts.

No test needs a network, a GPU or a file that it did not make. Sizes are tiny: a training step takes a few milliseconds.
"""
import os
import random
import runpy
import signal
import subprocess
import sys

os.environ.setdefault('GOMP_SPINCOUNT', '1000')         # idle OpenMP threads sleep; see configurator.run
os.environ['OMP_NUM_THREADS'] = '1'
os.environ['HF_HUB_OFFLINE'] = '1'                     # what is no path is a hub id: no test asks the network
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import pytest  # noqa: E402
import torch  # noqa: E402

from corpus import bins  # noqa: E402

torch.set_num_threads(1)

TINY = ('--n_layer=2', '--n_embd=32', '--n_head=2', '--block_size=32', '--batch_size=8', '--learning_rate=3e-3',
        '--device=cpu',
        '--dtype=float32')
WORDS = b'the model weighs nothing until a byte of its text has been paid for in bits and every zero is free'.split()


def make_text(n_bytes, seed=0):
    """Random sentences of few words: structured enough to learn, and no two blocks alike."""
    rng, parts, size = random.Random(seed), [], 0
    while size < n_bytes:
        sentence = b' '.join(rng.choice(WORDS) for _ in range(rng.randint(3, 9)))
        sentence += rng.choice((b'.\n', b', ', b' %d; ' % rng.randint(0, 99)))
        parts.append(sentence)
        size += len(sentence)
    return b''.join(parts)[:n_bytes]


def write_dataset(data_dir, name='toy', sizes=(4096, 2000, 777), dtype='uint8', vocab_size=256,
                  splits=('train', 'val', 'test')):
    """Write data_dir/name with the real writer; returns {split: bytes}. 4,096 bytes are 16 batches of 8 x 32."""
    folder, texts, entries = os.path.join(data_dir, name), {}, {}
    for i, (split, size) in enumerate(zip(splits, sizes)):
        writer, texts[split] = bins.BinWriter(folder, split, dtype), make_text(size, seed=i)
        writer.write(texts[split] if dtype == 'uint8' else list(texts[split]), text_bytes=size)
        entries[split] = writer.commit()
    bins.write_meta(folder, 'prepare_text.py', [f'--name={name}', '--source=some text'], entries, dict(kind='test'),
                    dtype=dtype,
                    vocab_size=vocab_size)
    return texts


def run_script(*argv, timeout=60, cwd=None, **environ):
    """Run python with argv as a subprocess on one thread; returns CompletedProcess with text output."""
    env = dict(os.environ, OMP_NUM_THREADS='1', GOMP_SPINCOUNT='1000', PYTHONPATH=ROOT, **environ)
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, timeout=timeout,
                          cwd=cwd or ROOT, env=env)


def run_here(script, *argv):
    """Run a script in this process as `python SCRIPT argv...` would; returns its exit status. UserErrors come through.

    script: a path below the repository, 'train.py' or 'lab/probe.py'.
    """
    argv_before = sys.argv
    hook_before = sys.excepthook
    sys.argv = [script, *map(str, argv)]
    try:
        runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
    except SystemExit as e:
        return 0 if e.code is None else e.code
    finally:
        sys.argv = argv_before
        sys.excepthook = hook_before
    return 0


def peak_memory(script, *argv):
    """Run a script in a process of its own; returns the most anonymous memory that it had, in megabytes."""
    code = ('import runpy, sys, threading, time; peak = 0\n'
            'def anon(): return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0])\n'
            'def watch():\n    global peak\n    while True: peak = max(peak, anon()); time.sleep(0.005)\n'
            'threading.Thread(target=watch, daemon=True).start()\n'
            'sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name="__main__"); print(max(peak, anon()))')
    done = run_script('-c', code, os.path.join(ROOT, script), *argv, timeout=1800, cwd=os.getcwd())
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) / 1e3


def torchrun(n_ranks, script, *argv, timeout=90):
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
    """What scripts use of runs.Env, for any rank of any world, without a process group."""

    kind, torch, dtype, device, distributed = 'cpu', torch, 'float32', torch.device('cpu'), False

    def __init__(self, rank=0, world=1):
        self.rank, self.world, self.main = rank, world, rank == 0

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
    """train.main installs handlers for signals and a timer, and opens a run folder; give pytest its own back."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)
    if 'runs' in sys.modules:               # what a process does at its exit
        sys.modules['runs'].close_run_folders()


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    """A data folder with the data set 'toy'; tests only read it."""
    folder = tmp_path_factory.mktemp('data')
    write_dataset(str(folder))
    return str(folder)


@pytest.fixture
def train_tiny(toy, tmp_path):
    """Call train.main in this process with tiny sizes; returns its exit status. Later flags win."""
    import train

    def call(*flags, out='run', data_dir=toy):
        return train.main([*TINY, f'--data_dir={data_dir}', '--dataset=toy', f'--out_dir={tmp_path / out}', *flags])
    return call
