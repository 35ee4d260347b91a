"""What the ranks of a torchrun launch do for tests: several trainings in one process group, θ saved per rank.

    torchrun --standalone --nproc_per_node=2 tests/ddp_worker.py JOBS.json     [[name, stop rank, step, flags], ...]

With DDP ranks draw their initial weights from different seeds: what is copied before its broadcast would differ. FSDP2
has no broadcast, each rank keeps its rows of the one seeded start.
"""
import json
import os
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

import runs
import sparse
import train

torch.set_num_threads(1)
rank = int(os.environ['RANK'])
real_seed, real_sizes, real_state, real_rate = torch.manual_seed, sparse.model_sizes, sparse.pmmp_state, train.rate_at
runs.Env.close = lambda self: None                      # one process group for all trainings
with open(sys.argv[1]) as f:
    jobs = json.load(f)
for name, stop_rank, stop_step, flags in jobs:
    folder = next(f.split('=')[1] for f in flags if f.startswith('--out_dir='))

    def sizes(tensors, name=name, folder=folder):
        tensors = list(tensors)
        torch.save([t.detach() for t in tensors], os.path.join(folder, f'{name}-theta-{rank}.pt'))
        return real_sizes(tensors)

    def state(params, *more, name=name, folder=folder):
        made = real_state(params, *more)
        kept = dict(theta=[p.detach().clone() for p in params.values()], w=[w.clone() for w in made.get('w', ())])
        torch.save(kept, os.path.join(folder, f'{name}-start-{rank}.pt'))
        return made

    def rate(step, *more, stop_rank=stop_rank, stop_step=stop_step):
        if rank == stop_rank and step == stop_step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real_rate(step, *more)

    spread = 0 if '--shard=full' in flags else 1000
    torch.manual_seed = lambda seed, spread=spread: real_seed(seed + spread * rank)
    sparse.model_sizes, sparse.pmmp_state, train.rate_at = sizes, state, rate
    status = train.main(flags)
    with open(os.path.join(folder, f'{name}-status-{rank}'), 'w') as f:
        f.write(str(status))
torch.distributed.destroy_process_group()
