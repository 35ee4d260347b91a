"""codec/counts.py: exact, refuses what is damaged, small enough, and the same bytes everywhere."""
import decimal
import hashlib
import io
import os
import pydoc_data.topics
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from codec import counts, logistic
from configurator import UserError

# The compiled loop is made once for all tests, and that can take minutes on a slow machine.
pytestmark = pytest.mark.timeout(1200)

RANDOM = np.random.default_rng(1).integers(0, 256, 70000, np.uint8).tobytes()


def english(size):
    """Return size bytes of English that ship with Python."""
    text = '\n'.join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return text.encode()[:size]


class Dice:
    """Numbers that are the same with every version of every library."""

    def __init__(self):
        self.state = 1

    def below(self, limit):
        """Return the next number of 0 … limit - 1."""
        self.state = self.state * 1103515245 + 12345 & 0x7FFFFFFF
        return (self.state >> 12) % limit


def made_up(size):
    """Return size bytes that are the same everywhere: made-up words, few of them frequent, and some other bytes."""
    dice = Dice()
    words = []
    for _ in range(300):
        letters = [dice.below(26) * dice.below(27) // 26 for _ in range(2 + dice.below(7))]
        words.append(bytes(97 + letter for letter in letters))
    pieces = []
    for n in range(size):
        pieces.append(words[dice.below(300) * dice.below(300) // 300])
        pieces.append((b' ', b' ', b' ', b', ', b'.\n', b'\xc3\xa9', bytes([n & 255]))[dice.below(7)])
    return b''.join(pieces)[:size]


# --- tables ---

def test_squash_is_the_logistic_function():
    table = logistic.squash_table()
    decimal.getcontext().prec = 40
    for x in (-3071, -2000, -255, -1, 0, 1, 7, 256, 1024, 3071):
        exact = 65536 / (1 + (-decimal.Decimal(x) / 256).exp())
        exact = min(max(exact, 1), 65535)
        assert abs(table[x + logistic.LIMIT] - exact) <= decimal.Decimal('.5000001')
    assert (np.diff(table) >= 0).all()


def test_stretch_inverts_squash():
    table = logistic.stretch_table()
    assert (np.diff(table) >= 0).all()
    p = np.arange(1, 65536)
    assert (table[p] == -table[65536 - p]).all()
    # Between e^-8 and e^8 a step of log odds is at least a fifth of a step of probability.
    back = logistic.squash_table()[table[p] + logistic.LIMIT]
    assert np.abs(back - p).max() <= 65536 // 4 // 256 + 1


def test_histories_fit_a_byte_and_follow_the_bits():
    states = logistic.histories()
    following = logistic.following_table()
    assert len(states) <= 256
    assert len(set(states)) == len(states)
    assert states[following[1]] == (0, 1, 1)
    assert states[following[2 * int(following[1]) + 1]] == (0, 2, 1)
    for state, (n0, n1, _) in enumerate(states):
        m0, m1, _ = states[following[2 * state + 1]]
        assert m0 <= n0
        assert m1 >= min(n1, 1)
        # No history leads back to the one that has seen nothing.
        assert following[2 * state] > 0


# --- round trips ---

TEXTS = {
    'empty': b'',
    'one byte': b'x',
    'equal bytes': b'a' * 50000,
    'random': RANDOM,
    'all values': bytes(range(256)) * 8,
    'utf-16': english(20000).decode().encode('utf-16'),
    'english': english(30000),
    'changes kind': english(10000) + RANDOM[:10000] + bytes(10000) + english(10000),
    'shorter than the streams': b'seven b'}


@pytest.mark.parametrize('streams', [1, 5, 32])
@pytest.mark.parametrize('name', TEXTS)
def test_round_trip(name, streams):
    data = TEXTS[name]
    archive = counts.compress(data, streams=streams, block=1 << 14)
    assert counts.decompress(archive) == data
    # Header, end, and per block a front; random bytes are stored.
    blocks = len(data) // (1 << 14) + 1
    assert len(archive) <= len(data) + 62 + 17 * blocks


def test_sizes():
    assert len(counts.compress(TEXTS['equal bytes'])) < 300
    assert len(counts.compress(english(32768))) < 9600
    assert len(counts.compress(RANDOM)) <= len(RANDOM) * 1.005 + 100


def test_text_after_a_stored_block_is_predicted_from_it():
    block = RANDOM[:1 << 14]
    archive = counts.compress(block + block, block=1 << 14)
    assert len(archive) < len(block) * 1.2
    assert counts.decompress(archive) == block + block


def test_memory_is_a_knob_and_stands_in_the_archive():
    data = english(50000)
    small = counts.compress(data, memory=1)
    assert counts.read_header(io.BytesIO(small)) == (1, 1)
    assert counts.decompress(small) == data
    with pytest.raises(UserError, match='MiB'):
        counts.compress(data, memory=0)
    with pytest.raises(UserError, match='streams'):
        counts.compress(data, streams=0)


class Trickle(io.BytesIO):
    """A pipe that hands over few bytes at a time."""

    def read(self, size=-1):
        return super().read(min(size, 1000))


def test_pipes_are_cut_into_blocks_however_they_trickle():
    data = english(10000)
    pieces = list(counts.read_blocks(Trickle(data), 4096))
    assert [len(piece) for piece in pieces] == [4096, 4096, 1808]
    archive = b''.join(counts.encode_blocks(pieces, memory=2))
    decoded = counts.decode_blocks(io.BytesIO(archive))
    # The first block is there before the rest of the archive is read.
    assert next(decoded) == data[:4096]
    assert b''.join(decoded) == data[4096:]


# --- damage ---

def test_every_damaged_byte_is_refused():
    data = english(600)
    archive = counts.compress(data, memory=1, block=400)
    for at in range(0, len(archive), 3):
        damaged = bytearray(archive)
        damaged[at] ^= 0x41
        with pytest.raises(UserError):
            counts.decompress(bytes(damaged))


def test_every_cut_is_refused():
    archive = counts.compress(english(600), memory=1)
    for length in range(0, len(archive), 5):
        with pytest.raises(UserError):
            counts.decompress(archive[:length])
    with pytest.raises(UserError, match='follow'):
        counts.decompress(archive + b'x')


def test_another_version_is_named():
    archive = bytearray(counts.compress(b'abc'))
    archive[4] = 9
    with pytest.raises(UserError, match='version 9'):
        counts.decompress(bytes(archive))


# --- lockstep ---

def columns_of(data, streams):
    """Return data as (T, S)."""
    steps = len(data) // streams
    return np.frombuffer(data[:steps * streams], np.uint8).reshape(streams, steps).T


def frequencies_for(columns, seed):
    """Return (T, S, 256) frequencies that give the byte that comes some 40 % and some others nothing."""
    rng = np.random.default_rng(seed)
    steps, streams = columns.shape
    frequencies = rng.integers(0, 1 << 16, (steps, streams, 256))
    frequencies[rng.random(frequencies.shape) < .3] = 0
    t, s = np.mgrid[:steps, :streams]
    frequencies[t, s, columns] = 5 << 20
    return frequencies


@pytest.mark.parametrize('guided', [False, True])
def test_lockstep_step_by_step_equals_all_at_once(guided):
    columns = columns_of(english(4000), 8)
    frequencies = None
    if guided:
        frequencies = frequencies_for(columns, 3)
    whole = counts.Lockstep(8, 1, 4096, guided)
    whole.encode(columns, frequencies)
    code = whole.finish()

    stepwise = counts.Lockstep(8, 1, 4096, guided)
    decoder = counts.Lockstep(8, 1, 4096, guided)
    decoder.start_decoding(code)
    for t in range(len(columns)):
        guide = None
        if guided:
            guide = frequencies[t:t + 1]
        stepwise.encode(columns[t:t + 1], guide)
        assert (decoder.decode(1, frequencies=guide) == columns[t]).all()
    assert stepwise.finish() == code


def test_a_guide_that_knows_makes_the_code_smaller():
    columns = columns_of(english(16000), 8)
    sizes = {}
    for guided in (False, True):
        lockstep = counts.Lockstep(8, 1, 4096, guided)
        lockstep.encode(columns, frequencies_for(columns, 5) if guided else None)
        sizes[guided] = len(lockstep.finish())
    assert sizes[True] < .5 * sizes[False]


def test_a_guide_that_excludes_the_byte_still_codes():
    columns = columns_of(english(2000), 4)
    frequencies = frequencies_for(columns, 7)
    t, s = np.mgrid[:len(columns), :4]
    frequencies[t, s, columns] = 0
    frequencies[::3] = 0
    lockstep = counts.Lockstep(4, 1, 4096, True)
    lockstep.encode(columns, frequencies)
    code = lockstep.finish()
    decoder = counts.Lockstep(4, 1, 4096, True)
    decoder.start_decoding(code)
    assert (decoder.decode(len(columns), frequencies=frequencies) == columns).all()


def test_wrong_shapes_are_refused():
    lockstep = counts.Lockstep(4, 1, 4096)
    with pytest.raises(ValueError, match='streams'):
        lockstep.encode(np.zeros((1, 5), np.uint8))
    with pytest.raises(ValueError, match='guided'):
        lockstep.encode(np.zeros((1, 4), np.uint8), np.ones((1, 4, 256), np.int64))


def test_private_contexts_pay_where_streams_are_many():
    data = english(200000)
    archive = counts.compress(data, streams=32)
    alone = counts.compress(data)
    # Without private contexts 32 streams cost some 5 % more than one.
    assert len(archive) < 1.045 * len(alone)


# --- the same bytes everywhere ---

GOLDEN = '4c4ed62721dfc339a52aaf5cd77fa4272e621970e1491b98f44dd6d2bffa3ee9'
PROGRAM = '''
import hashlib, sys
from codec import counts
text = open(sys.argv[1], 'rb').read()
archives = counts.compress(text) + counts.compress(text, streams=8)
assert 'torch' not in sys.modules
print(hashlib.sha256(archives).hexdigest())
'''


def test_golden_archives():
    text = made_up(20000)
    archives = counts.compress(text) + counts.compress(text, streams=8)
    assert hashlib.sha256(archives).hexdigest() == GOLDEN


def start(folder, **variables):
    """Start a process that prints the hash of the golden archives."""
    path = folder / 'text'
    path.write_bytes(made_up(20000))
    return subprocess.Popen([sys.executable, '-c', PROGRAM, path], cwd=ROOT, env=dict(os.environ, **variables),
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_a_generic_cpu_and_two_processes_that_compile_at_once(tmp_path):
    variables = dict(NUMBA_CPU_NAME='generic', NUMBA_CPU_FEATURES='', NUMBA_CACHE_DIR=str(tmp_path / 'cache'))
    processes = [start(tmp_path, **variables), start(tmp_path, **variables)]
    for process in processes:
        out, err = process.communicate()
        assert out.strip() == GOLDEN, err
        assert 'compiling' in err


@pytest.mark.slow
def test_a_cache_folder_that_cannot_be_written(tmp_path):
    blocker = tmp_path / 'file'
    blocker.write_text('')
    process = start(tmp_path, NUMBA_CACHE_DIR=str(blocker / 'below'),
                    NUMBA_CACHE_LOCATOR_CLASSES='UserProvidedCacheLocator')
    out, err = process.communicate()
    assert out.strip() == GOLDEN, err
    assert 'no cache folder' in err


# --- integers against float64 ---

def test_integers_cost_little_against_float64():
    from counts_reference import reference_bytes
    data = english(100000)
    lockstep = counts.Lockstep(1, 16, 1 << 20)
    lockstep.encode(np.frombuffer(data, np.uint8)[:, None])
    assert len(lockstep.finish()) <= 1.005 * reference_bytes(data, 16)


def test_code_length_is_what_the_probabilities_say():
    # A guide that is certain and right teaches the mixer to cost nearly nothing.
    columns = np.full((20000, 1), 65, np.uint8)
    frequencies = np.zeros((20000, 1, 256), np.int64)
    frequencies[:, :, 65] = 1
    lockstep = counts.Lockstep(1, 1, 4096, True)
    lockstep.encode(columns, frequencies)
    assert len(lockstep.finish()) < 40
