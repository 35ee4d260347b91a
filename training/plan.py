"""What a training run will do, as pure functions of its knobs: phases and steps, learning rate, prunings, memory.

Imported by the scripts that train; k is their knobs as attributes (types.SimpleNamespace). Nothing here loads torch
before it is needed, so that a mistyped knob is answered at once.
"""
import math

from configurator import at_least, one_of

PHASES = ('prelude', 'main', 'fine_tuning')
LN2 = math.log(2)


def batch_rules(k, n_ranks):
    """Rules for configurator.require: the batch and what n_ranks processes hold of it."""
    micro = k.micro_batch_size or max(1, k.batch_size // n_ranks)
    per_forward = micro * n_ranks
    nearest = max(1, round(k.batch_size / per_forward)) * per_forward
    return [at_least('batch_size', k.batch_size, 1), at_least('micro_batch_size', k.micro_batch_size, 0),
            (k.batch_size % per_forward == 0, f'batch_size = {k.batch_size} is not a multiple of {n_ranks} ranks x'
             f' micro_batch_size {micro} = {per_forward}; the nearest that is: {nearest}')]


def optimizer_rules(k):
    """Rules for configurator.require: learning rate, schedule, AdamW."""
    return [one_of('schedule', k.schedule, ('constant', 'cosine', 'linear')),
            *(at_least(name, getattr(k, name), 0) for name in (
                'grad_clip', 'weight_decay', 'warmup_iters', 'adam_epsilon', 'min_learning_rate_ratio')),
            (0 <= k.beta1 < 1, f'beta1 = {k.beta1}, expected 0 <= beta1 < 1'),
            (0 <= k.beta2 < 1, f'beta2 = {k.beta2}, expected 0 <= beta2 < 1'),
            (k.learning_rate > 0, f'learning_rate = {k.learning_rate}, expected > 0')]


def matrix_rules(k):
    """Rules for configurator.require: the optimiser of matrices, and the grid they are fine-tuned on."""
    return [one_of('matrix_optimizer', k.matrix_optimizer, ('adamw', 'muon')),
            (k.matrix_optimizer != 'muon' or not k.shard, "matrix_optimizer = 'muon' needs whole matrices on each rank:"
             " use shard = '' (DDP)"),
            (k.muon_rate_ratio > 0, f'muon_rate_ratio = {k.muon_rate_ratio}, expected > 0'),
            (k.qat_bits == 0 or 1 <= k.qat_bits <= 12, f'qat_bits = {k.qat_bits}, expected 1 to 12, or 0 = off'),
            at_least('qat_rows', k.qat_rows, 1), at_least('bits_lambda', k.bits_lambda, 0),
            (not k.qat_bits or k.epochs_fine_tuning > 0, 'qat_bits needs epochs_fine_tuning > 0, which it begins with'),
            (not k.qat_bits or not k.shard, "qat_bits needs whole matrices on each rank: use shard = '' (DDP)"),
            (not k.qat_bits or k.block_type == 'attention' and not k.wrapper and k.final_norm and k.positions != 'none',
             'qat_bits covers attention with positions and a final norm, and no wrapper; use 0'),
            (not k.bits_lambda or k.qat_bits > 0, f'bits_lambda = {k.bits_lambda} needs qat_bits > 0')]


def shard_rules(k, distributed):
    """Rules for configurator.require: FSDP2 and what belongs to it."""
    return [one_of('shard', k.shard, ('', 'full')),
            (not k.shard or distributed, "shard = 'full' needs torchrun: torchrun --nproc_per_node=2 train.py ..."),
            (k.shard or not k.cpu_offload, "cpu_offload needs shard = 'full'"),
            (k.shard or not k.sharded_ckpt, "sharded_ckpt needs shard = 'full'")]


def plan_phases(n_batches, k):
    """Return the phases as dicts: name, procedure, epoch_steps, n_steps, first_step, first_epoch."""
    phases, step, epoch = [], 0, 0
    for name, length, stop in zip(PHASES, (k.epochs_prelude, k.epochs, k.epochs_fine_tuning), (
            k.stop_epoch_at_batch_prelude, k.stop_epoch_at_batch, k.stop_epoch_at_batch_fine_tuning)):
        epoch_steps = min(n_batches, stop or n_batches) * k.steps_per_chunk
        n_steps = max(round(length * epoch_steps), int(length > 0))
        if name == 'main' and k.max_iters > 0:
            n_steps = k.max_iters
        if n_steps:
            phases.append(dict(name=name, procedure=k.procedure if name == 'main' else 'vanilla',
                               epoch_steps=epoch_steps, n_steps=n_steps, first_step=step, first_epoch=epoch))
            step, epoch = step + n_steps, epoch - (-n_steps // epoch_steps)
    return phases


def cut_phases(phases, n_steps):
    """Return the phases of the leading n_steps steps of a run."""
    cut = [dict(p, n_steps=min(p['n_steps'], n_steps - p['first_step'])) for p in phases]
    return [p for p in cut if p['n_steps'] > 0]


def prunes_after(phase, step, k):
    """Say whether a pruning follows the given number of completed steps of the main phase."""
    if phase['name'] != 'main' or not k.do_pruning:
        return False
    if k.first_pruning_after == 0:
        return step == phase['n_steps']
    epoch, inside = divmod(step, phase['epoch_steps'])
    return inside == 0 and epoch >= k.first_pruning_after and (epoch - k.first_pruning_after) % k.prune_every == 0


def rate_at(step, n_steps, peak, k):
    """Learning rate of a step: linear warm-up, then the schedule over what is left of the run."""
    if step < k.warmup_iters:
        return peak * (step + 1) / k.warmup_iters
    progress = (step - k.warmup_iters) / max(1, n_steps - k.warmup_iters)
    shape = {'constant': 1.0, 'linear': 1 - progress, 'cosine': (1 + math.cos(math.pi * progress)) / 2}[k.schedule]
    low = 1.0 if k.schedule == 'constant' else k.min_learning_rate_ratio
    return peak * (low + (1 - low) * shape)


def memory_by_part(model_config, k, n_ranks, wide):
    """Estimate the bytes that one rank holds at the peak of a run, by part; wide: bytes of an activation.

    Per token a block keeps 17 C for its backward (two norms' inputs and outputs, q, k, v, attention's output twice, 4 C
    before and after the activation), 6 C more with rotary positions; 14 C are in flight, 44 C more where a block is
    recomputed; the head has three rows of V in float32. Scoring keeps nothing but has 22 C of its tokens in flight.
    What is in flight was measured on a CPU (LOG). An edit's temporaries come when the activations have gone.
    """
    from model import n_parameters
    from score import rows_per_forward
    n, c, t, layers = n_parameters(model_config), model_config.n_embd, model_config.block_size, model_config.n_layer
    tokens, head = (k.micro_batch_size or max(1, k.batch_size // n_ranks)) * t, 12 * model_config.vocab_size
    held = n / n_ranks if k.shard else n
    per_block = 23 if model_config.positions == 'rotary' else 17
    kept = layers + 44 if k.activation_checkpointing else per_block * layers
    scoring = rows_per_forward(t) * t * (22 * c * wide + head)
    temporary = 8 * held if k.procedure in ('drr', 'pmmp') else 4 * held if k.procedure == 'rl1' else 0
    momentum_only = 12 * layers * c * c if getattr(k, 'matrix_optimizer', 'adamw') == 'muon' else 0
    copies = 2 if getattr(k, 'qat_bits', 0) else 1              # rounded weights and those behind them
    procedure = 0 if k.procedure != 'pmmp' else 8 if k.pmmp_state == 'lean' else 48
    return dict(weights=4 * held * copies, gradients=4 * held, optimizer=8 * held - 4 * momentum_only,
                procedure=procedure * held, masks=held if k.do_pruning else 0,
                activations=max(tokens * ((kept + 14) * c * wide + head), scoring, temporary))


def print_plan(config, k, model_config, n_ranks, train_tokens, phases=None):
    """Print resolved knobs, then parameters, FLOPs, steps, tokens, estimated memory; train_tokens 0 = unknown."""
    from corpus.bins import n_blocks
    from model import flops_per_token, n_parameters
    for key, value in config.items():
        print(f'{key} = {value!r}')
    t, flops = model_config.block_size, flops_per_token(model_config)
    print(f'\nparameters            {n_parameters(model_config):,}\nFLOPs per token       {flops:,}\n'
          f'tokens per step       {k.batch_size * t:,}')
    tokens = min(train_tokens, k.train_only_on_leading_tokens or train_tokens)
    if tokens:
        phases = phases or plan_phases(n_blocks(n_blocks(tokens, t), k.batch_size), k)
        seen = sum(p['n_steps'] for p in phases) * k.batch_size * t
        for p in phases:
            prunings = sum(prunes_after(p, step, k) for step in range(1, p['n_steps'] + 1))
            print(f"{p['name']:<21} {p['n_steps']:,} steps of {p['procedure']}, {p['epoch_steps']:,} an epoch,"
                  f' {prunings} prunings')
        print(f'tokens                {seen:,} (at most)\ntraining FLOPs        {seen * flops:.3e}')
        if k.tokens_per_second:
            hours = seen / k.tokens_per_second / 3600
            print(f'hours                 {hours:.2f} at {k.tokens_per_second:,.0f} tokens/s')
        if k.procedure in ('pmmp', 'drr') and not k.alpha:
            print(f'hint                  alpha = 0; 32·ln2/N = {32 * LN2 / tokens:.3g} makes the penalty the size of'
                  ' 32-bit weights')
    else:
        print(f'steps, tokens         unknown: run prepare_… for data set {getattr(k, "data_mix", "") or k.dataset!r}')
    parts = memory_by_part(model_config, k, n_ranks, 2 if k.dtype in ('bfloat16', 'float16') else 4)
    for name, size in dict(parts, total=sum(parts.values())).items():
        print(f'memory {name:<14} {size / 2**20:,.1f} MiB per rank (estimated)')
