"""Ask what a vector still knows: train a fresh decoder to regenerate the input from a frozen encoder's last state.

    python -m lab.probe config/mixers/probe_sample_16.py --from_ckpt=out/a,out/b    a table, a row for each encoder
    python -m lab.probe config/mixers/probe_512.py --from_ckpt=out/RUN --untrained    and its shape with fresh weights
    torchrun --nproc_per_node=8 -m lab.probe config/mixers/probe_512.py --from_ckpt=gpt2    a hub id

In: checkpoints, data set. Out: OUT_DIR/{run.json, table.md, table.csv}; OUT_DIR/ENCODER/{ckpt.pt, log.txt,
train_loss.csv, loss.png, run.json} of each decoder. Exit 85: saved, --init_from=resume goes on. What each token costs
is asked by python -m lab.entropy.

The encoder reads the T tokens of a row; the state it ends in is all that a causal decoder of T positions is given; its
loss is the unshifted cross-entropy with those tokens (Badger, arXiv 2409.01482, 2602.13466). accuracy is the share
regenerated (the source's Hamming), information 1 - H/ln V at H nats per token. embedding_nats is what the vector itself
costs, numbers x embedding_bits x ln 2 / T per token: add it where a code length is meant.
"""
import functools
import os
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

from configurator import at_least, configure, names_in, one_of, require
from training import plan

# -----------------------------------------------------------------------------
# run
from_ckpt = ''                  # encoders: run folders, files, Hugging Face folders, hub ids, comma-separated
untrained = False               # control: each encoder's architecture with fresh weights as well
own_decoder = False             # control: autoencoders with the decoder they were trained with as well
out_dir = 'out/probe'
overwrite = False               # replace a finished probe in out_dir
init_from = 'scratch'           # 'scratch', or 'resume': finished encoders are kept, a begun one goes on
seed = 858
device = 'auto'                 # 'auto', 'cuda', 'mps', 'cpu'
dtype = 'auto'                  # 'auto', 'float32', 'bfloat16', 'float16'
compile = True                  # torch.compile, on CUDA only
# data
data_dir = 'data'
dataset = ''                    # '' = the one that the encoders were trained on
split = 'test'                  # where the numbers come from; the decoder is trained on train
verify = False                  # check the SHA-256 of the data before training
order = 'permuted'              # 'permuted' (each block once per epoch), 'sequential', 'random' (with replacement)
train_only_on_leading_tokens = 0    # 0 = all
max_rows = 0                    # leading rows of the split that are scored; 0 = all
block_size = 0                  # tokens that a vector stands for; 0 = the encoder's own
# decoder; 0 or '' = as the encoder
block_type = ''                 # 'attention', 'mixer', 'multihead_mixer'
n_layer = 0
n_head = 0
n_embd = 0
kernel = 1                      # of a mixer
positions = ''                  # 'sinusoidal', 'learned', 'rotary', 'none'; '' = none for mixers, else sinusoidal
spread = 'unroll'               # position i sees half of the vector, from number i on, cyclic; 'repeat': all of it
embedding_bits = 16             # of each number of the vector, for embedding_nats
# batch and optimiser
max_iters = 2000                # steps for each encoder
batch_size = 32                 # rows per step over all ranks and micro-batches
micro_batch_size = 0            # rows per forward on one rank; 0 = batch_size / ranks
learning_rate = 5e-4
schedule = 'linear'             # 'constant', 'cosine', 'linear', after warm-up
warmup_iters = 50
min_learning_rate_ratio = 0.0   # where 'cosine' and 'linear' end
beta1 = 0.9
beta2 = 0.999
adam_epsilon = 1e-8
weight_decay = 0.0              # matrices only
grad_clip = 1.0                 # 0 = off
# logging, saving
log_every = 1                   # steps between rows of train_loss.csv
log_interval = 100              # steps between lines of log.txt
checkpoint_time = 1800.0        # seconds between checkpoints; 0 = only at the end and on a signal
max_runtime = 0.0               # seconds, of all encoders together, after which to save and exit with 85; 0 = off
# -----------------------------------------------------------------------------


def rules(k):
    """Return what must hold of the knobs, as require takes it."""
    n_ranks = int(os.environ.get('WORLD_SIZE', 1))
    from_zero = ('n_layer', 'n_head', 'n_embd', 'block_size', 'max_rows', 'train_only_on_leading_tokens',
                 'checkpoint_time', 'max_runtime')
    from_one = ('max_iters', 'log_every', 'log_interval', 'embedding_bits')
    return [(names_in(k.from_ckpt), 'from_ckpt is empty; name encoders, --from_ckpt=out/RUN,gpt2'),
            one_of('init_from', k.init_from, ('scratch', 'resume')),
            one_of('order', k.order, ('permuted', 'sequential', 'random')),
            one_of('spread', k.spread, ('unroll', 'repeat')),
            (k.spread == 'unroll' or k.positions != 'rotary', "spread = 'repeat' gives all positions the same input,"
             " which rotary attention cannot tell apart; use positions = 'sinusoidal' or spread = 'unroll'"),
            *plan.batch_rules(k, n_ranks), *plan.optimizer_rules(k),
            *(at_least(name, getattr(k, name), 0) for name in from_zero),
            *(at_least(name, getattr(k, name), 1) for name in from_one)]


config = configure(globals(), rules=rules)

import torch
import torch.nn as nn

import score
from corpus.data import Batches, open_split, row_rule
from corpus.objectives import with_objective
from model import ModelConfig, build, flops_per_token, make, model_args
from training import curves, parallel
from training.checkpoint import load_checkpoint, load_weights, parent_of
from training.folder import check_run_folder, read_run
from training.optim import load_states, make_optimizers, set_rate, states_of
from training.process import Env, StopSignals
from training.run import Run, starting_checkpoint
from training.step import accumulate, clip, forget_gradients, unscale, update
from training.table import markdown, write_csv

CSV_COLUMNS = ('phase', 'epoch', 'step', 'tokens', 'loss_nats', 'lr', 'grad_norm', 'seconds')
SHOWN = ('encoder kind data numbers loss_nats accuracy information embedding_nats bits_per_byte tokens decoder_params '
         'seconds').split()
FIXED = ('seed', 'order', 'train_only_on_leading_tokens', 'block_size', 'block_type', 'n_layer', 'n_head',
         'n_embd', 'kernel', 'positions', 'spread', 'max_iters', 'batch_size', 'learning_rate', 'schedule',
         'warmup_iters', 'max_rows', 'min_learning_rate_ratio', 'beta1', 'beta2', 'adam_epsilon', 'weight_decay',
         'grad_clip')                                                   # of a resumed probe


# --- the model that is trained ---

class Probe(nn.Module):
    """Map ids (B, T) to logits (B, T, V), with targets to summed nats: a frozen encoder, then a decoder.

    decoder_config: of an autoencoder, of which the decoder alone is kept; its bottleneck is the width of the vector
    where that is not its own.
    """

    def __init__(self, encoder, decoder_config):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.decoder = make(decoder_config)
        self.decoder.encoder = None
        self.decoder.narrow = None
        self.config = decoder_config

    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()                                             # no dropout in what is measured
        return self

    def forward(self, x, y=None):
        with torch.no_grad():
            vector = self.encoder.encode(x)
        return self.decoder.decode(vector.float(), y)


def decoder_of(args, T, vocab_size, k):
    """Return the ModelConfig of a decoder for the encoder with these model_args."""
    kind = k.block_type or args.get('block_type', 'attention')
    default_positions = 'sinusoidal' if kind == 'attention' else 'none'
    numbers = numbers_of(args)
    width = k.n_embd or args['n_embd']
    return ModelConfig(block_size=T, vocab_size=vocab_size, n_layer=k.n_layer or args['n_layer'],
                       n_head=k.n_head or args['n_head'], n_embd=width, block_type=kind, kernel=k.kernel,
                       spread=k.spread, positions=k.positions or default_positions, wrapper='autoencoder',
                       bottleneck=numbers if numbers != width else 0)


def numbers_of(args):
    """Return how many numbers the vector of an encoder with these model_args has."""
    return args.get('bottleneck') or args['n_embd']


# --- which encoders, on which data ---

def names_of(paths):
    """Return a short name for each checkpoint: its run folder's, with the file's where that is not ckpt.pt."""
    names = []
    for path in paths:
        folder = path.rstrip('/')
        file = 'ckpt.pt'
        if path.endswith('.pt'):
            folder, file = os.path.split(path)
        name = os.path.basename(folder)
        if file != 'ckpt.pt':
            name += f'-{file.removesuffix(".pt")}'
        if name in names:
            name += f'-{len(names)}'
        names.append(name)
    return names


def common_dataset(checkpoints, dataset):
    """Return the data set that all encoders are asked about: `dataset`, or '' for the one they were trained on."""
    sets = {dataset or checkpoint['data']['dataset'] for checkpoint in checkpoints}
    require((len(sets) == 1 and all(sets), f'the encoders were trained on {", ".join(sorted(sets)) or "no data set"};'
             ' name one for all, --dataset=NAME'))
    return sets.pop()


def fit_rules(path, checkpoint, data, dataset, T, longest):
    """For require(): do rows of T tokens of a data set fit a checkpoint that reads at most `longest`?"""
    args = checkpoint['model_args']
    tokenizer = checkpoint['data']['tokenizer']
    return [(tokenizer == data.tokenizer and data.vocab_size <= args['vocab_size'],
             f"{path} reads {tokenizer!r} tokens with a vocabulary of {args['vocab_size']}, data set {dataset!r} holds"
             f' {data.tokenizer!r} tokens with {data.vocab_size}; prepare the text with the tokenizer of the encoder'),
            (T <= longest, f'rows have {T} tokens, {path} was built for at most {longest}; write'
             f' --block_size={longest}'),
            row_rule(data, dataset, T),
            (not data.padded, f'{dataset!r} has rows with hidden padding, which no encoder reads')]


@dataclass
class Job:
    """A row of the table: an encoder of some kind, and the decoder that it is asked through.

    kind: 'trained', 'untrained' (fresh weights) or 'own decoder', which is not trained and has no folder. facts: what
    its run.json says of it. before: what that said when a probe is resumed, else {}.
    """
    folder: str
    kind: str
    checkpoint: dict
    decoder: ModelConfig
    facts: dict
    before: dict

    @property
    def is_done(self):
        return self.before.get('status') == 'done'


def jobs_of(path, label, checkpoint, train_data, test_data, dataset, k):
    """Return the Jobs of one encoder, after a look at whether it can be asked."""
    args = checkpoint['model_args']
    wrapper = args.get('wrapper', '')
    longest = args['chunk_size'] if wrapper == 'memory' else args['block_size']
    T = k.block_size or train_data.row_length or longest
    require(*fit_rules(path, checkpoint, train_data, dataset, T, longest),
            (train_data.n_tokens > 0 and test_data.n_tokens > 0, f'{dataset!r} has an empty train or {k.split} split'),
            (not wrapper or wrapper == 'autoencoder' or args.get('memory') != 'none',
             f"{path} has no encoder (memory = 'none')"))
    decoder = decoder_of(args, T, train_data.vocab_size, k)
    facts = dict(encoder=parent_of(path)['sha256'], from_ckpt=path, data=dict(
        dataset=dataset, sha256=train_data.sha256, scored=test_data.sha256, tokenizer=train_data.tokenizer))

    # The encoder itself, and the controls that were asked for.
    endings = dict(trained='')
    if k.untrained:
        endings['untrained'] = '-untrained'
    if k.own_decoder and wrapper == 'autoencoder':
        endings['own decoder'] = '-own_decoder'
    jobs = []
    for kind, ending in endings.items():
        name = label + ending
        folder = os.path.join(k.out_dir, name)
        before = read_run(folder) if k.init_from == 'resume' else {}
        jobs.append(Job(folder, kind, checkpoint, decoder, dict(facts, name=name, kind=kind), before))
    return jobs


# --- knobs ---

def check_resumed(jobs, config):
    """Refuse to go on with decoders that were trained with other settings, on other data or of another encoder."""
    rules = []
    for job in jobs:
        expected = {name: config[name] for name in FIXED}
        expected.update(encoder=job.facts['encoder'], data=job.facts['data'])
        for name, value in expected.items():
            rules.append((not job.before or job.before.get(name) == value, f'cannot resume: {name} = {value!r},'
                          f' {job.folder} was made with {job.before.get(name)!r}'))
    require(*rules)


# --- pieces of the run ---

def encoder_of(job, env, seed):
    """Return the encoder of a job, with fresh weights where it is the untrained control."""
    torch.manual_seed(seed + 1)
    encoder = build(job.checkpoint['model_args'])
    if job.kind != 'untrained':
        load_weights(encoder, job.checkpoint, job.facts['from_ckpt'])
    return encoder.to(env.device).eval()


def open_run(job, probe, start, config, whole, k):
    """Return the Run of a decoder in its own folder; start: its checkpoint, or {}."""
    T = probe.config.block_size
    c = probe.encoder.config
    reader = replace(c, wrapper='', block_size=T, n_layer=c.n_layer_encoder or c.n_layer)
    of_reader = flops_per_token(reader) // 3                            # it goes forward only
    of_decoder = flops_per_token(replace(probe.config, wrapper=''))
    run = Run(job.folder, config, whole.env, whole.signals, start=start, whole=whole)
    run.open(CSV_COLUMNS, k.overwrite, k.init_from == 'resume', seq_length=T, n_steps=k.max_iters,
             flops_per_token=of_decoder + of_reader, n_params=sum(p.numel() for p in probe.decoder.parameters()),
             procedure='probe', **job.facts)
    return run


def checkpoint_of(job, decoder, optimizers, scaler, config):
    """Return what a checkpoint holds beside the counters."""
    return dict(job.facts, decoder=decoder.state_dict(), model_args=model_args(decoder), config=config,
                optimizer=states_of(optimizers, parallel.full), scaler=scaler.state_dict())


def train_decoder(run, job, probe, batches, start, k):
    """Train the decoder of a probe; returns False where a signal stopped it, after it was saved."""
    env = run.env
    params = dict(probe.decoder.named_parameters())
    tensors = list(params.values())
    step_model, set_sync = parallel.parallelise(probe, env, k.compile)
    make_adamw = functools.partial(torch.optim.AdamW, lr=k.learning_rate, betas=(k.beta1, k.beta2),
                                   eps=k.adam_epsilon, fused=env.kind in ('cuda', 'cpu'))
    optimizers = make_optimizers(params, make_adamw, weight_decay=k.weight_decay)
    scaler = torch.amp.GradScaler(env.kind, enabled=env.dtype == 'float16')
    if start:
        load_states(optimizers, start['optimizer'])
        scaler.load_state_dict(start['scaler'])
    rates = plan.Schedule(k.schedule, k.max_iters, k.warmup_iters, k.min_learning_rate_ratio)
    phase = plan.Phase('probe', 'probe', batches.n_batches, k.max_iters)
    micro = k.micro_batch_size or k.batch_size // env.world
    cure = f'a lower --learning_rate (now {k.learning_rate:g}) or --dtype=float32'

    probe.train()
    run.begin(job.facts['name'], k.max_iters, run.step)
    while run.step < k.max_iters:
        run.begin_step()
        lr = rates.rate(run.step, k.learning_rate)
        set_rate(optimizers, lr)

        # This rank's rows of the global batch, forward and backward; then one reduction over ranks.
        place = phase.place(run.step)
        x, y, n_scored = batches.batch(place, env.rank, env.world)
        nats = accumulate(step_model, x, y, micro, env.world / n_scored, env, scaler, set_sync)
        unscale(optimizers, tensors, scaler, env, sharded=False)
        total_nats, = run.reduce(nats)
        grad_norm = parallel.norm_of(tensors, env)
        if run.check_finite(total_nats / n_scored, float(grad_norm), '', cure, scaler.is_enabled()):
            clip(tensors, k.grad_clip, grad_norm)
            update(optimizers, scaler)
        scaler.update()
        forget_gradients(optimizers)

        # The step is done: log it, and save where it is time, where a signal asks for it, and at the end.
        run.end_step(n_scored, [total_nats], total_nats / n_scored)
        log_step(run, place, lr, float(grad_norm), batches.data.bytes_per_target, k)
        if run.stop or run.save_due or run.step == k.max_iters:
            run.save(checkpoint_of(job, probe.decoder, optimizers, scaler, run.config))
        if run.stop and run.step < k.max_iters:
            return False
    run.end()
    return True


def log_step(run, place, lr, grad_norm, bytes_per_token, k):
    """Write what is due after a step to train_loss.csv and log.txt."""
    loss = run.counters['final_train_loss']
    run.log_row(('probe', place.epoch, run.step, run.counters['tokens'], f'{loss:.6f}', f'{lr:.4g}',
                 f'{grad_norm:.4g}'))
    if run.step % k.log_interval == 0 or run.step == k.max_iters:
        mean = run.mean('probe', bytes_per_token)
        run.note(f'train phase=probe epoch={place.epoch} step={run.step} loss={mean.loss:.5f}'
                 f' bpb={mean.bits_per_byte:.4f} lr={lr:.3g} grad_norm={grad_norm:.3g}'
                 f' tokens_per_second={mean.speed:.0f}')


def row_of(job, T, numbers, k):
    """Return a row of the table: numbers that were found of an encoder whose vector stands for T tokens."""
    of_vector = numbers_of(job.checkpoint['model_args'])
    return dict(encoder=job.facts['name'], kind=job.kind, data=f"{job.facts['data']['dataset']}/{k.split}",
                numbers=of_vector, embedding_nats=score.embedding_nats(of_vector, k.embedding_bits, T), **numbers)


def write_table(out_dir, rows, columns):
    """Write table.md and table.csv and return the former, with those of the columns that any row has."""
    table = markdown(rows, [name for name in columns if any(name in row for row in rows)])
    with open(os.path.join(out_dir, 'table.md'), 'w', encoding='utf-8') as f:
        f.write(table + '\n')
    write_csv(os.path.join(out_dir, 'table.csv'), rows)
    return table


if __name__ == '__main__':
    # 1. What is asked for, this process among the others, and the signals that end it with a checkpoint.
    k = SimpleNamespace(**config)
    config.pop('overwrite')
    signals = StopSignals(max_runtime)
    env = Env(device, dtype)

    # 2. The encoders, and the data that they are asked about.
    paths = names_in(from_ckpt)
    checkpoints = [load_checkpoint(path) for path in paths]
    dataset_name = common_dataset(checkpoints, dataset)
    test_data = open_split(data_dir, dataset_name, split, verify)
    train_data = open_split(data_dir, dataset_name, 'train', verify).head(train_only_on_leading_tokens)
    jobs = []
    for path, label, checkpoint in zip(paths, names_of(paths), checkpoints):
        jobs += jobs_of(path, label, checkpoint, train_data, test_data, dataset_name, k)
    check_resumed(jobs, config)
    env.barrier()                                                       # all ranks have read what was there

    # 3. The folder of the whole. Those of the decoders are looked at as well, before the first of them is trained.
    if env.main:
        to_train = [job.folder for job in jobs if job.kind != 'own decoder' and not job.is_done]
        for folder in (out_dir, *to_train):
            check_run_folder(folder, overwrite, init_from == 'resume', paths)
    whole = Run(out_dir, config, env, signals)
    whole.open((), overwrite, init_from == 'resume', paths)

    # 4. One after the other. All decoders of one shape start from the same weights.
    rows = []
    autoencoding = [with_objective(data, 'autoencode', 'autoencoder') for data in (train_data, test_data)]
    for job in jobs:
        if job.is_done:
            rows.append(job.before['row'])
            continue
        T = job.decoder.block_size
        eval_rows = score.rows_per_forward(T)
        encoder = encoder_of(job, env, seed)
        if job.kind == 'own decoder':
            rows_of_text = with_objective(test_data, 'memory', 'autoencoder')
            with whole.scoring():
                numbers = score.evaluate(encoder, rows_of_text, T, eval_rows, env, max_blocks=max_rows,
                                         progress=job.facts['name'])
            rows.append(row_of(job, T, numbers, k))
            whole.record.update(rows=rows)
            continue

        torch.manual_seed(seed)
        probe = Probe(encoder, job.decoder).to(env.device)
        start, _, _ = starting_checkpoint(init_from, job.folder, env)
        if start:
            probe.decoder.load_state_dict(start['decoder'])
        run = open_run(job, probe, start, config, whole, k)
        batches = Batches(autoencoding[0], order, seed, batch_size, T)
        if not train_decoder(run, job, probe, batches, start, k):
            sys.exit(run.pause())

        # All is saved: a signal leaves the scoring to a resume.
        with run.scoring():
            numbers = score.evaluate(probe, autoencoding[1], T, eval_rows, env, max_blocks=max_rows,
                                     progress=f'{job.facts["name"]} on {split}')
        run.note(f'val phase=probe step={run.step} loss={numbers["loss_nats"]:.5f} bpb={numbers["bits_per_byte"]:.4f}')
        if env.main:
            run.note(curves.draw_run(job.folder, run.loss_file))
        row = dict(row_of(job, T, numbers, k), decoder_params=run.record.values['n_params'],
                   seconds=round(run.counters['step_seconds'], 1))
        run.done(row=row)
        rows.append(row)
        whole.record.update(rows=rows)

    # 5. The table.
    if env.main:
        print(f'{write_table(out_dir, rows, SHOWN)}\nwrote {out_dir}')
    whole.done()
