"""A few chat rows in a file."""

import json

ROWS = [("Who are you?", "I am Ada."), ("What is two plus two?", "Four."), ("Say hi.", "Hi!")]


def write_rows(path, rows=ROWS):
    turns = (
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in rows
    )
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return path
