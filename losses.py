"""Losses with a teacher: what distill.py minimises, with logits that exist for a few tokens at a time.

Per scored token, with t and s the logits of teacher and student, h their states after the final norm, τ a temperature:
    a_ce τ² KL(softmax(t/τ) || softmax(s/τ)) + a_clm CE(s, next) + a_cos (1 - cos(h_s, h_t)) + a_mse Σ(s - t)²
    + a_hidden Σ over pairs of layers |block output of s - of t|² / width
(Sanh et al. 2019, arXiv 1910.01108, with the causal loss for the masked one). Equal models give KL and 1 - cos of
exactly 0: KL is of two log-softmaxes, and x·y/√((x·x)(y·y)) is 1 for x = y, as the root of a rounded square is exact.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import linear

TERMS = ('clm', 'ce', 'mse', 'cos', 'hidden')


class ChunkedHead(torch.autograd.Function):
    """Map states (N, C) and a head (V, C) to the sum over tokens of a weighted loss, and of its terms.

    terms_of(states, head, first) gives the terms (K,) of a chunk that begins at token `first`. A chunk's gradients are
    taken in the forward pass, so that nothing of size N x V is kept and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, states, head, weights, chunk_tokens, terms_of):
        total, grad = weights.new_zeros(len(weights)), torch.empty_like(states)
        with torch.enable_grad():
            head = head.detach().requires_grad_()
            for i in range(0, len(states), chunk_tokens):
                chunk = states[i:i + chunk_tokens].detach().requires_grad_()
                terms = terms_of(chunk, head, i)
                (terms * weights).sum().backward()
                grad[i:i + chunk_tokens], total = chunk.grad, total + terms.detach()
        ctx.save_for_backward(grad, head.grad)
        ctx.mark_non_differentiable(total)
        return (total * weights).sum(), total

    @staticmethod
    def backward(ctx, scale, _):
        grad, head_grad = ctx.saved_tensors
        return grad * scale, head_grad * scale, None, None, None


def tap(model, layers):
    """Return a dict in which each forward of a GPT leaves the outputs of these blocks."""
    kept = {}
    for i in layers:
        model.blocks[i].register_forward_hook(lambda block, given, out, i=i: kept.__setitem__(i, out))
    return kept


class Distillation(nn.Module):
    """Map rows x, targets y (B, T; -1: no score) to sums over the scored tokens: the weighted loss, the terms (5,).

    weights {term: float} by TERMS; pairs: (student's layer, teacher's). With clm alone the teacher is not asked and the
    loss is the student's own forward, to the last bit.
    """

    def __init__(self, student, teacher, weights, temperature=2.0, chunk_tokens=256, pairs=()):
        super().__init__()
        self.student, self.weights, self.temperature, self.chunk_tokens = student, weights, temperature, chunk_tokens
        self.pairs, self.alone = pairs, not any(weights[term] for term in TERMS[1:])
        self.states = tap(student, {s for s, _ in pairs}), tap(teacher, {t for _, t in pairs})
        self.teacher = [teacher]                # in a list: no submodule, so DDP and state_dict leave it alone

    def of_logits(self, states, head, states_t, y):
        """Sums of the terms that need logits over a chunk: CE, KL, squared difference."""
        s, scored = linear(states, head).float(), (y >= 0)[:, None]
        clm = F.cross_entropy(s, y, ignore_index=-1, reduction='sum')
        ce = mse = clm.new_zeros(())
        if self.weights['ce'] or self.weights['mse']:
            with torch.no_grad():
                t = linear(states_t, self.teacher[0].head.weight).float()
            if self.weights['ce']:
                log_s, log_t = (F.log_softmax(z / self.temperature, -1) for z in (s, t))
                ce = self.temperature ** 2 * (F.kl_div(log_s, log_t, reduction='none', log_target=True) * scored).sum()
            if self.weights['mse']:
                mse = ((s - t).square() * scored).sum()
        return torch.stack((clm, ce, mse))

    def forward(self, x, y):
        weights = torch.tensor([self.weights[term] for term in TERMS], device=x.device)
        if self.alone:
            clm = self.student(x, y)
            return weights[0] * clm, F.pad(clm.detach()[None], (0, len(TERMS) - 1))
        with torch.no_grad():
            h_t = self.teacher[0].hidden(x)
        h, scored, flat_y, flat_t = self.student.hidden(x), y >= 0, y.flatten(), h_t.flatten(0, 1)
        n, cos = self.chunk_tokens, weights.new_zeros(())
        loss, terms = torch.compiler.disable(ChunkedHead.apply)(
            h.flatten(0, 1), self.student.head.weight, weights[:3], n,
            lambda states, head, i: self.of_logits(states, head, flat_t[i:i + n], flat_y[i:i + n]))
        if self.weights['cos']:
            a, b = h.float(), h_t.float()
            cos = ((1 - (a * b).sum(-1) / ((a * a).sum(-1) * (b * b).sum(-1)).sqrt()) * scored).sum()
        hidden = weights.new_zeros(())
        for i, j in self.pairs:
            difference = self.states[0][i].float() - self.states[1][j].float()
            hidden = hidden + (difference.square().mean(-1) * scored).sum()
        return loss + weights[3] * cos + weights[4] * hidden, torch.cat((terms, torch.stack((cos, hidden)).detach()))
