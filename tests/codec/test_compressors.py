"""codec/compressors.py: what is counted is a whole stream, made with the settings that its name says."""
import bz2
import gzip
import lzma

import numpy as np
import pytest
from conftest import make_text

from codec import compressors


class Spy:
    """A compressor that keeps what it gave."""

    def __init__(self):
        self.stream, self.given = bz2.BZ2Compressor(9), b''

    def compress(self, data):
        piece = self.stream.compress(data)
        self.given += piece
        return piece

    def flush(self):
        piece = self.stream.flush()
        self.given += piece
        return piece


@pytest.mark.parametrize('n', [0, 1, compressors.PIECE, 2 * compressors.PIECE + 5])
def test_streams_decode_to_the_text(n):
    """What is counted is one whole stream, also of the empty text and of several pieces of 1 MiB."""
    text, spy = np.resize(np.frombuffer(bytes(i * i % 251 for i in range(1000)), np.uint8), n), Spy()
    assert compressors.stream_bytes(lambda n_bytes: spy, text) == len(spy.given)
    assert bz2.decompress(spy.given) == text.tobytes()


def test_settings_are_those_of_the_name():
    """On a text of several pieces: xz -9e is not xz -6, and every library takes the pieces as one text."""
    text = np.frombuffer(make_text(compressors.PIECE + 5), np.uint8)
    size = {name: compressors.stream_bytes(make, text[:40_000]) for name, make in compressors.streams().items()}
    assert size['xz -9e'] == len(lzma.compress(text[:40_000], preset=9 | lzma.PRESET_EXTREME))
    assert size['xz -9e'] != len(lzma.compress(text[:40_000], preset=6))
    assert size['gzip -9'] != len(gzip.compress(text[:40_000], 6))
    for name in set(compressors.streams()) - {'xz -9e', 'brotli -q 11', 'zstd --ultra -22 --long=27'}:      # slow ones
        assert 0 < compressors.stream_bytes(compressors.streams()[name], text) < len(text) / 2
