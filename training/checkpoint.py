"""Checkpoints: one file, or a folder that ranks write together; saved whole or not at all, loaded without running code.

Hugging Face folders and hub ids are read through training/huggingface.py.
"""
import functools
import os
import platform
import re
import shutil
import subprocess

from configurator import RETIRED, UserError, knobs_of, refuse, require
from corpus.bins import sha256_file

CHECKPOINT_FORMAT = 'nanomdl-ckpt-1'
CHECKPOINT_NAME = re.compile(r'(ckpt|best)\.(pt|sharded)(\.\d+)?')


@functools.cache
def commit_id():
    """The repository's commit, with -dirty where the tree differs; '' outside git. Of the code that is loaded: once."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        done = subprocess.run(['git', '-C', folder, 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*'],
                              capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ''
    if done.returncode:
        return ''
    return done.stdout.strip()


def versions():
    import numpy
    import torch
    return dict(python=platform.python_version(), torch=str(torch.__version__), numpy=numpy.__version__)


def save_checkpoint(path, checkpoint, keep_last=1):
    """Write a checkpoint dict under a temporary name and rename; keep_last > 1 keeps older ones as NAME.1, NAME.2.

    A path that ends in .sharded becomes a folder that all ranks write together; its tensors may be DTensors.
    """
    import torch
    import torch.distributed as dist
    path = os.fspath(path)
    sharded = path.endswith('.sharded')
    tmp = f'{path}.tmp'
    checkpoint = dict(checkpoint, format=CHECKPOINT_FORMAT, versions=versions(), commit=commit_id())
    try:
        if sharded:
            save_together(tmp, checkpoint)
        else:
            torch.save(checkpoint, tmp)
    except (OSError, RuntimeError) as e:
        remove(tmp)
        raise UserError(f'cannot save {path} ({e}); the previous checkpoint is untouched; free some space') from None
    if sharded and dist.get_rank():
        return

    # The oldest is replaced by the next one, and so on; the new one comes last.
    for i in range(keep_last - 1, 0, -1):
        older = f'{path}.{i - 1}'
        if i == 1:
            older = path
        if os.path.exists(older):
            replace(older, f'{path}.{i}')
    replace(tmp, path)


def save_together(folder, checkpoint):
    """Write a sharded checkpoint in an empty folder, all ranks at once; return when all have written."""
    import torch.distributed as dist

    from training.parallel import save_sharded
    if dist.get_rank() == 0:
        remove(folder)
    dist.barrier()
    save_sharded(folder, checkpoint)
    dist.barrier()


def remove(path):
    """Remove a file or a folder, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def replace(path, target):
    """Rename over a file (atomic), or over a folder, which is removed first."""
    if os.path.isdir(target):
        shutil.rmtree(target)
    os.replace(path, target)


def newest_checkpoint(folder):
    """Path of the checkpoint in a run folder, ckpt.pt or ckpt.sharded, the newer where there are both."""
    paths = [os.path.join(folder, name) for name in ('ckpt.pt', 'ckpt.sharded')]
    present = [path for path in paths if os.path.exists(path)]
    return max(present, key=os.path.getmtime, default=paths[0])


def sorted_names(folder):
    """Names of what a folder holds, in order; none where it is not there."""
    if not os.path.isdir(folder):
        return []
    return sorted(os.listdir(folder))


def others_beside(path):
    """Name the other checkpoints in the folder of a damaged one, for its message; '' where there are none."""
    path = os.path.normpath(path)
    folder = os.path.dirname(path)
    names = sorted_names(folder or '.')
    others = [os.path.join(folder, name) for name in names if CHECKPOINT_NAME.fullmatch(name)]
    others = [other for other in others if other != path]
    if not others:
        return ''
    return f' ({", ".join(others)})'


def load_checkpoint(path, device='cpu'):
    """Load a checkpoint (file, sharded folder, or a run folder's) without running code; a damaged one is a UserError.

    Hugging Face folders, and hub ids, which is what names nothing here, come as huggingface.load makes them.
    """
    from training import huggingface
    path = os.fspath(path)
    if huggingface.is_named_by(path):
        return huggingface.load(path)
    if os.path.isdir(path) and not is_sharded(path):
        path = newest_checkpoint(path)
    if not os.path.exists(path):
        raise UserError(f'no checkpoint at {path!r}; train one with python train.py config/sample_pmmp.py')
    checkpoint = read_checkpoint(path, device)
    check_format(checkpoint, path)
    return checkpoint


def is_sharded(path):
    """Say whether a path is of a checkpoint that ranks wrote together."""
    return path.endswith('.sharded') or os.path.exists(os.path.join(path, '.metadata'))


def read_checkpoint(path, device):
    """Read a file or a sharded folder; whatever goes wrong, for any reason, is a UserError of one line."""
    from training.parallel import load_sharded
    from training.untrusted import load_zip
    try:
        if is_sharded(path):
            return load_sharded(path)
        return load_zip(path, device)
    except Exception as e:
        reason = (str(e) or repr(e)).splitlines()[0][:90]
        raise UserError(f'{path} is damaged, cut short or not a checkpoint ({reason}); use an older one'
                        f'{others_beside(path)} or train again') from None


def check_format(checkpoint, path):
    """Refuse what is not a checkpoint of this version."""
    name = checkpoint.get('format') if isinstance(checkpoint, dict) else None
    if name == CHECKPOINT_FORMAT:
        return
    cure = 'it is not one of ours'
    if isinstance(name, str) and name.startswith('nanomdl-ckpt-'):
        cure = 'it was written by another version: update this repository'
    raise UserError(f'{path} has format {name!r}, this version reads {CHECKPOINT_FORMAT!r}; {cure}')


def load_model(path, device='cpu', checkpoint=None):
    """Build the model of a checkpoint with its weights; returns (model, checkpoint)."""
    from model import build
    checkpoint = checkpoint or load_checkpoint(path)
    model = build(checkpoint['model_args'])
    load_weights(model, checkpoint, path)
    return model.to(device), checkpoint


def load_weights(model, checkpoint, path):
    """Copy a checkpoint's weights into a model of the same shape; UserError names the difference where there is one."""
    from model import model_args
    if 'model' not in checkpoint:
        raise UserError(f'{path} holds the decoder of a probe, which is no model by itself; name its encoder')
    theirs = checkpoint['model_args']
    differ = []
    for name, value in model_args(model).items():
        if theirs.get(name) != value and name != 'dropout':
            differ.append(f'{name}: {theirs.get(name)!r} there, {value!r} here')
    if differ:
        raise UserError(f'{path} holds a model of another shape ({"; ".join(differ)}); use the shape of the checkpoint')
    model.load_state_dict(checkpoint['model'])


def load_encoder(model, path):
    """Copy the encoder of a checkpoint, or a plain model without its head, into a model's encoder."""
    require((getattr(model, 'encoder', None) is not None, f'encoder_ckpt = {path!r}: this model has no encoder'))
    checkpoint = load_checkpoint(path)
    width = checkpoint['model_args']['n_embd']
    if width != model.config.n_embd:
        raise UserError(f'{path} holds an encoder of width {width}, this model has n_embd ='
                        f' {model.config.n_embd}; they must be the same')
    theirs = encoder_weights(checkpoint)
    shapes = {name: t.shape for name, t in theirs.items()}
    expected = {name: t.shape for name, t in model.encoder.state_dict().items()}
    if shapes != expected:
        strange = min(set(shapes.items()) ^ set(expected.items()))[0]
        raise UserError(f'{path} holds an encoder of another shape ({strange}); use its n_layer (as n_layer_encoder),'
                        ' block_type and length')
    model.encoder.load_state_dict(theirs)


def encoder_weights(checkpoint):
    """Return {name: tensor} of a checkpoint's encoder; of a plain model's, all but its head."""
    prefix = ''
    if checkpoint['model_args'].get('wrapper'):
        prefix = 'encoder.'
    weights = {}
    for name, tensor in checkpoint['model'].items():
        if name.startswith(prefix) and not name.startswith('head.'):
            weights[name.removeprefix(prefix)] = tensor
    return weights


def check_resume(start, path, data, config, fixed, script):
    """Refuse to continue a checkpoint on other data, or with other values of the knobs in `fixed`.

    A checkpoint older than a knob of the script (its path) did what the knob's default does, and a script that has
    lost a knob does what the knob's last value did.
    """
    problems = []
    for key in ('sha256', 'start_id'):
        before = start['data'][key]
        if data[key] != before:
            problems.append(f'cannot resume: {key} is {data[key]!r}, the checkpoint has {before!r}; use the original'
                            f' one, or init_from={path} for a new run')
    defaults, _ = knobs_of(script)
    lost = {name: last for name, (last, _) in RETIRED.items()}
    config = lost | config
    had = lost | defaults | start['config']
    for key in fixed:
        if had[key] != config[key]:
            problems.append(f'cannot resume: {key} = {config[key]!r}, the checkpoint has {had[key]!r}')
    refuse(problems)


def weights_alone(checkpoint):
    """Return a checkpoint without what only an optimiser needs, its weights in bfloat16."""
    import torch
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in checkpoint['model'].items()}
    return dict(checkpoint, model=weights, optimizer={}, scaler={}, procedure={})


def parent_of(path):
    """Name and hash of the checkpoint that a new one descends from."""
    from training import huggingface
    if huggingface.is_named_by(path):
        files = huggingface.weight_files(huggingface.folder_of(path))
        return dict(path=path, sha256=','.join(map(sha256_file, files)))
    if os.path.isdir(path) and not path.endswith('.sharded'):
        path = newest_checkpoint(path)
    identity = path
    if os.path.isdir(path):
        identity = os.path.join(path, '.metadata')
    sha256 = ''
    if os.path.exists(identity):
        sha256 = sha256_file(identity)
    return dict(path=path, sha256=sha256)
