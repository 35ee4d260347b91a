"""Is a comparison of runs fair? Every setting of several run.json side by side, and what differs beside the data."""
import glob
import os

from configurator import UserError, knobs_of, require

DATA = ('dataset', 'data_mix', 'stop_when', 'data sha256', 'unique training tokens')    # may differ: the question asked
NEUTRAL = ('out_dir experiment_name overwrite check tokens_per_second data_dir verify log_every log_interval '
           'final_train_blocks checkpoint_time max_runtime keep_last sharded_ckpt wandb_log '
           'wandb_project').split()                                     # change no weight
FACTS = ('n_params', 'seq_length', 'n_steps', 'tokens_seen', 'commit')


def settings(record, knobs):
    """Return {name: value} of one run: its knobs, its data, what it came to."""
    data = record.get('data', {})
    found = {name: record[name] for name in sorted(knobs) if name in record and name not in NEUTRAL}
    if found.get('init_from') == 'resume':                              # a run that was interrupted is no other run
        found['init_from'] = 'scratch'
    return {'status': record.get('status', ''), **found, 'data sha256': data.get('sha256', '')[:16],
            'tokenizer': data.get('tokenizer', ''), 'unique training tokens': data.get('n_tokens', ''),
            **{name: record.get(name, '') for name in FACTS}}


def side_by_side(records, allow=''):
    """Return ([{setting, verdict, path: value, ...}], names that make the comparison unfair), differences first.

    records: {path: run.json}. allow: names that may differ beside the data's own, comma-separated.
    """
    missing = [path for path, record in records.items() if not record]
    require((len(records) > 1, f'compare takes at least 2 run folders, got {len(records)}'),
            (not missing, f'no run.json in {", ".join(missing)}; name run folders, as in compare out/a out/b'))
    allowed = [name.strip() for name in allow.split(',') if name.strip()]
    scripts = glob.glob(os.path.join(os.path.dirname(os.path.abspath(__file__)), '*.py'))
    knobs = set().union(*(knobs_of(path)[0] for path in scripts))
    if unknown := set(allowed) - knobs - set(FACTS) - {'status', 'tokenizer'}:
        raise UserError(f'allow names {", ".join(sorted(unknown))}, expected settings such as seed or commit')
    columns = {path: settings(record, knobs) for path, record in records.items()}
    rows = []
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        values = {path: column.get(name, '') for path, column in columns.items()}
        same = len({repr(v) for v in values.values()}) == 1 and (name != 'status' or 'done' in values.values())
        verdict = '' if same else 'data' if name in DATA else 'allowed' if name in allowed else 'DIFFERS'
        shown = {path: f'{v:.6g}' if isinstance(v, float) else str(v) for path, v in values.items()}
        rows.append({'setting': name, 'verdict': verdict, **shown})
    rows.sort(key=lambda row: ('DIFFERS', 'data', 'allowed', '').index(row['verdict']))
    return rows, [row['setting'] for row in rows if row['verdict'] == 'DIFFERS']
