# python distill.py config/distil/byte_student.py
# about 5 minutes on one CPU core (0.145 s a step measured beside other work, 1,953 steps).
# Needs: python prepare_text.py --name=wiki1mb --source=FILE --max_bytes=1000000 --val_source=OTHER --test_source=THIRD
# Needs: python train.py config/distil/byte_teacher.py
# A transformer800k teaches a transformer200k. Widths differ, hence a_cos = 0.
#
# The control has no teacher (it is named, not asked): same student, tokens and optimiser, next-byte loss alone.
#     python distill.py config/distil/byte_student.py --a_ce=0 --out_dir=out/distil_byte_control
# about 3 minutes (0.08 s a step). For the same wall-clock, raise epochs by the ratio of the runs' tokens per second.
out_dir = 'out/distil_byte_student'
dataset = 'wiki1mb'
teacher = 'out/distil_byte_teacher'
model = 'transformer200k'
block_size = 256
positions = 'rotary'            # learns far faster than the published sinusoids (LOG)
a_ce = 1.0                      # the teacher's distribution
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
