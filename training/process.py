"""The process of a run: its rank, device and precision, what asks it to stop, and the machine it runs on."""
import ctypes
import os
import platform
import re
import signal
import sys
import threading
from contextlib import nullcontext

from configurator import UserError, one_of, require, say_in_one_line

# What gloo and nccl say when another rank has gone.
LOST = re.compile(r'closed by peer|Connection reset|Connection refused|Broken pipe|NCCL|gloo', re.I)
PAUSED = 85                     # exit status of a run that saved itself and wants to be continued
SAVES = f'the run is saved after its next step, exit status {PAUSED}'
ENDS_NOW = f'all is saved and only scoring is left, so the run ends now, exit status {PAUSED}'


def keep_freed_memory():
    """Let glibc's malloc keep what is freed, up to blocks of 1 GiB; elsewhere do nothing.

    By default it returns large blocks to the kernel, which clears each page again when the next step asks for them.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt:
        mallopt(-3, 1 << 30)                    # M_MMAP_THRESHOLD
        mallopt(-1, 2 ** 31 - 1)                # M_TRIM_THRESHOLD


class Env:
    """Rank, world size, device and precision of this process; `main` is rank 0, which alone prints and writes.

    kind: 'cuda', 'mps' or 'cpu'. distributed: started by torchrun, with a process group.
    """

    def __init__(self, device='auto', dtype='auto'):
        import torch
        import torch.distributed as dist
        self.torch = torch
        self.dist = dist
        self.rank = int(os.environ.get('RANK', 0))
        self.world = int(os.environ.get('WORLD_SIZE', 1))
        self.local_rank = int(os.environ.get('LOCAL_RANK', 0))
        self.main = self.rank == 0
        self.distributed = 'RANK' in os.environ
        self._check(device, dtype)
        self.kind = self._choose_device(device)
        self.device = torch.device(self.kind)
        if self.kind == 'cuda':
            torch.cuda.set_device(self.local_rank)
            self.device = torch.device(self.kind, self.local_rank)
        if self.kind == 'cpu':
            keep_freed_memory()
        self._join()
        self.dtype = dtype
        if dtype == 'auto':
            self.dtype = self._choose_dtype()

    def _check(self, device, dtype):
        """Refuse unknown names, and processes that were started in a way in which they cannot find each other."""
        missing = [name for name in ('WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]
        in_step = 'SLURM_STEP_ID' in os.environ and int(os.environ.get('SLURM_NTASKS', 1)) > 1
        require(one_of('device', device, ('auto', 'cuda', 'mps', 'cpu')),
                one_of('dtype', dtype, ('auto', 'bfloat16', 'float16', 'float32')),
                (not self.distributed or not missing,
                 f'RANK is set but not {", ".join(missing)}; start with torchrun'),
                (self.distributed or not in_step,
                 'srun started several copies that do not know of each other; use sbatch slurm/train.sbatch'))

    def _choose_device(self, device):
        available = dict(cuda=self.torch.cuda.is_available(), mps=self.torch.backends.mps.is_available(), cpu=True)
        if device == 'auto':
            return next(kind for kind, here in available.items() if here)
        if not available[device]:
            raise UserError(f'device = {device!r} is not available here; use --device=auto or --device=cpu')
        return device

    def _choose_dtype(self):
        if self.kind != 'cuda':
            return 'float32'
        if self.torch.cuda.is_bf16_supported():
            return 'bfloat16'
        return 'float16'

    def _join(self):
        """Join the process group that torchrun describes."""
        if not self.distributed or self.dist.is_initialized():
            return
        if sys.platform == 'linux':
            # A torchrun that is killed leaves its ranks behind: ask for a SIGTERM when it dies (PR_SET_PDEATHSIG).
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        backend = 'gloo'
        if self.kind == 'cuda':
            backend = 'nccl'
        self.dist.init_process_group(backend)
        sys.excepthook = self._lost_contact

    def _lost_contact(self, kind, error, trace):
        """A collective that fails because another rank has gone is one line, not a traceback of its transport."""
        if not (issubclass(kind, RuntimeError) and LOST.search(str(error))):
            say_in_one_line(kind, error, trace)
            return
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
        if self.kind == 'cuda':
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

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


class HeldInterrupt:
    """Hold a first Ctrl-C back until it suits (`received`); a second one is a KeyboardInterrupt.

    A third one ends the process without a word, should it hang where Python gets no turn. A SIGINT that the parent has
    told to be ignored (nohup, a shell's background jobs) stays ignored.
    """

    def __init__(self, promise, then=None):
        self.promise = promise                              # what the first one is answered with
        self.then = then                                    # called after it
        self.received = False
        self.before = signal.getsignal(signal.SIGINT)
        in_main_thread = threading.current_thread() is threading.main_thread()
        self.held = in_main_thread and self.before != signal.SIG_IGN
        if self.held:
            signal.signal(signal.SIGINT, self._hold)

    def _hold(self, number, frame):
        if self.received:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.received = True
        if int(os.environ.get('RANK', 0)) == 0:
            line = f'interrupt: {self.promise}; a second Ctrl-C leaves at once\n'
            os.write(2, line.encode())                      # print may be what was interrupted
        if self.then:
            self.then(number, frame)

    def release(self):
        """Give Ctrl-C back to whoever had it."""
        if self.held:
            signal.signal(signal.SIGINT, self.before)
        self.held = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


class StopSignals:
    """Remember SIGINT, SIGTERM, SIGUSR1 and the end of max_runtime for the next step boundary.

    max_runtime: seconds from now, 0 = none. Only a second SIGINT leaves at once: torchrun sends its ranks a SIGTERM
    after the SIGINT that it hands on, and that is still the same interrupt. The environment variable
    NANOMDL_STOP_AT_STEP = 12 stops a run after 12 steps as SIGTERM would: a rehearsal of what a cluster does, at a step
    that does not depend on the machine.
    """

    def __init__(self, max_runtime=0.0):
        self.received = ''                                  # name of the first of them
        self.leave = None                                   # what to call instead of remembering
        self.stop_at_step = int(os.environ.get('NANOMDL_STOP_AT_STEP', -1))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM):
            signal.signal(number, self._remember)
        self.interrupt = HeldInterrupt(SAVES, self._remember)
        if max_runtime:
            max_runtime = max(max_runtime, 1e-6)            # the timer takes whole microseconds, and 0 for none
        signal.setitimer(signal.ITIMER_REAL, max_runtime)

    def _remember(self, number, frame):
        name = signal.Signals(number).name
        if number == signal.SIGALRM:
            name = 'max_runtime'
        self.received = self.received or name
        if self.leave:
            self.leave()

    def asked(self, step):
        """Say whether the run is to stop after the step that follows `step` others."""
        if step + 1 == self.stop_at_step:
            self.received = self.received or 'NANOMDL_STOP_AT_STEP'
        return bool(self.received)

    def leave_at_once(self, leave):
        """From now on call leave() when a signal comes, and now if one came already; None: remember again."""
        self.leave = leave
        self.interrupt.promise = ENDS_NOW if leave else SAVES
        if self.leave and self.received:
            self.leave()

    def close(self):
        """Nothing is left that a signal could cut short."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.leave = None
        self.interrupt.release()


def hardware(env):
    """The machine in words: GPU name, or CPU model and thread count."""
    if env.kind == 'cuda':
        return f'{env.world} x {env.torch.cuda.get_device_name()}'
    return f'{cpu_name()}, {env.torch.get_num_threads()} threads'


def cpu_name():
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            names = [line.split(':')[1].strip() for line in f if line.startswith('model name')]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def rss_anon_bytes():
    """Anonymous resident memory of this process in bytes (pages of a memory map do not count); -1 if unknown."""
    try:
        with open('/proc/self/status', encoding='utf-8') as f:
            sizes = [int(line.split()[1]) for line in f if line.startswith('RssAnon')]
        return 1024 * sizes[0]
    except (OSError, IndexError):
        return -1
