# python distill.py config/distil_byte_control.py
# about 3 minutes on one CPU core (0.08 s a step measured beside other work, 1,953 steps).
# Needs: python prepare_text.py --name=wiki1mb --source=FILE --max_bytes=1000000 --val_source=OTHER --test_source=OTHER
# and: python train.py config/distil_byte_teacher.py (named, not asked)
# distil_byte_student.py without its teacher: same student, tokens and optimiser, next-byte loss alone. For the same
# wall-clock instead, raise epochs by the ratio of the two runs' tokens per second.
out_dir = 'out/distil_byte_control'
dataset = 'wiki1mb'
teacher = 'out/distil_byte_teacher'
model = 'transformer200k'
block_size = 256
positions = 'rotary'            # learns far faster than the seed's sinusoids (LOG)
a_ce = 0.0
a_clm = 1.0
a_cos = 0.0
temperature = 1.0
epochs = 4.0
batch_size = 8
learning_rate = 3e-3
schedule = 'cosine'
warmup_iters = 40
log_interval = 50
eval_blocks = 400               # of 3,907: validation costs seconds, the test split is scored whole
