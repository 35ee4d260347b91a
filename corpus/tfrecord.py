"""Records of prepared TensorFlow data sets, read without TensorFlow: TFRecord files and tf.train.Example messages.

array_record files need the package array_record.
"""
import contextlib
import struct

from configurator import UserError

# --- files of records ---

def crc_table():
    """Return the CRC-32C of each single byte, by Castagnoli's polynomial with its bits reversed."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ 0x82F63B78 * (byte & 1)
        table.append(byte)
    return table


CRC = crc_table()


def masked_crc32c(data):
    """Return TFRecord's masked CRC-32C: byte by byte in Python, so for the 8 bytes of a length only."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    rotated = crc >> 15 | crc << 17
    return (rotated + 0xA282EAD8) & 0xFFFFFFFF


def tfrecords(path):
    """Yield the records of a TFRecord file: u64 length, its masked CRC, data, the data's CRC; all little-endian.

    Checked: the CRC of each length and that the file ends with a record. Not checked: the CRC of the data, which costs
    seconds per megabyte in Python; the article counts and the SHA-256 in meta.json stand behind the text.
    """
    with open(path, 'rb') as f:
        while head := f.read(12):
            is_whole = len(head) == 12 and masked_crc32c(head[:8]) == int.from_bytes(head[8:], 'little')
            if not is_whole:
                raise UserError(f'{path} is damaged or truncated: no record length at byte {f.tell() - len(head):,};'
                                ' fetch this shard again')
            length, = struct.unpack('<Q', head[:8])
            record = f.read(length)
            crc = f.read(4)
            if len(record) < length or len(crc) < 4:
                raise UserError(f'{path} is truncated in its last record; fetch this shard again')
            yield record


def array_records(path):
    """Yield the records of an array_record file."""
    from array_record.python.array_record_module import ArrayRecordReader
    try:
        reader = ArrayRecordReader(path)
        n = reader.num_records()
        for start in range(0, n, 256):
            yield from reader.read(start, min(start + 256, n))
    except (RuntimeError, ValueError, IndexError) as e:
        raise UserError(f'{path} is damaged or truncated ({e}); fetch this shard again') from None


# --- tf.train.Example, a protobuf message ---

def varint(data, i):
    """Return (value, next position) of a protobuf varint."""
    value = 0
    shift = 0
    while data[i] > 127:
        value |= (data[i] & 127) << shift
        i += 1
        shift += 7
    return value | data[i] << shift, i + 1


def fields(data, start, stop):
    """Yield (field number, (start, stop)) of the length-delimited fields of a protobuf message at data[start:stop]."""
    i = start
    while i < stop:
        key, i = varint(data, i)
        wire_type = key & 7
        if wire_type == 2:                              # a length, then so many bytes
            length, i = varint(data, i)
            yield key >> 3, (i, i + length)
            i += length
        elif wire_type == 0:                            # a varint
            _, i = varint(data, i)
        else:                                           # numbers of 64 and of 32 bits
            i += {1: 8, 5: 4}[wire_type]


def example_bytes(record, name):
    """Return the first bytes value of feature `name` of a serialised tf.train.Example.

    Example {features = 1}, Features {feature = 1: map of key = 1, value = 2}, Feature {bytes_list = 1},
    BytesList {value = 1}.
    """
    with contextlib.suppress(IndexError, KeyError):                     # a malformed record leads past its own end
        for _, features in fields(record, 0, len(record)):
            for _, entry in fields(record, *features):
                places = dict(fields(record, *entry))
                key = slice(*places[1])
                if record[key] != name:
                    continue
                _, bytes_list = next(fields(record, *places[2]))
                _, value = next(fields(record, *bytes_list))
                return record[slice(*value)]
    raise UserError(f'a record has no feature {name.decode()!r}: not Wiki-40B, or a damaged shard; fetch it again')
