# torchrun --nproc_per_node=4 train.py config/diversity/51m.py
# about 1.3 h on one H100-class GPU (estimated: 4.7e17 FLOPs at 100 TFLOP/s; not run); 117M: 3.1 h (1.1e18 FLOPs).
# Needs: python prepare_pile.py --subsets=pubmed,uspto
# Lee et al. 2023 (arXiv 2306.13840): only the training set differs. As it stands PubMed abstracts and USPTO
# backgrounds, half of the rows each; a mixture of one is made of whole blocks, so that equal steps are equal tokens:
#     torchrun --nproc_per_node=4 train.py config/diversity/51m.py --data_mix=pubmed:1 \
#         --out_dir=out/diversity_51m_pubmed
#     torchrun --nproc_per_node=4 train.py config/diversity/51m.py --data_mix=uspto:1 --out_dir=out/diversity_51m_uspto
# Each also with 124.4 M parameters (GPT-2 small, "117M"):
#     torchrun --nproc_per_node=4 train.py config/diversity/51m.py --n_layer=12 --n_head=12 --n_embd=768 \
#         --out_dir=out/diversity_117m_mix
out_dir = 'out/diversity_51m_mix'
data_mix = 'pubmed:0.5,uspto:0.5'    # shares of the rows
n_layer = 8
n_head = 8
n_embd = 512                    # 51.48 M parameters
block_size = 1024
positions = 'learned'
activation = 'gelu_tanh'
tied = True
dropout = 0.1
max_iters = 20_000              # 1.31 B tokens
batch_size = 64
micro_batch_size = 8
learning_rate = 5e-5
schedule = 'linear'
min_learning_rate_ratio = 0.0
eval_interval = 1000
eval_blocks = 1000              # half of each source in a mixture
final_train_blocks = 1000
