"""A run from its folder's first line to its last number: what the trainers need around their steps.

    run = Run(out_dir, config, env, signals, counters=dict(tokens=0))
    run.open(CSV_COLUMNS, overwrite=False, n_steps=n_steps, ...)        everything that can fail has been tried before
    run.begin('main (pmmp)', phase.n_steps, done)                       a bar and a window of mean numbers
    while ...:
        run.begin_step()
        sums = run.reduce(sums)                                         one reduction: losses, stop?, checkpoint due?
        run.end_step(n_scored, sums, loss)
        run.log_row(values)
        if run.stop or run.save_due: run.save(checkpoint)
        if run.stop: sys.exit(run.pause())
    run.end()
    run.finish(totals)

A study of several runs in one process (lab/probe.py) is a Run without logs, the `whole` of its runs.

Rank 0 alone writes. A checkpoint holds the counters; wall-clock time is counted over all resumptions.
"""
import contextlib
import math
import os
import sys
import time
from typing import NamedTuple

from configurator import UserError, require
from training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from training.folder import RunRecord, close_run_folders, commit_run_folders, open_logs, open_run_folder
from training.plan import LN2
from training.process import PAUSED
from training.step import MAX_SKIPPED


class Mean(NamedTuple):
    """Numbers of some steps: loss in nats per token, tokens per second, and means of all sums that were given."""
    loss: float
    bits_per_byte: float
    speed: float
    of_sums: list


class Window:
    """Sums since the last line of log.txt."""

    def __init__(self):
        self.started = time.monotonic()
        self.tokens = 0
        self.sums = None

    def add(self, n_tokens, sums):
        self.tokens += n_tokens
        self.sums = sums if self.sums is None else [a + b for a, b in zip(self.sums, sums)]

    def mean(self, bytes_per_token):
        means = [s / self.tokens for s in self.sums]
        speed = self.tokens / max(time.monotonic() - self.started, 1e-9)
        return Mean(means[0], means[0] / LN2 / bytes_per_token, speed, means)


class Run:
    """The folder, record, logs, bar, clock and checkpoints of a run on one of its ranks.

    config: its knobs. env: training.process.Env. signals: StopSignals. counters {name: number}: what a checkpoint keeps
    beside step, tokens and seconds; start: the checkpoint that is continued, or {}. whole: the Run of a study that this
    run is a part of (lab/probe.py); it pauses where a part does, and the process is its own to end.
    """

    def __init__(self, out_dir, config, env, signals, counters=None, start=None, whole=None):
        self.out_dir = out_dir
        self.checkpoint_time = config['checkpoint_time']
        self.log_every = config['log_every']
        self.config = config
        self.env = env
        self.signals = signals
        self.whole = whole
        self.counters = dict(step=0, tokens=0, train_seconds=0.0, step_seconds=0.0, final_train_loss=math.nan,
                             **(counters or {}))
        self.counters.update({name: start[name] for name in self.counters if start and name in start})
        self.stop = False
        self.save_due = False
        self.skipped = 0
        self.log = None
        self.wandb = None

    @property
    def step(self):
        return self.counters['step']

    # --- beginning ---

    def open(self, columns, overwrite=False, resume=False, parents=(), wandb_project='', **facts):
        """Take the folder and open run.json, log.txt and train_loss.csv; facts go to run.json.

        columns: of train_loss.csv; () for a study, which has no logs beside those of its runs.
        parents: checkpoints that the run reads, which may not lie in a folder that is about to be cleared.
        wandb_project: '' = no wandb.
        """
        if self.env.main:
            if wandb_project:
                require_wandb()
            open_run_folder(self.out_dir, overwrite, resume, parents)
        self.env.barrier()
        self.record = RunRecord(self.out_dir, self.config, self.env, **facts)
        if self.env.main and columns:
            self.log, self.loss_file, self.loss_csv = open_logs(self.out_dir, columns, self.step)
        if wandb_project and self.env.main:
            import wandb
            wandb.init(project=wandb_project, name=os.path.basename(self.out_dir), config=self.config, dir=self.out_dir)
            self.wandb = wandb
        self.last_saved = time.monotonic()
        self.lap_started = time.monotonic()

    def note(self, line, **numbers):
        """Write one line to log.txt and the screen, and numbers to wandb."""
        if not self.env.main:
            return
        from tqdm import tqdm
        self.log.write(f'{time.strftime("%H:%M:%S")} {line}\n')
        tqdm.write(line, file=sys.stdout)
        if self.wandb and numbers:
            self.wandb.log(numbers, step=self.step)

    # --- the steps of a phase ---

    def begin(self, label, n_steps, done=0):
        """Show a bar for a phase of n_steps, of which some are done."""
        from tqdm import tqdm
        self.bar = tqdm(total=n_steps, initial=done, desc=label, unit='step', disable=not self.env.main,
                        mininterval=1.0, dynamic_ncols=True)
        self.window = Window()

    def end(self):
        self.bar.close()

    def begin_step(self):
        self.step_started = time.monotonic()

    def reduce(self, sums):
        """Sum numbers (K,) over ranks and return them as a list; learn in passing whether to stop or to save.

        One rank that was asked to stop stops all; rank 0's clock says when a checkpoint is due.
        """
        asked = float(self.signals.asked(self.step))
        late = self.checkpoint_time and time.monotonic() - self.last_saved > self.checkpoint_time
        due = float(self.env.main and bool(late))
        *sums, stop, save_due = self.env.sum(self.env.torch.cat((sums, sums.new_tensor([asked, due])))).tolist()
        self.stop = stop > 0
        self.save_due = save_due > 0
        return sums

    def check_finite(self, loss, norm, where, cure, may_skip=False):
        """Say whether the step may be taken. A loss that is not finite ends the run before the update.

        may_skip: with fp16 a gradient that is not finite skips the step and lowers the scale, 20 times in a row.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped = 0
            return True
        self.skipped += 1
        if may_skip and math.isfinite(loss) and self.skipped < MAX_SKIPPED:
            return False
        self.record.update(status='failed', failure=f'non-finite loss {loss} or gradient norm {norm}')
        raise UserError(f'loss {loss}, gradient norm {norm} at step {self.step}{where}: stopped before the update;'
                        f' try {cure}')

    def end_step(self, n_tokens, sums, loss):
        """Count a step of n_tokens scored tokens whose losses, in nats, sum up to sums; loss: its mean."""
        self.counters['step'] += 1
        self.counters['tokens'] += n_tokens
        self.counters['final_train_loss'] = loss
        self.counters['step_seconds'] += time.monotonic() - self.step_started
        self.window.add(n_tokens, sums)
        self.bar.update()

    def log_row(self, values):
        """Write a row of train_loss.csv every log_every steps; values: all columns but the last."""
        if self.env.main and self.step % self.log_every == 0:
            self.loss_csv.writerow((*values, f"{self.counters['step_seconds']:.3f}"))

    def mean(self, phase, bytes_per_token):
        """Return the Mean since the last call, show it on the bar and in run.json, and begin anew."""
        mean = self.window.mean(bytes_per_token)
        self.window = Window()
        self.bar.set_postfix_str(f'{mean.bits_per_byte:.3f} bits/byte, {mean.speed:,.0f} tokens/s')
        self.record.update(step=self.step, train_loss=mean.loss, phase=phase, train_tokens_per_second=round(mean.speed))
        return mean

    @contextlib.contextmanager
    def apart(self):
        """Leave what is done inside, prunings and validations, out of the speed of training."""
        started = time.monotonic()
        yield
        self.window.started += time.monotonic() - started

    # --- saving, pausing, finishing ---

    def lap(self):
        """Count the time since the last call as training."""
        now = time.monotonic()
        self.counters['train_seconds'] += now - self.lap_started
        self.lap_started = now

    def facts(self, **more):
        """Return what a checkpoint says of the run it is of: knobs, data, parent."""
        return dict(config=self.config, data=self.record.values['data'], parent=self.record.values['parent'], **more)

    def save(self, checkpoint, name='ckpt.pt', keep_last=1):
        """Write a checkpoint with the counters; one whose name ends in .sharded is written by all ranks together.

        Once a run has a checkpoint to go on from, the run that it replaces is let go.
        """
        goes_on = name.startswith('ckpt.')
        if goes_on:
            self.lap()
        if self.env.main:
            self.loss_file.flush()
        if self.env.main or name.endswith('.sharded'):
            save_checkpoint(os.path.join(self.out_dir, name), dict(checkpoint, **self.counters), keep_last)
        if goes_on:
            commit_run_folders()
            self.last_saved = time.monotonic()
        self.env.barrier()

    def pause(self):
        """Say that the run was saved and waits; returns the exit status."""
        reason = self.signals.received or 'rank'
        self.bar.close()
        self.note(self.record.pause(f'step={self.step} reason={reason}', step=self.step))
        if self.whole:
            self.whole.record.pause(f'at {os.path.basename(self.out_dir)} by {reason}')
        self.close()
        return PAUSED

    def leave_at_once(self):
        """From here on, where all is saved and only scoring is left, a signal ends the run at once."""
        self.signals.leave_at_once(self._leave)

    @contextlib.contextmanager
    def scoring(self):
        """Let a signal end the run at once while what is done inside lasts; after it, signals wait for a step again."""
        self.leave_at_once()
        yield
        self.signals.leave_at_once(None)

    def _leave(self):
        line = self.record.pause(f'while scoring by {self.signals.received}')
        if self.log:
            self.log.write(f'{time.strftime("%H:%M:%S")} {line}\n')
        if self.whole:
            self.whole._leave()
        close_run_folders()
        os._exit(PAUSED)

    def finish(self, totals):
        """Write the final numbers to the log and to run.json."""
        words = [f'{name}={value:.5g}' if isinstance(value, float) else f'{name}={value}'
                 for name, value in totals.items()]
        self.note('done ' + ' '.join(words), **{name: value for name, value in totals.items() if value})
        self.done(**totals)

    def done(self, **facts):
        """Mark the run as done, with facts for run.json, and leave the process in order, if no other run follows."""
        if not self.whole:
            self.signals.close()
            commit_run_folders()
        self.record.update(status='done', **facts)
        if not self.whole:
            self.close()

    def close(self):
        """Wait for the other ranks, for the first to go may end them."""
        if self.wandb:
            self.wandb.finish()
        self.env.barrier()
        self.env.close()
        close_run_folders()


def starting_checkpoint(init_from, out_dir, env):
    """Return (checkpoint, its path, is it this run's own): what 'scratch', 'resume' or a checkpoint's name stand for.

    A run that is to be resumed but has no checkpoint yet starts from scratch: so one command serves every restart.
    """
    if init_from == 'scratch':
        return {}, '', False
    if init_from != 'resume':
        return load_checkpoint(init_from), init_from, False
    path = newest_checkpoint(out_dir)
    if os.path.exists(path):
        return load_checkpoint(path), path, True
    if env.main:
        print(f'init_from = resume, but {path} does not exist yet: starting from scratch')
    return {}, '', False


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
