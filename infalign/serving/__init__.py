"""Serving: a policy and its procedure behind OpenAI's HTTP API. The HTTP layer is Starlette on uvicorn.

One thread decodes (`worker`), one event loop talks (`app`); between them is a bounded queue.
"""
