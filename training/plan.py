"""What a training run will do, as pure functions: phases and steps, learning rate, prunings, memory.

Nothing here loads torch before it is needed, so that a mistyped knob is answered at once.
"""
import math
import os
from dataclasses import dataclass, replace

from configurator import at_least, one_of
from corpus.data import Place

PHASES = ('prelude', 'main', 'fine_tuning')
LN2 = math.log(2)


# --- rules about knobs, for configurator.require; k: the knobs of a script as attributes ---

def batch_rules(k, n_ranks):
    """Check the batch and what n_ranks processes hold of it."""
    micro = k.micro_batch_size or max(1, k.batch_size // n_ranks)
    per_forward = micro * n_ranks
    nearest = max(1, round(k.batch_size / per_forward)) * per_forward
    return [at_least('batch_size', k.batch_size, 1),
            at_least('micro_batch_size', k.micro_batch_size, 0),
            (k.batch_size % per_forward == 0, f'batch_size = {k.batch_size} is not a multiple of {n_ranks} ranks x'
             f' micro_batch_size {micro} = {per_forward}; the nearest that is: {nearest}')]


def optimizer_rules(k):
    """Check learning rate, schedule and AdamW."""
    from_zero = ('grad_clip', 'weight_decay', 'warmup_iters', 'adam_epsilon', 'min_learning_rate_ratio')
    return [one_of('schedule', k.schedule, ('constant', 'cosine', 'linear')),
            *(at_least(name, getattr(k, name), 0) for name in from_zero),
            (0 <= k.beta1 < 1, f'beta1 = {k.beta1}, expected 0 <= beta1 < 1'),
            (0 <= k.beta2 < 1, f'beta2 = {k.beta2}, expected 0 <= beta2 < 1'),
            (k.learning_rate > 0, f'learning_rate = {k.learning_rate}, expected > 0')]


def matrix_rules(k):
    """Check the optimiser of matrices, and the grid they are fine-tuned on."""
    packable = k.block_type == 'attention' and not k.wrapper and k.final_norm and k.positions != 'none'
    return [one_of('matrix_optimizer', k.matrix_optimizer, ('adamw', 'muon')),
            (k.matrix_optimizer != 'muon' or not k.shard, "matrix_optimizer = 'muon' needs whole matrices on each rank:"
             " use shard = '' (DDP)"),
            (k.muon_rate_ratio > 0, f'muon_rate_ratio = {k.muon_rate_ratio}, expected > 0'),
            (k.qat_bits == 0 or 1 <= k.qat_bits <= 12, f'qat_bits = {k.qat_bits}, expected 1 to 12, or 0 = off'),
            at_least('qat_rows', k.qat_rows, 1),
            at_least('bits_lambda', k.bits_lambda, 0),
            (not k.qat_bits or k.epochs_fine_tuning > 0, 'qat_bits needs epochs_fine_tuning > 0, which it begins with'),
            (not k.qat_bits or not k.shard, "qat_bits needs whole matrices on each rank: use shard = '' (DDP)"),
            (not k.qat_bits or packable,
             'qat_bits covers attention with positions and a final norm, and no wrapper; use 0'),
            (not k.bits_lambda or k.qat_bits > 0, f'bits_lambda = {k.bits_lambda} needs qat_bits > 0')]


def shard_rules(k, distributed):
    """Check FSDP2 and what belongs to it."""
    return [one_of('shard', k.shard, ('', 'full')),
            (not k.shard or distributed, "shard = 'full' needs torchrun: torchrun --nproc_per_node=2 train.py ..."),
            (k.shard or not k.cpu_offload, "cpu_offload needs shard = 'full'"),
            (k.shard or not k.sharded_ckpt, "sharded_ckpt needs shard = 'full'")]


def training_rules(k):
    """Check the knobs of train.py."""
    n_ranks = int(os.environ.get('WORLD_SIZE', 1))
    from_zero = ('alpha', 'beta', 'initial_u_value', 'epochs_prelude', 'epochs', 'epochs_fine_tuning', 'max_iters',
                 'dropout', 'eval_blocks', 'eval_interval', 'stop_epoch_at_batch', 'stop_epoch_at_batch_prelude',
                 'stop_epoch_at_batch_fine_tuning', 'first_pruning_after', 'tolerated_relative_loss_increase',
                 'train_only_on_leading_tokens', 'checkpoint_time', 'max_runtime', 'procedure_learning_rate')
    from_one = ('prune_every', 'steps_per_chunk', 'log_every', 'log_interval', 'keep_last')
    in_turn = k.order != 'random' and not k.online
    return [one_of('procedure', k.procedure, ('vanilla', 'rl1', 'drr', 'pmmp')),
            one_of('order', k.order, ('permuted', 'sequential', 'random')),
            one_of('regularise', k.regularise, ('matrices', 'all')),
            one_of('prune_by', k.prune_by, ('magnitude', 'gamma')),
            one_of('pmmp_state', k.pmmp_state, ('exact', 'lean')),
            (0 <= k.initial_p_value <= 1, f'initial_p_value = {k.initial_p_value}, expected a probability in [0, 1]'),
            one_of('stop_when', k.stop_when, ('never', 'first_exhausted')),
            one_of('loss_on', k.loss_on, ('text', 'text+markup')),
            (not k.data_mix or in_turn,
             f"data_mix = {k.data_mix!r} takes order = 'permuted' or 'sequential' and no --online"),
            *batch_rules(k, n_ranks), *optimizer_rules(k), *matrix_rules(k),
            *shard_rules(k, k.check or 'RANK' in os.environ),
            *(at_least(name, getattr(k, name), 0) for name in from_zero),
            *(at_least(name, getattr(k, name), 1) for name in from_one),
            at_least('final_train_blocks', k.final_train_blocks, -1),
            (k.prune_by != 'gamma' or k.procedure == 'pmmp', "prune_by = 'gamma' needs procedure = 'pmmp'"),
            (not (k.online and k.dropout),
             'online = True needs dropout = 0: the code length counts losses before updates'),
            (not k.online or k.init_from in ('scratch', 'resume'),
             f'online = True needs init_from = scratch, got {k.init_from!r}')]


# --- phases ---

@dataclass(frozen=True)
class Phase:
    """A part of a run: n_steps steps of one procedure, epoch_steps of them an epoch, after first_step others."""
    name: str
    procedure: str
    epoch_steps: int
    n_steps: int
    first_step: int = 0
    first_epoch: int = 0
    steps_per_chunk: int = 1

    def place(self, done, online=False):
        """Return the Place of the step that follows `done` steps of the phase; online: the first epoch in order."""
        epochs_done, inside = divmod(done, self.epoch_steps)
        epoch = self.first_epoch + epochs_done
        number = (self.first_step + done) // self.steps_per_chunk
        return Place(epoch, inside // self.steps_per_chunk, number, sequential=online and epoch == 0)


def plan_phases(n_batches, lengths, cuts=(0, 0, 0), max_iters=0, procedure='vanilla', steps_per_chunk=1):
    """Return the phases of a run whose epochs have n_batches batches.

    lengths: epochs of prelude, main phase and fine-tuning. cuts: batches after which an epoch of each ends, 0: all.
    max_iters > 0: steps of the main phase in place of its epochs. A phase without steps is left out.
    """
    phases = []
    step = 0
    epoch = 0
    for name, length, cut in zip(PHASES, lengths, cuts):
        epoch_steps = min(n_batches, cut or n_batches) * steps_per_chunk
        n_steps = round(length * epoch_steps)
        if length > 0:
            n_steps = max(n_steps, 1)
        if name == 'main' and max_iters > 0:
            n_steps = max_iters
        if not n_steps:
            continue
        its_procedure = 'vanilla'
        if name == 'main':
            its_procedure = procedure
        phases.append(Phase(name, its_procedure, epoch_steps, n_steps, step, epoch, steps_per_chunk))
        step += n_steps
        epoch += math.ceil(n_steps / epoch_steps)
    return phases


def cut_phases(phases, n_steps):
    """Return the phases of the leading n_steps steps of a run."""
    left = [(phase, min(phase.n_steps, n_steps - phase.first_step)) for phase in phases]
    return [replace(phase, n_steps=n) for phase, n in left if n > 0]


def prunes_after(phase, done, first_pruning_after, prune_every):
    """Say whether a pruning follows `done` steps of a phase: after those epochs of the main phase, or once at its end.

    first_pruning_after: epoch, from 1; 0 = once, at the end of the main phase.
    """
    if phase.name != 'main':
        return False
    if first_pruning_after == 0:
        return done == phase.n_steps
    epoch, inside = divmod(done, phase.epoch_steps)
    return inside == 0 and epoch >= first_pruning_after and (epoch - first_pruning_after) % prune_every == 0


# --- the learning rate ---

@dataclass(frozen=True)
class Schedule:
    """The learning rate of a run of n_steps: linear warm-up, then 'constant', 'linear' or 'cosine' down to a share."""
    shape: str
    n_steps: int
    warmup_iters: int = 0
    end_ratio: float = 0.1

    def rate(self, step, peak):
        """Return the rate of a step, counted from 0, where the schedule's highest is `peak`."""
        if step < self.warmup_iters:
            return peak * (step + 1) / self.warmup_iters
        if self.shape == 'constant':
            return peak
        progress = (step - self.warmup_iters) / max(1, self.n_steps - self.warmup_iters)
        height = 1 - progress
        if self.shape == 'cosine':
            height = (1 + math.cos(math.pi * progress)) / 2
        return peak * (self.end_ratio + (1 - self.end_ratio) * height)


# --- what --check prints ---

PROCEDURE_BYTES = {'exact': 48, 'lean': 8}      # of a weight's w, gamma, u, their gradients and moments; gamma and u
TEMPORARY_BYTES = {'rl1': 4, 'drr': 8, 'pmmp': 8}


def memory_by_part(config, n_parameters, k, n_ranks, wide, eval_rows):
    """Estimate the bytes that one rank holds at the peak of a run, by part.

    config: ModelConfig; n_parameters of it. wide: bytes of an activation. eval_rows: rows of a scoring forward.
    Per token a block keeps 17 C for its backward (two norms' inputs and outputs, q, k, v, attention's output twice, 4 C
    before and after the activation), 6 C more with rotary positions; 14 C are in flight, 44 C more where a block is
    recomputed; the head has three rows of V in float32. Scoring keeps nothing but has 22 C of its tokens in flight.
    What is in flight was measured on a CPU (LOG). An edit's temporaries come when the activations have gone.
    """
    C = config.n_embd
    T = config.block_size
    procedure = getattr(k, 'procedure', 'vanilla')
    held = n_parameters
    if getattr(k, 'shard', ''):
        held = n_parameters / n_ranks

    # Activations: what blocks keep for the backward pass, what is in flight, and the head's rows.
    tokens = (k.micro_batch_size or max(1, k.batch_size // n_ranks)) * T
    head = 12 * config.vocab_size
    kept_by_block = 17
    if config.positions == 'rotary':
        kept_by_block += 6
    kept = kept_by_block * config.n_layer
    if k.activation_checkpointing:
        kept = config.n_layer + 44
    training = tokens * ((kept + 14) * C * wide + head)
    scoring = eval_rows * T * (22 * C * wide + head)
    temporary = TEMPORARY_BYTES.get(procedure, 0) * held

    # Optimiser state: two moments a weight, one where a matrix is Muon's. A grid keeps the weights behind the rounded.
    optimizer = 8 * held
    if getattr(k, 'matrix_optimizer', 'adamw') == 'muon':
        optimizer -= 4 * 12 * config.n_layer * C * C
    copies = 1
    if getattr(k, 'qat_bits', 0):
        copies = 2
    of_procedure = 0
    if procedure == 'pmmp':
        of_procedure = PROCEDURE_BYTES[k.pmmp_state]
    masks = 0
    if getattr(k, 'do_pruning', False):
        masks = held
    return dict(weights=4 * held * copies, gradients=4 * held, optimizer=optimizer, procedure=of_procedure * held,
                masks=masks, activations=max(training, scoring, temporary))


def print_plan(config, k, model_config, n_ranks, phases, eval_rows, dataset, prunings=()):
    """Print resolved knobs, then parameters, FLOPs, steps, tokens, estimated hours and memory.

    phases: [] where the data set is not there yet. prunings: how many follow in each phase.
    """
    from model import flops_per_token, n_parameters
    for key, value in config.items():
        print(f'{key} = {value!r}')
    flops = flops_per_token(model_config)
    weights = n_parameters(model_config)
    tokens_per_step = k.batch_size * model_config.block_size
    print()
    print(f'parameters            {weights:,}')
    print(f'FLOPs per token       {flops:,}')
    print(f'tokens per step       {tokens_per_step:,}')
    for phase, n_prunings in zip(phases, prunings or [0] * len(phases)):
        print(f'{phase.name:<21} {phase.n_steps:,} steps of {phase.procedure}, {phase.epoch_steps:,} an epoch,'
              f' {n_prunings} prunings')
    if phases:
        tokens = sum(phase.n_steps for phase in phases) * tokens_per_step
        print(f'tokens                {tokens:,} (at most)')
        print(f'training FLOPs        {tokens * flops:.3e}')
        for speed in (1e5, 1e6):
            print(f'hours                 {tokens / speed / 3600:.2f} at {speed:,.0f} tokens/s')
    else:
        print(f'steps, tokens         unknown: run prepare_… for data set {dataset!r}')
    wide = 2 if k.dtype in ('bfloat16', 'float16') else 4
    parts = memory_by_part(model_config, weights, k, n_ranks, wide, eval_rows)
    for name, size in dict(parts, total=sum(parts.values())).items():
        print(f'memory {name:<14} {size / 2**20:,.1f} MiB per rank (estimated)')


def alpha_of_32_bits(n_tokens):
    """Return the alpha at which a penalty of 1 per weight costs what 32 bits do beside n_tokens bytes of text."""
    return 32 * LN2 / n_tokens
