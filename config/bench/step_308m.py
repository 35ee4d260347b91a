# python -m lab.bench step config/bench/step_308m.py
# 22 steps of 65,536 tokens on one H200-class GPU; not measured yet. Needs no data.
# Goal: 40 % of its bf16 rate for a large matrix product.
out_dir = 'out/step_308m'
model = 'transformer308m'
block_size = 512
batch_size = 128
max_iters = 100
final_train_blocks = -1
