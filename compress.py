"""Turn a trained model and a file into one archive that decodes bit for bit; or learn while coding and store no model.

    python compress.py pack out/RUN/ckpt.pt FILE [ARCHIVE]    two-part: quantised model + data; decodes on any machine
    python compress.py online FILE [ARCHIVE] [config/records/online.py]   learns while it codes; no weights, one machine
    python compress.py unpack ARCHIVE [FILE]                  both kinds; - is standard input or output
    python compress.py verify ARCHIVE FILE                    decode and compare
    python compress.py info ARCHIVE                           sections, bits per byte, bits per weight, settings

ARCHIVE is FILE.mdl, FILE is ARCHIVE without its .mdl, where none is named. What exists is replaced with --overwrite
(-f) only, and an input never. A symbolic link stays, and the file that it names is replaced; fifos and devices are
written through. What comes out is checked against the CRC-32 of each block and the SHA-256 of the whole before it gets
its name; to a pipe only checked blocks are written. Exit code 1 and one line for whatever is damaged, foreign,
impossible here, or not written to its last byte. A signal leaves no temporary file; exit code 128 + its number.
"""
import contextlib
import hashlib
import lzma
import math
import os
import shlex
import struct
import subprocess
import sys
import time
import zlib

import numpy as np

from configurator import UserError, at_least, configure, one_of, require, run

# -----------------------------------------------------------------------------
device = 'cpu'                  # 'cpu' or 'cuda': where the integer model runs; two-part archives do not depend on it
threads = 0                     # of torch; 0 = its own choice (an online archive prescribes it)
streams_at_once = 0             # streams that the model runs at a time when decoding, 0 = all; same output
verify = True                   # after pack or online, decode in a fresh process before success is reported
progress = True                 # bar and summary on standard error
overwrite = False               # replace the file that is to be written where it exists; -f for short
# pack
weight_bits = 0.0               # bits per non-zero weight to spend; 0 = whatever makes weights + data smallest, or the
                                # grid that the model was trained on (train.py --qat_bits)
streams = 0                     # texts coded side by side; 0 = as many as cost 1 % of the data, at most 256
keep = 0                        # symbols of context kept when the window is full; 0 = half the window
block_bytes = 1048576           # symbols per block: the unit of CRC, of storing and of output to a pipe
sample_rows = 96                # rows of the file that steps, scales and streams are measured on
tokenizer = ''                  # 'byte', 'gpt2' or a tokenizers JSON file; '' = what the checkpoint names
# online: the archive depends on every one of these
online_n_layer = 4
online_n_embd = 128
online_n_head = 4
online_window = 256             # bytes of context
online_block_type = 'attention' # or 'mixer', 'multihead_mixer'
online_streams = 32             # parts of the file coded side by side
online_block = 64               # bytes of each stream between two rounds of updates
online_updates = 16             # training steps after each whole block
online_rows = 4                 # windows in a training step
online_newest = 0.25            # share of them that end at the newest byte; the others end anywhere before
online_learning_rate = 2e-3     # Adam: embedding, head, gains
online_muon_rate = 0.02         # Muon: the other matrices
online_dropout = 0.0            # while training; coding never drops
online_seed = 1
state = ''                      # file to save online coding or decoding in after every segment, and to resume from
# -----------------------------------------------------------------------------

VERBS = dict(pack=(2, 3), online=(1, 2), unpack=(1, 2), verify=2, info=1)
ENDING = '.mdl'                                 # of an archive's name where none is given
MAX_STREAMS, MAX_CACHE_BYTES = 4096, 64 << 30


# --- two-part archives ---

def sample(ids, start_id, size, n_rows):
    """Return inputs and targets (N, T) of up to n_rows rows spread over ids; every target has its true predecessor."""
    size = min(size, len(ids))
    n = min(n_rows, len(ids) // size)
    starts = (np.arange(n) * ((len(ids) - size) // max(1, n - 1) if n > 1 else 0)).astype(np.int64)
    both = np.concatenate(([start_id], ids)).astype(np.int64)
    index = starts[:, None] + np.arange(size)
    return both[index], both[index + 1]


def float_bits(model, x, y):
    """Bits per position (T,) of a GPT on rows x, y (N, T), averaged over rows."""
    import torch
    import torch.nn.functional as F
    with torch.inference_mode():
        parts = [F.cross_entropy(model(a).transpose(1, 2), b, reduction='none').double().sum(0)
                 for a, b in zip(torch.from_numpy(x).split(8), torch.from_numpy(y).split(8))]
    return (sum(parts) / (math.log(2) * len(x))).numpy()


def choose_weights(model, checkpoint, ids, start_id, say):
    """Quantise a GPT for ids: returns (tensors, section bytes, sample inputs, bits per symbol at each position)."""
    from codec import weights
    args = checkpoint['model_args']
    folded = weights.fold(checkpoint['model'], args)
    broken = [n for n, w in folded.items() if not np.isfinite(w).all()]
    if broken:
        raise UserError(f'{broken[0]} of the checkpoint is not finite; use an older checkpoint')
    weights.load_folded(model, folded)
    x, y = sample(ids, start_id, args['block_size'], sample_rows)
    before = float_bits(model, x, y).mean()
    fisher = weights.fisher_information(model, x, y)
    used = np.zeros(args['vocab_size'], bool)
    used[np.append(ids, start_id)] = True
    if not args['tied']:
        folded['embed.weight'][~used] = 0       # rows that no symbol of this file ever looks up
    nonzero = sum(int(np.count_nonzero(w)) for w in folded.values())

    trained = {n: c.numpy() for n, c in (checkpoint.get('grid') or {}).items()}

    def attempt(rate):
        tensors = weights.quantise(folded, fisher, rate, trained)
        return tensors, weights.encode(tensors, args)

    def total_bits(rate):
        tensors, section = attempt(rate)
        weights.load_folded(model, weights.values(tensors))
        return 8 * len(section) + len(ids) * float_bits(model, x, y).mean()

    if weight_bits:
        tensors, section = weights.quantise_to(folded, fisher, args, weight_bits)
    else:
        rate, seen = 1 / len(ids), {}
        for step in (4, 2, 2 ** 0.5):           # walk downhill over the rate, with ever smaller steps
            while True:
                for r in (rate, rate * step, rate / step):
                    seen[r] = seen.get(r) or total_bits(r)
                best = min((rate, rate * step, rate / step), key=seen.get)
                if best == rate:
                    break
                rate = best
        tensors, section = attempt(rate)
    position_bits = float_bits(weights.load_folded(model, weights.values(tensors)), x, y)
    say(f'weights: {len(section):,} bytes, {8 * len(section) / max(nonzero, 1):.3f} bits per non-zero ({nonzero:,}); '
        f'sample {before:.4f} -> {position_bits.mean():.4f} bits per symbol')
    return tensors, section, x, position_bits


def kept_values(args):
    """Numbers per position, channel and layer that decoding keeps."""
    return 1 + max(args.get('expansion', 0), args.get('block_type', 'attention') == 'attention')


def choose_streams(n, position_bits, args, kept):
    """Streams whose starts without context cost about 1 % of n symbols' code; at most 256, and 4 GB of cache."""
    late = position_bits[min(kept, len(position_bits) // 2):].mean()
    start_bits = max(24.0, float((position_bits[:kept] - late).sum()))           # noisy; 14 measured on a 230k model
    cache = 4 * kept_values(args) * args['block_size'] * args['n_embd'] * args['n_layer']
    return max(1, min(256, int(0.01 * n * late / start_bits), (4 << 30) // cache))


def pack(checkpoint_path, path, out, say):
    """Write the two-part archive of a file under a checkpoint's model to out; returns (original, computed bytes)."""
    import torch

    from codec import exact, weights
    from codec.container import (
        CODED,
        STORED,
        TWO_PART,
        Bar,
        Lanes,
        arithmetic_hash,
        pack_strings,
        read_input,
        tokenize,
        write_archive,
    )
    from corpus.tokens import tokenizer_folder
    from model import build
    from runs import load_checkpoint
    checkpoint = load_checkpoint(checkpoint_path)
    args, data = dict(checkpoint['model_args'], dropout=0.0), checkpoint.get('data') or {}
    exact.check_covered(args)
    raw = read_input(path)
    name, start_id = tokenizer or data.get('tokenizer') or 'byte', int(data.get('start_id', 10))
    found = tokenizer or name in ('byte', 'gpt2') or os.path.isfile(name)
    own = '' if found else tokenizer_folder(checkpoint)                                # of the run's data set
    ids, strings = tokenize(raw, os.path.join(own, 'tokenizer.json') if own else name)
    if len(ids) and int(ids.max()) >= args['vocab_size']:
        raise UserError(f'the file has id {int(ids.max())}, the model {args["vocab_size"]}; use its own tokenizer')
    kept = min(keep or max(1, args['block_size'] // 2), args['block_size'])
    head = dict(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    sections, blocks, bits, any_coded = {}, [], 0.0, False
    if len(ids):
        before = torch.get_num_threads()
        torch.set_num_threads(1)                # float sums choose the steps: on one thread, whatever the machine
        tensors, sections['wght'], x, position_bits = choose_weights(build(args).eval(), checkpoint, ids, start_id, say)
        torch.set_num_threads(threads or before)
        tensors = weights.with_scales(tensors)
        sites, wide = exact.fit_sites(args, tensors, x[:16])
        model = exact.Exact(args, tensors, sites, wide, device)
        statistics = exact.observe(model, x[:16])
        say(f'integer model: {100 * statistics.n_clamped / statistics.n_rounded:.4f} % of activations clamped, '
            f'{sum(wide)} of {len(wide)} products in float64')
        n_streams = streams or choose_streams(len(ids), position_bits, args, kept)
        coded_head = dict(args=args, start_id=start_id, tokenizer=name, streams=n_streams, keep=kept, sites=sites,
                          wide=wide, arithmetic=arithmetic_hash(args))
        lanes, bar, done = Lanes(model, coded_head['streams'], kept, start_id), Bar('pack', len(raw), progress), 0
        for i in range(0, len(ids), block_bytes):
            part = ids[i:i + block_bytes]
            text = part.tobytes() if strings is None else b''.join([strings[t] for t in part])
            bar.begin(done, bits, len(text) / len(part))
            coded, block_bits, context = lanes.encode(part, bar.symbols)
            if len(coded) < len(text):
                lanes.context, any_coded = context, True
                blocks.append((CODED, len(part), coded, text))
            else:                               # the streams' contexts go on as if it were not there
                blocks.append((STORED, len(text), text, text))
                block_bits = 8 * len(text)
            bits, done = bits + block_bits, done + len(text)
        bar.show(done, bits, last=True)
    if any_coded:
        head |= coded_head
        if strings and name == 'gpt2':
            head['strings'] = hashlib.sha256(pack_strings(strings)).hexdigest()
        elif strings:
            sections['tokn'] = lzma.compress(pack_strings(strings), preset=9)
    else:
        say('no block is worth coding with this model: the file is stored as it is')
        sections.pop('wght', None)
    overhead = write_archive(out, TWO_PART, head, sections, blocks)
    return raw, overhead + bits / 8


def load_model(head, sections):
    """Build the integer model of an archive; a shape that its weights cannot fill is refused before memory is taken."""
    import torch

    from codec import exact, weights
    from codec.container import DAMAGED, arithmetic_hash
    from model import ModelConfig
    args, n_streams = head['args'], head['streams']
    ModelConfig(**args)
    small = max(args['n_layer'], args['n_embd'], args.get('expansion', 0)) < 1 << 16
    n_weights = weights.count(args) if small else math.inf
    cache = 8 * kept_values(args) * n_streams * args['block_size'] * args['n_embd'] * args['n_layer']
    if n_weights > 4096 * len(sections['wght']) + 1e6 or cache > MAX_CACHE_BYTES or not 0 < n_streams <= MAX_STREAMS:
        raise UserError(f'the header asks for {n_weights:,} weights, {cache:,} bytes of cache: more than it can need')
    if not 0 < head['keep'] <= args['block_size']:
        raise UserError(f'the header has keep = {head["keep"]}, expected 1 to {args["block_size"]}; {DAMAGED}')
    if head['arithmetic'] != arithmetic_hash(args):
        raise UserError(f'tables and coder hash to {arithmetic_hash(args)} here, to {head["arithmetic"]} where it was '
                        'packed; install the versions of requirements.txt')
    if threads:
        torch.set_num_threads(threads)
    tensors = weights.with_scales(weights.decode(sections['wght'], args))
    return exact.Exact(args, tensors, head['sites'], head['wide'], device)


def decode_blocks(head, table, sections, verb):
    """Yield the bytes of each block of a two-part archive, checked against its CRC."""
    from codec.container import DAMAGED, STORED, Bar, Lanes, byte_strings, pack_strings, unpack_strings
    strings, lanes, at, done, bar = None, None, 0, 0, Bar(verb, head['bytes'], progress)
    if 'tokn' in sections:
        strings = unpack_strings(sections['tokn'])
    elif 'strings' in head:
        strings = byte_strings(head['tokenizer'])[0]
        if hashlib.sha256(pack_strings(strings)).hexdigest() != head['strings']:
            raise UserError(f'the tokenizer {head["tokenizer"]!r} found here is not the one of the archive')
    for form, n, length, text_crc in table:
        data, at = sections['data'][at:at + length], at + length
        if form == STORED:
            text = data
        else:
            if lanes is None:
                model = load_model(head, sections)
                lanes = Lanes(model, head['streams'], head['keep'], head['start_id'], streams_at_once)
            bar.begin(done)
            tokens, lanes.context = lanes.decode(data, n, bar.symbols)
            text = tokens.astype('uint8').tobytes() if strings is None else b''.join([strings[t] for t in tokens])
        if zlib.crc32(text) != text_crc:
            raise UserError(f'a block decodes to other bytes than were packed: other arithmetic here, or {DAMAGED}')
        done += len(text)
        bar.show(done, 8 * at)
        yield text
    bar.show(done, 8 * at, last=True)


@contextlib.contextmanager
def forged_archives(path):
    """Turn whatever an archive's content makes go wrong into a UserError."""
    from codec.container import DAMAGED
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
            MemoryError, zlib.error, lzma.LZMAError, struct.error) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f'{path} holds what no packer writes ({type(e).__name__}: {str(e)[:200]}); {DAMAGED}') from None


def open_archive(path):
    """Read an archive whole: (kind, head, block table, sections), CRCs checked."""
    from codec.container import read_archive, read_input
    with forged_archives(path):
        return read_archive(read_input(path), path)


def decoded(path, opened, verb):
    """Yield the blocks of an opened archive; after the last its SHA-256 has been checked. Raises only UserError."""
    from codec.container import DAMAGED, ONLINE
    kind, head, table, sections = opened
    with forged_archives(path):
        if kind == ONLINE:
            from codec import online
            blocks = online.decode_blocks(head, table, sections, progress, state)
        else:
            blocks = decode_blocks(head, table, sections, verb)
        sha, n = hashlib.sha256(), 0
        for text in blocks:
            sha.update(text)
            n += len(text)
            yield text
        if sha.hexdigest() != head['sha256'] or n != head['bytes']:
            raise UserError(f'{path}: what was decoded has another SHA-256 than the original; {DAMAGED}')


def compare(archive_path, path):
    """Decode an archive and compare it with a file; returns the number of bytes."""
    from codec.container import read_input
    raw, n = read_input(path), 0
    for text in decoded(archive_path, open_archive(archive_path), 'verify'):
        if raw[n:n + len(text)] != text:
            raise UserError(f'{archive_path} decodes to something else than {path}, in bytes {n} to {n + len(text)}')
        n += len(text)
    if n != len(raw):
        raise UserError(f'{archive_path} decodes to {n} bytes, {path} has {len(raw)}')
    return n


def verify_in_fresh_process(out, path, raw):
    """Run `verify` on an Output that has been written, in a new interpreter.

    A temporary file without a name is the other's standard input; where that is taken by the original, which cannot be
    read again from a pipe, it is handed over open.
    """
    regular = path != '-' and os.path.isfile(path)
    source = dict(stdin=subprocess.DEVNULL) if regular else dict(input=raw)
    archive_path = out.tmp
    if not out.tmp:
        out.file.seek(0)
        number = out.file.fileno()
        archive_path = '-' if regular else f'/dev/fd/{number}'
        source |= dict(stdin=out.file) if regular else dict(pass_fds=[number])
    command = [sys.executable, os.path.abspath(__file__), 'verify', archive_path, path if regular else '-',
               f'--device={device}', f'--threads={threads}', f'--progress={progress}']
    if subprocess.run(command, **source).returncode:
        raise UserError('the archive does not decode to the file and was not kept; please report it with your machine')


def info(path):
    """Print what an archive holds."""
    from codec.container import CODED, ONLINE, Output, read_archive, read_input
    raw = read_input(path)
    kind, head, table, sections = read_archive(raw, path)
    rows = [('kind', 'online' if kind == ONLINE else 'two-part'),
            ('original', f'{head["bytes"]:,} bytes, sha256 {head["sha256"]}'),
            ('archive', f'{len(raw):,} bytes, {8 * len(raw) / max(1, head["bytes"]):.4f} bits per byte'),
            ('blocks', f'{len(table)}, {sum(b[0] == CODED for b in table)} coded by the model')]
    rows += [(f'section {n}', f'{len(s):,} bytes') for n, s in sections.items()]
    if 'wght' in sections:
        from codec import weights
        tensors = weights.decode(sections['wght'], head['args'])
        n, nonzero = sum(q.size for q, _ in tensors.values()), sum(int((q != 0).sum()) for q, _ in tensors.values())
        bits = 8 * len(sections['wght'])
        rows.append(('weights', f'{n:,}, {nonzero:,} not zero; {bits / n:.3f} bits per weight, '
                                f'{bits / max(1, nonzero):.3f} bits per non-zero'))
        rows.append(('data', f'{8 * len(sections["data"]) / head["bytes"]:.4f} bits per byte'))
    rows += [(k, v) for k, v in head.items() if k not in ('bytes', 'sha256', 'sites', 'wide')]
    if 'strings' in head:
        rows.append(('external', f'tokenizer {head["tokenizer"]}, about 1 MB, is not in the archive'))
    with Output('-', at_once=True) as out:
        out.write(''.join(f'{k:16} {v}\n' for k, v in rows).encode())
        out.commit()


def say(text):
    if progress:
        print(text, file=sys.stderr)


def summary(verb, started, n_bytes, before=''):
    seconds = time.time() - started
    say(f'{verb}: {before}{n_bytes:,} bytes, {seconds:.1f} s, {n_bytes / 1000 / seconds:.2f} kB/s')


def with_target(verb, paths):
    """Return the paths of a verb that writes, the target among them: FILE.mdl, or ARCHIVE without .mdl, by default."""
    source = paths[1] if verb == 'pack' else paths[0]
    if verb != 'unpack' and os.path.isdir(source):
        name = source if os.path.basename(os.path.normpath(source)).strip('.') else os.path.abspath(source)
        tar = shlex.quote(os.path.normpath(name) + '.tar')
        raise UserError(f'{source!r} is a folder, expected a file; make one of it: tar -cf {tar} {shlex.quote(source)}')
    if len(paths) == VERBS[verb][1]:
        return paths
    if source == '-':
        return [*paths, '-']
    if verb != 'unpack':
        return [*paths, source + ENDING]
    name = os.path.basename(source)
    if not name.endswith(ENDING) or name == ENDING:
        raise UserError(f'{source!r} does not end in {ENDING}, so name the FILE to write: unpack ARCHIVE FILE')
    return [*paths, source.removesuffix(ENDING)]


def forget_state():
    """Remove the saved state of what has been written whole."""
    if state and os.path.exists(state):
        os.remove(os.path.realpath(state))


def make_archive(verb, paths, config, started):
    """Write the archive of `pack` or `online`, the last of paths, and verify it before it gets its name."""
    from codec.container import Output
    *inputs, target = paths
    others = [tokenizer] if tokenizer else []
    with Output(target, overwrite, inputs=inputs + others) as out:
        if verb == 'pack':
            raw, computed = pack(*inputs, out, say)
        else:
            from codec import online
            raw, computed = online.encode(*inputs, out, config, state)
        summary(verb, started, len(raw), f'{out.size:,} bytes, {8 * out.size / max(1, len(raw)):.4f} bits per byte '
                                         f'(code length {computed:,.0f}) for ')
        if verify:
            verify_in_fresh_process(out, inputs[-1], raw)
            summary(verb, started, len(raw), 'verified ')
        out.commit()
    if verb == 'online' and raw:
        forget_state()


def unpack(path, target, started):
    """Write the file that an archive holds."""
    from codec.container import ONLINE, Output
    with Output(target, overwrite, at_once=True, inputs=[path]) as out:
        opened = open_archive(path)
        for text in decoded(path, opened, 'unpack'):
            out.write(text)
        out.commit()
    if opened[0] == ONLINE and out.size:
        forget_state()
    summary('unpack', started, out.size)


def main(argv=None):
    verb, paths, config = configure(globals(), argv, verbs=VERBS)
    require(one_of('device', device, ('cpu', 'cuda')), at_least('threads', threads, 0), at_least('streams', streams, 0),
            at_least('streams_at_once', streams_at_once, 0), at_least('sample_rows', sample_rows, 1),
            at_least('keep', keep, 0), at_least('weight_bits', weight_bits, 0),
            (0 < block_bytes <= 1 << 24, f'block_bytes = {block_bytes}, expected 1 to {1 << 24}'))
    from codec.container import (  # torch comes once an archive has passed its checks
        check_state,
        signals_remove_temporaries,
    )
    started = time.time()
    if verb in ('pack', 'online', 'unpack'):
        paths = with_target(verb, paths)
    if state:
        check_state(state, paths)
    with signals_remove_temporaries():
        if verb in ('pack', 'online'):
            make_archive(verb, paths, config, started)
        elif verb == 'unpack':
            unpack(*paths, started)
        elif verb == 'verify':
            summary(verb, started, compare(*paths))
        else:
            info(paths[0])
    return 0


if __name__ == '__main__':
    run(main)
