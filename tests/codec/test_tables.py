"""tables.py: every table against decimal or float64."""
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch

from codec import tables
from model import ACTIVATIONS


def test_constants():
    """pi and ln 10000 to 35 decimal places."""
    getcontext().prec = 50
    pi = Decimal('3.14159265358979323846264338327950288419716939937510')
    assert abs(Decimal(tables._pi()) / tables.ONE - pi) < Decimal(10) ** -35
    assert abs(Decimal(tables._ln_10000()) / tables.ONE - Decimal(10000).ln()) < Decimal(10) ** -35


def test_exp_table_is_correctly_rounded():
    """Every entry is the integer nearest to top·exp(-i/256)."""
    getcontext().prec = 50
    table = tables.exp_table(1 << 24, 0)
    assert table[-1] == 0 and len(table) > 4000
    for i in range(0, len(table), 97):
        value = (Decimal(-i) / tables.EXP_STEPS).exp() * (1 << 24)
        assert table[i] == int(value.to_integral_value()), i


@pytest.mark.parametrize('kind', ['gelu', 'gelu_tanh', 'relu2'])
def test_activation_table(kind):
    """The tables agree with torch's float64 activations to 2^-31."""
    x = (torch.arange(tables.ACTIVATION_ENTRIES, dtype=torch.float64) - tables.ACTIVATION_ENTRIES // 2) / 256
    got = tables.activation_table(kind, 8) / 2.0 ** 32
    assert np.abs(got - ACTIVATIONS[kind](x).numpy()).max() < 2.0 ** -31


def test_rotation_table():
    """Cosines and sines agree with float64's to the 24 bits that are kept, also far out."""
    cos, sin = tables.rotation_table(2048, 64)
    angle = np.arange(2048)[:, None] * 10000.0 ** (-np.arange(0, 64, 2) / 64)
    assert np.abs(cos - np.cos(angle)).max() < 2.0 ** -24 and np.abs(sin - np.sin(angle)).max() < 2.0 ** -24


