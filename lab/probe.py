"""Ask what a vector still knows: train a fresh decoder to regenerate the input from a frozen encoder's last state.

    python -m lab.probe config/mixers/probe_sample_16.py --from_ckpt=out/a,out/b    a table, a row for each encoder
    python -m lab.probe config/mixers/probe_512.py --from_ckpt=out/RUN --untrained    and its shape with fresh weights
    torchrun --nproc_per_node=8 -m lab.probe config/mixers/probe_512.py --from_ckpt=gpt2    a hub id
    python -m lab.probe --mode=entropy --from_ckpt=out/RUN --max_rows=8             what each token of some rows costs

In: checkpoints, data set. Out: OUT_DIR/{run.json, table.md, table.csv}; OUT_DIR/ENCODER/{ckpt.pt, log.txt,
train_loss.csv, loss.png, run.json} of each decoder, or OUT_DIR/entropy.csv. Exit 85: saved, --init_from=resume goes on.

Information (Badger, arXiv 2409.01482, 2602.13466): the encoder reads the T tokens of a row; the state it ends in is all
that a causal decoder of T positions is given; its loss is the unshifted cross-entropy with those tokens. accuracy is
the share regenerated (the source's Hamming), information 1 - H/ln V at H nats per token. embedding_nats is what the
vector itself costs, numbers x embedding_bits x ln 2 / T per token: add it where a code length is meant.

Entropy (Badger & Neligeorge, arXiv 2511.10618), with S(t) the nats of tokens 1..t by a model that reads just these:
two_window_nats of token t is S(t) - S(t-1), by the chain rule H(t|<t) = H(<=t) - H(<t): two windows, one token apart.
It is exact for the model and takes T forwards a row. Of a causal model, a memory model of chunks too, it is the loss;
of an oracle, whose decoder is given a vector of the whole window, what one more token adds, the cost of the vector
being the same in both; an oracle that was trained on whole rows only is asked here about shorter ones.
Occlusion, of models with a memory, compares outputs with the vectors and with zeros in their place, two forwards:
occlusion_nats is the loss without minus the loss with, what the memory told of a token; occlusion_l1 and
occlusion_cosine are distances of the logits, sum |a - b| and 1 - cos(a, b).
"""
import csv
import math
import os
import time
from dataclasses import replace
from types import SimpleNamespace

from configurator import UserError, at_least, configure, one_of, require, run
from training.plan import batch_rules, optimizer_rules, rate_at

# -----------------------------------------------------------------------------
# run
mode = 'information'            # 'information' or 'entropy'
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
max_rows = 0                    # leading rows of the split that are scored; 0 = all (entropy: 8)
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

CSV_COLUMNS = ('phase', 'epoch', 'step', 'tokens', 'loss_nats', 'lr', 'grad_norm', 'seconds')
SHOWN = ('encoder kind data numbers loss_nats accuracy information embedding_nats bits_per_byte tokens decoder_params '
         'seconds').split()
OCCLUSION = 'occlusion_nats', 'occlusion_l1', 'occlusion_cosine'
SHOWN_ENTROPY = 'encoder', 'data', 'rows', 'tokens', 'loss_nats', 'two_window_nats', *OCCLUSION, 'seconds'
FIXED = ('seed', 'order', 'train_only_on_leading_tokens', 'block_size', 'block_type', 'n_layer', 'n_head',
         'n_embd', 'kernel', 'positions', 'spread', 'max_iters', 'batch_size', 'learning_rate', 'schedule',
         'warmup_iters', 'max_rows', 'min_learning_rate_ratio', 'beta1', 'beta2', 'adam_epsilon', 'weight_decay',
         'grad_clip')                                                   # of a resumed probe
ENTROPY_COLUMNS = 'encoder', 'row', 'position', 'token', 'loss_nats', 'two_window_nats', *OCCLUSION
ENTROPY_ROWS = 8
MAX_SKIPPED = 20                # fp16 steps with non-finite gradients in a row


def names_of(paths):
    """Return a short name for each checkpoint: its run folder's, with the file's where that is not ckpt.pt."""
    names = []
    for path in paths:
        folder, file = os.path.split(path.rstrip('/')) if path.endswith('.pt') else (path.rstrip('/'), 'ckpt.pt')
        name = os.path.basename(folder) + ('' if file == 'ckpt.pt' else f'-{file.removesuffix(".pt")}')
        names.append(name if name not in names else f'{name}-{len(names)}')
    return names


def make_probe(encoder, decoder_config):
    """Return a module that maps ids (B, T) to logits (B, T, V), with targets to summed nats: encoder, then decoder.

    decoder_config: of an autoencoder, of which the decoder alone is kept; its bottleneck is the width of the vector
    where that is not its own.
    """
    import torch
    import torch.nn as nn

    from model import make
    decoder = make(decoder_config)
    decoder.encoder = decoder.narrow = None

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder, self.config = encoder.requires_grad_(False), decoder, decoder_config

        def train(self, mode=True):
            super().train(mode)
            self.encoder.eval()                                         # no dropout in what is measured
            return self

        def forward(self, x, y=None):
            with torch.no_grad():
                vector = self.encoder.encode(x)
            return self.decoder.decode(vector.float(), y)

    return Probe()


def decoder_of(args, T, vocab_size):
    """Return the ModelConfig of a decoder for the encoder with these model_args."""
    from model import ModelConfig
    kind, numbers = block_type or args.get('block_type', 'attention'), args.get('bottleneck') or args['n_embd']
    width = n_embd or args['n_embd']
    return ModelConfig(block_size=T, vocab_size=vocab_size, n_layer=n_layer or args['n_layer'],
                       n_head=n_head or args['n_head'], n_embd=width, block_type=kind, kernel=kernel, spread=spread,
                       positions=positions or ('sinusoidal' if kind == 'attention' else 'none'),
                       wrapper='autoencoder', bottleneck=numbers if numbers != width else 0)


def train_probe(probe, folder, facts, train_data, test_data, env, k, signals, whole):
    """Train the decoder of one probe in its run folder; return its numbers, or None where it was saved and stopped.

    whole: the RunRecord of all probes together.
    """
    import torch

    import runs
    import score
    from corpus.bins import batch_starts, n_blocks
    from model import flops_per_token, model_args, optimizer_groups
    from training import curves, parallel
    T, decoder, path = probe.config.block_size, probe.decoder, os.path.join(folder, 'ckpt.pt')
    c = probe.encoder.config
    reader = replace(c, wrapper='', block_size=T, n_layer=c.n_layer_encoder or c.n_layer)
    start = runs.load_checkpoint(path) if init_from == 'resume' and os.path.exists(path) else {}
    if start:
        decoder.load_state_dict(start['decoder'])
    step_model, set_sync = parallel.parallelise(probe, env, compile)
    params = list(decoder.parameters())
    optimizer = torch.optim.AdamW(optimizer_groups(params, weight_decay), lr=learning_rate, betas=(beta1, beta2),
                                  eps=adam_epsilon, fused=env.kind in ('cuda', 'cpu'))
    scaler = torch.amp.GradScaler(env.kind, enabled=env.dtype == 'float16')
    if start:
        optimizer.load_state_dict(start['optimizer'])
        scaler.load_state_dict(start['scaler'])
    counters = {name: start.get(name, 0) for name in ('step', 'tokens', 'step_seconds', 'final_train_loss')}
    skipped = 0
    if env.main:
        runs.open_run_folder(folder, overwrite, init_from == 'resume')
    env.barrier()
    flops = flops_per_token(replace(probe.config, wrapper='')) + flops_per_token(reader) // 3      # this one forward
    record = runs.RunRecord(folder, k.config, env, seq_length=T, n_steps=max_iters, flops_per_token=flops,
                            n_params=sum(p.numel() for p in params), procedure='probe', **facts)
    if env.main:
        log, loss_file, loss_csv = runs.open_logs(folder, CSV_COLUMNS, counters['step'])

    def note(line):
        if env.main:
            runs.say(log, line)

    def save():
        if env.main:
            loss_file.flush()
            runs.save_checkpoint(path, dict(
                decoder=decoder.state_dict(), model_args=model_args(decoder), optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(), config=k.config, **facts, **counters))
            runs.commit_run_folders()
        env.barrier()

    rows_per_rank, saved_at = batch_size // env.world, time.time()
    micro, epoch_steps = micro_batch_size or rows_per_rank, n_blocks(n_blocks(train_data.n_tokens, T), batch_size)
    bytes_per_token = train_data.bytes_per_target
    probe.train()
    bar = runs.progress_bar(facts['name'], max_iters, counters['step'], env)
    window = [time.time(), 0, 0.0]                                      # for log.txt: start, tokens, nats
    while counters['step'] < max_iters:
        began, lr = time.time(), rate_at(counters['step'], max_iters, learning_rate, k)
        for group in optimizer.param_groups:
            group['lr'] = lr
        epoch, batch = divmod(counters['step'], epoch_steps)
        starts = batch_starts(order, seed, epoch, batch, batch_size, train_data.n_tokens, T)
        n_scored = train_data.n_scored(starts, T)
        mine = starts[env.rank * rows_per_rank:(env.rank + 1) * rows_per_rank]
        sums = torch.zeros(3, device=env.device)                        # nats, stop?, checkpoint due?
        sums[1] = float(bool(signals.received))
        sums[2] = float(env.main and bool(checkpoint_time) and time.time() - saved_at > checkpoint_time)
        for i in range(0, rows_per_rank, micro):
            x, y = train_data.gather(mine[i:i + micro], T)
            set_sync(i + micro >= rows_per_rank)
            with env.autocast():
                loss = step_model(env.put(x), env.put(y))               # nats, summed over the rows
            scaler.scale(loss * (env.world / n_scored)).backward()      # ranks are averaged: hence world
            sums[0] += loss.detach()
        scaler.unscale_(optimizer)
        nats, stop, save_due = env.sum(sums).tolist()
        norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
        skipped = 0 if math.isfinite(norm) else skipped + 1             # the scaler skips such a step and scales down
        if not math.isfinite(nats) or skipped and not scaler.is_enabled() or skipped == MAX_SKIPPED:
            record.update(status='failed', failure=f'non-finite loss {nats} or gradient norm {norm}')
            raise UserError(f"loss {nats}, gradient norm {float(norm)} at step {counters['step']}: stopped before the"
                            f' update; try a lower --learning_rate (now {learning_rate:g}) or --dtype=float32')
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        counters.update(step=counters['step'] + 1, tokens=counters['tokens'] + n_scored,
                        final_train_loss=nats / n_scored, step_seconds=counters['step_seconds'] + time.time() - began)
        step = counters['step']
        window[1:] = window[1] + n_scored, window[2] + nats
        if env.main and step % log_every == 0:
            loss_csv.writerow(('probe', epoch, step, counters['tokens'], f'{nats / n_scored:.6f}', f'{lr:.4g}',
                               f'{float(norm):.4g}', f"{counters['step_seconds']:.3f}"))
        bar.update()
        if step % log_interval == 0 or step == max_iters:
            speed, mean = window[1] / (time.time() - window[0]), window[2] / window[1]
            bpb = mean / math.log(2) / bytes_per_token
            bar.set_postfix_str(f'{mean:.3f} nats/token, {speed:,.0f} tokens/s')
            note(f'train phase=probe epoch={epoch} step={step} loss={mean:.5f} bpb={bpb:.4f} lr={lr:.3g}'
                 f' grad_norm={float(norm):.3g} tokens_per_second={speed:.0f}')
            record.update(step=step, train_loss=mean, phase='probe', train_tokens_per_second=round(speed))
            window = [time.time(), 0, 0.0]
        if stop and step < max_iters or save_due:
            save()
            saved_at = time.time()
        if stop and step < max_iters:
            bar.close()
            note(record.pause(signals.where(step), step=step))
            return None
    bar.close()
    if counters['step'] != start.get('step'):
        save()
    signals.leave_at_once(record, whole)                                # all is saved; a resume scores
    found = score.evaluate(probe, test_data, T, score.rows_per_forward(T), env, max_blocks=max_rows,
                           progress=f'{facts["name"]} on {split}')
    signals.remember()
    note(f"val phase=probe step={counters['step']} loss={found['loss_nats']:.5f} bpb={found['bits_per_byte']:.4f}")
    if env.main:
        note(curves.draw_run(folder, loss_file))
    row = row_of(facts, probe.encoder, T, found)
    row.update(decoder_params=record.values['n_params'], seconds=round(counters['step_seconds'], 1))
    record.update(status='done', row=row)
    return row


def row_of(facts, encoder, T, found):
    """Return a row of the table: what was found of an encoder whose vector stands for T tokens."""
    from score import embedding_nats
    numbers = encoder.config.bottleneck or encoder.config.n_embd
    return dict(encoder=facts['name'], kind=facts['kind'], data=f'{facts["data"]["dataset"]}/{split}', numbers=numbers,
                embedding_nats=embedding_nats(numbers, embedding_bits, T), **found)


def entropy_of(model, T, data, env, name):
    """Measure the leading rows of data, token by token; return (row of means, lines of entropy.csv as dicts)."""
    import torch
    from tqdm import tqdm

    import score
    began, lines = time.time(), []
    starts = [start for start, _ in score.windows(data.n_tokens, T)][:max_rows or ENTROPY_ROWS]
    with torch.no_grad(), env.autocast():
        for n, start in enumerate(tqdm(starts, name, unit='row', leave=False)):
            x, y = (env.put(part) for part in data.gather([start], T))
            found = score.token_costs(model, x, y)
            lines += [dict(encoder=name, row=n, position=i, token=token,
                           **{key: float(cost[0, i]) for key, cost in found.items()})
                      for i, token in enumerate(y[0].tolist()) if token >= 0]
    means = {key: sum(line[key] for line in lines) / len(lines) for key in found}
    return dict(encoder=name, data=f'{data.name}/{split}', rows=len(starts), tokens=len(lines), **means,
                seconds=round(time.time() - began, 1)), lines


def main(argv=None):
    config = configure(globals(), argv)
    config.pop('overwrite')
    paths, k = [p.strip() for p in from_ckpt.split(',') if p.strip()], SimpleNamespace(**config, config=config)
    require(one_of('mode', mode, ('information', 'entropy')), (paths, 'from_ckpt is empty; name encoders,'
            ' --from_ckpt=out/RUN,gpt2'), one_of('init_from', init_from, ('scratch', 'resume')),
            one_of('order', order, ('permuted', 'sequential', 'random')),
            one_of('spread', spread, ('unroll', 'repeat')),
            (spread == 'unroll' or positions != 'rotary', "spread = 'repeat' gives all positions the same input, which"
             " rotary attention cannot tell apart; use positions = 'sinusoidal' or spread = 'unroll'"),
            *batch_rules(k, int(os.environ.get('WORLD_SIZE', 1))), *optimizer_rules(k),
            *(at_least(name, config[name], 0) for name in (
                'n_layer', 'n_head', 'n_embd', 'block_size', 'max_rows', 'train_only_on_leading_tokens',
                'checkpoint_time', 'max_runtime')),
            *(at_least(name, config[name], 1) for name in ('max_iters', 'log_every', 'log_interval',
                                                           'embedding_bits')))
    import torch

    import runs
    import score
    from corpus.data import open_split
    from corpus.objectives import with_objective
    from model import build
    signals = runs.StopSignals(max_runtime) if mode == 'information' else None     # entropy has nothing to save
    env, loaded = runs.Env(device, dtype), [runs.load_checkpoint(path) for path in paths]
    sets = {dataset or c['data']['dataset'] for c in loaded}
    require((len(sets) == 1 and all(sets), f'the encoders were trained on {", ".join(sorted(sets)) or "no data set"};'
             ' name one for all, --dataset=NAME'),
            (mode == 'information' or env.world == 1 and init_from == 'scratch', 'mode = entropy runs in one process'
             ' and from scratch; drop torchrun and init_from'))
    name = sets.pop()
    test_data = open_split(data_dir, name, split, verify)
    train_data = open_split(data_dir, name, 'train', verify).head(train_only_on_leading_tokens) \
        if mode == 'information' else test_data
    jobs = []
    for path, label, checkpoint in zip(paths, names_of(paths), loaded):
        args, tokenizer = checkpoint['model_args'], checkpoint['data']['tokenizer']
        wrapper, whole = args.get('wrapper', ''), args['block_size']
        longest = args['chunk_size'] if wrapper == 'memory' and mode == 'information' else whole
        T = block_size or train_data.row_length or longest
        require((tokenizer == train_data.tokenizer and train_data.vocab_size <= args['vocab_size'],
                 f"{path} reads {tokenizer!r} tokens with a vocabulary of {args['vocab_size']}, data set {name!r} holds"
                 f' {train_data.tokenizer!r} tokens with {train_data.vocab_size}; prepare the text with the tokenizer'
                 ' of the encoder'),
                (T <= longest, f'rows have {T} tokens, {path} was built for at most {longest}; write'
                 f' --block_size={longest}'),
                (train_data.row_length in (0, T), f'block_size = {T}, {name!r} has rows of {train_data.row_length}'
                 f' tokens; set --block_size={train_data.row_length}'),
                (not train_data.padded, f'{name!r} has rows with hidden padding, which no encoder reads'),
                (train_data.n_tokens > 0 and test_data.n_tokens > 0, f'{name!r} has an empty train or {split} split'),
                (not wrapper or wrapper == 'autoencoder' or args.get('memory') != 'none' or mode == 'entropy',
                 f"{path} has no encoder (memory = 'none')"),
                (mode == 'information' or wrapper != 'autoencoder', f'{path} is an autoencoder, which predicts no next'
                 ' token; mode = entropy needs a language model'),
                (mode == 'information' or not wrapper or T == whole, f'block_size = {T}, {path} takes rows of {whole}'))
        facts = dict(encoder=runs.parent_of(path)['sha256'], from_ckpt=path, data=dict(
            dataset=name, sha256=train_data.sha256, scored=test_data.sha256, tokenizer=tokenizer))
        kinds = {'trained': True, 'untrained': untrained, 'own decoder': own_decoder and wrapper == 'autoencoder'}
        for kind in [kind for kind, wanted in kinds.items() if wanted and (kind == 'trained' or mode == 'information')]:
            folder = os.path.join(out_dir, label if kind == 'trained' else f'{label}-{kind.replace(" ", "_")}')
            jobs.append((folder, checkpoint, decoder_of(args, T, train_data.vocab_size), dict(
                facts, name=os.path.basename(folder), kind=kind)))
    before = [runs.read_run(folder) if init_from == 'resume' else {} for folder, *_ in jobs]
    require(*((old.get(key) == new, f'cannot resume: {key} = {new!r}, {folder} was made with {old.get(key)!r}')
              for old, (folder, _, _, facts) in zip(before, jobs) if old
              for key, new in (dict((key, config[key]) for key in FIXED) | dict(
                  encoder=facts['encoder'], data=facts['data'])).items()))
    env.barrier()                                                       # all ranks have read what was there
    if env.main:
        trained = [folder for (folder, _, _, facts), old in zip(jobs, before)
                   if facts['kind'] != 'own decoder' and old.get('status') != 'done']
        for folder in (out_dir, *trained):                              # refuse before the first is trained
            runs.check_run_folder(folder, overwrite, init_from == 'resume', paths)
        runs.open_run_folder(out_dir, overwrite, init_from == 'resume', paths)
    env.barrier()
    record, rows, lines = runs.RunRecord(out_dir, config, env), [], []
    for (folder, checkpoint, decoder, facts), old in zip(jobs, before):
        if old.get('status') == 'done':
            rows.append(old['row'])
            continue
        torch.manual_seed(seed + 1)                                     # of fresh weights; others are overwritten
        encoder = build(checkpoint['model_args'])
        if facts['kind'] != 'untrained':
            runs.load_weights(encoder, checkpoint, facts['from_ckpt'])
        encoder, wrapper = encoder.to(env.device).eval(), encoder.config.wrapper
        rows_of = with_objective(test_data, 'memory' if wrapper else 'clm', wrapper)
        if mode == 'entropy':
            row, more = entropy_of(encoder, decoder.block_size, rows_of, env, facts['name'])
            lines += more
        elif facts['kind'] == 'own decoder':
            T = decoder.block_size
            signals.leave_at_once(record)
            row = row_of(facts, encoder, T, score.evaluate(encoder, rows_of, T, score.rows_per_forward(T), env,
                                                           max_blocks=max_rows, progress=facts['name']))
            signals.remember()
        else:
            torch.manual_seed(seed)                                     # the same decoder for encoders of one shape
            tokens = [with_objective(data, 'autoencode', 'autoencoder') for data in (train_data, test_data)]
            row = train_probe(make_probe(encoder, decoder).to(env.device), folder, facts, *tokens, env, k, signals,
                              record)
        if row is None:
            record.pause(f'at {facts["name"]} by {signals.received or "rank"}')
            env.barrier()                                               # the first rank to go may end the others
            env.close()
            runs.close_run_folders()
            return runs.PAUSED
        rows.append(row)
        record.update(rows=rows)
    env.barrier()                                                       # the first rank to go may end the others
    env.close()
    if env.main:
        columns = SHOWN if mode == 'information' else SHOWN_ENTROPY
        table = runs.markdown(rows, [c for c in columns if any(c in row for row in rows)])
        with open(os.path.join(out_dir, 'table.md'), 'w', encoding='utf-8') as f:
            f.write(table + '\n')
        runs.write_csv(os.path.join(out_dir, 'table.csv'), rows)
        if mode == 'entropy':
            with open(os.path.join(out_dir, 'entropy.csv'), 'w', newline='', encoding='utf-8') as f:
                table_of = csv.DictWriter(f, ENTROPY_COLUMNS, restval='')
                table_of.writeheader()
                table_of.writerows(lines)
        print(f'{table}\nwrote {out_dir}')
    if signals:
        signals.close()
    runs.commit_run_folders()
    record.update(status='done')
    runs.close_run_folders()
    return 0


if __name__ == '__main__':
    run(main)
