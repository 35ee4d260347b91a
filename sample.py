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

from configurator import UserError, at_least, configure, require, run

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
    from codec.text import byte_strings
    from corpus.tokens import bytes_encoder, tokenizer_folder
    folder = tokenizer_folder(checkpoint)
    require((name == 'gpt2' or file or folder, f"the checkpoint's tokenizer is {name!r}, and no tokenizer.json of it"
             ' was found beside its data set; name its tokenizer.json with --tokenizer=PATH'))
    strings, encode = byte_strings(file or (name if name == 'gpt2' else os.path.join(folder, 'tokenizer.json')))
    return bytes_encoder(encode, strings), strings.__getitem__


def generate(model, ids, n_tokens, temperature, top_k, generator=None, cached=True):
    """Yield n_tokens ids that follow ids (a non-empty list), drawn from model's distribution.

    temperature 0 takes the likeliest. The model sees at most block_size tokens: when they are full, their last half
    is encoded anew at positions from 0. generator: a torch.Generator on the CPU, where tokens are drawn, so that a seed
    means the same on every device up to rounding. cached False encodes the whole context for every token (a check).
    """
    import torch
    device, limit = model.embed.weight.device, model.config.block_size
    context, new, cache = [], list(ids), model.new_cache()
    for _ in range(n_tokens):
        if len(context) + len(new) > limit:
            context, new, cache = [], (context + new)[-max(1, limit // 2):], model.new_cache()
        context += new
        x = torch.tensor([new if cached else context], device=device)                                   # (1, T)
        with torch.inference_mode():
            logits = model(x, cache=cache if cached else None)[0, -1].float().cpu()                     # (V,)
        if temperature == 0:
            token = int(logits.argmax())
        else:
            logits = logits / temperature
            if 0 < top_k < len(logits):
                kept = logits.topk(top_k)
                token = int(kept.indices[torch.multinomial(kept.values.softmax(0), 1, generator=generator)])
            else:
                token = int(torch.multinomial(logits.softmax(0), 1, generator=generator))
        new = [token]
        yield token


def decoded(pieces):
    """Yield the text of an iterable of bytes as whole characters; an unfinished one at the end is dropped."""
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    for piece in pieces:
        text = decoder.decode(piece)
        if text:
            yield text


def main(argv=None):
    configure(globals(), argv)
    require((from_ckpt != '', 'from_ckpt is empty; name a checkpoint, --from_ckpt=out/RUN'),
            at_least('num_samples', num_samples, 1),
            *(at_least(k, globals()[k], 0) for k in ('max_new_tokens', 'temperature', 'top_k')))
    text = prompt_bytes(prompt)
    import torch

    import runs
    env = runs.Env(device, dtype)
    model, checkpoint = runs.load_model(from_ckpt, env.device)
    model.eval()
    encode, decode = codec(checkpoint, tokenizer)
    ids = [checkpoint['data']['start_id'], *encode(text)]
    require((max(ids) < model.config.vocab_size, f'the prompt holds token id {max(ids)}, the vocabulary of {from_ckpt}'
             f' has {model.config.vocab_size}; use a checkpoint of the same tokenizer'))
    generator, started, screen = torch.Generator().manual_seed(seed), time.time(), sys.stdout.buffer
    for i in range(num_samples):
        screen.write(b'---------------\n' if i else b'')
        tokens = generate(model, ids, max_new_tokens, temperature, top_k, generator)
        with env.autocast():
            for part in decoded(chain((text,), map(decode, tokens))):
                screen.write(part.encode('utf-8'))
                screen.flush()
        screen.write(b'\n')
        screen.flush()
    print(f'{num_samples * max_new_tokens / (time.time() - started):,.0f} tokens/s', file=sys.stderr)
    return 0


if __name__ == '__main__':
    run(main)
