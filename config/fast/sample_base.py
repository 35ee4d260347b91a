# python train.py config/fast/sample_base.py
# about 20 seconds on one CPU core, of which scoring 200,000 bytes takes 5
# Needs: python prepare_text.py --name=wiki1mb --source=FILE --max_bytes=1000000 --val_source=OTHER --test_source=THIRD
# A tenth of sample_seed.py's bytes with AdamW and a schedule: each row of the ablations in LOG changes one line.
out_dir = 'out/fast_sample_base'
dataset = 'wiki1mb'
train_only_on_leading_tokens = 102_400
model = 'transformer800k'
block_size = 512
positions = 'rotary'
epochs = 1.0
batch_size = 2                  # 1,024 bytes a step: 100 steps
learning_rate = 2e-3
schedule = 'cosine'
warmup_iters = 10
beta2 = 0.95
grad_clip = 1.0
final_train_blocks = -1
