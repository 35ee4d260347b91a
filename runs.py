"""Where a run lives: processes and device, checkpoints, the run folder, run.json; and the table of all runs.

    python runs.py                      gather out/*/run.json into runs.csv and print the table
    python runs.py --watch              the unfinished runs with their progress, until Ctrl-C
    python runs.py status OUT_DIR       exit 0 done, 85 paused, 1 failed or unfinished (what an sbatch file asks)
    python runs.py compare out/a out/b --allow=seed     exit 1 where anything but the data (and the seed) differs
    python runs.py convert OUT_DIR/ckpt.sharded OUT_DIR/ckpt.pt             a sharded checkpoint as one file
    python runs.py export OUT_DIR/ckpt.pt FOLDER    a GPT-2 as config.json, safetensors and tokenizer, for transformers
    python runs.py export_weights OUT_DIR FILE      weights (bfloat16) and masks alone, small, to go on elsewhere:
                                                    as OUT_DIR/ckpt.pt with --init_from=resume, or --init_from=FILE

A run writes only its own run.json; runs.csv is derived, rebuilt whole, never edited.
"""
import atexit
import csv
import ctypes
import errno
import fcntl
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import nullcontext
from itertools import takewhile

from configurator import UserError, configure, one_of, require, run, say_in_one_line
from corpus.bins import write_json
from training.checkpoint import (  # for scripts, which know them as runs.load_checkpoint and so on
    CHECKPOINT_FORMAT,
    check_resume,
    commit_id,
    load_checkpoint,
    load_model,
    load_weights,
    newest_checkpoint,
    parent_of,
    remove,
    save_checkpoint,
    weights_alone,
)

# -----------------------------------------------------------------------------
out = 'out'                     # folder that holds the run folders
allow = ''                      # compare: settings that may differ beside the data, as seed,commit
csv_path = 'runs.csv'           # the table written; '' = print only
watch = False                   # print the table of unfinished runs again and again
watch_interval = 10.0           # seconds
overwrite = False               # export: replace the files of an earlier export in FOLDER
# -----------------------------------------------------------------------------

LOST = re.compile(r'closed by peer|Connection reset|Connection refused|Broken pipe|NCCL|gloo', re.I)
PAUSED = 85                     # exit status of a run that saved itself and wants to be continued
COLUMNS = ('run_id experiment_name timestamp run_time status procedure model dataset alpha beta initial_p_value '
           'initial_u_value learning_rate batch_size seq_length epochs_prelude epochs epochs_fine_tuning seed '
           'tolerated_relative_loss_increase epsilon final_train_loss final_val_loss mean_train_loss mean_test_loss '
           'model_byte_size non_zero_params online_description_length_bytes training_runtime '
           'total_number_of_GPUs').split()
WATCHED = 'run_id status phase step n_steps percent train_loss train_tokens_per_second hours_left seconds_ago'.split()
SHOWN = ('run_id status procedure final_val_loss test_bits_per_byte non_zero_params sparsity archive_bytes '
         'training_runtime').split()


# --- processes and device ---

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
    after the SIGINT that it hands on, and that is still the same interrupt.
    """

    def __init__(self, max_runtime=0.0):
        self.received = ''                                  # name of the first of them
        self.ending = ()                                    # the records of a run to leave at once instead
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM):
            signal.signal(number, self._remember)
        self.interrupt = HeldInterrupt('the run is saved after its next step, exit status 85', self._remember)
        signal.setitimer(signal.ITIMER_REAL, max(max_runtime, 1e-6) if max_runtime else 0)

    def _remember(self, number, frame):
        name = 'max_runtime' if number == signal.SIGALRM else signal.Signals(number).name
        self.received = self.received or name
        if self.ending:
            self.leave()

    def where(self, step):
        """Say for RunRecord.pause where and why a run was stopped; another rank may have got the signal."""
        return f"step={step} reason={self.received or 'rank'}"

    def leave(self):
        """Leave a run that is saved, its RunRecords marked as paused and its log closed with the same line."""
        for record in self.ending:
            line = record.pause(f'while scoring by {self.received}')
            log_path = os.path.join(record.folder, 'log.txt')
            if record.main and os.path.exists(log_path):
                with open(log_path, 'a', encoding='utf-8') as f:
                    f.write(f'{time.strftime("%H:%M:%S")} {line}\n')
        close_run_folders()
        os._exit(PAUSED)

    def leave_at_once(self, *records):
        """From now on leave the run when a signal comes, and now if one came already."""
        self.ending = records
        if self.received:
            self.leave()

    def remember(self):
        """From now on remember signals again, as before leave_at_once."""
        self.ending = ()

    def close(self):
        """Nothing is left that a signal could cut short."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.ending = ()
        self.interrupt.release()


# --- run folder ---

RUN_FILE = re.compile(r'(ckpt\.(pt|sharded)|best\.pt)(\.\d+)?(\.tmp)?|log\.txt|train_loss\.csv|loss\.png|run\.json')
open_folders = {}               # of this process: real path -> RunFolder


class FolderLock:
    """An exclusive lock on a run folder: the file .NAME.lock beside it, which holds host and process id.

    The operating system keeps it (flock): of two that start at once exactly one gets it, and whoever dies, even by
    kill -9, loses it, so that a file that was left behind is taken over. UserError where another process has it.
    """

    def __init__(self, folder):
        folder = os.path.realpath(folder)
        parent, name = os.path.split(folder)
        self.path = os.path.join(parent, f'.{name}.lock')
        os.makedirs(parent, exist_ok=True)
        self.file = self._take()
        while not self._is_the_file_of_that_name():         # its owner removed it between our open and our lock
            self.file.close()
            self.file = self._take()
        self.file.truncate(0)
        self.file.write(f'{platform.node()} {os.getpid()}\n')
        self.file.flush()

    def _take(self):
        file = open(self.path, 'a+', encoding='utf-8')
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            file.seek(0)
            host, _, pid = file.read().strip().partition(' ')
            if e.errno in (errno.EWOULDBLOCK, errno.EACCES) or host == platform.node() and others(pid):
                file.close()
                raise UserError(f'{self.path}: the run folder is being written by process {pid or "?"} on'
                                f' {host or "?"}; wait for it, or end it with kill') from None
        return file                                         # a file system without locks: host and pid have to do

    def _is_the_file_of_that_name(self):
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            return False

    def release(self):
        """Remove the file while it is still locked, then let go."""
        if self.file.closed:
            return
        if self._is_the_file_of_that_name():
            os.remove(self.path)
        self.file.close()


def others(pid):
    """Say whether a process id, as text, is of a living process other than this one."""
    return pid.isdigit() and int(pid) != os.getpid() and alive(int(pid))


def run_files(folder):
    """Names of what runs write into their folder and a new run would replace."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [name for name in names if RUN_FILE.fullmatch(name)]


def old_of(folder):
    """Where the run that a new one replaces waits until the new one has its first checkpoint."""
    return f'{os.path.abspath(folder)}.old'


def check_run_folder(path, overwrite, resume=False, parents=()):
    """Refuse a folder that a new run may not have, and touch nothing; UserError says why.

    Refused are a finished or continuable run in it, unless overwrite (or resume) says so; what no run of ours made; a
    run that is being written; an OUT_DIR.old in the way. parents: checkpoints that the new run reads; they may not lie
    in the folder, which is about to be cleared.
    """
    record = read_run(path)
    status = record.get('status', '')
    require((os.path.isdir(path) or not os.path.exists(path), f'out_dir {path!r} is a file; choose another --out_dir'))
    if runs_here(record) and others(str(record['pid'])):
        raise UserError(f'{path} is being written by process {record["pid"]}; wait for it, or end it with kill')
    checkpointed = os.path.exists(newest_checkpoint(path))
    names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    foreign = [n for n in names if n.startswith(('ckpt.', 'best.pt')) or RUN_FILE.fullmatch(n)]
    if foreign and not status and not (resume and checkpointed):
        raise UserError(f'out_dir {path!r} holds {", ".join(foreign[:4])} but no run.json of a run, so no run of ours'
                        ' made it; move it away or choose another --out_dir')
    if resume:
        require((status != 'done', f'{path} holds a finished run, nothing is left to resume;'
                 ' use --overwrite or another --out_dir'))
        return
    here = os.path.realpath(path)
    for parent in filter(os.path.exists, parents):
        if here in (os.path.realpath(parent), os.path.dirname(os.path.realpath(parent))):
            raise UserError(f'{parent!r} lies in out_dir {path!r}, where the new run is to be written;'
                            ' choose another --out_dir')
    if not overwrite and (status in ('done', 'paused') or checkpointed):
        how = 'continue it with --init_from=resume, ' if status != 'done' else ''
        raise UserError(f'out_dir {path!r} holds a {status or "checkpointed"} run; {how}'
                        'replace it with --overwrite or choose another --out_dir')
    if run_files(path) and os.path.lexists(old_of(path)):
        raise UserError(f'{old_of(path)} exists already: it holds a run that {path!r} held before, left by a start that'
                        ' was killed; move its files back or delete it')


class RunFolder:
    """The folder of a run, while its process writes there: locked, the run that it replaces kept aside for a while.

    commit() deletes the replaced run, for the new one has a checkpoint; close() without it moves that run back, for the
    start has failed. close() is called at exit at the latest.
    """

    def __init__(self, path, overwrite, resume=False, parents=()):
        self.path = path
        self.old = ''                                       # where the replaced run waits; '' = there is none
        self.cleared = False                                # what stands in the folder is the new run's
        self.lock = FolderLock(path)
        try:
            check_run_folder(path, overwrite, resume, parents)
            os.makedirs(path, exist_ok=True)
            if not resume:
                self._move_aside()
        except BaseException:
            self.close()
            raise

    def _move_aside(self):
        names = run_files(self.path)
        if not names:
            return
        os.mkdir(old_of(self.path))
        self.old = old_of(self.path)
        move(names, self.path, self.old)
        self.cleared = True

    def commit(self):
        """Delete the replaced run: the new one can go on from its own checkpoint."""
        old = self.old
        self.old = ''                                       # from here on there is no way back
        if old:
            remove(old)

    def close(self):
        """Move the replaced run back, unless the new one has a checkpoint, and let others have the folder."""
        old = self.old
        self.old = ''
        if old:
            for name in run_files(self.path) if self.cleared else ():
                remove(os.path.join(self.path, name))
            move(os.listdir(old), old, self.path)
            os.rmdir(old)
            print(f'{self.path}: the new run ended before its first checkpoint; the run that it was to replace is back',
                  file=sys.stderr)
        self.lock.release()


def move(names, source, target):
    """Move files and folders between two folders, run.json last: a folder with it is whole."""
    for name in sorted(names, key=lambda name: name == 'run.json'):
        shutil.move(os.path.join(source, name), os.path.join(target, name))


def open_run_folder(path, overwrite, resume=False, parents=()):
    """Lock a run folder and clear it for a new run, or leave it as it is for one that goes on; return a RunFolder.

    Refuses what check_run_folder refuses. What stood there moves to OUT_DIR.old until commit_run_folders().
    """
    here = os.path.realpath(path)
    if here in open_folders:                                # of an earlier run in this process
        open_folders.pop(here).close()
    open_folders[here] = RunFolder(path, overwrite, resume, parents)
    return open_folders[here]


def commit_run_folders():
    """The run of this process has a checkpoint: what it replaces goes. Call it after each one, on any rank."""
    for folder in open_folders.values():
        folder.commit()


def close_run_folders():
    """Let go of all folders of this process; runs without a checkpoint give way to those they were to replace."""
    while open_folders:
        open_folders.popitem()[1].close()


atexit.register(close_run_folders)      # first, so that it is called last: after RunRecord has had its say


def require_wandb():
    """Refuse to begin without what wandb.init will ask for: the package, and an API key or an offline mode."""
    try:
        import wandb
    except ImportError:
        raise UserError('wandb_log = True, but wandb is not installed; pip install wandb or drop --wandb_log') from None
    mode = os.environ.get('WANDB_MODE') or wandb.setup().settings.mode
    if mode in ('offline', 'disabled', 'dryrun'):
        return
    if os.environ.get('WANDB_API_KEY') or os.environ.get('WANDB_IDENTITY_TOKEN_FILE'):
        return
    try:
        known = wandb.login(prompt=False, verify=False)     # reads the settings and .netrc, asks no server
    except TypeError:                                       # wandb before 0.25 has no prompt
        known = wandb.api.api_key
    require((known, 'wandb_log = True, but wandb has no API key; run wandb login, set WANDB_API_KEY, or'
             ' WANDB_MODE=offline'))


def read_run(path):
    """Return the parsed run.json of a run folder, {} where there is none."""
    try:
        with open(os.path.join(path, 'run.json'), encoding='utf-8') as f:
            found = json.load(f)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_status(path):
    return read_run(path).get('status', '')


class RunRecord:
    """A run's own run.json: written at the start, updated with metrics, closed with its status. Rank 0 only."""

    def __init__(self, out_dir, config, env, **facts):
        self.path, self.main, self.started = os.path.join(out_dir, 'run.json'), env.main, time.time()
        self.folder = out_dir
        self.values = dict(config, run_id=os.path.basename(os.path.normpath(out_dir)), status='running',
                           commit=commit_id(), timestamp=time.strftime('%Y-%m-%dT%H:%M:%S'), hardware=hardware(env),
                           pid=os.getpid(), host=platform.node(), n_processes=env.world,
                           total_number_of_GPUs=env.world if env.kind == 'cuda' else 0, **facts)
        self.update()
        atexit.register(self._fail)

    def _fail(self):
        """A run that ends the process without a status has failed; kill -9 leaves 'running' and a dead pid."""
        if self.values['status'] == 'running' and os.path.exists(self.path):
            self.update(status='failed')

    def pause(self, where, **facts):
        """Mark the run as saved and to be continued; return the line that says so, which run.json then holds too."""
        line = f'paused {where}; continue with --init_from=resume'
        self.update(status='paused', paused=line, **facts)
        return line

    def update(self, **metrics):
        self.values.update(metrics, run_time=round(time.time() - self.started, 1))
        if self.main:
            write_json(self.path, self.values)


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


# --- logs of a run ---

def open_logs(out_dir, columns, step):
    """Open log.txt and train_loss.csv, cut back to the given step, so that a resumed run has no gap and no repeat.

    columns: of the CSV; the third is the step; the last ones may be new since the run began. Returns (log, csv file,
    csv writer).
    """
    log_path, csv_path = os.path.join(out_dir, 'log.txt'), os.path.join(out_dir, 'train_loss.csv')
    rows, lines = [], []
    if step and os.path.exists(log_path):
        with open(log_path, encoding='utf-8') as f:
            lines = list(takewhile(lambda line: int((re.search(r' step=(\d+)', line) or '00')[1]) <= step, f))
    if step and os.path.exists(csv_path):
        with open(csv_path, newline='', encoding='utf-8') as f:
            header, *rows = csv.reader(f)
        rows = [r + [''] * (len(columns) - len(r)) for r in rows if len(r) == len(header) and int(r[2]) <= step]
    loss_file = open(f'{csv_path}.tmp', 'w', newline='', encoding='utf-8')
    loss_csv = csv.writer(loss_file)
    loss_csv.writerow(columns)
    loss_csv.writerows(rows)
    log = open(f'{log_path}.tmp', 'w', buffering=1, encoding='utf-8')
    log.writelines(lines)
    for file, name in ((log, log_path), (loss_file, csv_path)):
        file.flush()                            # a kill from here on must still find the rows before the checkpoint
        os.replace(f'{name}.tmp', name)
    return log, loss_file, loss_csv


def say(log, line):
    """One line for log.txt and, above the progress bar, for the screen."""
    from tqdm import tqdm
    log.write(f'{time.strftime("%H:%M:%S")} {line}\n')
    tqdm.write(line, file=sys.stdout)


def progress_bar(label, total, done, env):
    from tqdm import tqdm
    return tqdm(total=total, initial=done, desc=label, unit='step', disable=not env.main, mininterval=1.0,
                dynamic_ncols=True)


# --- the table of runs ---

def gather(folder):
    """Read every run.json below folder; a run whose process died without a word (kill -9) has status 'killed'."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    found = [r for r in (read_run(os.path.join(folder, name)) for name in names) if r]
    return [dict(r, status='killed') if runs_here(r) and not alive(r['pid']) else r for r in found]


def write_csv(path, records):
    """Write runs.csv whole: COLUMNS first, then every other knob and metric in sorted order."""
    extra = sorted({k for r in records for k in r} - set(COLUMNS))
    tmp = f'{path}.{os.getpid()}.tmp'
    with open(tmp, 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, COLUMNS + extra, restval='', extrasaction='ignore')
        writer.writeheader()
        writer.writerows(records)
    os.replace(tmp, path)


def markdown(rows, columns):
    """Format a list of dicts as a markdown table, numbers right-aligned."""
    def cell(value):
        if isinstance(value, float):
            return f'{value:.4f}' if abs(value) < 1000 else f'{value:,.0f}'
        return f'{value:,}' if isinstance(value, int) and not isinstance(value, bool) else str(value)
    table = [[cell(r.get(c, '')) for c in columns] for r in rows]
    width = [max(len(c), *(len(t[i]) for t in table)) if table else len(c) for i, c in enumerate(columns)]
    numeric = [all(isinstance(r.get(c, 0), (int, float)) for r in rows) for c in columns]
    lines = ['| ' + ' | '.join(c.ljust(w) for c, w in zip(columns, width)) + ' |',
             '|' + '|'.join('-' * (w + 1) + (':' if n else '-') for w, n in zip(width, numeric)) + '|']
    for row in table:
        lines.append('| ' + ' | '.join(t.rjust(w) if n else t.ljust(w) for t, w, n in zip(row, width, numeric)) + ' |')
    return '\n'.join(lines)


def unfinished(folder):
    """Rows of the runs below a folder that are not done: progress, hours left, seconds since they last wrote."""
    rows = []
    for record in gather(folder):
        path = os.path.join(folder, record.get('run_id', ''), 'run.json')
        if record.get('status') == 'done' or 'n_steps' not in record or not os.path.exists(path):
            continue
        step, speed = record.get('step', 0), record.get('train_tokens_per_second') or math.nan
        left = (record['n_steps'] - step) * record['batch_size'] * record['seq_length']
        rows.append(dict(record, step=step, percent=100 * step / record['n_steps'], hours_left=left / speed / 3600,
                         seconds_ago=round(time.time() - os.path.getmtime(path))))
    return rows


def runs_here(record):
    """Say whether a run.json is of a run that has not ended and whose process, if it lives, lives on this machine."""
    return record.get('status') == 'running' and record.get('host') == platform.node()


def alive(pid):
    """Say whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if not ({'-h', '--help'} & set(argv) or argv and not argv[0].startswith('--')):
        argv = ['table', *argv]
    verb, paths, _ = configure(globals(), argv, verbs=dict(
        table=0, status=1, convert=2, export=2, export_weights=2, compare=-1))
    if verb == 'status':
        status = read_status(paths[0]) or 'no run.json'
        print(status)
        return {'done': 0, 'paused': PAUSED}.get(status, 1)
    if verb == 'compare':
        from compare import side_by_side
        rows, unfair = side_by_side({path: read_run(path) for path in paths}, allow)
        print(markdown(rows, list(rows[0])), f'not fair: {", ".join(unfair)}' if unfair else 'fair', sep='\n')
        return int(bool(unfair))
    if verb == 'export':
        from training import huggingface
        huggingface.export(load_checkpoint(paths[0]), paths[0], paths[1], overwrite)
        return 0
    if verb in ('convert', 'export_weights'):
        checkpoint = load_checkpoint(paths[0])
        save_checkpoint(paths[1], checkpoint if verb == 'convert' else weights_alone(checkpoint))
        return print(f'{paths[1]}: {os.path.getsize(paths[1]):,} bytes')
    while watch:
        rows = unfinished(out)
        print(time.strftime('%H:%M:%S'), markdown(rows, WATCHED) if rows else f'no unfinished run below {out!r}',
              sep='\n', flush=True)
        time.sleep(watch_interval)
    records = gather(out)
    if not records:
        raise UserError(f'no run.json below {out!r}; train something first, or name the folder with --out=')
    if csv_path:
        write_csv(csv_path, records)
    print(markdown(records, SHOWN))
    return 0


if __name__ == '__main__':
    run(main)
