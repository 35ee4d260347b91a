"""Learn a byte-level BPE from text: data/tokenizers/NAME, the same ids in tiktoken, transformers and this project.

    python train_tokenizer.py --name=mine8k --source='texts/*.txt'                        8,000 ids of local files
    python train_tokenizer.py config/data/tokenizer_fineweb8k.py                              8,000 ids of FineWeb-Edu
    python prepare_text.py --name=mine --source='texts/*.txt' --tokenizer=mine8k          and its use

In: text as prepare_text.py reads it. Out: ranks.tiktoken (tiktoken.load.load_tiktoken_bpe), tokenizer.json and
tokenizer_config.json (transformers' AutoTokenizer), meta.json, last: settings, source, SHA-256 of the files, bytes per
token. Ids: 256 single bytes, so that any bytes have ids; the pieces in the order learned; end-of-text, which no text
encodes to. Words are cut as GPT-2 cuts them. The text is streamed; memory holds the distinct words with their counts.
The same text and settings give the same files.
"""
import base64
import hashlib
import os
import shutil
import sys
import types

from configurator import at_least, configure, require

# -----------------------------------------------------------------------------
name = ''                       # tokenizer to make, data/tokenizers/NAME
source = ''                     # file, glob (quoted; ** descends), hub id, or local folder in hub layout
vocab_size = 8000               # ids, with the 256 bytes and end-of-text
data_dir = 'data'
hub_config = ''                 # configuration of a hub data set, where it has several
text_field = 'text'             # column of a hub data set, key of a jsonl object
max_bytes = 0                   # leading bytes of text to learn from, to the end of a piece; 0: all
held_out_every = 20             # each 20th piece (a document or 65,536 characters of one) is only measured; 0: none
min_frequency = 2               # times that a pair must occur to become a piece
overwrite = False               # replace a tokenizer of this name
# -----------------------------------------------------------------------------

config = configure(globals())

from tqdm import tqdm

from corpus import tokens
from corpus.bins import sha256_file, write_json
from corpus.documents import open_source

SCRIPT = 'train_tokenizer.py'
# GPT-2's cut into words, as tiktoken writes it
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
MEASURED = 8 << 20              # bytes of learned and of held-out text, at most, that bytes per token are measured on


def check_knobs(k):
    is_new_name = k.name != '' and k.name == os.path.basename(k.name) and k.name not in ('byte', 'gpt2')
    require((is_new_name,
             f'name = {k.name!r}, expected that of a new folder of {k.data_dir}/tokenizers, such as --name=mine8k'),
            (k.source != '', "source is empty; give files, --source='texts/*.txt', or the id of a hub data set"),
            (k.vocab_size >= 257, f'vocab_size = {k.vocab_size}, expected at least 257: the 256 bytes and end-of-text'),
            (k.held_out_every == 0 or k.held_out_every >= 2, f'held_out_every = {k.held_out_every}, expected at least'
             ' 2, or 0 to learn from all'),
            at_least('max_bytes', k.max_bytes, 0), at_least('min_frequency', k.min_frequency, 1))


class Reader:
    """Iterate over the pieces of text to learn from; keep some of them, and of those held out, to measure on.

    documents: function that gives them; held_out_every, max_bytes as the knobs; label: of the progress bar.
    """

    def __init__(self, documents, held_out_every, max_bytes, label):
        self.documents = documents
        self.held_out_every = held_out_every
        self.max_bytes = max_bytes
        self.label = label
        self.digest = hashlib.sha256()
        self.n_bytes = 0
        self.n_documents = 0
        self.n_pieces = 0
        self.to_measure = dict(learned=[], held_out=[])
        self.n_to_measure = dict(learned=0, held_out=0)                 # their bytes

    def __iter__(self):
        with tqdm(unit='B', unit_scale=True, desc=self.label, disable=None, total=self.max_bytes or None) as bar:
            for label, read in self.documents():
                self.n_documents += 1
                for piece in tokens.pieces_of(read(), label):
                    raw = piece.encode()
                    use = self.use_of_next()
                    if self.n_to_measure[use] < MEASURED:
                        self.to_measure[use].append(piece)
                        self.n_to_measure[use] += len(raw)
                    self.digest.update(raw)
                    self.n_bytes += len(raw)
                    bar.update(len(raw))
                    if use == 'learned':
                        yield piece
                    if self.max_bytes and self.n_bytes >= self.max_bytes:
                        return

    def use_of_next(self):
        """Say whether the next piece is 'learned' or 'held_out', which each of a certain number is."""
        self.n_pieces += 1
        if self.held_out_every and self.n_pieces % self.held_out_every == 0:
            return 'held_out'
        return 'learned'


def learn(texts, vocab_size, min_frequency):
    """Return the pieces that BPE learns from an iterable of str, by id: 256 bytes, then merges by falling frequency."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=min_frequency, show_progress=sys.stderr.isatty(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokens.byte_strings(tok)


def save(folder, pieces, meta, to_measure):
    """Write a tokenizer's folder under a temporary name and rename it; returns its meta.json.

    meta: what meta.json says beside vocabulary and hashes. to_measure: {use: texts} to count bytes per token on.
    """
    tmp = f'{folder}.tmp'
    end = len(pieces)
    shutil.rmtree(tmp, ignore_errors=True)
    os.makedirs(tmp)
    try:
        with open(os.path.join(tmp, tokens.RANKS), 'wb') as f:
            f.writelines(base64.b64encode(piece) + b' %d\n' % i for i, piece in enumerate(pieces))
        tokens.save_tokenizer(tmp, [*pieces, tokens.END_OF_TEXT.encode()], end)
        hashes = {file: sha256_file(os.path.join(tmp, file)) for file in sorted(os.listdir(tmp))}
        meta = dict(format=tokens.TOKENIZER_FORMAT, name=meta['name'], vocab_size=end + 1, pattern=PATTERN,
                    special_tokens={tokens.END_OF_TEXT: end}, made_by=meta['made_by'], sha256=hashes,
                    source=meta['source'])
        write_json(os.path.join(tmp, 'meta.json'), meta)

        # What was written is measured as everybody will read it.
        encoding = tokens.learned_encoding(tmp)
        meta['bytes_per_token'] = {use: bytes_per_token(encoding, texts) for use, texts in to_measure.items() if texts}
        write_json(os.path.join(tmp, 'meta.json'), meta)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return meta


def bytes_per_token(encoding, texts):
    """Return how many bytes of these texts a token stands for, on average; 0 where there are no tokens."""
    n_tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    return n_bytes / n_tokens if n_tokens else 0.0


if __name__ == '__main__':
    check_knobs(types.SimpleNamespace(**config))
    folder = os.path.join(data_dir, 'tokenizers', name)
    require((overwrite or not os.path.exists(folder), f'{folder} exists; give this one another --name (or --data_dir),'
             ' or replace it with --overwrite'))

    # Learn from the text, and look at how much of it there was.
    splits = open_source(source, text_field, hub_config)
    require(('train' in splits, f'{source!r} has no split train, only {", ".join(splits)}; expected one to learn from'))
    reader = Reader(splits['train'], held_out_every, max_bytes, name)
    pieces = learn(reader, vocab_size, min_frequency)
    require((reader.n_bytes > 0, f'source {source!r} holds no text, expected at least one byte of it'))
    require((len(pieces) == vocab_size - 1, f'vocab_size = {vocab_size}, but {reader.n_bytes:,}'
             f' bytes of text fill only {len(pieces) + 1} ids (with pairs that occur at least {min_frequency} times);'
             ' give more text or a smaller --vocab_size'))

    # Write the folder whole or not at all.
    recorded_argv = [argument for argument in sys.argv[1:] if argument != '--overwrite']
    meta = save(folder, pieces, dict(
        name=name, made_by=dict(script=SCRIPT, argv=recorded_argv),
        source=dict(source=source, config=hub_config, documents=reader.n_documents, text_bytes=reader.n_bytes,
                    sha256=reader.digest.hexdigest())), reader.to_measure)

    # Say how well it compresses.
    measured = ', '.join(f'{value:.3f} on {use.replace("_", "-")} text'
                         for use, value in meta['bytes_per_token'].items())
    print(f'{folder}: {vocab_size:,} ids from {reader.n_bytes:,} bytes in {reader.n_documents:,} documents; bytes per'
          f' token: {measured}')
    if held_out_every and not reader.to_measure['held_out']:
        print(f'nothing was held out: the text has fewer than held_out_every = {held_out_every} pieces')
