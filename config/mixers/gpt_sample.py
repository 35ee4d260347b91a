# python train.py config/mixers/gpt_sample.py
# about 70 s on one CPU core (0.14 s a step measured beside other work), and the scoring; context 512: 105 s (0.21 s).
# Needs: python prepare_text.py --name=wiki2mb --source=FILE --max_bytes=2000000 --val_source=OTHER --test_source=THIRD
# Attention at context 128, the twin of mixer_sample.py. At 512, with as many tokens a step:
#     python train.py config/mixers/gpt_sample.py --block_size=512 --batch_size=8 --out_dir=out/gpt_sample_512
out_dir = 'out/gpt_sample_128'
dataset = 'wiki2mb'
model = 'transformer200k'       # width 64, 4 layers
block_size = 128
positions = 'rotary'
max_iters = 500                 # 2.05 M tokens
batch_size = 32
learning_rate = 6e-3
schedule = 'cosine'
warmup_iters = 50
log_interval = 50
eval_blocks = 400
final_train_blocks = 400
