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
import dataclasses
import hashlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

from configurator import UserError, at_least, configure, one_of

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
MAX_BLOCK_BYTES = 1 << 24


def rules(k):
    """Return what must hold of the knobs, as require takes it."""
    return (one_of('device', k.device, ('cpu', 'cuda')), at_least('threads', k.threads, 0),
            at_least('streams', k.streams, 0), at_least('streams_at_once', k.streams_at_once, 0),
            at_least('sample_rows', k.sample_rows, 1), at_least('keep', k.keep, 0),
            at_least('weight_bits', k.weight_bits, 0),
            (0 < k.block_bytes <= MAX_BLOCK_BYTES, f'block_bytes = {k.block_bytes}, expected 1 to {MAX_BLOCK_BYTES}'))


verb, paths, config = configure(globals(), verbs=VERBS, rules=rules)

from codec.container import (
    CODED,
    DAMAGED,
    ONLINE,
    TWO_PART,
    forged_archives,
    open_archive,
    read_archive,
    read_input,
)
from codec.output import Output, check_state, signals_remove_temporaries
from codec.progress import say

ENDING = '.mdl'                                 # of an archive's name where none is given


def knobs_for(settings_class, k, prefix=''):
    """Make a dataclass of settings from the knobs that have the names of its fields, after a prefix."""
    names = [field.name for field in dataclasses.fields(settings_class)]
    return settings_class(**{name: getattr(k, prefix + name) for name in names})


# --- kinds of archive ---
# What needs torch is imported in here: when an archive has passed its checks, or a target has been found good.

def write_two_part(inputs, out, k):
    """Write the archive of [checkpoint, file] to an Output; returns (original, computed bytes)."""
    from codec import twopart
    return twopart.pack(*inputs, out, knobs_for(twopart.Packing, k))


def decode_two_part(archive, verb, k):
    """Yield the text of each block."""
    from codec import twopart
    return twopart.decode_blocks(archive, verb, knobs_for(twopart.Unpacking, k))


def write_online(inputs, out, k):
    """Write the archive of [file] to an Output; returns (original, computed bytes)."""
    from codec import online
    return online.encode(*inputs, out, knobs_for(online.Knobs, k, 'online_'), k.device, k.state, k.progress)


def decode_online(archive, verb, k):
    """Yield the text of all blocks at once."""
    from codec import online
    return online.decode_blocks(archive, verb, k.state, k.progress)


@dataclasses.dataclass
class Kind:
    """A kind of archive: its name, what writes and what decodes it, and whether that can be resumed from --state."""
    name: str
    write: Callable
    decode: Callable
    has_state: bool = False


KINDS = {TWO_PART: Kind('two-part', write_two_part, decode_two_part),
         ONLINE: Kind('online', write_online, decode_online, has_state=True)}
WRITERS = dict(pack=TWO_PART, online=ONLINE)    # {verb: the kind of archive that it writes}


# --- names of files ---

def with_target(verb, paths):
    """Return the paths of a verb that writes, the target among them: FILE.mdl, or ARCHIVE without .mdl, by default."""
    source = paths[0]
    if verb == 'pack':
        source = paths[1]
    if verb != 'unpack' and os.path.isdir(source):
        raise UserError(f'{source!r} is a folder, expected a file; make one of it: {tar_command(source)}')
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


def tar_command(folder):
    """Return the command that makes a file of a folder, which may be named by dots alone."""
    named = os.path.basename(os.path.normpath(folder)).strip('.')
    name = folder if named else os.path.abspath(folder)
    return f"tar -cf {shlex.quote(os.path.normpath(name) + '.tar')} {shlex.quote(folder)}"


# --- verbs ---

def make_archive(verb, paths, k):
    """Write the archive of `pack` or `online`, the last of paths, and verify it before it gets its name."""
    started = time.time()
    kind = KINDS[WRITERS[verb]]
    *inputs, target = paths
    others = [k.tokenizer] if k.tokenizer else []
    with Output(target, k.overwrite, inputs=inputs + others) as out:
        original, computed = kind.write(inputs, out, k)
        bits_per_byte = 8 * out.size / max(1, len(original))
        size = f'{out.size:,} bytes, {bits_per_byte:.4f} bits per byte (code length {computed:,.0f}) for '
        summarise(verb, started, len(original), k, size)
        if k.verify:
            verify_in_fresh_process(out, inputs[-1], original, k)
            summarise(verb, started, len(original), k, 'verified ')
        out.commit()
    if kind.has_state and original:
        forget_state(k)


def unpack(path, target, k):
    """Write the file that an archive holds."""
    started = time.time()
    with Output(target, k.overwrite, at_once=True, inputs=[path]) as out:
        archive = open_archive(path)
        for text in decoded(path, archive, 'unpack', k):
            out.write(text)
        out.commit()
    if KINDS[archive.kind].has_state and out.size:
        forget_state(k)
    summarise('unpack', started, out.size, k)


def compare(archive_path, path, k):
    """Decode an archive and compare it with a file."""
    started = time.time()
    original = read_input(path)
    n = 0
    for text in decoded(archive_path, open_archive(archive_path), 'verify', k):
        if original[n:n + len(text)] != text:
            raise UserError(f'{archive_path} decodes to something else than {path}, in bytes {n} to {n + len(text)}')
        n += len(text)
    if n != len(original):
        raise UserError(f'{archive_path} decodes to {n} bytes, {path} has {len(original)}')
    summarise('verify', started, n, k)


def info(path):
    """Print what an archive holds."""
    raw = read_input(path)
    with forged_archives(path):
        rows = facts_of(raw, read_archive(raw, path))
    with Output('-', at_once=True) as out:
        out.write(''.join(f'{name:16} {value}\n' for name, value in rows).encode())
        out.commit()


# --- what the verbs share ---

def decoded(path, archive, verb, k):
    """Yield the blocks of an opened archive; after the last its SHA-256 has been checked. Raises only UserError."""
    with forged_archives(path):
        sha = hashlib.sha256()
        n = 0
        for text in KINDS[archive.kind].decode(archive, verb, k):
            sha.update(text)
            n += len(text)
            yield text
        if sha.hexdigest() != archive.head['sha256'] or n != archive.head['bytes']:
            raise UserError(f'{path}: what was decoded has another SHA-256 than the original; {DAMAGED}')


def verify_in_fresh_process(out, path, original, k):
    """Run `verify` on an Output that has been written, in a new interpreter.

    A temporary file without a name is the other's standard input; where that is taken by the original, which cannot be
    read again from a pipe, it is handed over open.
    """
    regular = path != '-' and os.path.isfile(path)
    source = dict(stdin=subprocess.DEVNULL) if regular else dict(input=original)
    archive_path = out.tmp
    if not out.tmp:
        out.file.seek(0)
        number = out.file.fileno()
        if regular:
            archive_path = '-'
            source['stdin'] = out.file
        else:
            archive_path = f'/dev/fd/{number}'
            source['pass_fds'] = [number]
    original_path = '-'
    if regular:
        original_path = path
    command = [sys.executable, os.path.abspath(__file__), 'verify', archive_path, original_path,
               f'--device={k.device}', f'--threads={k.threads}', f'--progress={k.progress}']
    if subprocess.run(command, **source).returncode:
        raise UserError('the archive does not decode to the file and was not kept; please report it with your machine')


def facts_of(raw, archive):
    """Return what is known of an archive, of bytes raw, as [(name, value)]."""
    kind, head, table, sections = archive
    n_coded = sum(entry.form == CODED for entry in table)
    rows = [('kind', KINDS[kind].name),
            ('original', f'{head["bytes"]:,} bytes, sha256 {head["sha256"]}'),
            ('archive', f'{len(raw):,} bytes, {8 * len(raw) / max(1, head["bytes"]):.4f} bits per byte'),
            ('blocks', f'{len(table)}, {n_coded} coded by the model')]
    rows += [(f'section {name}', f'{len(section):,} bytes') for name, section in sections.items()]
    if 'wght' in sections:
        rows.append(('weights', weights_in_words(sections['wght'], head['args'])))
        rows.append(('data', f'{8 * len(sections["data"]) / head["bytes"]:.4f} bits per byte'))
    rows += [(name, value) for name, value in head.items() if name not in ('bytes', 'sha256', 'sites', 'wide')]
    if 'strings' in head:
        rows.append(('external', f'tokenizer {head["tokenizer"]}, about 1 MB, is not in the archive'))
    return rows


def weights_in_words(section, args):
    """Say what a wght section of a model's args holds."""
    from codec import weights
    tensors = weights.decode(section, args)
    n = sum(q.size for q, _ in tensors.values())
    n_nonzero = sum(int((q != 0).sum()) for q, _ in tensors.values())
    bits = 8 * len(section)
    return (f'{n:,}, {n_nonzero:,} not zero; {bits / n:.3f} bits per weight, '
            f'{bits / max(1, n_nonzero):.3f} bits per non-zero')


def summarise(verb, started, n_bytes, k, before=''):
    """Say what a verb has done with n_bytes, in how long."""
    seconds = time.time() - started
    say(f'{verb}: {before}{n_bytes:,} bytes, {seconds:.1f} s, {n_bytes / 1000 / seconds:.2f} kB/s', k.progress)


def forget_state(k):
    """Remove the saved state of what has been written whole."""
    if k.state and os.path.exists(k.state):
        os.remove(os.path.realpath(k.state))


if __name__ == '__main__':
    k = SimpleNamespace(**config)

    # What must not be written over, or cannot be written, is found before anything is read.
    if verb in WRITERS or verb == 'unpack':
        paths = with_target(verb, paths)
    if state:
        check_state(state, paths)

    # From here on there may be temporary files, which a signal removes.
    with signals_remove_temporaries():
        if verb in WRITERS:
            make_archive(verb, paths, k)
        elif verb == 'unpack':
            unpack(*paths, k)
        elif verb == 'verify':
            compare(*paths, k)
        else:
            info(*paths)
