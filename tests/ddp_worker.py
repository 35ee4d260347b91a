"""What the ranks of a torchrun launch do for tests: several trainings in one process group, θ saved per rank.

    torchrun --standalone --nproc_per_node=2 tests/ddp_worker.py JOBS.json     [[name, stop rank, step, flags], ...]

With DDP ranks draw their initial weights from different seeds: what is copied before its broadcast would differ. FSDP2
has no broadcast, each rank keeps its rows of the one seeded start.
"""
import json
import os
import signal
import sys

import torch
from conftest import run_here

import sparse
from training.plan import Schedule
from training.process import Env

rank = int(os.environ['RANK'])
real_seed = torch.manual_seed
real_sizes = sparse.model_sizes
real_rate = Schedule.rate


class Job:
    """One training, and what is put into it: the name and folder of a run, the step in which a rank gets a signal."""

    def __init__(self, name, stop_rank, stop_step, flags):
        self.name = name
        self.flags = flags
        self.folder = next(f.split('=')[1] for f in flags if f.startswith('--out_dir='))
        self.stop_step = stop_step if rank == stop_rank else -1
        self.seed_spread = 0 if '--shard=full' in flags else 1000

    def path(self, what):
        return os.path.join(self.folder, f'{self.name}-{what}-{rank}')

    def seed(self, seed):
        return real_seed(seed + self.seed_spread * rank)

    def sizes(self, tensors):
        """Save this rank's weights where the sizes of the final model are taken."""
        tensors = list(tensors)
        torch.save([t.detach() for t in tensors], self.path('theta') + '.pt')
        return real_sizes(tensors)

    def rate(self, step):
        if step == self.stop_step:
            os.kill(os.getpid(), signal.SIGUSR1)

    def change(self, names):
        """Save θ and w where PMMP starts its phase."""
        real_begin = names['PMMP'].begin

        def begin(procedure, params, *more):
            real_begin(procedure, params, *more)
            kept = dict(theta=[p.detach().clone() for p in params.values()],
                        w=[w.clone() for w in getattr(procedure, 'w', ())])
            torch.save(kept, self.path('start') + '.pt')
        names['PMMP'].begin = begin

    def run(self):
        """Run train.py with all of it; its exit status goes to a file."""
        def rate(schedule, step, peak):
            self.rate(step)
            return real_rate(schedule, step, peak)
        torch.manual_seed = self.seed
        sparse.model_sizes = self.sizes
        Schedule.rate = rate
        status = run_here('train.py', *self.flags, change=self.change)
        with open(self.path('status'), 'w') as f:
            f.write(str(status))


if __name__ == '__main__':
    Env.close = lambda self: None                           # one process group for all trainings
    with open(sys.argv[1]) as f:
        jobs = json.load(f)
    for job in jobs:
        Job(*job).run()
    torch.distributed.destroy_process_group()
