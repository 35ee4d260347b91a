# python -m lab.bench step config/bench/step_4.1m.py
# 22 steps of 65,536 tokens on one H200-class GPU; not measured yet. Needs no data.
# Goal: 5 MB/s.
out_dir = 'out/step_4.1m'
model = 'transformer4.1m'
block_size = 512
batch_size = 128
max_iters = 100
final_train_blocks = -1
