# python train.py config/mixer_autoencoder_sample_128.py
# COST XXXX
# Needs: python prepare_text.py --name=wiki2mb --source=FILE     2 MB of text, bytes
# 128 bytes through one vector of 64 numbers; probe.py config/probe_sample_128.py asks what is left of them.
out_dir = 'out/mixer_autoencoder_sample_128'
dataset = 'wiki2mb'
model = 'transformer200k'       # width 64, 4 layers
block_size = 128
positions = 'none'
final_norm = False
block_type = 'mixer'
wrapper = 'autoencoder'
objective = 'autoencode'
spread = 'unroll'
max_iters = 500
batch_size = 32
learning_rate = 3e-3
schedule = 'cosine'
warmup_iters = 50
log_interval = 50
eval_blocks = 400
final_train_blocks = 400
