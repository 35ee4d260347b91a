"""Memory that a process on a CPU keeps."""
import ctypes

import pytest
from conftest import run_script

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
