# torchrun --nproc_per_node=8 train.py config/metadata/all.py
# about 4.6 hours on 8 H100-class GPUs (estimated: 2.2e19 FLOPs at 8 x 170 TFLOP/s; not run).
# GPT-2 on documents with metadata, settings of BigScience's modeling-metadata. As it stands every type: a document is
# given 1 to n of those that it has. Needs: python prepare_metadata.py --source='shards/*.jsonl.gz' \
#     --types=url,timestamp,title,html --name=c4meta
# Then: python eval.py --from_ckpt=out/metadata_all --pairs=c4meta
#
# The other arms differ in their data alone, and each is scored on the same pairs. The address alone:
#     python prepare_metadata.py --source='shards/*.jsonl.gz' --types=url --name=c4meta_url
#     torchrun --nproc_per_node=8 train.py config/metadata/all.py --dataset=c4meta_url --out_dir=out/metadata_url
# Tags in the line, nothing before the text; --loss_on=text+markup scores them too:
#     python prepare_metadata.py --source='shards/*.jsonl.gz' --types=html --name=c4meta_html
#     torchrun --nproc_per_node=8 train.py config/metadata/all.py --dataset=c4meta_html --out_dir=out/metadata_html
# The plain baseline: the same documents in rows without metadata, the same seed:
#     python prepare_metadata.py --source='shards/*.jsonl.gz' --types=url,timestamp,title,html --control=none \
#         --name=c4meta_none
#     torchrun --nproc_per_node=8 train.py config/metadata/all.py --dataset=c4meta_none --out_dir=out/metadata_none
# As much text in a row as metadata leaves; what it would take is hidden padding:
#     python prepare_metadata.py --source='shards/*.jsonl.gz' --types=url,timestamp,title,html --control=samecontext \
#         --name=c4meta_samecontext
#     torchrun --nproc_per_node=8 train.py config/metadata/all.py --dataset=c4meta_samecontext \
#         --out_dir=out/metadata_samecontext
out_dir = 'out/metadata_all'
dataset = 'c4meta'
model = 'gpt2'
positions = 'learned'           # these three make it a GPT-2
activation = 'gelu_tanh'
tied = True
max_iters = 100_000
batch_size = 256                # rows of 1,024 tokens
micro_batch_size = 16
learning_rate = 1e-4
schedule = 'linear'             # and its end at 0 are not stated by the source
warmup_iters = 6000
min_learning_rate_ratio = 0.0
beta2 = 0.98
adam_epsilon = 1e-6
weight_decay = 0.01
seed = 42
eval_interval = 2000
eval_blocks = 1000
final_train_blocks = 1000
