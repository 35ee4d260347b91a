"""weights.py: bytes decode to the same integers and scales; what they cost; quantisation by Fisher information."""
import numpy as np
import pytest
import torch

from codec import weights
from configurator import UserError
from model import GPT, ModelConfig, model_args

CONFIGS = [dict(), dict(positions='learned', tied=True),
           dict(norm='rmsnorm', bias=False, qk_norm=True, positions='rotary'),
           dict(block_type='mixer', positions='none', final_norm=False), dict(block_type='mixer', norm='rmsnorm'),
           dict(block_type='multihead_mixer', positions='none', bias=False)]


def tiny(**options):
    torch.manual_seed(2)
    return GPT(ModelConfig(**(dict(block_size=16, n_layer=2, n_head=2, n_embd=32) | options)))


def random_tensors(args, rng, spread=20.0, density=1.0, top=0):
    """Integers with rows of different spread, some of them zero, and scale codes."""
    out = {}
    for name, shape in weights.shapes(args).items():
        spreads = spread * np.exp(rng.normal(size=shape[:-1] + (1,)))
        q = np.rint(rng.normal(size=shape) * spreads) * (rng.random(shape) < density)
        q = q.clip(-20000, 20000).astype(np.int32)
        if top:
            q.flat[:2] = top, -top
        out[name] = q, rng.integers(-20, 5, shape[0]) if len(shape) == 2 else np.int64(rng.integers(-20, 5))
    return out


def equal(a, b):
    return all(np.array_equal(a[n][0], b[n][0]) and np.array_equal(a[n][1], b[n][1]) for n in a) and set(a) == set(b)


@pytest.mark.parametrize('options', CONFIGS)
def test_shapes_are_those_of_the_folded_model(options):
    model = tiny(**options)
    args = model_args(model)
    folded = weights.fold(model.state_dict(), args)
    assert {n: w.shape for n, w in folded.items()} == weights.shapes(args)
    assert weights.count(args) == sum(w.size for w in folded.values())


@pytest.mark.parametrize('options', CONFIGS)
def test_folding_keeps_the_function(options):
    """A model with its norms folded away computes the same logits to float accuracy."""
    model = tiny(**options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    x = torch.randint(0, 256, (3, 16))
    before = model(x)
    folded = weights.load_folded(tiny(**options), weights.fold(model.state_dict(), model_args(model)))
    assert torch.allclose(folded(x), before, atol=1e-4)


@pytest.mark.parametrize('options', CONFIGS)
@pytest.mark.parametrize('spread, density, top', [(20, 1, 0), (0.3, 1, 0), (5, 0.1, 0), (0, 0, 0), (3, 0.5, 32000),
                                                  (2000, 1, 0)])
def test_round_trip(options, spread, density, top):
    """Dense, sparse, all-zero, wide and outlying integers come back as they were."""
    args = model_args(tiny(**options))
    tensors = random_tensors(args, np.random.default_rng(4), spread, density, top)
    assert equal(tensors, weights.decode(weights.encode(tensors, args), args))


def test_split_into_buckets():
    """Buckets and places name every magnitude once."""
    q = np.concatenate((np.arange(-40, 41), [-32768, 32768, 12345]))
    bucket, place = weights.split(q)
    assert np.array_equal(weights.BUCKET_START[bucket] + place, np.abs(q))
    assert (place < weights.BUCKET_WIDTH[bucket]).all() and (place >= 0).all()


def test_cost_is_near_the_entropy():
    """Laplacian integers cost at most 3 % more than the entropy of their histogram, with a mask 5 %."""
    args = model_args(tiny(n_embd=128, n_layer=1))
    rng = np.random.default_rng(5)
    for density, allowed in ((1.0, 1.03), (0.15, 1.05)):
        tensors = {n: (np.rint(rng.laplace(size=s) * 4 * (rng.random(s) < density)).astype(np.int32),
                       np.zeros(s[:-1], np.int64)) for n, s in weights.shapes(args).items()}
        everything = np.concatenate([q.ravel() for q, _ in tensors.values()])
        p = np.unique(everything, return_counts=True)[1] / len(everything)
        entropy_bytes = -(p * np.log2(p)).sum() * len(everything) / 8
        assert len(weights.encode(tensors, args)) < allowed * entropy_bytes


def test_quantise_follows_fisher_information():
    """A row that matters 16 times more gets a step a quarter as large; zeros stay zero; the rate scales all steps."""
    args = model_args(tiny())
    rng = np.random.default_rng(6)
    folded = {n: rng.normal(size=s) * (rng.random(s) < 0.5) for n, s in weights.shapes(args).items()}
    fisher = {n: np.full(w.shape, 1e-3) for n, w in folded.items()}
    fisher['head.weight'][7] *= 16
    steps = weights.with_scales(weights.quantise(folded, fisher, 1e-6))['head.weight'][1][:, 0]
    assert 3 <= np.median(steps) / steps[7] <= 4.01
    tensors = weights.quantise(folded, fisher, 1e-6)
    assert all((q[folded[n] == 0] == 0).all() for n, (q, _) in tensors.items())
    error = np.abs(weights.values(tensors)['head.weight'] - folded['head.weight'])
    assert (error <= steps[:, None] / 2 + 1e-12).all()
    coarse = weights.with_scales(weights.quantise(folded, fisher, 4e-6))['head.weight'][1][:, 0]
    assert np.median(coarse / steps) == 2


def test_fisher_information_is_the_mean_squared_gradient():
    """Against autograd, one row at a time."""
    model = tiny()
    x, y = (torch.randint(0, 256, (3, 16)) for _ in 'xy')
    got = weights.fisher_information(model, x.numpy(), y.numpy())
    want = 0
    for a, b in zip(x, y):
        model.zero_grad()
        model(a[None], b[None]).backward()
        want = want + model.head.weight.grad.double().numpy() ** 2 / 48
    assert np.allclose(got['head.weight'], want)


def test_damaged_bytes_are_refused_or_differ():
    """Without the container's CRC: never a crash other than a clean error, never the original."""
    args = model_args(tiny())
    tensors = random_tensors(args, np.random.default_rng(7), 5)
    data = weights.encode(tensors, args)
    with pytest.raises(UserError, match='multiple of 4'):
        weights.decode(data[:-1], args)
    for i in range(8):
        broken = bytearray(data)
        broken[i * 1000] ^= 1 << i
        try:
            assert not equal(weights.decode(bytes(broken), args), tensors)
        except (UserError, ValueError, AssertionError, IndexError):
            pass
