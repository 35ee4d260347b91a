# python train.py config/mixers/mixer_sample.py
# about 70 s on one CPU core (0.06 s a step measured beside other work), and the scoring; context 512: 105 s (0.08 s).
# Needs: python prepare_text.py --name=wiki2mb --source=FILE --max_bytes=2000000 --val_source=OTHER --test_source=THIRD
# A masked mixer at context 128; gpt_sample.py is its attention twin at equal wall-clock. At 512, as many tokens a step:
#     python train.py config/mixers/mixer_sample.py --block_size=512 --batch_size=8 --max_iters=1270 \
#         --out_dir=out/mixer_sample_512
out_dir = 'out/mixer_sample_128'
dataset = 'wiki2mb'
model = 'transformer200k'       # width 64, 4 layers
block_size = 128
positions = 'none'
final_norm = False
block_type = 'mixer'
max_iters = 1188                # the seconds of 500 steps of attention (LOG)
batch_size = 32
learning_rate = 2e-2            # the highest tried, and the best
schedule = 'cosine'
warmup_iters = 50
log_interval = 50
eval_blocks = 400
final_train_blocks = 400
