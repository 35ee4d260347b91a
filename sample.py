"""Print text that a checkpoint writes after a prompt, as it comes.

    python sample.py --from_ckpt=out/sample_pmmp --prompt='The if statement '
    python sample.py --from_ckpt=out/a --prompt=FILE:notes.txt --temperature=0.7 --top_k=40 --num_samples=3
    head -c 500 book.txt | python sample.py --from_ckpt=out/a --prompt=-

In: a run folder or checkpoint file; the prompt, any bytes. Out: UTF-8 on standard output, the prompt first; bytes that
no UTF-8 text holds become U+FFFD, a character that the last token leaves unfinished is not printed. Keys and values are
cached; when the context is full, its last half is encoded anew.
"""
import codecs
import os
import sys
import time
from itertools import chain

from configurator import UserError, at_least, configure, require

# -----------------------------------------------------------------------------
from_ckpt = ''                  # run folder or checkpoint file
prompt = ''                     # text; FILE:path reads a file's bytes, - reads standard input
num_samples = 1
max_new_tokens = 500
temperature = 0.8               # 0 = always the likeliest token
top_k = 0                       # draw among the k likeliest tokens only; 0 = among all
seed = 858
tokenizer = ''                  # tokenizer.json of an own BPE; '' = the one beside the training data
device = 'auto'
dtype = 'auto'
# -----------------------------------------------------------------------------


def rules(k):
    """Return what must hold of the knobs, as require takes it."""
    return [(k.from_ckpt != '', 'from_ckpt is empty; name a checkpoint, --from_ckpt=out/RUN'),
            at_least('num_samples', k.num_samples, 1),
            *(at_least(name, vars(k)[name], 0) for name in ('max_new_tokens', 'temperature', 'top_k'))]


config = configure(globals(), rules=rules)

import torch

from codec.text import byte_strings
from corpus.tokens import bytes_encoder, tokenizer_folder
from training.checkpoint import load_model
from training.process import Env


def prompt_bytes(text):
    """Return the prompt as bytes: of a file, of standard input, or as the shell gave them."""
    if text == '-':
        return sys.stdin.buffer.read()
    if not text.startswith('FILE:'):
        return text.encode('utf-8', 'surrogateescape')
    try:
        with open(text[5:], 'rb') as f:
            return f.read()
    except OSError as e:
        raise UserError(f'cannot read the prompt {text[5:]!r} ({e.strerror}); FILE: takes the path of a file') from None


def codec(checkpoint, file=''):
    """Return (bytes -> ids, id -> bytes) of the tokenizer of a checkpoint; file: where its tokenizer.json is now."""
    name = checkpoint['data']['tokenizer']
    if name == 'byte':
        return list, lambda token: bytes((token,))
    folder = tokenizer_folder(checkpoint)
    require((name == 'gpt2' or file or folder, f"the checkpoint's tokenizer is {name!r}, and no tokenizer.json of it"
             ' was found beside its data set; name its tokenizer.json with --tokenizer=PATH'))
    if not file:
        file = name if name == 'gpt2' else os.path.join(folder, 'tokenizer.json')
    strings, encode = byte_strings(file)
    return bytes_encoder(encode, strings), strings.__getitem__


def generate(model, ids, n_tokens, temperature, top_k, generator=None, cached=True):
    """Yield n_tokens ids that follow ids (a non-empty list), drawn from model's distribution.

    temperature 0 takes the likeliest. The model sees at most block_size tokens: when they are full, their last half
    is encoded anew at positions from 0. generator: a torch.Generator on the CPU, where tokens are drawn, so that a seed
    means the same on every device up to rounding. cached False encodes the whole context for every token (a check).
    """
    device = model.embed.weight.device
    limit = model.config.block_size
    context = []                                # what the cache holds
    new = list(ids)
    cache = model.new_cache()
    for _ in range(n_tokens):
        if len(context) + len(new) > limit:
            new = (context + new)[-max(1, limit // 2):]
            context = []
            cache = model.new_cache()
        context += new
        with torch.inference_mode():
            if cached:
                logits = model(torch.tensor([new], device=device), cache=cache)                 # (1, T, V)
            else:
                logits = model(torch.tensor([context], device=device))
        token = draw(logits[0, -1].float().cpu(), temperature, top_k, generator)
        new = [token]
        yield token


def draw(logits, temperature, top_k, generator):
    """Draw an id by logits (V,): among the top_k likeliest (0: among all), temperature 0 takes the likeliest."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if not 0 < top_k < len(logits):
        return int(torch.multinomial(logits.softmax(0), 1, generator=generator))
    likeliest = logits.topk(top_k)
    place = torch.multinomial(likeliest.values.softmax(0), 1, generator=generator)
    return int(likeliest.indices[place])


def decoded(pieces):
    """Yield the text of an iterable of bytes as whole characters; an unfinished one at the end is dropped."""
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    for piece in pieces:
        text = decoder.decode(piece)
        if text:
            yield text


if __name__ == '__main__':
    prompted = prompt_bytes(prompt)
    env = Env(device, dtype)
    model, checkpoint = load_model(from_ckpt, env.device)
    model.eval()

    # The start id stands before the prompt, as it stood before the training text.
    encode, decode = codec(checkpoint, tokenizer)
    ids = [checkpoint['data']['start_id'], *encode(prompted)]
    vocab_size = model.config.vocab_size
    require((max(ids) < vocab_size, f'the prompt holds token id {max(ids)}, the vocabulary of {from_ckpt}'
             f' has {vocab_size}; use a checkpoint of the same tokenizer'))

    # Every character is pushed out as soon as it is whole.
    generator = torch.Generator().manual_seed(seed)
    screen = sys.stdout.buffer
    started = time.time()
    for i in range(num_samples):
        screen.write(b'---------------\n' if i else b'')
        tokens = generate(model, ids, max_new_tokens, temperature, top_k, generator)
        with env.autocast():
            for text in decoded(chain((prompted,), map(decode, tokens))):
                screen.write(text.encode('utf-8'))
                screen.flush()
        screen.write(b'\n')
        screen.flush()
    print(f'{num_samples * max_new_tokens / (time.time() - started):,.0f} tokens/s', file=sys.stderr)
