"""runs.py: checkpoints that are whole or refused, run.json and the table of runs, exit codes a queue can act on."""
import csv
import json
import os

import pytest
import torch
from conftest import ROOT, OneProcess, run_here, run_script, snapshot

import runs
from configurator import UserError
from corpus.bins import write_json
from training import checkpoint as checkpoints
from training import folder as folders
from training import process
from training.table import COLUMNS

FINISH_16_AT_ONCE = '''
import os, runpy, sys, types
from training import folder as folders
gate = os.pipe()
pids = []
for i in range(16):
    pid = os.fork()
    if pid == 0:
        fake_torch = types.SimpleNamespace(get_num_threads=lambda: 1)
        env = types.SimpleNamespace(main=True, kind='cpu', world=1, torch=fake_torch)
        folder = os.path.join(sys.argv[1], f'run{i:02d}')
        os.makedirs(folder)
        folders.commit_id = lambda: 'c0ffee'
        record = folders.RunRecord(folder, dict(alpha=i / 10, procedure='pmmp'), env)
        os.close(gate[1])
        os.read(gate[0], 1)                         # all finish at once: the parent closes the gate
        record.update(status='done', final_val_loss=float(i))
        out, csv_path, script = sys.argv[1:]
        sys.argv = [script, f'--out={out}', f'--csv_path={csv_path}']
        runpy.run_path(script, run_name='__main__')
        os._exit(0)
    pids.append(pid)
os.close(gate[1])
sys.exit(max(os.waitpid(p, 0)[1] for p in pids))
'''


def test_weights_alone_go_on_elsewhere(train_tiny, tmp_path):
    """export_weights is small; a run resumes from it at its step, says that the optimiser starts afresh, and ends."""
    flags = ('--procedure=pmmp', '--alpha=1e-4', '--max_iters=8', '--do_pruning', '--epochs_fine_tuning=0.02',
             '--final_train_blocks=0')
    train_tiny(*flags, '--max_runtime=1e-9')
    path = str(tmp_path / 'run')
    record = folders.read_run(path)
    assert record['status'] == 'paused'
    (tmp_path / 'there').mkdir()
    run_here('runs.py', 'export_weights', path, str(tmp_path / 'there/ckpt.pt'))
    assert os.path.getsize(tmp_path / 'there/ckpt.pt') < os.path.getsize(f'{path}/ckpt.pt') / 8
    train_tiny(*flags, '--init_from=resume', out='there')
    there = folders.read_run(str(tmp_path / 'there'))
    with open(tmp_path / 'there/log.txt') as f:
        assert f'step={record["step"]}: ' in f.read()
    assert there['status'] == 'done' and there['step'] > record['step']
    train_tiny(*flags, f'--init_from={tmp_path / "there/ckpt.pt"}', out='anew')
    assert folders.read_run(str(tmp_path / 'anew'))['status'] == 'done'


def test_sixteen_runs_that_finish_at_once_all_have_their_row(tmp_path):
    """LOG, fault 9: a shared runs.csv rewritten by every job keeps 3 of 16 rows."""
    (tmp_path / 'race.py').write_text(FINISH_16_AT_ONCE)
    done = run_script(tmp_path / 'race.py', tmp_path / 'out', tmp_path / 'runs.csv',
                      os.path.join(ROOT, 'runs.py'))
    assert done.returncode == 0, done.stderr
    with open(tmp_path / 'runs.csv', newline='') as f:
        assert len(list(csv.DictReader(f))) >= 1                # never half a file, whoever wrote last
    assert run_here('runs.py', f'--out={tmp_path / "out"}', f'--csv_path={tmp_path / "runs.csv"}') == 0
    with open(tmp_path / 'runs.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert [r['run_id'] for r in rows] == [f'run{i:02d}' for i in range(16)]
    assert all(r['status'] == 'done' and float(r['final_val_loss']) == i and float(r['alpha']) == i / 10 for i,
               r in enumerate(rows))
    assert not [n for _, _, names in os.walk(tmp_path) for n in names if n.endswith('.tmp')]


def test_table_has_the_columns_in_order_and_every_other_value_after(tmp_path, capsys):
    """runs.csv is what plots and people read: fixed columns first, nothing of a run.json lost."""
    for name, values in (('a', dict(status='done', alpha=1e-7, odd=3)), ('b', dict(status='failed', seed=2)),
                         ('empty', None)):
        (tmp_path / 'out' / name).mkdir(parents=True)
        if values:
            (tmp_path / 'out' / name / 'run.json').write_text(json.dumps(dict(values, run_id=name)))
    (tmp_path / 'out' / 'stray.txt').write_text('not a folder')
    (tmp_path / 'out' / 'empty' / 'run.json').write_text('{"run_id": "em')
    assert run_here('runs.py', f'--out={tmp_path / "out"}', f'--csv_path={tmp_path / "runs.csv"}') == 0
    with open(tmp_path / 'runs.csv', newline='') as f:
        header, *rows = csv.reader(f)
    assert header == [*COLUMNS, 'odd'] and [r[0] for r in rows] == ['a', 'b'] and rows[0][-1] == '3'
    assert rows[1][-1] == ''
    assert '| a' in capsys.readouterr().out
    for wanted in 'run_id alpha seq_length epsilon online_description_length_bytes total_number_of_GPUs'.split():
        assert wanted in COLUMNS
    with pytest.raises(UserError, match='no run.json below'):
        run_here('runs.py', f'--out={tmp_path / "nowhere"}')


@pytest.mark.parametrize('status, code', [('done', 0), ('paused', 85), ('failed', 1), ('running', 1), (None, 1)])
def test_status_exit_codes(tmp_path, status, code, capsys):
    """An sbatch file requeues on 85 and stops on anything else; a run without a status has not finished."""
    if status:
        (tmp_path / 'run.json').write_text(json.dumps(dict(status=status)))
    assert run_here('runs.py', 'status', str(tmp_path)) == code
    assert capsys.readouterr().out.strip() == (status or 'no run.json')


def test_a_process_that_ends_without_a_status_has_failed(tmp_path):
    """A crash must not leave 'running' behind."""
    code = ('import sys, types; from training import folder; fake = types.SimpleNamespace(get_num_threads=lambda: 1)\n'
            'env = types.SimpleNamespace(main=True, kind="cpu", world=1, torch=fake)\n'
            'r = folder.RunRecord(sys.argv[1], dict(seed=3), env); r.update(step=5); raise RuntimeError("boom")')
    assert run_script('-c', code, tmp_path).returncode == 1
    assert folders.read_run(tmp_path)['status'] == 'failed' and folders.read_run(tmp_path)['step'] == 5


def test_killed_runs_are_visible_as_such_and_watched(tmp_path, monkeypatch, capsys):
    """kill -9 writes nothing: 'running' for ever. The watch shows step, share, hours left of all that are not done."""
    facts = dict(n_steps=200, step=50, batch_size=8, seq_length=32, train_tokens_per_second=64, phase='main',
                 host=folders.platform.node())
    for name, status, pid in (('dead', 'running', 2 ** 22 + 1), ('live', 'running', os.getpid()),
                              ('gone', 'done', 1), ('wait', 'paused', 1)):
        (tmp_path / 'out' / name).mkdir(parents=True)
        write_json(str(tmp_path / 'out' / name / 'run.json'), dict(facts, run_id=name, status=status, pid=pid))
    assert [(r['run_id'], r['status']) for r in runs.gather(str(tmp_path / 'out'))] == [
        ('dead', 'killed'), ('gone', 'done'), ('live', 'running'), ('wait', 'paused')]

    def interrupt(seconds):
        assert seconds == 7.0
        raise KeyboardInterrupt
    monkeypatch.setattr(runs.time, 'sleep', interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_here('runs.py', f'--out={tmp_path / "out"}', '--watch', '--watch_interval=7', '--csv_path=')
    shown = capsys.readouterr().out
    assert 'gone' not in shown and shown.count('25.0000') == 3                      # percent
    assert f'{150 * 8 * 32 / 64 / 3600:.4f}' in shown and 'killed' in shown


def test_only_rank_0_writes(tmp_path):
    """Ranks that all write one run.json overwrite each other's numbers."""
    folders.RunRecord(str(tmp_path), dict(seed=1), OneProcess(1, 2)).update(status='done')
    assert os.listdir(tmp_path) == []


# --- checkpoints ---

def checkpoint(path, **more):
    checkpoints.save_checkpoint(str(path), dict(model=dict(a=torch.arange(1000.0)), **more))
    return str(path)


def test_checkpoint_round_trip_and_keep_last(tmp_path):
    """Newest under the plain name, older ones numbered, nothing temporary left."""
    for step in range(4):
        checkpoints.save_checkpoint(str(tmp_path / 'ckpt.pt'), dict(step=step), keep_last=3)
    steps = {n: checkpoints.load_checkpoint(str(tmp_path / n))['step'] for n in os.listdir(tmp_path)}
    assert steps == {'ckpt.pt': 3, 'ckpt.pt.1': 2, 'ckpt.pt.2': 1}
    assert checkpoints.load_checkpoint(str(tmp_path))['step'] == 3     # a run folder stands for its ckpt.pt


@pytest.mark.parametrize('damage, words', [
    (lambda p: os.truncate(p, os.path.getsize(p) // 2), ('cut short or not a checkpoint', 'use an older one')),
    (lambda p: open(p, 'wb').write(b'PK\x03\x04 not a checkpoint'), ('cut short or not a checkpoint',)),
    (lambda p: open(p, 'wb').close(), ('cut short or not a checkpoint',)),
    (lambda p: torch.save(dict(model={}), p), ('None', 'nanomdl-ckpt-1')),
    (lambda p: torch.save([1, 2], p), ('nanomdl-ckpt-1',)),
    (lambda p: torch.save(dict(format='nanomdl-ckpt-2'), p), ("'nanomdl-ckpt-2'", 'nanomdl-ckpt-1')),
    (lambda p: os.remove(p), ('no checkpoint at', 'train.py')),
], ids='half foreign empty no-format list newer missing'.split())
def test_damaged_checkpoint_is_one_line(tmp_path, damage, words):
    """A checkpoint cut in half, foreign, newer or missing: one line, the file as it was."""
    path = checkpoint(tmp_path / 'ckpt.pt')
    damage(path)
    before = snapshot(tmp_path)
    with pytest.raises(UserError) as e:
        checkpoints.load_checkpoint(path)
    assert '\n' not in str(e.value) and 'ckpt.pt' in str(e.value), str(e.value)
    assert all(w in str(e.value) for w in words), str(e.value)
    assert snapshot(tmp_path) == before


class Planted:
    """What a hostile checkpoint would hold."""

    def __reduce__(self):
        return os.mkdir, ('planted',)


def test_loading_runs_no_code(tmp_path, monkeypatch):
    """weights_only: a checkpoint from the net must not execute what it holds."""
    monkeypatch.chdir(tmp_path)
    torch.save(dict(format=checkpoints.CHECKPOINT_FORMAT, model=Planted()), 'evil.pt')
    with pytest.raises(UserError, match='evil.pt'):
        checkpoints.load_checkpoint('evil.pt')
    assert not os.path.exists('planted')


def test_failed_save_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    """A full disk in the middle of saving must not cost the checkpoint that is there."""
    path = checkpoint(tmp_path / 'ckpt.pt', step=1)
    before = snapshot(tmp_path)

    def full(value, where):
        with open(where, 'wb') as f:
            f.write(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(UserError, match='No space left.*previous checkpoint is untouched'):
        checkpoints.save_checkpoint(path, dict(step=2))
    assert snapshot(tmp_path) == before


# --- the run folder ---

FULL_DISK = """
import resource, sys
import torch
from configurator import run
from training.checkpoint import save_checkpoint
path = sys.argv[1]
save_checkpoint(path, dict(step=1, model=dict(a=torch.ones(1000))))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))       # a file system with no room for more
run(lambda: save_checkpoint(path, dict(step=2, model=dict(a=torch.ones(100_000)))))
"""


def test_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A write that fails half-way must not cost what was there, nor leave its half behind."""
    (tmp_path / 'full.py').write_text(FULL_DISK)
    done = run_script(tmp_path / 'full.py', tmp_path / 'ckpt.pt')
    assert done.returncode == 1 and done.stderr.startswith('error: cannot save') and done.stderr.count('\n') == 1
    assert 'previous checkpoint is untouched' in done.stderr
    assert checkpoints.load_checkpoint(tmp_path / 'ckpt.pt')['step'] == 1
    assert not (tmp_path / 'ckpt.pt.tmp').exists()


def test_newer_format_says_to_update(tmp_path):
    torch.save(dict(format='nanomdl-ckpt-9'), tmp_path / 'a.pt')
    with pytest.raises(UserError, match='nanomdl-ckpt-9.*update this repository'):
        checkpoints.load_checkpoint(tmp_path / 'a.pt')


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
        process.Env('cpu')


@pytest.mark.parametrize('status, overwrite, resume, words', [
    ('done', False, False, ('--overwrite', 'done')), ('paused', False, False, ('--init_from=resume', '--overwrite')),
    ('failed', False, False, ('--init_from=resume',)), ('done', False, True, ('finished run', 'resume')),
    ('done', True, False, None), ('paused', True, False, None), ('paused', False, True, None),
    ('failed', False, True, None)])
def test_run_folder_is_refused_or_replaced_as_asked(tmp_path, status, overwrite, resume, words):
    """Hours of training must not be overwritten by a second launch; nothing changes where it is refused."""
    (tmp_path / 'run.json').write_text(json.dumps(dict(status=status)))
    for name in ('ckpt.pt', 'best.pt', 'log.txt', 'train_loss.csv', 'loss.png'):
        (tmp_path / name).write_text('precious')
    (tmp_path / 'notes.txt').write_text('mine')
    before = snapshot(tmp_path)
    if words:
        with pytest.raises(UserError) as e:
            folders.open_run_folder(str(tmp_path), overwrite, resume)
        assert all(w in str(e.value) for w in words) and str(tmp_path) in str(e.value)
        assert snapshot(tmp_path) == before
    else:
        folders.open_run_folder(str(tmp_path), overwrite, resume)
        assert snapshot(tmp_path) == (before if resume else {'notes.txt': b'mine'})


@pytest.mark.parametrize('overwrite, resume', [(False, False), (True, False), (False, True)])
def test_a_folder_that_another_process_writes_is_refused(tmp_path, overwrite, resume):
    """Two runs in one folder: the second clears the log that the first is writing."""
    (tmp_path / 'run').mkdir()
    facts = dict(status='running', host=folders.platform.node(), pid=os.getppid())
    write_json(str(tmp_path / 'run' / 'run.json'), facts)
    with pytest.raises(UserError, match=f'written by process {os.getppid()}'):
        folders.open_run_folder(str(tmp_path / 'run'), overwrite, resume)
    write_json(str(tmp_path / 'run' / 'run.json'), dict(facts, pid=2 ** 22 + 1))
    folders.open_run_folder(str(tmp_path / 'run'), overwrite, resume)


def test_run_folder_that_is_a_file(tmp_path):
    (tmp_path / 'run').write_text('notes')
    with pytest.raises(UserError, match='is a file'):
        folders.open_run_folder(str(tmp_path / 'run'), overwrite=True)


def test_overwriting_leaves_no_older_checkpoints_behind(tmp_path):
    """ckpt.pt.1 of the replaced run would pass for an older checkpoint of the new one."""
    (tmp_path / 'run.json').write_text(json.dumps(dict(status='done')))
    for name in ('ckpt.pt', 'ckpt.pt.1', 'ckpt.pt.2'):
        (tmp_path / name).write_text('old')
    folders.open_run_folder(str(tmp_path), True, False)
    assert snapshot(tmp_path) == {}


def test_anonymous_memory_does_not_count_mapped_files(tmp_path):
    """Memory numbers are RssAnon: pages of a memory map are the file's, not ours."""
    import numpy as np
    with open(tmp_path / 'big.bin', 'wb') as f:
        f.truncate(64 << 20)
    before = process.rss_anon_bytes()
    mapped = np.memmap(tmp_path / 'big.bin', np.uint8, 'r')
    assert int(mapped.max()) == 0                               # touches every page
    assert before > 1 << 20 and process.rss_anon_bytes() - before < 16 << 20


def test_a_resumed_log_is_cut_back_and_takes_a_new_last_column(tmp_path):
    """A run that began before a column was added keeps its rows; a row cut by a kill goes."""
    (tmp_path / 'train_loss.csv').write_text('phase,epoch,step,loss\nmain,0,1,2.5\nmain,0,2,2.25\nmain,0,3,2.0\nmain,0')
    log, loss_file, _ = folders.open_logs(str(tmp_path), ('phase', 'epoch', 'step', 'loss', 'seconds'), 2)
    log.close(), loss_file.close()
    lines = (tmp_path / 'train_loss.csv').read_text().splitlines()
    assert lines == ['phase,epoch,step,loss,seconds', 'main,0,1,2.5,', 'main,0,2,2.25,']
