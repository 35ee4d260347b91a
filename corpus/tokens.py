"""Text to token ids, lossless: GPT-2's vocabulary, one of train_tokenizer.py, any byte-level BPE in a tokenizer.json.

Byte data has no tokenizer (None): its ids are its bytes. Memory is constant.
A folder of train_tokenizer.py holds ranks.tiktoken, a line "base64 of the piece, space, id" each, tokenizer.json with
the same ids for transformers, and meta.json.
"""
import base64
import codecs
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from configurator import UserError, require
from corpus.bins import dataset_folder, sha256_file
from corpus.documents import chunks_of

PIECE = 1 << 16                 # characters tokenised at once; a longer document is cut where the result stays the same
CUT = re.compile('[A-Za-z](?= )')
PROBE = "It's 1984,\n\n  naïve  \t日本 🙂's\r\n end 12345 "

END_OF_TEXT = '<|endoftext|>'
RANKS = 'ranks.tiktoken'
TOKENIZER_FORMAT = 'nanomdl-tokenizer-1'
TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'vocab.json', 'merges.txt', 'special_tokens_map.json')


@dataclass
class Tokenizer:
    """What prepares text: ids from strings, and what meta.json says of them."""
    name: str
    sha256: str
    file: str                   # its tokenizer.json; '' for GPT-2's
    end: int                    # id of end-of-text
    byte_lengths: np.ndarray    # (V,): bytes that an id stands for, which sum to the bytes of the text
    encode: Callable            # list of str → list of id arrays
    decode: Callable            # ids → str


def load_tokenizer(name, end_of_text=END_OF_TEXT, n_threads=0, data_dir='data'):
    """Return a tokenizer by name: None for 'byte', 'gpt2', one in data_dir/tokenizers, or the path of a tokenizer.json.

    A path may be its folder. On PROBE it must be lossless and cut where pieces_of cuts. end_of_text: its name in a
    tokenizer.json. n_threads 0: one per core.
    """
    if name == 'byte':
        return None
    path = path_of(name, data_dir)
    n_threads = n_threads or os.cpu_count() or 1
    if name == 'gpt2':
        tok = gpt2_tokenizer(n_threads)
    elif os.path.exists(os.path.join(path, RANKS)):
        tok = learned_tokenizer(path, n_threads)
    else:
        tok = json_tokenizer(path, end_of_text)
    check_tokenizer(tok, name)
    return tok


def check_tokenizer(tok, name):
    """Raise UserError where a tokenizer does not give back the bytes of PROBE, or joins what pieces_of cuts."""
    whole, *halves = tok.encode([PROBE, PROBE[:-7], PROBE[-7:]])
    n_bytes = sum(tok.byte_lengths[i] for i in whole)
    lossless = tok.decode(whole) == PROBE and n_bytes == len(PROBE.encode())
    additive = np.array_equal(whole, np.concatenate(halves))
    if not lossless:
        raise UserError(f'tokenizer {name!r} does not give back the bytes of its text, expected a byte-level BPE'
                        ' without normaliser or prefix space, such as gpt2')
    if not additive:
        raise UserError(f'tokenizer {name!r} joins a word and the space after it, expected one that splits there, such'
                        ' as gpt2')


def path_of(name, data_dir='data'):
    """Return where a tokenizer is: name itself where that exists or nothing is known of it, else in data_dir."""
    in_data = os.path.join(data_dir, 'tokenizers', name)
    if not os.path.exists(name) and os.path.isdir(in_data):
        return in_data
    return name


# --- kinds of tokenizers ---

def gpt2_encoding():
    """Return tiktoken's GPT-2 encoding; UserError says how to get its vocabulary where it is missing."""
    import tiktoken
    try:
        return tiktoken.get_encoding('gpt2')
    except (OSError, ValueError) as e:
        raise UserError(f"GPT-2's vocabulary is not here and could not be fetched ({type(e).__name__}); run once with"
                        ' network, or set TIKTOKEN_CACHE_DIR to such a folder of a machine that has it') from None


def gpt2_tokenizer(n_threads):
    """Return GPT-2's Tokenizer; its hash is of the pieces, each behind its length."""
    encoding = gpt2_encoding()
    digest = hashlib.sha256()
    for piece in pieces_by_id(encoding):
        digest.update(len(piece).to_bytes(2, 'little'))
        digest.update(piece)
    return tiktoken_tokenizer(encoding, 'gpt2', digest.hexdigest(), '', n_threads)


def learned_tokenizer(folder, n_threads):
    """Return the Tokenizer in a folder of train_tokenizer.py."""
    encoding = learned_encoding(folder)
    file = os.path.join(folder, 'tokenizer.json')
    digest = sha256_file(file)
    name = f'{encoding.name}@{digest[:8]}'                              # trained again, it is another tokenizer
    return tiktoken_tokenizer(encoding, name, digest, file, n_threads)


def learned_encoding(folder):
    """Return a tokenizer of train_tokenizer.py as a tiktoken.Encoding, checked against the hashes of its meta.json."""
    import tiktoken
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            meta = json.load(f)
        with open(os.path.join(folder, RANKS), 'rb') as f:
            ranks = {base64.b64decode(piece): int(rank) for piece, rank in map(bytes.split, f)}
        hashes = {file: sha256_file(os.path.join(folder, file)) for file in meta['sha256']}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f'{folder} is no whole tokenizer ({type(e).__name__}: {e}); train it again with'
                        ' train_tokenizer.py') from None
    require((meta.get('format') == TOKENIZER_FORMAT, f'{folder} has format {meta.get("format")!r}, this version reads'
             f' {TOKENIZER_FORMAT!r}; train it again with train_tokenizer.py'),
            (hashes == meta['sha256'], f'the files of {folder} do not have the SHA-256 of its meta.json; train it again'
             ' with train_tokenizer.py'))
    return tiktoken.Encoding(meta['name'], pat_str=meta['pattern'], mergeable_ranks=ranks,
                             special_tokens=meta['special_tokens'])


def tiktoken_tokenizer(encoding, name, sha256, file, n_threads):
    """Return a Tokenizer that encodes by tiktoken on so many threads."""
    lengths = [len(piece) for piece in pieces_by_id(encoding)]
    lengths[encoding.eot_token] = 0
    mapped = map
    if n_threads > 1:
        mapped = ThreadPoolExecutor(n_threads).map

    def encode_one(text):
        return encoding.encode_to_numpy(text, disallowed_special=())

    return Tokenizer(name, sha256, file, end=encoding.eot_token, byte_lengths=np.array(lengths),
                     encode=lambda texts: list(mapped(encode_one, texts)), decode=encoding.decode)


def pieces_by_id(encoding):
    """Return the byte string of every id of a tiktoken.Encoding."""
    return [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]


def json_tokenizer(path, end_of_text):
    """Return the Tokenizer in a tokenizer.json (or its folder) of the tokenizers library."""
    file = path
    if os.path.isdir(path):
        file = os.path.join(path, 'tokenizer.json')
    require((os.path.isfile(file), f'tokenizer = {path!r}, expected byte, gpt2, the path of a'
             ' tokenizer.json, or the --name of one that train_tokenizer.py made'))
    import tokenizers
    try:
        tok = tokenizers.Tokenizer.from_file(file)
    except Exception as e:                                              # the library raises Exception itself
        raise UserError(f'{file} is not a tokenizer.json of the tokenizers library ({e})') from None
    tok.encode_special_tokens = True                                    # "<|endoftext|>" in a text is text
    end = tok.token_to_id(end_of_text)
    require((end is not None, f'{file} has no token {end_of_text!r} to stand between documents;'
             ' name its own with --end_of_text'))

    # A byte-level BPE spells a piece with one character per byte; special ids stand for no byte.
    special = {i for i, token in tok.get_added_tokens_decoder().items() if token.special}
    n_ids = 1 + max(tok.get_vocab().values())
    lengths = [0 if i in special else len(tok.id_to_token(i) or '') for i in range(n_ids)]

    def encode(texts):
        return [np.array(e.ids) for e in tok.encode_batch_fast(texts, add_special_tokens=False)]

    return Tokenizer(os.path.basename(os.path.abspath(path)), sha256_file(file), file, end, np.array(lengths),
                     encode=encode, decode=lambda ids: tok.decode(list(ids), skip_special_tokens=False))


# --- bytes and pieces ---

def byte_spelling():
    """Return {byte: character} of GPT-2's way to print bytes as characters, which every byte-level BPE uses."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    spelling = {b: chr(b) for b in visible}
    spelling.update((b, chr(256 + i)) for i, b in enumerate(hidden))
    return spelling


def byte_strings(tok):
    """Return the byte string of every id of a tokenizers.Tokenizer, as a byte-level BPE spells them."""
    as_byte = {character: b for b, character in byte_spelling().items()}

    def spelled(token):
        if all(c in as_byte for c in token):
            return bytes(as_byte[c] for c in token)
        return token.encode()                                           # an added token stands for itself

    return [spelled(tok.id_to_token(i) or '') for i in range(tok.get_vocab_size())]


def bytes_encoder(encode, strings):
    """Return encode (str -> ids) for any bytes: what is not UTF-8 goes byte by byte, as every single byte is an id."""
    single = {s: i for i, s in reversed(list(enumerate(strings))) if len(s) == 1}

    def encode_bytes(text):
        ids = []
        while text:
            try:
                ids += encode(text.decode())
                return ids
            except UnicodeDecodeError as e:
                ids += encode(text[:e.start].decode())
                ids += [single[text[i:i + 1]] for i in range(e.start, e.end)]
                text = text[e.end:]
        return ids
    return encode_bytes


def pieces_of(chunks, label):
    """Decode a document and yield it in pieces of about PIECE characters, whose tokens join to those of the whole.

    Cut before a space that follows a letter: byte-level BPE's patterns end a word there whatever follows (checked on
    PROBE). Text without such a place for 4 PIECEs is cut anywhere: still lossless, at most a token longer (on a
    million spaces tiktoken's stack overflows, on 4 PIECEs it does not).
    """
    decoder = codecs.getincrementaldecoder('utf-8')()
    text = ''
    position = 0
    try:
        for chunk in itertools.chain(chunks, (b'',)):                   # the empty one is the end
            text += decoder.decode(chunk, final=not chunk)
            position += len(chunk)
            start = 0
            while (match := CUT.search(text, start + PIECE)) or len(text) - start > 4 * PIECE:
                cut = start + 4 * PIECE
                if match:
                    cut = match.end()
                yield text[start:cut]
                start = cut
            text = text[start:]
    except UnicodeDecodeError as e:
        raise UserError(f'{label} is not UTF-8 (byte 0x{e.object[e.start]:02x} near byte {position + e.start:,}),'
                        ' expected UTF-8 for a BPE tokenizer; convert it, or use --tokenizer=byte') from None
    if text:
        yield text


# --- tokenizers beside data and models ---

def tokenizer_meta(tok):
    """Return what meta.json says of a tokenizer, with the files that stand beside it (extras), as bins.finish takes."""
    if tok is None:
        return dict(dtype='uint8')
    extras = {'token_bytes.bin': tok.byte_lengths.astype('<u2').tobytes()}      # one per id
    file = ''
    if tok.file:
        file = 'tokenizer.json'
        extras[file] = b''.join(chunks_of(tok.file))
    said = dict(name=tok.name, sha256=tok.sha256, file=file, token_bytes='token_bytes.bin')
    n_ids = len(tok.byte_lengths)
    dtype = 'uint32'
    if n_ids <= 1 << 16:
        dtype = 'uint16'
    return dict(dtype=dtype, vocab_size=n_ids, start_id=tok.end, extras=extras, tokenizer=said)


def tokenizer_folder(checkpoint):
    """Return the folder with the tokenizer.json of a checkpoint's ids: its data set's or its origin's; '' if none.

    One of train_tokenizer.py must have the hash in its name: a data set made anew may hold other ids.
    """
    data = checkpoint['data']
    _, learned, digest = data['tokenizer'].partition('@')
    folders = []
    if data['dataset']:
        folders.append(dataset_folder(checkpoint['config'].get('data_dir', 'data'), data['dataset']))
    if data.get('tokenizer_folder'):
        folders.append(data['tokenizer_folder'])
    for folder in folders:
        file = os.path.join(folder, 'tokenizer.json')
        if os.path.exists(file) and (not learned or sha256_file(file).startswith(digest)):
            return folder
    return ''


def write_tokenizer(checkpoint, folder):
    """Put a checkpoint's tokenizer into a folder: copied, or for bytes and GPT-2's BPE built from their pieces."""
    name = checkpoint['data']['tokenizer']
    model_max_length = checkpoint['model_args']['block_size']
    source = tokenizer_folder(checkpoint)
    if source:
        for file in TOKENIZER_FILES:
            if os.path.exists(os.path.join(source, file)):
                shutil.copyfile(os.path.join(source, file), os.path.join(folder, file))
    elif name == 'byte':
        save_tokenizer(folder, [bytes([i]) for i in range(256)], model_max_length=model_max_length)
    elif name == 'gpt2':
        encoding = gpt2_encoding()
        save_tokenizer(folder, pieces_by_id(encoding), encoding.eot_token, model_max_length=model_max_length)
    else:
        print(f'no tokenizer.json of {name!r} was found, so {folder} has none; copy there the one that made the data')


def save_tokenizer(folder, pieces, end=None, **more):
    """Write tokenizer.json and tokenizer_config.json of a byte-level BPE, as transformers' AutoTokenizer loads them."""
    build_tokenizer(pieces, end).save(os.path.join(folder, 'tokenizer.json'))
    config = dict(tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False, **more)
    if end is not None:
        config.update(bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    with open(os.path.join(folder, 'tokenizer_config.json'), 'w', encoding='utf-8') as f:
        json.dump(config, f, indent=1)


def build_tokenizer(pieces, end=None):
    """Return a tokenizers.Tokenizer of a byte-level BPE from its pieces in order of rank (list of bytes, by id).

    end: id of end-of-text, which no text encodes to.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    spelling = byte_spelling()

    def spell(piece):
        return ''.join(spelling[b] for b in piece)

    ranks = {piece: i for i, piece in enumerate(pieces) if i != end}
    merges = [(spell(left), spell(right)) for left, right in merges_of(ranks)]
    vocab = {spell(piece): i for piece, i in ranks.items()}
    if end is not None:
        vocab[END_OF_TEXT] = end
    tok = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    if end is not None:
        tok.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, normalized=False)])
    return tok


def merges_of(ranks):
    """Yield the two parts that each piece of {piece: rank} was merged of, in order of rank.

    They are what joining the piece's bytes by rank leads to, both of lower rank (minbpe's recover_merges).
    """
    for piece, rank in ranks.items():
        parts = [bytes([b]) for b in piece]
        while len(parts) > 2:
            pairs = [left + right for left, right in zip(parts, parts[1:])]
            _, i = min((ranks.get(pair, rank), i) for i, pair in enumerate(pairs))
            parts[i:i + 2] = [pairs[i]]
        if len(parts) == 2:
            yield tuple(parts)
