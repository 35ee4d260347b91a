# python -m lab.diversity config/diversity/task2vec.py
# about 1.5 h on one H100-class GPU (estimated: 600 batches, 1.3e17 FLOPs in float32 at 25 TFLOP/s; not run).
# Needs: python prepare_pile.py --subsets=pubmed,uspto
# Task2Vec diversity as published (Lee et al. 2023): USPTO .158 < PubMed .168 < the two mixed .195 < C4 .237.
out_dir = 'out/diversity_task2vec'
dataset = 'pubmed,uspto,mix'
data_mix = 'pubmed:0.5,uspto:0.5'
eval_sets = ''                  # openwebtext2,pile_cc once they are prepared: vocabulary overlap, a confounder
probe = 'gpt2'
n_batches = 200
n_sequences = 512
sequence_length = 128
