"""Transformers whose weights others trained: a local Hugging Face directory, bound by hash. Nothing is downloaded.

store   what a directory may hold, its hash, and where this machine keeps those that its owner added
build   the directory as a model of this project, by `transformers`
words   texts as its own tokens, by `tokenizers`
"""
