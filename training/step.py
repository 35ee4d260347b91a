"""The pieces of a training step that every trainer shares, in the order in which it takes them.

accumulate → unscale → Run.reduce → mask → a procedure's edit → mask → norm → clip → update → forget_gradients. They
work on local tensors, so that one process, DDP and FSDP2 are the same code.
"""
import torch

from training.parallel import take_gradients

MAX_SKIPPED = 20                # fp16 steps with non-finite gradients in a row


def accumulate(forward, x, y, micro, share, env, scaler, set_sync, before_micro_batch=None):
    """Run forward and backward over this rank's rows, `micro` of them at a time; gradients add up.

    forward(x, y) gives a sum of losses over rows, or a vector whose first number is the one to minimise. share: what a
    sum is multiplied with before backward, ranks / scored tokens, as DDP and FSDP2 average over ranks.
    before_micro_batch(first row) is called before each. Returns the sums (1 or more numbers) over all rows.
    """
    total = 0
    for i in range(0, len(x), micro):
        if before_micro_batch:
            before_micro_batch(i)
        # Gradients travel between ranks once, after the last micro-batch.
        set_sync(i + micro >= len(x))
        with env.autocast():
            losses = forward(env.put(x[i:i + micro]), env.put(y[i:i + micro])).reshape(-1)
        scaler.scale(losses[0] * share).backward()
        total = total + losses.detach()
    return total


def unscale(optimizers, params, scaler, env, sharded):
    """Move gradients to the local tensors and take the fp16 scale out of them.

    sharded: an inf in one rank's part is everybody's, so that all ranks skip the step together.
    """
    take_gradients(params)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        if sharded and scaler.is_enabled():
            for flag in scaler._found_inf_per_device(optimizer).values():
                flag.copy_(env.sum(flag))


def clip(params, grad_clip, norm):
    """Scale gradients down to a norm of at most grad_clip, given what it is; 0 = never."""
    if grad_clip:
        torch.nn.utils.clip_grads_with_norm_(params, grad_clip, norm)


def update(optimizers, scaler):
    """Take the step of every optimiser, as the scaler allows."""
    for optimizer in optimizers:
        scaler.step(optimizer)


def forget_gradients(optimizers):
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
