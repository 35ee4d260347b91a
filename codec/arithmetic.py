"""Which types sum integers exactly on a device, and the few operations that need care to be the same everywhere."""
import functools

import numpy as np
import torch

from codec.sites import FLOAT32_BITS, FLOAT64_BITS
from configurator import UserError

FLOAT_SHAPES = (                                # of the products that a device is tested with: batch (0: none), m, k, n
    (0, 1, 64, 192),
    (0, 67, 256, 130),
    (0, 5, 1024, 33),
    (6, 1, 16, 200),
    (6, 33, 200, 16))


# --- what is exact on a device ---

def _extreme_factor(rng, top, shape):
    """Return random integers near ±top, near its half, and small ones."""
    return rng.choice([-top, top, top - 1, 1, 0, top // 2 + 1], shape)


def _floats_are_exact(rng, dtype, bits, device):
    """Whether products in dtype, some of whose sums reach 2^bits, are those of int64."""
    exact = True
    for b, m, k, n in FLOAT_SHAPES:
        batch = max(b, 1)
        low = 1 << bits // 2 - 3
        high = ((1 << bits) - 1) // (low * k)
        x = _extreme_factor(rng, low, (batch, m, k))
        y = _extreme_factor(rng, high, (batch, k, n))
        x[:, 0] = low
        y[:, :, 0] = high
        first = torch.tensor(x, dtype=dtype, device=device)
        second = torch.tensor(y, dtype=dtype, device=device)
        product = torch.matmul(first, second).cpu().numpy()
        expected = x.astype(np.int64) @ y.astype(np.int64)
        if not np.array_equal(product.astype(np.int64), expected):
            exact = False
    return exact


def _int8_is_exact(rng):
    """Whether int8 products sum exactly: a second factor outside [-64, 63] saturates on some CPUs."""
    values = [-64, 63, 62, -1]
    x = rng.choice(values, (33, 512))
    y = rng.choice(values, (512, 96))
    x[0] = -64
    y[:, 0] = -64
    x[1] = 63
    y[:, 1] = 63
    first = torch.tensor(x, dtype=torch.int8)
    second = torch.tensor(y, dtype=torch.int8)
    product = torch._int_mm(first, second)
    return np.array_equal(product.numpy(), x @ y)


@functools.lru_cache(None)
def known_answer(device):
    """Test products with extreme values against int64; returns the dtypes that are exact here, float64 first."""
    torch.set_float32_matmul_precision('highest')
    torch.backends.cuda.matmul.allow_tf32 = False
    rng = np.random.default_rng(7)
    good = []
    if _floats_are_exact(rng, torch.float64, FLOAT64_BITS, device):
        good.append(torch.float64)
    if _floats_are_exact(rng, torch.float32, FLOAT32_BITS, device):
        good.append(torch.float32)
    on_cpu = torch.device(device).type == 'cpu'
    if on_cpu and _int8_is_exact(rng):
        good.append(torch.int8)
    if torch.float64 not in good:
        raise UserError(f'{device} does not sum integers exactly in float64; use --device=cpu')
    return tuple(good)


# --- operations ---

class Arithmetic:
    """Where a model runs and in which types. float64_only: every product in float64, which must change nothing."""

    def __init__(self, device, float64_only):
        exact = known_answer(device)
        self.device = device
        self.float32_exact = torch.float32 in exact and not float64_only
        self.int8_exact = self.float32_exact and torch.int8 in exact

    def put(self, array, dtype=torch.float64):
        """Return a numpy array as a tensor on the device."""
        array = np.ascontiguousarray(array, np.float64)
        return torch.from_numpy(array).to(dtype).to(self.device)

    def types(self, wide):
        """Return (type of what follows a product, the same on every machine; type that the product runs in here)."""
        dtype = torch.float64 if wide else torch.float32
        run = dtype if self.float32_exact else torch.float64
        return dtype, run


def divide(number, x):
    """number / x as a division of tensors: with a scalar on one side torch may multiply by a reciprocal."""
    return torch.full_like(x, number).div_(x)


def look_up(table, steps):
    """Return the entries of a table (n,) at float `steps`, cut to whole ones below n."""
    index = steps.to(torch.int32)
    return table.index_select(0, index.view(-1)).view(steps.shape)
