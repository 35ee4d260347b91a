"""The CPU's own linear layer and blocked attention against torch's, values and gradients."""
import pytest
import torch
import torch.nn.functional as F

import model


def gradients(out, *inputs):
    """Gradients of a fixed projection of out."""
    torch.manual_seed(1)
    return torch.autograd.grad((out * torch.randn(out.shape)).sum(), inputs)


@pytest.mark.skipif(model.onednn() is None, reason='this processor has no AVX-512, and the layer is nn.Linear')
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(4, 100, 96), (300, 96)])
def test_linear_is_a_linear_layer(bias, shape, monkeypatch):
    """Products that are large enough go through oneDNN, forward and backward, and equal float64's to rounding."""
    layer, x = model.Linear(96, 160, bias=bias), torch.randn(shape, requires_grad=True)
    calls, plain = [], model.onednn()
    monkeypatch.setattr(model, 'onednn', lambda: lambda *args: calls.append(1) or plain(*args))
    params = list(layer.parameters())
    out = layer(x)
    found = [out, *gradients(out, x, *params)]
    assert len(calls) == 3
    exact = [p.detach().double().requires_grad_() for p in (x, *params)]
    want = F.linear(*exact)
    for a, b in zip(found, [want, *gradients(want, *exact)], strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32
        assert torch.allclose(a.double(), b, atol=2e-4, rtol=1e-4)
    layer(x[:1, :1] if x.dim() == 3 else x[:1])
    assert len(calls) == 3                                              # too small to pay


def test_linear_leaves_the_rest_to_torch(monkeypatch):
    """float64, autocast, compilation: nn.Linear's own result."""
    monkeypatch.setattr(model, 'onednn', lambda: pytest.fail)
    layer, x = model.Linear(96, 160), torch.randn(300, 96)
    with torch.autocast('cpu', torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(torch.compile(layer, backend='eager', fullgraph=True)(x),
                       F.linear(x, layer.weight, layer.bias))
    assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize('length', [100, 128, 129, 256, 300, 1024])
def test_blocks_of_attention_are_attention(length):
    """Any length, whole blocks or not; strided inputs, as the model's projections are."""
    q, k, v = torch.randn(2, length, 3, 2, 16).permute(2, 0, 3, 1, 4).requires_grad_()
    out, want = model.causal_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(out, want, atol=1e-5)
    for a, b in zip(gradients(out, q, k, v), gradients(want, q, k, v), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_blocks_see_no_later_position():
    """Changing position j changes no output before j, to the bit."""
    q, k, v = torch.randn(3, 1, 2, 300, 16)
    before = model.causal_attention(q, k, v)
    for x in (q, k, v):
        x[:, :, 200] += 1
    after = model.causal_attention(q, k, v)
    assert torch.equal(before[:, :, :200], after[:, :, :200]) and not torch.equal(before, after)


def test_a_length_first_scored_can_be_trained():
    """Masks are kept: made under inference_mode they would refuse the backward pass of a later caller."""
    q, k, v = (torch.randn(1, 2, 3 * model.QUERIES, 8, requires_grad=True) for _ in 'qkv')
    model._masks.cache_clear()
    with torch.inference_mode():
        model.causal_attention(q, k, v)
    model.causal_attention(q, k, v).sum().backward()
    assert v.grad is not None
