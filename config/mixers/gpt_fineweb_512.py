# torchrun --nproc_per_node=8 train.py config/mixers/gpt_fineweb_512.py
# about 1.5 h on 8 H100 at 40 % of their bf16 rate (estimated: 13.1 B tokens of 1.36 GFLOP; not run).
# Needs: python prepare_text.py config/data/fineweb.py
# The attention twin of mixer_fineweb_512.py: same width, layers, tokens and schedule, the transformer's learning rate.
out_dir = 'out/gpt_fineweb_512'
dataset = 'fineweb8k'
n_layer = 16
n_head = 16
n_embd = 1024
block_size = 512
positions = 'rotary'
norm = 'rmsnorm'
batch_size = 128
max_iters = 200_000
learning_rate = 2e-4
schedule = 'linear'
min_learning_rate_ratio = 0.0
warmup_iters = 500
dtype = 'bfloat16'              # float16 explodes in multi-head autoencoders, as published
eval_interval = 5_000
eval_blocks = 1_000
final_train_blocks = 1_000
