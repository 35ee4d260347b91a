# python train.py config/sample_vanilla.py
# COST on 2 cores of an AMD EPYC (Zen 5), measured alone. Needs: python prepare_sample.py
# The unpruned twin of the other three sample configs: the same steps, nothing taken away.
out_dir = 'out/sample_vanilla'
dataset = 'sample'              # 0.38 MB of Python's documentation
model = 'transformer200k'
block_size = 256
positions = 'rotary'            # 2.07 bits per byte where the seed's sinusoids reach 3.1 in the same steps
procedure = 'vanilla'
epochs = 9.0
batch_size = 8
learning_rate = 3e-3
schedule = 'cosine'             # one over the whole run
warmup_iters = 40
log_interval = 50
