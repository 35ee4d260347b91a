# python compress.py online FILE ARCHIVE config/online.py
# COST of 1,000,000 bytes: about 20 minutes each way on 2 cores (estimated). Twice the default's updates per byte.
# For texts of about a megabyte: more updates fit small texts too closely, and larger ones want a larger model.
online_updates = 32             # per block of 128 bytes x 32 streams: every byte is trained on about 8 times
online_block = 128
