# python train.py config/sample_vanilla.py
# about 3 minutes on 2 CPU cores (see README). Needs: python prepare_sample.py
# The unpruned twin of the other three sample configs: the same steps, nothing taken away.
out_dir = 'out/sample_vanilla'
dataset = 'sample'              # 0.38 MB of Python's documentation
model = 'transformer200k'
n_embd = 72                     # 289,584 weights
block_size = 256
positions = 'rotary'            # learns this text far faster than the published sinusoids (LOG)
procedure = 'vanilla'
epochs = 14.0
batch_size = 8
learning_rate = 3e-3
schedule = 'cosine'             # one over the whole run
warmup_iters = 40
log_interval = 50
