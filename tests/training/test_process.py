"""training/process.py: processes that can meet, signals that stop a run, memory that is kept and counted."""
import ctypes
import os
import signal

import numpy as np
import pytest
from conftest import run_script

from configurator import UserError
from training.process import Env, StopSignals, rss_anon_bytes


@pytest.mark.parametrize('environ, words', [
    (dict(RANK='0', WORLD_SIZE='2', MASTER_PORT='1'), 'RANK is set but not MASTER_ADDR; start with torchrun'),
    (dict(SLURM_NTASKS='2', SLURM_STEP_ID='0', SLURM_PROCID='0'), 'sbatch slurm/train.sbatch')])
def test_processes_that_cannot_meet_are_told_so(environ, words, monkeypatch):
    """srun python train.py starts N runs that overwrite each other; env:// without an address is a traceback."""
    for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        Env('cpu')


# --- what asks a run to stop ---

@pytest.mark.parametrize('number, name', [(signal.SIGTERM, 'SIGTERM'), (signal.SIGUSR1, 'SIGUSR1'),
                                          (signal.SIGALRM, 'max_runtime'), (signal.SIGINT, 'SIGINT')])
def test_the_first_signal_gives_the_reason(number, name):
    """A later one, such as the SIGTERM that torchrun sends after a SIGINT, does not change it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals = StopSignals()
    assert not signals.asked(0)
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.asked(1) and signals.received == name
    signals.close()


def test_max_runtime_sets_the_timer_and_an_end_clears_it(monkeypatch):
    """0 is no limit, not one of no seconds."""
    timers = []
    monkeypatch.setattr(signal, 'setitimer', lambda which, seconds: timers.append((which, seconds)))
    for max_runtime in (0.0, 3600.0, 1e-9):
        StopSignals(max_runtime).close()
    seconds = [0, 0, 3600.0, 0, 1e-6, 0]
    assert timers == [(signal.ITIMER_REAL, s) for s in seconds]


def test_a_stop_at_a_step_is_for_that_step_alone(monkeypatch):
    """A run that goes on behind it is not stopped again."""
    monkeypatch.setenv('NANOMDL_STOP_AT_STEP', '12')
    assert not StopSignals().asked(12)
    signals = StopSignals()
    assert [signals.asked(step) for step in (0, 10, 11)] == [False, False, True]
    assert signals.received == 'NANOMDL_STOP_AT_STEP'


def test_leave_at_once_is_called_for_what_came_before_it():
    """A signal in the last step must not be lost to the final scoring."""
    left = []
    signals = StopSignals()
    os.kill(os.getpid(), signal.SIGUSR1)
    signals.leave_at_once(lambda: left.append(signals.received))
    assert left == ['SIGUSR1']
    os.kill(os.getpid(), signal.SIGTERM)
    assert left == ['SIGUSR1', 'SIGUSR1']
    signals.leave_at_once(None)
    os.kill(os.getpid(), signal.SIGTERM)
    assert len(left) == 2


# --- memory ---

def test_anonymous_memory_does_not_count_mapped_files(tmp_path):
    """Memory numbers are RssAnon: pages of a memory map are the file's, not ours."""
    with open(tmp_path / 'big.bin', 'wb') as f:
        f.truncate(64 << 20)
    before = rss_anon_bytes()
    mapped = np.memmap(tmp_path / 'big.bin', np.uint8, 'r')
    assert int(mapped.max()) == 0                               # touches every page
    assert before > 1 << 20 and rss_anon_bytes() - before < 16 << 20


KEPT = """
import sys, torch
from training.process import Env, rss_anon_bytes
if sys.argv[1] == 'kept':
    Env('cpu', 'float32')
before = rss_anon_bytes()
x = torch.ones(1 << 24)
del x
print(rss_anon_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'mallopt'), reason='glibc has mallopt')
def test_freed_memory_is_kept_for_the_next_step(tmp_path):
    """64 MiB given back to the kernel are cleared page by page when they are asked for again, in every step."""
    (tmp_path / 'kept.py').write_text(KEPT)
    kept, returned = (int(run_script(tmp_path / 'kept.py', name).stdout) for name in ('kept', 'returned'))
    assert kept > 60 << 20 > 8 << 20 > returned
