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
import json
import math
import os
import platform
import re
import signal
import sys
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


# --- run folder ---

def open_run_folder(path, overwrite, resume=False, parent=''):
    """Create a run folder; a finished or continuable run in it is refused unless overwrite (or resume) says so.

    parent: the checkpoint that the new run starts from; it may not lie in the folder, which is about to be cleared.
    """
    record, here = read_run(path), os.path.realpath(path)
    status = record.get('status', '')
    require((os.path.isdir(path) or not os.path.exists(path), f'out_dir {path!r} is a file; choose another --out_dir'))
    if parent and not resume and here in (os.path.realpath(parent), os.path.dirname(os.path.realpath(parent))):
        raise UserError(f'{parent!r} lies in out_dir {path!r}, where the new run is to be written;'
                        ' choose another --out_dir')
    if runs_here(record) and record['pid'] != os.getpid() and alive(record['pid']):
        raise UserError(f'{path} is being written by process {record["pid"]}; wait for it, or end it with kill')
    if resume:
        if status == 'done':
            raise UserError(f'{path} holds a finished run, nothing is left to resume;'
                            ' use --overwrite or another --out_dir')
    elif not overwrite and (status in ('done', 'paused') or os.path.exists(newest_checkpoint(path))):
        how = 'continue it with --init_from=resume, ' if status != 'done' else ''
        raise UserError(f'out_dir {path!r} holds a {status or "checkpointed"} run; {how}'
                        'replace it with --overwrite or choose another --out_dir')
    os.makedirs(path, exist_ok=True)
    if not resume:
        for name in os.listdir(path):
            if name.startswith(('ckpt.', 'best.pt')) or name in ('log.txt', 'train_loss.csv', 'loss.png', 'run.json'):
                remove(os.path.join(path, name))


def read_run(path):
    """Return the parsed run.json of a run folder, {} where there is none."""
    try:
        with open(os.path.join(path, 'run.json'), encoding='utf-8') as f:
            return json.load(f)
    except (OSError, ValueError):
        return {}


def read_status(path):
    return read_run(path).get('status', '')


class RunRecord:
    """A run's own run.json: written at the start, updated with metrics, closed with its status. Rank 0 only."""

    def __init__(self, out_dir, config, env, **facts):
        self.path, self.main, self.started = os.path.join(out_dir, 'run.json'), env.main, time.time()
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
