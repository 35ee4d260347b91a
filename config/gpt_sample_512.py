# python train.py config/gpt_sample_512.py
# COST about 105 s on one CPU core (0.21 s a step measured beside other work), and the scoring.
# Needs: python prepare_text.py --name=wiki2mb --source=FILE     2 MB of text, bytes
# Attention at context 512, the twin of mixer_sample_512.py.
out_dir = 'out/gpt_sample_512'
dataset = 'wiki2mb'
model = 'transformer200k'       # width 64, 4 layers
block_size = 512
positions = 'rotary'
max_iters = 500                 # 2.05 M tokens
batch_size = 8
learning_rate = 6e-3
schedule = 'cosine'
warmup_iters = 50
log_interval = 50
eval_blocks = 400
final_train_blocks = 400
