"""lab/harness.py: log-likelihoods against one forward per token, and through lm_eval itself on a small offline task."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import OneProcess, run_here

from configurator import UserError
from lab import harness
from model import GPT, ModelConfig, model_args
from training.checkpoint import load_model, save_checkpoint
from training.folder import read_run

T = 24


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A byte-level GPT-2-like checkpoint, far from uniform; returns (path, model)."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(block_size=T, n_layer=2, n_head=2, n_embd=16, positions='learned', activation='gelu_tanh'))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    path = tmp_path_factory.mktemp('harness') / 'ckpt.pt'
    save_checkpoint(str(path), dict(model=model.state_dict(), model_args=model_args(model), masks={}, config={},
                                         data=dict(dataset='', sha256='', tokenizer='byte', start_id=10)))
    return str(path), model.eval()


def asked(*args):
    return [SimpleNamespace(args=a) for a in args]


@torch.no_grad()
def nats(model, context, target):
    return float(model(torch.tensor([list(context)]))[0, -1].double().log_softmax(-1)[target])


@pytest.mark.parametrize('rows', [1, 3])
def test_scores_are_one_forward_per_token(saved, rows):
    """Contexts long and short, empty, with spaces at the end; continuations of several bytes; greedy or not."""
    path, model = saved
    scorer = harness.Scorer(*load_model(path), OneProcess(), rows, 256, path)
    pairs = [('one two', ' three'), ('', 'abc'), ('x' * 50, ' yz'), ('a b ', 'c'), ('é', 'ü')]
    best = bytes([int(model(torch.tensor([[10, 97]]))[0, -1].argmax())]).decode('latin-1')
    found = scorer.loglikelihood(asked(*pairs, ('\na', best)))
    for (context, continuation), (value, _) in zip(pairs, found):
        continuation = context[len(context.rstrip()):] + continuation       # as lm_eval does: tokens begin with a space
        ids, expected = list(context.rstrip().encode()) or [10], 0.0
        for i, target in enumerate(continuation.encode()):
            whole = ids + list(continuation.encode()[:i])
            left = len(ids) + len(continuation.encode()) - 1 - T        # a row's window is that of its last token
            expected += nats(model, whole[max(0, left):], target)
        assert value == pytest.approx(expected, abs=1e-4)
    assert [greedy for _, greedy in found][-1] == (ord(best) < 128)
    text = 'All of this is scored once, in rows of 24.'
    rolled, none = scorer.loglikelihood_rolling(asked((text,), ('',)))
    ids = [10, *text.encode()]
    assert none == 0 and rolled == pytest.approx(
        sum(nats(model, ids[t // T * T:t + 1], ids[t + 1]) for t in range(len(ids) - 1)), abs=1e-4)


def test_generation_is_greedy_and_stops(saved):
    """Bytes of highest probability, cut before the stop string."""
    path, model = saved
    scorer, ids, text = harness.Scorer(*load_model(path), OneProcess(), 2, 256, path), list(b'\nab'), b''
    with torch.no_grad():
        for _ in range(6):
            text += bytes([int(model(torch.tensor([ids + list(text)]))[0, -1].argmax())])
    expected = text.decode('utf-8', 'replace')
    whole, cut = scorer.generate_until(asked(('ab', dict(max_gen_toks=6, until=[]))) + asked(
        ('ab', dict(max_gen_toks=6, until=[expected[1]]))))
    assert whole == expected and cut == expected[:expected.index(expected[1])]


def test_refusals(saved, tmp_path):
    """One line each."""
    for flags, words in (((), 'from_ckpt is empty'), ((f'--from_ckpt={saved[0]}',), 'tasks is empty'),
                         ((f'--from_ckpt={saved[0]}', '--tasks=a', '--task_folder=none'), 'is no folder')):
        with pytest.raises(UserError, match=words):
            run_here('lab/harness.py', *flags)


def test_through_lm_eval(saved, tmp_path, capsys, monkeypatch):
    """A multiple-choice and a perplexity task from local files: the numbers of lm_eval's own hf model on the export."""
    lm_eval = pytest.importorskip('lm_eval')
    pytest.importorskip('transformers')
    monkeypatch.chdir(tmp_path)
    rows = [dict(question=f'{i} and {i} is', choices=[f' {2 * i}', f' {3 * i + 1}', ' none'], answer=i % 3,
                 text=f'a text, number {i}') for i in range(6)]
    (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    common = f'dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\ntest_split: test\n'
    (tmp_path / 'choice.yaml').write_text(f'task: tiny_choice\noutput_type: multiple_choice\n{common}' + '''
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
''')
    (tmp_path / 'text.yaml').write_text(f'task: tiny_text\noutput_type: loglikelihood_rolling\n{common}' + '''
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
''')
    argv = ['--tasks=tiny_choice,tiny_text', f'--task_folder={tmp_path}', '--device=cpu', '--out_dir=o']
    assert run_here('lab/harness.py', f'--from_ckpt={saved[0]}', *argv) == 0
    assert 'tiny_choice' in capsys.readouterr().out
    mine = read_run('o')
    with pytest.raises(UserError, match="knows no task 'nothing'"):
        run_here('lab/harness.py', f'--from_ckpt={saved[0]}', *argv, '--tasks=nothing')
    pytest.importorskip('accelerate')               # what lm_eval's own hf model needs
    run_here('runs.py', 'export', saved[0], 'hf')
    theirs = lm_eval.simple_evaluate('hf', model_args=dict(
        pretrained='hf', device='cpu', dtype='float32', prefix_token_id=10),
        tasks=['tiny_choice', 'tiny_text'], bootstrap_iters=0, task_manager=lm_eval.tasks.TaskManager(
            include_path=str(tmp_path), include_defaults=False))['results']
    assert mine['tiny_choice/acc,none'] == theirs['tiny_choice']['acc,none']
    assert mine['tiny_text/bits_per_byte,none'] == pytest.approx(theirs['tiny_text']['bits_per_byte,none'], rel=1e-4)
