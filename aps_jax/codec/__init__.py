"""Tokenizers: MagVIT-v2 encoder and decoder, look-up-free quantisation, fast convolutions."""
