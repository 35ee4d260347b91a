"""The run folder: whose it is, who may write there, and when a replaced run is really gone."""
import json
import os
import subprocess
import sys
import types

import pytest
from conftest import ROOT, TINY, OneProcess, run_here, run_script, snapshot

from configurator import UserError, knobs_of
from corpus.bins import write_json
from training import checkpoint, plan
from training import folder as folders
from training import run as training_run

QUICK = ('--max_iters=2', '--final_train_blocks=-1')


def put(folder, status='done', names=('ckpt.pt', 'best.pt', 'log.txt', 'loss.png')):
    """Make a run folder with a run.json (status None: without) and some files."""
    os.makedirs(folder, exist_ok=True)
    for name in names:
        (folder / name).write_text(f'precious {name}')
    if status is not None:
        (folder / 'run.json').write_text(json.dumps(dict(status=status)))


# --- what no run made ---

@pytest.mark.parametrize('overwrite', (False, True))
@pytest.mark.parametrize('name', ('ckpt.pt', 'ckpt.mine', 'best.pt', 'best.pt.mine', 'log.txt', 'train_loss.csv'))
@pytest.mark.parametrize('is_folder', (False, True), ids=('file', 'folder'))
def test_what_no_run_made_is_refused(tmp_path, name, is_folder, overwrite):
    """--out_dir=~/notes --overwrite must not delete the log.txt of somebody else."""
    folder = tmp_path / 'notes'
    put(folder, None, () if is_folder else (name,))
    if is_folder:
        put(folder / name, None, ('deep.txt',))
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=f'{name}.*no run.json.*choose another --out_dir') as e:
        folders.open_run_folder(str(folder), overwrite)
    assert '\n' not in str(e.value) and snapshot(tmp_path) == before


@pytest.mark.parametrize('content', ('[1, 2]', '{"mine": 1}', 'half a fi'))
def test_a_run_json_of_somebody_else_is_none_of_ours(tmp_path, content):
    put(tmp_path / 'x', None, ('log.txt',))
    (tmp_path / 'x' / 'run.json').write_text(content)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match='no run of ours'):
        folders.open_run_folder(str(tmp_path / 'x'), True)
    assert snapshot(tmp_path) == before


def test_a_first_start_with_resume_does_not_cut_a_strangers_log(tmp_path):
    """A queue starts with --init_from=resume; without a checkpoint that is a new run with a log.txt of its own."""
    put(tmp_path / 'x', None, ('log.txt',))
    with pytest.raises(UserError, match='log.txt'):
        folders.open_run_folder(str(tmp_path / 'x'), False, resume=True)
    put(tmp_path / 'y', None, ('ckpt.pt',))                 # of export_weights, to go on from
    folders.open_run_folder(str(tmp_path / 'y'), False, resume=True)


# --- one process at a time ---

SIXTEEN_STARTS = """
import os, sys
from training import folder as folders
gate, tried = os.pipe(), os.pipe()
pids = []
for i in range(16):
    pid = os.fork()
    if pid == 0:
        os.close(gate[1])
        os.read(gate[0], 1)                                 # all start at once: the parent closes the gate
        try:
            folders.open_run_folder(sys.argv[1], False)
            os.write(tried[1], b'w')
        except folders.UserError as e:
            os.write(tried[1], b'r' if 'is being written by process' in str(e) else b'?')
        sys.stdin.read()                                    # a winner keeps the folder until all have tried
        os._exit(0)
    pids.append(pid)
os.close(gate[0])
os.close(gate[1])
found = b''
while len(found) < 16:
    found += os.read(tried[0], 16)
print(bytes(sorted(found)).decode())
"""


@pytest.mark.slow
def test_exactly_one_of_sixteen_simultaneous_starts_wins(tmp_path):
    """run.json of the first is not written yet when the second looks: both trained into one folder, 1 time in 4."""
    (tmp_path / 'race.py').write_text(SIXTEEN_STARTS)
    env = dict(os.environ, PYTHONPATH=ROOT)
    process = subprocess.Popen([sys.executable, tmp_path / 'race.py', tmp_path / 'run'], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, env=env)
    line = process.stdout.readline()
    process.communicate('')
    assert line.strip() == 15 * 'r' + 'w'


HOLD = """
import sys
from training import folder as folders
folders.open_run_folder(sys.argv[1], False)
print('open', flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_the_lock_names_its_owner_and_goes_with_it(tmp_path):
    """Refused while the other lives, taken over when it was killed, gone when a process has ended by itself."""
    process = subprocess.Popen([sys.executable, '-c', HOLD, tmp_path / 'run'], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=ROOT))
    assert process.stdout.readline() == b'open\n'
    lock = tmp_path / '.run.lock'
    assert lock.read_text().split() == [folders.platform.node(), str(process.pid)]
    for resume in (False, True):
        with pytest.raises(UserError, match=f'written by process {process.pid} on {folders.platform.node()}'):
            folders.open_run_folder(str(tmp_path / 'run'), True, resume)
    process.kill()
    process.communicate()
    assert lock.exists()                                    # stale: its process is dead
    folders.open_run_folder(str(tmp_path / 'run'), False)
    assert lock.read_text().split() == [folders.platform.node(), str(os.getpid())]
    folders.close_run_folders()
    assert not lock.exists()
    done = run_script('-c', HOLD.replace('sys.stdin.read()', ''), tmp_path / 'run')
    assert done.returncode == 0 and not lock.exists()


def test_a_refused_start_leaves_the_folder_free(tmp_path):
    put(tmp_path / 'run')
    with pytest.raises(UserError, match='--overwrite'):
        folders.open_run_folder(str(tmp_path / 'run'), False)
    assert sorted(os.listdir(tmp_path)) == ['run']


# --- the replaced run ---

def test_the_replaced_run_waits_aside_until_the_new_one_has_a_checkpoint(tmp_path):
    put(tmp_path / 'run')
    (tmp_path / 'run' / 'notes.txt').write_text('mine')
    before = snapshot(tmp_path / 'run')
    folder = folders.open_run_folder(str(tmp_path / 'run'), True)
    assert snapshot(tmp_path / 'run') == {'notes.txt': b'mine'}
    assert snapshot(tmp_path / 'run.old') | {'notes.txt': b'mine'} == before
    put(tmp_path / 'run', 'running', ('log.txt', 'ckpt.pt'))
    folders.commit_run_folders()
    assert not (tmp_path / 'run.old').exists()
    folder.close()
    assert folders.read_status(str(tmp_path / 'run')) == 'running'


def test_a_start_that_fails_moves_the_old_run_back(tmp_path, capsys):
    put(tmp_path / 'run')
    (tmp_path / 'run' / 'ckpt.sharded').mkdir()
    (tmp_path / 'run' / 'ckpt.sharded' / 'part').write_text('deep')
    before = snapshot(tmp_path)
    folders.open_run_folder(str(tmp_path / 'run'), True)
    put(tmp_path / 'run', 'running', ('log.txt', 'train_loss.csv', 'best.pt'))
    folders.close_run_folders()
    assert snapshot(tmp_path) == before and 'is back' in capsys.readouterr().err


def test_a_move_that_breaks_off_loses_nothing(tmp_path, monkeypatch):
    """Half moved: what still stands in the folder is the old run's and must not be taken for the new one's."""
    put(tmp_path / 'run')
    before = snapshot(tmp_path)
    real = folders.shutil.move

    def move(source, target):
        if source.endswith('log.txt') and target.endswith(f'run.old{os.sep}log.txt'):
            raise OSError(5, 'Input/output error')
        return real(source, target)
    monkeypatch.setattr(folders.shutil, 'move', move)
    with pytest.raises(OSError, match='Input/output'):
        folders.open_run_folder(str(tmp_path / 'run'), True)
    assert snapshot(tmp_path) == before


def test_an_old_folder_is_never_replaced(tmp_path):
    """It may hold the only good run: the one that a killed --overwrite moved aside."""
    put(tmp_path / 'run')
    put(tmp_path / 'run.old')
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match='run.old exists already') as e:
        folders.open_run_folder(str(tmp_path / 'run'), True)
    assert '\n' not in str(e.value) and snapshot(tmp_path) == before


@pytest.fixture
def finished(train_tiny, tmp_path, toy):
    """A finished run out/a, and (script, argv) to replace runs of the three trainers that start from it."""
    assert train_tiny(*QUICK, '--positions=learned', out='a') == 0
    data = (f'--data_dir={toy}', '--dataset=toy')
    short = ('--device=cpu', '--dtype=float32', '--max_iters=2', *data)
    return {
        'train': ('train.py', [*TINY, *data, *QUICK]),
        'distill': ('distill.py', [*TINY, *data, '--max_iters=2', '--positions=learned',
                                   f'--teacher={tmp_path / "a"}']),
        'probe': ('lab/probe.py', [*short, f'--from_ckpt={tmp_path / "a"}', '--batch_size=8'])}


@pytest.mark.parametrize('name', ('train', 'distill', 'probe'))
def test_a_trainer_that_fails_before_its_first_checkpoint_costs_nothing(name, finished, tmp_path, monkeypatch):
    """Out of memory in the first step of --overwrite: the finished run is as it was. Without it: replaced, no rest."""
    script, argv = finished[name]
    argv = [*argv, f'--out_dir={tmp_path / "out"}']
    assert run_here(script, *argv) == 0
    before = snapshot(tmp_path)

    def out_of_memory(*_):
        raise RuntimeError('out of memory')
    with monkeypatch.context() as patch:
        patch.setattr(plan.Schedule, 'rate', out_of_memory)
        with pytest.raises(RuntimeError, match='out of memory'):
            run_here(script, *argv, '--overwrite')
    assert (tmp_path / 'out.old').exists()
    folders.close_run_folders()                                # as at exit
    assert snapshot(tmp_path) == before
    assert run_here(script, *argv, '--overwrite', '--seed=3') == 0
    record = folders.read_run(str(tmp_path / 'out'))
    assert record['status'] == 'done' and record['seed'] == 3
    assert [n for n in os.listdir(tmp_path) if n.endswith(('.old', '.lock'))] == []


@pytest.mark.slow
def test_a_process_that_fails_moves_the_old_run_back_at_its_exit(tmp_path, toy):
    """As a user calls it: a learning rate that ends in nan."""
    argv = [os.path.join(ROOT, 'train.py'), *TINY, f'--data_dir={toy}', '--dataset=toy', *QUICK,
            f'--out_dir={tmp_path / "run"}']
    assert run_script(*argv).returncode == 0
    before = snapshot(tmp_path)
    done = run_script(*argv, '--overwrite', '--learning_rate=1e38', '--max_iters=9')
    assert done.returncode == 1 and 'try a lower --learning_rate' in done.stderr
    assert snapshot(tmp_path) == before


def test_pruning_replaces_its_run_in_the_same_way(finished, tmp_path, monkeypatch):
    argv = [f'--from_ckpt={tmp_path / "a"}', f'--out_dir={tmp_path / "pruned"}', '--method=magnitude',
            '--device=cpu', '--sparsity=0.5']
    assert run_here('prune.py', *argv) == 0
    before = snapshot(tmp_path)

    def full(*_):
        raise UserError('cannot save')
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, 'save_checkpoint', full)
        with pytest.raises(UserError, match='cannot save'):
            run_here('prune.py', *argv, '--overwrite')
    folders.close_run_folders()
    assert snapshot(tmp_path) == before
    assert run_here('prune.py', *argv, '--overwrite') == 0
    assert sorted(os.listdir(tmp_path)) == ['a', 'pruned']


def test_a_distillation_may_not_replace_its_teacher(finished, tmp_path):
    """--teacher=X --out_dir=X --overwrite: X would be gone with the first checkpoint."""
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match='lies in out_dir'):
        run_here('distill.py', *finished['distill'][1], f'--out_dir={tmp_path / "a"}', '--overwrite')
    with pytest.raises(UserError, match='lies in out_dir'):
        run_here('lab/probe.py', *finished['probe'][1], f'--out_dir={tmp_path / "a"}', '--overwrite')
    assert snapshot(tmp_path) == before


def test_a_probe_refuses_before_its_first_encoder_is_trained(finished, tmp_path):
    """The folder of the second encoder holds what no run made: said at once, not after hours."""
    put(tmp_path / 'out' / 'a-untrained', None, ('log.txt',))
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match='log.txt'):
        run_here('lab/probe.py', *finished['probe'][1], f'--out_dir={tmp_path / "out"}', '--untrained', '--overwrite')
    assert snapshot(tmp_path) == before


# --- wandb ---

def fake_wandb(mode='online', key=False):
    module = types.ModuleType('wandb')
    module.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=mode))
    module.login = lambda prompt, verify: key
    return module


@pytest.fixture
def no_wandb_settings(monkeypatch):
    for name in ('WANDB_MODE', 'WANDB_API_KEY', 'WANDB_IDENTITY_TOKEN_FILE'):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize('name', ('train', 'distill'))
@pytest.mark.parametrize('module, words', [(None, 'not installed; pip install wandb'),
                                           (fake_wandb(), 'no API key; run wandb login')], ids=('package', 'key'))
def test_wandb_is_asked_for_before_any_file_is_touched(name, module, words, finished, tmp_path, monkeypatch,
                                                       no_wandb_settings):
    """--overwrite --wandb_log without wandb had deleted the finished run when the traceback came."""
    script, argv = finished[name]
    argv = [*argv, f'--out_dir={tmp_path / "out"}']
    run_here(script, *argv)
    before = snapshot(tmp_path)
    monkeypatch.setitem(sys.modules, 'wandb', module)
    with pytest.raises(UserError, match=words) as e:
        run_here(script, *argv, '--overwrite', '--wandb_log')
    assert '\n' not in str(e.value) and snapshot(tmp_path) == before


@pytest.mark.parametrize('environ, module', [
    (dict(WANDB_MODE='offline'), fake_wandb()), (dict(WANDB_MODE='disabled'), fake_wandb()),
    (dict(WANDB_API_KEY='x'), fake_wandb()), ({}, fake_wandb(key=True)), ({}, fake_wandb(mode='offline'))])
def test_wandb_with_a_key_or_offline_is_let_through(environ, module, monkeypatch, no_wandb_settings):
    monkeypatch.setitem(sys.modules, 'wandb', module)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    training_run.require_wandb()


def test_wandb_that_cannot_begin_gives_the_old_run_back(finished, tmp_path, monkeypatch):
    """init asks the server, which check cannot: a wrong key is found out after the folder was opened."""
    script, argv = finished['train']
    argv = [*argv, f'--out_dir={tmp_path / "out"}']
    run_here(script, *argv)
    before = snapshot(tmp_path)
    module = fake_wandb(mode='offline')

    def refuse(**_):
        raise RuntimeError('401')
    module.init = refuse
    monkeypatch.setitem(sys.modules, 'wandb', module)
    with pytest.raises(RuntimeError, match='401'):
        run_here(script, *argv, '--overwrite', '--wandb_log')
    folders.close_run_folders()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize('script', ('train.py', 'distill.py', 'lab/probe.py'))
def test_half_an_hour_is_the_most_that_a_crash_costs(script):
    """checkpoint_time was 83,000 s by default, and max_runtime ended every run after a day."""
    defaults, _ = knobs_of(os.path.join(ROOT, script))
    assert defaults['checkpoint_time'] == 1800 and defaults['max_runtime'] == 0


# --- which folders a run may have ---

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


# --- run.json and the logs ---

BOOM = """
import sys, types
from training.folder import RunRecord
torch = types.SimpleNamespace(get_num_threads=lambda: 1)
record = RunRecord(sys.argv[1], dict(seed=3), types.SimpleNamespace(main=True, kind='cpu', world=1, torch=torch))
record.update(step=5)
raise RuntimeError('boom')
"""


@pytest.mark.slow
def test_a_process_that_ends_without_a_status_has_failed(tmp_path):
    """A crash must not leave 'running' behind."""
    assert run_script('-c', BOOM, tmp_path).returncode == 1
    assert folders.read_run(tmp_path)['status'] == 'failed' and folders.read_run(tmp_path)['step'] == 5


def test_only_rank_0_writes(tmp_path):
    """Ranks that all write one run.json overwrite each other's numbers."""
    folders.RunRecord(str(tmp_path), dict(seed=1), OneProcess(1, 2)).update(status='done')
    assert os.listdir(tmp_path) == []


def test_a_resumed_log_is_cut_back_and_takes_a_new_last_column(tmp_path):
    """A run that began before a column was added keeps its rows; a row cut by a kill goes."""
    (tmp_path / 'train_loss.csv').write_text('phase,epoch,step,loss\nmain,0,1,2.5\nmain,0,2,2.25\nmain,0,3,2.0\nmain,0')
    log, loss_file, _ = folders.open_logs(str(tmp_path), ('phase', 'epoch', 'step', 'loss', 'seconds'), 2)
    log.close()
    loss_file.close()
    lines = (tmp_path / 'train_loss.csv').read_text().splitlines()
    assert lines == ['phase,epoch,step,loss,seconds', 'main,0,1,2.5,', 'main,0,2,2.25,']
