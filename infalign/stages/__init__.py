"""Stages: one function a verb, each callable from a notebook. They join the rooms; nothing imports them but the CLI."""
