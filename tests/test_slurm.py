"""slurm/: the commands that result from a submission, exit codes and requeues; and signals and deaths of real ranks.

srun, scontrol and nvidia-smi are small scripts on the PATH that note how they were called. Ranks are found in /proc.
"""
import csv
import glob
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, run_here

import configurator
import train
from training.checkpoint import load_checkpoint
from training.folder import read_run, read_status

SCRIPTS = sorted(glob.glob(os.path.join(ROOT, 'slurm', '*.sbatch')))
LISTS = sorted(glob.glob(os.path.join(ROOT, 'slurm', 'sweeps', '*.txt')))
SRUN = '''#!/usr/bin/env bash
printf '%q ' srun "$@" >> "$CALLS"; echo >> "$CALLS"
for word in "$@"; do [[ $word != --out_dir=* ]] || folder=${word#*=}; done
save() { mkdir -p "$folder"; echo "{\\"status\\": \\"$1\\", \\"pid\\": $$}" > "$folder/run.json"; }
case $STATUS in
    real) while [[ $1 == -* ]]; do shift; done; exec "$@" ;;
    wait) trap 'save paused; exit 1' USR1; trap 'save killed; exit 1' TERM
          echo ready >> "$CALLS"; for _ in {1..200}; do sleep 0.05; done ;;
    silent) exit 1 ;;
    *) save "$STATUS"; [[ $STATUS == done ]] ;;
esac
'''
SCONTROL = '''#!/usr/bin/env bash
if [[ $1 == show ]]; then [[ -z $3 ]] || tr ',' '\\n' <<< "$3"; else echo scontrol "$@" >> "$CALLS"; fi
'''


class Cluster:
    """A folder that looks like the repository, and a PATH with a pretended SLURM."""

    def __init__(self, folder):
        self.folder, self.bin, self.calls = folder, folder / 'bin', folder / 'calls'
        self.bin.mkdir(parents=True)
        for name in ('train.py', 'runs.py', 'slurm', 'config'):
            (folder / name).symlink_to(os.path.join(ROOT, name))
        self.command('srun', SRUN)
        self.command('scontrol', SCONTROL)
        self.command('python', f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        self.command('nvidia-smi', '#!/bin/sh\nexit 9\n')

    def command(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, script, *argv, status='done', **environ):
        """Start an sbatch script as SLURM would; returns the process."""
        self.calls.write_text('')
        clean = {k: v for k, v in os.environ.items() if not k.startswith('SLURM')}
        job = dict(SLURM_JOB_ID='4711', SLURM_JOB_NAME='nano', SLURM_JOB_NODELIST='n1', CALLS=str(self.calls),
                   STATUS=status, PATH=f'{self.bin}:/usr/bin:/bin')
        return subprocess.Popen(['bash', f'slurm/{script}', *map(str, argv)], cwd=self.folder, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean | job | environ)

    def submit(self, *argv, **environ):
        """Return (exit code, srun's arguments, scontrol's calls, stderr) of an sbatch script that ran to its end."""
        process = self.start(*argv, **environ)
        return self.outcome(process)

    def outcome(self, process, timeout=60):
        _, err = process.communicate(timeout=timeout)
        lines = self.calls.read_text().splitlines()
        srun = next((shlex.split(line) for line in lines if line.startswith('srun')), [])
        return process.returncode, srun, [line for line in lines if line.startswith('scontrol')], err


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path / 'cluster')


@pytest.mark.parametrize('path', SCRIPTS, ids=os.path.basename)
def test_scripts_parse(path):
    """A syntax error would show after hours in a queue; shellcheck is asked where it is installed."""
    for command in (['bash', '-n', path], ['shellcheck', path]):
        if shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stdout + done.stderr


def test_the_two_scripts_ask_slurm_for_the_same():
    """sweep.sbatch hands over to train.sbatch, whose own #SBATCH lines are then only comments."""
    asked = [[line for line in open(p) if line.startswith('#SBATCH') and 'job-name' not in line] for p in SCRIPTS]
    assert asked[0] == asked[1] and '#SBATCH --signal=B:USR1@300\n' in asked[0] and '#SBATCH --requeue\n' in asked[0]


def test_one_node(cluster):
    """One torchrun with a process per GPU, a free port, and resume, which also serves the first start."""
    code, srun, calls, err = cluster.submit('train.sbatch', 'config/wiki_16mb_pmmp.py', '--experiment_name=a b',
                                            SLURM_GPUS_ON_NODE='4', SLURM_CPUS_PER_TASK='6')
    assert code == 0 and not calls, err
    at = srun.index('train.py')
    assert srun[:4] == ['srun', '--kill-on-bad-exit=1', '--ntasks-per-node=1', '--cpus-per-task=6']
    assert srun[4:7] == ['python', '-m', 'torch.distributed.run']
    assert srun[7:at] == ['--nnodes=1', '--nproc_per_node=4', '--rdzv_backend=c10d', '--rdzv_id=4711',
                          '--rdzv_endpoint=localhost:0', '--signals-to-handle=SIGTERM,SIGINT,SIGUSR1',
                          '--shutdown-timeout=270']
    assert srun[at:] == ['train.py', 'config/wiki_16mb_pmmp.py', '--experiment_name=a b', '--out_dir=out/nano-4711',
                         '--init_from=resume']


def test_two_nodes_meet_on_the_first_host(cluster):
    """c10d rendezvous: every node is told the same host and port, and no cpus-per-task is made up."""
    code, srun, _, err = cluster.submit('train.sbatch', 'config/wiki_9gb_pmmp.py', SLURM_JOB_NODELIST='n07,n09',
                                        SLURM_GPUS_ON_NODE='8', SLURM_JOB_ID='1234567')
    assert code == 0, err
    for flag in ('--nnodes=2', '--nproc_per_node=8', '--rdzv_endpoint=n07:24567', '--rdzv_id=1234567'):
        assert flag in srun
    assert not any(w.startswith('--cpus-per-task') for w in srun)


@pytest.mark.parametrize('listed, expected', [('GPU 0: A\nGPU 1: A\n', 2), ('', 1)])
def test_gpus_are_counted_where_slurm_does_not_say(cluster, listed, expected):
    """A cluster without GRES, and one without GPUs, where torchrun's --nproc_per_node=gpu would fail."""
    cluster.command('nvidia-smi', f"#!/bin/sh\nprintf '{listed}'\n")
    assert f'--nproc_per_node={expected}' in cluster.submit('train.sbatch', 'config/sample_pmmp.py')[1]


def test_virtual_environment_is_used_where_there_is_one(cluster):
    """The batch shell has not activated anything."""
    (cluster.folder / '.venv' / 'bin').mkdir(parents=True)
    shutil.copy(cluster.bin / 'python', cluster.folder / '.venv' / 'bin' / 'python')
    assert '.venv/bin/python' in cluster.submit('train.sbatch', 'config/sample_pmmp.py')[1]


def test_out_dir_and_init_from_of_the_user(cluster):
    """An own folder is the one whose status counts; a starting checkpoint is for the first start, not for a requeue."""
    for flags in (['--out_dir=out/mine', '--init_from=out/base'], ['--init-from=out/base', '--out-dir=out/mine']):
        code, srun, _, err = cluster.submit('train.sbatch', *flags)
        assert code == 0 and srun[-2:] == ['--out_dir=out/mine', '--init_from=out/base'], err
    for name in ('ckpt.pt', 'ckpt.sharded'):
        (cluster.folder / 'out' / 'mine' / name).touch()
        assert cluster.submit('train.sbatch', *flags)[1][-2:] == ['--out_dir=out/mine', '--init_from=resume']
        (cluster.folder / 'out' / 'mine' / name).unlink()


@pytest.mark.parametrize('status, code, requeues, words', [
    ('done', 0, 0, ''), ('paused', 0, 1, ''), ('failed', 1, 0, 'did not finish'), ('running', 1, 0, 'did not finish'),
    ('silent', 1, 0, 'did not finish')])
def test_status_decides(cluster, status, code, requeues, words):
    """torchrun ends with 1 for a pause and for a crash: run.json knows which; a crash must not be queued again."""
    found = cluster.submit('train.sbatch', 'config/sample_pmmp.py', status=status)
    assert found[0] == code and found[2] == ['scontrol requeue 4711'] * requeues and words in found[3], found


def test_an_older_pause_is_not_a_pause_of_this_job(cluster):
    """A requeued job whose ranks die at start leaves run.json as it was: paused, requeued, paused, for ever."""
    assert cluster.submit('train.sbatch', status='paused')[2]
    code, _, calls, err = cluster.submit('train.sbatch', status='silent')
    assert code == 1 and not calls and 'did not get to train' in err


@pytest.mark.parametrize('number, code, requeues', [(signal.SIGUSR1, 0, 1), (signal.SIGTERM, 1, 0)])
def test_signals_reach_the_ranks_as_usr1(cluster, number, code, requeues):
    """srun kills its tasks on SIGTERM; a job that is being cancelled saves and must not requeue itself."""
    process = cluster.start('train.sbatch', status='wait')
    wait_for(lambda: 'ready' in cluster.calls.read_text(), 20, process)
    process.send_signal(number)
    found = cluster.outcome(process)
    assert read_status(cluster.folder / 'out' / 'nano-4711') == 'paused'       # not killed
    assert found[0] == code and len(found[2]) == requeues, found


def test_array_task_takes_its_line(cluster):
    """Task 2 of a list: comments do not count, words after the list win, the folder names array and task."""
    (cluster.folder / 'list.txt').write_text('# launch\n\n--alpha=1\n--alpha=2 --seed=3\n')
    array = dict(SLURM_ARRAY_JOB_ID='900', SLURM_JOB_ID='902', SLURM_JOB_NAME='sweep')
    code, srun, calls, err = cluster.submit('sweep.sbatch', 'list.txt', '--seed=4', '--experiment_name=a b',
                                            status='paused', SLURM_ARRAY_TASK_ID='2', **array)
    assert code == 0 and calls == ['scontrol requeue 902'], err                     # this task, not the array
    assert srun[srun.index('train.py') + 1:] == ['--alpha=2', '--seed=3', '--seed=4', '--experiment_name=a b',
                                                 '--out_dir=out/sweep-900-2', '--init_from=resume']
    for task in ('3', '0'):
        code, srun, _, err = cluster.submit('sweep.sbatch', 'list.txt', SLURM_ARRAY_TASK_ID=task, **array)
        assert code == 1 and not srun and f'has no line {task}' in err and err.count('\n') == 1


@pytest.mark.parametrize('argv, environ, words', [
    (['sweep.sbatch', 'list.txt'], {}, '--array=1-9'), (['sweep.sbatch', 'no.txt'], dict(SLURM_ARRAY_TASK_ID='1'),
                                                      "'no.txt'"),
    (['train.sbatch'], dict(SLURM_JOB_ID=''), 'SLURM_JOB_ID'),
    (['train.sbatch'], dict(SLURM_JOB_NODELIST=''), 'SLURM_JOB_NODELIST'),
    (['train.sbatch'], 'elsewhere', "repository's folder")])
def test_misuse_is_one_line(cluster, argv, environ, words):
    """No array, no list, not under SLURM, submitted from another folder: said at once, nothing is started."""
    if environ == 'elsewhere':
        (cluster.folder / 'train.py').unlink()
        environ = {}
    code, srun, _, err = cluster.submit(*argv, **environ)
    assert code == 1 and not srun and words in err and err.startswith('error: ') and err.count('\n') == 1, err


@pytest.mark.parametrize('path', LISTS, ids=os.path.basename)
def test_lists_are_valid_and_their_launch_line_covers_them(path):
    """Each line loads against train.py, no two are the same run, and --array on top ends at the last one."""
    with open(path, encoding='utf-8') as f:
        first, *rest = f.read().splitlines()
    lines = [line for line in rest if not line.startswith('#')]
    assert f'--array=1-{len(lines)}' in first and first.endswith(os.path.relpath(path, ROOT))
    values = [configurator.configure(dict(__file__=train.__file__, __doc__=''),
                                     [os.path.join(ROOT, w) if w.endswith('.py') else w for w in line.split()])
              for line in lines]
    assert len({repr(v) for v in values}) == len(lines) >= 5


# --- real ranks ---

def wait_for(condition, seconds, process):
    """Poll until condition() holds; the process must be alive meanwhile."""
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end, process.communicate(timeout=60)
        time.sleep(0.05)


def ranks_of(folder):
    """Return {rank: pid} of the processes whose command line and environment say that they are ranks of this run."""
    found = {}
    for path in glob.glob('/proc/[0-9]*'):
        try:
            with open(f'{path}/cmdline', 'rb') as f, open(f'{path}/environ', 'rb') as g:
                words, environ = f.read().split(b'\0'), g.read().split(b'\0')
        except OSError:                                     # has ended, or is another user's
            continue
        rank = next((int(e[5:]) for e in environ if e.startswith(b'RANK=')), None)
        if f'--out_dir={folder}'.encode() in words and rank is not None:
            found[rank] = int(os.path.basename(path))
    return found


def last_step(folder):
    try:
        with open(os.path.join(folder, 'train_loss.csv'), newline='') as f:
            return max([int(r['step']) for r in csv.DictReader(f) if r['step']], default=0)
    except (OSError, ValueError):
        return 0


@pytest.mark.timeout(400)
def test_two_real_ranks_die_pause_and_finish(cluster, toy, tmp_path):
    """One run, four launches: kill -9 of a rank, SIGTERM to torchrun, SIGUSR1 to the batch script, then the end.

    A dead rank must end the job in bounded time; both signals leave a checkpoint, status paused and no process.
    """
    folder = tmp_path / 'run'
    flags = [*TINY, f'--data_dir={toy}', '--dataset=toy', f'--out_dir={folder}', '--init_from=resume',
             '--procedure=pmmp', '--max_iters=1200', '--final_train_blocks=1', '--checkpoint_time=0.5',
             '--log_interval=5']
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               '--signals-to-handle=SIGTERM,SIGINT,SIGUSR1', os.path.join(ROOT, 'train.py'), *flags]

    def launch(script):
        """Start, wait until it has trained a little beyond where it resumed."""
        before = last_step(folder)
        process = (cluster.start('train.sbatch', *flags, status='real', SLURM_GPUS_ON_NODE='2') if script else
                   subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        wait_for(lambda: read_run(folder).get('step', 0) > before and len(ranks_of(folder)) == 2
                 and read_status(folder) == 'running', 60, process)
        return process, read_run(folder)['step']

    process, _ = launch(False)
    wait_for(lambda: (folder / 'ckpt.pt').exists(), 30, process)
    os.kill(ranks_of(folder)[1], signal.SIGKILL)
    killed = time.time()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and time.time() - killed < 45 and not ranks_of(folder), err
    assert 'lost contact with another rank' in err
    assert run_here('runs.py', 'status', str(folder)) == 1

    process, step = launch(False)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and not ranks_of(folder), err
    assert read_status(folder) == 'paused' and load_checkpoint(folder)['step'] >= step

    process, step = launch(True)
    process.send_signal(signal.SIGUSR1)
    code, _, calls, err = cluster.outcome(process)
    assert code == 0 and calls == ['scontrol requeue 4711'] and not ranks_of(folder), err
    assert read_status(folder) == 'paused' and load_checkpoint(folder)['step'] >= step

    code, _, calls, err = cluster.submit('train.sbatch', *flags, status='real', SLURM_GPUS_ON_NODE='2')
    assert code == 0 and not calls and read_status(folder) == 'done' and not ranks_of(folder), err
    with open(folder / 'train_loss.csv', newline='') as f:
        assert [int(r['step']) for r in csv.DictReader(f)] == list(range(1, 1201))
