"""Compress bytes with adaptive counts alone, or beside a transformer: no weights to store, any machine decodes.

A counts archive is a header, blocks and an end. A block is its form, the length of its text, the length of its code, a
CRC-32 of its text, a CRC-32 of all these and of its code, and the code. The block that ends the archive holds the
SHA-256 of all text. Needs numpy and numba, not torch.

    archive = counts.compress(data)                      # bytes → bytes; counts.decompress(archive) gives data back
    for piece in counts.encode_blocks(counts.read_blocks(file)):         # pipes, in constant memory
    for text in counts.decode_blocks(file):              # each block is checked before it is yielded
    counts.Lockstep(streams, guided=True)                # byte by byte beside a transformer: encode, finish, decode
"""
import hashlib
import io
import struct
import sys
import zlib

import numpy as np

from configurator import UserError

try:
    import numba  # noqa: F401 (mixing needs it; here its absence gets a line that helps)
except ImportError:
    raise UserError('counts need numba, which is not installed; pip install numba==0.68.1') from None

from numba.core import event

from codec import logistic, mixing
from codec.mixing import LIMIT, WEIGHT_ONE

MAGIC = b'nMct'
VERSION = 2
HEADER = struct.Struct('<4sBHHI')               # magic, version, MiB of counts, streams, CRC-32 of these
FRONT = struct.Struct('<4sBHH')                 # the header without its CRC
BLOCK = struct.Struct('<BIII')                  # form, bytes of text, bytes of code, CRC-32 of the text
CHECK = struct.Struct('<I')                     # CRC-32 of the four and the code: checked before anything is decoded
END, STORED, CODED = range(3)                   # forms of a block
DEFAULT_BLOCK = 1 << 20                         # bytes of text in a block
MOST_BLOCK = 1 << 24
MOST_STREAMS = 4096
MOST_MEMORY = 1024                              # MiB of counts that an archive may ask for
DEFAULT_MEMORY = 320
MEMORY_PER_MEGABYTE = 96                        # MiB of counts that a million bytes of text can fill
CHUNK = 1 << 15                                 # bytes that one call of the compiled loop codes
MOST_CODE = 32                                  # bytes of code that a byte can become, at the very worst
DAMAGED = 'the counts archive is damaged or was cut; get it again'


# --- the model's arrays ---

class _CompileNotice(event.Listener):
    """Says on standard error that numba compiles, the first time that it does."""

    def __init__(self):
        self.said = False

    def on_start(self, _):
        if not self.said:
            again = 'once'
            if not mixing.CACHED:
                again = 'as in every run, for numba finds no cache folder to write to (set NUMBA_CACHE_DIR)'
            print(f'compiling the counting model, {again}: about half a minute …', file=sys.stderr, flush=True)
        self.said = True

    def on_end(self, _):
        pass


_notice = _CompileNotice()


def _final_row():
    """Return the 33 probabilities that a final table starts with: it changes nothing at first."""
    squash = logistic.squash_table()
    row = np.zeros(33, np.uint16)
    for step in range(33):
        x = (2 * LIMIT + 2) * step // 32 - LIMIT - 1
        row[step] = squash[min(max(x, -LIMIT), LIMIT) + LIMIT]
    return row


def _match_chances():
    """Return how often a match of each length is right, at first: 1 - 1 / (2 length)."""
    lengths = np.arange(mixing.MATCH_MOST + 1).clip(1)
    return ((1 << 22) - (1 << 21) // lengths) << 10 | mixing.GUESS_COUNT


def new_model(streams, memory, ring, guided):
    """Return the tables of a model that has seen nothing; memory in MiB is for the counts alone."""
    contexts = mixing.SHARED
    if streams > 1:
        contexts += mixing.PRIVATE
    sets = mixing.SETS
    if guided:
        sets += 1
    inputs = mixing.input_count(contexts, guided)
    weights = np.zeros((mixing.row_count(guided), inputs), np.int32)
    weights[:] = mixing.initial_weights(contexts, inputs)
    match_slots = np.full(mixing.MATCH_SLOTS, -1, np.int64)
    return mixing.Model(
        squash=logistic.squash_table(),
        stretch=logistic.stretch_table(),
        reciprocal=logistic.reciprocal_table(),
        following=logistic.following_table(),
        certain=logistic.certain_table(),
        buckets=np.zeros(memory * (1 << 20), np.uint8),
        chances=np.tile(logistic.initial_chances() << 10 | mixing.GUESS_COUNT, contexts),
        match_slots=match_slots,
        match_chances=_match_chances(),
        weights=weights,
        final_weights=np.full((256, sets), WEIGHT_ONE // sets, np.int32),
        finals=np.tile(_final_row(), (mixing.FINAL_ROWS, 1)),
        history=np.zeros((streams, ring), np.uint8),
        streams=np.zeros((streams, mixing.FIELDS), np.int64),
        bases=np.zeros(contexts, np.int64),
        hashes=np.zeros(contexts, np.int64),
        inputs=np.zeros(inputs, np.int32),
        rows=np.zeros(sets, np.int64),
        outputs=np.zeros(sets, np.int64))


# --- streams in lockstep ---

class Lockstep:
    """S streams that share one model: in each step every stream codes a byte, in the order of the streams.

    Stream s sees what streams 0 … s - 1 taught the model in the same step: that order is part of the format. `guided`:
    each step also gets the 256 integer frequencies, their sum below 2^40, that a transformer has for the next byte of
    each stream. The code does not depend on how the steps are grouped into calls.
    """

    def __init__(self, streams, memory=DEFAULT_MEMORY, ring=1 << 22, guided=False):
        self.streams = streams
        self.guided = guided
        with event.install_listener('numba:compile', _notice):
            self._model = new_model(streams, memory, ring, guided)
            self._coder = np.zeros(mixing.CODER_FIELDS, np.int64)
            self._call(np.zeros(0, np.uint8), np.zeros((0, streams), np.uint8), None)
        self._data = None
        self._pieces = []
        self.start_encoding()

    def _call(self, data, columns, frequencies):
        """Run the compiled loop over columns (T, S) and frequencies (T, S, 256) or None."""
        if frequencies is None:
            frequencies = np.zeros((0, 0, 256), np.int64)
        frequencies = np.ascontiguousarray(frequencies, np.int64)
        mixing.code_steps(self._model, self._coder, data, columns, frequencies)

    def _check(self, steps, active, frequencies):
        """Raise ValueError unless the call fits the model."""
        if not 0 < active <= self.streams:
            raise ValueError(f'{active} streams, but the model has {self.streams}')
        if (frequencies is not None) != self.guided:
            raise ValueError('frequencies are given to guided models, and to no other')
        if self.guided and frequencies.shape != (steps, active, 256):
            raise ValueError(f'frequencies have shape {frequencies.shape}, expected {(steps, active, 256)}')

    def start_encoding(self):
        """Begin a new code; what the model learned stays."""
        self._coder[:] = 0
        self._coder[mixing.HIGH] = 0xFFFFFFFF
        self._pieces = []

    def encode(self, columns, frequencies=None):
        """Code columns (T, S) uint8, a byte per stream and step; fewer columns: the first streams alone."""
        columns = np.array(columns, np.uint8, order='C')
        steps, active = columns.shape
        self._check(steps, active, frequencies)
        rows = max(1, CHUNK // active)
        for start in range(0, steps, rows):
            part = columns[start:start + rows]
            guide = None
            if self.guided:
                guide = frequencies[start:start + rows]
            data = np.zeros(MOST_CODE * part.size, np.uint8)
            self._coder[mixing.AT] = 0
            self._call(data, part, guide)
            self._pieces.append(data[:self._coder[mixing.AT]].tobytes())

    def finish(self):
        """Return the code of all bytes since start_encoding."""
        # Bytes that are missing read as zeros, so the shortest number in the range ends the code.
        low = int(self._coder[mixing.LOW])
        high = int(self._coder[mixing.HIGH])
        for count in range(5):
            keep = 32 - 8 * count
            number = -(-low >> keep) << keep
            if number <= high:
                break
        self._pieces.append(number.to_bytes(4, 'big')[:count])
        code = b''.join(self._pieces)
        self.start_encoding()
        return code

    def start_decoding(self, code):
        """Begin to decode code; what the model learned stays."""
        self._coder[:] = 0
        self._coder[mixing.HIGH] = 0xFFFFFFFF
        self._coder[mixing.DECODING] = 1
        self._coder[mixing.CODE] = int.from_bytes(code[:4].ljust(4, b'\0'), 'big')
        self._coder[mixing.AT] = 4
        self._data = np.frombuffer(code, np.uint8).copy()

    def decode(self, steps, active=None, frequencies=None):
        """Return the next columns (steps, active) uint8; active: how many of the first streams take part."""
        if active is None:
            active = self.streams
        self._check(steps, active, frequencies)
        columns = np.zeros((steps, active), np.uint8)
        rows = max(1, CHUNK // active)
        for start in range(0, steps, rows):
            guide = None
            if self.guided:
                guide = frequencies[start:start + rows]
            self._call(self._data, columns[start:start + rows], guide)
        return columns


# --- blocks ---

def _spread(text, streams):
    """Return text as columns: stream s has a run of len(text) // streams bytes, the remainder is a last step."""
    steps = len(text) // streams
    symbols = np.frombuffer(text, np.uint8)
    columns = symbols[:steps * streams].reshape(streams, steps).T
    return columns, symbols[steps * streams:][None]


def _encode_text(lockstep, text):
    """Code text over the streams of lockstep; returns the code."""
    columns, rest = _spread(text, lockstep.streams)
    if columns.size:
        lockstep.encode(columns)
    if rest.size:
        lockstep.encode(rest)
    return lockstep.finish()


def _decode_text(lockstep, code, length):
    """Return the text of length bytes that code holds."""
    lockstep.start_decoding(code)
    text = b''
    steps = length // lockstep.streams
    if steps:
        text = lockstep.decode(steps).T.tobytes()
    rest = length % lockstep.streams
    if rest:
        text += lockstep.decode(1, rest).tobytes()
    lockstep.start_encoding()
    return text


def fitting_memory(length, most=DEFAULT_MEMORY):
    """Return the MiB of counts that a text of length bytes is worth, at most `most`; None: the length is not known."""
    if length is None:
        return most
    return max(1, min(most, length * MEMORY_PER_MEGABYTE // 1000000 + 1))


def _block(form, text, code):
    """Return a block as it stands in an archive."""
    front = BLOCK.pack(form, len(text), len(code), zlib.crc32(text))
    return front + CHECK.pack(zlib.crc32(code, zlib.crc32(front))) + code


def encode_blocks(chunks, memory=DEFAULT_MEMORY, streams=1, length=None):
    """Yield the pieces of an archive of chunks, an iterable of bytes, each the text of a block of 1 … MOST_BLOCK bytes.

    Works in constant memory: `memory` MiB of counts, about 60 more, and a block. `length`: of all text, if known.
    """
    if not 0 < streams <= MOST_STREAMS:
        raise UserError(f'{streams} streams; expected 1 … {MOST_STREAMS}')
    if not 0 < memory <= MOST_MEMORY:
        raise UserError(f'{memory} MiB of counts; expected 1 … {MOST_MEMORY}')
    memory = fitting_memory(length, memory)
    lockstep = Lockstep(streams, memory, _ring(streams))
    front = FRONT.pack(MAGIC, VERSION, memory, streams)
    yield front + CHECK.pack(zlib.crc32(front))
    digest = hashlib.sha256()
    for text in chunks:
        if len(text) > MOST_BLOCK:
            raise UserError(f'a block of {len(text)} bytes; at most {MOST_BLOCK}')
        digest.update(text)
        code = _encode_text(lockstep, text)
        form = CODED
        if len(code) >= len(text):
            form = STORED
            code = bytes(text)
        yield _block(form, text, code)
    yield _block(END, b'', digest.digest())


def _ring(streams):
    """Return the bytes of history that each stream keeps for the match model."""
    return max(1 << 12, (1 << 24) // streams)


def _read(file, size):
    """Return exactly size bytes of file."""
    data = file.read(size)
    if len(data) != size:
        raise UserError(DAMAGED)
    return data


def read_header(file):
    """Return (MiB of counts, streams) of the archive that file is at the start of."""
    raw = file.read(HEADER.size)
    if raw[:4] != MAGIC:
        raise UserError(f'not a counts archive: it starts with {raw[:4]!r}, expected {MAGIC!r}')
    if len(raw) < HEADER.size:
        raise UserError(DAMAGED)
    _, version, memory, streams, crc = HEADER.unpack(raw)
    if version != VERSION:
        raise UserError(f'counts archive of format version {version}; this program reads {VERSION}')
    bounded = 0 < memory <= MOST_MEMORY and 0 < streams <= MOST_STREAMS
    if crc != zlib.crc32(raw[:FRONT.size]) or not bounded:
        raise UserError(DAMAGED)
    return memory, streams


def _read_block(file):
    """Return (form, code, bytes of text, CRC-32 of the text) of the next block, whole as it was written."""
    front = _read(file, BLOCK.size)
    check, = CHECK.unpack(_read(file, CHECK.size))
    form, length, size, crc = BLOCK.unpack(front)
    bounded = length <= MOST_BLOCK and size <= max(length, hashlib.sha256().digest_size)
    if form not in (END, STORED, CODED) or not bounded:
        raise UserError(DAMAGED)
    code = _read(file, size)
    if check != zlib.crc32(code, zlib.crc32(front)):
        raise UserError(DAMAGED)
    return form, code, length, crc


def _text_of(lockstep, form, code, length):
    """Return the text of a block; the model learns stored text too, as it did when the block was written."""
    if form == CODED:
        return _decode_text(lockstep, code, length)
    if form == END:
        return b''
    _encode_text(lockstep, code)
    return code


def decode_blocks(file):
    """Yield the text of each block of the archive in file; every block is checked before it is yielded."""
    memory, streams = read_header(file)
    lockstep = Lockstep(streams, memory, _ring(streams))
    digest = hashlib.sha256()
    while True:
        form, code, length, crc = _read_block(file)
        text = _text_of(lockstep, form, code, length)
        if len(text) != length or zlib.crc32(text) != crc:
            raise UserError(DAMAGED)
        if form == END:
            break
        digest.update(text)
        yield text
    if code != digest.digest():
        raise UserError(DAMAGED)
    if file.read(1):
        raise UserError('bytes follow the end of the counts archive; get it again')


# --- whole texts ---

def compress(data, memory=DEFAULT_MEMORY, streams=1, block=DEFAULT_BLOCK):
    """Return data as a counts archive; several streams code less well, and serve to compare with hybrids."""
    view = memoryview(data)
    texts = (bytes(view[at:at + block]) for at in range(0, len(data), block))
    return b''.join(encode_blocks(texts, memory, streams, len(data)))


def decompress(archive):
    """Return the data of a counts archive; a UserError says what is wrong with a damaged one."""
    return b''.join(decode_blocks(io.BytesIO(archive)))


def read_blocks(file, block=DEFAULT_BLOCK):
    """Yield what is left of file in pieces of block bytes, the last one shorter."""
    while True:
        pieces = []
        missing = block
        # A pipe may hand over less than it is asked for.
        while missing:
            piece = file.read(missing)
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
        if pieces:
            yield b''.join(pieces)
        if missing:
            return
