"""Evaluate a checkpoint on the tasks of lm_eval, EleutherAI's harness, as it stands: no conversion, no transformers.

    python -m lab.harness --from_ckpt=out/gpt2_distil6 --tasks=lambada_openai,hellaswag      pip install lm_eval first
    python -m lab.harness --from_ckpt=gpt2 --tasks=mine --task_folder=tasks --limit=100       own tasks: tasks/*.yaml

In: a checkpoint, run folder, Hugging Face folder or hub id; its tokenizer. Out: lm_eval's table, and OUT_DIR/run.json
with its results. `python runs.py export` gives a folder for lm_eval's own `hf` model; the numbers are the same.
"""
import os

from configurator import UserError, at_least, configure, names_in, require

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


def rules(k):
    """Return what must hold of the knobs, as require takes it."""
    return [(k.from_ckpt != '', 'from_ckpt is empty; name a checkpoint, --from_ckpt=out/RUN'),
            (names_in(k.tasks), 'tasks is empty; name some of lm_eval, --tasks=lambada_openai,hellaswag'),
            at_least('limit', k.limit, 0),
            at_least('batch_size', k.batch_size, 1),
            (not k.task_folder or os.path.isdir(k.task_folder), f'task_folder = {k.task_folder!r} is no folder')]


config = configure(globals(), rules=rules)

import numpy as np
import torch
from tqdm import tqdm

from codec.text import byte_strings
from corpus.tokens import tokenizer_folder
from training.checkpoint import load_model, parent_of
from training.folder import RunRecord
from training.process import Env


def tokens_of(checkpoint, path):
    """Return (encode: str -> ids, decode: ids -> str) of the tokenizer of the checkpoint at path."""
    name = checkpoint['data']['tokenizer']
    if name == 'byte':
        return (lambda text: list(text.encode())), (lambda ids: bytes(ids).decode('utf-8', 'replace'))
    folder = tokenizer_folder(checkpoint)
    require((name == 'gpt2' or folder, f'no tokenizer.json of {name!r} was found beside {path} or its data set'))
    strings, encode = byte_strings('gpt2' if name == 'gpt2' else os.path.join(folder, 'tokenizer.json'))

    def decode(ids):
        return b''.join(strings[i] for i in ids).decode('utf-8', 'replace')

    return encode, decode


class Scorer:
    """What lm_eval asks of a language model: requests carry .args; batches are of rows of like length.

    path: of the checkpoint. rows: of a forward. max_new_tokens: of tasks that generate, where they do not say
    themselves.
    """

    def __init__(self, model, checkpoint, env, rows, max_new_tokens, path):
        self.model = model.eval()
        self.env = env
        self.rows = rows
        self.max_new_tokens = max_new_tokens
        self.start = checkpoint['data']['start_id']
        self.size = model.config.block_size
        self.encode, self.decode = tokens_of(checkpoint, path)

    def scores(self, pairs):
        """Return [(log-probability in nats, greedy would say so)] of pairs (inputs, targets), ids of one length <= T.

        Only the last len(targets) outputs are scored; inputs may be longer.
        """
        by_length = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))
        results = {}
        for first in tqdm(range(0, len(by_length), self.rows), 'scoring', disable=not self.env.main, leave=False):
            batch = by_length[first:first + self.rows]

            # The first row is the longest. The others are padded behind, where nothing sees it.
            longest, _ = pairs[batch[0]]
            x = np.zeros((len(batch), len(longest)), np.int64)
            for row, i in zip(x, batch):
                inputs, _ = pairs[i]
                row[:len(inputs)] = inputs
            with torch.inference_mode(), self.env.autocast():
                logits = self.model(self.env.put(x))                            # (B, T, V)
            for row, i in zip(logits, batch):
                inputs, targets = pairs[i]
                results[i] = score_of(row[len(inputs) - len(targets):len(inputs)], targets)
        return [results[i] for i in range(len(pairs))]

    def loglikelihood(self, requests):
        """Score continuations; a context keeps its last tokens, spaces at its end belong to the continuation."""
        pairs = []
        for request in requests:
            context, continuation = request.args
            stripped = context.rstrip()
            continuation = context[len(stripped):] + continuation
            before = self.encode(stripped) or [self.start]
            whole = self.encode(stripped + continuation)
            if not stripped:
                whole = [self.start, *whole]
            targets = whole[len(before):][-self.size:]
            inputs = whole[-self.size - 1:-1]
            pairs.append((inputs, targets))
        return self.scores(pairs)

    def loglikelihood_rolling(self, requests):
        """Score whole texts, every token once, in rows that begin with the token before them."""
        text_of_row = []
        pairs = []
        for i, request in enumerate(requests):
            text, = request.args
            ids = [self.start, *self.encode(text)]
            for at in range(0, len(ids) - 1, self.size):
                piece = ids[at:at + self.size + 1]
                text_of_row.append(i)
                pairs.append((piece[:-1], piece[1:]))
        totals = [0.0] * len(requests)
        for i, (nats, _) in zip(text_of_row, self.scores(pairs)):
            totals[i] += nats
        return totals

    def generate_until(self, requests):
        """Continue each context greedily up to a stop string or max_gen_toks; the model sees the last T tokens."""
        texts = []
        for request in requests:
            context, options = request.args
            samples = options.get('do_sample') and options.get('temperature')
            require((not samples, 'a task asks for sampling; lab/harness.py generates greedily'))
            until = options.get('until') or []
            text = self.continued(context, until, options.get('max_gen_toks', self.max_new_tokens))
            ends = [text.index(stop) for stop in until if stop in text]
            texts.append(text[:min(ends, default=len(text))])
        return texts

    def continued(self, context, until, n_tokens):
        """Return the likeliest continuation of a context, of at most n_tokens, which may end behind a stop string."""
        ids = [self.start, *self.encode(context)]
        new = []
        text = ''
        while len(new) < n_tokens and not any(stop in text for stop in until):
            window = (ids + new)[-self.size:]
            with torch.inference_mode(), self.env.autocast():
                logits = self.model(torch.tensor([window], device=self.env.device))
            likeliest = int(logits[0, -1].argmax())
            if likeliest == self.start and self.start != 10:            # end of text; of bytes it is a newline
                break
            new.append(likeliest)
            text = self.decode(new)
        return text


def score_of(logits, targets):
    """Return the log-probability of targets (n) by logits (n, V), in nats, and whether all are the likeliest."""
    log_probabilities = logits.float().log_softmax(-1).cpu()
    targets = torch.tensor(targets)
    nats = log_probabilities.gather(1, targets[:, None]).sum(dtype=torch.float64)
    is_greedy = (log_probabilities.argmax(-1) == targets).all()
    return float(nats), bool(is_greedy)


def as_lm(scorer):
    """Return a scorer as what lm_eval takes for a model: an LM, whose questions the scorer answers."""
    from lm_eval.api.model import LM

    class Checkpoint(LM):
        def loglikelihood(self, requests, disable_tqdm=False):
            return scorer.loglikelihood(requests)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            return scorer.loglikelihood_rolling(requests)

        def generate_until(self, requests, disable_tqdm=False):
            return scorer.generate_until(requests)

    return Checkpoint()


def known_tasks(names, folder):
    """Return lm_eval's manager of its own tasks, or of those of a folder; UserError where it does not know a name."""
    from lm_eval.tasks import TaskManager
    known = TaskManager(include_path=folder or None, include_defaults=not folder)
    missing = [name for name in names if not known.match_tasks([name])]
    require((not missing, f'lm_eval knows no task {", ".join(map(repr, missing))}; name its folder, --task_folder=DIR,'
             ' or see lm_eval ls tasks'))
    return known


def numbers_of(results):
    """Return {task/metric: number} of lm_eval's results."""
    numbers = {}
    for task, metrics in results.items():
        for metric, value in metrics.items():
            if isinstance(value, (int, float)):
                numbers[f'{task}/{metric}'] = value
    return numbers


if __name__ == '__main__':
    try:
        import lm_eval
        from lm_eval.utils import make_table
    except ImportError as e:
        raise UserError(f'lm_eval is not here ({e}); pip install lm_eval') from None
    env = Env(device, dtype)
    model, checkpoint = load_model(from_ckpt, env.device)
    scorer = Scorer(model, checkpoint, env, batch_size, max_new_tokens, from_ckpt)
    lm = as_lm(scorer)
    names = names_in(tasks)
    known = known_tasks(names, task_folder)

    # From here on the folder is ours.
    os.makedirs(out_dir, exist_ok=True)
    record = RunRecord(out_dir, config, env, parent=parent_of(from_ckpt))
    results = lm_eval.simple_evaluate(lm, tasks=names, task_manager=known, limit=limit or None,
                                      num_fewshot=None if num_fewshot < 0 else num_fewshot, bootstrap_iters=0)
    print(make_table(results))
    record.update(status='done', **numbers_of(results['results']))
    print(f'wrote {record.path}')
