"""Measure speed as ratios to a named baseline, in one process, in interleaved pairs; prints one table per area.

    python -m lab.bench procedures              rl1, drr, pmmp, lean pmmp, Muon, a grid against a vanilla step
    python -m lab.bench plain                   our step against a plain nanoGPT-style loop, three shapes
    python -m lab.bench step CONFIG.py          a config of train.py or distill.py: step time, tokens/s, peak memory and
                                            the share of the device's rate for a large matrix product
    python -m lab.bench distil                  a step of distillation against a student's step and a teacher's forward
    python -m lab.bench mixture                 a step on a mixture of two sets against one on a single set
    python -m lab.bench mixer                   blocks of mixers against a block of attention
    python -m lab.bench data                    a batch drawn, against nanoGPT's get_batch
    python -m lab.bench evaluation              a split scored, against one row at a time
    python -m lab.bench codec CKPT FILE         two-part archive of a file: bytes, kB/s each way with 1 and 2 threads

Numbers are medians over --pairs rounds in which every candidate runs once, in rotating order; spread is the
interquartile range of the per-round ratio. Steps are made of the pieces that the trainers take theirs from: train.py's
procedures, distill.py's loss, training/step.py. Writes --json_path (area -> rows), from which README's numbers are
taken.
"""
import functools
import itertools
import json
import os
import statistics
import tempfile
import time
from types import SimpleNamespace

from configurator import UserError, at_least, configure, knobs_of, require, run_config_file

# -----------------------------------------------------------------------------
pairs = 20                      # interleaved rounds
threads = 0                     # torch CPU threads; 0 = torch's default
device = 'auto'
dtype = 'auto'
weight_bits = 0.0               # codec: bits per non-zero weight, as in compress.py
json_path = 'bench.json'        # '' = print only
# -----------------------------------------------------------------------------

VERBS = {
    'procedures': 0,
    'plain': 0,
    'step': 1,
    'distil': 0,
    'mixture': 0,
    'mixer': 0,
    'data': 0,
    'evaluation': 0,
    'codec': 2,
}
verb, paths, config = configure(globals(), verbs=VERBS)

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import distill
import score
import sparse
import train
from codec import container, exact, quantised, twopart
from codec.grid import Grid, choose_codes
from codec.output import Output
from codec.text import tokenize
from corpus.bins import Bin, write_json
from corpus.data import Batches, Place
from corpus.mixture import Mixture
from model import GPT, SIZES, Block, ModelConfig, config_from_knobs, flops_per_token, linear
from training.checkpoint import commit_id, load_model
from training.optim import make_optimizers, set_rate
from training.parallel import norm_of, parallelise
from training.process import Env, hardware, rss_anon_bytes
from training.step import accumulate, clip, forget_gradients, unscale, update
from training.table import markdown

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RATE = 1e-4                     # of learning: its value costs no time
STRENGTH = 1e-7                 # of a penalty, likewise


# --- measuring ---

def interleave(candidates, rounds, env, warmup=2):
    """Time {name: step function} in interleaved rounds; return {name: [seconds]}."""
    names = list(candidates)
    seconds = {name: [] for name in names}
    for r in range(-warmup, rounds):
        first = r % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            candidates[name]()
            if env.kind == 'cuda':
                torch.cuda.synchronize()
            if r >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio_rows(seconds, baseline, tokens, label):
    """Return rows with medians and the per-round ratio to the baseline with its quartiles."""
    rows = []
    for name, times in seconds.items():
        ratios = sorted(t / b for t, b in zip(times, seconds[baseline], strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        median = statistics.median(times)
        rows.append(dict(setting=label, candidate=name, milliseconds=median * 1e3,
                         tokens_per_second=round(tokens / median), ratio=statistics.median(ratios),
                         quartiles=f'{low:.3f}-{high:.3f}', baseline=baseline))
    return rows


# --- steps ---

def size_config(name, block_size):
    return ModelConfig(**dict(SIZES[name], block_size=block_size))


def gpt2_config(**changes):
    plain = dict(SIZES['gpt2'], vocab_size=50257, positions='learned', activation='gelu_tanh', tied=True)
    return ModelConfig(**dict(plain, **changes))


def random_rows(config, n_rows):
    """Return inputs and targets (n_rows, T) of random ids, as data are gathered."""
    ids = torch.randint(config.vocab_size, (n_rows, config.block_size + 1)).numpy()
    x = ids[:, :-1].copy()
    y = ids[:, 1:].copy()
    return x, y


def random_tokens(n_tokens, vocab_size=256, dtype=np.uint8, name=''):
    """Return a split of random ids in memory."""
    ids = np.random.default_rng(0).integers(vocab_size, size=n_tokens, dtype=dtype)
    return Bin(ids, vocab_size, name=name)


def make_running(model, name, pmmp_state, grid_bits, make_adamw, x, y):
    """Return a procedure of train.py, or a grid of so many bits, begun on a model."""
    if grid_bits:
        codes = choose_codes(model, grid_bits, x, y)
        return Grid(dict(model.named_parameters()), codes, STRENGTH)
    knobs = SimpleNamespace(**train.config)
    knobs.alpha = STRENGTH
    knobs.pmmp_state = pmmp_state
    running = train.make_procedure(name, knobs)
    penalised = sparse.regularised(model, 'matrices')
    running.begin(penalised, functools.partial(make_adamw, weight_decay=0.0))
    return running


def training_step(config, env, n_rows, procedure='vanilla', pmmp_state='exact', matrix_optimizer='adamw', grid_bits=0,
                  recompute=False):
    """Return a function that takes one training step as train.py does, on random rows; it returns nats and norms."""
    torch.manual_seed(0)
    model = GPT(config).to(env.device)
    model.recompute = recompute
    step_model, set_sync = parallelise(model, env, compile=True)
    params = dict(model.named_parameters())
    tensors = list(params.values())
    make_adamw = functools.partial(torch.optim.AdamW, lr=RATE, fused=True)
    optimizers = make_optimizers(params, make_adamw, matrix_optimizer)
    scaler = torch.amp.GradScaler(env.kind, enabled=env.dtype == 'float16')
    masks = sparse.Masks(params)
    x, y = random_rows(config, n_rows)
    running = make_running(model, procedure, pmmp_state, grid_bits, make_adamw, x, y)

    def step():
        set_rate(optimizers, RATE)
        set_rate(running.optimizers, RATE)
        running.before_forward()
        nats = accumulate(step_model, x, y, n_rows, 1 / y.size, env, scaler, set_sync)
        running.after_backward()
        unscale(optimizers, tensors, scaler, env, sharded=False)
        masks.on_gradients()
        grad_norm = penalised_norm = norm_of(tensors, env)
        if running.edits:
            running.edit()
            masks.on_gradients()
            penalised_norm = norm_of(tensors, env)
        clip(tensors, 0.0, penalised_norm)
        update(optimizers, scaler)
        for optimizer in running.optimizers:
            optimizer.step()
        scaler.update()
        running.project()
        masks.on_weights()
        forget_gradients(optimizers)
        return float(nats), float(grad_norm), float(penalised_norm)
    return step


def distillation_step(config, teacher, knobs, env, n_rows):
    """Return a function that takes one step as distill.py does, of a student of config, from a teacher (GPT)."""
    torch.manual_seed(0)
    student = GPT(config).to(env.device)
    weights = {term: knobs[f'a_{term}'] for term in distill.TERMS}
    module = distill.Distillation(student, teacher, weights, knobs['temperature'], knobs['chunk_tokens'])
    step_module, set_sync = parallelise(module, env, compile=True)
    params = dict(student.named_parameters())
    tensors = list(params.values())
    make_adamw = functools.partial(torch.optim.AdamW, lr=RATE, fused=True)
    optimizers = make_optimizers(params, make_adamw)
    scaler = torch.amp.GradScaler(env.kind, enabled=env.dtype == 'float16')
    x, y = random_rows(config, n_rows)

    def step():
        set_rate(optimizers, RATE)
        sums = accumulate(step_module, x, y, n_rows, 1 / y.size, env, scaler, set_sync)
        unscale(optimizers, tensors, scaler, env, sharded=False)
        grad_norm = norm_of(tensors, env)
        clip(tensors, 0.0, grad_norm)
        update(optimizers, scaler)
        scaler.update()
        forget_gradients(optimizers)
        return sums.tolist(), float(grad_norm)
    return step


class PlainBlock(nn.Module):
    """A block as nanoGPT writes it: LayerNorm, SDPA, GELU, no dropout."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.head_width = C // config.n_head
        self.ln_1 = nn.LayerNorm(C)
        self.c_attn = nn.Linear(C, 3 * C)
        self.c_proj = nn.Linear(C, C)
        self.ln_2 = nn.LayerNorm(C)
        self.c_fc = nn.Linear(C, 4 * C)
        self.c_out = nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, C = x.size()
        h = self.ln_1(x)
        q, k, v = self.c_attn(h).split(C, dim=2)
        by_head = (B, T, self.n_head, self.head_width)
        q = q.view(by_head).transpose(1, 2)             # (B, H, T, D)
        k = k.view(by_head).transpose(1, 2)
        v = v.view(by_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        x = x + self.c_proj(y)
        h = self.ln_2(x)
        return x + self.c_out(F.gelu(self.c_fc(h)))


class PlainGPT(nn.Module):
    """A model as nanoGPT writes it; with targets y (B, T) the mean loss."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.wte = nn.Embedding(config.vocab_size, C)
        self.wpe = nn.Embedding(config.block_size, C)
        self.h = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C)
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        self.register_buffer('position', torch.arange(config.block_size))

    def forward(self, x, y):
        h = self.wte(x) + self.wpe(self.position)
        for block in self.h:
            h = block(h)
        logits = self.lm_head(self.ln_f(h)).flatten(0, 1)
        return F.cross_entropy(logits, y.flatten(), ignore_index=-1)


def plain_step(config, env, n_rows):
    """Return a step of the baseline: a nanoGPT-style model and loop written out, with fused AdamW."""
    torch.manual_seed(0)
    net = PlainGPT(config).to(env.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, fused=True)
    x, y = random_rows(config, n_rows)
    x = env.put(x)
    y = env.put(y)

    def step():
        loss = net(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


# --- areas: each returns rows of a table ---

def bench_procedures(env, rounds):
    config = size_config('transformer800k', 512)
    n_rows = 8
    steps = {name: training_step(config, env, n_rows, name) for name in ('vanilla', 'rl1', 'drr', 'pmmp')}
    steps['pmmp, lean'] = training_step(config, env, n_rows, 'pmmp', pmmp_state='lean')
    steps['Muon'] = training_step(config, env, n_rows, matrix_optimizer='muon')
    steps['on a grid of 4 bits'] = training_step(config, env, n_rows, grid_bits=4)
    seconds = interleave(steps, rounds, env)
    return ratio_rows(seconds, 'vanilla', n_rows * config.block_size, 'transformer800k, batch 8 x 512')


def bench_plain(env, rounds):
    rows = []
    shapes = [('transformer4.1m', 1, 256),
              ('transformer4.1m', 1, 2048),
              ('transformer800k', 8, 512)]
    for name, n_rows, T in shapes:
        config = size_config(name, T)
        steps = dict(plain=plain_step(config, env, n_rows), nanomdl=training_step(config, env, n_rows))
        seconds = interleave(steps, rounds, env)
        rows += ratio_rows(seconds, 'plain', n_rows * T, f'{name}, batch {n_rows} x {T}')
    return rows


def bench_distil(env, rounds, block_size=128, n_layer=6):
    """GPT-2 small teaches its six-layer student, one row of reduced length, random weights."""
    knobs, _ = knobs_of(os.path.join(REPOSITORY, 'distill.py'))
    config = gpt2_config(block_size=block_size, n_layer=n_layer)
    teacher = GPT(gpt2_config(block_size=block_size)).to(env.device).eval().requires_grad_(False)
    student_step = training_step(config, env, 1)
    ids = torch.randint(50257, (1, block_size), device=env.device)

    def both():
        with torch.no_grad(), env.autocast():
            teacher(ids)
        return student_step()
    steps = {'student step + teacher forward': both, 'distillation': distillation_step(config, teacher, knobs, env, 1)}
    return ratio_rows(interleave(steps, rounds, env), 'student step + teacher forward', block_size,
                      f'GPT-2 small to {n_layer} layers, batch 1 x {block_size}')


def bench_mixture(env, rounds):
    """Drawing rows of one set or of two and the same step after it; sources in memory, 10 MB each."""
    config = size_config('transformer200k', 256)
    n_rows = 16
    T = 256
    sources = [random_tokens(10 ** 7, name=name) for name in ('first', 'second')]
    step = training_step(config, env, n_rows)
    numbers = itertools.count()

    def drawing(data):
        batches = Batches(data, 'permuted', 0, n_rows, T)

        def draw_and_step():
            number = next(numbers)
            x, y, _ = batches.batch(Place(batch=number, number=number))
            env.put(x)
            env.put(y)
            return step()
        return draw_and_step
    mixture = Mixture(sources, [0.5, 0.5], T)
    steps = {'one set': drawing(sources[0]), 'mixture of two': drawing(mixture)}
    label = f'transformer200k, batch {n_rows} x {T}'
    return ratio_rows(interleave(steps, rounds, env), 'one set', n_rows * T, label)


def bench_mixer(env, rounds, n_rows=8, T=512, width=512):
    """Forward and backward of one block: attention, and mixers of the same width."""
    def step_of(**options):
        config = ModelConfig(block_size=T, n_embd=width, n_head=8, positions='none', **options)
        block = Block(config).to(env.device)
        x = torch.randn(n_rows, T, width, device=env.device, requires_grad=True)
        for p in block.parameters():
            torch.nn.init.normal_(p, 0, 0.02)

        def step():
            with env.autocast():
                block(x).sum().backward()
        return step
    steps = dict(attention=step_of(), mixer=step_of(block_type='mixer'),
                 multihead_mixer=step_of(block_type='multihead_mixer'),
                 expanded_mixer=step_of(block_type='mixer', expansion=1),
                 mixer_of_kernel_3=step_of(block_type='mixer', kernel=3))
    label = f'a block, batch {n_rows} x {T}, width {width}'
    return ratio_rows(interleave(steps, rounds, env), 'attention', n_rows * T, label)


def bench_data(env, rounds):
    """Drawing a batch: nanoGPT's get_batch, whose rows overlap at random, and this project's three orders."""
    data = random_tokens(10 ** 7, 50257, np.uint16)
    n_rows = 64
    T = 1024

    def rows_at(starts):
        rows = [torch.from_numpy(data.tokens[i:i + T].astype(np.int64)) for i in starts]
        return torch.stack(rows).to(env.device)

    def plain():
        starts = torch.randint(data.n_tokens - T, (n_rows,))
        return rows_at(starts), rows_at(starts + 1)

    def ours(order):
        batches = Batches(data, order, 0, n_rows, T)
        numbers = itertools.cycle(range(100))

        def draw():
            x, y, _ = batches.batch(Place(batch=next(numbers)))
            return env.put(x), env.put(y)
        return draw
    steps = {"nanoGPT's get_batch": plain}
    steps.update({order: ours(order) for order in ('sequential', 'permuted', 'random')})
    label = f'batch {n_rows} x {T}, uint16'
    return ratio_rows(interleave(steps, rounds, env), "nanoGPT's get_batch", n_rows * T, label)


def bench_evaluation(env, rounds):
    """Scoring a split, each token once, against a plain loop that takes a row at a time, as many scripts do."""
    config = size_config('transformer800k', 256)
    T = 256
    model = GPT(config).to(env.device).eval()
    data = random_tokens(64 * T)
    x, y = data.gather(np.arange(0, data.n_tokens, T), T)

    def plain():
        nats = 0.0
        with torch.no_grad(), env.autocast():
            for i in range(len(x)):
                logits = model(env.put(x[i:i + 1]))
                nats += F.cross_entropy(logits[0], env.put(y[i])).item()
        return nats
    steps = {'a row at a time': plain}
    for n in (1, score.rows_per_forward(T)):
        steps[f'{n} rows'] = functools.partial(score.evaluate, model, data, T, n, env)
    return ratio_rows(interleave(steps, rounds, env), 'a row at a time', data.n_tokens, f'transformer800k, T {T}')


# --- a step of a config ---

def product_flops(env, rounds):
    """Return floating-point operations per second of a large matrix product in a run's own precision."""
    n = 8192 if env.kind == 'cuda' else 1024
    dtype = getattr(torch, env.dtype)
    a = torch.randn(n, n, device=env.device, dtype=dtype)
    b = torch.randn(n, n, device=env.device, dtype=dtype)
    seconds = interleave(dict(product=lambda: linear(a, b)), 5 * rounds, env)
    return 2 * n ** 3 / statistics.median(seconds['product'])


def script_of(path):
    """Return the script that a config is for, as its first lines name it: 'train.py' or 'distill.py'."""
    with open(path, encoding='utf-8') as f:
        return 'distill.py' if 'distill.py' in f.readline() else 'train.py'


def step_of_config(script, knobs, config, n_rows, path, env):
    """Return a step of a config's main phase and the name of what it does."""
    if script == 'train.py':
        require((not config.wrapper, f'lab.bench step takes decoders, {path} has wrapper = {config.wrapper!r}'))
        name = knobs['procedure']
        return training_step(config, env, n_rows, name, knobs['pmmp_state'], knobs['matrix_optimizer'],
                             recompute=knobs['activation_checkpointing']), name

    # A named size stands for its checkpoint: random weights.
    if knobs['teacher'] in SIZES:
        teacher = GPT(gpt2_config(**SIZES[knobs['teacher']])).to(env.device)
    else:
        teacher, _ = load_model(knobs['teacher'], env.device)
    teacher.eval().requires_grad_(False)
    return distillation_step(config, teacher, knobs, env, n_rows), 'distillation'


def bench_step(env, rounds, path):
    """Time a step of a config's main phase on one process, and the peak memory it takes; GPT-2 has its vocabulary.

    percent_of_product counts the FLOPs of the model that is trained, not a teacher's.
    """
    script = script_of(path)
    defaults, _ = knobs_of(os.path.join(REPOSITORY, script))
    knobs = run_config_file(path, dict(defaults), defaults)
    config = config_from_knobs(knobs, 50257 if knobs['model'].startswith('gpt2') else 256)
    n_rows = knobs['micro_batch_size'] or knobs['batch_size']
    best = product_flops(env, rounds)
    before = rss_anon_bytes()
    peaks = []
    if env.kind == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    step, procedure = step_of_config(script, knobs, config, n_rows, path, env)

    def watched():
        step()
        peaks.append(torch.cuda.max_memory_allocated() if env.kind == 'cuda' else rss_anon_bytes() - before)
    median = statistics.median(interleave(dict(step=watched), rounds, env)['step'])
    speed = n_rows * config.block_size / median
    return [dict(config=os.path.basename(path), procedure=procedure, rows=n_rows, block_size=config.block_size,
                 milliseconds=median * 1e3, tokens_per_second=round(speed), memory_mib=max(peaks) / 2**20,
                 dtype=env.dtype, product_gflops=round(best / 1e9),
                 percent_of_product=100 * speed * flops_per_token(config) / best)]


# --- the codec ---

def pack(checkpoint, path, archive, **options):
    """Pack a file as compress.py does; return the archive's bytes and the bytes that were computed for it."""
    with Output(archive, overwrite=True) as out:
        _, computed = twopart.pack(checkpoint, path, out, twopart.Packing(**options))
        out.commit()
    return container.read_input(archive), computed


def unpack(path, n_threads):
    """Return the bytes that an archive decodes to."""
    archive = container.open_archive(path)
    return b''.join(twopart.decode_blocks(archive, 'unpack', twopart.Unpacking(threads=n_threads)))


def archive_facts(checkpoint, raw, data, computed, n_bytes_single, path):
    """Return what an archive is made of, and its bits per symbol beside those of the model in floats."""
    archive = container.read_archive(data, path)
    head = archive.head
    model, _ = load_model(checkpoint)
    ids, _ = tokenize(raw, head['tokenizer'])
    rows = quantised.rows_of(ids, head['start_id'], head['args']['block_size'], 32)
    per_position = quantised.float_bits(model.eval(), rows)
    fp32 = float(per_position.sum() * len(rows.x) / rows.y.size)
    integer_model = quantised.load_model(head, archive.sections)
    integer = exact.code_length_bits(integer_model, rows.x, rows.y) / rows.y.size
    nonzeros = sparse.count_nonzero(model.parameters())
    n_weights_bytes = len(archive.sections['wght'])
    n_data_bytes = len(archive.sections['data'])
    return dict(n_params=sum(p.numel() for p in model.parameters()), nonzeros=nonzeros,
                context=head['args']['block_size'], original_bytes=len(raw), archive_bytes=len(data),
                weights_bytes=n_weights_bytes, bits_per_nonzero=8 * n_weights_bytes / nonzeros,
                data_bytes=n_data_bytes, streams=head['streams'],
                streams_cost_percent=100 * (n_data_bytes / n_bytes_single - 1),
                file_minus_computed_bytes=float(len(data) - computed), fp32_bits_per_symbol=fp32,
                integer_bits_per_symbol=integer, integer_over_fp32_percent=float(100 * (integer / fp32 - 1)))


def bench_codec(checkpoint, path, weight_bits):
    """Pack and unpack a file, each with 1 and 2 threads, and hold the results against each other and against fp32."""
    raw = container.read_input(path)
    rows = []

    def timed(what, n_threads, job):
        torch.set_num_threads(n_threads)
        started = time.perf_counter()
        result = job()
        seconds = time.perf_counter() - started
        speed = len(raw) / 1000 / seconds
        rows.append(dict(what=what, threads=n_threads, seconds=seconds, kilobytes_per_second=speed))
        return result

    with tempfile.TemporaryDirectory() as folder:
        archives = {n: os.path.join(folder, f'{n}.mdl') for n in (1, 2)}
        packed = {}
        for n, archive in archives.items():
            packed[n] = timed('pack --no-verify', n, functools.partial(
                pack, checkpoint, path, archive, weight_bits=weight_bits, threads=n))
        data, computed = packed[1]
        if packed[2][0] != data:
            raise UserError('archives made with 1 and with 2 threads differ')
        for n in (1, 2):
            if timed('unpack', n, functools.partial(unpack, archives[1], n)) != raw:
                raise UserError(f'the archive decodes to other bytes with {n} threads')
        single, _ = pack(checkpoint, path, archives[2], weight_bits=weight_bits, streams=1)
    n_bytes_single = len(container.read_archive(single, path).sections['data'])
    facts = archive_facts(checkpoint, raw, data, computed, n_bytes_single, path)
    table = [dict(what=name, value=value) for name, value in facts.items()]
    print(markdown(table, ('what', 'value')))
    return rows


AREAS = dict(procedures=bench_procedures, plain=bench_plain, step=bench_step, distil=bench_distil,
             mixture=bench_mixture, mixer=bench_mixer, data=bench_data, evaluation=bench_evaluation)

if __name__ == '__main__':
    require(at_least('pairs', pairs, 2), at_least('threads', threads, 0))
    if threads:
        torch.set_num_threads(threads)
    env = Env(device, dtype)

    # Measure.
    how_often = f'medians of {pairs} rounds'
    if verb == 'codec':
        rows = bench_codec(*paths, weight_bits)
        how_often = 'once each'
    else:
        rows = AREAS[verb](env, pairs, *paths)

    # Show the table, and keep it beside those of the other areas.
    commit = commit_id() or 'none'
    print(f'# lab.bench {verb}: {hardware(env)}, torch {torch.__version__}, commit {commit}, {how_often}')
    print(markdown(rows, tuple(rows[0])))
    if json_path:
        tables = {}
        if os.path.exists(json_path):
            with open(json_path, encoding='utf-8') as f:
                tables = json.load(f)
        tables[verb] = dict(hardware=hardware(env), commit=commit_id(), rounds=pairs, rows=rows)
        write_json(json_path, tables)
