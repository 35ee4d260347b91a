"""Train a transformer: prelude, main phase with a sparsity procedure and TAMADE pruning, fine-tuning under the mask.

    python train.py config/sample_pmmp.py                                   one process
    torchrun --nproc_per_node=8 train.py config/wiki_16mb_pmmp.py           many GPUs, same batches
    python train.py config/wiki_16mb_pmmp.py --check                        resolved knobs and the plan, nothing is run

In: data/DATASET. Out: OUT_DIR/{ckpt.pt, best.pt, log.txt, train_loss.csv, loss.png, run.json}. Exit 85: saved, to be
continued.
Procedures edit gradients after backward and project after the step (Barth & von Petersenn 2025).
Clipping comes after the edit, Adam normalises both, as upstream: an alpha belongs to its optimiser and learning rate.
"""
import math
import os
import time
from functools import partial
from types import SimpleNamespace

from configurator import UserError, at_least, configure, one_of, require, run
from training import plan
from training.plan import LN2, rate_at

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
tokens_per_second = 0.0         # with --check: also print hours
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
# model; the named size is overridden where the numbers below are > 0
model = 'transformer200k'       # transformer{200k,800k,3.2m,4.1m,308m}, gpt2{,-medium,-large,-xl}
n_layer = 0
n_head = 0
n_embd = 0
block_size = 0
positions = 'sinusoidal'        # 'sinusoidal', 'learned', 'rotary', 'none'
norm = 'layernorm'              # 'layernorm', 'rmsnorm'
activation = 'gelu'             # 'gelu', 'gelu_tanh', 'relu2'
tied = False                    # head shares the token embedding
bias = True
qk_norm = False
dropout = 0.0
final_norm = True
block_type = 'attention'        # 'attention', 'mixer' (one matrix over the tokens), 'multihead_mixer' (n_head of them)
kernel = 1                      # mixers: width over the features, odd
expansion = 0                   # mixers: hidden values per position and feature; 0 = one mixing, not two
# an encoder before the decoder (encoders.py), and what rows ask for
objective = 'clm'               # 'clm', 'copy', 'blank_copy', 'combined', 'autoencode', 'memory'
wrapper = ''                    # '' = none, 'autoencoder', 'oracle', 'memory' (of earlier chunks)
n_layer_encoder = 0             # 0 = as n_layer
bottleneck = 0                  # numbers in the encoder's vector; 0 = n_embd
spread = 'repeat'               # autoencoder: 'repeat' or 'unroll' the vector over the positions
memory = 'token'                # oracle: 'token', 'add', 'concat'; 'none' = control without encoder
chunk_size = 0                  # memory: tokens of a chunk
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
regularise = 'matrices'         # 'matrices' (and embeddings) or 'all' (upstream: biases and norm gains too)
decoupled = False               # apply the penalty outside Adam's normalisation, as AdamW does decay
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
# quantisation-aware fine-tuning (qat.py): the run ends on the grid that compress.py writes
qat_bits = 0.0                  # bits per non-zero weight that the grid is chosen for; 0 = off
qat_rows = 32                   # training rows on which its Fisher information is measured
bits_lambda = 0.0               # penalty on the estimated bits; 1 = a bit of weights counts as a bit of data
# logging, evaluation, saving
log_every = 1                   # steps between rows of train_loss.csv
log_interval = 100              # steps between lines of log.txt
eval_interval = 0               # steps between validations; 0 = at the end of each phase only
eval_blocks = 0                 # leading validation blocks used in training; 0 = the whole split
final_train_blocks = -1         # leading training blocks scored at the end: -1 = all, 0 = none; a pause begins it anew
checkpoint_time = 83000.0       # seconds between checkpoints; 0 = only at the end and on a signal
max_runtime = 86000.0           # seconds after which the run saves itself and exits with 85; 0 = off
keep_last = 1                   # checkpoints kept
sharded_ckpt = False            # with shard: ckpt.sharded, a folder to which each rank writes its part
wandb_log = False
wandb_project = 'nanomdl'
# -----------------------------------------------------------------------------

# seconds: of steps alone, over all resumptions
CSV_COLUMNS = 'phase epoch step tokens loss_nats lr grad_norm grad_norm_penalised nonzeros seconds'.split()
PAIRED = ('with_nats', 'without_nats', 'difference_nats', 'true_wins')      # of rows with and without metadata
MAX_SKIPPED = 20                # fp16 steps with non-finite gradients in a row


def check_knobs(k, n_ranks):
    from_zero = ('alpha', 'beta', 'initial_u_value', 'epochs_prelude', 'epochs', 'epochs_fine_tuning', 'max_iters',
                 'dropout', 'eval_blocks', 'eval_interval', 'stop_epoch_at_batch', 'stop_epoch_at_batch_prelude',
                 'stop_epoch_at_batch_fine_tuning', 'first_pruning_after', 'tolerated_relative_loss_increase',
                 'train_only_on_leading_tokens', 'checkpoint_time', 'max_runtime', 'procedure_learning_rate')
    from_one = ('prune_every', 'steps_per_chunk', 'log_every', 'log_interval', 'keep_last')
    require(one_of('procedure', procedure, ('vanilla', 'rl1', 'drr', 'pmmp')),
            one_of('order', order, ('permuted', 'sequential', 'random')),
            one_of('regularise', regularise, ('matrices', 'all')), one_of('prune_by', prune_by, ('magnitude', 'gamma')),
            one_of('pmmp_state', pmmp_state, ('exact', 'lean')),
            (0 <= initial_p_value <= 1, f'initial_p_value = {initial_p_value}, expected a probability in [0, 1]'),
            one_of('stop_when', stop_when, ('never', 'first_exhausted')),
            one_of('loss_on', loss_on, ('text', 'text+markup')),
            (not data_mix or order != 'random' and not online,
             f"data_mix = {data_mix!r} takes order = 'permuted' or 'sequential' and no --online"),
            *plan.batch_rules(k, n_ranks), *plan.optimizer_rules(k), *plan.matrix_rules(k),
            *plan.shard_rules(k, check or 'RANK' in os.environ),
            *(at_least(name, getattr(k, name), 0) for name in from_zero),
            *(at_least(name, getattr(k, name), 1) for name in from_one),
            (prune_by != 'gamma' or procedure == 'pmmp', "prune_by = 'gamma' needs procedure = 'pmmp'"),
            (not (online and dropout), 'online = True needs dropout = 0: the code length counts losses before updates'),
            (not online or init_from in ('scratch', 'resume'),
             f'online = True needs init_from = scratch, got {init_from!r}'))


def main(argv=None):
    config = configure(globals(), argv)
    config.pop('check'), config.pop('overwrite')
    n_ranks, k = int(os.environ.get('WORLD_SIZE', 1)), SimpleNamespace(**config)
    check_knobs(k, n_ranks)
    import torch

    import runs
    import score
    import sparse
    from codec import grid as qat
    from corpus.bins import batch_starts, key_of, n_blocks, read_meta
    from corpus.data import common_splits, open_data, open_pairs, rules
    from corpus.objectives import objective_rule
    from model import config_from_knobs, flops_per_token, make, model_args
    from training import curves, parallel
    from training.checkpoint import load_encoder
    from training.optim import make_optimizer
    T, data_name = config_from_knobs(config, 256).block_size, data_mix or dataset

    def open_split(split):
        return open_data(data_dir, dataset, split, T, data_mix, stop_when, verify, loss_on, objective, wrapper)

    def plan_of(data):
        """Phases of a run on some training data; a mixture may end them where its first source is exhausted."""
        if not data_mix:
            return plan.plan_phases(n_blocks(n_blocks(data.n_tokens, T), batch_size), k)
        n_batches = data.n_batches(batch_size, T, seed)
        phases = plan.plan_phases(n_batches, k)
        return phases if stop_when == 'never' else plan.cut_phases(phases, n_batches * steps_per_chunk)
    if check:
        try:
            train_data = open_split('train').head(train_only_on_leading_tokens)
        except UserError:
            return plan.print_plan(config, k, config_from_knobs(config, 256), n_ranks, 0)
        return plan.print_plan(config, k, config_from_knobs(config, train_data.vocab_size), n_ranks,
                               train_data.n_tokens, plan_of(train_data))

    # data, model and what they start from
    signals = runs.StopSignals(max_runtime)
    env = runs.Env(device, dtype)
    train_data = open_split('train')
    splits = common_splits(data_dir, dataset, data_mix)
    require(*rules(k, train_data, data_name, splits, T))
    train_data = train_data.head(train_only_on_leading_tokens)
    row_length = train_data.row_length
    pair_sets = open_pairs(data_dir, dataset) if row_length and 'pairs' in read_meta(data_dir, dataset) else {}
    val_data, test_data = (open_split(s) if s in splits else None for s in ('val', 'test'))
    require((not do_pruning or val_data.n_tokens > 0, f'the val split of {data_name!r} is empty, and TAMADE needs it'))
    model_config = config_from_knobs(config, train_data.vocab_size)
    require(objective_rule(objective, model_config))
    data_facts = dict(dataset=data_name, sha256=train_data.sha256, start_id=train_data.start_id,
                      tokenizer=train_data.tokenizer, n_tokens=train_data.n_tokens)
    resume = init_from == 'resume'
    path = runs.newest_checkpoint(out_dir)
    if resume and not os.path.exists(path):
        resume = False
        if env.main:
            print(f'init_from = resume, but {path} does not exist yet: starting from scratch')
    torch.manual_seed(seed)
    raw_model = make(model_config).to(env.device)
    parent = path if resume else init_from if init_from not in ('scratch', 'resume') else ''
    start = runs.load_checkpoint(parent) if parent else {}
    if start:
        runs.load_weights(raw_model, start, parent)
    if encoder_ckpt and not resume:
        load_encoder(raw_model, encoder_ckpt)
    if freeze_encoder:
        require((getattr(raw_model, 'encoder', None), 'freeze_encoder: this model has no encoder'))
        raw_model.encoder.requires_grad_(False)
    if resume:
        fixed = ('procedure', 'batch_size', 'seed', 'order', 'steps_per_chunk', 'regularise',
                 'train_only_on_leading_tokens', 'online', 'loss_on', 'objective', 'freeze_encoder',
                 'matrix_optimizer', 'muon_rate_ratio', 'pmmp_state', 'qat_bits', 'weight_decay', 'beta1', 'beta2')
        runs.check_resume(start, path, data_facts, config, fixed, __file__)
    raw_model.recompute, raw_model.left_padding = activation_checkpointing, train_data.padded
    model_step, set_sync = parallel.parallelise(raw_model, env, compile, shard, cpu_offload)
    named_params = {n: parallel.local(p) for n, p in raw_model.named_parameters()}      # of this rank, from here on
    params = {n: named_params[n] for n in sparse.regularised(raw_model, regularise)}
    trained = [n for n, p in raw_model.named_parameters() if p.requires_grad]           # all but a frozen encoder
    theta, all_params = list(params.values()), [named_params[n] for n in trained]
    masks = {n: parallel.part(m, named_params[n]) for n, m in start.get('masks', {}).items() if n in trained}
    masked, mask_list = [named_params[n].detach() for n in masks], list(masks.values())
    adamw = partial(torch.optim.AdamW, betas=(beta1, beta2), eps=adam_epsilon, fused=env.kind in ('cuda', 'cpu'))
    optimizer = make_optimizer({n: named_params[n] for n in trained}, adamw, k)
    whole = bool(start.get('optimizer'))                                # a checkpoint of weights alone has none
    if resume and whole:
        parallel.load_optimizer(optimizer, start['optimizer'], parallel.parameters_of(optimizer))
    scaler = torch.amp.GradScaler(env.kind, enabled=env.dtype == 'float16')
    if resume and start.get('scaler'):
        scaler.load_state_dict(start['scaler'])

    # the plan and the counters that a checkpoint keeps
    phases = plan_of(train_data)
    n_steps = sum(p['n_steps'] for p in phases)
    require((n_steps > 0, 'nothing to train: epochs_prelude, epochs, epochs_fine_tuning and max_iters are all 0'))
    counters = dict(step=0, tokens=0, online_nats=0.0, online_tokens=0, epsilon=0.0, tolerance_spent=0.0, n_prunings=0,
                    nonzeros=0, best_val=math.inf, final_val_loss=math.nan, final_train_loss=math.nan,
                    train_seconds=0.0, step_seconds=0.0)
    counters.update({name: start[name] for name in counters if resume and name in start})
    if env.main:                                                        # last: nothing above may cost an older run
        runs.open_run_folder(out_dir, overwrite, init_from == 'resume', '' if resume else parent)
    env.barrier()
    micro = micro_batch_size or batch_size // env.world
    rows_per_rank = batch_size // env.world
    bytes_per_token = train_data.bytes_per_target
    eval_rows = score.rows_per_forward(T)
    record = runs.RunRecord(out_dir, config, env, seq_length=T, n_params=sum(p.numel() for p in raw_model.parameters()),
                            n_steps=n_steps, data=data_facts, flops_per_token=flops_per_token(model_config),
                            parent=runs.parent_of(parent) if parent and env.main else {})
    if stop_when == 'first_exhausted' and data_mix and env.main:
        print(f'the run has {n_steps:,} steps; the first source of the mixture is exhausted after'
              f' {train_data.n_batches(batch_size, T, seed) * steps_per_chunk:,}')
    last_saved, skipped = time.time(), 0
    state, paired, grid, peaks = {}, {}, qat.Grid({}, {}), (learning_rate, procedure_learning_rate or learning_rate)
    if env.main:
        log, loss_file, loss_csv = runs.open_logs(out_dir, CSV_COLUMNS, counters['step'])
        if alpha and procedure in ('drr', 'pmmp') or procedure == 'pmmp':
            runs.say(log, f'alpha = {alpha:g}; the penalty equals a code of 32-bit weights at 32·ln2/N ='
                     f' {32 * LN2 / train_data.n_tokens:.3g}')
    if wandb_log and env.main:
        import wandb
        wandb.init(project=wandb_project, name=os.path.basename(out_dir), config=config, dir=out_dir)

    def note(line, **numbers):
        if env.main:
            runs.say(log, line)
            if wandb_log and numbers:
                wandb.log(numbers, step=counters['step'])

    if resume and not whole:
        note(f'step={counters["step"]}: {path} holds weights alone, so the optimisers (and w, gamma, u) start afresh')

    def validate(phase):
        """Validation loss; the best of the phase since its last pruning goes to best.pt."""
        if val_data is None:
            return math.nan
        found = score.evaluate(raw_model, val_data.head(eval_blocks * T), T, eval_rows, env)
        loss, bpb = found['loss_nats'], found['bits_per_byte']
        for t, arms in pair_sets.items():
            paired[t] = next(score.evaluate_pairs(raw_model, arms, eval_rows, env, 0, eval_blocks))
            note(f'pairs type={t} step={counters["step"]} ' + ' '.join(
                f'{key}={paired[t][key]:.5f}' for key in PAIRED if key in paired[t]),
                 **{f'{t}_{key}': paired[t][key] for key in PAIRED if key in paired[t]})
        note(f"val phase={phase['name']} step={counters['step']} loss={loss:.5f} bpb={bpb:.4f}",
             val_loss=loss, val_bits_per_byte=bpb)
        if loss < counters['best_val']:
            counters['best_val'] = loss
            save(phase, 'best.pt', weights_only=True)
        return loss

    def drawn():
        """Tokens drawn from each source of a mixture so far, {name: tokens}; a row counts once for its whole chunk."""
        n_rows = -(-counters['step'] // steps_per_chunk) * batch_size
        return {n: rows * T for n, rows in train_data.rows_by_source(n_rows, seed).items()} if data_mix else {}

    def count_nonzero():
        own = torch.tensor(float(sparse.count_nonzero(named_params.values())), dtype=torch.float64)
        return int(env.sum(own) if shard else own)

    def save(phase, name='', weights_only=False):
        counters['train_seconds'] += 0 if weights_only else clock()
        name = name or ('ckpt.sharded' if sharded_ckpt else 'ckpt.pt')
        view = parallel.as_whole if name == 'ckpt.sharded' else parallel.full
        weights = {n: p if name == 'ckpt.sharded' else parallel.full(p) for n, p in raw_model.state_dict().items()}
        checkpoint = dict(model=weights, model_args=model_args(raw_model),
                          masks={n: view(m, named_params[n]) for n, m in masks.items()}, config=config,
                          data=data_facts, grid=grid.codes, parent=record.values['parent'], phase=phase['name'],
                          drawn=drawn(), **counters)
        if not weights_only:
            checkpoint.update(optimizer=parallel.optimizer_state(optimizer, parallel.parameters_of(optimizer), view),
                              scaler=scaler.state_dict(),
                              procedure=sparse.pmmp_saved(state, view) if 'gamma' in state else {})
        if env.main:
            loss_file.flush()
        if env.main or name == 'ckpt.sharded':
            runs.save_checkpoint(os.path.join(out_dir, name), checkpoint, 1 if weights_only else keep_last)
        env.barrier()

    lap = [time.time()]

    def clock():
        """Seconds since the last call."""
        before, lap[0] = lap[0], time.time()
        return lap[0] - before

    def prune(phase):
        """Grow the masks by TAMADE (or γ < ½), reset what the optimisers remember of the dropped weights, measure."""
        nonlocal masks, masked, mask_list

        def loss_of():
            leading = val_data.head(sparse.CALIBRATION_BLOCKS * T)      # of a mixture: some of each source
            found = score.score(raw_model, leading, T, eval_rows, env, max_blocks=sparse.CALIBRATION_BLOCKS)
            return found['nats'] / found['tokens']
        if prune_by == 'gamma':
            new, before = sparse.masks_by_gamma(dict(zip(state['names'], state['gamma']))), loss_of()
        else:
            counters['epsilon'], before, _, _ = sparse.tamade(loss_of, params, tolerated_relative_loss_increase)
            new = sparse.masks_by_threshold(params, counters['epsilon'])
        masks = sparse.merge_masks(masks, new)
        sparse.apply_masks(named_params, masks)
        masked, mask_list = [named_params[n].detach() for n in masks], list(masks.values())
        sparse.forget(optimizer, {named_params[n]: m for n, m in masks.items()})
        if 'gamma' in state:
            sparse.pmmp_forget(state, masks)
        after = loss_of()
        counters['tolerance_spent'] += after / before - 1
        counters['n_prunings'] += 1
        counters['best_val'] = math.inf
        nonzero = counters['nonzeros'] = count_nonzero()
        epsilon, sparsity = counters['epsilon'], 1 - nonzero / record.values['n_params']
        note(f"prune by={prune_by} phase={phase['name']} step={counters['step']} epsilon={epsilon:.7f}"
             f' loss_before={before:.5f} loss_after={after:.5f} nonzeros={nonzero} sparsity={sparsity:.4f}'
             f" tolerance_spent={counters['tolerance_spent']:.4f}", nonzeros=nonzero, epsilon=epsilon)

    # the loop
    held_bytes = 0                                                      # weights, masks, procedure, optimisers
    raw_model.train()
    for phase in phases:
        done = counters['step'] - phase['first_step']
        if done >= phase['n_steps']:
            continue
        edit, project = sparse.PROCEDURES[phase['procedure']]
        state = dict(alpha=alpha, beta=beta)
        if phase['procedure'] == 'pmmp':
            state = sparse.pmmp_state(params, alpha, initial_p_value, initial_u_value,
                                      partial(adamw, lr=peaks[1], weight_decay=0.0),
                                      start.get('procedure') if resume and done else None, pmmp_state == 'lean')
        if qat_bits and phase['name'] == 'fine_tuning':
            rows = train_data.gather(batch_starts(order, seed, 0, 0, qat_rows, train_data.n_tokens, T), T)
            codes = start.get('grid') if resume and done else qat.choose_codes(raw_model, qat_bits, *rows)
            grid = qat.Grid(named_params, {n: env.sum(c * env.main).cpu() for n, c in codes.items()})   # rank 0's
            if bits_lambda:
                edit, state = grid.pull, dict(bits_rate=bits_lambda * LN2 / train_data.n_tokens)
        if done == 0:
            counters.update(best_val=math.inf, nonzeros=count_nonzero())
        optimizers = [optimizer] + ([state['optimizer']] if 'optimizer' in state else [])
        bar = runs.progress_bar(f"{phase['name']} ({phase['procedure']})", phase['n_steps'], done, env)
        window = [time.time(), 0, 0.0]                                  # for log.txt: start, tokens, nats
        while done < phase['n_steps']:
            began = time.time()
            for group_owner, peak in zip(optimizers, peaks):
                for group in group_owner.param_groups:
                    group['lr'] = rate_at(counters['step'], n_steps, peak, k) * group.get('rate_ratio', 1.0)
            lr = optimizer.param_groups[0]['lr']
            epochs_done, inside = divmod(done, phase['epoch_steps'])
            epoch, batch = phase['first_epoch'] + epochs_done, inside // steps_per_chunk
            first_pass = online and epoch == 0
            starts = train_data.starts('sequential' if first_pass else order, seed, epoch, batch,
                                       counters['step'] // steps_per_chunk, batch_size, T)
            n_scored = train_data.n_scored(starts, T)
            mine = starts[env.rank * rows_per_rank:(env.rank + 1) * rows_per_rank]
            sums = torch.zeros(3, device=env.device)                # nats, stop?, checkpoint due?: one reduction a step
            sums[1] = float(bool(signals.received))
            sums[2] = float(env.main and bool(checkpoint_time) and time.time() - last_saved > checkpoint_time)
            grid.round()
            for i in range(0, rows_per_rank, micro):
                x, y = train_data.gather(mine[i:i + micro], T)
                if dropout:
                    torch.manual_seed(key_of(seed, counters['step'], i, env.rank) >> 1)
                set_sync(i + micro >= rows_per_rank)
                with env.autocast():
                    loss = model_step(env.put(x), env.put(y))           # nats, summed over the rows
                scaler.scale(loss * (env.world / n_scored)).backward()  # ranks are averaged: hence world
                sums[0] += loss.detach()
            grid.restore()
            parallel.take_gradients(all_params)
            scaler.unscale_(optimizer)
            if shard and scaler.is_enabled():                           # an inf of one rank's part is everybody's
                for flag in scaler._found_inf_per_device(optimizer).values():
                    env.sum(flag)
            total_nats, stop, save_due = env.sum(sums).tolist()
            loss_nats = total_nats / n_scored
            grad_norm = penalised_norm = parallel.norm_of(all_params, env)
            if edit is not sparse.no_edit:
                if decoupled:
                    pulls = [torch.zeros_like(p) for p in theta]
                    edit(theta, pulls, state)
                else:
                    edit(theta, [p.grad for p in theta], state)
                    penalised_norm = parallel.norm_of(all_params, env)
            if masks:
                torch._foreach_mul_([named_params[n].grad for n in masks], mask_list)
            norm, penalised = float(grad_norm), float(penalised_norm)
            if not (math.isfinite(loss_nats) and math.isfinite(penalised)):
                skipped += 1
                if not scaler.is_enabled() or not math.isfinite(loss_nats) or skipped == MAX_SKIPPED:
                    record.update(status='failed', failure=f'non-finite loss {loss_nats} or gradient norm {penalised}')
                    raise UserError(f"loss {loss_nats}, gradient norm {penalised} at step {counters['step']} of"
                                    f" {phase['name']}: stopped before the update; try a lower --learning_rate (now"
                                    f' {learning_rate:g}), --grad_clip=1 or --dtype=float32')
            else:
                skipped = 0
            if grad_clip:
                torch.nn.utils.clip_grads_with_norm_(all_params, grad_clip, penalised_norm)
            if not skipped:
                scaler.step(optimizer)
                if 'optimizer' in state:
                    state['optimizer'].step()
            scaler.update()
            if decoupled and edit is not sparse.no_edit and not skipped:
                sparse.pull_towards_zero(theta, pulls, lr, phase['procedure'])
            project(state)
            if masks:
                torch._foreach_mul_(masked, mask_list)
            optimizer.zero_grad(set_to_none=True)

            # the step is done: count, log, prune, validate, save
            done += 1
            counters.update(step=counters['step'] + 1, tokens=counters['tokens'] + n_scored, final_train_loss=loss_nats,
                            step_seconds=counters['step_seconds'] + time.time() - began)
            if first_pass and (counters['step'] - 1) % steps_per_chunk == 0:
                counters['online_nats'] += loss_nats * n_scored
                counters['online_tokens'] += n_scored
            window[1], window[2] = window[1] + n_scored, window[2] + loss_nats * n_scored
            step = counters['step']
            if env.main and step % log_every == 0:
                loss_csv.writerow((phase['name'], epoch, step, counters['tokens'], f'{loss_nats:.6f}', f'{lr:.4g}',
                                   f'{norm:.4g}', f'{penalised:.4g}', counters['nonzeros'],
                                   f"{counters['step_seconds']:.3f}"))
            bar.update()
            if step % log_interval == 0 or done == phase['n_steps']:
                speed, mean = window[1] / (time.time() - window[0]), window[2] / window[1]
                bpb = mean / LN2 / bytes_per_token
                bar.set_postfix_str(f'{bpb:.3f} bits/byte, {speed:,.0f} tokens/s')
                note(f"train phase={phase['name']} epoch={epoch} step={step} loss={mean:.5f} bpb={bpb:.4f} lr={lr:.3g}"
                     f' grad_norm={norm:.3g} nonzeros={counters["nonzeros"]} tokens_per_second={speed:.0f}'
                     + ''.join(f' drawn_{name}={n}' for name, n in drawn().items()),
                     train_loss=mean, train_bits_per_byte=bpb, lr=lr, grad_norm=norm, grad_norm_penalised=penalised)
                record.update(step=step, train_loss=mean, phase=phase['name'], train_tokens_per_second=round(speed))
                window = [time.time(), 0, 0.0]
            paused_at = time.time()
            if plan.prunes_after(phase, done, k):
                prune(phase)
            if done == phase['n_steps'] or eval_interval and step % eval_interval == 0:
                grid.round()
                counters['final_val_loss'] = validate(phase)
                grid.restore()
            window[0] += time.time() - paused_at                        # tokens/s is of training alone
            if stop and step < n_steps:
                save(phase)
                bar.close()
                note(f"paused step={step} reason={signals.received or 'rank'}; continue with --init_from=resume")
                record.update(status='paused', step=step)
                env.barrier()                                           # the first rank to go may end the others
                env.close()
                return runs.PAUSED
            if save_due and step < n_steps:
                save(phase)
                last_saved = time.time()
        held_bytes = max(held_bytes, parallel.held_bytes(all_params + list(masks.values()), optimizers))
        bar.close()

    # the end: the checkpoint, then every number from sums over whole splits
    if not resume or start['step'] < n_steps:                           # else only the scoring was cut short
        grid.round()
        save(phases[-1])
    signals.leave_at_once(record)
    sizes = sparse.model_sizes(parallel.full(p, p) for p in named_params.values())
    totals = dict(final_train_loss=counters['final_train_loss'], final_val_loss=counters['final_val_loss'],
                  epsilon=counters['epsilon'], model_byte_size=sizes['nnz4_bytes'], non_zero_params=sizes['nonzeros'],
                  sparsity=1 - sizes['nonzeros'] / sizes['n_params'], bits_est_bytes=sizes['bits_est_bytes'],
                  training_runtime=round(counters['train_seconds'], 1), tokens_seen=counters['tokens'],
                  tolerance_spent=counters['tolerance_spent'], n_prunings=counters['n_prunings'],
                  held_bytes_per_rank=held_bytes,
                  online_description_length_bytes=round(counters['online_nats'] / LN2 / 8)
                  if counters['online_tokens'] == train_data.n_tokens else None)
    if data_mix:
        totals['drawn'] = drawn()
    totals.update({f'pairs_{t}_{key}': found[key] for t, found in paired.items() for key in PAIRED if key in found})
    if final_train_blocks:
        found = score.evaluate(raw_model, train_data.head(max(final_train_blocks, 0) * T), T, eval_rows, env,
                               progress='train split')
        data_bytes = round(found['data_bytes'])
        totals.update(mean_train_loss=found['loss_nats'], train_bits_per_byte=found['bits_per_byte'],
                      train_data_bytes=data_bytes, description_length_nnz4_bytes=data_bytes + sizes['nnz4_bytes'],
                      description_length_bits_est_bytes=data_bytes + sizes['bits_est_bytes'])
    if test_data:
        found = score.evaluate(raw_model, test_data, T, eval_rows, env, progress='test split')
        totals.update(mean_test_loss=found['loss_nats'], test_bits_per_byte=found['bits_per_byte'],
                      test_accuracy=found['accuracy'])
    if env.main:
        note(curves.draw_run(out_dir, loss_file))
    note('done ' + ' '.join(f'{k}={v:.5g}' if isinstance(v, float) else f'{k}={v}' for k, v in totals.items()),
         **{k: v for k, v in totals.items() if v})
    signals.close()
    record.update(status='done', **totals)
    env.barrier()
    env.close()
    return 0


if __name__ == '__main__':
    run(main)
