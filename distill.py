"""Distil a teacher into a smaller student: its probabilities, the next token, the direction of its last states.

    python distill.py config/distil/byte_student.py                  one process; bytes, small enough for two CPU cores
    torchrun --nproc_per_node=8 distill.py config/gpt2/distil6.py    many GPUs, same batches
    python distill.py config/gpt2/distil6.py --check                 resolved knobs and the plan, nothing is run

In: data/DATASET; teacher: a checkpoint, a Hugging Face folder or hub id. Out: OUT_DIR/{ckpt.pt, best.pt, log.txt,
train_loss.csv, run.json} as train.py writes them; loss_nats there is the student's own cross-entropy, loss the weighted
sum that losses.py defines. With a_clm = 1 and the other weights 0 this is train.py, to the last bit on a CPU.
"""
import math
import os
import time
from types import SimpleNamespace

from configurator import UserError, at_least, configure, one_of, require, run
from training.plan import LN2, batch_rules, optimizer_rules, plan_phases, print_plan, rate_at

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
tokens_per_second = 0.0         # with --check: also print hours
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
positions = 'sinusoidal'        # 'sinusoidal', 'learned', 'rotary'
norm = 'layernorm'              # 'layernorm', 'rmsnorm'
activation = 'gelu'             # 'gelu', 'gelu_tanh', 'relu2'
tied = False                    # head shares the token embedding
bias = True
qk_norm = False
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
# -----------------------------------------------------------------------------

TERMS = ('clm', 'ce', 'mse', 'cos', 'hidden')       # of losses.py, which is not imported yet
CSV_COLUMNS = ('phase', 'epoch', 'step', 'tokens', 'loss_nats', 'lr', 'grad_norm', 'grad_norm_penalised', 'nonzeros',
               'loss', *(f'loss_{term}' for term in TERMS[1:]), 'seconds')
MAX_SKIPPED = 20                # fp16 steps with non-finite gradients in a row
FIXED = ('batch_size', 'seed', 'order', 'train_only_on_leading_tokens', 'temperature', 'layer_map', 'freeze_positions',
         'chunk_tokens', *(f'a_{term}' for term in TERMS))      # what a resumed run may not change


def check_knobs(k, n_ranks):
    from_zero = ('epochs', 'max_iters', 'dropout', 'eval_blocks', 'eval_interval', 'train_only_on_leading_tokens',
                 'checkpoint_time', 'max_runtime', *(f'a_{term}' for term in TERMS))
    require((teacher != '', 'teacher is empty; name a checkpoint or hub id, --teacher=out/RUN'),
            one_of('order', order, ('permuted', 'sequential', 'random')),
            *batch_rules(k, n_ranks), *optimizer_rules(k),
            *(at_least(name, getattr(k, name), 0) for name in from_zero),
            *(at_least(name, getattr(k, name), 1) for name in ('log_every', 'log_interval', 'keep_last',
                                                               'chunk_tokens')),
            (temperature > 0, f'temperature = {temperature}, expected > 0'),
            (any(getattr(k, f'a_{term}') for term in TERMS), 'all weights of the loss are 0; set a_ce or a_clm'))


def pairs_of(n_student, n_teacher):
    """Return the pairs (student's layer, teacher's) whose outputs are matched, from layer_map or evenly spaced."""
    try:
        pairs = [tuple(map(int, pair.split(':'))) for pair in layer_map.split(',')] if layer_map else [
            (i, (i + 1) * n_teacher // n_student - 1) for i in range(n_student)]
        fits = all(0 <= s < n_student and 0 <= t < n_teacher for s, t in pairs)
    except ValueError:
        fits = False
    require((fits, f'layer_map = {layer_map!r}, expected student:teacher pairs such as 0:1,1:3 with layers below'
             f' {n_student} and {n_teacher}'))
    return pairs


def check_pair(teacher_args, teacher_data, student, data):
    """Refuse a teacher that cannot teach this student on this data set."""
    tokenizer, same = teacher_data['tokenizer'], teacher_args['n_embd'] == student.n_embd
    require((teacher_args['vocab_size'] == student.vocab_size and tokenizer == data.tokenizer,
             f"teacher {teacher!r} reads {tokenizer!r} tokens with a vocabulary of {teacher_args['vocab_size']}, data"
             f' set {dataset!r} holds {data.tokenizer!r} tokens with {data.vocab_size}; they must be the same'),
            (teacher_args['block_size'] >= student.block_size, f'block_size = {student.block_size}, the teacher was'
             f" built for at most {teacher_args['block_size']}"),
            (same or not a_cos, f"a_cos = {a_cos} compares states of one width, teacher {teacher_args['n_embd']},"
             f' student {student.n_embd}; use --a_cos=0'),
            (same or not a_hidden, f"a_hidden = {a_hidden} compares states of one width, teacher"
             f" {teacher_args['n_embd']}, student {student.n_embd}; use --a_hidden=0"))


def main(argv=None):
    config = configure(globals(), argv)
    config.pop('check'), config.pop('overwrite')
    n_ranks = int(os.environ.get('WORLD_SIZE', 1))
    k = SimpleNamespace(**config, procedure='vanilla', do_pruning=False, shard='', steps_per_chunk=1, alpha=0.0,
                        **{f'{name}{phase}': 0 for name in ('epochs', 'stop_epoch_at_batch')
                           for phase in ('_prelude', '_fine_tuning')}, stop_epoch_at_batch=0)
    check_knobs(k, n_ranks)
    import torch

    import losses
    import runs
    import score
    import sparse
    from corpus.bins import batch_starts, key_of, n_blocks, read_meta, split_names
    from corpus.data import open_split
    from model import GPT, ModelConfig, config_from_knobs, flops_per_token, model_args, optimizer_groups
    from training import curves, parallel
    if check:
        try:
            meta = read_meta(data_dir, dataset)
        except UserError:
            meta = dict(vocab_size=256, splits=dict(train=dict(tokens=0)))
        return print_plan(config, k, config_from_knobs(config, meta['vocab_size']), n_ranks,
                          meta['splits']['train']['tokens'])

    # data, teacher, student and what it starts from
    signals = runs.StopSignals(max_runtime)
    env = runs.Env(device, dtype)
    train_data = open_split(data_dir, dataset, 'train', verify)
    require((train_only_on_leading_tokens <= train_data.n_tokens,
             f'train_only_on_leading_tokens = {train_only_on_leading_tokens:,}, but {dataset!r} has'
             f' {train_data.n_tokens:,}; use 0 for all, or prepare more data'),
            (train_data.n_tokens > 0, f'the training split of {dataset!r} is empty'))
    train_data = train_data.head(train_only_on_leading_tokens)
    splits = split_names(data_dir, dataset)
    val_data = open_split(data_dir, dataset, 'val', verify) if 'val' in splits else None
    model_config = config_from_knobs(config, train_data.vocab_size)
    T = model_config.block_size
    require((train_data.row_length in (0, T), f'block_size = {T}, {dataset!r} has rows of {train_data.row_length}'
             f' tokens; set --block_size={train_data.row_length}'))
    data_facts = dict(dataset=dataset, sha256=train_data.sha256, start_id=train_data.start_id,
                      tokenizer=train_data.tokenizer)
    teacher_model, taught = runs.load_model(teacher, env.device)
    check_pair(taught['model_args'], taught['data'], model_config, train_data)
    pairs = pairs_of(model_config.n_layer, taught['model_args']['n_layer']) if a_hidden else []
    teacher_model.eval().requires_grad_(False)
    teacher_facts = runs.parent_of(teacher)
    resume, path = init_from == 'resume', os.path.join(out_dir, 'ckpt.pt')
    if resume and not os.path.exists(path):
        resume = False
        if env.main:
            print(f'init_from = resume, but {path} does not exist yet: starting from scratch')
    torch.manual_seed(seed)
    student = GPT(model_config).to(env.device)
    parent = path if resume else init_from if init_from not in ('scratch', 'resume') else ''
    start = runs.load_checkpoint(parent) if parent else {}
    if start:
        runs.load_weights(student, start, parent)
    if resume:
        runs.check_resume(start, path, data_facts, config, FIXED, __file__)
        require((start['teacher']['sha256'] == teacher_facts['sha256'],
                 f'cannot resume: {teacher} is another teacher than the one the run began with'))
    if freeze_positions and student.position is not None:
        student.position.requires_grad_(False)
    student.recompute = activation_checkpointing
    student.left_padding = teacher_model.left_padding = train_data.padded
    weights = {term: config[f'a_{term}'] for term in TERMS}
    loss_module = losses.Distillation(student, teacher_model, weights, temperature, chunk_tokens, pairs)
    step_model, set_sync = parallel.parallelise(loss_module, env, compile)
    named_params = {n: p for n, p in student.named_parameters() if p.requires_grad}
    params = list(named_params.values())
    masks = {n: m.to(env.device) for n, m in start.get('masks', {}).items()}
    masked, mask_list = [named_params[n] for n in masks if n in named_params], [
        m for n, m in masks.items() if n in named_params]
    optimizer = torch.optim.AdamW(optimizer_groups(params, weight_decay), lr=learning_rate, betas=(beta1, beta2),
                                  eps=adam_epsilon, fused=env.kind in ('cuda', 'cpu'))
    scaler = torch.amp.GradScaler(env.kind, enabled=env.dtype == 'float16')
    if resume:
        optimizer.load_state_dict(start['optimizer'])
        if start['scaler']:
            scaler.load_state_dict(start['scaler'])

    # the plan and the counters that a checkpoint keeps
    phase, = plan_phases(n_blocks(n_blocks(train_data.n_tokens, T), batch_size), k) or [{}]
    require((phase, 'nothing to train: epochs and max_iters are 0'))
    n_steps, label = phase['n_steps'], 'distillation'
    counters = dict(step=0, tokens=0, nonzeros=sparse.count_nonzero(student.parameters()), best_val=math.inf,
                    final_val_loss=math.nan, final_train_loss=math.nan, train_seconds=0.0, step_seconds=0.0)
    counters.update({name: start[name] for name in counters if resume and name in start})
    if env.main:                                                        # last: nothing above may cost an older run
        if wandb_log:
            runs.require_wandb()
        sources = [teacher] if resume else [teacher, parent]
        runs.open_run_folder(out_dir, overwrite, init_from == 'resume', sources)
    env.barrier()
    rows_per_rank = batch_size // env.world
    micro = micro_batch_size or rows_per_rank
    bytes_per_token = train_data.bytes_per_target
    eval_rows = score.rows_per_forward(T)
    record = runs.RunRecord(out_dir, config, env, seq_length=T, n_params=sum(p.numel() for p in student.parameters()),
                            n_steps=n_steps, data=data_facts, teacher_checkpoint=teacher_facts,
                            procedure='distillation', flops_per_token=flops_per_token(model_config)
                            + flops_per_token(ModelConfig(**taught['model_args'])) // 3,    # the teacher only forward
                            parent=runs.parent_of(parent) if parent and env.main else {})
    last_saved, lap, skipped = time.time(), time.time(), 0
    if env.main:
        log, loss_file, loss_csv = runs.open_logs(out_dir, CSV_COLUMNS, counters['step'])
    if wandb_log and env.main:
        import wandb
        wandb.init(project=wandb_project, name=os.path.basename(out_dir), config=config, dir=out_dir)

    def note(line, **numbers):
        if env.main:
            runs.say(log, line)
            if wandb_log and numbers:
                wandb.log(numbers, step=counters['step'])

    def save(name='ckpt.pt', weights_only=False):
        nonlocal lap
        if not weights_only:
            counters['train_seconds'], lap = counters['train_seconds'] + time.time() - lap, time.time()
        checkpoint = dict(model=student.state_dict(), model_args=model_args(student), masks=masks, config=config,
                          data=data_facts, parent=record.values['parent'], teacher=teacher_facts, phase=label,
                          **counters)
        if not weights_only:
            checkpoint.update(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), procedure={})
        if env.main:
            loss_file.flush()
            runs.save_checkpoint(os.path.join(out_dir, name), checkpoint, 1 if weights_only else keep_last)
        if not weights_only:
            runs.commit_run_folders()
        env.barrier()

    def validate():
        """Validation loss of the student; the best goes to best.pt."""
        if val_data is None:
            return math.nan
        found = score.evaluate(student, val_data, T, eval_rows, env, max_blocks=eval_blocks)
        loss, bpb = found['loss_nats'], found['bits_per_byte']
        note(f"val phase={label} step={counters['step']} loss={loss:.5f} bpb={bpb:.4f}",
             val_loss=loss, val_bits_per_byte=bpb)
        if loss < counters['best_val']:
            counters['best_val'] = loss
            save('best.pt', weights_only=True)
        return loss

    # the loop
    student.train()
    bar = runs.progress_bar(label, n_steps, counters['step'], env)
    window = [time.time(), 0, 0.0, 0.0]                                 # for log.txt: start, tokens, nats, loss
    while counters['step'] < n_steps:
        began = time.time()
        lr = rate_at(counters['step'], n_steps, learning_rate, k)
        for group in optimizer.param_groups:
            group['lr'] = lr
        epoch, batch = divmod(counters['step'], phase['epoch_steps'])
        starts = batch_starts(order, seed, epoch, batch, batch_size, train_data.n_tokens, T)
        n_scored = train_data.n_scored(starts, T)
        mine = starts[env.rank * rows_per_rank:(env.rank + 1) * rows_per_rank]
        sums = torch.zeros(3 + len(TERMS), device=env.device)           # stop?, checkpoint due?, loss, terms
        sums[0] = float(bool(signals.received))
        sums[1] = float(env.main and bool(checkpoint_time) and time.time() - last_saved > checkpoint_time)
        for i in range(0, rows_per_rank, micro):
            x, y = train_data.gather(mine[i:i + micro], T)
            if dropout:
                torch.manual_seed(key_of(seed, counters['step'], i, env.rank) >> 1)
            set_sync(i + micro >= rows_per_rank)
            with env.autocast():
                loss, terms = step_model(env.put(x), env.put(y))        # summed over the scored tokens
            scaler.scale(loss * (env.world / n_scored)).backward()      # ranks are averaged: hence world
            sums[2:] += torch.cat((loss.detach()[None], terms))
        scaler.unscale_(optimizer)
        stop, save_due, *means = env.sum(sums).tolist()
        total, loss_nats, *others = (m / n_scored for m in means)
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in params]))
        skipped = 0 if math.isfinite(norm) else skipped + 1             # the scaler skips such a step and scales down
        if not math.isfinite(total) or skipped and not scaler.is_enabled() or skipped == MAX_SKIPPED:
            record.update(status='failed', failure=f'non-finite loss {total} or gradient norm {norm}')
            raise UserError(f"loss {total}, gradient norm {norm} at step {counters['step']}: stopped before the update;"
                            f' try a lower --learning_rate (now {learning_rate:g}), --grad_clip=1 or --dtype=float32')
        if masks:
            torch._foreach_mul_([p.grad for p in masked], mask_list)
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(params, grad_clip, torch.tensor(norm))
        scaler.step(optimizer)
        scaler.update()
        if masks:
            torch._foreach_mul_([p.detach() for p in masked], mask_list)
        optimizer.zero_grad(set_to_none=True)

        # the step is done: count, log, validate, save
        counters['step'] += 1
        counters['tokens'] += n_scored
        counters['final_train_loss'], step = loss_nats, counters['step']
        counters['step_seconds'] += time.time() - began
        window[1:] = window[1] + n_scored, window[2] + loss_nats * n_scored, window[3] + total * n_scored
        if env.main and step % log_every == 0:
            loss_csv.writerow((label, epoch, step, counters['tokens'], f'{loss_nats:.6f}', f'{lr:.4g}', f'{norm:.4g}',
                               f'{norm:.4g}', counters['nonzeros'], f'{total:.6f}', *(f'{t:.6f}' for t in others),
                               f"{counters['step_seconds']:.3f}"))
        bar.update()
        if step % log_interval == 0 or step == n_steps:
            speed, mean, loss = window[1] / (time.time() - window[0]), window[2] / window[1], window[3] / window[1]
            bpb = mean / LN2 / bytes_per_token
            bar.set_postfix_str(f'{bpb:.3f} bits/byte, {speed:,.0f} tokens/s')
            parts = ' '.join(f'{term}={value:.5f}' for term, value in zip(TERMS[1:], others))
            note(f'train phase={label} epoch={epoch} step={step} loss={mean:.5f} bpb={bpb:.4f} lr={lr:.3g}'
                 f' grad_norm={norm:.3g} total={loss:.5f} {parts} nonzeros={counters["nonzeros"]}'
                 f' tokens_per_second={speed:.0f}', train_loss=mean, train_bits_per_byte=bpb, lr=lr, grad_norm=norm,
                 distillation_loss=loss, **{f'loss_{t}': v for t, v in zip(TERMS[1:], others)})
            record.update(step=step, train_loss=mean, phase=label, train_tokens_per_second=round(speed))
            window = [time.time(), 0, 0.0, 0.0]
        paused_at = time.time()
        if step == n_steps or eval_interval and step % eval_interval == 0:
            counters['final_val_loss'] = validate()
        window[0] += time.time() - paused_at                            # tokens/s is of training alone
        if stop and step < n_steps:
            save()
            bar.close()
            note(record.pause(signals.where(step), step=step))
            env.barrier()                                               # the first rank to go may end the others
            env.close()
            runs.close_run_folders()
            return runs.PAUSED
        if save_due:
            save()
            last_saved = time.time()
    bar.close()

    # the end: the checkpoint, then numbers from sums over the whole test split; a signal now leaves them to a resume
    if not resume or start['step'] < n_steps:                           # else only the scoring was cut short
        save()
    signals.leave_at_once(record)
    sizes = sparse.model_sizes(student.parameters())
    totals = dict(final_train_loss=counters['final_train_loss'], final_val_loss=counters['final_val_loss'],
                  model_byte_size=sizes['nnz4_bytes'], non_zero_params=sizes['nonzeros'],
                  sparsity=1 - sizes['nonzeros'] / sizes['n_params'], bits_est_bytes=sizes['bits_est_bytes'],
                  training_runtime=round(counters['train_seconds'], 1), tokens_seen=counters['tokens'])
    if 'test' in splits:
        found = score.evaluate(student, open_split(data_dir, dataset, 'test', verify), T, eval_rows, env,
                               progress='test split')
        totals.update(mean_test_loss=found['loss_nats'], test_bits_per_byte=found['bits_per_byte'],
                      test_accuracy=found['accuracy'])
    if env.main:
        note(curves.draw_run(out_dir, loss_file))
    note('done ' + ' '.join(f'{name}={v:.5g}' if isinstance(v, float) else f'{name}={v}' for name, v in totals.items()),
         **{name: v for name, v in totals.items() if v})
    signals.close()
    record.update(status='done', **totals)
    env.barrier()
    env.close()
    runs.close_run_folders()
    return 0


if __name__ == '__main__':
    run(main)
