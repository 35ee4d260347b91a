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
interquartile range of the per-round ratio. Writes --json_path (area -> rows), from which README's numbers are taken.
"""
import functools
import itertools
import json
import os
import statistics
import time
from types import SimpleNamespace

from configurator import at_least, configure, knobs_of, require, run, run_config_file

# -----------------------------------------------------------------------------
pairs = 20                      # interleaved rounds
threads = 0                     # torch CPU threads; 0 = torch's default
device = 'auto'
dtype = 'auto'
weight_bits = 0.0               # codec: bits per non-zero weight, as in compress.py
json_path = 'bench.json'        # '' = print only
# -----------------------------------------------------------------------------

VERBS = dict(procedures=0, plain=0, step=1, distil=0, mixture=0, mixer=0, data=0, evaluation=0, codec=2)


def interleave(candidates, rounds, env, warmup=2):
    """Time {name: step function} in interleaved rounds; return {name: [seconds]}."""
    names, seconds = list(candidates), {n: [] for n in candidates}
    for r in range(-warmup, rounds):
        for name in names[r % len(names):] + names[:r % len(names)]:
            started = time.perf_counter()
            candidates[name]()
            if env.kind == 'cuda':
                env.torch.cuda.synchronize()
            if r >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio_rows(seconds, baseline, tokens, label):
    """Rows with medians and the per-round ratio to the baseline with its quartiles."""
    rows = []
    for name, times in seconds.items():
        ratios = sorted(t / b for t, b in zip(times, seconds[baseline], strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        median = statistics.median(times)
        rows.append(dict(setting=label, candidate=name, milliseconds=median * 1e3,
                         tokens_per_second=round(tokens / median), ratio=statistics.median(ratios),
                         quartiles=f'{low:.3f}-{high:.3f}', baseline=baseline))
    return rows


def training_step(config, env, procedure, rows, lean=False, muon=False, grid_bits=0, recompute=False):
    """Return a closure that takes one training step as train.py does: forward, backward, edit, norms, optimiser."""
    import torch

    import sparse
    from codec import grid as qat
    from model import GPT
    from training.optim import make_optimizer
    torch.manual_seed(0)
    model = GPT(config).to(env.device)
    model.recompute = recompute
    model_step = torch.compile(model) if env.kind == 'cuda' else model
    adamw = functools.partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0, fused=True)
    named = dict(model.named_parameters())
    optimizer = make_optimizer(named, adamw, SimpleNamespace(
        matrix_optimizer='muon' if muon else 'adamw', muon_rate_ratio=1.0, weight_decay=0.0))
    params = sparse.regularised(model, 'matrices')
    theta, all_params = list(params.values()), list(model.parameters())
    edit, project = sparse.PROCEDURES[procedure]
    state = dict(alpha=1e-7, beta=5.0)
    if procedure == 'pmmp':
        state = sparse.pmmp_state(params, 1e-7, 1.0, 0.0, adamw, lean=lean)
    x, grid = torch.randint(config.vocab_size, (rows, config.block_size + 1), device=env.device), qat.Grid(1e-7)
    if grid_bits:
        grid.begin(named, qat.choose_codes(model, grid_bits, *(t.cpu().numpy() for t in (x[:, :-1], x[:, 1:]))))

        def edit(theta, gradients, state):
            grid.edit(dict(zip(params, gradients)))

    def step():
        grid.before_forward()
        with env.autocast():
            loss = model_step(x[:, :-1], x[:, 1:])
        (loss / (rows * config.block_size)).backward()
        grid.after_backward()
        norms = [torch.nn.utils.get_total_norm([p.grad for p in all_params])]
        if edit is not sparse.no_edit:
            edit(theta, [p.grad for p in theta], state)
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in all_params]))
        optimizer.step()
        if 'optimizer' in state:
            state['optimizer'].step()
        project(state)
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), [float(n) for n in norms]
    return step


def distillation_step(config, teacher, knobs, env, rows, seed=0):
    """Return a closure that takes one step as distill.py does, of a student of config, from a teacher (GPT)."""
    import torch

    import losses
    from model import GPT, optimizer_groups
    torch.manual_seed(seed)
    student = GPT(config).to(env.device)
    weights = {term: knobs[f'a_{term}'] for term in losses.TERMS}
    module = losses.Distillation(student, teacher, weights, knobs['temperature'], knobs['chunk_tokens'])
    module = torch.compile(module) if env.kind == 'cuda' else module
    params = list(student.parameters())
    optimizer = torch.optim.AdamW(optimizer_groups(params, 0.0), lr=1e-4, fused=True)
    x = torch.randint(config.vocab_size, (rows, config.block_size + 1), device=env.device)

    def step():
        with env.autocast():
            loss, terms = module(x[:, :-1], x[:, 1:])
        (loss / (rows * config.block_size)).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return terms.tolist(), float(norm)
    return step


def plain_step(config, env, rows, seed=0):
    """The baseline: a nanoGPT-style block and loop written out (LayerNorm, SDPA, GELU MLP, fused AdamW, no dropout)."""
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

    class PlainBlock(nn.Module):
        def __init__(self):
            super().__init__()
            c = config.n_embd
            self.ln_1, self.ln_2 = nn.LayerNorm(c), nn.LayerNorm(c)
            self.c_attn, self.c_proj = nn.Linear(c, 3 * c), nn.Linear(c, c)
            self.c_fc, self.c_out = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)

        def forward(self, x):
            B, T, C = x.size()
            q, k, v = self.c_attn(self.ln_1(x)).split(C, dim=2)
            q, k, v = (t.view(B, T, config.n_head, C // config.n_head).transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
            return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))

    torch.manual_seed(seed)
    c, vocabulary = config.n_embd, config.vocab_size
    net = nn.ModuleDict(dict(wte=nn.Embedding(vocabulary, c), wpe=nn.Embedding(config.block_size, c),
                             h=nn.ModuleList(PlainBlock() for _ in range(config.n_layer)), ln_f=nn.LayerNorm(c),
                             lm_head=nn.Linear(c, vocabulary, bias=False))).to(env.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    x = torch.randint(config.vocab_size, (rows, config.block_size + 1), device=env.device)
    position = torch.arange(config.block_size, device=env.device)

    def step():
        h = net.wte(x[:, :-1]) + net.wpe(position)
        for block in net.h:
            h = block(h)
        logits = net.lm_head(net.ln_f(h))
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), x[:, 1:].reshape(-1), ignore_index=-1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def size_config(name, block_size):
    from model import SIZES, ModelConfig
    return ModelConfig(**dict(SIZES[name], block_size=block_size))


def bench_procedures(env):
    config, rows = size_config('transformer800k', 512), 8
    steps = {p: training_step(config, env, p, rows) for p in ('vanilla', 'rl1', 'drr', 'pmmp')}
    steps |= {'pmmp, lean': training_step(config, env, 'pmmp', rows, lean=True),
              'Muon': training_step(config, env, 'vanilla', rows, muon=True),
              'on a grid of 4 bits': training_step(config, env, 'vanilla', rows, grid_bits=4)}
    return ratio_rows(interleave(steps, pairs, env), 'vanilla', rows * 512, 'transformer800k, batch 8 x 512')


def bench_plain(env):
    found = []
    for name, rows, T in (('transformer4.1m', 1, 256), ('transformer4.1m', 1, 2048), ('transformer800k', 8, 512)):
        config = size_config(name, T)
        steps = dict(plain=plain_step(config, env, rows), nanomdl=training_step(config, env, 'vanilla', rows))
        found += ratio_rows(interleave(steps, pairs, env), 'plain', rows * T, f'{name}, batch {rows} x {T}')
    return found


def bench_mixture(env):
    """Drawing rows of one set or of two and the same step after it; sources in memory, 10 MB each."""
    import numpy as np

    from corpus.bins import Bin, batch_starts
    from corpus.mixture import Mixture
    config, rows, T = size_config('transformer200k', 256), 16, 256
    one, two = (Bin(np.random.default_rng(k).integers(256, size=10 ** 7, dtype=np.uint8), name=str(k)) for k in (1, 2))
    mix, step, at = Mixture([one, two], [0.5, 0.5], T), training_step(config, env, 'vanilla', rows), itertools.count()
    draws = {'one set': (one, lambda i: batch_starts('permuted', 0, 0, i, rows, one.n_tokens, T)),
             'mixture of two': (mix, lambda i: mix.starts('permuted', 0, 0, 0, i, rows, T))}

    def drawn(data, draw):
        x, y = data.gather(draw(next(at)), T)
        env.put(x), env.put(y)
        return step()
    steps = {name: lambda pair=pair: drawn(*pair) for name, pair in draws.items()}
    return ratio_rows(interleave(steps, pairs, env), 'one set', rows * T, f'transformer200k, batch {rows} x {T}')


def bench_mixer(env, rows=8, n=512, width=512):
    """Forward and backward of one block: attention, and mixers of the same width."""
    import torch

    from model import Block, ModelConfig

    def step_of(**options):
        config = ModelConfig(block_size=n, n_embd=width, n_head=8, positions='none', **options)
        block, x = Block(config).to(env.device), torch.randn(rows, n, width, device=env.device, requires_grad=True)
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
    label = f'a block, batch {rows} x {n}, width {width}'
    return ratio_rows(interleave(steps, pairs, env), 'attention', rows * n, label)


def bench_data(env):
    """Drawing a batch: nanoGPT's get_batch, whose rows overlap at random, and this project's three orders."""
    import numpy as np
    import torch

    from corpus.bins import Bin, batch_starts
    tokens, rows, T, at = np.random.default_rng(0).integers(50257, size=10 ** 7, dtype=np.uint16), 64, 1024, [0]
    data = Bin(tokens, 50257)

    def plain():
        starts = torch.randint(len(tokens) - T, (rows,))
        x, y = (torch.stack([torch.from_numpy(tokens[i + k:i + k + T].astype(np.int64)) for i in starts])
                for k in (0, 1))
        return x.to(env.device), y.to(env.device)

    def ours(order):
        at[0] = (at[0] + 1) % 100
        x, y = data.gather(batch_starts(order, 0, 0, at[0], rows, data.n_tokens, T), T)
        return env.put(x), env.put(y)
    steps = {'nanoGPT\'s get_batch': plain} | {order: lambda order=order: ours(order)
                                              for order in ('sequential', 'permuted', 'random')}
    return ratio_rows(interleave(steps, pairs, env), next(iter(steps)), rows * T, f'batch {rows} x {T}, uint16')


def bench_evaluation(env):
    """Scoring a split, each token once, against a plain loop that takes a row at a time, as many scripts do."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    import score
    from corpus.bins import Bin
    from model import GPT
    config, T = size_config('transformer800k', 256), 256
    model = GPT(config).to(env.device).eval()
    data = Bin(np.random.default_rng(0).integers(256, size=64 * T, dtype=np.uint8))
    x, y = data.gather(np.arange(0, data.n_tokens, T), T)

    def plain():
        with torch.no_grad(), env.autocast():
            return sum(F.cross_entropy(model(env.put(x[i:i + 1]))[0], env.put(y[i])).item() for i in range(len(x)))
    steps = {'a row at a time': plain} | {
        f'{n} rows': lambda n=n: score.evaluate(model, data, T, n, env) for n in (1, score.rows_per_forward(T))}
    return ratio_rows(interleave(steps, pairs, env), 'a row at a time', data.n_tokens, f'transformer800k, T {T}')


def gpt2_config(**changes):
    from model import SIZES, ModelConfig
    return ModelConfig(**dict(SIZES['gpt2'], vocab_size=50257, positions='learned', activation='gelu_tanh', tied=True)
                       | changes)


def bench_distil(env, block_size=128, n_layer=6):
    """GPT-2 small teaches its six-layer student, one row of reduced length, random weights."""
    import torch

    from model import GPT
    here = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'distill.py')
    config, knobs = gpt2_config(block_size=block_size, n_layer=n_layer), knobs_of(here)[0]
    teacher = GPT(gpt2_config(block_size=block_size)).to(env.device).eval().requires_grad_(False)
    alone, x = training_step(config, env, 'vanilla', 1), torch.randint(50257, (1, block_size), device=env.device)

    def both():
        with torch.no_grad(), env.autocast():
            teacher(x)
        return alone()
    steps = {'student step + teacher forward': both, 'distillation': distillation_step(config, teacher, knobs, env, 1)}
    return ratio_rows(interleave(steps, pairs, env), next(iter(steps)), block_size,
                      f'GPT-2 small to {n_layer} layers, batch 1 x {block_size}')


def product_flops(env):
    """Floating-point operations per second of a large matrix product in a run's own precision."""
    import torch

    from model import linear
    n = 8192 if env.kind == 'cuda' else 1024
    a, b = (torch.randn(n, n, device=env.device, dtype=getattr(torch, env.dtype)) for _ in range(2))
    return 2 * n ** 3 / statistics.median(interleave(dict(product=lambda: linear(a, b)), 5 * pairs, env)['product'])


def bench_step(env, path):
    """Time a step of a config's main phase on one process, and the peak memory it takes; GPT-2 has its vocabulary.

    percent_of_product counts the FLOPs of the model that is trained, not a teacher's.
    """
    import torch

    import runs
    from model import GPT, SIZES, config_from_knobs, flops_per_token
    with open(path, encoding='utf-8') as f:
        script = 'distill.py' if 'distill.py' in f.readline() else 'train.py'
    defaults, _ = knobs_of(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), script))
    knobs = run_config_file(path, dict(defaults), defaults)
    config = config_from_knobs(knobs, 50257 if knobs['model'].startswith('gpt2') else 256)
    rows = knobs['micro_batch_size'] or knobs['batch_size']
    best, before, peaks = product_flops(env), runs.rss_anon_bytes(), []
    if env.kind == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    if script == 'train.py':
        require((not config.wrapper, f'lab.bench step takes decoders, {path} has wrapper = {config.wrapper!r}'))
        step = training_step(config, env, knobs['procedure'], rows, knobs['pmmp_state'] == 'lean',
                             knobs['matrix_optimizer'] == 'muon', recompute=knobs['activation_checkpointing'])
    else:
        name = knobs['teacher']                         # a named size stands for its checkpoint: random weights
        teacher = GPT(gpt2_config(**SIZES[name])).to(env.device) if name in SIZES else runs.load_model(
            name, env.device)[0]
        step = distillation_step(config, teacher.eval().requires_grad_(False), knobs, env, rows)
        knobs['procedure'] = 'distillation'

    def watched():
        step()
        peaks.append(torch.cuda.max_memory_allocated() if env.kind == 'cuda' else runs.rss_anon_bytes() - before)
    speed = rows * config.block_size / (median := statistics.median(interleave(dict(step=watched), pairs, env)['step']))
    return [dict(config=os.path.basename(path), procedure=knobs['procedure'], rows=rows, block_size=config.block_size,
                 milliseconds=median * 1e3, tokens_per_second=round(speed), memory_mib=max(peaks) / 2**20,
                 dtype=env.dtype, product_gflops=round(best / 1e9),
                 percent_of_product=100 * speed * flops_per_token(config) / best)]


def bench_codec(env, checkpoint, path):
    """Pack and unpack a file, each with 1 and 2 threads, and hold the results against each other and against fp32."""
    import tempfile

    import torch

    import compress
    import runs
    from codec import container, exact
    from configurator import UserError
    raw, rows = container.read_input(path), []

    def timed(what, n_threads, job):
        torch.set_num_threads(n_threads)
        started = time.perf_counter()
        found = job()
        seconds = time.perf_counter() - started
        rows.append(dict(what=what, threads=n_threads, seconds=seconds, kilobytes_per_second=len(raw) / 1000 / seconds))
        return found

    def pack(name, *flags):
        compress.configure(vars(compress), ['pack', checkpoint, path, name, f'--weight_bits={weight_bits}', *flags],
                           verbs=compress.VERBS)
        with container.Output(name, overwrite=True) as out:
            _, computed = compress.pack(checkpoint, path, out, lambda text: None)
            out.commit()
        return container.read_input(name), computed

    def unpack(n):
        compress.main(['unpack', one, made, '-f', f'--threads={n}', '--no-progress'])
        if container.read_input(made) != raw:
            raise UserError(f'the archive decodes to other bytes with {n} threads')

    with tempfile.TemporaryDirectory() as folder:
        one, two, made = (os.path.join(folder, name) for name in ('1', '2', 'made'))
        data, computed = timed('pack --no-verify', 1, lambda: pack(one, '--no-progress', '--threads=1'))
        if timed('pack --no-verify', 2, lambda: pack(two, '--no-progress', '--threads=2'))[0] != data:
            raise UserError('archives made with 1 and with 2 threads differ')
        for n in (1, 2):
            timed('unpack', n, lambda n=n: unpack(n))
        single = container.read_archive(pack(two, '--no-progress', '--streams=1')[0], two)[3]
    _, head, _, sections = container.read_archive(data, path)
    model, _ = runs.load_model(checkpoint)
    ids, _ = container.tokenize(raw, head['tokenizer'])
    x, y = compress.sample(ids, head['start_id'], head['args']['block_size'], 32)
    fp32, integer = (bits / y.size for bits in (
        compress.float_bits(model.eval(), x, y).sum() * len(x),
        exact.code_length_bits(compress.load_model(head, sections), x, y)))
    nonzero = sum(int(torch.count_nonzero(p)) for p in model.parameters())
    print(runs.markdown([dict(what=k, value=v) for k, v in dict(
        n_params=sum(p.numel() for p in model.parameters()), nonzeros=nonzero, context=head['args']['block_size'],
        original_bytes=len(raw), archive_bytes=len(data), weights_bytes=len(sections['wght']),
        bits_per_nonzero=8 * len(sections['wght']) / nonzero, data_bytes=len(sections['data']), streams=head['streams'],
        streams_cost_percent=100 * (len(sections['data']) / len(single['data']) - 1),
        file_minus_computed_bytes=float(len(data) - computed), fp32_bits_per_symbol=float(fp32),
        integer_bits_per_symbol=integer, integer_over_fp32_percent=float(100 * (integer / fp32 - 1))).items()],
        ('what', 'value')))
    return rows


def main(argv=None):
    verb, paths, config = configure(globals(), argv, verbs=VERBS)
    require(at_least('pairs', pairs, 2), at_least('threads', threads, 0))
    import torch

    import runs
    from corpus.bins import write_json
    if threads:
        torch.set_num_threads(threads)
    env = runs.Env(device, dtype)
    rows = globals()[f'bench_{verb}'](env, *paths)
    print(f'# lab.bench {verb}: {runs.hardware(env)}, torch {torch.__version__}, commit {runs.commit_id() or "none"},'
          f' {"once each" if verb == "codec" else f"medians of {pairs} rounds"}')
    print(runs.markdown(rows, tuple(rows[0])))
    if json_path:
        table = {}
        if os.path.exists(json_path):
            with open(json_path, encoding='utf-8') as f:
                table = json.load(f)
        row = dict(hardware=runs.hardware(env), commit=runs.commit_id(), rounds=pairs, rows=rows)
        write_json(json_path, table | {verb: row})
    return 0


if __name__ == '__main__':
    run(main)
