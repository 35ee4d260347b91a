"""GPT-2's weights in and out: a Hugging Face folder or hub id as a checkpoint of this project, and the way back.

    python prune.py --from_ckpt=gpt2 ...               gpt2, gpt2-xl, distilgpt2, any hub id of a GPT-2, a local folder
    python runs.py export out/RUN/ckpt.pt FOLDER       config.json, model.safetensors, tokenizer: transformers loads it

Whatever names a checkpoint (from_ckpt, init_from, teacher) may name a folder or an id: checkpoint.load_checkpoint asks
here. Weights are read from safetensors as float32, without transformers; zeros of a sparse model go out as zeros.
"""
import json
import os
import re

from configurator import UserError, require
from corpus.tokens import TOKENIZER_FILES, write_tokenizer
from model import ModelConfig, args_of, sinusoids

HUB_ID = re.compile(r'\w[\w.-]*(/\w[\w.-]*)?')
WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu', 'relu2': 'relu2'}
THEIR_ACTIVATIONS = {'gelu_tanh': 'gelu_new', 'gelu': 'gelu', 'relu2': 'relu2'}
GPT2_VOCAB = 50257
GPT2_END = 50256
BUFFERS = re.compile(r'h\.\d+\.attn\.(bias|masked_bias)')      # causal masks that older files carry


# --- folders and files ---

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
    names = [WEIGHTS]
    if os.path.exists(os.path.join(folder, INDEX)):
        index = read_json(os.path.join(folder, INDEX))
        names = sorted(set(index['weight_map'].values()))
    paths = [os.path.join(folder, name) for name in names]
    for name, path in zip(names, paths):
        require((os.path.exists(path), f'{folder} has config.json but no {name}; save the model'
                 ' with save_pretrained of a current transformers, which writes safetensors'))
    return paths


def read_json(path):
    """Return the parsed content of a JSON file."""
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except (OSError, ValueError) as e:
        raise UserError(f'{path} cannot be read as JSON ({e}); fetch the folder again') from None


def read_tensors(folder):
    """Return {GPT-2's name without its prefix: tensor} of a folder's safetensors files."""
    from safetensors import SafetensorError, safe_open
    tensors = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, 'pt') as f:
                for key in f.keys():
                    tensors[key.removeprefix('transformer.')] = f.get_tensor(key)
        except (SafetensorError, OSError) as e:
            raise UserError(f'{file} is cut short or no safetensors file ({e}); fetch it again') from None
    return tensors


# --- names of tensors ---

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


# --- in ---

def load(path):
    """Return a checkpoint dict of a Hugging Face folder or hub id, with no masks; ids are GPT-2's if there are 50,257.

    Otherwise the tokenizer is named after the folder, as prepare_text.py --tokenizer=FOLDER names it.
    """
    folder = folder_of(path)
    config = read_json(os.path.join(folder, 'config.json'))
    args = model_args_of(config, path)
    return dict(model=state_of(read_tensors(folder), args, path), model_args=args, masks={}, config={}, optimizer={},
                procedure={}, phase='imported', parent={}, data=data_of(config, args, folder, path))


def model_args_of(config, where):
    """Translate a GPT2Config dict into model_args; UserError lists everything that model.py does not compute."""
    kind = config.get('model_type')
    require((kind == 'gpt2', f'{where} holds a {kind!r} model, expected the architecture of GPT-2 (model_type gpt2)'))
    activation = config.get('activation_function', 'gelu_new')
    covered = dict(n_inner=4 * config['n_embd'], layer_norm_epsilon=1e-5, scale_attn_weights=True,
                   scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    odd = [f'{key} = {config[key]!r} (expected {value!r})' for key, value in covered.items()
           if config.get(key) not in (None, value)]
    require((activation in ACTIVATIONS, f'{where}: activation_function = {activation!r}, expected one of'
             f' {", ".join(ACTIVATIONS)}'), (not odd, f'{where} is a GPT-2 of a kind not covered: {", ".join(odd)}'))
    return args_of(ModelConfig(
        block_size=config.get('n_positions') or config['n_ctx'], vocab_size=config['vocab_size'],
        n_embd=config['n_embd'], n_layer=config['n_layer'], n_head=config['n_head'], positions='learned',
        activation=ACTIVATIONS[activation], tied=config.get('tie_word_embeddings', True)))


def state_of(tensors, args, where):
    """Return the state dict of a model of model_args, float32, from GPT-2's tensors; none may be missing or unknown."""
    names = list(names_of(args))
    known = {theirs for _, theirs, _ in names} | {'lm_head.weight'}
    unknown = [name for name in tensors if name not in known and not BUFFERS.fullmatch(name)]
    missing = [theirs for _, theirs, _ in names if theirs not in tensors]
    require((not unknown and not missing, f'{where}: tensors do not fit its config.json: missing'
             f' {", ".join(missing[:4]) or "none"}, unknown {", ".join(unknown[:4]) or "none"}; fetch it again'))
    state = {}
    for ours, theirs, transposed in names:
        tensor = tensors.pop(theirs).float()                            # the original may go as soon as it is copied
        state[ours] = tensor.t().contiguous() if transposed else tensor
    if args['tied']:
        state['head.weight'] = state['embed.weight']
    return state


def data_of(config, args, folder, where):
    """Return what a checkpoint says of its data: the tokenizer and the id that stands before the first token."""
    exported = config.get('nanomdl', {})                                # of an export of this project
    end = exported.get('start_id', config.get('eos_token_id', GPT2_END))
    require((isinstance(end, int) and 0 <= end < args['vocab_size'], f'{where}: eos_token_id = {end!r} in config.json,'
             f' expected an id below vocab_size = {args["vocab_size"]}; it stands before the first token'))
    tokenizer = os.path.basename(os.path.abspath(where))
    if args['vocab_size'] == GPT2_VOCAB:
        tokenizer = 'gpt2'
    return dict(dataset='', sha256='', tokenizer=exported.get('tokenizer', tokenizer), start_id=end,
                tokenizer_folder=folder)


# --- out ---

def export(checkpoint, path, folder, overwrite=False):
    """Write a checkpoint as a folder that transformers' GPT2LMHeadModel loads; its logits are the checkpoint's.

    checkpoint: what load_checkpoint(path) returned. overwrite: replace the files of an earlier export in the folder.
    """
    from safetensors.torch import save_file
    tensors = tensors_of(checkpoint, path)
    require((overwrite or not os.path.exists(os.path.join(folder, 'config.json')),
             f'{folder} holds a model already; replace it with --overwrite'))
    os.makedirs(folder, exist_ok=True)
    weights = os.path.join(folder, WEIGHTS)
    save_file(tensors, f'{weights}.tmp', metadata=dict(format='pt'))
    os.replace(f'{weights}.tmp', weights)
    write_tokenizer(checkpoint, folder)

    # The config comes last: without it, the folder is no model.
    with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as f:
        json.dump(config_of(checkpoint), f, indent=1)
    n_weights = sum(tensor.numel() for tensor in tensors.values())
    n_zeros = sum(int((tensor == 0).sum()) for tensor in tensors.values())
    print(f'{folder}: {n_weights:,} weights, {n_zeros / n_weights:.1%} zeros, {os.path.getsize(weights):,} bytes')


def tensors_of(checkpoint, where):
    """Return {GPT-2's name: tensor} of a checkpoint; UserError names what GPT-2 does not have."""
    args = checkpoint['model_args']
    odd = [f'{key} = {args[key]!r}' for key, value in dict(norm='layernorm', bias=True, qk_norm=False).items()
           if args[key] != value]
    if args['positions'] == 'rotary':
        odd.append("positions = 'rotary'")
    require((not odd, f'{where} cannot be a GPT-2: {", ".join(odd)}; GPT-2 has layernorm, biases, absolute positions'))

    # Sinusoids become a table of positions like any other.
    state = dict(checkpoint['model'])
    if args['positions'] == 'sinusoidal':
        state['position.weight'] = sinusoids(args['block_size'], args['n_embd'])
    tensors = {}
    for ours, theirs, transposed in names_of(args):
        name = theirs if theirs.startswith('lm_head') else f'transformer.{theirs}'
        tensor = state[ours].t() if transposed else state[ours]
        tensors[name] = tensor.contiguous()
    return tensors


def config_of(checkpoint):
    """Return the GPT2Config dict of a checkpoint; its key nanomdl says what GPT-2's own keys cannot."""
    args = checkpoint['model_args']
    data = checkpoint['data']
    return dict(
        architectures=['GPT2LMHeadModel'], model_type='gpt2', vocab_size=args['vocab_size'], n_embd=args['n_embd'],
        n_positions=args['block_size'], n_layer=args['n_layer'], n_head=args['n_head'],
        activation_function=THEIR_ACTIVATIONS[args['activation']],
        tie_word_embeddings=args['tied'], bos_token_id=data['start_id'], eos_token_id=data['start_id'],
        layer_norm_epsilon=1e-5, torch_dtype='float32', resid_pdrop=args['dropout'], embd_pdrop=args['dropout'],
        attn_pdrop=args['dropout'], nanomdl=dict(tokenizer=data['tokenizer'], start_id=data['start_id']))
