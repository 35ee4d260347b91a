# python train.py config/mixer_sample_512.py
# COST XXXX
# Needs: python prepare_text.py --name=wiki2mb --source=FILE     2 MB of text, bytes
# A masked mixer at context 512; gpt_sample_512.py is its attention twin at equal wall-clock.
out_dir = 'out/mixer_sample_512'
dataset = 'wiki2mb'
model = 'transformer200k'       # width 64, 4 layers
block_size = 512
positions = 'none'
final_norm = False
block_type = 'mixer'
max_iters = 500
batch_size = 8
learning_rate = 3e-3
schedule = 'cosine'
warmup_iters = 50
log_interval = 50
eval_blocks = 400
final_train_blocks = 400
