"""GPT-2 in and out: a Hugging Face folder or hub id as a checkpoint of this project, and the way back.

    python prune.py --from_ckpt=gpt2 ...             gpt2, gpt2-xl, distilgpt2, any hub id of a GPT-2, a local folder
    python gpt2.py export out/RUN/ckpt.pt FOLDER     config.json, model.safetensors, tokenizer: transformers loads it

Whatever names a checkpoint (from_ckpt, init_from, teacher) may name a folder or an id: runs.load_checkpoint asks here.
Weights are read from safetensors as float32, without transformers; zeros of a sparse model go out as zeros.
"""
import json
import os
import re
import shutil

from configurator import UserError, configure, require, run

# -----------------------------------------------------------------------------
overwrite = False               # export: replace the files of an earlier export in FOLDER
# -----------------------------------------------------------------------------

HUB_ID = re.compile(r'\w[\w.-]*(/\w[\w.-]*)?')
WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'vocab.json', 'merges.txt', 'special_tokens_map.json')
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu', 'relu2': 'relu2'}
GPT2_VOCAB, GPT2_END = 50257, 50256
BUFFERS = re.compile(r'h\.\d+\.attn\.(bias|masked_bias)')      # causal masks that older files carry


def is_named_by(path):
    """Say whether a path names a Hugging Face folder (config.json in it), or nothing here but perhaps a hub id."""
    if os.path.exists(path):
        return os.path.isfile(os.path.join(path, 'config.json'))
    return bool(HUB_ID.fullmatch(path)) and not path.endswith('.pt')


def folder_of(path):
    """Return the local folder of a Hugging Face folder or hub id, fetched into the hub's cache if need be."""
    if os.path.isdir(path):
        return path
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(path, allow_patterns=['config.json', WEIGHTS, INDEX, 'model-*.safetensors',
                                                       *TOKENIZER_FILES])
    except Exception as e:                      # the library raises its own, httpx's, OSError and ValueError
        reason = ' '.join(str(e).split())[:200]
        raise UserError(f'no checkpoint at {path!r}, and the hub gives no model of that id ({type(e).__name__}:'
                        f' {reason}); check the path, or the id and the network') from None


def weight_files(folder):
    """Return the paths of a folder's safetensors files."""
    if os.path.exists(os.path.join(folder, INDEX)):
        names = sorted(set(read_json(os.path.join(folder, INDEX))['weight_map'].values()))
    else:
        names = [WEIGHTS]
    for name in names:
        require((os.path.exists(os.path.join(folder, name)), f'{folder} has config.json but no {name}; save the model'
                 ' with save_pretrained of a current transformers, which writes safetensors'))
    return [os.path.join(folder, name) for name in names]


def read_json(path):
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except (OSError, ValueError) as e:
        raise UserError(f'{path} cannot be read as JSON ({e}); fetch the folder again') from None


# --- in ---

def model_args_of(config, where):
    """Translate a GPT2Config dict into model_args; UserError lists everything that model.py does not compute."""
    from model import ModelConfig, args_of
    kind, activation = config.get('model_type'), config.get('activation_function', 'gelu_new')
    require((kind == 'gpt2', f'{where} holds a {kind!r} model, expected the architecture of GPT-2 (model_type gpt2)'))
    c = config['n_embd']
    odd = [f'{k} = {config[k]!r} (expected {v!r})' for k, v in dict(
        n_inner=4 * c, layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False).items() if config.get(k) not in (None, v)]
    require((activation in ACTIVATIONS, f'{where}: activation_function = {activation!r}, expected one of'
             f' {", ".join(ACTIVATIONS)}'), (not odd, f'{where} is a GPT-2 of a kind not covered: {", ".join(odd)}'))
    return args_of(ModelConfig(
        block_size=config.get('n_positions') or config['n_ctx'], vocab_size=config['vocab_size'], n_embd=c,
        n_layer=config['n_layer'], n_head=config['n_head'], positions='learned', activation=ACTIVATIONS[activation],
        tied=config.get('tie_word_embeddings', True)))


def names_of(args):
    """Yield (our name, GPT-2's without its prefix, transposed there?) of every tensor; Conv1D weights are (in, out)."""
    yield 'embed.weight', 'wte.weight', False
    yield 'position.weight', 'wpe.weight', False
    for kind in ('weight', 'bias'):
        yield f'norm.{kind}', f'ln_f.{kind}', False
        for i in range(args['n_layer']):
            for ours, theirs in (('norm1', 'ln_1'), ('norm2', 'ln_2')):
                yield f'blocks.{i}.{ours}.{kind}', f'h.{i}.{theirs}.{kind}', False
            for ours, theirs in (('attention.qkv', 'attn.c_attn'), ('attention.proj', 'attn.c_proj'),
                                 ('feed_forward.up', 'mlp.c_fc'), ('feed_forward.down', 'mlp.c_proj')):
                yield f'blocks.{i}.{ours}.{kind}', f'h.{i}.{theirs}.{kind}', kind == 'weight'
    if not args['tied']:
        yield 'head.weight', 'lm_head.weight', False


def load(path):
    """Return a checkpoint dict of a Hugging Face folder or hub id, with no masks; ids are GPT-2's if there are 50,257.

    Otherwise the tokenizer is named after the folder, as prepare_text.py --tokenizer=FOLDER names it.
    """
    from safetensors import SafetensorError, safe_open
    folder = folder_of(path)
    config = read_json(os.path.join(folder, 'config.json'))
    args, found = model_args_of(config, path), {}
    for file in weight_files(folder):
        try:
            with safe_open(file, 'pt') as f:
                found.update({key.removeprefix('transformer.'): f.get_tensor(key) for key in f.keys()})
        except (SafetensorError, OSError) as e:
            raise UserError(f'{file} is cut short or no safetensors file ({e}); fetch it again') from None
    wanted, state = list(names_of(args)), {}
    unknown = [k for k in found if not BUFFERS.fullmatch(k)
               and k not in {theirs for _, theirs, _ in wanted} | {'lm_head.weight'}]
    missing = [theirs for _, theirs, _ in wanted if theirs not in found]
    require((not unknown and not missing, f'{path}: tensors do not fit its config.json: missing'
             f' {", ".join(missing[:4]) or "none"}, unknown {", ".join(unknown[:4]) or "none"}; fetch it again'))
    for ours, theirs, transposed in wanted:
        tensor = found.pop(theirs).float()
        state[ours] = tensor.t().contiguous() if transposed else tensor
    if args['tied']:
        state['head.weight'] = state['embed.weight']
    own = config.get('nanomdl', {})
    end = own.get('start_id', config.get('eos_token_id', GPT2_END))
    require((isinstance(end, int) and 0 <= end < args['vocab_size'], f'{path}: eos_token_id = {end!r} in config.json,'
             f' expected an id below vocab_size = {args["vocab_size"]}; it stands before the first token'))
    name = own.get('tokenizer', 'gpt2' if args['vocab_size'] == GPT2_VOCAB else os.path.basename(os.path.abspath(path)))
    return dict(model=state, model_args=args, masks={}, config={}, optimizer={}, procedure={}, phase='imported',
                parent={}, data=dict(dataset='', sha256='', tokenizer=name, start_id=end, tokenizer_folder=folder))


# --- out ---

def export(path, folder):
    """Write a checkpoint as a folder that transformers' GPT2LMHeadModel loads; its logits are the checkpoint's."""
    from safetensors.torch import save_file

    import runs
    checkpoint = runs.load_checkpoint(path)
    args, data, state = checkpoint['model_args'], checkpoint['data'], dict(checkpoint['model'])
    odd = [f'{k} = {args[k]!r}' for k, v in dict(norm='layernorm', bias=True, qk_norm=False).items() if args[k] != v]
    odd += ["positions = 'rotary'"] if args['positions'] == 'rotary' else []
    require((not odd, f"{path} cannot be a GPT-2: {', '.join(odd)}; GPT-2 has layernorm, biases, absolute positions"),
            (overwrite or not os.path.exists(os.path.join(folder, 'config.json')),
             f'{folder} holds a model already; replace it with --overwrite'))
    if args['positions'] == 'sinusoidal':       # a table of positions like any other
        from model import sinusoids
        state['position.weight'] = sinusoids(args['block_size'], args['n_embd'])
    tensors = {theirs if theirs.startswith('lm_head') else f'transformer.{theirs}':
               (state[ours].t() if transposed else state[ours]).contiguous()
               for ours, theirs, transposed in names_of(args)}
    config = dict(
        architectures=['GPT2LMHeadModel'], model_type='gpt2', vocab_size=args['vocab_size'], n_embd=args['n_embd'],
        n_positions=args['block_size'], n_layer=args['n_layer'], n_head=args['n_head'],
        activation_function={v: k for k, v in reversed(ACTIVATIONS.items())}[args['activation']],
        tie_word_embeddings=args['tied'], bos_token_id=data['start_id'], eos_token_id=data['start_id'],
        layer_norm_epsilon=1e-5, torch_dtype='float32',
        **{f'{part}_pdrop': args['dropout'] for part in ('resid', 'embd', 'attn')},
        nanomdl=dict(tokenizer=data['tokenizer'], start_id=data['start_id']))
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, os.path.join(folder, f'{WEIGHTS}.tmp'), metadata=dict(format='pt'))
    os.replace(os.path.join(folder, f'{WEIGHTS}.tmp'), os.path.join(folder, WEIGHTS))
    write_tokenizer(checkpoint, folder)
    with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as f:    # last: without it, no model
        json.dump(config, f, indent=1)
    zeros = sum(int((t == 0).sum()) for t in tensors.values()) / sum(t.numel() for t in tensors.values())
    print(f'{folder}: {sum(t.numel() for t in tensors.values()):,} weights, {zeros:.1%} zeros,'
          f' {os.path.getsize(os.path.join(folder, WEIGHTS)):,} bytes')


def encoding():
    """Return tiktoken's GPT-2 encoding; UserError says how to get its vocabulary where it is missing."""
    import tiktoken
    try:
        return tiktoken.get_encoding('gpt2')
    except (OSError, ValueError) as e:
        raise UserError(f"GPT-2's vocabulary is not here and could not be fetched ({type(e).__name__}); run once with"
                        ' network, or set TIKTOKEN_CACHE_DIR to such a folder of a machine that has it') from None


def tokenizer_folder(checkpoint):
    """Return the folder with the tokenizer.json of a checkpoint's ids: its data set's or its origin's; '' if none.

    One of train_tokenizer.py must have the hash in its name: a data set made anew may hold other ids.
    """
    from corpus.bins import dataset_folder, sha256_file
    data = checkpoint['data']
    _, own, digest = data['tokenizer'].partition('@')
    known = [data.get('tokenizer_folder', '')]
    if data['dataset']:
        known.insert(0, dataset_folder(checkpoint['config'].get('data_dir', 'data'), data['dataset']))
    files = {f: os.path.join(f, 'tokenizer.json') for f in known if f}
    return next((f for f, file in files.items() if os.path.exists(file)
                 and (not own or sha256_file(file).startswith(digest))), '')


def write_tokenizer(checkpoint, folder):
    """Put a checkpoint's tokenizer into a folder: copied, or for bytes and GPT-2's BPE built from their pieces."""
    name, source = checkpoint['data']['tokenizer'], tokenizer_folder(checkpoint)
    if source:
        for file in TOKENIZER_FILES:
            if os.path.exists(os.path.join(source, file)):
                shutil.copyfile(os.path.join(source, file), os.path.join(folder, file))
    elif name in ('byte', 'gpt2'):
        if name == 'byte':
            pieces, end = [bytes([i]) for i in range(256)], None
        else:
            tok = encoding()
            pieces, end = [tok.decode_single_token_bytes(i) for i in range(tok.n_vocab)], tok.eot_token
        save_tokenizer(folder, pieces, end, model_max_length=checkpoint['model_args']['block_size'])
    else:
        print(f'no tokenizer.json of {name!r} was found, so {folder} has none; copy there the one that made the data')


def save_tokenizer(folder, pieces, end=None, **more):
    """Write tokenizer.json and tokenizer_config.json of a byte-level BPE, as transformers' AutoTokenizer loads them."""
    build_tokenizer(pieces, end).save(os.path.join(folder, 'tokenizer.json'))
    special = {} if end is None else dict(bos_token='<|endoftext|>', eos_token='<|endoftext|>')
    with open(os.path.join(folder, 'tokenizer_config.json'), 'w', encoding='utf-8') as f:
        json.dump(dict(tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False, **more,
                       **special), f, indent=1)


def build_tokenizer(pieces, end=None):
    """Return a tokenizers.Tokenizer of a byte-level BPE from its pieces in order of rank (list of bytes, by id).

    end: id of end-of-text, which no text encodes to. A piece's merge is what joining its own bytes by rank leads to
    (minbpe's recover_merges): two parts, both of lower rank.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(
        b for b in range(256) if b not in shown)}                      # GPT-2's spelling of bytes as characters
    spell = lambda piece: ''.join(spelled[b] for b in piece)                                        # noqa: E731
    rank, merges = {p: i for i, p in enumerate(pieces) if i != end}, []
    for piece, own in rank.items():
        parts = [bytes([b]) for b in piece]
        while len(parts) > 2:
            _, i = min((rank.get(a + b, own), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(map(spell, parts)))
    vocab = {spell(p): i for p, i in rank.items()} | ({} if end is None else {'<|endoftext|>': end})
    tok = Tokenizer(models.BPE(vocab, merges))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if end is not None:
        tok.add_special_tokens([AddedToken('<|endoftext|>', normalized=False)])
    return tok


def main(argv=None):
    _, paths, _ = configure(globals(), argv, verbs=dict(export=2))
    export(*paths)
    return 0


if __name__ == '__main__':
    run(main)
