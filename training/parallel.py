"""Many processes: DDP or FSDP2 around a model, the part of a tensor that a rank holds, and the whole of it again.

Scripts work on local tensors: without sharding a local tensor is the parameter itself, with FSDP2 (Zhao et al. 2023;
fully_shard, what ZeRO-3 is called in plain PyTorch) it is this rank's rows of it. So procedures, masks and optimisers
are written once. `whole` is the DTensor that a local tensor is a part of.
"""
import os

import torch

from training import untrusted


def parallelise(model, env, compile=False, shard='', cpu_offload=False):
    """Wrap a model for training on env's ranks; returns (what to call in a step, set_sync).

    shard 'full': FSDP2 per block and around the rest; a bfloat16 run gathers weights as bfloat16 and reduces gradients
    in float32. set_sync(False) before a backward keeps its gradients on the rank, for accumulation.
    """
    if shard:
        shard_blocks(model, env, cpu_offload)
    step_model = torch.compile(model) if compile and env.kind == 'cuda' else model
    if shard:
        return step_model, model.set_requires_gradient_sync
    if not env.distributed or env.world == 1:
        return step_model, lambda on: None

    from torch.nn.parallel import DistributedDataParallel
    devices = [env.local_rank] if env.kind == 'cuda' else None
    step_model = DistributedDataParallel(step_model, device_ids=devices,
                                         broadcast_buffers=False)       # position tables never change

    def set_sync(on):
        step_model.require_backward_grad_sync = on
    return step_model, set_sync


def shard_blocks(model, env, cpu_offload=False):
    """Divide the rows of every parameter among the ranks by FSDP2, in place; a block is gathered when it is needed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    gathered_as = torch.bfloat16 if env.dtype == 'bfloat16' else None
    options = dict(
        mesh=init_device_mesh(env.kind, (env.world,)),
        mp_policy=MixedPrecisionPolicy(param_dtype=gathered_as, reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy() if cpu_offload else OffloadPolicy())
    blocks = list(model.blocks)
    encoder = getattr(model, 'encoder', None)
    if encoder is not None:
        blocks += encoder.blocks
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(model, reshard_after_forward=True, **options)       # a root left gathered would miss TAMADE's trials


def local(parameter):
    """Return what this rank holds of a parameter: itself, or its rows, sharing memory, with `whole` = the parameter."""
    if not hasattr(parameter, 'to_local'):                  # a DTensor; its module is slow to import
        return parameter
    rows = parameter.detach().to_local()
    rows.whole = parameter
    return rows


def take_gradients(tensors):
    """Move the gradients of sharded parameters to their local tensors; nothing to do for the others."""
    for t in tensors:
        if hasattr(t, 'whole'):
            t.grad = t.whole.grad.to_local()
            t.whole.grad = None


def as_whole(tensor, like):
    """Return the DTensor of a local tensor that lies like `like`; a tensor of an unsharded model as it is."""
    whole = getattr(like, 'whole', None)
    if whole is None or not tensor.dim():
        return tensor
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(tensor.to(whole.device), whole.device_mesh, whole.placements, shape=whole.shape,
                              stride=whole.stride())


def full(tensor, like=None):
    """Return the full tensor, gathered from all ranks (all must call) where it is sharded."""
    tensor = as_whole(tensor, like)
    if not hasattr(tensor, 'full_tensor'):
        return tensor
    if tensor.dtype == torch.bool:                          # gloo gathers no bool
        return full(tensor.to(torch.uint8)).bool()
    return tensor.full_tensor()


def part(tensor, like):
    """Return this rank's part of a full tensor, on the device of `like`."""
    if not tensor.dim():
        return tensor
    whole = getattr(like, 'whole', None)
    if whole is None:
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor
    mesh = whole.device_mesh
    tensor = tensor.to(mesh.device_type)
    distributed = distribute_tensor(tensor, mesh, whole.placements, src_data_rank=None)
    return distributed.to_local().to(like.device).clone()


def optimizer_state(optimizer, likes, view):
    """Return an optimiser's state_dict with view(tensor, like) of its tensors; likes: a local tensor per parameter."""
    return viewed(optimizer.state_dict(), likes, view)


def load_optimizer(optimizer, saved, likes):
    """Load a state_dict of full tensors."""
    optimizer.load_state_dict(viewed(saved, likes, part))


def viewed(saved, likes, view):
    """Return a copy of an optimiser's state_dict with view(tensor, like) in place of each tensor."""
    state = {}
    for i, moments in saved['state'].items():
        state[i] = {key: view(tensor, likes[i]) for key, tensor in moments.items()}
    return dict(saved, state=state)


def parameters_of(optimizer):
    """The parameters of an optimiser in the order of its state_dict."""
    return [t for group in optimizer.param_groups for t in group['params']]


def norm_of(tensors, env):
    """Euclidean norm over all gradients, and over the ranks where they are sharded."""
    norm = torch.nn.utils.get_total_norm([t.grad for t in tensors])
    if hasattr(tensors[0], 'whole'):
        norm = env.sum(norm.square()).sqrt()
    return norm


def held_bytes(tensors, optimizers):
    """Bytes that this rank holds: local tensors, and the tensors and state of optimisers."""
    held = list(tensors)
    for optimizer in optimizers:
        held += parameters_of(optimizer)
        for moments in optimizer.state.values():
            held += [t for t in moments.values() if torch.is_tensor(t)]
    once = {id(t): t for t in held}
    return sum(t.numel() * t.element_size() for t in once.values())


# --- sharded checkpoints: each rank writes its part ---

def _pull_out(tree, key, tensors):
    """Copy a nested dict or list, with tensors replaced by ('tensor', key) and collected in tensors."""
    if isinstance(tree, torch.Tensor):
        tensors[key] = tree
        return 'tensor', key
    if isinstance(tree, dict):
        return {k: _pull_out(v, f'{key}/{k}', tensors) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_pull_out(v, f'{key}/{i}', tensors) for i, v in enumerate(tree)]
    return tree


def _put_back(tree, tensors):
    """Undo _pull_out: return the tree with the tensors in their places."""
    if isinstance(tree, tuple) and len(tree) == 2 and tree[0] == 'tensor':
        return tensors[tree[1]]
    if isinstance(tree, dict):
        return {k: _put_back(v, tensors) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_put_back(v, tensors) for v in tree]
    return tree


def save_sharded(folder, checkpoint):
    """Write a checkpoint whose tensors may be DTensors as a folder; all ranks call it, rank 0 writes the rest."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    tensors = {}
    rest = _pull_out(checkpoint, '', tensors)
    try:
        dcp.save(tensors, checkpoint_id=folder)
    except CheckpointException as e:
        # It holds what failed on each rank, and is no Exception: nothing that catches errors would catch it.
        failures = [f'rank {rank}: {error}' for rank, (error, _) in sorted(e.failures.items())]
        raise OSError('; '.join(failures)) from None

    # Each rank reads back what it has written itself: the files of all would be too much for one.
    rank = dist.get_rank()
    names = [name for name in os.listdir(folder) if name.startswith(f'__{rank}_')]
    if rank == 0:
        torch.save(rest, os.path.join(folder, 'rest.pt'))
        names += ['rest.pt', untrusted.METADATA]
    checksums = {name: untrusted.crc_of(os.path.join(folder, name)) for name in names}
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, checksums)
    if rank == 0:
        for others in gathered:
            checksums.update(others)
        untrusted.write_checksums(folder, checksums)


def load_sharded(folder):
    """Read a folder of save_sharded as one dict of full tensors, in any number of processes; no code in it is run."""
    untrusted.check_checksums(folder)
    rest = untrusted.load_zip(os.path.join(folder, 'rest.pt'))
    layouts = untrusted.read_metadata(folder)
    tensors = {key: untrusted.read_tensor(folder, layout) for key, layout in layouts.items()}
    return _put_back(rest, tensors)
