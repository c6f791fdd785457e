"""What must not go wrong in silence between a data file and a batch.

Numbers in the names are those of the fault matrix: 14 changed data, 15 malformed files, 16 nothing
to learn, 17 rows too long, 18 another model's tokenizer, 28 the environment.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, models

from lora_jax.cli import datasets
from lora_jax.cli.base import Base, load_base
from lora_jax.cli.main import main
from lora_jax.cli.options import DataOptions
from lora_jax.data import files
from lora_jax.data.arranging import arrange_rows
from lora_jax.data.batch_plan import plan_batches
from lora_jax.data.batches import digest, eval_batches
from lora_jax.data.chat import Encoded, encode_text
from lora_jax.data.fitting import fit_rows
from lora_jax.data.formats import read_file, read_rows
from lora_jax.errors import InputError
from lora_jax.train.losses import cross_entropy

ROOT = Path(__file__).parents[2]
GOOD = '{"prompt": "Wie heißt du?", "completion": "Ada."}'.encode()

# The second line of three, and the field or reason that the message must name.
MALFORMED = {
    "bad JSON": (b'{"prompt": "a", "completion": b}', "not JSON"),
    "not an object": (b'["prompt", "completion"]', "the row must be an object"),
    "missing field": (b'{"prompt": "a"}', '"completion", "prompt"'),
    "wrong type": (b'{"prompt": "a", "completion": ["b"]}', "completion must be a string"),
    "unknown field": (b'{"prompt": "a", "completion": "b", "score": 1}', '"score"'),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, "byte order mark"),
    "NUL": (b'{"prompt": "a\x00", "completion": "b"}', "NUL"),
    "escaped NUL": (b'{"prompt": "a\\u0000", "completion": "b"}', "prompt holds a NUL"),
    "invalid UTF-8": (b'{"prompt": "\xff", "completion": "b"}', "not UTF-8"),
    "half a character": (b'{"prompt": "\\ud83d", "completion": "b"}', "surrogate"),
    "duplicate key": (b'{"prompt": "a", "prompt": "c", "completion": "b"}', "duplicate key"),
    "two objects": (GOOD + GOOD, "one row a line"),
    "empty line": (b"", "the line is empty"),
    "deep nesting": (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
    "huge number": (b'{"prompt": 1e999, "completion": "b"}', "prompt must be a string"),
    "huge integer": (b'{"prompt": ' + b"9" * 5000 + b"}", "not usable JSON"),
    "not a number": (b'{"prompt": NaN, "completion": "b"}', "NaN"),
    "another format": (b'{"text": "a"}', '"text"'),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_15_a_malformed_line_is_named_by_file_line_column_and_field(tmp_path, fault):
    line, named = MALFORMED[fault]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([GOOD, line, GOOD, b""]))
    with pytest.raises(InputError) as caught:
        read_rows(file)
    found = re.fullmatch(rf"{re.escape(str(file))}:2:(\d+): (.*)", str(caught.value))
    assert found
    assert named in found[2]
    shown = line.decode("utf-8", "backslashreplace").strip()[:40]
    assert shown in found[2] or not shown.isprintable()
    assert len(found[2]) < 400

    allowed = read_file(file, skip_bad_lines=1)
    assert [row.line for row in allowed.rows] == [1, 3]
    assert allowed.skipped == (str(caught.value),)


def test_15_windows_line_ends_change_nothing(tmp_path):
    unix, windows = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    unix.write_bytes((GOOD + b"\n") * 3)
    windows.write_bytes((GOOD + b"\r\n") * 3)
    assert [r.messages for r in read_rows(unix)] == [r.messages for r in read_rows(windows)]


def test_15_a_file_cut_at_any_byte_is_read_to_a_whole_row_or_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    for length in range(len(GOOD) + 1, 2 * len(GOOD) + 1):
        file.write_bytes((GOOD + b"\n" + GOOD)[:length])
        if length in (len(GOOD) + 1, 2 * len(GOOD) + 1):
            continue
        with pytest.raises(InputError, match=r"rows\.jsonl:2:\d+: not (JSON|UTF-8)"):
            read_rows(file)


def test_15_a_line_of_100_megabytes_is_refused_in_bounded_memory(tmp_path):
    file = tmp_path / "rows.jsonl"
    with open(file, "wb") as out:
        out.write(GOOD + b'\n{"prompt": "')
        for _ in range(100):
            out.write(b"a" * 2**20)
        out.write(b'", "completion": "b"}\n' + GOOD + b"\n")
    tracemalloc.start()
    started = time.perf_counter()
    found = read_file(file, skip_bad_lines=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.line for row in found.rows] == [1, 3]
    assert "2:1: the line is longer than 8388608 bytes" in found.skipped[0]
    assert peak < 6 * files.MAX_LINE_BYTES
    assert time.perf_counter() - started < 20


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_15_no_damage_to_a_file_raises_anything_but_an_input_error(tmp_path_factory, data):
    content = bytearray(GOOD + b"\n" + GOOD + b"\n")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        width = data.draw(st.integers(0, 3))
        content[at : at + width] = data.draw(st.binary(max_size=4))
    suffix = data.draw(st.sampled_from([".jsonl", ".json", ".parquet"]))
    file = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    file.write_bytes(b"[" + content if suffix == ".json" else content)
    with contextlib.suppress(InputError):
        rows = read_file(file, skip_bad_lines=1).rows
        assert all(row.messages or row.text for row in rows)


def test_15_the_command_line_reports_what_it_skipped(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([GOOD, b"{", GOOD, b""]))
    rows = datasets.read(DataOptions(file, skip_bad_lines=1))
    assert len(rows.train) == 2
    printed = capsys.readouterr()
    assert f"skipped   1 rows of {file}: {file}:2:2: not JSON" in printed.out + printed.err
    out = str(tmp_path / "out")
    assert main(["train", "--model", "tiny", "--data", str(file), "--out", out]) == 2
    assert f"{file}:2:2: not JSON" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny() -> Base:
    return load_base("tiny", "float32", Console())


def written(path: Path, *answers: str) -> Path:
    rows = ({"prompt": "Hi", "completion": answer} for answer in answers)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def packed(file: Path, base: Base, **options) -> tuple[datasets.Sequences, str]:
    chosen = DataOptions(file, **options)
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    sequences = datasets.pack(chosen, datasets.read(chosen).train, base, console)
    return sequences, console.export_text()


def test_16_an_empty_file_and_a_file_without_a_usable_row_are_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.touch()
    with pytest.raises(InputError, match="is empty"):
        read_rows(file)
    file.write_bytes(b"{}\n[]\n")
    with pytest.raises(InputError, match="no usable row of 2"):
        read_file(file, skip_bad_lines=5)


def test_16_all_rows_filtered_is_refused(tmp_path, tiny):
    file = written(tmp_path / "rows.jsonl", "word " * 90, "word " * 80)
    with pytest.raises(InputError, match="no row of 2 has a trained token within 32 tokens"):
        packed(file, tiny, max_length=32, truncate="drop")


def test_16_all_labels_masked_is_refused():
    silent = [Encoded(np.arange(5, dtype=np.int32), np.zeros(5, bool))]
    with pytest.raises(InputError, match="no token of 1 rows can be trained"):
        arrange_rows(silent, max_length=8, vocab_size=10)


def test_16_a_micro_batch_without_a_trained_token_has_loss_and_gradient_zero():
    row = Encoded(np.arange(5, dtype=np.int32), np.ones(5, bool))
    groups = arrange_rows([row], max_length=8, vocab_size=10)
    batch = next(eval_batches(groups, plan_batches(groups, batch_size=1, accumulate=2)))
    assert batch.weights.sum(axis=1).tolist() == [4, 0]
    table = jnp.ones((10, 10))

    def total(table, index):
        logits = table[batch.tokens[index].reshape(-1)[batch.predict_at[index]]]
        return cross_entropy(logits, batch.targets[index], batch.weights[index]).total

    for index, empty in ((0, False), (1, True)):
        loss, gradient = jax.value_and_grad(total)(table, index)
        assert (float(loss) == 0) == empty
        assert (not gradient.any()) == empty
        assert jnp.isfinite(gradient).all()


def test_17_a_row_beyond_the_limit_is_refused_unless_a_policy_is_chosen(tmp_path, tiny):
    file = written(tmp_path / "rows.jsonl", "short", "word " * 90)
    with pytest.raises(InputError, match=r"1 of 2 rows are longer .*rows\.jsonl:2 \(\d+\)"):
        packed(file, tiny, max_length=128)
    sequences, printed = packed(file, tiny, max_length=128, truncate="drop")
    assert sequences.batches.rows == 1
    assert "1 rows left out, 0 cut, 0 split at 128 tokens (--truncate drop)" in printed
    sequences, printed = packed(file, tiny, max_length=128, truncate="end")
    assert sequences.batches.rows == 2
    assert "0 rows left out, 1 cut, 0 split at 128 tokens (--truncate end)" in printed


def test_17_split_takes_text_apart_without_losing_a_token_and_refuses_conversations(tmp_path, tiny):
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "word " * 90}) + "\n")
    whole, silence = packed(file, tiny, max_length=512)
    assert "too long" not in silence
    pieces, printed = packed(file, tiny, max_length=64, truncate="split")
    assert "0 rows left out, 0 cut, 1 split at 64 tokens (--truncate split)" in printed
    assert pieces.batches.trained_tokens == whole.batches.trained_tokens
    assert pieces.batches.rows == 8
    chats = written(tmp_path / "rows.jsonl", "word " * 90)
    with pytest.raises(InputError, match="1 of 1 rows are longer than 64 tokens"):
        packed(chats, tiny, max_length=64, truncate="split")


def test_17_cutting_never_keeps_a_row_that_has_nothing_left_to_learn():
    late = Encoded(np.arange(20, dtype=np.int32), np.arange(20) >= 15)
    early = Encoded(np.arange(20, dtype=np.int32), np.arange(20) >= 5)
    fitted = fit_rows([late, early], 10, "end")
    assert (len(fitted.rows), fitted.dropped, fitted.cut) == (1, 1, 1)


def test_17_a_batch_larger_than_the_data_is_told(tmp_path, tiny):
    file = written(tmp_path / "rows.jsonl", "one", "two")
    sequences, _ = packed(file, tiny, batch_size=8)
    assert "6 stay empty in every epoch: lower --batch-size" in str(sequences.batches)


@pytest.mark.parametrize("packing", ["packed", "buckets", "padded"])
@pytest.mark.parametrize("bad", [-1, 320, 2**31 - 1])
def test_18_an_id_outside_the_embedding_is_refused_on_the_host(packing, bad):
    rows = [Encoded(np.array([1, 2, 3], np.int32), np.ones(3, bool), f"a:{i}") for i in range(3)]
    rows[1].ids[1] = bad
    with pytest.raises(InputError, match=rf"\[0, 320\): use the tokenizer .*a:1: id {bad}$"):
        arrange_rows(rows, packing=packing, max_length=8, vocab_size=320)


def test_18_jax_itself_would_not_notice():
    table = jnp.arange(4.0)[:, None]
    assert jnp.asarray(table)[jnp.array([99])].item() == 3.0


def test_18_a_tokenizer_without_the_named_end_token_adds_none():
    characters = Tokenizer(models.BPE({"H": 0, "i": 1}, []))
    encoded = encode_text(characters, {"eos_token": "</s>"}, "Hi")
    assert encoded.ids.tolist() == [0, 1]


def test_14_a_changed_row_or_option_changes_the_digest(tmp_path, tiny):
    file = written(tmp_path / "rows.jsonl", "one", "two", "three")
    copy = written(tmp_path / "copy.jsonl", "one", "two", "three")
    edited = written(tmp_path / "edited.jsonl", "one", "two", "Three")

    def of(path, seed=0, **options):
        return digest(*packed(path, tiny, **options)[0], seed=seed)

    # What changes no batch changes no digest: another place, more epochs, a limit out of reach.
    assert of(file) == of(copy) == of(file, epochs=9) == of(file, max_length=64)
    others = [
        of(edited), of(file, seed=1), of(file, batch_size=1), of(file, packing="padded"),
        of(file, accumulate=2), of(file, max_length=28, truncate="end"),
    ]  # fmt: skip
    assert of(file) not in others


ENVIRONMENTS = [
    {"PYTHONHASHSEED": "1", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONHASHSEED": "2", "LC_ALL": "tr_TR.UTF-8", "TZ": "Pacific/Kiritimati"},
]


def test_28_the_environment_changes_neither_rows_nor_messages_nor_digests(tmp_path):
    file = tmp_path / "zeilen.jsonl"
    file.write_bytes(b"\n".join([GOOD, "{ß".encode(), GOOD, b""]))
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(Path(__file__).parent)]}; " + (
        f"import test_data_faults as t; print(ascii(t.fingerprint({str(file)!r})))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for environment in ENVIRONMENTS
    ]
    printed = {process.communicate()[0].strip() for process in running}
    assert printed == {ascii(fingerprint(str(file)))}


def fingerprint(path: str) -> tuple:
    found = read_file(path, skip_bad_lines=1)
    letters = [list(row.messages[0]["content"].encode()) for row in found.rows]
    rows = [Encoded(np.array(ids, np.int32), np.ones(len(ids), bool)) for ids in letters]
    groups = arrange_rows(rows, max_length=32, vocab_size=256)
    return found, digest(groups, plan_batches(groups, batch_size=1), seed=0)
