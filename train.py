"""Train a transformer: prelude, main phase with a sparsity procedure and TAMADE pruning, fine-tuning under the mask.

    python train.py config/sample_pmmp.py                                   one process
    torchrun --nproc_per_node=8 train.py config/wiki_16mb_pmmp.py           many GPUs, same batches
    python train.py config/wiki_16mb_pmmp.py --check                        resolved knobs and the plan, nothing is run

With L the mean cross-entropy in nats per token and θ the weights, the main phase minimises

    vanilla     L
    rl1         L + alpha Σ |θ|
    drr         L + alpha Σ (1 - exp(-beta |θ|))
    pmmp        L + alpha Σ γ + Σ u [(θ - wγ)² + w²γ(1 - γ)]        minimised over θ, w, γ, maximised over u

In: data/DATASET. Out: OUT_DIR/{ckpt.pt, best.pt, log.txt, train_loss.csv, loss.png, run.json}. Exit 85: saved, to be
continued. Procedures edit gradients after backward and project after the step (Barth & von Petersenn 2025). Clipping
comes after the edit, Adam normalises both, as in their code: an alpha belongs to its optimiser and learning rate.
"""
import contextlib
import functools
import math
import os
import sys
from types import SimpleNamespace

from configurator import UserError, configure, require
from training.plan import training_rules

# -----------------------------------------------------------------------------
# run
out_dir = 'out/run'
experiment_name = ''            # a label for runs.csv
overwrite = False               # replace a finished run in out_dir
init_from = 'scratch'           # 'scratch', 'resume' (all, from out_dir) or a checkpoint (weights and masks, step 0)
seed = 858
device = 'auto'                 # 'auto', 'cuda', 'mps', 'cpu'
dtype = 'auto'                  # 'auto', 'float32', 'bfloat16', 'float16'
compile = True                  # torch.compile, on CUDA only
shard = ''                      # '' = every rank holds the whole model (DDP), 'full' = each its part (FSDP2)
cpu_offload = False             # with shard: weights and optimiser state rest in CPU memory
activation_checkpointing = False    # keep only block inputs and compute the rest twice: slower, smaller
check = False                   # print the resolved knobs and the plan, then exit
# data
data_dir = 'data'
dataset = 'sample'
data_mix = ''                   # in place of dataset: 'pubmed:0.5,uspto:0.5', shares of the rows; '' = off
stop_when = 'never'             # data_mix: 'never' (sources begin anew), 'first_exhausted' (no block is drawn twice)
verify = False                  # check the SHA-256 of the data before training
order = 'permuted'              # 'permuted' (each block once per epoch), 'sequential', 'random' (with replacement)
online = False                  # first epoch sequential, its code length is the online description length
train_only_on_leading_tokens = 0    # 0 = all
loss_on = 'text'                # row data (prepare_metadata.py): 'text', or 'text+markup' with in-line metadata
objective = 'clm'               # 'clm', 'copy', 'blank_copy', 'combined', 'autoencode', 'memory'
# model; the named size is overridden where the numbers below are > 0
model = 'transformer200k'       # transformer{200k,800k,3.2m,4.1m,308m}, gpt2{,-medium,-large,-xl}
n_layer = 0
n_head = 0
n_embd = 0
block_size = 0
dropout = 0.0
encoder_ckpt = ''               # checkpoint whose encoder to start from; '' = none
freeze_encoder = False
# procedure
procedure = 'vanilla'           # 'vanilla', 'rl1', 'drr', 'pmmp'
alpha = 0.0                     # regularisation strength
beta = 5.0                      # drr's steepness
initial_p_value = 1.0           # pmmp: keep probability at start
initial_u_value = 0.0           # pmmp: multiplier at start
procedure_learning_rate = 0.0   # pmmp's w, gamma, u; 0 = the same as theta
pmmp_state = 'exact'            # 'exact' (w, gamma, u, each with Adam's moments), 'lean' (w = theta, no moments)
regularise = 'matrices'         # 'matrices' (and embeddings) or 'all' (as published: biases and norm gains too)
# phases, in epochs; an epoch can be cut at a number of batches (0 = whole)
epochs_prelude = 0.0
epochs = 1.0
epochs_fine_tuning = 0.0
stop_epoch_at_batch_prelude = 0
stop_epoch_at_batch = 0
stop_epoch_at_batch_fine_tuning = 0
max_iters = 0                   # > 0: steps of the main phase instead of epochs
# pruning, after epochs of the main phase
do_pruning = False
first_pruning_after = 0         # epoch, from 1; 0 = once, at the end of the main phase
prune_every = 1
prune_by = 'magnitude'          # 'magnitude' (TAMADE) or 'gamma' (pmmp: drop gamma < 1/2)
tolerated_relative_loss_increase = 0.01
# batch and optimiser
batch_size = 8                  # sequences per step over all ranks and micro-batches
micro_batch_size = 0            # sequences per forward on one rank; 0 = batch_size / ranks
steps_per_chunk = 1             # update steps taken on each batch
learning_rate = 1e-3
schedule = 'constant'           # 'constant', 'cosine', 'linear', after warm-up, one over the whole run
warmup_iters = 0
min_learning_rate_ratio = 0.1   # where 'cosine' and 'linear' end
beta1 = 0.9
beta2 = 0.999
adam_epsilon = 1e-8
weight_decay = 0.0              # matrices and embeddings only
matrix_optimizer = 'adamw'      # of the blocks' matrices: 'adamw', 'muon' (AdamW then keeps the rest)
muon_rate_ratio = 1.0           # Muon's learning rate in units of learning_rate
grad_clip = 0.0                 # 0 = off
# quantisation-aware fine-tuning (codec/grid.py): the run ends on the grid that compress.py writes
qat_bits = 0.0                  # bits per non-zero weight that the grid is chosen for; 0 = off
qat_rows = 32                   # training rows on which its Fisher information is measured
bits_lambda = 0.0               # penalty on the estimated bits; 1 = a bit of weights counts as a bit of data
# logging, evaluation, saving
log_every = 1                   # steps between rows of train_loss.csv
log_interval = 100              # steps between lines of log.txt
eval_interval = 0               # steps between validations; 0 = at the end of each phase only
eval_blocks = 0                 # leading validation blocks used in training; 0 = all
final_train_blocks = 0          # leading training blocks scored at the end: 0 = all, -1 = none; a pause begins it anew
checkpoint_time = 1800.0        # seconds between checkpoints; 0 = only at the end and on a signal
max_runtime = 0.0               # seconds after which the run saves itself and exits with 85; 0 = off
keep_last = 1                   # checkpoints kept
sharded_ckpt = False            # with shard: ckpt.sharded, a folder to which each rank writes its part
wandb_log = False
wandb_project = 'nanomdl'
# the model's other switches are knobs as well: fields of ModelConfig in model.py
# -----------------------------------------------------------------------------
config = configure(globals(), fields_of='model.ModelConfig', rules=training_rules)

import torch

import score
import sparse
from codec.grid import Grid, choose_codes
from corpus.bins import key_of, read_meta
from corpus.data import Batches, Place, common_splits, open_data, open_pairs, rules
from corpus.objectives import objective_rule
from model import config_from_knobs, flops_per_token, make, model_args
from training import curves, parallel, plan
from training.checkpoint import check_resume, load_encoder, load_weights, parent_of
from training.optim import SignStep, forget, load_states, make_optimizers, set_rate, states_of
from training.plan import LN2, Schedule
from training.process import Env, StopSignals
from training.run import Run, starting_checkpoint
from training.step import accumulate, clip, forget_gradients, unscale, update

# seconds: of steps alone, over all resumptions
CSV_COLUMNS = 'phase epoch step tokens loss_nats lr grad_norm grad_norm_penalised nonzeros seconds'.split()
PAIRED = ('with_nats', 'without_nats', 'difference_nats', 'true_wins')      # of rows with and without metadata
# What a resumed run may not change.
FIXED = ('procedure', 'batch_size', 'seed', 'order', 'steps_per_chunk', 'regularise', 'train_only_on_leading_tokens',
         'online', 'loss_on', 'objective', 'freeze_encoder', 'matrix_optimizer', 'muon_rate_ratio', 'pmmp_state',
         'qat_bits', 'weight_decay', 'beta1', 'beta2', 'decoupled')


# --- the procedures ---
# Each has the moments of a step that a procedure may use. theta is the list of tensors that it penalises, this rank's
# parts of them; all work is a handful of multi-tensor operations, whatever the number of tensors.

class Vanilla:
    """Plain training: nothing is added. The others derive from it and change what they need."""

    edits = False               # does edit() do anything?
    optimizers = ()             # of what a procedure trains beside the weights
    codes = {}                  # of a grid: see codec/grid.py

    def begin(self, params, make_adamw, saved=None):
        """Start at the first step of a phase, or where a checkpoint left it; params {name: tensor}."""
        self.names = list(params)
        self.theta = list(params.values())

    def before_forward(self):
        """Change what the forward pass sees."""

    def after_backward(self):
        """Take that change back."""

    def edit(self):
        """Add the gradient of the penalty to those of the loss."""

    def project(self):
        """Bring the state back to where it is defined, after the step."""

    def forget(self, masks):
        """Drop what is remembered of weights that masks {name: bool tensor} have pruned."""

    def saved(self, view):
        """Return what a checkpoint holds; view(tensor, like): parallel.full or parallel.as_whole."""
        return {}

    def as_evaluated(self):
        """Show the model with the weights that it is scored and saved with."""
        return contextlib.nullcontext()

    def gradients(self):
        return [t.grad for t in self.theta]


class RL1(Vanilla):
    """L1 regularisation: alpha Σ|θ|.

        ∂θ += alpha·sign(θ)
    """

    edits = True

    def __init__(self, alpha):
        self.alpha = alpha

    @torch.no_grad()
    def edit(self):
        torch._foreach_add_(self.gradients(), torch._foreach_sign(self.theta), alpha=self.alpha)


class DRR(Vanilla):
    """Differentiable relaxation of the number of non-zeros: alpha Σ (1 - exp(-beta|θ|)).

        ∂θ += alpha·beta·sign(θ)·exp(-beta|θ|)

    (de Resende Oliveira, Batatia et al. 2024 as in Barth & von Petersenn, arXiv 2505.17469.)
    """

    edits = True

    def __init__(self, alpha, beta):
        self.alpha = alpha
        self.beta = beta

    @torch.no_grad()
    def edit(self):
        pull = torch._foreach_abs(self.theta)
        torch._foreach_mul_(pull, -self.beta)
        torch._foreach_exp_(pull)
        signs = torch._foreach_sign(self.theta)
        torch._foreach_addcmul_(self.gradients(), pull, signs, value=self.alpha * self.beta)


class PMMP(Vanilla):
    """Probabilistic minimax pruning (Barth & von Petersenn 2025, arXiv 2505.17469).

    A weight θ has a shadow w, a keep probability γ in [0, 1] and a multiplier u, which pulls θ to wγ. With z Bernoulli
    of mean γ the bracket is E(θ - wz)², so nothing is sampled. With d = θ - wγ:

        alpha·γ + u·(d² + w²γ(1 - γ))           minimised over θ, w, γ, maximised over u
        ∂θ += 2u·d
        ∂w  = 2uγ(w - θ)                        -2u·d·γ + 2u·wγ(1 - γ), with fewer cancelling terms
        ∂γ  = u·w(w - 2θ) + alpha               -2u·d·w + u·w²(1 - 2γ) + alpha, likewise
        ∂u  = -(d² + w²γ(1 - γ))                the optimiser minimises, so the sign turns
        after the step: γ ← clamp(γ, 0, 1)

    w starts at θ when the main phase starts, on every rank from the same θ.
    """

    edits = True
    state = ('w', 'gamma', 'u')

    def __init__(self, alpha, initial_p=1.0, initial_u=0.0):
        self.alpha = alpha
        self.initial_p = initial_p
        self.initial_u = initial_u

    @torch.no_grad()
    def begin(self, params, make_adamw, saved=None):
        super().begin(params, make_adamw)
        self.start_state()
        if saved:
            for key in self.state:
                for name, tensor, like in zip(self.names, getattr(self, key), self.theta):
                    tensor.copy_(parallel.part(saved[key][name], like))
        tensors = [t for key in self.state for t in getattr(self, key)]
        self.optimizers = [self.make_optimizer(tensors, make_adamw)]
        if saved:
            parallel.load_optimizer(self.optimizers[0], saved['optimizer'], self.likes())

    def start_state(self):
        self.w = [t.detach().clone() for t in self.theta]
        self.gamma = [torch.full_like(t, self.initial_p) for t in self.theta]
        self.u = [torch.full_like(t, self.initial_u) for t in self.theta]
        for t in self.w + self.gamma + self.u:
            t.grad = torch.zeros_like(t)

    def make_optimizer(self, tensors, make_adamw):
        return make_adamw(tensors)

    def likes(self):
        """Return the parameter that each tensor of the state lies like, in their order."""
        return len(self.state) * self.theta

    @torch.no_grad()
    def edit(self):
        theta = self.theta
        u = self.u
        gamma = self.gamma
        grad_w = [t.grad for t in self.w]
        grad_gamma = [t.grad for t in gamma]
        grad_u = [t.grad for t in u]

        # ∂θ += 2u·d
        w_gamma = torch._foreach_mul(self.w, gamma)
        d = torch._foreach_sub(theta, w_gamma)
        torch._foreach_addcmul_(self.gradients(), u, d, value=2.0)

        # ∂γ = u·w(w - 2θ) + alpha, and on the way w - θ for ∂w
        torch._foreach_copy_(grad_w, self.w)
        torch._foreach_sub_(grad_w, theta)
        torch._foreach_copy_(grad_gamma, grad_w)
        torch._foreach_sub_(grad_gamma, theta)
        torch._foreach_mul_(grad_gamma, self.w)
        torch._foreach_mul_(grad_gamma, u)
        torch._foreach_add_(grad_gamma, self.alpha)

        # ∂w = 2uγ(w - θ)
        torch._foreach_mul_(grad_w, gamma)
        torch._foreach_mul_(grad_w, u)
        torch._foreach_mul_(grad_w, 2.0)

        # ∂u = -(d² + w²γ - (w²γ)γ): w²γ(1 - γ) written so that it is never negative
        torch._foreach_copy_(grad_u, w_gamma)
        torch._foreach_mul_(grad_u, self.w)
        torch._foreach_addcmul_(grad_u, grad_u, gamma, value=-1.0)
        torch._foreach_addcmul_(grad_u, d, d)
        torch._foreach_neg_(grad_u)

    @torch.no_grad()
    def project(self):
        torch._foreach_clamp_min_(self.gamma, 0.0)
        torch._foreach_clamp_max_(self.gamma, 1.0)

    @torch.no_grad()
    def forget(self, masks):
        dropped = [masks[name] for name in self.names]
        for key in self.state:
            tensors = getattr(self, key)
            forget(self.optimizers, dict(zip(tensors, dropped)))
            if key != 'u':
                torch._foreach_mul_(tensors, dropped)

    def saved(self, view):
        state = {}
        for key in self.state:
            tensors = zip(self.names, getattr(self, key), self.theta)
            state[key] = {name: view(t.detach(), like) for name, t, like in tensors}
        return dict(state, optimizer=parallel.optimizer_state(self.optimizers[0], self.likes(), view))


class LeanPMMP(PMMP):
    """PMMP with w at its minimum, which is θ, and sign steps for γ and u: 8 bytes of state a weight instead of 36.

        alpha·γ + u·θ²(1 - γ)
        ∂θ += 2u·θ(1 - γ),   ∂γ = alpha - u·θ²,   ∂u = -θ²(1 - γ)
    """

    state = ('gamma', 'u')

    def start_state(self):
        self.gamma = [torch.full_like(t, self.initial_p) for t in self.theta]
        self.u = [torch.full_like(t, self.initial_u) for t in self.theta]

    def make_optimizer(self, tensors, make_adamw):
        return SignStep(tensors)

    @torch.no_grad()
    def edit(self):
        theta = self.theta

        # ∂θ += 2u·θ(1 - γ)
        pull = torch._foreach_neg(self.gamma)
        torch._foreach_add_(pull, 1.0)
        torch._foreach_mul_(pull, theta)
        torch._foreach_addcmul_(self.gradients(), self.u, pull, value=2.0)

        # ∂u = -θ²(1 - γ)
        torch._foreach_mul_(pull, theta)
        torch._foreach_neg_(pull)

        # ∂γ = alpha - u·θ²
        grad_gamma = torch._foreach_mul(theta, theta)
        torch._foreach_mul_(grad_gamma, self.u)
        torch._foreach_neg_(grad_gamma)
        torch._foreach_add_(grad_gamma, self.alpha)
        for tensors, gradients in ((self.gamma, grad_gamma), (self.u, pull)):
            for t, gradient in zip(tensors, gradients):
                t.grad = gradient


def make_procedure(name, k):
    """Return a procedure by its name; k: the knobs. codec.grid.Grid has the same interface and fine-tunes on a grid."""
    if name == 'rl1':
        return RL1(k.alpha)
    if name == 'drr':
        return DRR(k.alpha, k.beta)
    if name == 'pmmp' and k.pmmp_state == 'lean':
        return LeanPMMP(k.alpha, k.initial_p_value, k.initial_u_value)
    if name == 'pmmp':
        return PMMP(k.alpha, k.initial_p_value, k.initial_u_value)
    return Vanilla()


# --- data and plan ---

def open_split(split, T, k):
    """Open one split of the data set or mixture of a run, with the rows of its objective."""
    return open_data(k.data_dir, k.dataset, split, T, k.data_mix, k.stop_when, k.verify, k.loss_on, k.objective,
                     k.wrapper)


def phases_of(n_batches, k):
    """Plan prelude, main phase and fine-tuning on epochs of n_batches; a mixture may end them with its first source."""
    lengths = (k.epochs_prelude, k.epochs, k.epochs_fine_tuning)
    cuts = (k.stop_epoch_at_batch_prelude, k.stop_epoch_at_batch, k.stop_epoch_at_batch_fine_tuning)
    phases = plan.plan_phases(n_batches, lengths, cuts, k.max_iters, k.procedure, k.steps_per_chunk)
    if k.data_mix and k.stop_when == 'first_exhausted':
        return plan.cut_phases(phases, n_batches * k.steps_per_chunk)
    return phases


def prunes_after(phase, done, k):
    return k.do_pruning and plan.prunes_after(phase, done, k.first_pruning_after, k.prune_every)


def show_plan(config, k, n_ranks):
    """Print what --check promises, as far as it is known: without the data set, no steps."""
    T = config_from_knobs(config, 256).block_size
    eval_rows = score.rows_per_forward(T)
    try:
        data = open_split('train', T, k).head(k.train_only_on_leading_tokens)
    except UserError:
        plan.print_plan(config, k, config_from_knobs(config, 256), n_ranks, [], eval_rows, k.data_mix or k.dataset)
        return
    phases = phases_of(Batches(data, k.order, k.seed, k.batch_size, T).n_batches, k)
    prunings = [sum(prunes_after(phase, done + 1, k) for done in range(phase.n_steps)) for phase in phases]
    plan.print_plan(config, k, config_from_knobs(config, data.vocab_size), n_ranks, phases, eval_rows,
                    k.data_mix or k.dataset, prunings)
    if k.procedure in ('pmmp', 'drr') and not k.alpha:
        hint = plan.alpha_of_32_bits(data.n_tokens)
        print(f'hint                  alpha = 0; 32·ln2/N = {hint:.3g} makes the penalty the size of 32-bit weights')


# --- pieces of the run ---

def make_grid(model, named_params, batches, saved, env, k):
    """Return the grid to fine-tune on: a checkpoint's, or one chosen on the run's first rows by rank 0."""
    codes = saved
    if codes is None:
        first = Batches(batches.data, batches.order, batches.seed, k.qat_rows, batches.block_size)
        x, y, _ = first.batch(Place(epoch=0, batch=0, number=0))
        chosen = choose_codes(model, k.qat_bits, x, y)
        codes = {name: env.sum(code if env.main else torch.zeros_like(code)).cpu() for name, code in chosen.items()}
    return Grid(named_params, codes, k.bits_lambda * LN2 / batches.data.n_tokens)


def seed_dropout(seed, step, rank, first_row):
    """Seed what dropout draws in the micro-batch of a step that begins with a rank's row first_row."""
    torch.manual_seed(key_of(seed, step, first_row, rank) >> 1)


def mean_loss(model, data, T, eval_rows, env):
    """Return the loss on the leading validation blocks that TAMADE calibrates on, in nats per token."""
    leading = data.head(sparse.CALIBRATION_BLOCKS * T)      # of a mixture: some of each source
    sums = score.score(model, leading, T, eval_rows, env, max_blocks=sparse.CALIBRATION_BLOCKS)
    return sums['nats'] / sums['tokens']


def prune(masks, procedure, optimizers, params, loss_of, k):
    """Grow the masks by TAMADE (or γ < ½) and reset what is remembered of the dropped weights.

    Returns ε (0 where γ decides) and the losses before and after.
    """
    if k.prune_by == 'gamma':
        epsilon = None
        before = loss_of()
        new = sparse.masks_by_gamma(dict(zip(procedure.names, procedure.gamma)))
    else:
        epsilon, before, _, _ = sparse.tamade(loss_of, params, k.tolerated_relative_loss_increase)
        new = sparse.masks_by_threshold(params, epsilon)
    masks.grow(new)
    forget(optimizers, masks.by_parameter())
    procedure.forget(masks.masks)
    return epsilon, before, loss_of()


def tokens_drawn(data, step, T, k):
    """Return {source: tokens} that a mixture has drawn in `step` steps, {} for other data; a chunk counts once."""
    n_rows = math.ceil(step / k.steps_per_chunk) * k.batch_size
    return {name: rows * T for name, rows in data.rows_by_source(n_rows, k.seed).items()}


def count_nonzero(named_params, env, sharded):
    """Count the non-zero weights of the whole model, of which a rank holds a part with FSDP2."""
    of_rank = torch.tensor(float(sparse.count_nonzero(named_params.values())), dtype=torch.float64)
    return int(env.sum(of_rank) if sharded else of_rank)


def checkpoint_of(model, masks, running, facts, name, optimizers=(), scaler=None):
    """Return what a checkpoint holds beside the counters: all that the next step depends on.

    Without optimizers it is weights, masks and grid alone. A name that ends in .sharded keeps each rank's own part.
    """
    view = parallel.full
    weights = model.state_dict()
    if name.endswith('.sharded'):
        view = parallel.as_whole
    else:
        weights = {key: parallel.full(tensor) for key, tensor in weights.items()}
    checkpoint = dict(facts, model=weights, model_args=model_args(model), masks=masks.saved(view), grid=running.codes)
    if optimizers:
        checkpoint['optimizer'] = states_of(optimizers, view)
        checkpoint['scaler'] = scaler.state_dict()
        checkpoint['procedure'] = running.saved(view)
    return checkpoint


def validate(run, phase, model, data, pair_sets, T, eval_rows, eval_blocks):
    """Return the validation loss and {type: losses of paired rows}, and log them; a set without val has none."""
    if data is None:
        return math.nan, {}
    val = score.evaluate(model, data.head(eval_blocks * T), T, eval_rows, run.env)
    paired = {}
    for kind, arms in pair_sets.items():
        numbers = next(score.evaluate_pairs(model, arms, eval_rows, run.env, 0, eval_blocks))
        paired[kind] = {key: numbers[key] for key in PAIRED if key in numbers}
        shown = ' '.join(f'{key}={value:.5f}' for key, value in paired[kind].items())
        run.note(f'pairs type={kind} step={run.step} {shown}',
                 **{f'{kind}_{key}': value for key, value in paired[kind].items()})
    loss = val['loss_nats']
    bits_per_byte = val['bits_per_byte']
    run.note(f'val phase={phase.name} step={run.step} loss={loss:.5f} bpb={bits_per_byte:.4f}',
             val_loss=loss, val_bits_per_byte=bits_per_byte)
    return loss, paired


def final_numbers(model, train_data, test_data, T, eval_rows, env, sizes, n_train_blocks):
    """Return the numbers of whole splits: training text (n_train_blocks of it, 0 = all, -1 = none) and test text."""
    totals = {}
    if n_train_blocks >= 0:
        train = score.evaluate(model, train_data.head(n_train_blocks * T), T, eval_rows, env, progress='train split')
        data_bytes = round(train['data_bytes'])
        totals.update(mean_train_loss=train['loss_nats'], train_bits_per_byte=train['bits_per_byte'],
                      train_data_bytes=data_bytes, description_length_nnz4_bytes=data_bytes + sizes['nnz4_bytes'],
                      description_length_bits_est_bytes=data_bytes + sizes['bits_est_bytes'])
    if test_data:
        test = score.evaluate(model, test_data, T, eval_rows, env, progress='test split')
        totals.update(mean_test_loss=test['loss_nats'], test_bits_per_byte=test['bits_per_byte'],
                      test_accuracy=test['accuracy'])
    return totals


if __name__ == '__main__':
    # 1. What is asked for. --check prints it and goes; the checkpoint and run.json keep the rest of the knobs.
    k = SimpleNamespace(**config)
    config.pop('check')
    config.pop('overwrite')
    if check:
        show_plan(config, k, int(os.environ.get('WORLD_SIZE', 1)))
        sys.exit()

    # 2. This process among the others, and the signals that end a run with a checkpoint.
    signals = StopSignals(max_runtime)
    env = Env(device, dtype)

    # 3. The data. Batches are a pure function of the place in the run, so nothing of them is ever saved.
    T = config_from_knobs(config, 256).block_size
    data_name = data_mix or dataset
    train_data = open_split('train', T, k)
    splits = common_splits(data_dir, dataset, data_mix)
    require(*rules(k, train_data, data_name, splits, T))
    train_data = train_data.head(train_only_on_leading_tokens)
    val_data = open_split('val', T, k) if 'val' in splits else None
    test_data = open_split('test', T, k) if 'test' in splits else None
    require((not do_pruning or val_data.n_tokens > 0, f'the val split of {data_name!r} is empty, and TAMADE needs it'))
    has_pairs = train_data.row_length and 'pairs' in read_meta(data_dir, dataset)
    pair_sets = open_pairs(data_dir, dataset) if has_pairs else {}
    data_facts = dict(dataset=data_name, sha256=train_data.sha256, start_id=train_data.start_id,
                      tokenizer=train_data.tokenizer, n_tokens=train_data.n_tokens)
    batches = Batches(train_data, order, seed, batch_size, T)
    phases = phases_of(batches.n_batches, k)
    n_steps = sum(phase.n_steps for phase in phases)
    require((n_steps > 0, 'nothing to train: epochs_prelude, epochs, epochs_fine_tuning and max_iters are all 0'))

    # 4. The model: fresh weights, then those of a checkpoint, or of this very run where it is continued.
    model_config = config_from_knobs(config, train_data.vocab_size)
    require(objective_rule(objective, model_config))
    torch.manual_seed(seed)
    raw_model = make(model_config).to(env.device)
    start, start_path, resumed = starting_checkpoint(init_from, out_dir, env)
    if start:
        load_weights(raw_model, start, start_path)
    if resumed:
        check_resume(start, start_path, data_facts, config, FIXED, __file__)
    if encoder_ckpt and not resumed:
        load_encoder(raw_model, encoder_ckpt)
    if freeze_encoder:
        require((getattr(raw_model, 'encoder', None), 'freeze_encoder: this model has no encoder'))
        raw_model.encoder.requires_grad_(False)
    raw_model.recompute = activation_checkpointing
    raw_model.left_padding = train_data.padded
    n_params = sum(p.numel() for p in raw_model.parameters())

    # 5. DDP or FSDP2 around it. From here on a parameter is this rank's part of it, which is the whole without FSDP2.
    step_model, set_sync = parallel.parallelise(raw_model, env, compile, shard, cpu_offload)
    named_params = {name: parallel.local(p) for name, p in raw_model.named_parameters()}
    trained = {name: named_params[name] for name, p in raw_model.named_parameters() if p.requires_grad}
    penalised = {name: named_params[name] for name in sparse.regularised(raw_model, regularise)}
    all_params = list(trained.values())
    masks = sparse.Masks(trained, start.get('masks'))

    # 6. The optimisers. A checkpoint of weights alone has no state for them.
    make_adamw = functools.partial(torch.optim.AdamW, betas=(beta1, beta2), eps=adam_epsilon, lr=learning_rate,
                                   fused=env.kind in ('cuda', 'cpu'))
    optimizers = make_optimizers(trained, make_adamw, matrix_optimizer, weight_decay, muon_rate_ratio)
    scaler = torch.amp.GradScaler(env.kind, enabled=env.dtype == 'float16')
    has_state = bool(start.get('optimizer'))
    if resumed and has_state:
        load_states(optimizers, start['optimizer'])
    if resumed and start.get('scaler'):
        scaler.load_state_dict(start['scaler'])
    schedule_of_run = Schedule(schedule, n_steps, warmup_iters, min_learning_rate_ratio)

    # 7. The run's folder, last of all: nothing above may cost an older run in it.
    run = Run(out_dir, config, env, signals, start=start if resumed else {}, counters=dict(
        online_nats=0.0, online_tokens=0, epsilon=0.0, tolerance_spent=0.0, n_prunings=0, nonzeros=0,
        best_val=math.inf, final_val_loss=math.nan))
    counters = run.counters
    parents = [encoder_ckpt] if resumed else [encoder_ckpt, start_path]
    run.open(CSV_COLUMNS, overwrite, init_from == 'resume', parents, wandb_project if wandb_log else '', seq_length=T,
             n_params=n_params, n_steps=n_steps, data=data_facts, flops_per_token=flops_per_token(model_config),
             parent=parent_of(start_path) if start and env.main else {})
    eval_rows = score.rows_per_forward(T)
    bytes_per_token = train_data.bytes_per_target
    rows_per_rank = batch_size // env.world
    micro = micro_batch_size or rows_per_rank
    paired = {}
    if stop_when == 'first_exhausted' and data_mix and env.main:
        print(f'the run has {n_steps:,} steps; the first source of the mixture is exhausted after'
              f' {batches.n_batches * steps_per_chunk:,}')
    if alpha and procedure in ('drr', 'pmmp') or procedure == 'pmmp':
        run.note(f'alpha = {alpha:g}; the penalty equals a code of 32-bit weights at 32·ln2/N ='
                 f' {plan.alpha_of_32_bits(train_data.n_tokens):.3g}')
    if resumed and not has_state:
        run.note(f'step={run.step}: {start_path} holds weights alone, so the optimisers (and w, gamma, u) start afresh')

    # 8. Training, phase by phase.
    ckpt_name = 'ckpt.sharded' if sharded_ckpt else 'ckpt.pt'
    held_bytes = 0                      # weights, masks, procedure, optimisers of this rank
    running = Vanilla()                 # the procedure of the phase
    raw_model.train()
    for phase in phases:
        done = run.step - phase.first_step
        if done >= phase.n_steps:
            continue

        # The procedure starts where the phase starts, or goes on where a checkpoint left it.
        goes_on = resumed and done > 0
        if qat_bits and phase.name == 'fine_tuning':
            running = make_grid(raw_model, named_params, batches, start.get('grid') if goes_on else None, env, k)
        else:
            running = make_procedure(phase.procedure, k)
            running.begin(penalised, functools.partial(make_adamw, weight_decay=0.0),
                          start.get('procedure') if goes_on else None)
        if done == 0:
            counters['best_val'] = math.inf
            counters['nonzeros'] = count_nonzero(named_params, env, shard)
        run.begin(f'{phase.name} ({phase.procedure})', phase.n_steps, done)
        while done < phase.n_steps:
            run.begin_step()

            # The learning rate of this step. w, γ and u may have a rate of their own; the schedule is the same.
            lr = schedule_of_run.rate(run.step, learning_rate)
            set_rate(optimizers, lr)
            set_rate(running.optimizers, schedule_of_run.rate(run.step, procedure_learning_rate or learning_rate))

            # This rank's rows of the global batch, forward and backward. Dropout has a seed of its own for every
            # micro-batch, so that a resumed run drops what an unbroken one drops.
            place = phase.place(done, online)
            x, y, n_scored = batches.batch(place, env.rank, env.world)
            before_each = functools.partial(seed_dropout, seed, run.step, env.rank) if dropout else None
            running.before_forward()
            nats = accumulate(step_model, x, y, micro, env.world / n_scored, env, scaler, set_sync, before_each)
            running.after_backward()

            # One reduction over ranks: the loss, and whether to stop or to save after this step.
            unscale(optimizers, all_params, scaler, env, shard)
            total_nats, = run.reduce(nats)
            loss = total_nats / n_scored

            # The procedure adds the gradient of its penalty; the norm is logged without and with it. Gradients of
            # pruned weights are no part of either: they would make clipping throttle the weights that are left.
            masks.on_gradients()
            grad_norm = penalised_norm = parallel.norm_of(all_params, env)
            if running.edits:
                running.edit()
                masks.on_gradients()
                penalised_norm = parallel.norm_of(all_params, env)

            # A step that is not finite is not taken. fp16 may skip some, with a lower scale each time.
            cure = f'a lower --learning_rate (now {learning_rate:g}), --grad_clip=1 or --dtype=float32'
            if run.check_finite(loss, float(penalised_norm), f' of {phase.name}', cure, scaler.is_enabled()):
                clip(all_params, grad_clip, penalised_norm)
                update(optimizers, scaler)
                for optimizer in running.optimizers:
                    optimizer.step()
            scaler.update()

            # What is pruned stays pruned, whatever moments and weight decay did to it.
            running.project()
            masks.on_weights()
            forget_gradients(optimizers)

            # The step is done: count and log it. The online length counts each byte once, before its first update.
            done += 1
            run.end_step(n_scored, [loss * n_scored], loss)
            if place.sequential and (run.step - 1) % steps_per_chunk == 0:
                counters['online_nats'] += loss * n_scored
                counters['online_tokens'] += n_scored
            run.log_row((phase.name, place.epoch, run.step, counters['tokens'], f'{loss:.6f}', f'{lr:.4g}',
                         f'{float(grad_norm):.4g}', f'{float(penalised_norm):.4g}', counters['nonzeros']))

            # Now and then a line for log.txt, with the mean of the steps since the last one.
            if run.step % log_interval == 0 or done == phase.n_steps:
                mean = run.mean(phase.name, bytes_per_token)
                drawn = tokens_drawn(train_data, run.step, T, k)
                sources = ''.join(f' drawn_{name}={n}' for name, n in drawn.items())
                run.note(f'train phase={phase.name} epoch={place.epoch} step={run.step} loss={mean.loss:.5f}'
                         f' bpb={mean.bits_per_byte:.4f} lr={lr:.3g} grad_norm={float(grad_norm):.3g}'
                         f" nonzeros={counters['nonzeros']} tokens_per_second={mean.speed:.0f}{sources}",
                         train_loss=mean.loss, train_bits_per_byte=mean.bits_per_byte, lr=lr,
                         grad_norm=float(grad_norm), grad_norm_penalised=float(penalised_norm))

            # Prune after the epochs that ask for it. What counts as best is measured anew from there.
            with run.apart():
                if prunes_after(phase, done, k):
                    loss_of = functools.partial(mean_loss, raw_model, val_data, T, eval_rows, env)
                    epsilon, before, after = prune(masks, running, optimizers, penalised, loss_of, k)
                    if epsilon is not None:
                        counters['epsilon'] = epsilon
                    counters['tolerance_spent'] += after / before - 1
                    counters['n_prunings'] += 1
                    counters['best_val'] = math.inf
                    counters['nonzeros'] = count_nonzero(named_params, env, shard)
                    run.note(f"prune by={prune_by} phase={phase.name} step={run.step} epsilon={counters['epsilon']:.7f}"
                             f' loss_before={before:.5f} loss_after={after:.5f} nonzeros={counters["nonzeros"]}'
                             f" sparsity={1 - counters['nonzeros'] / n_params:.4f}"
                             f" tolerance_spent={counters['tolerance_spent']:.4f}",
                             nonzeros=counters['nonzeros'], epsilon=counters['epsilon'])

                # Validate at the end of the phase, and in between where asked to; the best weights are best.pt.
                if done == phase.n_steps or eval_interval and run.step % eval_interval == 0:
                    with running.as_evaluated():
                        val_loss, pairs = validate(run, phase, raw_model, val_data, pair_sets, T, eval_rows,
                                                   eval_blocks)
                        paired.update(pairs)
                        if val_loss < counters['best_val']:
                            counters['best_val'] = val_loss
                            facts = run.facts(phase=phase.name, drawn=tokens_drawn(train_data, run.step, T, k))
                            run.save(checkpoint_of(raw_model, masks, running, facts, 'best.pt'), 'best.pt')
                        counters['final_val_loss'] = val_loss

            # Save when it is time, or save and leave where a signal asked for it. The end has a checkpoint of its own.
            if run.step < n_steps and (run.stop or run.save_due):
                facts = run.facts(phase=phase.name, drawn=tokens_drawn(train_data, run.step, T, k))
                run.save(checkpoint_of(raw_model, masks, running, facts, ckpt_name, optimizers, scaler), ckpt_name,
                         keep_last)
            if run.step < n_steps and run.stop:
                sys.exit(run.pause())
        held_bytes = max(held_bytes, parallel.held_bytes(
            all_params + list(masks.masks.values()), [*optimizers, *running.optimizers]))
        run.end()

    # 9. The end: the checkpoint first, then every number from sums over whole splits. A resumed run that had only the
    # scoring left has its checkpoint already.
    if not resumed or start['step'] < n_steps:
        running.before_forward()
        facts = run.facts(phase=phases[-1].name, drawn=tokens_drawn(train_data, run.step, T, k))
        run.save(checkpoint_of(raw_model, masks, running, facts, ckpt_name, optimizers, scaler), ckpt_name, keep_last)
    run.leave_at_once()
    sizes = sparse.model_sizes(parallel.full(t, t) for t in named_params.values())
    is_online = counters['online_tokens'] == train_data.n_tokens
    totals = dict(final_train_loss=counters['final_train_loss'], final_val_loss=counters['final_val_loss'],
                  epsilon=counters['epsilon'], model_byte_size=sizes['nnz4_bytes'], non_zero_params=sizes['nonzeros'],
                  sparsity=1 - sizes['nonzeros'] / sizes['n_params'], bits_est_bytes=sizes['bits_est_bytes'],
                  training_runtime=round(counters['train_seconds'], 1), tokens_seen=counters['tokens'],
                  tolerance_spent=counters['tolerance_spent'], n_prunings=counters['n_prunings'],
                  held_bytes_per_rank=held_bytes,
                  online_description_length_bytes=round(counters['online_nats'] / LN2 / 8) if is_online else None)
    if data_mix:
        totals['drawn'] = tokens_drawn(train_data, run.step, T, k)
    for kind, numbers in paired.items():
        totals.update({f'pairs_{kind}_{key}': value for key, value in numbers.items()})
    totals.update(final_numbers(raw_model, train_data, test_data, T, eval_rows, env, sizes, final_train_blocks))
    if env.main:
        run.note(curves.draw_run(out_dir, run.loss_file))
    run.finish(totals)
