"""What a CPU computes faster than by the defaults: linear layers, causal attention, and memory that is used again.

torch multiplies float32 matrices with MKL, which stays at AVX2 on AMD processors: 103 GFLOP/s on one Zen 5 core, where
oneDNN, which every x86 build of torch holds, reaches 250. And its attention skips masked keys in blocks of 512 only.
Both differ from the defaults by rounding alone; neither is used under torch.compile.
"""
import ctypes
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

ENOUGH, ROWS = 1 << 13, 64              # oneDNN's call takes 13 us: it pays for larger weights and from so many rows
QUERIES, LONGEST = 128, 1024            # queries of a block of attention; up to this length blocks are faster


def keep_freed_memory():
    """Let glibc's malloc keep what is freed, up to blocks of 1 GiB; elsewhere do nothing.

    By default it returns large blocks to the kernel, which clears each page again when the next step asks for them.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt:
        mallopt(-3, 1 << 30), mallopt(-1, 2 ** 31 - 1)                  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


@functools.lru_cache(None)
def onednn():
    """oneDNN's linear layer f(x, weight, bias, 'none', [], ''), or None where it is missing or no faster."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != 'AVX512':
        return None
    return getattr(torch.ops.mkldnn, '_linear_pointwise', None)


class _Product(torch.autograd.Function):
    """x (..., K) times weight (N, K) transposed, plus bias (N,) or None, and its gradients, by three calls."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn()(x, weight, bias, 'none', [], '')

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad, needed, product = grad.reshape(-1, grad.size(-1)), ctx.needs_input_grad, onednn()
        return (product(grad, weight.t(), None, 'none', [], '').view_as(x) if needed[0] else None,
                product(grad.t(), x.reshape(-1, x.size(-1)).t(), None, 'none', [], '') if needed[1] else None,
                grad.sum(0) if needed[2] else None)


def linear(x, weight, bias=None):
    """F.linear, through oneDNN where that is faster."""
    unfit = weight.numel() <= ENOUGH or x.numel() < ROWS * x.size(-1) or x.size(-1) % 16        # 16: whole vectors
    if unfit or x.device.type != 'cpu' or x.dtype != torch.float32 or onednn() is None \
            or torch.compiler.is_compiling() or torch.is_autocast_enabled('cpu'):
        return F.linear(x, weight, bias)
    return _Product.apply(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


@functools.lru_cache(8)
def _masks(length):
    """For each block of queries but the first, what is added to its scores against the keys up to its own last one."""
    with torch.inference_mode(False):                   # the first to ask may be scoring, the next one training
        seen = torch.zeros(length, length).masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        return [seen[i:i + QUERIES, :i + QUERIES] for i in range(QUERIES, length, QUERIES)]


def causal_attention(q, k, v, dropout=0.0):
    """Attention (B, H, T, D) of each position to itself and those before it; on a CPU in blocks of queries."""
    T = q.size(2)
    if q.device.type != 'cpu' or not QUERIES < T <= LONGEST or dropout or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True)
    found = [F.scaled_dot_product_attention(*(x[:, :, :QUERIES] for x in (q, k, v)), is_causal=True)]
    for i, mask in zip(range(QUERIES, T, QUERIES), _masks(T)):
        stop = i + QUERIES
        found.append(F.scaled_dot_product_attention(q[:, :, i:stop], k[:, :, :stop], v[:, :, :stop], mask.to(q.dtype)))
    return torch.cat(found, 2)
