# python train.py config/mixers/autoencoder_sample_16.py
# about 3 minutes on one CPU core (0.09 s a step measured beside other work).
# Needs: python prepare_text.py --name=wiki2mb --source=FILE --max_bytes=2000000 --val_source=OTHER --test_source=THIRD
# 16 bytes through one vector of 64 numbers; probe_sample_16.py asks what is left of them. A higher rate or a shorter
# warm-up may leave it on the plateau of byte frequencies, 2.7 nats (LOG); so do 128 bytes a row.
out_dir = 'out/mixer_autoencoder_sample_16'
dataset = 'wiki2mb'
model = 'transformer200k'       # width 64, 4 layers each
block_size = 16
positions = 'none'
block_type = 'mixer'
wrapper = 'autoencoder'
objective = 'autoencode'
spread = 'unroll'
max_iters = 2000
batch_size = 64
learning_rate = 1.5e-3
schedule = 'cosine'
warmup_iters = 200
log_interval = 100
eval_blocks = 400
final_train_blocks = 400
