"""Evaluate checkpoints on data sets: loss, bits per byte, accuracy, description lengths, and compressors beside them.

    python eval.py --from_ckpt=out/sample_pmmp                                  the run's own data set, test split
    python eval.py --from_ckpt=out/a,out/b --dataset=sample,mine --baselines    2 checkpoints x 2 sets, and xz & co.
    python eval.py --from_ckpt=out/a --description_length                       the training split too: two-part lengths
    python eval.py --from_ckpt=out/a --minimal_context_window=192               every byte sees at least 192 before it
    python eval.py --from_ckpt=out/a --pairs=c4meta             the same targets with and without metadata
    python eval.py --from_ckpt=out/a --metrics=ce,hamming,information,random_tokens
    python eval.py --from_ckpt=gpt2,out/b --dataset=wikitext103 --stride=512    a hub id; rows overlap by half

In: run folders, checkpoint files, Hugging Face folders or hub ids; data sets. Out: one table, and
out/eval-HASH/{run.json, table.md, table.csv}; HASH is of the knobs, checkpoints and data, so the same evaluation lands
in the same folder. Each token is scored once.
Totals are two-part code lengths, model bytes + data bytes, by what a weight costs: raw, 4 bytes each; nnz4, 4 bytes per
non-zero without its index (published figures do this; nothing decodes it); bits_est, the entropy of the 8-bit tensors.
archive_bytes is the size of a file that decodes, model included. online_bytes is the code length of the first pass of
training, each batch coded before its update: no model to send. Compressors' own programs are not counted.
hamming is the share of tokens guessed right (accuracy), information 1 - H/ln V of a loss of H nats per token;
random_tokens scores uniformly random ids too, of which a model that does not peek knows nothing.
embedding_nats is what the vector costs that a decoder is given beside its loss, per token; it is in no other column.
loss_low and loss_high are a 95 % bootstrap interval over documents; interval_over in the csv says of what.
"""
import hashlib
import itertools
import math
import os
import shutil
import subprocess
import tempfile
import time

from configurator import UserError, at_least, configure, one_of, require, run

# -----------------------------------------------------------------------------
from_ckpt = ''                  # run folders, files, Hugging Face folders, hub ids, by commas; '' = compressors only
data_dir = 'data'
dataset = ''                    # data sets, comma-separated; '' = each checkpoint's own
split = 'test'                  # splits, comma-separated
max_tokens = 0                  # leading tokens of each split; 0 = the whole split
pairs = ''                      # sets of prepare_metadata.py, by commas: the same targets with and without metadata
verify = False                  # check the SHA-256 of the data first
block_size = 0                  # tokens a row scores; 0 = the checkpoint's own
batch_size = 0                  # rows per forward on each rank; 0 = about 16,384 tokens, 4,096 without GPU
metrics = 'ce,ppl,bpb,hamming'  # columns: ce, ppl, bpb, hamming, information; random_tokens: again on random ids
random_seed = 0                 # of these ids
embedding_bits = 16             # of each number of the vector that a decoder is given, for embedding_nats
stride = 0                      # tokens a row advances and scores, the others are context; 0 = blocks side by side
minimal_context_window = 0      # tokens that every scored one sees before it, where they exist; 0 = as stride says
first_token = 'score'           # 'score', or 'skip': a block's first token is input only, as in published GPT-2 figures
description_length = False      # score the training split too
archive = ''                    # files packed with the checkpoints, comma-separated, one each; '' = none
online_archives = ''            # files made by compress.py online, comma-separated: a row each; '' = none
bootstrap = 1000                # resamples of documents for the 95 % interval of the loss; 0 = none
baselines = False               # compressors on the same bytes
baseline_timeout = 600.0        # seconds for each external compressor
out = 'out'                     # where eval-HASH goes
overwrite = False               # score again what eval-HASH holds already from the same commit
device = 'auto'
dtype = 'auto'                  # 'float32' for the last digit; 'auto' is bfloat16 where the GPU has it
# -----------------------------------------------------------------------------

METRICS = dict(ce='loss_nats embedding_nats loss_low loss_high', bpb='bits_per_byte',
               ppl='perplexity perplexity_per_word', hamming='accuracy', information='information',
               random_tokens='random_loss_nats random_perplexity random_accuracy random_information')
SHOWN = (f'run data tokens {" ".join(METRICS.values())} '
         'data_bytes raw_total_bytes nnz4_total_bytes bits_est_total_bytes archive_bytes online_bytes seconds').split()
SHOWN_PAIRS = ('run data type pieces documents tokens with_nats without_nats difference_nats difference_low '
               'difference_high with_bits_per_byte without_bits_per_byte with_perplexity without_perplexity true_wins '
               'seconds').split()
PIECE = 1 << 20                 # bytes given to a compressor at a time


def listed(text):
    return [part.strip() for part in text.split(',') if part.strip()]


# --- compressors ---

class Brotli:
    """Give brotli's compressor the method names of the others."""

    def __init__(self, brotli):
        stream = brotli.Compressor(quality=11, lgwin=24)
        self.compress, self.flush = stream.process, stream.finish


def streams():
    """Return {name: make}; make(n_bytes) gives a fresh compressor object with compress(bytes) and flush()."""
    import bz2
    import lzma
    import zlib

    def xz(n):
        """Make an xz -9e whose dictionary is no larger than the text: clearing 64 MiB for each block took 40 ms."""
        size = min(max(n, 4096), 64 << 20)
        return lzma.LZMACompressor(filters=[dict(id=lzma.FILTER_LZMA2, preset=9 | lzma.PRESET_EXTREME, dict_size=size)])

    found = {'gzip -9': lambda n: zlib.compressobj(9, zlib.DEFLATED, 31), 'bzip2 -9': lambda n: bz2.BZ2Compressor(9),
             'xz -9e': xz}
    try:
        import zstandard as zstd

        def long_range(n):
            options = zstd.ZstdCompressionParameters.from_level(22, source_size=n, window_log=27, enable_ldm=True)
            return zstd.ZstdCompressor(compression_params=options).compressobj(size=n)

        found['zstd -19'] = lambda n: zstd.ZstdCompressor(level=19).compressobj(size=n)
        found['zstd --ultra -22 --long=27'] = long_range
    except ImportError:
        pass
    try:
        import brotli
        found['brotli -q 11'] = lambda n: Brotli(brotli)
    except ImportError:
        pass
    return found


def tools(n_bytes):
    """Return {name: command} of the external compressors on PATH; FILE and OUT in a command stand for the paths."""
    block_mib = min(511, max(1, -(-n_bytes >> 20)))                     # bzip3: one block if it can hold the file
    known = (('bzip3', ('bzip3',), f'-e -b {block_mib} FILE OUT'),
             ('7z PPMd', ('7zz', '7z', '7za'), 'a -bd -y -mx=9 -m0=PPMd OUT.7z FILE'),
             ('zpaq -m5', ('zpaq',), 'add OUT.zpaq FILE -m5'))
    here = ((name, next(filter(None, map(shutil.which, programs)), ''), rest) for name, programs, rest in known)
    return {name: [path, *rest.split()] for name, path, rest in here if path}


def stream_bytes(make, data, block=0, progress=''):
    """Return the compressed size of a byte array: whole, or the sum over pieces of `block` bytes, each on its own."""
    from tqdm import tqdm
    step, total, stream = block or PIECE, 0, None
    for i in tqdm(range(0, max(len(data), 1), step), progress, leave=False, disable=not progress):
        piece = data[i:i + step].tobytes()
        stream = stream or make(len(piece) if block else len(data))
        total += len(stream.compress(piece))
        if block or i + step >= len(data):
            total += len(stream.flush())
            stream = None
    return total


def tool_bytes(command, data, timeout):
    """Return the size of what an external compressor makes of a byte array; UserError if it fails or takes too long."""
    with tempfile.TemporaryDirectory() as folder:
        source, packed = os.path.join(folder, 'text'), os.path.join(folder, 'packed')
        with open(source, 'wb') as f:
            for i in range(0, len(data), PIECE):
                f.write(data[i:i + PIECE].tobytes())
        command = [command[0], *(part.replace('OUT', packed).replace('FILE', source) for part in command[1:])]
        try:
            subprocess.run(command, check=True, timeout=timeout, capture_output=True, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise UserError(f'stopped after {timeout:g} s; give it more with --baseline_timeout=') from None
        except (OSError, subprocess.CalledProcessError) as e:
            raise UserError(f'failed: {e}') from None
        made = [os.path.join(folder, name) for name in os.listdir(folder) if name.startswith('packed')]
        if not made:
            raise UserError('ended well but left no output')
        return os.path.getsize(made[0])


def baseline_rows(data, blocks):
    """Run every compressor on one byte-level split, the whole file, then per block of each size; yield table rows."""
    n = data.n_tokens
    jobs = [(name, 0, lambda make=make, name=name: stream_bytes(make, data.tokens, 0, name))
            for name, make in streams().items()]
    jobs += [(name, 0, lambda command=command: tool_bytes(command, data.tokens, baseline_timeout))
             for name, command in tools(n).items()]
    jobs += [(f'{name}, each {block} bytes alone', block,
              lambda make=make, name=name, block=block: stream_bytes(make, data.tokens, block, f'{name}, per block'))
             for block in blocks for name, make in streams().items()]
    for name, block, job in jobs:
        started = time.time()
        try:
            size = job()
        except UserError as e:
            print(f'{name} on {data.name}/{data.split}: {e}')
            continue
        row = dict(run=name, data=f'{data.name}/{data.split}', dataset=data.name, split=data.split, tokens=n,
                   text_bytes=n, data_bytes=size, bits_per_byte=8 * size / max(n, 1),
                   seconds=round(time.time() - started, 2))
        yield dict(row, per_block=block) if block else dict(row, archive_bytes=size)


# --- models ---

def name_of(path):
    """Short name of a checkpoint: its run folder's, with the file's where that is not ckpt.pt."""
    folder, file = (path, 'ckpt.pt') if os.path.isdir(path) else os.path.split(path)
    folder = os.path.basename(os.path.abspath(folder))
    return folder if file == 'ckpt.pt' else f'{folder}/{file.removesuffix(".pt")}'


def context_of(length):
    """Tokens that every scored one sees before it in rows of a length; length - stride + 1 with windows by stride."""
    return length - stride + 1 if stride else minimal_context_window


def own_sets(checkpoint):
    """Names of the data sets that a checkpoint was trained on: the sources of a mixture, none where it does not say."""
    from corpus.mixture import parse_mix
    return list(parse_mix(checkpoint['data']['dataset'])) if checkpoint['data']['dataset'] else []


def check_fit(path, checkpoint, data, length=0):
    """Raise UserError where a checkpoint cannot score a data set under these knobs."""
    tokenizer, args = checkpoint['data']['tokenizer'], checkpoint['model_args']
    length, longest = length or block_size or args['block_size'], args['block_size']
    require((tokenizer == data.tokenizer and data.vocab_size <= args['vocab_size'],
             f"{path} reads {tokenizer!r} tokens with a vocabulary of {args['vocab_size']}, data set {data.name!r}"
             f' holds {data.tokenizer!r} tokens with {data.vocab_size}; prepare the text with the tokenizer of the'
             ' checkpoint'),
            (length <= longest, f'rows have {length} tokens, {path} was built for at most {longest}'),
            (stride <= length, f'stride = {stride}, expected at most {length}, the rows of {path}'),
            (minimal_context_window <= length,
             f'minimal_context_window = {minimal_context_window}, expected at most {length}, the rows of {path}'),
            (first_token == 'score' or length > 1, 'first_token = skip needs a block_size of at least 2'))


def read_archive_facts(path):
    """Return what an archive on disk is: its path, its size, and the size and SHA-256 of the text that it holds."""
    from codec.container import read_archive
    with open(path, 'rb') as f:
        head = read_archive(f.read(), path)[1]
    return dict(path=path, size=os.path.getsize(path), text_bytes=head['bytes'], sha256=head['sha256'])


def holds(packed, data):
    """Say whether an archive is of the very text of a split; ids have another hash than their text, there sizes do."""
    if data.tokenizer == 'byte':
        return packed['text_bytes'] == data.n_tokens and packed['sha256'] == hashlib.sha256(data.tokens).hexdigest()
    return packed['text_bytes'] == data.text_bytes


def known_bytes(path, data, own, packed):
    """Return what is known beside the losses: the size of an archive of this very text, the run's online length."""
    import runs
    facts, found = runs.read_run(path if os.path.isdir(path) else os.path.dirname(path) or '.'), {}
    if packed:
        if holds(packed, data):
            found['archive_bytes'] = packed['size']
        else:
            print(f'{packed["path"]} holds another text than {data.name}/{data.split}: left out of its row')
    if own and data.split == 'train' and facts.get('online_description_length_bytes') and not max_tokens:
        found['online_bytes'] = facts['online_description_length_bytes']
    return found


def model_rows(path, bins, packed, env):
    """Score one checkpoint on every data set of bins {(set, split): Bin} that is meant for it; yield table rows."""
    import runs
    import score
    import sparse
    from corpus.objectives import with_objective
    model, checkpoint = runs.load_model(path, env.device)
    sizes, length = sparse.model_sizes(model.parameters()), block_size or model.config.block_size
    for (name, part), data in bins.items():
        own = name in own_sets(checkpoint)
        if not (own or dataset):
            continue
        raw, objective = data, (checkpoint['config'].get('objective', 'clm'), model.config.wrapper)
        data = with_objective(raw, *objective)
        started, units = time.time(), score.Units(data) if bootstrap else None
        found = score.evaluate(model, data, length, batch_size or score.rows_per_forward(length), env,
                               context_of(length), progress=f'{name_of(path)} on {name}/{part}',
                               skip_first=first_token == 'skip', units=units)
        found.update(units.interval(bootstrap, env) if units else {})
        if 'random_tokens' in listed(metrics):
            chance = score.evaluate(model, with_objective(score.random_like(raw, random_seed), *objective), length,
                                    batch_size or score.rows_per_forward(length), env, context_of(length),
                                    skip_first=first_token == 'skip')
            found.update({key: chance[key.removeprefix('random_')] for key in METRICS['random_tokens'].split()})
        if words := data.count_words() * found['tokens'] / max(data.n_tokens, 1):
            found['perplexity_per_word'] = math.exp(min(found['loss_nats'] * found['tokens'] / words, 700))
        found['data_bytes'] = round(found['data_bytes'])
        c = model.config
        if c.wrapper == 'autoencoder' or c.wrapper == 'oracle' and c.memory != 'none':
            found['embedding_nats'] = score.embedding_nats(c.bottleneck or c.n_embd, embedding_bits, length)
        totals = {f'{form}_total_bytes': found['data_bytes'] + sizes[f'{form}_bytes']
                  for form in ('raw', 'nnz4', 'bits_est')}
        yield dict(run=name_of(path), data=f'{name}/{part}', dataset=name, split=part, from_ckpt=path,
                   sha256=data.sha256, seq_length=length, **found, **sizes, **totals,
                   **known_bytes(path, data, own, packed), seconds=round(time.time() - started, 2))


def pair_rows(path, sets, env):
    """Score one checkpoint on the paired rows of sets {name: {type: arms}}; yield a row per type, pieces and set."""
    import pairs as paired
    import runs
    import score
    model, _ = runs.load_model(path, env.device)
    for name, types in sets.items():
        for t, arms in types.items():
            started, length = time.time(), arms['with'].row_length
            for found in paired.evaluate(model, arms, batch_size or score.rows_per_forward(length), env, bootstrap,
                                         progress=f'{name_of(path)} on {name}, {t}'):
                yield dict(run=name_of(path), data=name, type=t, from_ckpt=path, seq_length=length, **found,
                           seconds=round(time.time() - started, 2))


def main(argv=None):
    config = configure(globals(), argv)
    config.pop('overwrite')
    paths, sets, splits, archives = listed(from_ckpt), listed(dataset), listed(split), listed(archive)
    online = listed(online_archives)
    splits += ['train'] if description_length and 'train' not in splits else []
    require((paths or baselines and sets, 'from_ckpt is empty; name a checkpoint, --from_ckpt=out/RUN, or --baselines'
             ' with a --dataset'), (splits, 'split is empty; write --split=test'),
            one_of('first_token', first_token, ('score', 'skip')), (listed(metrics), 'metrics is empty; name some of'
            f' {", ".join(METRICS)}'), *(one_of('metrics', name, tuple(METRICS)) for name in listed(metrics)),
            *(at_least(k, globals()[k], 0)
              for k in ('max_tokens', 'block_size', 'batch_size', 'minimal_context_window', 'stride', 'bootstrap')),
            (first_token == 'score' or not (minimal_context_window or stride),
             'first_token = skip cuts blocks side by side; drop minimal_context_window and stride'),
            (not (stride and minimal_context_window), f'stride = {stride} and minimal_context_window ='
             f' {minimal_context_window} say the same in two ways; drop one'),
            (len(archives) in (0, len(paths)),
             f'archive names {len(archives)} files for {len(paths)} checkpoints, expected one each'),
            *((os.path.exists(p), f'no archive at {p!r}; make it with python compress.py pack CKPT FILE {p}')
              for p in archives),
            *((os.path.exists(p), f'no archive at {p!r}; make it with python compress.py online FILE {p}')
              for p in online))
    import runs
    from corpus.data import open_pairs, open_split
    env = runs.Env(device, dtype)

    # every input is opened and checked before the first is scored
    bins = {(name, part): open_split(data_dir, name, part, verify).head(max_tokens)
            for name in sets for part in splits}
    pair_sets = {name: open_pairs(data_dir, name, verify) for name in listed(pairs)}
    arms_of_all = [rows for types in pair_sets.values() for arms in types.values() for rows in arms.values()]
    parents, blocks, packed = [], {block_size} - {0}, [read_archive_facts(p) for p in archives]
    for path in paths:
        checkpoint = runs.load_checkpoint(path)
        own = own_sets(checkpoint)
        require((own or sets or pair_sets, f'{path} names no data set; give one, --dataset=NAME'))
        for name, part in () if sets or pair_sets else itertools.product(own, splits):
            if (name, part) not in bins:
                bins[name, part] = open_split(data_dir, name, part, verify).head(max_tokens)
        for (name, _), data in bins.items():
            if sets or name in own:
                check_fit(path, checkpoint, data)
        for data in arms_of_all:
            check_fit(path, checkpoint, data, data.row_length)
        parents.append(runs.parent_of(path))
        blocks.add(block_size or checkpoint['model_args']['block_size'])
    online = [(facts, next((data for data in bins.values() if holds(facts, data)), None))
              for facts in map(read_archive_facts, online)]
    require(*((data, f"{facts['path']} holds a text that is none of the scored splits; see python compress.py info")
              for facts, data in online))
    identity = sorted(config.items()), [p['sha256'] for p in parents], [
        data.sha256 for data in (*bins.values(), *arms_of_all)]
    folder = os.path.join(out, f'eval-{hashlib.blake2b(repr(identity).encode(), digest_size=4).hexdigest()}')
    table_path, before, commit = os.path.join(folder, 'table.md'), runs.read_run(folder), runs.commit_id()
    if before.get('status') == 'done' and before['commit'] == commit and commit and not commit.endswith('-dirty') \
            and os.path.exists(table_path) and not overwrite:
        if env.main:
            with open(table_path, encoding='utf-8') as f:
                print(f'{f.read()}from {folder}, scored at {before["timestamp"]}; --overwrite scores again')
        env.close()
        return 0
    env.barrier()
    if env.main:
        os.makedirs(folder, exist_ok=True)
    record, rows = runs.RunRecord(folder, config, env, parents=parents), []

    def add(row):
        rows.append(row)
        record.update(rows=rows)

    for i, path in enumerate(paths):
        for row in model_rows(path, bins, packed[i] if packed else {}, env):
            add(row)
        if pair_sets:
            for row in pair_rows(path, pair_sets, env):
                add(row)
    env.close()
    if not env.main:
        return 0
    for facts, data in online:
        n = facts['text_bytes']
        add(dict(run=f"online {os.path.basename(facts['path'])}", data=f'{data.name}/{data.split}', text_bytes=n,
                 tokens=n, bits_per_byte=8 * facts['size'] / max(n, 1), archive_bytes=facts['size']))
    if baselines:
        for data in bins.values():
            if data.tokenizer != 'byte' or data.row_length:
                print(f'no baselines on {data.name}/{data.split}: its .bin holds {data.tokenizer} ids, not the text')
                continue
            for row in baseline_rows(data, sorted(blocks)):
                add(row)
        absent = {'zstd -19', 'brotli -q 11', 'bzip3', '7z PPMd', 'zpaq -m5'} - set(streams()) - set(tools(0))
        print(f'compressors not here: {", ".join(sorted(absent)) or "none"}')
    both = [(SHOWN, [r for r in rows if 'pieces' not in r]), (SHOWN_PAIRS, [r for r in rows if 'pieces' in r])]
    hidden = {column for name in METRICS if name not in listed(metrics) for column in METRICS[name].split()}
    table = '\n'.join(runs.markdown(some, [c for c in shown if c not in hidden and any(c in r for r in some)])
                      for shown, some in both if some)
    with open(table_path, 'w', encoding='utf-8') as f:
        f.write(table + '\n')
    runs.write_csv(os.path.join(folder, 'table.csv'), rows)
    record.update(status='done')
    print(f'{table}\nwrote {folder}')
    return 0


if __name__ == '__main__':
    run(main)
