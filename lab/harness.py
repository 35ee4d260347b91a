"""Evaluate a checkpoint on the tasks of lm_eval, EleutherAI's harness, as it stands: no conversion, no transformers.

    python -m lab.harness --from_ckpt=out/gpt2_distil6 --tasks=lambada_openai,hellaswag      pip install lm_eval first
    python -m lab.harness --from_ckpt=gpt2 --tasks=mine --task_folder=tasks --limit=100       own tasks: tasks/*.yaml

In: a checkpoint, run folder, Hugging Face folder or hub id; its tokenizer. Out: lm_eval's table, and OUT_DIR/run.json
with its results. `python runs.py export` gives a folder for lm_eval's own `hf` model; the numbers are the same.
"""
import os

from configurator import UserError, at_least, configure, require, run

# -----------------------------------------------------------------------------
from_ckpt = ''                  # checkpoint file, run folder, Hugging Face folder or hub id
tasks = ''                      # names of lm_eval tasks, comma-separated
task_folder = ''                # folder with the YAML files of tasks, instead of lm_eval's own
num_fewshot = -1                # examples before each question; -1 = as the task says
limit = 0                       # leading documents of each task; 0 = all
batch_size = 8                  # rows per forward
max_new_tokens = 256            # of tasks that generate, where they do not say themselves
out_dir = 'out/harness'
device = 'auto'
dtype = 'auto'
# -----------------------------------------------------------------------------


def tokens_of(checkpoint):
    """Return (encode: str -> ids, decode: ids -> str) of a checkpoint's tokenizer."""
    from codec.text import byte_strings
    from corpus.tokens import tokenizer_folder
    name = checkpoint['data']['tokenizer']
    if name == 'byte':
        return (lambda text: list(text.encode())), (lambda ids: bytes(ids).decode('utf-8', 'replace'))
    folder = tokenizer_folder(checkpoint)
    require((name == 'gpt2' or folder, f'no tokenizer.json of {name!r} was found beside {from_ckpt} or its data set'))
    strings, encode = byte_strings('gpt2' if name == 'gpt2' else os.path.join(folder, 'tokenizer.json'))
    return encode, lambda ids: b''.join(strings[i] for i in ids).decode('utf-8', 'replace')


class Scorer:
    """What lm_eval asks of a language model: requests carry .args; batches are of rows of like length."""

    def __init__(self, model, checkpoint, env, rows):
        self.model, self.env, self.rows = model.eval(), env, rows
        self.start, self.size = checkpoint['data']['start_id'], model.config.block_size
        self.encode, self.decode = tokens_of(checkpoint)

    def scores(self, pairs):
        """Return [(log-probability in nats, greedy would say so)] of pairs (inputs, targets), ids of one length <= T.

        Only the last len(targets) outputs are scored; inputs may be longer.
        """
        import numpy as np
        import torch
        from tqdm import tqdm
        order, found = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0])), {}
        for first in tqdm(range(0, len(order), self.rows), 'scoring', disable=not self.env.main, leave=False):
            batch = order[first:first + self.rows]
            x = np.zeros((len(batch), len(pairs[batch[0]][0])), np.int64)       # padded behind: nothing sees that
            for row, i in zip(x, batch):
                row[:len(pairs[i][0])] = pairs[i][0]
            with torch.inference_mode(), self.env.autocast():
                logits = self.model(self.env.put(x))
            for row, i in zip(logits, batch):
                inputs, targets = pairs[i]
                told = row[len(inputs) - len(targets):len(inputs)].float().log_softmax(-1).cpu()
                right = torch.tensor(targets)
                nats = told.gather(1, right[:, None]).sum(dtype=torch.float64)
                found[i] = float(nats), bool((told.argmax(-1) == right).all())
        return [found[i] for i in range(len(pairs))]

    def loglikelihood(self, requests, disable_tqdm=False):
        """Score continuations; a context keeps its last tokens, spaces at its end belong to the continuation."""
        pairs = []
        for context, continuation in (request.args for request in requests):
            stripped = context.rstrip()
            continuation = context[len(stripped):] + continuation
            before, whole = self.encode(stripped), self.encode(stripped + continuation)
            before = before or [self.start]
            whole = whole if stripped else [self.start, *whole]
            targets = whole[len(before):][-self.size:]
            pairs.append((whole[-self.size - 1:-1], targets))
        return self.scores(pairs)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Score whole texts, every token once, in rows that begin with the token before them."""
        texts = [[self.start, *self.encode(request.args[0])] for request in requests]
        pieces = [(i, ids[at:at + self.size + 1]) for i, ids in enumerate(texts)
                  for at in range(0, len(ids) - 1, self.size)]
        totals = [0.0] * len(texts)
        for (i, _), (nats, _) in zip(pieces, self.scores([(ids[:-1], ids[1:]) for _, ids in pieces])):
            totals[i] += nats
        return totals

    def generate_until(self, requests, disable_tqdm=False):
        """Continue each context greedily up to a stop string or max_gen_toks; the model sees the last T tokens."""
        import torch
        texts = []
        for context, how in (request.args for request in requests):
            until, n, text = how.get('until') or [], how.get('max_gen_toks', max_new_tokens), ''
            require((not how.get('do_sample') or not how.get('temperature'), 'a task asks for sampling; lab/harness.py'
                     ' generates greedily'))
            ids, new = [self.start, *self.encode(context)], []
            while len(new) < n and not any(stop in text for stop in until):
                window = (ids + new)[-self.size:]
                with torch.inference_mode(), self.env.autocast():
                    new.append(int(self.model(torch.tensor([window], device=self.env.device))[0, -1].argmax()))
                if new[-1] == self.start and self.start != 10:          # end of text; of bytes it is a newline
                    new.pop()
                    break
                text = self.decode(new)
            texts.append(text[:min((text.index(stop) for stop in until if stop in text), default=len(text))])
        return texts


def main(argv=None):
    config = configure(globals(), argv)
    require((from_ckpt != '', 'from_ckpt is empty; name a checkpoint, --from_ckpt=out/RUN'),
            (tasks != '', 'tasks is empty; name some of lm_eval, --tasks=lambada_openai,hellaswag'),
            at_least('limit', limit, 0), at_least('batch_size', batch_size, 1),
            (not task_folder or os.path.isdir(task_folder), f'task_folder = {task_folder!r} is no folder'))
    try:
        import lm_eval
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as e:
        raise UserError(f'lm_eval is not here ({e}); pip install lm_eval') from None
    import runs
    env = runs.Env(device, dtype)
    model, checkpoint = runs.load_model(from_ckpt, env.device)

    class Checkpoint(Scorer, LM):
        def __init__(self):
            LM.__init__(self)
            Scorer.__init__(self, model, checkpoint, env, batch_size)

    known = TaskManager(include_path=task_folder or None, include_defaults=not task_folder)
    names = [name.strip() for name in tasks.split(',')]
    missing = [name for name in names if not known.match_tasks([name])]
    require((not missing, f'lm_eval knows no task {", ".join(map(repr, missing))}; name its folder, --task_folder=DIR,'
             ' or see lm_eval ls tasks'))
    os.makedirs(out_dir, exist_ok=True)
    record = runs.RunRecord(out_dir, config, env, parent=runs.parent_of(from_ckpt))
    found = lm_eval.simple_evaluate(Checkpoint(), tasks=names, task_manager=known, limit=limit or None,
                                    num_fewshot=None if num_fewshot < 0 else num_fewshot, bootstrap_iters=0)
    print(make_table(found))
    record.update(status='done', **{f'{task}/{metric}': value for task, values in found['results'].items()
                                    for metric, value in values.items() if isinstance(value, (int, float))})
    print(f'wrote {record.path}')
    return 0


if __name__ == '__main__':
    run(main)
