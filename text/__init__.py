"""Data as text and as tokens: read and check data sets, find the vocabulary, tokenize, cache the tokens."""
