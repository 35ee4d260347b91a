"""distill.py and losses.py: the terms against their formulas, train.py to the last bit, ranks, resume, bad input."""
import csv
import json
import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, run_here, same, torchrun, write_dataset
from torch.utils._python_dispatch import TorchDispatchMode

import distill
import losses
import runs
import train
from configurator import UserError
from lab import bench
from model import GPT, ModelConfig, model_args

ZERO = dict.fromkeys(losses.TERMS, 0.0)


def gpt(seed=0, **options):
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**dict(block_size=16, vocab_size=61, n_layer=2, n_embd=24, n_head=2, positions='learned')
                            | options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def rows(seed=0, vocab_size=61):
    """Ids and targets (3, 16), some of them without a score."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(vocab_size, (3, 16), generator=g) for _ in 'xy')
    y[2, 5:] = -1
    return x, y


def plain_terms(student, teacher, x, y, tau, pairs):
    """The published formulas written out over the scored tokens, nothing in chunks."""
    scored = y >= 0
    outputs = [[], []]
    for model, kept in zip((student, teacher), outputs):
        for block in model.blocks:
            block.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out))
    s, h_s = student(x)[scored], student.hidden(x)[scored]
    t, h_t = teacher(x)[scored].detach(), teacher.hidden(x)[scored].detach()
    p, q = (t / tau).softmax(-1), (s / tau).softmax(-1)
    return torch.stack((
        F.cross_entropy(s, y[scored], reduction='sum'), tau ** 2 * (p * (p / q).log()).sum(), ((s - t) ** 2).sum(),
        (1 - F.cosine_similarity(h_s, h_t)).sum(),
        sum(((outputs[0][i] - outputs[1][j].detach())[scored] ** 2).mean(-1).sum() for i, j in pairs)))


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('chunk', [1, 7, 1000])
def test_terms_and_gradients_are_those_of_the_formulas(chunk, tied):
    """Every term alone and all together, whatever the chunk; gradients by plain autograd."""
    pairs = [(0, 1), (1, 3)]
    for term in (*losses.TERMS, ''):
        weights = ZERO | ({term: 1.0} if term else dict(clm=0.7, ce=1.3, mse=0.01, cos=2.0, hidden=0.5))
        found = []
        for reference in (False, True):
            student, teacher, (x, y) = gpt(1, tied=tied), gpt(2, n_layer=4, tied=tied), rows()
            if reference:
                terms = plain_terms(student, teacher, x, y, 1.7, pairs)
                loss = (terms * torch.tensor([weights[t] for t in losses.TERMS])).sum()
            else:
                teacher.requires_grad_(False)
                loss, terms = losses.Distillation(student, teacher, weights, 1.7, chunk, pairs)(x, y)
            (loss / 3).backward()
            found.append((loss.detach(), [p.grad if p.grad is not None else torch.zeros(1)
                                          for p in student.parameters()], terms.detach()))
        (a, grads_a, terms_a), (b, grads_b, terms_b) = found
        assert float(a) == pytest.approx(float(b), rel=1e-5)
        for i, name in enumerate(losses.TERMS):
            if weights[name]:
                assert float(terms_a[i]) == pytest.approx(float(terms_b[i]), rel=1e-5)
        for g, h in zip(grads_a, grads_b):
            assert torch.allclose(g, h, rtol=1e-4, atol=1e-6 * float(h.abs().max()) + 1e-9)


def test_a_teacher_that_is_the_student_teaches_nothing():
    """Exactly 0, not nearly: the distribution and the direction are the same."""
    student, teacher, (x, y) = gpt(1), gpt(1), rows()
    weights = dict.fromkeys(losses.TERMS, 1.0)
    terms = losses.Distillation(student, teacher, weights, 2.0, 7, [(0, 0), (1, 1)])(x, y)[1]
    assert terms[0] > 0 and terms[1:].tolist() == [0, 0, 0, 0]


class Largest(TorchDispatchMode):
    """Remember the most elements that any result of an operation has."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.n = max(self.n, t.numel())
        return out


def test_logits_never_exist_for_more_than_a_chunk():
    """Forward and backward: no tensor larger than chunk x V or the head itself, while all logits are 10 times that."""
    V, chunk = 5000, 16
    student, teacher = gpt(1, vocab_size=V, n_embd=8, block_size=64), gpt(2, vocab_size=V, n_embd=8, block_size=64)
    x = torch.randint(V, (4, 64))
    module = losses.Distillation(student, teacher.requires_grad_(False), dict.fromkeys(losses.TERMS, 1.0), 2.0, chunk)
    with Largest() as largest:
        module(x, x)[0].backward()
    assert chunk * V <= largest.n <= chunk * V + V * 8 < x.numel() * V / 10


# --- the script ---

@pytest.fixture(scope='module')
def teacher(toy, tmp_path_factory):
    """A run folder of 4 layers on toy, trained for a few steps."""
    folder = tmp_path_factory.mktemp('teacher') / 'run'
    train.main([*TINY, '--n_layer=4', f'--data_dir={toy}', '--dataset=toy', f'--out_dir={folder}', '--max_iters=15',
                '--final_train_blocks=0', '--positions=learned'])
    return str(folder)


@pytest.fixture
def distil(toy, tmp_path, teacher):
    """Call distill.main with tiny sizes; returns its exit status. Later flags win."""
    def call(*flags, out='run'):
        return distill.main([*TINY, f'--data_dir={toy}', '--dataset=toy', f'--teacher={teacher}',
                             f'--out_dir={tmp_path / out}', '--max_iters=6', '--positions=learned', *flags])
    return call


def table(folder):
    with open(os.path.join(folder, 'train_loss.csv'), newline='') as f:
        return [{k: v for k, v in row.items() if k != 'seconds'} for row in csv.DictReader(f)]


@pytest.mark.parametrize('flags', [(), ('--micro_batch_size=2', '--dropout=0.1', '--grad_clip=0.5')])
def test_next_tokens_alone_are_train_py(distil, train_tiny, tmp_path, flags):
    """Issue 5: a_clm = 1 and all else 0 gives train.py's losses and weights bit for bit on a CPU."""
    distil('--a_ce=0', '--a_cos=0', '--a_clm=1', '--no-freeze_positions', *flags)
    train_tiny('--max_iters=6', '--positions=learned', '--final_train_blocks=0', *flags, out='plain')
    mine, plain = table(tmp_path / 'run'), table(tmp_path / 'plain')
    assert [r['loss_nats'] for r in mine] == [r['loss_nats'] for r in plain] and len(mine) == 6
    a, b = (runs.load_checkpoint(str(tmp_path / name)) for name in ('run', 'plain'))
    assert all(same(a[key], b[key]) for key in ('model', 'optimizer'))
    assert a['final_train_loss'] == b['final_train_loss']
    assert runs.read_run(tmp_path / 'run')['test_bits_per_byte'] == runs.read_run(
        tmp_path / 'plain')['test_bits_per_byte']


def test_splits_of_a_batch_give_one_loss(distil, tmp_path):
    """Same global batch, other micro-batches and chunks: to a relative 1e-6."""
    found = []
    for i, flags in enumerate((('--micro_batch_size=8',), ('--micro_batch_size=2',),
                               ('--micro_batch_size=1', '--chunk_tokens=9'))):
        distil(*flags, out=f'r{i}')
        found.append([float(r['loss']) for r in table(tmp_path / f'r{i}')])
    assert found[1] == pytest.approx(found[0], rel=2e-6) and found[2] == pytest.approx(found[0], rel=2e-6)
    facts = [runs.load_checkpoint(str(tmp_path / f'r{i}'))['final_train_loss'] for i in range(3)]
    assert facts[1:] == pytest.approx([facts[0]] * 2, rel=1e-6)


def test_the_student_learns_from_the_teacher(distil, tmp_path, teacher):
    """All terms fall, positions stay, the table adds up, and the files are those of a training run."""
    assert distil('--max_iters=60', '--a_hidden=0.1', '--eval_interval=30') == 0
    found, log = table(tmp_path / 'run'), (tmp_path / 'run' / 'log.txt').read_text()
    for name in ('loss', 'loss_nats', 'loss_ce', 'loss_cos', 'loss_hidden'):
        assert float(found[-1][name]) < float(found[0][name])
    for r in found:
        assert float(r['loss']) == pytest.approx(2 * float(r['loss_nats']) + 5 * float(r['loss_ce']) + float(
            r['loss_cos']) + 0.1 * float(r['loss_hidden']), abs=2e-5)
    torch.manual_seed(858)
    fresh = GPT(ModelConfig(**runs.load_checkpoint(str(tmp_path / 'run'))['model_args']))
    student, checkpoint = runs.load_model(str(tmp_path / 'run'))
    assert torch.equal(student.position.weight, fresh.position.weight)
    assert not torch.equal(student.embed.weight, fresh.embed.weight)
    record = runs.read_run(tmp_path / 'run')
    assert record['status'] == 'done' and record['teacher_checkpoint'] == checkpoint['teacher']
    assert checkpoint['teacher']['sha256'] and log.count('val phase=distillation') == 2
    assert os.path.exists(tmp_path / 'run' / 'best.pt')


@pytest.mark.parametrize('number', (signal.SIGUSR1, signal.SIGINT))
def test_a_paused_run_ends_with_the_same_bytes(number, distil, tmp_path, monkeypatch):
    """A signal at step 3, then init_from=resume: tensors and table equal those of an unbroken run."""
    flags = ('--dropout=0.1', '--a_hidden=1')
    signal.signal(signal.SIGINT, signal.default_int_handler)
    distil(*flags, out='whole')
    real = distill.rate_at

    def interrupt(step, *more):
        if step == 3:
            os.kill(os.getpid(), number)
        return real(step, *more)
    monkeypatch.setattr(distill, 'rate_at', interrupt)
    assert distil(*flags) == runs.PAUSED and runs.read_status(tmp_path / 'run') == 'paused'
    monkeypatch.setattr(distill, 'rate_at', real)
    with pytest.raises(UserError, match='cannot resume: a_ce = 1.0'):
        distil(*flags, '--init_from=resume', '--a_ce=1')
    assert distil(*flags, '--init_from=resume') == 0
    a, b = (runs.load_checkpoint(str(tmp_path / name)) for name in ('whole', 'run'))
    assert all(same(a[key], b[key]) for key in ('model', 'optimizer'))
    assert table(tmp_path / 'run') == table(tmp_path / 'whole')
    record = tmp_path / 'run' / 'run.json'                  # a signal in the final scoring leaves that to a resume
    record.write_text(json.dumps(dict(runs.read_run(tmp_path / 'run'), status='paused')))
    before = (tmp_path / 'run' / 'ckpt.pt').read_bytes()
    assert distil(*flags, '--init_from=resume') == 0 and runs.read_status(tmp_path / 'run') == 'done'
    assert (tmp_path / 'run' / 'ckpt.pt').read_bytes() == before


def test_two_ranks_see_the_same_batches(distil, tmp_path, toy, teacher):
    """torchrun with two processes: the losses of one, to float rounding."""
    distil('--micro_batch_size=4')
    done = torchrun(2, 'distill.py', *TINY, f'--data_dir={toy}', '--dataset=toy', f'--teacher={teacher}',
                    f'--out_dir={tmp_path / "two"}', '--max_iters=6', '--positions=learned')
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = table(tmp_path / 'run'), table(tmp_path / 'two')
    for a, b in zip(one, two, strict=True):
        for name in ('loss', 'loss_nats', 'loss_ce', 'loss_cos', 'grad_norm'):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3 if name == 'grad_norm' else 2e-5)


def test_masks_and_truncated_students(distil, tmp_path, teacher, toy):
    """prune.py --layers makes the student, its pruned weights stay zero, and a GPT-2 folder can teach."""
    run_here('prune.py', f'--from_ckpt={teacher}', '--method=magnitude', '--sparsity=0.5',
             f'--out_dir={tmp_path / "p"}', '--no-sweep_dead_units', '--device=cpu')
    run_here('prune.py', f'--from_ckpt={tmp_path / "p"}', '--layers=0,2', f'--out_dir={tmp_path / "s"}', '--device=cpu')
    distil(f'--init_from={tmp_path / "s"}')
    student = runs.load_checkpoint(str(tmp_path / 'run'))
    assert len(student['masks']) > 5 and student['parent']['path'].startswith(str(tmp_path / 's'))
    for name, mask in student['masks'].items():
        assert not student['model'][name][~mask].any()
    write_dataset(str(tmp_path / 'data'))
    torch.manual_seed(0)
    model = GPT(ModelConfig(block_size=32, n_embd=32, n_head=2, n_layer=3, positions='learned', tied=True))
    runs.save_checkpoint(str(tmp_path / 'big.pt'), dict(
        model=model.state_dict(), model_args=model_args(model), masks={}, config={},
        data=dict(dataset='toy', sha256='', tokenizer='byte', start_id=10)))
    run_here('runs.py', 'export', tmp_path / 'big.pt', tmp_path / 'hf')
    assert distil(f'--teacher={tmp_path / "hf"}', '--n_embd=16', '--a_cos=0', out='other') == 0


def test_bfloat16(distil, tmp_path):
    """Autocast, on a CPU too: the loss is near that of float32."""
    distil('--dtype=bfloat16', out='narrow')
    distil()
    a, b = (float(table(tmp_path / name)[-1]['loss']) for name in ('narrow', 'run'))
    assert a == pytest.approx(b, rel=0.03) and math.isfinite(a)


@pytest.mark.parametrize('flags, words', [
    (('--teacher=',), 'teacher is empty'), (('--teacher=nowhere/at/all.pt',), 'no checkpoint at'),
    (('--n_embd=16',), 'a_cos = 1.0 compares states of one width, teacher 32, student 16; use --a_cos=0'),
    (('--n_embd=16', '--a_cos=0', '--a_hidden=1'), 'a_hidden = 1.0 compares'),
    (('--block_size=64',), 'was built for at most 32'), (('--temperature=0',), 'temperature = 0.0, expected > 0'),
    (('--a_hidden=1', '--layer_map=0:4'), "layer_map = '0:4', expected"),
    (('--a_hidden=1', '--layer_map=x'), "layer_map = 'x', expected"),
    (('--a_ce=0', '--a_clm=0', '--a_cos=0'), 'all weights of the loss are 0'), (('--a_ce=-1',), 'a_ce = -1.0'),
    (('--batch_size=9', '--micro_batch_size=2'), 'not a multiple'),
    (('--max_iters=0', '--epochs=0'), 'nothing to train'),
    (('--learning_rate=1e30', '--max_iters=50'), 'try a lower --learning_rate')])
def test_bad_input(distil, tmp_path, flags, words):
    """One line with the value and the cure."""
    with pytest.raises(UserError) as error:
        distil(*flags)
    assert words in str(error.value) and '\n' not in str(error.value)


def test_another_vocabulary(distil, tmp_path):
    """Teacher and student share the tokens."""
    model = gpt(vocab_size=99)
    runs.save_checkpoint(str(tmp_path / 'v.pt'), dict(
        model=model.state_dict(), model_args=model_args(model), masks={}, config={},
        data=dict(dataset='toy', sha256='', tokenizer='gpt2', start_id=10)))
    with pytest.raises(UserError, match="reads 'gpt2' tokens with a vocabulary of 99"):
        distil(f'--teacher={tmp_path / "v.pt"}')


def test_bench_measures_a_distillation_config(tmp_path, teacher):
    """lab.bench step takes a config of distill.py too, with its teacher."""
    config, out = tmp_path / 'c.py', tmp_path / 'bench.json'
    config.write_text(f"# python distill.py c.py\nteacher = {teacher!r}\nn_layer = 1\nn_embd = 32\nn_head = 2\n"
                      "block_size = 16\nbatch_size = 2\n")
    assert bench.main(['step', str(config), '--pairs=2', f'--json_path={out}', '--device=cpu']) == 0
    row = json.loads(out.read_text())['step']['rows'][0]
    assert row['milliseconds'] > 0 and row['procedure'] == 'distillation'


def test_compiled():
    """What torch.compile makes of the loss, hooks and chunks included, has the same values and gradients."""
    found, (x, y) = [], rows()
    for compiled in (False, True):
        student, taught = gpt(1), gpt(2, n_layer=4).requires_grad_(False)
        module = losses.Distillation(student, taught, dict.fromkeys(losses.TERMS, 1.0), 2.0, 7, [(0, 1), (1, 3)])
        loss, terms = (torch.compile(module, backend='aot_eager') if compiled else module)(x, y)
        loss.backward()
        found.append(torch.cat((terms, *(p.grad.flatten() for p in student.parameters()))))
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)
