"""The folder of a run: who may write it, what becomes of the run before, its run.json, its log.txt and csv."""
import atexit
import csv
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import sys
import time
from itertools import takewhile

from configurator import UserError, require
from corpus.bins import write_json
from training.checkpoint import commit_id, newest_checkpoint, remove, sorted_names
from training.process import hardware

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
    return [name for name in sorted_names(folder) if RUN_FILE.fullmatch(name)]


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
    foreign = [n for n in sorted_names(path) if n.startswith(('ckpt.', 'best.pt')) or RUN_FILE.fullmatch(n)]
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
        how = ''
        if status != 'done':
            how = 'continue it with --init_from=resume, '
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
            if self.cleared:
                for name in run_files(self.path):
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


# --- run.json ---

def read_run(path):
    """Return the parsed run.json of a run folder, {} where there is none."""
    try:
        with open(os.path.join(path, 'run.json'), encoding='utf-8') as f:
            found = json.load(f)
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return found


def read_status(path):
    return read_run(path).get('status', '')


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


class RunRecord:
    """A run's own run.json: written at the start, updated with metrics, closed with its status. Rank 0 only."""

    def __init__(self, out_dir, config, env, **facts):
        self.folder = out_dir
        self.path = os.path.join(out_dir, 'run.json')
        self.main = env.main
        self.started = time.monotonic()
        n_gpus = 0
        if env.kind == 'cuda':
            n_gpus = env.world
        self.values = dict(config, run_id=os.path.basename(os.path.normpath(out_dir)), status='running',
                           commit=commit_id(), timestamp=time.strftime('%Y-%m-%dT%H:%M:%S'), hardware=hardware(env),
                           pid=os.getpid(), host=platform.node(), n_processes=env.world,
                           total_number_of_GPUs=n_gpus, **facts)
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
        self.values.update(metrics, run_time=round(time.monotonic() - self.started, 1))
        if self.main:
            write_json(self.path, self.values)


# --- logs ---

def open_logs(out_dir, columns, step):
    """Open log.txt and train_loss.csv, cut back to the given step, so that a resumed run has no gap and no repeat.

    columns: of the CSV; the third is the step; the last ones may be new since the run began. Returns (log, csv file,
    csv writer).
    """
    log_path = os.path.join(out_dir, 'log.txt')
    csv_path = os.path.join(out_dir, 'train_loss.csv')
    lines = []
    rows = []
    if step and os.path.exists(log_path):
        with open(log_path, encoding='utf-8') as f:
            lines = list(takewhile(lambda line: step_of(line) <= step, f))
    if step and os.path.exists(csv_path):
        with open(csv_path, newline='', encoding='utf-8') as f:
            header, *older = csv.reader(f)
        whole = [row for row in older if len(row) == len(header) and int(row[2]) <= step]
        rows = [row + [''] * (len(columns) - len(row)) for row in whole]

    # New files first, then their names: a kill from here on must still find the rows before the checkpoint.
    loss_file = open(f'{csv_path}.tmp', 'w', newline='', encoding='utf-8')
    loss_csv = csv.writer(loss_file)
    loss_csv.writerow(columns)
    loss_csv.writerows(rows)
    log = open(f'{log_path}.tmp', 'w', buffering=1, encoding='utf-8')
    log.writelines(lines)
    for file, name in ((log, log_path), (loss_file, csv_path)):
        file.flush()
        os.replace(f'{name}.tmp', name)
    return log, loss_file, loss_csv


def step_of(line):
    """Return the step that a line of log.txt names, or 0."""
    found = re.search(r' step=(\d+)', line)
    return int(found[1]) if found else 0
