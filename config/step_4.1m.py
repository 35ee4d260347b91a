# python train.py config/step_4.1m.py
# python -m lab.bench step config/step_4.1m.py: on one H200-class GPU, not measured yet. Goal: 5 MB/s
out_dir = 'out/step_4.1m'
model = 'transformer4.1m'
block_size = 512
batch_size = 128
max_iters = 100
final_train_blocks = 0
