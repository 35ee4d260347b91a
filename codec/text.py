"""The text of an archive as ids, and the byte strings of ids, by which it decodes without its tokenizer."""
import lzma
import struct

import numpy as np

from configurator import UserError
from corpus import tokens

MAX_STRINGS = 1 << 26                           # bytes that all byte strings of an archive may take
LZMA_MEMORY = 1 << 28


def byte_strings(name):
    """Return (byte string of every id, encode: str -> ids) of a tokenizer: 'gpt2', or a tokenizers JSON file."""
    if name == 'gpt2':
        encoding = tokens.gpt2_encoding()
        strings = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
        return strings, lambda text: encoding.encode(text, disallowed_special=())
    try:
        from tokenizers import Tokenizer
        tokenizer = Tokenizer.from_file(name)
    except Exception as e:
        raise UserError(f'cannot load the tokenizer {name!r} ({e}); name its JSON file with --tokenizer=PATH') from None
    tokenizer.encode_special_tokens = True                              # "<|endoftext|>" in a text is text
    return tokens.byte_strings(tokenizer), lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def tokenize(raw, name):
    """Return (ids, byte strings or None) of a file's bytes; refuse text that the tokenizer does not reproduce."""
    if name == 'byte':
        return np.frombuffer(raw, np.uint8), None
    strings, encode = byte_strings(name)
    try:
        ids = np.array(encode(raw.decode()), np.int32)
    except UnicodeDecodeError as e:
        raise UserError(f'the file is not UTF-8 (byte {e.start}), as {name!r} needs; use a byte model') from None
    if text_of(ids, strings) != raw:
        raise UserError(f'the tokenizer {name!r} does not reproduce this file; use a byte model')
    return ids, strings


def text_of(ids, strings):
    """Return the bytes that ids (n,) stand for; strings None: each is a byte."""
    if strings is None:
        return ids.astype(np.uint8).tobytes()
    return b''.join([strings[i] for i in ids])


def pack_strings(strings):
    """Return byte strings as one, each with its length before it."""
    return b''.join(struct.pack('<H', len(s)) + s for s in strings)


def unpack_strings(data):
    """Return the byte strings of a tokn section, which is pack_strings' result under LZMA."""
    raw = lzma.LZMADecompressor(memlimit=LZMA_MEMORY).decompress(data, MAX_STRINGS)
    strings = []
    at = 0
    while at < len(raw):
        length, = struct.unpack_from('<H', raw, at)
        at += 2
        strings.append(raw[at:at + length])
        at += length
    return strings
