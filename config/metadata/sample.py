# python train.py config/metadata/sample.py
# about 2.5 minutes on one CPU core (0.14 s a step measured beside other work, 40 s of scoring).
# Rows without metadata, the plain baseline; wiki.jsonl holds {"text": ..., "url": ..., "title": ...} a line.
# Needs: python prepare_metadata.py --source=wiki.jsonl --types=url,title --control=none --tokenizer=byte \
#     --block_size=256 --max_bytes=2e6 --val_fraction=0.1 --test_fraction=0.05 --name=wikimeta_none
# Then, for all four and on the same targets: python eval.py --from_ckpt=out/metadata_sample_none --pairs=wikimeta_none
#
# The other arms. Half of the documents behind their address, which names no more than a number:
#     python prepare_metadata.py --source=wiki.jsonl --types=url --tokenizer=byte --block_size=256 --max_bytes=2e6 \
#         --val_fraction=0.1 --test_fraction=0.05 --name=wikimeta_url
#     python train.py config/metadata/sample.py --dataset=wikimeta_url --out_dir=out/metadata_sample_url
# Half of the documents behind their title:
#     python prepare_metadata.py --source=wiki.jsonl --types=title --tokenizer=byte --block_size=256 --max_bytes=2e6 \
#         --val_fraction=0.1 --test_fraction=0.05 --name=wikimeta_title
#     python train.py config/metadata/sample.py --dataset=wikimeta_title --out_dir=out/metadata_sample_title
# As much text in a row as titles leave, behind hidden padding:
#     python prepare_metadata.py --source=wiki.jsonl --types=title --control=samecontext --tokenizer=byte \
#         --block_size=256 --max_bytes=2e6 --val_fraction=0.1 --test_fraction=0.05 --name=wikimeta_samecontext
#     python train.py config/metadata/sample.py --dataset=wikimeta_samecontext --out_dir=out/metadata_sample_samecontext
out_dir = 'out/metadata_sample_none'
dataset = 'wikimeta_none'
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
