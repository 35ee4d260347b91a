"""codec/streams.py: where symbols lie, what a window sees, and the bits of a whole archive, which never change."""
import hashlib

import numpy as np
import pytest
from conftest import make_text, run_here

from codec import container, exact, sites, streams, weights
from codec.output import Output
from corpus.bins import mix64
from model import GPT, ModelConfig, model_args


@pytest.mark.parametrize('n, n_streams', [(1, 1), (1, 5), (4, 5), (5, 5), (11, 5), (64, 7)])
def test_a_block_is_split_among_its_streams(n, n_streams):
    """Every symbol is in one stream; lengths differ by one at most, longer ones first; steps are cut at the end."""
    layout = streams.Layout(n, n_streams)
    places = [i for start, end in zip(layout.starts, layout.ends) for i in range(start, end)]
    assert places == list(range(n))
    assert sorted(layout.lengths, reverse=True) == list(layout.lengths)
    assert max(layout.lengths) == layout.n_steps and max(layout.lengths) - min(layout.lengths) <= 1
    for step in range(layout.n_steps):
        assert layout.n_active(step) == sum(length > step for length in layout.lengths)
        assert len(layout.in_order(np.zeros(n_streams), step + 1)) == layout.n_active(step)


@pytest.mark.parametrize('n_context, n_steps, size, keep', [(1, 5, 8, 4), (1, 100, 8, 4), (4, 33, 8, 8), (3, 20, 4, 1)])
def test_windows_predict_every_symbol_once(n_context, n_steps, size, keep):
    """No window is longer than the model's; each output has at least `keep` inputs in sight once there are so many."""
    outputs = []
    for window in streams.windows(n_context, n_steps, size, keep):
        assert window.end - window.start <= size
        for i in range(window.output, window.end):
            outputs.append(i)
            assert i + 1 - window.start >= min(keep, i + 1)
    assert outputs == list(range(n_context - 1, n_context - 1 + n_steps))


def integer_weights(args):
    """Return {name: (integers, codes of scales)} of hashed integers: no float chose anything in it."""
    tensors = {}
    at = 0
    for name, shape in weights.shapes(args).items():
        n = int(np.prod(shape))
        h = mix64(np.arange(at, at + n, dtype=np.uint64)).reshape(shape)
        at += n
        q = (h % np.uint64(15)).astype(np.int32) - 7
        q[(h >> np.uint64(8)) % np.uint64(3) == 0] = 0
        codes = np.full(shape[0], -9) if len(shape) == 2 else np.int64(-9)
        tensors[name] = (q, codes)
    tensors['norm.weight'] = (np.full(16, 24, np.int32), np.int64(-9))
    return tensors


def golden_archive(path):
    """Write an archive of a model of integer_weights; returns (its text, a hash of its sections)."""
    args = model_args(GPT(ModelConfig(block_size=24, n_layer=2, n_head=2, n_embd=16)))
    tensors = integer_weights(args)
    largest = dict(x1=8.0, a1=4.0, q=6.0, k=6.0, v=4.0, o=3.0, x2=9.0, a2=4.0, u=6.0, d=6.0)
    seen = {f'{i}.{s}': [v, 1.0] for i in range(2) for s, v in largest.items()} | {'x': [9.0, 1.0], 'a': [4.0, 1.0]}
    codes, wide = sites.choose_sites(args, tensors, seen)
    text = make_text(3000)
    coder = streams.StreamCoder(exact.Exact(args, weights.with_scales(tensors), codes, wide), 7, 12, 10)
    data, bits, _ = coder.encode(np.frombuffer(text, np.uint8))
    assert abs(8 * len(data) - bits) < 64
    head = dict(bytes=3000, sha256=hashlib.sha256(text).hexdigest(), args=args, start_id=10, tokenizer='byte',
                streams=7, keep=12, sites=codes, wide=wide, arithmetic=streams.arithmetic_hash(args))
    section = weights.encode(tensors, args)
    blocks = [container.Block(container.CODED, 3000, data, text)]
    with Output(str(path)) as out:
        container.write_archive(out, container.TWO_PART, head, dict(wght=section), blocks)
        out.commit()
    return text, hashlib.sha256(section + data).hexdigest()[:16]


def test_golden_archive(tmp_path):
    """Another hash means a change of format or arithmetic: old archives no longer decode; raise container.VERSION."""
    text, digest = golden_archive(tmp_path / 'golden')
    assert digest == '675fcaf916a5e14c'
    assert run_here('compress.py', 'unpack', tmp_path / 'golden', tmp_path / 'out', '--no-progress') == 0
    assert (tmp_path / 'out').read_bytes() == text
