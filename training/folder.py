"""The folder of a run: who may write it, its run.json, its log.txt and train_loss.csv."""
import atexit
import csv
import json
import os
import platform
import re
import time
from itertools import takewhile

from configurator import UserError, require
from corpus.bins import write_json
from training.checkpoint import commit_id, newest_checkpoint, remove
from training.process import hardware

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
