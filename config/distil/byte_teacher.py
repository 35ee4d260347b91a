# python train.py config/distil/byte_teacher.py
# about 7 minutes on one CPU core (0.19 s a step measured beside other work, 1,953 steps).
# Needs: python prepare_text.py --name=wiki1mb --source=FILE --max_bytes=1000000 --val_source=OTHER --test_source=THIRD
# The teacher of byte_student.py: transformer800k on the leading 1 MB of a Wikipedia text.
out_dir = 'out/distil_byte_teacher'
dataset = 'wiki1mb'
model = 'transformer800k'
block_size = 256
positions = 'rotary'            # learns far faster than the published sinusoids (LOG)
epochs = 4.0
batch_size = 8
learning_rate = 2e-3
schedule = 'cosine'
warmup_iters = 40
log_interval = 50
final_train_blocks = -1
eval_blocks = 400               # of 3,907: validation costs seconds, the test split is scored whole
