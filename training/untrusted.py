"""Read what torch wrote, trusting nothing: zips after their checksums, a sharded folder's .metadata as inert records.

Imported by checkpoint.py and parallel.py. Whatever is wrong is a ValueError, or an error of zipfile, pickle or torch,
whose first line says what; checkpoint.load_checkpoint makes one line of it.

torch checks no checksum of its zips, and its reader of sharded folders unpickles .metadata, which may run any code.
Here every class in that file becomes a Record, which has no behaviour, and the pieces are read by weights_only.
"""
import io
import json
import math
import os
import pickle
import zipfile
import zlib
from typing import NamedTuple

import torch

CHUNK = 1 << 20
CHECKSUMS = 'checksums.json'
METADATA = '.metadata'

# The classes in .metadata of folders that two to four ranks wrote, with the torch that requirements.txt names.
ADMITTED = {
    'torch': ('Size',),
    'torch.serialization': ('_get_layout',),
    'torch.distributed.checkpoint.metadata': (
        'Metadata', 'TensorStorageMetadata', 'TensorProperties', 'ChunkStorageMetadata', 'MetadataIndex',
        'StorageMeta', '_MEM_FORMAT_ENCODING'),
    'torch.distributed.checkpoint.filesystem': ('_StorageInfo',),
    'pathlib': ('PosixPath', 'WindowsPath'),
    'pathlib._local': ('PosixPath', 'WindowsPath'),             # where Python 3.13 has them
}


# --- zips of torch.save ---

def check_zip(file):
    """Read a zip of torch.save, open for reading, to its end in constant memory, and compare the checksums in it."""
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        # torch stores without compressing, so parts that are larger than the file are no work of its.
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError('it is compressed, which torch.save never does')
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError('its parts are larger than the file')

        # zipfile compares the checksum where a part ends, and raises BadZipFile.
        for entry in entries:
            with archive.open(entry) as part:
                while part.read(CHUNK):
                    pass
    file.seek(0)


def load_zip(file, device='cpu'):
    """Return what torch.save wrote to a path or an open file, without running code, after its checksums."""
    if not hasattr(file, 'seek'):
        with open(regular(file), 'rb') as opened:
            return load_zip(opened, device)
    check_zip(file)
    return torch.load(file, map_location=device, weights_only=True)


def regular(path):
    """Return the path of a regular file; a fifo would wait for ever."""
    if not os.path.isfile(path):
        raise ValueError(f'there is no file {os.path.basename(path)}')
    return path


# --- checksums of a folder ---

def crc_of(path):
    """Return the CRC-32 of a file."""
    crc = 0
    with open(regular(path), 'rb') as f:
        while block := f.read(CHUNK):
            crc = zlib.crc32(block, crc)
    return crc


def write_checksums(folder, checksums):
    """Write {file name: CRC-32} beside the files of a folder."""
    with open(os.path.join(folder, CHECKSUMS), 'w', encoding='utf-8') as f:
        json.dump(checksums, f, indent=1, sort_keys=True)
        f.write('\n')


def check_checksums(folder):
    """Compare the files of a folder with their checksums; a folder from before there were any has none to compare."""
    path = os.path.join(folder, CHECKSUMS)
    if not os.path.lexists(path):
        return
    with open(regular(path), encoding='utf-8') as f:
        checksums = json.load(f)
    if not isinstance(checksums, dict) or not {METADATA, 'rest.pt'} <= set(checksums):
        raise ValueError(f'{CHECKSUMS} does not list its files')
    for name, crc in checksums.items():
        if crc_of(inside(folder, name)) != crc:
            raise ValueError(f'the checksum of {name} does not fit')


def inside(folder, name):
    """Return the path of a file directly in a folder; a name that leads elsewhere is refused."""
    if not isinstance(name, str) or name in ('', '.', '..') or os.path.basename(name) != name or '\0' in name:
        raise ValueError(f'it names a file outside the folder, {name!r}')
    return os.path.join(folder, name)


# --- .metadata ---

class Record:
    """An object of .metadata: the name of its class and what was pickled of it, which nothing has interpreted."""

    name = ''
    state = None

    def __new__(cls, *arguments):
        record = object.__new__(cls)
        record.state = arguments
        return record

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        self.state = state


class Unpickler(pickle._Unpickler):
    """Unpickle with Records for the admitted classes. In Python: the one in C fills memory where a file asks it to."""

    def find_class(self, module, name):
        if (module, name) == ('torch', 'Size'):
            return tuple
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in ADMITTED.get(module, ()):
            raise ValueError(f'{METADATA} names {module}.{name}, which no checkpoint of ours does')
        return type(name, (Record,), dict(name=name))

    def persistent_load(self, pid):
        raise ValueError(f'{METADATA} refers to another file')


def state_of(record, name, kind=dict):
    """Return the pickled fields of a Record of a class."""
    if not isinstance(record, Record) or record.name != name or not isinstance(record.state, kind):
        raise ValueError(f'{METADATA} has no {name} where one is expected')
    return record.state


def natural(value):
    """Return a whole number that is not negative."""
    if type(value) is not int or value < 0:
        raise ValueError(f'{METADATA} has a wrong number where a size or a place is expected')
    return value


def sizes_of(value):
    """Return a tuple of whole numbers: a shape, or offsets."""
    if not isinstance(value, tuple):
        raise ValueError(f'{METADATA} has no shape where one is expected')
    return tuple(natural(n) for n in value)


class Piece(NamedTuple):
    """Consecutive rows of a tensor, and the bytes of a file that hold them as a zip."""

    row: int
    shape: tuple
    file: str
    start: int
    length: int


class Layout(NamedTuple):
    """A tensor of a sharded folder: its pieces, in order, are its rows."""

    dtype: torch.dtype
    shape: tuple
    pieces: list


def read_metadata(folder):
    """Return {key: Layout} of a sharded folder's .metadata; ValueError where it is not what save_sharded writes.

    Every number is bounded by the lengths of the files: a tensor is never larger than what is there to fill it.
    """
    with open(regular(os.path.join(folder, METADATA)), 'rb') as f:
        metadata = state_of(Unpickler(io.BytesIO(f.read())).load(), 'Metadata')
    tensors = metadata.get('state_dict_metadata')
    storage = metadata.get('storage_data')
    if not isinstance(tensors, dict) or not isinstance(storage, dict):
        raise ValueError(f'{METADATA} lists no tensors')

    # Where the bytes of a piece lie, by the tensor and the first entry of the piece.
    places = {}
    for index, info in storage.items():
        index = state_of(index, 'MetadataIndex')
        info = state_of(info, '_StorageInfo')
        places[index.get('fqn'), sizes_of(index.get('offset'))] = info

    layouts = {}
    for key, entry in tensors.items():
        layouts[key] = layout_of(key, state_of(entry, 'TensorStorageMetadata'), places)
    check_lengths(folder, layouts)
    return layouts


def rows_of(shape):
    """Count the rows of a tensor of this shape; a scalar is one."""
    if not shape:
        return 1
    return shape[0]


def layout_of(key, entry, places):
    """Return the Layout of a TensorStorageMetadata's fields; its pieces must be rows that follow one another."""
    properties = state_of(entry.get('properties'), 'TensorProperties', tuple)
    dtype = None
    if properties:
        dtype = properties[0]
    shape = sizes_of(entry.get('size'))
    if not isinstance(key, str) or not isinstance(dtype, torch.dtype) or not isinstance(entry.get('chunks'), list):
        raise ValueError(f'{METADATA} has a tensor without name, type or pieces')

    # Ranks that hold nothing of a tensor have empty pieces, several at one place: nothing to read.
    pieces = []
    for chunk in entry['chunks']:
        chunk = state_of(chunk, 'ChunkStorageMetadata')
        offsets = sizes_of(chunk.get('offsets'))
        sizes = sizes_of(chunk.get('sizes'))
        if math.prod(sizes):
            pieces.append(piece_of(key, shape, offsets, sizes, places))
    pieces.sort(key=lambda piece: piece.row)

    # A gap would be filled with whatever was in memory.
    row = 0
    for piece in pieces:
        if piece.row != row:
            raise ValueError(f'the pieces of {key!r} do not follow one another')
        row += rows_of(piece.shape)
    if row != rows_of(shape) and math.prod(shape):
        raise ValueError(f'the pieces of {key!r} do not make a tensor of shape {shape}')
    return Layout(dtype, shape, pieces)


def piece_of(key, shape, offsets, sizes, places):
    """Return the Piece of one chunk, after checking that it is whole rows and that a file holds it."""
    whole_rows = len(offsets) == len(sizes) == len(shape) and sizes[1:] == shape[1:] and not any(offsets[1:])
    if not whole_rows:
        raise ValueError(f'a piece of {key!r} is no rows of a tensor of shape {shape}')
    if (key, offsets) not in places:
        raise ValueError(f'a piece of {key!r} is in no file')
    place = places[key, offsets]
    if place.get('transform_descriptors'):
        raise ValueError(f'a piece of {key!r} is compressed')
    row = offsets[0] if offsets else 0
    start = natural(place.get('offset'))
    length = natural(place.get('length'))
    return Piece(row, sizes, place.get('relative_path'), start, length)


def check_lengths(folder, layouts):
    """Compare what the pieces claim with the lengths of the files that hold them."""
    claimed = {}                                    # bytes of each file, by its pieces
    lengths = {}                                    # by the file system
    for key, layout in layouts.items():
        for piece in layout.pieces:
            if piece.file not in lengths:
                lengths[piece.file] = os.path.getsize(regular(inside(folder, piece.file)))
            if math.prod(piece.shape) * layout.dtype.itemsize > piece.length:
                raise ValueError(f'a piece of {key!r} is larger than its bytes')
            if piece.start + piece.length > lengths[piece.file]:
                raise ValueError(f'{piece.file} is shorter than {METADATA} says')
            claimed[piece.file] = claimed.get(piece.file, 0) + piece.length

    # Pieces that share bytes could multiply a small file into any amount of memory.
    for name, length in claimed.items():
        if length > lengths[name]:
            raise ValueError(f'{name} is shorter than its pieces')


def read_tensor(folder, layout):
    """Return a full tensor of a sharded folder, on the CPU."""
    tensor = torch.empty(layout.shape, dtype=layout.dtype)
    for piece in layout.pieces:
        with open(inside(folder, piece.file), 'rb') as f:
            f.seek(piece.start)
            rows = load_zip(io.BytesIO(f.read(piece.length)))
        if not torch.is_tensor(rows) or (rows.dtype, tuple(rows.shape)) != (layout.dtype, piece.shape):
            raise ValueError(f'{piece.file} holds another tensor than {METADATA} says')
        target = tensor
        if layout.shape:
            target = tensor[piece.row:piece.row + piece.shape[0]]
        target.copy_(rows)
    return tensor
