"""The table of all runs, what one is doing, whether a comparison of some is fair; checkpoints in other forms.

    python runs.py                      gather out/*/run.json into runs.csv and print the table
    python runs.py --watch              the unfinished runs with their progress, until Ctrl-C
    python runs.py status OUT_DIR       exit 0 done, 85 paused, 1 failed or unfinished (what an sbatch file asks)
    python runs.py compare out/a out/b --allow=seed     exit 1 where anything but the data (and the seed) differs
    python runs.py convert OUT_DIR/ckpt.sharded OUT_DIR/ckpt.pt             a sharded checkpoint as one file
    python runs.py export OUT_DIR/ckpt.pt FOLDER    a GPT-2 as config.json, safetensors and tokenizer, for transformers
    python runs.py export_weights OUT_DIR FILE      weights (bfloat16) and masks alone, small, to go on elsewhere:
                                                    as OUT_DIR/ckpt.pt with --init_from=resume, or --init_from=FILE

A run writes only its own run.json; runs.csv is derived, rebuilt whole, never edited.
"""
from configurator import UserError, configure, knobs_of, names_in, require

# -----------------------------------------------------------------------------
out = 'out'                     # folder that holds the run folders
allow = ''                      # compare: settings that may differ beside the data, as seed,commit
csv_path = 'runs.csv'           # the table written; '' = print only
watch = False                   # print the table of unfinished runs again and again
watch_interval = 10.0           # seconds
overwrite = False               # export: replace the files of an earlier export in FOLDER
# -----------------------------------------------------------------------------
VERBS = dict(table=0, status=1, convert=2, export=2, export_weights=2, compare=-1)
verb, paths, config = configure(globals(), verbs=VERBS, default_verb='table')

import glob
import math
import os
import sys
import time

from training.checkpoint import load_checkpoint, save_checkpoint, sorted_names, weights_alone
from training.folder import alive, read_run, read_status, runs_here
from training.process import PAUSED
from training.table import markdown, write_csv

STATUS_CODES = {'done': 0, 'paused': PAUSED}
SHOWN = ('run_id', 'status', 'procedure', 'final_val_loss', 'test_bits_per_byte', 'non_zero_params', 'sparsity',
         'archive_bytes', 'training_runtime')
WATCHED = ('run_id', 'status', 'phase', 'step', 'n_steps', 'percent', 'train_loss', 'train_tokens_per_second',
           'hours_left', 'seconds_ago')

# What compare looks at. DATA may differ: that is the question asked. NEUTRAL knobs change no weight.
DATA = ('dataset', 'data_mix', 'stop_when', 'data sha256', 'unique training tokens')
NEUTRAL = ('out_dir', 'experiment_name', 'overwrite', 'check', 'data_dir', 'verify', 'log_every',
           'log_interval', 'final_train_blocks', 'checkpoint_time', 'max_runtime', 'keep_last', 'sharded_ckpt',
           'wandb_log', 'wandb_project')
FACTS = ('n_params', 'seq_length', 'n_steps', 'tokens_seen', 'commit')
VERDICTS = ('DIFFERS', 'data', 'allowed', '')                           # in the order of the table


# --- the table of runs ---

def gather(folder):
    """Read every run.json below folder; a run whose process died without a word (kill -9) has status 'killed'."""
    records = []
    for name in sorted_names(folder):
        record = read_run(os.path.join(folder, name))
        if runs_here(record) and not alive(record['pid']):
            record['status'] = 'killed'
        if record:
            records.append(record)
    return records


def print_table(folder, csv_path):
    """Print the table of all runs below a folder and write it to csv_path, if that is not ''."""
    records = gather(folder)
    if not records:
        raise UserError(f'no run.json below {folder!r}; train something first, or name the folder with --out=')
    if csv_path:
        write_csv(csv_path, records)
    print(markdown(records, SHOWN))


def unfinished(folder):
    """Rows of the runs below a folder that are not done: progress, hours left, seconds since they last wrote."""
    rows = []
    for record in gather(folder):
        path = os.path.join(folder, record.get('run_id', ''), 'run.json')
        if record.get('status') == 'done' or 'n_steps' not in record or not os.path.exists(path):
            continue
        step = record.get('step', 0)
        speed = record.get('train_tokens_per_second') or math.nan
        tokens_left = (record['n_steps'] - step) * record['batch_size'] * record['seq_length']
        rows.append(dict(
            record, step=step, percent=100 * step / record['n_steps'], hours_left=tokens_left / speed / 3600,
            seconds_ago=round(time.time() - os.path.getmtime(path))))
    return rows


def print_unfinished(folder):
    """Print the time and the runs below a folder that are not done."""
    rows = unfinished(folder)
    print(time.strftime('%H:%M:%S'))
    if rows:
        print(markdown(rows, WATCHED), flush=True)
    else:
        print(f'no unfinished run below {folder!r}', flush=True)


# --- is a comparison of runs fair? ---

def settings(record, knobs):
    """Return {name: value} of one run: its knobs, its data, what it came to."""
    data = record.get('data', {})
    values = {'status': record.get('status', '')}
    for name in sorted(knobs):
        if name in record and name not in NEUTRAL:
            values[name] = record[name]
    if values.get('init_from') == 'resume':             # a run that was interrupted is no other run
        values['init_from'] = 'scratch'
    values['data sha256'] = data.get('sha256', '')[:16]
    values['tokenizer'] = data.get('tokenizer', '')
    values['unique training tokens'] = data.get('n_tokens', '')
    for name in FACTS:
        values[name] = record.get(name, '')
    return values


def knobs_of_all_scripts():
    """Return the names of the knobs of all scripts of the repository."""
    here = os.path.dirname(os.path.abspath(__file__))
    knobs = set()
    for path in glob.glob(os.path.join(here, '*.py')) + glob.glob(os.path.join(here, 'lab', '*.py')):
        defaults, _ = knobs_of(path)
        knobs |= set(defaults)
    return knobs


def verdict_of(name, values, allowed):
    """Say what it means that runs have these values of a setting: '' the same, or one of VERDICTS."""
    same = len({repr(value) for value in values}) == 1
    if same and name == 'status' and 'done' not in values:
        same = False                                    # runs that have not ended cannot be compared
    if same:
        return ''
    if name in DATA:
        return 'data'
    return 'allowed' if name in allowed else 'DIFFERS'


def side_by_side(records, allowed=()):
    """Return ([{setting, verdict, path: value, ...}], names that make the comparison unfair), differences first.

    records: {path: run.json}. allowed: names that may differ beside the data's own.
    """
    missing = [path for path, record in records.items() if not record]
    require((len(records) > 1, f'compare takes at least 2 run folders, got {len(records)}'),
            (not missing, f'no run.json in {", ".join(missing)}; name run folders, as in compare out/a out/b'))
    knobs = knobs_of_all_scripts()
    unknown = set(allowed) - knobs - set(FACTS) - {'status', 'tokenizer'}
    if unknown:
        raise UserError(f'allow names {", ".join(sorted(unknown))}, expected settings such as seed or commit')

    # The names in the order in which the runs have them, each once.
    columns = {path: settings(record, knobs) for path, record in records.items()}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = []
    for name in names:
        values = {path: column.get(name, '') for path, column in columns.items()}
        row = dict(setting=name, verdict=verdict_of(name, list(values.values()), allowed))
        for path, value in values.items():
            row[path] = f'{value:.6g}' if isinstance(value, float) else str(value)
        rows.append(row)
    rows.sort(key=lambda row: VERDICTS.index(row['verdict']))
    return rows, [row['setting'] for row in rows if row['verdict'] == 'DIFFERS']


if __name__ == '__main__':
    # All runs, in one table; or the unfinished ones, again and again.
    if verb == 'table':
        while watch:
            print_unfinished(out)
            time.sleep(watch_interval)
        print_table(out, csv_path)

    # What a queue asks of one run.
    if verb == 'status':
        status = read_status(paths[0]) or 'no run.json'
        print(status)
        sys.exit(STATUS_CODES.get(status, 1))

    # Several runs, setting by setting.
    if verb == 'compare':
        rows, unfair = side_by_side({path: read_run(path) for path in paths}, names_in(allow))
        print(markdown(rows, list(rows[0])))
        if unfair:
            print(f'not fair: {", ".join(unfair)}')
            sys.exit(1)
        print('fair')
        sys.exit(0)

    # A checkpoint as one file, whole or without what only its own run needs; or as a folder for transformers.
    if verb in ('convert', 'export_weights'):
        source, target = paths
        checkpoint = load_checkpoint(source)
        if verb == 'export_weights':
            checkpoint = weights_alone(checkpoint)
        save_checkpoint(target, checkpoint)
        print(f'{target}: {os.path.getsize(target):,} bytes')
    if verb == 'export':
        from training import huggingface
        source, target = paths
        huggingface.export(load_checkpoint(source), source, target, overwrite)
