"""model.py and score.py: causality, the KV cache, sizes; every byte scored exactly once."""
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import OneProcess, make_text

import model as model_module
import score
from configurator import UserError
from corpus.bins import Bin
from model import GPT, SIZES, ModelConfig, build, config_from_knobs, flops_per_token, model_args, n_parameters
from training.optim import adamw_groups

OPTIONS = [dict(), dict(positions='learned'), dict(positions='rotary'),
           dict(positions='rotary', qk_norm=True, norm='rmsnorm', activation='relu2',
           bias=False, tied=True), dict(activation='gelu_tanh', bias=False)]
IDS = 'sinusoidal learned rotary rotary-modern no-bias'.split()


def tiny(**options):
    torch.manual_seed(0)
    net = GPT(ModelConfig(**dict(dict(block_size=24, vocab_size=50, n_layer=2, n_head=2, n_embd=16), **options)))
    with torch.no_grad():
        for p in net.parameters():                              # away from the initial zeros and ones
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


@pytest.mark.parametrize('options', OPTIONS, ids=IDS)
def test_no_output_depends_on_a_later_input(options):
    """A leak from the future makes losses meaningless: logits up to t must not move when inputs after t do."""
    net, x = tiny(**options), torch.randint(0, 50, (2, 24))
    with torch.no_grad():
        before = net(x)
        for t in (0, 7, 22):
            other = x.clone()
            other[:, t + 1:] = (other[:, t + 1:] + 1 + torch.randint(0, 48, other[:, t + 1:].shape)) % 50
            after = net(other)
            assert torch.equal(before[:, :t + 1], after[:, :t + 1])
            assert not torch.allclose(before[:, t + 1:], after[:, t + 1:])


@pytest.mark.parametrize('options', OPTIONS, ids=IDS)
@torch.no_grad()
def test_kv_cache_equals_the_full_forward(options):
    """Text generated with a cache must be the text of the model, fed token by token or in pieces."""
    net, x = tiny(**options), torch.randint(0, 50, (3, 24))
    full = net(x)
    for cuts in ([1] * 24, [5, 1, 10, 8], [24]):
        cache, parts, at = net.new_cache(), [], 0
        for n in cuts:
            parts.append(net(x[:, at:at + n], cache=cache))
            at += n
        assert torch.allclose(torch.cat(parts, 1), full, atol=1e-5)
    with pytest.raises(UserError, match='25 positions.*block_size = 24'):
        net(x[:, :1], cache=cache)


def test_position_matters():
    """A position option that is never added would leave logits of equal prefixes in another order unchanged."""
    for options in OPTIONS:
        net = tiny(**options)
        x = torch.tensor([[1, 2, 3], [2, 1, 3]])
        out = net(x)[:, -1]
        assert not torch.allclose(out[0], out[1], atol=1e-4)


def test_loss_is_the_summed_cross_entropy_of_scored_targets():
    """Means are formed last: forward must return a sum, and -1 must count nowhere."""
    net, x = tiny(), torch.randint(0, 50, (2, 24))
    y = torch.randint(0, 50, (2, 24))
    y[0, 5:] = -1
    logp = F.log_softmax(net(x).double(), -1)
    by_hand = -sum(logp[b, t, y[b, t]] for b in range(2) for t in range(24) if y[b, t] >= 0)
    assert torch.allclose(net(x, y).double(), by_hand, rtol=1e-6)


def test_no_square_buffers_and_sdpa_without_mask(monkeypatch):
    """docs/faults.md, 8: no flash path since weights are returned, a causal mask rebuilt or kept as (T, T) buffer."""
    calls = []
    real = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        calls.append((attn_mask, is_causal))
        return real(q, k, v, attn_mask, dropout_p, is_causal=is_causal, **more)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', spy)
    net = tiny(block_size=40)
    net(torch.zeros(1, 40, dtype=torch.long))
    assert calls == [(None, True)] * 2
    assert not [n for n, b in net.named_buffers() if b.dim() >= 2 and b.shape[-1] == b.shape[-2] == 40]
    assert not set(dict(net.named_buffers())) & set(net.state_dict())           # tables are not weights
    source = inspect.getsource(model_module)
    assert 'MultiheadAttention' not in source
    assert 'log_softmax' not in source   # cross_entropy takes logits: once is enough


@pytest.mark.parametrize('name', [n for n in SIZES if n.startswith('transformer')])
def test_named_sizes_have_the_published_parameters(name):
    """d, layers, untied head, feed-forward 4d: 12 d² + 13 d a layer, 2 V d for embedding and head, 2 d for the norm."""
    knobs = dict(model=name, n_layer=0, n_head=0, n_embd=0, block_size=0, positions='sinusoidal', norm='layernorm',
                 activation='gelu',
                 tied=False, bias=True, qk_norm=False, dropout=0.0)
    config = config_from_knobs(knobs, 256)
    d, layers = config.n_embd, config.n_layer
    assert n_parameters(config) == layers * (12 * d * d + 13 * d) + 2 * 256 * d + 2 * d
    published = float(name.removeprefix('transformer').rstrip('km')) * (1e3 if name.endswith('k') else 1e6)
    assert abs(n_parameters(config) / published - 1) < 0.2
    assert flops_per_token(config) == 6 * (12 * layers * d * d + 256 * d) + 12 * layers * d * config.block_size


@pytest.mark.parametrize('name, n', [('gpt2', 124_439_808), ('gpt2-medium', 354_823_168), ('gpt2-large', 774_030_080),
                                     ('gpt2-xl', 1_557_611_200)])
def test_gpt2_sizes_have_the_parameters_of_gpt2(name, n):
    """As the published checkpoints count them, the tied head once."""
    knobs = dict(model=name, n_layer=0, n_head=0, n_embd=0, block_size=0, positions='learned', norm='layernorm',
                 activation='gelu_tanh', tied=True, bias=True, qk_norm=False, dropout=0.0)
    assert n_parameters(config_from_knobs(knobs, 50257)) == n


def test_knobs_override_the_named_size_and_unknown_names_are_named():
    """A size knob that is ignored, or a mistyped model name."""
    knobs = dict(model='transformer800k', n_layer=1, n_head=0, n_embd=32, block_size=16, positions='learned',
                 norm='layernorm', activation='gelu',
                 tied=True, bias=False, qk_norm=False, dropout=0.0)
    config = config_from_knobs(knobs, 300)
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size, config.vocab_size,
            config.tied) == (1, 4, 32, 16, 300, True)
    for change, words in ((dict(model='transformer80k'), 'did you mean'), (dict(n_embd=33), 'not a multiple of n_head'),
                          (dict(positions='rotary', n_embd=12),
                           'even head width'), (dict(dropout=1.0), 'dropout = 1.0'),
                          (dict(norm='layernrom'), "did you mean 'layernorm'")):
        with pytest.raises(UserError, match=words):
            config_from_knobs(dict(knobs, **change), 256)


def test_initialisation():
    """Residual projections scaled by 1/sqrt(2 layers), biases 0, gains 1, first loss near ln V."""
    torch.manual_seed(0)
    net = GPT(ModelConfig(block_size=32, n_layer=8, n_head=4, n_embd=64))
    for name, p in net.named_parameters():
        if p.dim() < 2:
            assert (p == (0.0 if name.endswith('bias') else 1.0)).all(), name
        elif name.endswith(('proj.weight', 'down.weight')):
            assert abs(p.std() / (0.02 / math.sqrt(16)) - 1) < 0.05, name
        elif name != 'embed.weight':
            assert abs(p.std() / 0.02 - 1) < 0.05, name
    x = torch.randint(0, 256, (4, 32))
    assert abs(net(x, x).item() / x.numel() - math.log(256)) < 0.1


def test_tied_head_is_one_parameter_and_survives_saving():
    """A tied tensor counted or decayed twice."""
    net = tiny(tied=True)
    again = build(model_args(net))
    again.load_state_dict(net.state_dict())
    assert again.head.weight is again.embed.weight
    assert n_parameters(net.config) == sum(p.numel() for p in net.parameters())
    groups = adamw_groups(list(net.parameters()), 0.1)
    assert sum(len(g['params']) for g in groups) == len(list(net.parameters()))


def test_only_matrices_and_embeddings_decay():
    """Weight decay on biases and norm gains pulls gains to zero."""
    decay, rest = adamw_groups(list(tiny().parameters()), 0.1)
    assert decay['weight_decay'] == 0.1 and rest['weight_decay'] == 0.0
    assert all(p.dim() >= 2 for p in decay['params']) and all(p.dim() < 2 for p in rest['params'])


# --- score ---

class Uniform(torch.nn.Module):
    """Every symbol of V equally likely, whatever the context."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits.expand(*x.shape, -1)


class Recorder(Bin):
    """A Bin of distinct ids that remembers the rows that score took, with the targets it then left out as -1."""

    def __init__(self, n_tokens):
        super().__init__(np.arange(n_tokens, dtype=np.uint32), vocab_size=n_tokens)
        self.rows = []

    def gather(self, starts, length):
        x, y = super().gather(starts, length)
        self.rows.append((x, y))
        return x, y


@pytest.mark.parametrize('n_tokens, block, minimal', [(100, 16, 0), (96, 16, 1), (7, 16, 0), (100, 16, 5),
                                                      (100, 16, 16), (33, 16, 12), (16, 16, 9),
                                                      (17, 16, 16), (1, 16, 3)])
@pytest.mark.parametrize('world', (1, 2, 3))
def test_every_byte_is_scored_exactly_once_with_its_minimal_context(n_tokens, block, minimal, world):
    """docs/faults.md, 5: losses that cover 1/world_size of the data, every fifth batch, or some bytes twice."""
    data, seen, totals = Recorder(n_tokens), [], 0
    for rank in range(world):
        totals += score.score(Uniform(torch.zeros(n_tokens)), data, block, 3, OneProcess(rank, world),
                              minimal)['tokens']
    for x, y in data.rows:
        for inputs, targets in zip(x, y):
            for offset in np.flatnonzero(targets >= 0):
                target = int(targets[offset])
                seen.append(target)
                assert offset + 1 >= min(minimal, target + 1)   # predecessors seen, the start id included
                assert target == 0 or inputs[offset] == target - 1
    assert sorted(seen) == list(range(n_tokens)) and totals == n_tokens


def test_minimal_context_beyond_the_block_is_refused():
    """A window that cannot advance would never end."""
    with pytest.raises(UserError, match='minimal_context_window = 18.*block_size = 16'):
        score.score(Uniform(torch.zeros(256)), Bin(np.zeros(99, np.uint8)), 16, 2, OneProcess(), 18)


@pytest.mark.parametrize('block', (1, 64, 256, 5000))
def test_uniform_model_scores_exactly_8_bits_per_byte(block):
    """The unit of everything: log2(256) = 8 bits for every byte, so N bytes cost N bytes."""
    data = Bin(np.frombuffer(make_text(4001), np.uint8))
    found = score.evaluate(Uniform(torch.zeros(256)), data, block, 7, OneProcess())
    assert found['tokens'] == 4001 and abs(found['bits_per_byte'] - 8) < 1e-6 and abs(found['data_bytes'] - 4001) < 1e-3
    assert abs(found['perplexity'] - 256) < 1e-3


def test_code_length_does_not_depend_on_the_block_for_a_model_without_context():
    """Block sizes 64 and 256 must give one code length, or bytes at block borders are lost or counted twice."""
    text = make_text(4001)
    data = Bin(np.frombuffer(text, np.uint8))
    counts = torch.bincount(torch.tensor(list(text)), minlength=256).double() + 0.01
    model = Uniform(counts.log().float())
    nats = [score.score(model, data, block, 5, OneProcess(), minimal)['nats'] for block,
            minimal in ((64, 0), (256, 0), (256, 100))]
    expected = -sum(math.log(counts[b] / counts.sum()) for b in text)
    assert max(nats) - min(nats) < 1e-6 * nats[0] and abs(nats[0] / expected - 1) < 1e-5


def test_leading_blocks_and_accuracy():
    """max_blocks scores the leading rows only, bits per byte takes their share of the bytes, accuracy counts hits."""
    text = make_text(1000)
    data, model = Bin(np.frombuffer(text, np.uint8)), Uniform(F.one_hot(torch.tensor(32), 256).float())
    found = score.evaluate(model, data, 64, 4, OneProcess(), max_blocks=3)
    assert found['tokens'] == 192 and found['text_bytes'] == 192 and found['accuracy'] == text[:192].count(b' ') / 192


def test_skip_first_is_the_published_convention():
    """1,023 of 1,024 tokens a block are scored, and only those that upstream scores."""
    data = Recorder(128)
    sums = score.score(Uniform(torch.zeros(128)), data, 32, 2, OneProcess(), skip_first=True)
    seen = sorted(int(t) for _, y in data.rows for t in y[y >= 0])
    assert seen == [i for i in range(128) if i % 32] and sums['tokens'] == 124


def test_scoring_leaves_the_training_mode_as_it_was():
    """A validation that leaves dropout off changes all training after it."""
    net = tiny().train()
    score.score(net, Bin(np.zeros(50, np.uint8), vocab_size=50), 24, 2, OneProcess())
    assert net.training
