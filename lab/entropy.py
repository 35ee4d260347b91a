"""Ask what each token of some rows costs a model, by its loss, by two windows, and with its memory taken away.

    python -m lab.entropy --from_ckpt=out/RUN --max_rows=8
    python -m lab.entropy --from_ckpt=out/memory,out/oracle --dataset=wikitext103 --split=val

In: checkpoints, data set. Out: OUT_DIR/{run.json, table.md, table.csv, entropy.csv}: a row of means for each model, and
a line of entropy.csv for each token. One process, nothing is trained.

With S(t) the nats of tokens 1..t by a model that reads just these, two_window_nats of token t is S(t) - S(t-1), by the
chain rule H(t|<t) = H(<=t) - H(<t): two windows, one token apart (Badger & Neligeorge, arXiv 2511.10618). It is exact
for the model and takes T forwards a row. Of a causal model, a memory model of chunks too, it is the loss; of an oracle,
whose decoder is given a vector of the whole window, what one more token adds, the cost of the vector being the same in
both; an oracle that was trained on whole rows only is asked here about shorter ones.
Occlusion, of models with a memory, compares outputs with the vectors and with zeros in their place, two forwards:
occlusion_nats is the loss without minus the loss with, what the memory told of a token; occlusion_l1 and
occlusion_cosine are distances of the logits, sum |a - b| and 1 - cos(a, b).
"""
import csv
import os
import time
from itertools import islice

from configurator import at_least, configure, names_in, require

# -----------------------------------------------------------------------------
from_ckpt = ''                  # models: run folders, files, Hugging Face folders, hub ids, comma-separated
out_dir = 'out/entropy'
overwrite = False               # replace what is in out_dir
device = 'auto'                 # 'auto', 'cuda', 'mps', 'cpu'
dtype = 'auto'                  # 'auto', 'float32', 'bfloat16', 'float16'
data_dir = 'data'
dataset = ''                    # '' = the one that the models were trained on
split = 'test'
verify = False                  # check the SHA-256 of the data first
max_rows = 8                    # leading rows of the split; 0 = all
block_size = 0                  # tokens of a row; 0 = the model's own
# -----------------------------------------------------------------------------
config = configure(globals())

import torch
from tqdm import tqdm

import score
from corpus.data import open_split
from corpus.objectives import with_objective
from lab.probe import common_dataset, fit_rules, names_of, write_table
from training.checkpoint import load_checkpoint, load_model
from training.folder import RunRecord, close_run_folders, commit_run_folders, open_run_folder
from training.process import Env

OCCLUSION = ('occlusion_nats', 'occlusion_l1', 'occlusion_cosine')
SHOWN = ('encoder', 'data', 'rows', 'tokens', 'loss_nats', 'two_window_nats', *OCCLUSION, 'seconds')
COLUMNS = ('encoder', 'row', 'position', 'token', 'loss_nats', 'two_window_nats', *OCCLUSION)       # of entropy.csv


def row_length_of(path, checkpoint, data, dataset, split, block_size):
    """Return how many tokens the rows of a model have, after a look at whether it can be asked about the data."""
    args = checkpoint['model_args']
    wrapper = args.get('wrapper', '')
    longest = args['block_size']
    T = block_size or data.row_length or longest
    require(*fit_rules(path, checkpoint, data, dataset, T, longest),
            (data.n_tokens > 0, f'{dataset!r} has an empty {split} split'),
            (wrapper != 'autoencoder', f'{path} is an autoencoder, which predicts no next token; name a language model,'
             ' or ask python -m lab.probe what its vector holds'),
            (not wrapper or T == longest, f'block_size = {T}, {path} takes rows of {longest}'))
    return T


def costs_of_rows(model, data, T, max_rows, env, name):
    """Return what each token of the leading rows of data costs, as lines of entropy.csv; max_rows = 0: of all rows."""
    lines = []
    starts = [start for start, _ in islice(score.windows(data.n_tokens, T), max_rows or None)]
    for n, start in enumerate(tqdm(starts, name, unit='row', leave=False)):
        x, y = data.gather([start], T)
        with torch.no_grad(), env.autocast():
            costs = score.token_costs(model, env.put(x), env.put(y))
        for position, token in enumerate(y[0].tolist()):
            if token >= 0:
                of_token = {key: float(cost[0, position]) for key, cost in costs.items()}
                lines.append(dict(encoder=name, row=n, position=position, token=token, **of_token))
    return lines


def means_of(lines):
    """Return the mean cost of a token, by every measure that the lines have."""
    measures = [name for name in COLUMNS[4:] if name in lines[0]]
    return {name: sum(line[name] for line in lines) / len(lines) for name in measures}


if __name__ == '__main__':
    # 1. What is asked for.
    config.pop('overwrite')
    paths = names_in(from_ckpt)
    require((paths, 'from_ckpt is empty; name models, --from_ckpt=out/RUN,gpt2'),
            at_least('max_rows', max_rows, 0), at_least('block_size', block_size, 0))
    env = Env(device, dtype)
    require((env.world == 1, 'lab.entropy runs in one process; drop torchrun'))

    # 2. The models, and the data that they are asked about.
    checkpoints = [load_checkpoint(path) for path in paths]
    dataset_name = common_dataset(checkpoints, dataset)
    data = open_split(data_dir, dataset_name, split, verify)
    lengths = [row_length_of(path, checkpoint, data, dataset_name, split, block_size)
               for path, checkpoint in zip(paths, checkpoints)]
    open_run_folder(out_dir, overwrite, parents=paths)
    record = RunRecord(out_dir, config, env)

    # 3. One after the other, token by token.
    rows = []
    lines = []
    for path, name, checkpoint, T in zip(paths, names_of(paths), checkpoints, lengths):
        started = time.monotonic()
        model, _ = load_model(path, env.device, checkpoint)
        wrapper = model.config.wrapper
        rows_of_model = with_objective(data, 'memory' if wrapper else 'clm', wrapper)
        of_model = costs_of_rows(model.eval(), rows_of_model, T, max_rows, env, name)
        lines += of_model
        rows.append(dict(encoder=name, data=f'{dataset_name}/{split}', rows=of_model[-1]['row'] + 1,
                         tokens=len(of_model), **means_of(of_model), seconds=round(time.monotonic() - started, 1)))
        record.update(rows=rows)

    # 4. The table, and a line for each token.
    with open(os.path.join(out_dir, 'entropy.csv'), 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, COLUMNS, restval='')
        writer.writeheader()
        writer.writerows(lines)
    print(f'{write_table(out_dir, rows, SHOWN)}\nwrote {out_dir}')
    commit_run_folders()
    record.update(status='done')
    close_run_folders()
