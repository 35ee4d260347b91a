# python train.py config/diversity/sample.py
# about 2 minutes on one CPU core.
# Needs: python prepare_pile.py --subsets=wikipedia,pubmed,uspto --tokenizer=byte --prefix=byte_
# (870,400 bytes of each). The CPU-sized controlled experiment: same steps, same unique bytes. As it stands PubMed
# abstracts; patent backgrounds, Wikipedia, and two mixtures of half each:
#     python train.py config/diversity/sample.py --data_mix=byte_uspto:1 --out_dir=out/diversity_sample_uspto
#     python train.py config/diversity/sample.py --data_mix=byte_wikipedia:1 --out_dir=out/diversity_sample_wikipedia
#     python train.py config/diversity/sample.py --data_mix=byte_pubmed:0.5,byte_uspto:0.5 \
#         --out_dir=out/diversity_sample_pubmed_uspto
#     python train.py config/diversity/sample.py --data_mix=byte_wikipedia:0.5,byte_pubmed:0.5 \
#         --out_dir=out/diversity_sample_wikipedia_pubmed
out_dir = 'out/diversity_sample_pubmed'
data_mix = 'byte_pubmed:1'
train_only_on_leading_tokens = 870_400      # unique bytes, 3,400 blocks; a mixture takes half of each source
model = 'transformer200k'
block_size = 256
positions = 'rotary'
max_iters = 425                 # two passes
batch_size = 16
learning_rate = 2e-3
schedule = 'cosine'
warmup_iters = 40
log_interval = 50
eval_blocks = 200
final_train_blocks = 400
