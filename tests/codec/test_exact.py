"""exact.py and what it stands on: the integer model against the float model, the same integers however it is run."""
import hashlib
import math

import numpy as np
import pytest
import torch

from codec import arithmetic, exact, layers, sites, weights
from corpus.bins import mix64
from model import GPT, ModelConfig, Triangles, model_args

SHAPES = [
    dict(),
    dict(positions='learned', activation='gelu_tanh', tied=True),
    dict(positions='rotary', norm='rmsnorm', activation='relu2', bias=False, qk_norm=True),
    dict(positions='rotary', qk_norm=True, tied=True, n_embd=48, n_head=3),
    dict(norm='rmsnorm', bias=False, n_layer=1),
    dict(block_type='mixer', positions='none', final_norm=False),
    dict(block_type='mixer', positions='learned', norm='rmsnorm', bias=False, tied=True),
    dict(block_type='multihead_mixer', positions='none', final_norm=False, n_head=4),
    dict(block_type='multihead_mixer', norm='rmsnorm', activation='relu2'),
    dict(block_type='mixer', positions='none', expansion=3),
    dict(block_type='multihead_mixer', positions='none', activation='relu2', expansion=2),
    dict(block_type='multihead_mixer', norm='rmsnorm', bias=False, final_norm=False, expansion=1),
]


def tiny(seed=1, **options):
    """A GPT whose weights are large enough that logits differ, with uneven norm gains and biases."""
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**(dict(block_size=48, n_layer=2, n_head=2, n_embd=32) | options)))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0 if p.dim() > 1 else 1.0).add_(torch.randn_like(p) * (0.0 if p.dim() > 1 else 0.1))
    return model.eval()


def rows(n, size, seed=3):
    return np.random.default_rng(seed).integers(0, 256, (n, size + 1))


def integers(model, levels=127):
    """Fold a GPT and round every row to `levels`; returns (args, {name: (integers, scale)})."""
    args, out = model_args(model), {}
    for name, w in weights.fold(model.state_dict(), args).items():
        scale = np.maximum(np.abs(w).max(-1, keepdims=True), 1e-9) / levels
        out[name] = np.rint(w / scale).astype(np.int32), scale
    return args, out


def build(model, levels=127, **options):
    args, tensors = integers(model, levels)
    codes, wide = exact.fit_sites(args, tensors, rows(4, args['block_size'])[:, :-1])
    return exact.Exact(args, tensors, codes, wide, **options)


# --- the model ---

def test_tables_hash_is_golden():
    """Another value means that archives written before can no longer be read: then raise container.VERSION."""
    assert exact.tables_hash(model_args(tiny())) == '132179331022dd1d'


GOLDEN = [
    (dict(qk_norm=True, positions='rotary'), '5a492063890c0679'),
    (dict(block_type='mixer', positions='none', final_norm=False), '8d15035304c8962b'),
    (dict(block_type='multihead_mixer', positions='none', expansion=2), '13ea4693f26ce0df')]


@pytest.mark.parametrize('options, golden', GOLDEN)
def test_order_of_sites_and_products_is_golden(options, golden):
    """Scales and flags that differ from place to place: another order, or other arithmetic, makes other frequencies."""
    args = model_args(GPT(ModelConfig(block_size=16, n_layer=2, n_head=2, n_embd=16, **options)))
    tensors = {}
    first = 0
    for name, shape in weights.shapes(args).items():
        n = math.prod(shape)
        hashed = mix64(np.arange(first, first + n, dtype=np.uint64)).reshape(shape)
        tensors[name] = (hashed % np.uint64(15)).astype(np.int32) - 7, np.full(shape[:-1] + (1,), 1 / 16)
        first += n
    codes, wide = sites.reference_sites(args)
    codes = [code + 4 * (i % 3) - 4 for i, code in enumerate(codes)]
    wide = [int(i % 3 == 1) for i in range(len(wide))]
    model = exact.Exact(args, tensors, codes, wide)
    f = model.frequencies(model.forward(torch.from_numpy(rows(2, 16)[:, :-1])))
    assert hashlib.sha256(f.numpy().astype('<f4').tobytes()).hexdigest()[:16] == golden


@pytest.mark.parametrize('options', SHAPES)
def test_close_to_the_float_model(options):
    """At 12-bit weights the integer model's code length is within 0.2 % of the float model's cross-entropy."""
    model = tiny(**options)
    both = rows(6, 48, seed=5)
    x, y = both[:, :-1], both[:, 1:]
    with torch.no_grad():
        expected = float(model(torch.from_numpy(x), torch.from_numpy(y))) / math.log(2)
    assert abs(exact.code_length_bits(build(model, 2047), x, y) / expected - 1) < 2e-3


@pytest.mark.parametrize('options', SHAPES)
def test_same_integers_however_it_is_run(options):
    """All at once; row by row; stepwise with a cache; in pieces; in float64 only; with 2 threads: equal frequencies."""
    model = tiny(**options)
    e = build(model)
    x = torch.from_numpy(rows(5, 48)[:, :-1])
    want = e.frequencies(e.forward(x))
    assert want.min() >= 1 and want.max() == exact.FREQUENCY_TOP and bool((want == want.round()).all())
    assert torch.equal(torch.cat([e.frequencies(e.forward(row)) for row in x.split(1)]), want)
    assert torch.equal(e.frequencies(e.forward(x[:, :7])), want[:, :7])
    assert torch.equal(e.frequencies(e.forward(x, last=5)), want[:, -5:])
    cache, steps = e.cache(), []
    for part in (slice(0, 20), *(slice(t, t + 1) for t in range(20, 40)), slice(40, 48)):
        steps.append(e.frequencies(e.forward(x[:, part], cache)))
    assert torch.equal(torch.cat(steps, 1), want)
    wide = build(model, float64_only=True)
    assert torch.equal(wide.frequencies(wide.forward(x)), want)
    torch.set_num_threads(2)
    try:
        assert torch.equal(e.frequencies(e.forward(x)), want)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize('levels', [50, 1000, 30000])
def test_int8_products(monkeypatch, levels):
    """One limb of the weights, two, or too many: the same integers as in float."""
    model, x = tiny(), torch.from_numpy(rows(3, 48)[:, :-1])
    want = build(model, levels).forward(x)
    monkeypatch.setattr(layers, 'INT8_FROM', 1)
    monkeypatch.setattr(layers, 'INT8_ROWS', 50)
    e = build(model, levels)
    assert {len(block.mixer.proj.limbs) for block in e.blocks} == {{50: 1, 1000: 2, 30000: 0}[levels]}
    assert torch.equal(e.forward(x), want)


def test_attention_in_pieces(monkeypatch):
    """Scores that do not fit are computed a few queries at a time, with the same result."""
    e = build(tiny())
    x = torch.from_numpy(rows(2, 48)[:, :-1])
    want = e.forward(x)
    monkeypatch.setattr(layers, 'SCORES_AT_ONCE', 2 * 2 * 48 * 5)
    assert torch.equal(e.forward(x), want)


@pytest.mark.parametrize('options', [
    dict(), dict(block_type='mixer'), dict(block_type='multihead_mixer'),
    dict(block_type='mixer', expansion=2)], ids=str)
def test_outlier_channel(options):
    """A residual channel at 4,000 stays exact (stepwise = parallel) and near the float model."""
    model = tiny(**options)
    with torch.no_grad():
        model.embed.weight[:, 3] = 4000.0
    e = build(model, 2047)
    both = rows(4, 48)
    x, y = both[:, :-1], both[:, 1:]
    with torch.no_grad():
        expected = float(model(torch.from_numpy(x), torch.from_numpy(y))) / math.log(2)
    assert abs(exact.code_length_bits(e, x, y) / expected - 1) < 0.01
    cache, x = e.cache(), torch.from_numpy(x)
    steps = torch.cat([e.forward(x[:, t:t + 1], cache) for t in range(48)], 1)
    assert torch.equal(steps, e.forward(x))


@pytest.mark.parametrize('expansion', [0, 2])
def test_a_mixing_is_the_float_models(expansion):
    """Every head, hidden value and bias of one mixer in its own place: states after it to 12 bits."""
    model = tiny(block_type='multihead_mixer', positions='none', expansion=expansion, n_layer=1)
    e, x = build(model, 30000), torch.from_numpy(rows(3, 48)[:, :-1])
    with torch.no_grad():
        h = model.embed(x)
        want = h + model.blocks[0].mixer(model.blocks[0].norm1(h))
    got = e.blocks[0].mixer(e.embed[x], None, 0, 48)
    assert float((got - want).abs().max()) < 2 ** -9 * float((want - h).abs().max())


def test_triangles_are_those_of_the_mixer():
    """Unfolded integers are model.Triangles' matrices."""
    mix = Triangles(12, groups=3)
    with torch.no_grad():
        mix.weight.copy_(torch.arange(mix.weight.numel()).view_as(mix.weight))
    assert np.array_equal(sites.triangles(mix.weight.detach().numpy(), 12), mix.matrices()[:, 0].detach().numpy())


def test_bounds_are_proven_from_the_weights():
    """The clamp times a row's absolute sum stays below 2^24, or below 2^53 when wide; more is refused."""
    q = np.array([[100, -27], [3, 4]])
    assert sites.product_limit(100 * q, False) == ((1 << 24) - 1) // 12700
    assert sites.product_limit(q, False) == sites.LIMB_LIMIT and sites.product_limit(q, True) == sites.WIDE_LIMIT
    with pytest.raises(ValueError, match='fewer bits'):
        sites.product_limit(np.full((1, 1 << 14), 1 << 20), True)
    for head_width, block_size in ((16, 256), (64, 2048), (128, 32768)):
        qk, v, total = sites.attention_limits(False, head_width, block_size)
        assert head_width * qk * qk < 1 << 24 and (total + block_size // 2 + 2) * v < 1 << 24
    for width in (32, 256, 1600):
        assert width * (2 * (1 << sites.norm_bits(width))) ** 2 <= 1 << 53


@pytest.mark.parametrize('levels', [30, 30000])
def test_bounds_of_mixings(levels):
    """No sum of a mixer's weights times the clamp of what they mix reaches 2^24, or 2^53 when wide."""
    for block in build(tiny(block_type='multihead_mixer', expansion=2), levels).blocks:
        for product in (block.mixer.mixing, block.mixer.mixing_down):
            top = 1 << {torch.float32: 24, torch.float64: 53}[product.dtype]
            limit = product.input.limit
            assert 1 < limit and int(product.weight.double().abs().sum(-1).max()) * limit < top
            assert bool((product.weight.triu(1) == 0).all())


@pytest.mark.parametrize('options', [
    dict(), dict(block_type='mixer', expansion=2), dict(block_type='multihead_mixer')], ids=str)
def test_extreme_activations_stay_exact(options):
    """Sites far too fine drive every activation into its clamp: stepwise, parallel and float64 still agree."""
    args, tensors = integers(tiny(**options))
    codes, wide = exact.fit_sites(args, tensors, rows(4, 48)[:, :-1])
    e, double = (exact.Exact(args, tensors, [c + 12 for c in codes], wide, float64_only=f) for f in (False, True))
    x = torch.from_numpy(rows(3, 48)[:, :-1])
    cache, want = e.cache(), e.forward(x)
    assert torch.equal(torch.cat([e.forward(x[:, t:t + 1], cache) for t in range(48)], 1), want)
    assert torch.equal(double.forward(x).float(), want.float())


def test_known_answer_falls_back(monkeypatch):
    """A device whose float32 sums are not exact runs everything in float64, with the same integers."""
    model = tiny()
    want = build(model).forward(torch.from_numpy(rows(2, 48)[:, :-1]))
    monkeypatch.setattr(arithmetic, 'known_answer', lambda device: (torch.float64,))
    e = build(model)
    assert e.head.run is torch.float64
    assert torch.equal(e.forward(torch.from_numpy(rows(2, 48)[:, :-1])).float(), want)


def test_window_is_not_exceeded():
    with pytest.raises(ValueError, match='49 positions for a window of 48'):
        build(tiny()).forward(torch.zeros(1, 49, dtype=torch.int64))
