"""What other compressors make of the same bytes: gzip, bzip2, xz, zstd, brotli here, bzip3, PPMd, zpaq if on PATH.

Whole files, and blocks each on its own, as a model sees them. The programs themselves are not counted.
"""
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass

from configurator import UserError

PIECE = 1 << 20                 # bytes given to a compressor at a time
MAY_BE_ABSENT = {'zstd -19', 'brotli -q 11', 'bzip3', '7z PPMd', 'zpaq -m5'}


# --- libraries ---

class Brotli:
    """Give brotli's compressor the method names of the others."""

    def __init__(self, brotli):
        stream = brotli.Compressor(quality=11, lgwin=24)
        self.compress = stream.process
        self.flush = stream.finish


def streams():
    """Return {name: make}; make(n_bytes) gives a fresh compressor object with compress(bytes) and flush()."""
    import bz2
    import lzma
    import zlib

    def gzip(n_bytes):
        return zlib.compressobj(9, zlib.DEFLATED, 31)

    def bzip2(n_bytes):
        return bz2.BZ2Compressor(9)

    def xz(n_bytes):
        """Make an xz -9e whose dictionary is no larger than the text: clearing 64 MiB for each block took 40 ms."""
        dictionary = min(max(n_bytes, 4096), 64 << 20)
        extreme = dict(id=lzma.FILTER_LZMA2, preset=9 | lzma.PRESET_EXTREME, dict_size=dictionary)
        return lzma.LZMACompressor(filters=[extreme])

    return {'gzip -9': gzip, 'bzip2 -9': bzip2, 'xz -9e': xz, **zstd_streams(), **brotli_streams()}


def zstd_streams():
    """Return what streams does of zstandard, nothing where it is not installed."""
    try:
        import zstandard
    except ImportError:
        return {}

    def usual(n_bytes):
        return zstandard.ZstdCompressor(level=19).compressobj(size=n_bytes)

    def long_range(n_bytes):
        options = zstandard.ZstdCompressionParameters.from_level(
            22, source_size=n_bytes, window_log=27, enable_ldm=True)
        return zstandard.ZstdCompressor(compression_params=options).compressobj(size=n_bytes)

    return {'zstd -19': usual, 'zstd --ultra -22 --long=27': long_range}


def brotli_streams():
    """Return what streams does of brotli, nothing where it is not installed."""
    try:
        import brotli
    except ImportError:
        return {}
    return {'brotli -q 11': lambda n_bytes: Brotli(brotli)}


def stream_bytes(make, data, block=0, progress=''):
    """Return the compressed size of a byte array: whole, or the sum over pieces of `block` bytes, each on its own."""
    from tqdm import tqdm
    step = block or PIECE
    total = 0
    stream = None
    for start in tqdm(range(0, max(len(data), 1), step), progress, leave=False, disable=not progress):
        piece = data[start:start + step].tobytes()
        if stream is None:
            stream = make(len(piece) if block else len(data))
        total += len(stream.compress(piece))

        # A block ends its own stream, the last piece that of the whole text.
        if block or start + step >= len(data):
            total += len(stream.flush())
            stream = None
    return total


# --- external programs ---

def tools(n_bytes):
    """Return {name: command} of the external compressors on PATH; FILE and OUT in a command stand for the paths."""
    block_mib = min(511, max(1, -(-n_bytes >> 20)))                     # bzip3: one block if it can hold the file
    known = (('bzip3', ('bzip3',), f'-e -b {block_mib} FILE OUT'),
             ('7z PPMd', ('7zz', '7z', '7za'), 'a -bd -y -mx=9 -m0=PPMd OUT.7z FILE'),
             ('zpaq -m5', ('zpaq',), 'add OUT.zpaq FILE -m5'))
    commands = {}
    for name, programs, arguments in known:
        path = next(filter(None, map(shutil.which, programs)), '')
        if path:
            commands[name] = [path, *arguments.split()]
    return commands


def tool_bytes(command, data, timeout):
    """Return the size of what an external compressor makes of a byte array; UserError if it fails or takes too long."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, 'text')
        packed = os.path.join(folder, 'packed')
        with open(source, 'wb') as f:
            for start in range(0, len(data), PIECE):
                f.write(data[start:start + PIECE].tobytes())
        program, *arguments = command
        arguments = [part.replace('OUT', packed).replace('FILE', source) for part in arguments]
        run_tool([program, *arguments], timeout)

        # Some add an ending of their own to the name.
        made = [name for name in os.listdir(folder) if name.startswith('packed')]
        if not made:
            raise UserError('ended well but left no output')
        return os.path.getsize(os.path.join(folder, made[0]))


def run_tool(command, timeout):
    """Run an external program without a word; UserError if it fails or takes longer than timeout seconds."""
    try:
        subprocess.run(command, check=True, timeout=timeout, capture_output=True, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise UserError(f'stopped after {timeout:g} s; give it more with --baseline_timeout=') from None
    except (OSError, subprocess.CalledProcessError) as e:
        raise UserError(f'failed: {e}') from None


# --- rows of a table ---

@dataclass
class Job:
    """One compressor on the bytes of a split: in this process (make) or outside it (command), whole or by blocks."""
    name: str
    make: object = None
    command: tuple = ()
    block: int = 0              # bytes; 0: the whole text

    def size(self, data, timeout):
        """Return the compressed size of a byte array; UserError where a program fails or takes longer than timeout."""
        if self.command:
            return tool_bytes(self.command, data, timeout)
        label = f'{self.name}, per block' if self.block else self.name
        return stream_bytes(self.make, data, self.block, label)


def jobs(n_bytes, blocks):
    """Return every compressor on the whole text, then those of this process on blocks of each size."""
    makers = streams()
    whole = [Job(name, make) for name, make in makers.items()]
    outside = [Job(name, command=command) for name, command in tools(n_bytes).items()]
    by_block = [Job(name, make, block=block) for block in blocks for name, make in makers.items()]
    return [*whole, *outside, *by_block]


def baseline_rows(data, blocks, timeout):
    """Run every compressor on one byte-level split (bins.Bin), the whole file, then per block of each size.

    Yields table rows. What fails, or takes longer than timeout seconds, is said and left out.
    """
    where = f'{data.name}/{data.split}'
    for job in jobs(data.n_tokens, blocks):
        started = time.time()
        name = f'{job.name}, each {job.block} bytes alone' if job.block else job.name
        try:
            size = job.size(data.tokens, timeout)
        except UserError as e:
            print(f'{name} on {where}: {e}')
            continue
        row = dict(
            run=name,
            data=where,
            dataset=data.name,
            split=data.split,
            tokens=data.n_tokens,
            text_bytes=data.n_tokens,
            data_bytes=size,
            bits_per_byte=8 * size / max(data.n_tokens, 1),
            seconds=round(time.time() - started, 2))

        # A stream per block is no file that could be kept.
        if job.block:
            row['per_block'] = job.block
        else:
            row['archive_bytes'] = size
        yield row


def absent():
    """Return the names of the compressors that are known but not here, sorted."""
    return sorted(MAY_BE_ABSENT - set(streams()) - set(tools(0)))
