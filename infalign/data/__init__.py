"""Data: prompts from files, folders and the Hub; disjoint splits; chat templates and lengths.

Importing this package imports nothing else; import from `prompts`, `mixture`, `splits`, `templates`, `transcripts`.
"""
