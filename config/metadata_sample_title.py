# python train.py config/metadata_sample_title.py
# COST about 2.5 minutes on one CPU core (0.14 s a step measured beside other work, 40 s of scoring).
# Needs: python prepare_metadata.py --source=wiki.jsonl --types=title --tokenizer=byte
#        --block_size=256 --max_bytes=2e6 --val_fraction=0.1 --test_fraction=0.05 --name=wikimeta_title
# wiki.jsonl: {"text": ..., "url": ..., "title": ...} a line. Afterwards, for all four and on the same targets:
#        python eval.py --from_ckpt=out/metadata_sample_title --pairs=wikimeta_none
# Here: half of the documents behind their title.
out_dir = 'out/metadata_sample_title'
dataset = 'wikimeta_title'
model = 'transformer200k'
block_size = 256
positions = 'rotary'
max_iters = 732                 # 1.5 M tokens, prefixes and padding included
batch_size = 8
learning_rate = 3e-3
schedule = 'cosine'
warmup_iters = 40
log_interval = 50
eval_blocks = 400
final_train_blocks = 400
