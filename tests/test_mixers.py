"""Mixers and models with encoders: causality, parity with explicit matrices, what a chunk remembers, bad input."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, losses_of, run_here, same, torchrun

from configurator import UserError
from corpus.bins import Bin
from corpus.objectives import Objective
from model import Mixer, ModelConfig, Triangles, build, flops_per_token, make, model_args, n_parameters
from training.checkpoint import load_checkpoint, load_encoder, save_checkpoint
from training.folder import read_run

MIXER = dict(block_size=32, n_embd=32, n_layer=2, n_head=4, positions='none', final_norm=False, block_type='mixer')
KINDS = [dict(block_type=b, kernel=k, expansion=e) for b, k, e in itertools.product(
    ('mixer', 'multihead_mixer'), (1, 3, 5), (0, 2))]
WITH = dict(autoencoder=dict(wrapper='autoencoder', spread='unroll'), oracle=dict(wrapper='oracle'),
            memory=dict(wrapper='memory', chunk_size=8))


def model(seed=0, **options):
    torch.manual_seed(seed)
    return make(ModelConfig(**MIXER | options)).eval()


def ids(batch=2, length=32, seed=0):
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(seed))


# --- the mixing ---

@pytest.mark.parametrize('n', [2, 4, 10, 64])
def test_a_folded_triangle_is_a_triangle(n):
    """Each entry of the parameter lands once on or below the diagonal, and none above."""
    mix = Triangles(n, groups=2, kernel=3)
    with torch.no_grad():
        mix.weight.copy_(torch.arange(1, mix.weight.numel() + 1).view_as(mix.weight))
    matrices = mix.matrices().detach()
    assert matrices.shape == (2, 3, n, n) and mix.weight.numel() == 6 * n * (n + 1) // 2
    assert (matrices.triu(1) == 0).all()
    for group in range(2):
        for k in range(3):
            low = matrices[group, k][torch.ones(n, n, dtype=torch.bool).tril()]
            own = mix.weight.view(2, 3, -1)[group, k]
            assert torch.equal(low.sort().values, own.detach().sort().values)


@pytest.mark.parametrize('kernel, groups, length', [*itertools.product((1, 3, 5), (1, 4), (16, 11))])
def test_mixing_is_an_explicit_masked_matmul(kernel, groups, length):
    """y[i, c] = sum_k sum_{j <= i} W_k[i, j] x[j, c + k - K/2] + b[i], to 1e-6; values and gradients."""
    torch.manual_seed(0)
    mix, x = Triangles(16, groups, kernel), torch.randn(3, groups, length, 8, requires_grad=True)
    for p in mix.parameters():
        torch.nn.init.normal_(p, 0, 0.1)
    want = torch.zeros(3, groups, length, 8)
    padded = F.pad(x, (kernel // 2, kernel // 2))
    for g in range(groups):
        for k in range(kernel):
            w = torch.tril(mix.matrices()[g, k])[:length, :length]
            want[:, g] = want[:, g] + w @ padded[:, g, :, k:k + 8]
        want[:, g] = want[:, g] + mix.bias.view(groups, 16)[g, :length, None]
    found = mix(x)
    assert torch.allclose(found, want, atol=1e-6)
    inputs = x, mix.weight, mix.bias
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (found, want)), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_parameters_between_tokens():
    """Published counts: n² flat (halved: the triangle alone), k·n² with kernel k, h·n² + 2 d² with h heads."""
    n, d, triangle = 32, 32, 32 * 33 // 2
    for options, expected in ((dict(), triangle + n), (dict(kernel=5), 5 * triangle + n),
                              (dict(n_head=4), 4 * (triangle + n) + 2 * d * (d + 1)),
                              (dict(expansion=2), 4 * (triangle + n))):
        assert sum(p.numel() for p in Mixer(n, d, **options).parameters()) == expected


@pytest.mark.parametrize('options', [dict(block_type='attention', positions='sinusoidal'), *KINDS], ids=str)
def test_no_logit_sees_a_later_token(options):
    """Changing token j changes no logit before j, exactly, and those from j on."""
    net, x = model(**options), ids()
    before = net(x)
    for j in (1, 7, 31):
        other = x.clone()
        other[:, j] = (other[:, j] + 1) % 256
        after = net(other)
        assert torch.equal(before[:, :j], after[:, :j]) and not torch.equal(before[:, j:], after[:, j:])


@pytest.mark.parametrize('options', KINDS, ids=str)
def test_a_row_token_by_token(options):
    """With a cache, pieces of a row have the logits of the whole row; a shorter row uses the leading submatrix."""
    net, x = model(**options), ids()
    whole, cache = net(x), net.new_cache()
    pieces = torch.cat([net(part, cache=cache) for part in x.split([1, 10, 1, 20], 1)], 1)
    assert torch.allclose(pieces, whole, atol=1e-5)
    assert torch.allclose(net(x[:, :13]), whole[:, :13], atol=1e-5)


def test_counts_and_rebuilding():
    """n_parameters counts what is there; model_args rebuild any model and stay as they were for plain ones."""
    for options in [*KINDS, *WITH.values(), dict(wrapper='memory', chunk_size=16, memory='none', bottleneck=0)]:
        net = model(**options)
        assert n_parameters(net.config) == sum(p.numel() for p in net.parameters())
        again = build(model_args(net))
        assert again.config == net.config and type(again) is type(net)
        assert flops_per_token(net.config) > 2 * n_parameters(net.config) - 4 * 256 * 32
    plain = make(ModelConfig())
    assert 'block_type' not in model_args(plain) and build(model_args(plain)).config == plain.config


# --- encoders ---

@pytest.mark.parametrize('block_type, positions', [('mixer', 'none'), ('attention', 'sinusoidal')])
@pytest.mark.parametrize('spread', ['repeat', 'unroll'])
def test_an_autoencoder_regenerates_a_batch(block_type, positions, spread):
    """A tiny one learns one batch by heart: more than 99 % of the tokens come back from one vector a row."""
    net = model(wrapper='autoencoder', spread=spread, block_type=block_type, positions=positions, block_size=16,
                n_embd=64, bottleneck=32).train()
    x, optimizer = ids(8, 16), torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(150):
        (net(x, x) / x.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (net(x).argmax(-1) == x).float().mean() > 0.99
    assert net.encode(x).shape == (8, 32) and torch.equal(net.decode(net.encode(x)), net(x))


def test_unrolled_windows_wrap_around():
    """Position i reads features i, i + 1, ... of the vector, C/2 of them, cyclically."""
    net = model(wrapper='autoencoder', spread='unroll', n_embd=8, block_size=12)
    seen = []
    net.unroll.register_forward_hook(lambda layer, given, out: seen.append(given[0]))
    net.decode(torch.arange(8.0)[None])
    assert seen[0][0, 0].tolist() == [0, 1, 2, 3] and seen[0][0, 6].tolist() == [6, 7, 0, 1]
    assert torch.equal(seen[0][0, 8], seen[0][0, 0]) and seen[0].shape == (1, 12, 4)


@pytest.mark.parametrize('memory', ['token', 'add', 'concat', 'none'])
def test_an_oracle_is_causal_but_for_its_vector(memory):
    """With the vector held, token j changes only what follows; without one nothing before j changes at all."""
    net, x = model(wrapper='oracle', memory=memory), ids()
    other = x.clone()
    other[:, 9] = (other[:, 9] + 1) % 256
    if memory != 'none':
        assert not torch.equal(net(x)[:, :9], net(other)[:, :9])                # the encoder sees the whole row
        held = net.encode(x)
        net.encode = lambda x: held
    a, b = net(x), net(other)
    assert torch.equal(a[:, :10], b[:, :10]) and not torch.equal(a[:, 10:], b[:, 10:])


def test_memory_is_of_earlier_chunks_alone():
    """A change in chunk c reaches later chunks through their slots, earlier ones not at all; 'none' reaches nothing."""
    x = ids()
    other = x.clone()
    other[:, 11] = (other[:, 11] + 1) % 256                                     # chunk 1 of 4
    net = model(**WITH['memory'])
    a, b = net(x), net(other)
    assert torch.equal(a[:, :12], b[:, :12]) and not torch.equal(a[:, 12:16], b[:, 12:16])
    assert all(not torch.equal(a[:, i:i + 8], b[:, i:i + 8]) for i in (16, 24))
    alone = model(**WITH['memory'], memory='none')
    a, b = alone(x), alone(other)
    assert torch.equal(a[:, 16:], b[:, 16:]) and not torch.equal(a[:, 12:16], b[:, 12:16])
    assert not any(n.startswith('encoder') for n, _ in alone.named_parameters())


def test_blank_copies_need_a_memory():
    """Half of the tokens, blank in the input, come from memory alone: chance without it, far above it with it."""
    rng, found = np.random.default_rng(0), {}
    data = Objective(Bin(rng.integers(100, 108, size=16 * 64, dtype=np.uint8)), 'blank_copy', 'memory')
    x, y = map(torch.from_numpy, data.gather(np.arange(64) * 16, 16))
    for memory in ('token', 'none'):
        net = model(block_size=16, chunk_size=8, wrapper='memory', memory=memory, n_embd=64)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for _ in range(120):
            (net(x, y) / (y >= 0).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        found[memory] = float((net(x).argmax(-1) == y).sum() / (y >= 0).sum())
    assert found['none'] < 0.25 and found['token'] > 0.5, found                 # 8 symbols: chance is 0.125


# --- bad input ---

@pytest.mark.parametrize('options, message', [
    (dict(kernel=2), 'kernel = 2, expected an odd number up to n_embd = 32'), (dict(kernel=33), 'kernel = 33'),
    (dict(block_size=31), "block_size = 31, a mixer's must be even"), (dict(positions='rotary'), 'a mixer has none'),
    (dict(block_type='multihead_mixer', n_head=5), 'n_embd = 32 is not a multiple of n_head = 5'),
    (dict(block_type='conv'), "block_type = 'conv', expected one of"),
    (dict(block_type='attention', kernel=3), 'kernel = 3 and expansion = 0 are of mixers'),
    (dict(wrapper='memory', chunk_size=12), 'chunk_size = 12: chunks of more than one token must fill block_size'),
    (dict(wrapper='memory', chunk_size=32), 'two at least'), (dict(wrapper='oracle', tied=True), 'no tied head'),
    (dict(wrapper='memory', chunk_size=8, memory='add'), "memory = 'add' is of wrapper = oracle")])
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**MIXER | options)


def test_rows_of_another_length():
    """Longer rows than a mixer's n, or than an encoder reads, say what to do."""
    with pytest.raises(UserError, match='33 positions asked of a model with block_size = 32; use shorter rows'):
        model()(ids(length=33))
    for options in WITH.values():
        with pytest.raises(UserError, match='rows of 24 tokens, this model takes 32'):
            model(**options)(ids(length=24))
    net = model()
    net.left_padding = True
    with pytest.raises(UserError, match='need a plain model with attention'):
        net(ids())


def test_encoders_of_checkpoints(tmp_path):
    """An autoencoder's encoder, or a language model without its head; another width or shape is refused."""
    def save(net):
        save_checkpoint(str(tmp_path / 'c.pt'), dict(model=net.state_dict(), model_args=model_args(net), masks={}))
        return str(tmp_path / 'c.pt')
    target, x = model(3, **WITH['oracle']), ids()
    for source in (model(1, **WITH['autoencoder']), model(2)):
        load_encoder(target, save(source))
        assert torch.equal(target.encode(x), source.encode(x))
    for source, message in ((model(n_embd=64), 'an encoder of width 64, this model has n_embd = 32'),
                            (model(n_layer=3), 'an encoder of another shape .blocks.2')):
        with pytest.raises(UserError, match=message):
            load_encoder(target, save(source))
    with pytest.raises(UserError, match='this model has no encoder'):
        load_encoder(model(), save(model()))


@pytest.mark.parametrize('options', [*KINDS[::3], *WITH.values(), dict(wrapper='oracle', memory='concat')], ids=str)
def test_compiled(options):
    """One graph without breaks, the same loss."""
    net, x = model(**options), ids()
    compiled = torch.compile(net, backend='aot_eager', fullgraph=True)
    assert compiled(x, x).item() == pytest.approx(net(x, x).item(), rel=1e-5)


# --- through the scripts ---

SMALL = ('--block_size=32', '--positions=none', '--no-final_norm', '--block_type=mixer')
JOBS = dict(mixer=(), heads=('--block_type=multihead_mixer', '--kernel=3', '--expansion=1'),
            autoencoder=('--wrapper=autoencoder', '--objective=autoencode', '--bottleneck=8', '--spread=unroll'),
            oracle=('--wrapper=oracle', '--objective=memory', '--memory=concat'),
            memory=('--wrapper=memory', '--objective=memory', '--chunk_size=8'),
            combined=('--objective=combined',), blank=('--wrapper=memory', '--objective=blank_copy', '--chunk_size=8'))


@pytest.mark.parametrize('name', JOBS)
def test_training_evaluating_pruning(train_tiny, tmp_path, name):
    """Every kind through train.py with PMMP and TAMADE, eval.py (the same test loss), prune.py."""
    train_tiny(*SMALL, *JOBS[name], '--procedure=pmmp', '--alpha=1e-4', '--initial_u_value=0.1', '--max_iters=12',
               '--do_pruning', '--tolerated_relative_loss_increase=0.05', '--epochs_fine_tuning=0.05')
    found = read_run(str(tmp_path / 'run'))
    assert found['status'] == 'done' and 0 < found['non_zero_params'] < found['n_params'] and found['epsilon'] > 0
    half = found['tokens_seen'] / found['step'] / 256
    assert half == {'combined': 0.5, 'blank': 0.5}.get(name, 1.0) or name == 'combined' and 0.5 < half < 1
    args = load_checkpoint(str(tmp_path / 'run'))
    data_dir = args['config']['data_dir']
    run_here('eval.py', f'--from_ckpt={tmp_path / "run"}', f'--data_dir={data_dir}', '--device=cpu',
             f'--out={tmp_path}')
    row, = read_run(str(next(tmp_path.glob('eval-*'))))['rows']
    assert row['loss_nats'] == pytest.approx(found['mean_test_loss'], abs=1e-6)
    run_here('prune.py', f'--from_ckpt={tmp_path / "run"}', f'--out_dir={tmp_path / "pruned"}', '--method=magnitude',
             '--sparsity=0.5', f'--data_dir={data_dir}')
    assert read_run(str(tmp_path / 'pruned'))['sparsity'] >= 0.45


@pytest.mark.slow
def test_ranks_and_resuming(toy, tmp_path, monkeypatch):
    """A memory mixer with PMMP: one process, DDP and FSDP2 have the same losses; stopped and resumed, the same bits."""
    flags = [*TINY, f'--data_dir={toy}', '--dataset=toy', *SMALL, *JOBS['memory'], '--procedure=pmmp', '--alpha=1e-4',
             '--initial_u_value=0.1', '--max_iters=10', '--final_train_blocks=0', '--eval_blocks=4', '--grad_clip=1']
    run_here('train.py', *flags, f'--out_dir={tmp_path / "one"}')
    for shard in ('', 'full'):
        done = torchrun(2, 'train.py', *flags, f'--shard={shard}', f'--out_dir={tmp_path / ("two" + shard)}')
        assert done.returncode == 0, done.stderr[-2000:]
        two, one = ([float(row['loss_nats']) for row in losses_of(tmp_path / n)] for n in (f'two{shard}', 'one'))
        assert len(one) == 10 and max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5
    part = [*flags, f'--out_dir={tmp_path / "part"}']
    with monkeypatch.context() as patch:
        patch.setenv('NANOMDL_STOP_AT_STEP', '1')
        assert run_here('train.py', *part) == 85
    assert read_run(str(tmp_path / 'part'))['status'] == 'paused'
    run_here('train.py', *part, '--init_from=resume')
    a, b = (load_checkpoint(str(tmp_path / name)) for name in ('one', 'part'))
    assert all(same(a[key], b[key]) for key in ('model', 'optimizer', 'procedure'))


def test_frozen_encoders_and_the_curriculum(train_tiny, tmp_path):
    """An encoder that is given and frozen keeps its bits; a copying run goes on as a language model (init_from)."""
    train_tiny(*SMALL, *JOBS['autoencoder'][:2], '--max_iters=3')
    encoder = load_checkpoint(str(tmp_path / 'run'))['model']
    train_tiny(*SMALL, *JOBS['oracle'], '--max_iters=3', f'--encoder_ckpt={tmp_path / "run"}', '--freeze_encoder',
               out='frozen')
    after = load_checkpoint(str(tmp_path / 'frozen'))
    kept = [n for n in encoder if n.startswith('encoder.')]
    assert kept and all(torch.equal(encoder[n], after['model'][n]) for n in kept)
    assert read_run(str(tmp_path / 'frozen'))['non_zero_params'] > sum(encoder[n].numel() for n in kept)
    train_tiny(*SMALL, *JOBS['blank'], '--max_iters=2', out='copy')
    train_tiny(*SMALL, *JOBS['memory'], '--max_iters=2', f'--init_from={tmp_path / "copy"}', out='next')
    assert read_run(str(tmp_path / 'next'))['parent']['path'].startswith(str(tmp_path / 'copy'))
    with pytest.raises(UserError, match="cannot resume: objective = 'memory', the checkpoint has 'blank_copy'"):
        train_tiny(*SMALL, *JOBS['memory'], '--max_iters=4', '--init_from=resume', out='copy')
    with pytest.raises(UserError, match='freeze_encoder: this model has no encoder'):
        train_tiny(*SMALL, '--freeze_encoder', out='none')
    with pytest.raises(UserError, match='cannot generate text token by token'):
        run_here('sample.py', f'--from_ckpt={tmp_path / "next"}', '--prompt=a')


@pytest.mark.parametrize('name, dtype', [*((name, 'bfloat16') for name in JOBS), ('heads', 'float16'),
                                         ('memory', 'float16')])
def test_narrow_floats(train_tiny, tmp_path, name, dtype):
    """Under autocast, with float16's scaler too, the losses stay near those of float32."""
    for out, flags in (('wide', ()), ('narrow', (f'--dtype={dtype}',))):
        train_tiny(*SMALL, *JOBS[name], '--max_iters=6', '--final_train_blocks=0', '--eval_blocks=4', *flags, out=out)
    wide, narrow = (read_run(str(tmp_path / out))['final_train_loss'] for out in ('wide', 'narrow'))
    assert wide != narrow and abs(wide - narrow) < 0.01
