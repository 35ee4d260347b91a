"""runs.py: the table of runs, exit codes that a queue can act on, weights to go on with elsewhere."""
import csv
import json
import os
import platform
import time

import pytest
from conftest import run_here, run_script

import runs
from configurator import UserError
from corpus.bins import write_json
from training.folder import read_run
from training.table import COLUMNS

FINISH_16_AT_ONCE = '''
import os, sys, types
from conftest import run_here
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
        run_here('runs.py', f'--out={sys.argv[1]}', f'--csv_path={sys.argv[2]}')
        os._exit(0)
    pids.append(pid)
os.close(gate[1])
sys.exit(max(os.waitpid(p, 0)[1] for p in pids))
'''


def test_weights_alone_go_on_elsewhere(train_tiny, tmp_path, monkeypatch):
    """export_weights is small; a run resumes from it at its step, says that the optimiser starts afresh, and ends."""
    flags = ('--procedure=pmmp', '--alpha=1e-4', '--max_iters=8', '--do_pruning', '--epochs_fine_tuning=0.02',
             '--final_train_blocks=-1')
    with monkeypatch.context() as patch:
        patch.setenv('NANOMDL_STOP_AT_STEP', '1')
        assert train_tiny(*flags) == 85
    path = str(tmp_path / 'run')
    record = read_run(path)
    assert record['status'] == 'paused'
    (tmp_path / 'there').mkdir()
    run_here('runs.py', 'export_weights', path, str(tmp_path / 'there/ckpt.pt'))
    assert os.path.getsize(tmp_path / 'there/ckpt.pt') < os.path.getsize(f'{path}/ckpt.pt') / 8
    train_tiny(*flags, '--init_from=resume', out='there')
    there = read_run(str(tmp_path / 'there'))
    with open(tmp_path / 'there/log.txt') as f:
        assert f'step={record["step"]}: ' in f.read()
    assert there['status'] == 'done' and there['step'] > record['step']
    train_tiny(*flags, f'--init_from={tmp_path / "there/ckpt.pt"}', out='anew')
    assert read_run(str(tmp_path / 'anew'))['status'] == 'done'


@pytest.mark.slow
def test_sixteen_runs_that_finish_at_once_all_have_their_row(tmp_path):
    """A shared runs.csv rewritten by every job keeps 3 of 16 rows."""
    (tmp_path / 'race.py').write_text(FINISH_16_AT_ONCE)
    done = run_script(tmp_path / 'race.py', tmp_path / 'out', tmp_path / 'runs.csv')
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


def test_killed_runs_are_visible_as_such_and_watched(tmp_path, monkeypatch, capsys):
    """kill -9 writes nothing: 'running' for ever. The watch shows step, share, hours left of all that are not done."""
    facts = dict(n_steps=200, step=50, batch_size=8, seq_length=32, train_tokens_per_second=64, phase='main',
                 host=platform.node())
    for name, status, pid in (('dead', 'running', 2 ** 22 + 1), ('live', 'running', os.getpid()),
                              ('gone', 'done', 1), ('wait', 'paused', 1)):
        (tmp_path / 'out' / name).mkdir(parents=True)
        write_json(str(tmp_path / 'out' / name / 'run.json'), dict(facts, run_id=name, status=status, pid=pid))
    assert [(r['run_id'], r['status']) for r in runs.gather(str(tmp_path / 'out'))] == [
        ('dead', 'killed'), ('gone', 'done'), ('live', 'running'), ('wait', 'paused')]

    def interrupt(seconds):
        assert seconds == 7.0
        raise KeyboardInterrupt
    monkeypatch.setattr(time, 'sleep', interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_here('runs.py', f'--out={tmp_path / "out"}', '--watch', '--watch_interval=7', '--csv_path=')
    shown = capsys.readouterr().out
    assert 'gone' not in shown and shown.count('25.0000') == 3                      # percent
    assert f'{150 * 8 * 32 / 64 / 3600:.4f}' in shown and 'killed' in shown
