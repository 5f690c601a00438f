"""Data: prompts from files, folders and the Hub; disjoint splits; chat templates and lengths.

Importing this package imports nothing else; import from its modules: `sources` reads rows, `forms` and `chats` find the
prompt in them, `prompts` and `preferences` check them, `completions` and `pairing` read samples made elsewhere.
"""
