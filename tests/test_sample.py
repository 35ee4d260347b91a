"""sample.py: the cache changes nothing, prompts are any bytes, and no character is ever cut."""
import os
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, run_here, run_script

import sample
from configurator import UserError
from model import GPT, ModelConfig, model_args
from training.checkpoint import save_checkpoint

T = 12


def tiny(seed=0, **options):
    """A model with some opinions: weights far from their small initial values."""
    torch.manual_seed(seed)
    config = dict(block_size=T, vocab_size=256, n_layer=2, n_head=2, n_embd=16) | options
    model = GPT(ModelConfig(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def save(path, model, tokenizer='byte', start_id=10):
    data = dict(dataset='toy', sha256='', start_id=start_id, tokenizer=tokenizer)
    save_checkpoint(path, dict(model=model.state_dict(), model_args=model_args(model), masks={}, config={},
                                    data=data))
    return str(path)


def always(path, token):
    """Save a model that says one byte whatever it sees: the others' logits are lower by far."""
    model = tiny()
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(1.0)
        model.head.weight.zero_()
        model.head.weight[token] = 10.0
    return save(path, model)


@pytest.mark.parametrize('positions', ['sinusoidal', 'learned', 'rotary'])
@pytest.mark.parametrize('n_prompt', [1, 5, T, T + 1, 3 * T])
def test_cached_generation_equals_uncached(positions, n_prompt):
    """Greedy and drawn, over several times the context, so that it is cut and encoded anew."""
    model, prompt = tiny(positions=positions), [(7 * i) % 256 for i in range(n_prompt)]
    for temperature, top_k in ((0, 0), (1.0, 0), (0.7, 5)):
        cached, plain = (list(sample.generate(model, prompt, 40, temperature, top_k, torch.Generator().manual_seed(3),
                                              how)) for how in (True, False))
        assert cached == plain and len(cached) == 40
    assert len(set(cached)) > 5                 # not a fixed point, where any error would hide


def test_greedy_equals_argmax_of_the_whole_model():
    """Against the model itself, without generate's own bookkeeping, until the context is full; then its last half."""
    model, text = tiny(seed=2), [10, 65]
    tokens = list(sample.generate(model, text, 14, 0, 0))
    for token in tokens:
        seen = text if len(text) <= T else text[T + 1 - T // 2:]        # 13 tokens: the last 6 stay
        with torch.no_grad():
            assert token == int(model(torch.tensor([seen]))[0, -1].argmax())
        text = text + [token]


def test_seed_temperature_and_top_k():
    """A seed repeats, another differs; top_k=1 is greedy; draws stay among the k likeliest."""
    model = tiny()

    def draw(temperature=1.0, top_k=0, seed=1, n=30):
        return list(sample.generate(model, [10], n, temperature, top_k, torch.Generator().manual_seed(seed)))
    assert draw() == draw() != draw(seed=2)
    assert draw(top_k=1) == draw(temperature=0) == draw(temperature=1e-4)
    with torch.no_grad():
        best = set(model(torch.tensor([[10]]))[0, -1].topk(3).indices.tolist())
    firsts = {draw(temperature=5.0, top_k=3, seed=s, n=1)[0] for s in range(40)}
    assert firsts == best


def test_decoded_never_cuts_a_character():
    """Characters of 1 to 4 bytes, given byte by byte, come whole; only what no text holds becomes U+FFFD."""
    text = 'aé€😀z'
    pieces = list(sample.decoded(bytes([b]) for b in text.encode()))
    assert pieces == list(text)
    assert ''.join(sample.decoded([b'ab\xff', b'\xe2\x82', b'\xacc'])) == 'ab\ufffd€c'
    assert ''.join(sample.decoded([b'\xe2', b'\x82', b'x'])) == '\ufffdx'           # begun, then given up
    assert ''.join(sample.decoded([b'end\xf0\x9f\x98'])) == 'end'                     # cut by the length: not printed
    assert list(sample.decoded([])) == []


def test_text_comes_while_it_is_generated():
    """The first character is out before the second token is drawn."""
    drawn = []

    def tokens():
        for token in b'xyz':
            drawn.append(token)
            yield bytes([token])
    stream = sample.decoded(tokens())
    assert next(stream) == 'x' and len(drawn) == 1


def test_every_character_is_flushed(tmp_path, monkeypatch):
    """A pipe's reader sees the text grow: no character waits for the next one."""
    class Pipe:
        events = []
        write, flush = lambda self, data: self.events.append(data), lambda self: self.events.append('flush')
    monkeypatch.setattr(sys, 'stdout', types.SimpleNamespace(buffer=Pipe()))
    path = always(tmp_path / 'a.pt', ord('x'))
    run_here('sample.py', f'--from_ckpt={path}', '--device=cpu', '--max_new_tokens=2', '--prompt=p')
    assert [e for e in Pipe.events if e] == [b'p', 'flush', b'x', 'flush', b'x', 'flush', b'\n', 'flush']


def test_main_prints_prompt_samples_and_whole_characters(tmp_path, capfdbinary):
    """0xA9 after a prompt that ends in 0xC3 completes é; a lone 0xA9 is U+FFFD; samples are set apart."""
    path = always(tmp_path / 'a.pt', 0xA9)
    flags = [f'--from_ckpt={path}', '--device=cpu', '--temperature=0']
    (tmp_path / 'prompt').write_bytes(b'caf\xc3')
    assert run_here('sample.py', *flags, f'--prompt=FILE:{tmp_path / "prompt"}', '--max_new_tokens=2',
                    '--num_samples=2') == 0
    expected = 'café\ufffd\n'
    assert capfdbinary.readouterr().out.decode() == f'{expected}---------------\n{expected}'
    assert run_here('sample.py', *flags, '--prompt=caf\udcc3', '--max_new_tokens=0') == 0   # argv's form of the byte C3
    assert capfdbinary.readouterr().out == b'caf\n'
    path = always(tmp_path / 'b.pt', 0xE2)
    assert run_here('sample.py', f'--from_ckpt={path}', '--device=cpu', '--max_new_tokens=1') == 0
    assert capfdbinary.readouterr().out == b'\n'


@pytest.mark.slow
def test_prompt_from_standard_input_is_bytes(tmp_path):
    """Zero, newline and broken UTF-8 arrive as they are; the output is UTF-8 in any locale."""
    path = always(tmp_path / 'a.pt', ord('!'))
    environ = dict(os.environ, PYTHONPATH=ROOT, LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    done = subprocess.run([sys.executable, 'sample.py', f'--from_ckpt={path}', '--prompt=-', '--max_new_tokens=3'],
                          input=b'a\x00\r\n\xff\xc3\xa9', capture_output=True, cwd=ROOT, env=environ, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b'a\x00\r\n\xef\xbf\xbd\xc3\xa9!!!\n'


def test_bpe_prompts_and_text(tmp_path, monkeypatch, capfdbinary):
    """A merge is used, bytes that are not UTF-8 go one by one, and a character made of two tokens is whole."""
    tiktoken = pytest.importorskip('tiktoken')
    ranks = {bytes([b]): b for b in range(256)} | {b'th': 256, b'the': 257}
    bpe = tiktoken.Encoding('toy', pat_str=r'[\s\S]+', mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 258})
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: bpe)
    encode, decode = sample.codec(dict(data=dict(tokenizer='gpt2', dataset=''), config={}))
    assert encode(b'the') == [257] and encode(b'') == []
    assert encode(b'the\xff\xfethe\xc3') == [257, 255, 254, 257, 0xC3]
    assert encode(b'\xe2\x82the\xf0\x9f\x98') == [0xE2, 0x82, 257, 0xF0, 0x9F, 0x98]      # begun and given up
    assert b''.join(map(decode, encode('the é€'.encode()))) == 'the é€'.encode()
    path = save(tmp_path / 'bpe.pt', tiny(vocab_size=259), 'gpt2', start_id=258)
    assert run_here('sample.py', f'--from_ckpt={path}', '--device=cpu', '--prompt=the', '--max_new_tokens=20') == 0
    assert capfdbinary.readouterr().out.decode().startswith('the')


def test_vocabulary_that_is_not_here_is_one_line(monkeypatch):
    """tiktoken fetches its files: offline that is a line with the cure, not a traceback."""
    tiktoken = pytest.importorskip('tiktoken')

    def offline(name):
        raise ConnectionError('no route\nto host')
    monkeypatch.setattr(tiktoken, 'get_encoding', offline)
    with pytest.raises(UserError, match='is not here and could not be fetched .ConnectionError') as caught:
        sample.codec(dict(data=dict(tokenizer='gpt2', dataset=''), config={}))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('flags, expected', [
    ('', 'from_ckpt is empty'), ('--from_ckpt=HERE/none.pt', 'no checkpoint'), ('--from_ckpt=HERE/cut.pt', 'cut short'),
    ('--from_ckpt=HERE/a.pt --temperature=-1', 'temperature = -1'),
    ('--from_ckpt=HERE/a.pt --num_samples=0', 'num_samples'),
    ('--from_ckpt=HERE/a.pt --prompt=FILE:HERE/none', 'cannot read the prompt'),
    ('--from_ckpt=HERE/small.pt --prompt=z', 'token id 122'), ('--from_ckpt=HERE/odd.pt', "tokenizer is 'odd'")])
def test_bad_input(tmp_path, flags, expected):
    """One line before a byte is printed."""
    save(tmp_path / 'a.pt', tiny())
    (tmp_path / 'cut.pt').write_bytes((tmp_path / 'a.pt').read_bytes()[:3000])
    save(tmp_path / 'small.pt', tiny(vocab_size=100))
    save(tmp_path / 'odd.pt', tiny(), 'odd')
    with pytest.raises(UserError, match=expected) as caught:
        run_here('sample.py', *flags.replace('HERE', str(tmp_path)).split(), '--device=cpu')
    assert '\n' not in str(caught.value)


@pytest.mark.slow
def test_the_reader_may_leave(tmp_path):
    """A closed pipe ends the script without a traceback."""
    path = always(tmp_path / 'a.pt', ord('x'))
    code = f'{sys.executable} sample.py --from_ckpt={path} --max_new_tokens=20000 | head -c 5'
    done = subprocess.run(['sh', '-c', code], capture_output=True, cwd=ROOT, timeout=1800, text=True)
    assert len(done.stdout) == 5 and 'Traceback' not in done.stderr


@pytest.mark.slow
def test_help_needs_no_torch():
    """--help reads the source alone."""
    done = run_script('-X', 'importtime', 'sample.py', '--help')
    assert done.returncode == 0 and 'from_ckpt' in done.stdout and 'torch' not in done.stderr
