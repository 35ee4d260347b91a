# python prepare_text.py config/data/wikitext103.py
# about 5 minutes on 2 CPU cores (estimated: 540 MB at 3 MB/s; not run). Offline: --source, --val_source, --test_source
# WikiText-103, raw, as GPT-2's BPE: 118 million ids. Its rows are lines, joined by two newlines as perplexity is
# usually measured with transformers; there is no end-of-text inside.
name = 'wikitext103'
source = 'Salesforce/wikitext'          # or a local file, with --val_source and --test_source
hub_config = 'wikitext-103-raw-v1'      # brings its own validation and test splits
tokenizer = 'gpt2'
join_rows = True
document_separator = r'\n\n'
