"""The masked mixer: causal mixing of tokens by learned matrices instead of attention (Badger, arXiv 2409.01482).

Position i of the output is a weighted sum of positions 0 to i, with weights that do not depend on the input; the tokens
are the channels of a convolution over the features. Entries above the diagonal are no weights: they are not stored.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from cpu import Linear, linear


def unfold(folded):
    """Return the triangles (..., n, n) of folded ones (..., n/2, n + 1), zeros above the diagonal; see Triangles."""
    n = folded.size(-1) - 1
    low = folded[..., :n].flip(-2).tril(n // 2)
    high = folded.flip(-1)[..., :n].tril()
    return torch.cat((high, low), -2)


class Triangles(nn.Module):
    """`groups` mixings of n positions, x (B, G, T, D) -> (B, G, T, D), T <= n: kernel lower triangular matrices each.

    weight (G·kernel·n/2, n + 1): the triangles, folded. Row r of a folded triangle holds row n - 1 - r of the matrix
    from the left and row r from the right, reversed: together n + 1 entries. bias (G·n,): one per position.
    """

    def __init__(self, n, groups=1, kernel=1, bias=True):
        super().__init__()
        self.n, self.groups, self.kernel = n, groups, kernel
        self.weight = nn.Parameter(torch.empty(groups * kernel * n // 2, n + 1))
        self.bias = nn.Parameter(torch.empty(groups * n)) if bias else None

    def matrices(self):
        """Return the matrices (G, kernel, n, n); [.., i, j] is the weight of position j for position i."""
        return unfold(self.weight.view(self.groups, self.kernel, self.n // 2, self.n + 1))

    def forward(self, x, start=0):
        """Mix x and return the positions from start on."""
        B, G, T, D = x.shape
        weight = self.matrices()[:, :, start:T, :T]
        bias = None if self.bias is None else self.bias.view(G, self.n)[:, start:T]
        if self.kernel > 1:
            y = F.conv1d(x.reshape(B, G * T, D), weight.permute(0, 2, 3, 1).flatten(0, 1),
                         None if bias is None else bias.flatten(), padding=self.kernel // 2, groups=G)
            return y.view(B, G, T - start, D)
        if G == 1:                              # one product for the whole batch: features are its rows
            y = linear(x[:, 0].transpose(1, 2), weight[0, 0], None if bias is None else bias[0])
            return y.transpose(1, 2)[:, None]
        y = weight[:, 0] @ x
        return y if bias is None else y + bias[:, :, None]


class Mixer(nn.Module):
    """What takes attention's place in a block: x (B, T, C) -> (B, T, C).

    With several heads each has its own C/H features of a projection and its own matrix, and a projection follows.
    Expanded by e, each position has e hidden values per feature: mix, GELU, mix, sum.
    """

    def __init__(self, n, width, n_head=1, kernel=1, expansion=0, bias=True):
        super().__init__()
        self.n_head, self.expansion = n_head, expansion
        self.heads, self.proj = (Linear(width, width, bias=bias) if n_head > 1 else None for _ in range(2))
        self.mix = Triangles(n, n_head * max(expansion, 1), kernel, bias)
        self.mix_down = Triangles(n, n_head * expansion, kernel, bias) if expansion else None

    def forward(self, x, cache=None):
        B, T, C = x.shape
        if self.heads:
            x = self.heads(x)
        x = x.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)         # (B, H, T, D)
        if self.expansion:
            x = x.repeat_interleave(self.expansion, 1)
        start = 0
        if cache is not None:                                                   # earlier inputs of the mixings
            start = cache[0].size(2) if cache else 0
            x = torch.cat((cache[0], x), 2) if start else x
            cache[0:1] = [x]
        y = self.mix(x, start)
        if self.expansion:
            y = F.gelu(y)
            if cache is not None:
                y = torch.cat((cache[1], y), 2) if start else y
                cache[1:2] = [y]
            y = self.mix_down(y, start).view(B, self.n_head, self.expansion, T, C // self.n_head).sum(2)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.proj(y) if self.heads else y
