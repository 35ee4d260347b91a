"""Distil a teacher into a smaller student: its probabilities, the next token, the direction of its last states.

    python distill.py config/distil/byte_student.py                  one process; bytes, small enough for two CPU cores
    torchrun --nproc_per_node=8 distill.py config/gpt2/distil6.py    many GPUs, same batches
    python distill.py config/gpt2/distil6.py --check                 resolved knobs and the plan, nothing is run

In: data/DATASET; teacher: a checkpoint, a Hugging Face folder or hub id. Out: OUT_DIR/{ckpt.pt, best.pt, log.txt,
train_loss.csv, loss.png, run.json} as train.py writes them; loss_nats there is the student's own cross-entropy, loss
the weighted sum. Exit 85: saved, to be continued. With a_clm = 1 and the other weights 0 this is train.py, to the last
bit on a CPU.

Per scored token, with t and s the logits of teacher and student, h their states after the final norm, τ a temperature:

    a_ce τ² KL(softmax(t/τ) || softmax(s/τ)) + a_clm CE(s, next) + a_cos (1 - cos(h_s, h_t)) + a_mse Σ(s - t)²
    + a_hidden Σ over pairs of layers |block output of s - of t|² / width

(Sanh et al. 2019, arXiv 1910.01108, with the causal loss for the masked one.) Equal models give KL and 1 - cos of
exactly 0: KL is of two log-softmaxes, and x·y/√((x·x)(y·y)) is 1 for x = y, as the root of a rounded square is exact.
"""
import functools
import math
import os
import sys
from types import SimpleNamespace

from configurator import UserError, at_least, configure, names_in, one_of, require
from training import plan

# -----------------------------------------------------------------------------
# run
out_dir = 'out/distilled'
experiment_name = ''            # a label for runs.csv
overwrite = False               # replace a finished run in out_dir
teacher = ''                    # checkpoint, run folder, Hugging Face folder or hub id
init_from = 'scratch'           # the student: 'scratch', 'resume' (all, from out_dir) or a checkpoint (step 0)
seed = 858
device = 'auto'                 # 'auto', 'cuda', 'mps', 'cpu'
dtype = 'auto'                  # 'auto', 'float32', 'bfloat16', 'float16'
compile = True                  # torch.compile of the student, on CUDA only
activation_checkpointing = False    # keep only block inputs of the student and compute the rest twice
check = False                   # print the resolved knobs and the plan, then exit
# loss
a_ce = 5.0                      # weights of the terms; 5, 2, 1, 0 and temperature 2 are DistilBERT's
a_clm = 2.0
a_cos = 1.0                     # needs a teacher of the same width
a_mse = 0.0
temperature = 2.0
a_hidden = 0.0                  # block outputs of the pairs of layer_map; same width
layer_map = ''                  # student:teacher layers from 0, '0:1,1:3'; '' = evenly spaced, last on last
freeze_positions = True         # learned positions of the student stay as they are
chunk_tokens = 256              # tokens whose logits exist at a time: 256 x 50,257 in float32 are 51 MB
# data
data_dir = 'data'
dataset = 'sample'
verify = False                  # check the SHA-256 of the data before training
order = 'permuted'              # 'permuted' (each block once per epoch), 'sequential', 'random' (with replacement)
train_only_on_leading_tokens = 0    # 0 = all
# student, as in train.py; the named size is overridden where the numbers below are > 0
model = 'transformer200k'       # transformer{200k,800k,3.2m,4.1m,308m}, gpt2{,-medium,-large,-xl}
n_layer = 0
n_head = 0
n_embd = 0
block_size = 0
dropout = 0.0
# batch and optimiser
epochs = 1.0
max_iters = 0                   # > 0: steps instead of epochs
batch_size = 8                  # sequences per step over all ranks and micro-batches
micro_batch_size = 0            # sequences per forward on one rank; 0 = batch_size / ranks
learning_rate = 1e-3
schedule = 'constant'           # 'constant', 'cosine', 'linear', after warm-up, one over the whole run
warmup_iters = 0
min_learning_rate_ratio = 0.1   # where 'cosine' and 'linear' end
beta1 = 0.9
beta2 = 0.999
adam_epsilon = 1e-8
weight_decay = 0.0              # matrices and embeddings only
grad_clip = 0.0                 # 0 = off
# logging, evaluation, saving
log_every = 1                   # steps between rows of train_loss.csv
log_interval = 100              # steps between lines of log.txt
eval_interval = 0               # steps between validations; 0 = at the end only
eval_blocks = 0                 # leading validation blocks used in training; 0 = the whole split
checkpoint_time = 1800.0        # seconds between checkpoints; 0 = only at the end and on a signal
max_runtime = 0.0               # seconds after which the run saves itself and exits with 85; 0 = off
keep_last = 1                   # checkpoints kept
wandb_log = False
wandb_project = 'nanomdl'
# the student's other switches are knobs as well: fields of ModelConfig in model.py
# -----------------------------------------------------------------------------

TERMS = ('clm', 'ce', 'mse', 'cos', 'hidden')           # in this order everywhere


def rules(k):
    """Return what must hold of the knobs, as require takes it."""
    n_ranks = int(os.environ.get('WORLD_SIZE', 1))
    weights = [f'a_{term}' for term in TERMS]
    from_zero = ('epochs', 'max_iters', 'dropout', 'eval_blocks', 'eval_interval', 'train_only_on_leading_tokens',
                 'checkpoint_time', 'max_runtime', *weights)
    from_one = ('log_every', 'log_interval', 'keep_last', 'chunk_tokens')
    return [(k.teacher != '', 'teacher is empty; name a checkpoint or hub id, --teacher=out/RUN'),
            one_of('order', k.order, ('permuted', 'sequential', 'random')),
            *plan.batch_rules(k, n_ranks), *plan.optimizer_rules(k),
            *(at_least(name, getattr(k, name), 0) for name in from_zero),
            *(at_least(name, getattr(k, name), 1) for name in from_one),
            (k.temperature > 0, f'temperature = {k.temperature}, expected > 0'),
            (any(getattr(k, name) for name in weights), 'all weights of the loss are 0; set a_ce or a_clm'),
            (not k.wrapper, f'wrapper = {k.wrapper!r}, but a student predicts the next token and has no encoder;'
             " use --wrapper=")]


config = configure(globals(), fields_of='model.ModelConfig', rules=rules)

import torch
import torch.nn as nn
import torch.nn.functional as F

import score
import sparse
from corpus.bins import key_of, split_names
from corpus.data import Batches, leading_rules, open_split, row_rule
from model import GPT, ModelConfig, config_from_knobs, flops_per_token, linear, model_args
from training import curves, parallel
from training.checkpoint import check_resume, load_model, load_weights, parent_of
from training.optim import load_states, make_optimizers, set_rate, states_of
from training.plan import Schedule
from training.process import Env, StopSignals
from training.run import Run, starting_checkpoint
from training.step import accumulate, clip, forget_gradients, unscale, update

LABEL = 'distillation'                                  # of the one phase, in logs
CSV_COLUMNS = ('phase', 'epoch', 'step', 'tokens', 'loss_nats', 'lr', 'grad_norm', 'grad_norm_penalised', 'nonzeros',
               'loss', *(f'loss_{term}' for term in TERMS[1:]), 'seconds')
FIXED = ('batch_size', 'seed', 'order', 'train_only_on_leading_tokens', 'temperature', 'layer_map', 'freeze_positions',
         'chunk_tokens', *(f'a_{term}' for term in TERMS))      # what a resumed run may not change


# --- the loss ---

class ChunkedHead(torch.autograd.Function):
    """Map states (N, C) and a head (V, C) to the sum over tokens of a weighted loss, and of its terms.

    terms_of(states, head, first) gives the terms (K,) of a chunk that begins at token `first`. A chunk's gradients are
    taken in the forward pass, so that nothing of size N x V is kept and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, states, head, weights, chunk_tokens, terms_of):
        total = weights.new_zeros(len(weights))
        grad = torch.empty_like(states)
        with torch.enable_grad():
            head = head.detach().requires_grad_()
            for i in range(0, len(states), chunk_tokens):
                chunk = states[i:i + chunk_tokens].detach().requires_grad_()
                terms = terms_of(chunk, head, i)
                (terms * weights).sum().backward()
                grad[i:i + chunk_tokens] = chunk.grad
                total = total + terms.detach()
        ctx.save_for_backward(grad, head.grad)
        ctx.mark_non_differentiable(total)
        return (total * weights).sum(), total

    @staticmethod
    def backward(ctx, scale, _):
        grad, head_grad = ctx.saved_tensors
        return grad * scale, head_grad * scale, None, None, None


def tap(model, layers):
    """Return a dict in which each forward of a GPT leaves the outputs of these blocks."""
    outputs = {}

    def keep(i):
        def hook(block, inputs, output):
            outputs[i] = output
        return hook
    for i in layers:
        model.blocks[i].register_forward_hook(keep(i))
    return outputs


def cosine_distance(a, b):
    """Return 1 - cos of vectors (..., C), exactly 0 of equal ones."""
    return 1 - (a * b).sum(-1) / ((a * a).sum(-1) * (b * b).sum(-1)).sqrt()


class Distillation(nn.Module):
    """Map rows x, targets y (B, T; -1: no score) to sums over the scored tokens (6,): the weighted loss, the terms.

    weights {term: float} by TERMS; pairs: (student's layer, teacher's). With clm alone the teacher is not asked and the
    loss is the student's own forward, to the last bit.
    """

    def __init__(self, student, teacher, weights, temperature=2.0, chunk_tokens=256, pairs=()):
        super().__init__()
        self.student = student
        self.teacher = [teacher]                # in a list: no submodule, so DDP and state_dict leave it alone
        self.weights = weights
        self.temperature = temperature
        self.chunk_tokens = chunk_tokens
        self.pairs = pairs
        self.alone = not any(weights[term] for term in TERMS[1:])
        self.outputs = tap(student, {s for s, _ in pairs})
        self.teacher_outputs = tap(teacher, {t for _, t in pairs})

    def of_logits(self, states, head, teacher_states, y):
        """Return sums over a chunk of the terms that need logits (3,): CE, KL, squared difference."""
        s = linear(states, head).float()                                            # (N, V)
        clm = F.cross_entropy(s, y, ignore_index=-1, reduction='sum')
        ce = clm.new_zeros(())
        mse = clm.new_zeros(())
        if not self.weights['ce'] and not self.weights['mse']:
            return torch.stack((clm, ce, mse))
        with torch.no_grad():
            t = linear(teacher_states, self.teacher[0].head.weight).float()         # (N, V)
        scored = (y >= 0)[:, None]
        if self.weights['ce']:
            log_s = F.log_softmax(s / self.temperature, -1)
            log_t = F.log_softmax(t / self.temperature, -1)
            divergence = F.kl_div(log_s, log_t, reduction='none', log_target=True)
            ce = self.temperature ** 2 * (divergence * scored).sum()
        if self.weights['mse']:
            mse = ((s - t).square() * scored).sum()
        return torch.stack((clm, ce, mse))

    def forward(self, x, y):
        weights = torch.tensor([self.weights[term] for term in TERMS], device=x.device)
        if self.alone:
            clm = self.student(x, y)
            others = weights.new_zeros(len(TERMS) - 1)
            return torch.cat(((weights[0] * clm)[None], clm.detach()[None], others))

        # The terms that need logits, a chunk of tokens at a time.
        with torch.no_grad():
            teacher_states = self.teacher[0].hidden(x)                              # (B, T, C)
        states = self.student.hidden(x)
        flat_teacher_states = teacher_states.flatten(0, 1)
        flat_y = y.flatten()
        n = self.chunk_tokens

        def terms_of(chunk, head, first):
            return self.of_logits(chunk, head, flat_teacher_states[first:first + n], flat_y[first:first + n])
        loss, of_logits = torch.compiler.disable(ChunkedHead.apply)(
            states.flatten(0, 1), self.student.head.weight, weights[:3], n, terms_of)

        # The terms of states: their direction at the end, and the outputs of blocks on the way.
        scored = y >= 0
        cos = weights.new_zeros(())
        if self.weights['cos']:
            cos = (cosine_distance(states.float(), teacher_states.float()) * scored).sum()
        hidden = weights.new_zeros(())
        for s, t in self.pairs:
            difference = self.outputs[s].float() - self.teacher_outputs[t].float()
            hidden = hidden + (difference.square().mean(-1) * scored).sum()
        loss = loss + weights[3] * cos + weights[4] * hidden
        return torch.cat((loss[None], of_logits, torch.stack((cos, hidden)).detach()))


# --- knobs and plan ---

def phases_of(n_batches, k):
    """Return the one phase of a run, or none where there is nothing to train."""
    return plan.plan_phases(n_batches, (0, k.epochs, 0), max_iters=k.max_iters)


def show_plan(config, k, n_ranks):
    """Print what --check promises; without the data set its steps are unknown."""
    vocab_size = ModelConfig.vocab_size
    phases = []
    try:
        data = open_split(k.data_dir, k.dataset, 'train').head(k.train_only_on_leading_tokens)
        vocab_size = data.vocab_size
        T = config_from_knobs(config, vocab_size).block_size
        phases = phases_of(Batches(data, k.order, k.seed, k.batch_size, T).n_batches, k)
    except UserError:
        pass                                            # the plan says that the data set is not there
    student_config = config_from_knobs(config, vocab_size)
    eval_rows = score.rows_per_forward(student_config.block_size)
    plan.print_plan(config, k, student_config, n_ranks, phases, eval_rows, k.dataset)


def pairs_of(layer_map, n_student, n_teacher):
    """Return the pairs (student's layer, teacher's) whose outputs are matched, from layer_map or evenly spaced."""
    pairs = [(i, (i + 1) * n_teacher // n_student - 1) for i in range(n_student)]
    fits = True
    if layer_map:
        try:
            pairs = [tuple(map(int, pair.split(':'))) for pair in names_in(layer_map)]
            fits = all(len(pair) == 2 for pair in pairs)
        except ValueError:
            fits = False
    fits = fits and bool(pairs) and all(0 <= s < n_student and 0 <= t < n_teacher for s, t in pairs)
    require((fits, f'layer_map = {layer_map!r}, expected student:teacher pairs such as 0:1,1:3 with layers below'
             f' {n_student} and {n_teacher}'))
    return pairs


def check_pair(taught, student, data, k):
    """Refuse a teacher, of checkpoint `taught`, that cannot teach a student (ModelConfig) on this data set."""
    args = taught['model_args']
    tokenizer = taught['data']['tokenizer']
    same = args['n_embd'] == student.n_embd
    widths = f"compares states of one width, teacher {args['n_embd']}, student {student.n_embd}"
    require((args['vocab_size'] == student.vocab_size and tokenizer == data.tokenizer,
             f"teacher {k.teacher!r} reads {tokenizer!r} tokens with a vocabulary of {args['vocab_size']}, data"
             f' set {k.dataset!r} holds {data.tokenizer!r} tokens with {data.vocab_size}; they must be the same'),
            (args['block_size'] >= student.block_size, f'block_size = {student.block_size}, the teacher was'
             f" built for at most {args['block_size']}"),
            (not args.get('wrapper'), f"teacher {k.teacher!r} has wrapper = {args.get('wrapper')!r}, expected a model"
             ' without an encoder'),
            (same or not k.a_cos, f'a_cos = {k.a_cos} {widths}; use --a_cos=0'),
            (same or not k.a_hidden, f'a_hidden = {k.a_hidden} {widths}; use --a_hidden=0'))


# --- pieces of the run ---

def checkpoint_of(student, masks, facts, optimizers=(), scaler=None):
    """Return what a checkpoint holds beside the counters; without optimizers weights and masks alone."""
    checkpoint = dict(facts, model=student.state_dict(), model_args=model_args(student),
                      masks=masks.saved(parallel.full))
    if optimizers:
        checkpoint['optimizer'] = states_of(optimizers, parallel.full)
        checkpoint['scaler'] = scaler.state_dict()
        checkpoint['procedure'] = {}
    return checkpoint


def validate(run, student, data, T, eval_rows, eval_blocks):
    """Return the validation loss of the student and log it; nan where the set has no validation split."""
    if data is None:
        return math.nan
    val = score.evaluate(student, data, T, eval_rows, run.env, max_blocks=eval_blocks)
    loss = val['loss_nats']
    bits_per_byte = val['bits_per_byte']
    run.note(f'val phase={LABEL} step={run.step} loss={loss:.5f} bpb={bits_per_byte:.4f}',
             val_loss=loss, val_bits_per_byte=bits_per_byte)
    return loss


if __name__ == '__main__':
    # 1. What is asked for. --check prints it and goes; the checkpoint and run.json keep the rest of the knobs.
    k = SimpleNamespace(**config)
    config.pop('check')
    config.pop('overwrite')
    n_ranks = int(os.environ.get('WORLD_SIZE', 1))
    if check:
        show_plan(config, k, n_ranks)
        sys.exit()

    # 2. This process among the others, and the signals that end a run with a checkpoint.
    signals = StopSignals(max_runtime)
    env = Env(device, dtype)

    # 3. The data.
    train_data = open_split(data_dir, dataset, 'train', verify)
    require(*leading_rules(train_only_on_leading_tokens, train_data, dataset))
    train_data = train_data.head(train_only_on_leading_tokens)
    splits = split_names(data_dir, dataset)
    val_data = open_split(data_dir, dataset, 'val', verify) if 'val' in splits else None
    test_data = open_split(data_dir, dataset, 'test', verify) if 'test' in splits else None
    student_config = config_from_knobs(config, train_data.vocab_size)
    T = student_config.block_size
    require(row_rule(train_data, dataset, T))
    data_facts = dict(dataset=dataset, sha256=train_data.sha256, start_id=train_data.start_id,
                      tokenizer=train_data.tokenizer)
    batches = Batches(train_data, order, seed, batch_size, T)
    phases = phases_of(batches.n_batches, k)
    require((phases, 'nothing to train: epochs and max_iters are 0'))
    phase = phases[0]

    # 4. The teacher, which is only asked.
    teacher_model, taught = load_model(teacher, env.device)
    check_pair(taught, student_config, train_data, k)
    pairs = []
    if a_hidden:
        pairs = pairs_of(layer_map, student_config.n_layer, taught['model_args']['n_layer'])
    teacher_model.eval().requires_grad_(False)
    teacher_model.left_padding = train_data.padded
    teacher_facts = parent_of(teacher)

    # 5. The student: fresh weights, then those of a checkpoint, or of this very run where it is continued.
    torch.manual_seed(seed)
    student = GPT(student_config).to(env.device)
    start, start_path, resumed = starting_checkpoint(init_from, out_dir, env)
    if start:
        load_weights(student, start, start_path)
    if resumed:
        check_resume(start, start_path, data_facts, config, FIXED, __file__)
        require((start['teacher']['sha256'] == teacher_facts['sha256'],
                 f'cannot resume: {teacher} is another teacher than the one the run began with'))
    if freeze_positions and student.position is not None:
        student.position.requires_grad_(False)
    student.recompute = activation_checkpointing
    student.left_padding = train_data.padded

    # 6. The loss around both, DDP around the loss, the optimiser.
    weights = {term: config[f'a_{term}'] for term in TERMS}
    loss_module = Distillation(student, teacher_model, weights, temperature, chunk_tokens, pairs)
    step_module, set_sync = parallel.parallelise(loss_module, env, compile)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    all_params = list(trained.values())
    masks = sparse.Masks(trained, start.get('masks'))
    make_adamw = functools.partial(torch.optim.AdamW, betas=(beta1, beta2), eps=adam_epsilon, lr=learning_rate,
                                   fused=env.kind in ('cuda', 'cpu'))
    optimizers = make_optimizers(trained, make_adamw, weight_decay=weight_decay)
    scaler = torch.amp.GradScaler(env.kind, enabled=env.dtype == 'float16')
    has_state = bool(start.get('optimizer'))
    if resumed and has_state:
        load_states(optimizers, start['optimizer'])
    if resumed and start.get('scaler'):
        scaler.load_state_dict(start['scaler'])
    rates = Schedule(schedule, phase.n_steps, warmup_iters, min_learning_rate_ratio)

    # 7. The run's folder, last of all: nothing above may cost an older run in it.
    parents = [teacher, start_path]
    continued = {}
    if resumed:
        parents = [teacher]
        continued = start
    parent = {}
    if start and env.main:
        parent = parent_of(start_path)
    run = Run(out_dir, config, env, signals, start=continued, counters=dict(
        nonzeros=sparse.count_nonzero(student.parameters()), best_val=math.inf, final_val_loss=math.nan))
    counters = run.counters
    of_teacher = flops_per_token(ModelConfig(**taught['model_args'])) // 3      # it goes forward only
    run.open(CSV_COLUMNS, overwrite, init_from == 'resume', parents, wandb_project if wandb_log else '', seq_length=T,
             n_params=sum(p.numel() for p in student.parameters()), n_steps=phase.n_steps, data=data_facts,
             teacher_checkpoint=teacher_facts, procedure=LABEL,
             flops_per_token=flops_per_token(student_config) + of_teacher, parent=parent)
    if resumed and not has_state:
        run.note(f'step={run.step}: {start_path} holds weights alone, so the optimiser starts afresh')
    bytes_per_token = train_data.bytes_per_target
    eval_rows = score.rows_per_forward(T)
    micro = micro_batch_size or batch_size // env.world

    # 8. Training.
    student.train()
    run.begin(LABEL, phase.n_steps, run.step)
    while run.step < phase.n_steps:
        run.begin_step()
        lr = rates.rate(run.step, learning_rate)
        set_rate(optimizers, lr)

        # This rank's rows of the global batch, forward and backward. Dropout has a seed of its own for every
        # micro-batch, so that a resumed run drops what an unbroken one drops.
        place = phase.place(run.step)
        x, y, n_scored = batches.batch(place, env.rank, env.world)
        seed_dropout = None
        if dropout:
            def seed_dropout(first_row, step=run.step):
                torch.manual_seed(key_of(seed, step, first_row, env.rank) >> 1)
        sums = accumulate(step_module, x, y, micro, env.world / n_scored, env, scaler, set_sync, seed_dropout)

        # One reduction over ranks: the losses, and whether to stop or to save after this step.
        unscale(optimizers, all_params, scaler, env, sharded=False)
        total, loss, *others = [s / n_scored for s in run.reduce(sums)]
        masks.on_gradients()
        grad_norm = parallel.norm_of(all_params, env)

        # A step that is not finite is not taken. What is pruned stays pruned, whatever moments and decay did to it.
        cure = f'a lower --learning_rate (now {learning_rate:g}), --grad_clip=1 or --dtype=float32'
        if run.check_finite(total, float(grad_norm), '', cure, scaler.is_enabled()):
            clip(all_params, grad_clip, grad_norm)
            update(optimizers, scaler)
        scaler.update()
        masks.on_weights()
        forget_gradients(optimizers)

        # The step is done: count and log it.
        run.end_step(n_scored, [loss * n_scored, total * n_scored], loss)
        norm = f'{float(grad_norm):.4g}'
        run.log_row((LABEL, place.epoch, run.step, counters['tokens'], f'{loss:.6f}', f'{lr:.4g}', norm, norm,
                     counters['nonzeros'], f'{total:.6f}', *(f'{value:.6f}' for value in others)))
        if run.step % log_interval == 0 or run.step == phase.n_steps:
            mean = run.mean(LABEL, bytes_per_token)
            mean_total = mean.of_sums[1]
            by_term = dict(zip(TERMS[1:], others))
            terms = ' '.join(f'{term}={value:.5f}' for term, value in by_term.items())
            run.note(f'train phase={LABEL} epoch={place.epoch} step={run.step} loss={mean.loss:.5f}'
                     f' bpb={mean.bits_per_byte:.4f} lr={lr:.3g} grad_norm={float(grad_norm):.3g}'
                     f" total={mean_total:.5f} {terms} nonzeros={counters['nonzeros']}"
                     f' tokens_per_second={mean.speed:.0f}',
                     train_loss=mean.loss, train_bits_per_byte=mean.bits_per_byte, lr=lr, grad_norm=float(grad_norm),
                     distillation_loss=mean_total, **{f'loss_{term}': value for term, value in by_term.items()})

        # Validate; the best student so far is kept apart.
        with run.apart():
            if run.step == phase.n_steps or eval_interval and run.step % eval_interval == 0:
                val_loss = validate(run, student, val_data, T, eval_rows, eval_blocks)
                if val_loss < counters['best_val']:
                    counters['best_val'] = val_loss
                    run.save(checkpoint_of(student, masks, run.facts(phase=LABEL, teacher=teacher_facts)), 'best.pt')
                counters['final_val_loss'] = val_loss

        # Save when it is time, or save and leave where a signal asked for it. The end has a checkpoint of its own.
        if run.step < phase.n_steps and (run.stop or run.save_due):
            facts = run.facts(phase=LABEL, teacher=teacher_facts)
            run.save(checkpoint_of(student, masks, facts, optimizers, scaler), 'ckpt.pt', keep_last)
        if run.step < phase.n_steps and run.stop:
            sys.exit(run.pause())
    run.end()

    # 9. The end: the checkpoint first, then numbers from sums over the whole test split. A resumed run that had only
    # the scoring left has its checkpoint already.
    if not resumed or start['step'] < phase.n_steps:
        facts = run.facts(phase=LABEL, teacher=teacher_facts)
        run.save(checkpoint_of(student, masks, facts, optimizers, scaler), 'ckpt.pt', keep_last)
    run.leave_at_once()
    sizes = sparse.model_sizes(student.parameters())
    totals = dict(final_train_loss=counters['final_train_loss'], final_val_loss=counters['final_val_loss'],
                  model_byte_size=sizes['nnz4_bytes'], non_zero_params=sizes['nonzeros'],
                  sparsity=1 - sizes['nonzeros'] / sizes['n_params'], bits_est_bytes=sizes['bits_est_bytes'],
                  training_runtime=round(counters['train_seconds'], 1), tokens_seen=counters['tokens'])
    if test_data:
        test = score.evaluate(student, test_data, T, eval_rows, env, progress='test split')
        totals.update(mean_test_loss=test['loss_nats'], test_bits_per_byte=test['bits_per_byte'],
                      test_accuracy=test['accuracy'])
    if env.main:
        run.note(curves.draw_run(out_dir, run.loss_file))
    run.finish(totals)
