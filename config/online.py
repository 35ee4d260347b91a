# python compress.py online FILE ARCHIVE config/online.py
# COST of 1,000,000 bytes: about 20 minutes each way on 2 cores (estimated from the first 200,000).
# For texts of about a megabyte: the updates per byte of the default in larger blocks, so that fewer models are built.
online_block = 128
online_updates = 32             # every byte is trained on about 8 times
