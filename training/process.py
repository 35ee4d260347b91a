"""The process of a run: its rank, device and precision, what asks it to stop, and the machine it runs on."""
import ctypes
import os
import platform
import re
import signal
import sys
from contextlib import nullcontext

from configurator import UserError, one_of, require, say_in_one_line

LOST = re.compile(r'closed by peer|Connection reset|Connection refused|Broken pipe|NCCL|gloo', re.I)
PAUSED = 85                     # exit status of a run that saved itself and wants to be continued


def keep_freed_memory():
    """Let glibc's malloc keep what is freed, up to blocks of 1 GiB; elsewhere do nothing.

    By default it returns large blocks to the kernel, which clears each page again when the next step asks for them.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt:
        mallopt(-3, 1 << 30), mallopt(-1, 2 ** 31 - 1)                  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


class Env:
    """Rank, world size, device and precision of this process; `main` is rank 0, which alone prints and writes."""

    def __init__(self, device='auto', dtype='auto'):
        import torch
        import torch.distributed as dist

        self.torch, self.dist = torch, dist
        require(one_of('device', device, ('auto', 'cuda', 'mps', 'cpu')),
                one_of('dtype', dtype, ('auto', 'bfloat16', 'float16', 'float32')))
        available = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
        self.kind = next(k for k in available if available[k]) if device == 'auto' else device
        if not available[self.kind]:
            raise UserError(f'device = {device!r} is not available here; use --device=auto or --device=cpu')
        self.rank, self.world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        self.local_rank = int(os.environ.get('LOCAL_RANK', 0))
        self.main = self.rank == 0
        if self.kind == 'cuda':
            torch.cuda.set_device(self.local_rank)
        if self.kind == 'cpu':
            keep_freed_memory()
        self.device = torch.device(self.kind, self.local_rank) if self.kind == 'cuda' else torch.device(self.kind)
        self.distributed = 'RANK' in os.environ
        missing = [v for v in ('WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if v not in os.environ]
        require((not self.distributed or not missing, f'RANK is set but not {", ".join(missing)}; start with torchrun'),
                (self.distributed or int(os.environ.get('SLURM_NTASKS', 1)) == 1 or 'SLURM_STEP_ID' not in os.environ,
                 'srun started several copies that do not know of each other; use sbatch slurm/train.sbatch'))
        if self.distributed and not dist.is_initialized():
            if sys.platform == 'linux':                     # a killed torchrun leaves its ranks: PR_SET_PDEATHSIG
                ctypes.CDLL(None).prctl(1, signal.SIGTERM)
            dist.init_process_group('nccl' if self.kind == 'cuda' else 'gloo')
            sys.excepthook = self._lost_contact
        if dtype == 'auto':
            dtype = 'float32' if self.kind != 'cuda' else 'bfloat16' if torch.cuda.is_bf16_supported() else 'float16'
        self.dtype = dtype

    def _lost_contact(self, kind, error, trace):
        """A collective that fails because another rank has gone is one line, not a traceback of its transport."""
        if not (issubclass(kind, RuntimeError) and LOST.search(str(error))):
            return say_in_one_line(kind, error, trace)
        print(f'error: rank {self.rank} of {self.world} lost contact with another rank, which has died or been killed'
              f' (see its own message); continue with --init_from=resume [{str(error).splitlines()[0][:100]}]',
              file=sys.stderr)

    def autocast(self):
        if self.dtype == 'float32':
            return nullcontext()
        return self.torch.autocast(self.kind, getattr(self.torch, self.dtype))

    def put(self, array):
        """Copy a numpy array to the device; asynchronous on CUDA."""
        tensor = self.torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.kind == 'cuda' else tensor.to(self.device)

    def sum(self, tensor):
        """Sum a tensor over ranks (float64 on every device that has it)."""
        if self.distributed and self.world > 1:
            tensor = tensor.to(self.device)
            self.dist.all_reduce(tensor)
        return tensor

    def barrier(self):
        if self.distributed:
            self.dist.barrier()

    def close(self):
        if self.distributed and self.dist.is_initialized():
            self.dist.destroy_process_group()


class StopSignals:
    """Remember SIGTERM, SIGUSR1 and the end of max_runtime (seconds from now; 0 = none) for the next step boundary."""

    def __init__(self, max_runtime=0.0):
        self.received, self.ending = '', None               # ending: the run to leave at once instead
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM):
            signal.signal(number, self._remember)
        signal.setitimer(signal.ITIMER_REAL, max(max_runtime, 1e-6) if max_runtime else 0)

    def _remember(self, number, frame):
        self.received = 'max_runtime' if number == signal.SIGALRM else number
        if self.ending:
            self.leave(self.ending)

    def leave(self, record):
        """Leave a run, its RunRecord marked as paused."""
        record.update(status='paused')
        os._exit(PAUSED)

    def leave_at_once(self, record):
        """From now on leave the run when one comes, and now if one came already."""
        self.ending = record
        if self.received:
            self.leave(record)

    def close(self):
        """Nothing is left that a signal could cut short."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.ending = None


def hardware(env):
    """The machine in words: GPU name, or CPU model and thread count."""
    if env.kind == 'cuda':
        return f'{env.world} x {env.torch.cuda.get_device_name()}'
    return f'{cpu_name()}, {env.torch.get_num_threads()} threads'


def cpu_name():
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            return next(line.split(':')[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def rss_anon_bytes():
    """Anonymous resident memory of this process in bytes (pages of a memory map do not count); -1 if unknown."""
    try:
        with open('/proc/self/status', encoding='utf-8') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith('RssAnon'))
    except (OSError, StopIteration):
        return -1
